"""An import may only point down, the parts of a layer that must not know each other do not, and csrc knows no torch."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fuyou"

LAYERS = [
    "_native",
    "core",
    "tiers",
    "swap",
    "plan",
    "runtime",
    "checkpoint",
    "report",
    "api",
    "pretrained",
    "train",
    "doctor",
    "cli",
]
RANK = {name: rank for rank, name in enumerate(LAYERS)}

# Parts of fuyou/tiers. Folders, their locks, drives and I/O engines are the store's; what is not named is shared below them.
TIERS = {"host": "host", "device": "device"} | dict.fromkeys(
    "store extents verified scratch commits pins records record_files saved saving drives shares folders io lock".split(),
    "store",
)
RESIDENTS = ("weights", "gradients", "optimizer_state", "activations")  # of fuyou/swap; they meet in the schedule


@dataclass(frozen=True)
class Import:
    importer: str  # dotted module, e.g. "fuyou.swap.weights"
    target: str  # dotted module, e.g. "fuyou.core.layout", or the top of a foreign one
    names: tuple[str, ...]  # what is taken from it; empty for a plain import
    line: int
    at_top: bool  # executed when the module is imported

    def __str__(self) -> str:
        return f"{self.importer} line {self.line} imports {self.target}"


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir() or path.with_suffix(".pyi").exists()


def imports_of(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    importer = module_name(path)
    lazy = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(outer)
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, (), node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".") if path.name == "__init__.py" else importer.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            names = tuple(alias.name for alias in node.names)
            submodules = [name for name in names if base.startswith("fuyou") and is_module(f"{base}.{name}")]
            for name in submodules:
                yield Import(importer, f"{base}.{name}", (), node.lineno, at_top)
            if len(submodules) < len(names):
                yield Import(importer, base, names, node.lineno, at_top)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


MODULES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for path in MODULES for found in imports_of(path)]
OWN = [found for found in IMPORTS if found.target.split(".")[0] == "fuyou"]


def layer(dotted: str) -> str | None:
    """The layer of a module; None for the package itself, which only names what is public."""
    parts = dotted.split(".")
    return None if len(parts) == 1 or parts[1] == "__main__" else parts[1]


def part(dotted: str, package: str) -> str | None:
    """The file or folder of fuyou/PACKAGE that a module is or lies in."""
    parts = dotted.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == package else None


def test_the_parser_sees_imports() -> None:
    assert len(MODULES) > 10 and len(OWN) > 10
    assert any(found.target == "fuyou.core.errors" for found in OWN)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_belongs_to_a_layer(path: Path) -> None:
    name = layer(module_name(path))
    assert name is None or name in RANK, f"{path} lies in no layer of DESIGN; the layers are {', '.join(LAYERS)}"


def test_imports_point_down() -> None:
    wrong = []
    for found in OWN:
        importer, target = layer(found.importer), layer(found.target)
        if importer is None:
            continue  # fuyou/__init__.py and __main__.py name what others made
        # `import fuyou` is the public surface: everything up to api
        rank = RANK["api"] if target is None else RANK[target]
        if rank > RANK[importer]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_shows_only_values_and_the_api() -> None:
    shown = {layer(found.target) for found in OWN if found.importer == "fuyou" and found.at_top}
    assert shown <= {"core", "report", "api"}, f"fuyou/__init__.py imports {sorted(map(str, shown))}"


def test_tiers_do_not_import_each_other() -> None:
    wrong = []
    for found in OWN:
        importer, target = part(found.importer, "tiers"), part(found.target, "tiers")
        if importer is None or target is None or TIERS.get(target) is None:
            continue
        if TIERS.get(importer) != TIERS[target]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_io_engines_do_not_know_the_store() -> None:
    wrong = [
        str(found)
        for found in OWN
        if found.importer.startswith("fuyou.tiers.io") and part(found.target, "tiers") not in (None, "io")
    ]
    assert not wrong, "\n".join(wrong)


def test_residents_do_not_hold_each_other() -> None:
    """Functions on chunks may be shared; classes of another resident may not: the schedule brings them together."""
    wrong = []
    for found in OWN:
        importer, target = part(found.importer, "swap"), part(found.target, "swap")
        if importer in RESIDENTS and target in RESIDENTS and importer != target:
            if not found.names or any(name[:1].isupper() and not name.isupper() for name in found.names):
                wrong.append(f"{found}: {', '.join(found.names) or 'all of it'}")
    assert not wrong, "\n".join(wrong)


def test_the_planner_is_functions_on_numbers() -> None:
    allowed = ("fuyou.core", "fuyou.plan")
    wrong = [str(found) for found in OWN if layer(found.importer) == "plan" and not found.target.startswith(allowed)]
    wrong += [
        str(found)
        for found in IMPORTS
        if layer(found.importer) == "plan" and found.target.split(".")[0] in ("torch", "psutil")
    ]
    assert not wrong, "\n".join(wrong)


def test_values_do_no_io() -> None:
    wrong = [
        str(found)
        for found in IMPORTS
        if layer(found.importer) == "core"
        and (found.target.split(".")[0] in ("mmap", "fcntl", "aiofiles", "psutil") or found.target == "fuyou._native")
    ]
    assert not wrong, "\n".join(wrong)


def test_importing_needs_only_the_core_dependencies() -> None:
    """Extras such as transformers are imported where they are used, so that fuyou works without them."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    declared = {re.match(r"[\w-]+", name)[0] for name in re.findall(r'"([^"]+)"', listed[1])}  # type: ignore[index]
    known = {"pyyaml": "yaml"}
    allowed = {known.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"fuyou"}
    wrong = [str(found) for found in IMPORTS if found.at_top and found.target.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)


def test_csrc_knows_neither_torch_nor_cuda() -> None:
    sources = [*ROOT.glob("csrc/**/*.[ch]pp"), *ROOT.glob("csrc/**/*.h")]
    wrong = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10|cuda)", line)
    ]
    assert not wrong, "\n".join(wrong)


FOLDERS = ("csrc", "fuyou", "scripts", "examples", "tests")
SUFFIXES = ("py", "pyi", "cpp", "hpp", "sh", "yaml")


def files_in_readme() -> set[str]:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Files\n")[1].split("\n## ")[0]
    return set(re.findall(rf"`([\w/]+\.(?:{'|'.join(SUFFIXES)}))`", table))


def files_in_tree() -> list[str]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix[1:] in SUFFIXES]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.name != "__init__.py")


def test_the_readme_names_every_file() -> None:
    named = files_in_readme()
    missing = [path for path in files_in_tree() if not any(path.endswith("/" + name) for name in named)]
    assert not missing, f"README.md's table of files lacks {', '.join(missing)}"


def test_the_readme_names_no_file_that_is_gone() -> None:
    there = files_in_tree()
    gone = [name for name in sorted(files_in_readme()) if not any(path.endswith("/" + name) for path in there)]
    assert not gone, f"README.md's table of files names {', '.join(gone)}"
