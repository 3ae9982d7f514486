"""Builds `fuyou._native` from csrc/. All that is static stands in pyproject.toml.

The extension is optional: where there is no compiler, or the build fails, the install succeeds, the reason is printed
and kept in `fuyou/_native_build_error.txt`, and fuyou falls back (and says so) at run time. With FUYOU_NATIVE=strict a
failure is an error and so is a compiler's warning: that is how people and CI check the build.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STRICT = os.environ.get("FUYOU_NATIVE", "") == "strict"
REASON_FILE = "_native_build_error.txt"


class OptionalBuildExt(build_ext):
    """build_ext whose failure is a message, not the end of the install."""

    def build_extension(self, ext) -> None:  # type: ignore[no-untyped-def]
        try:
            if importlib.util.find_spec("pybind11") is None:
                raise ModuleNotFoundError("pybind11 is not installed where the build runs")
            super().build_extension(ext)
            self._forget_reason(ext)
        except Exception as error:
            if STRICT:
                raise
            # The compiler has said what it dislikes; its whole command line would only bury the message.
            self._keep_reason(ext, re.sub(r"Command '?\[.*?\]'? returned", "the compiler returned", str(error)))

    def _reason_paths(self, ext) -> list[Path]:  # type: ignore[no-untyped-def]
        built = Path(self.get_ext_fullpath(ext.name)).parent
        return [built / REASON_FILE] + ([Path("fuyou") / REASON_FILE] if self._is_in_place() else [])

    def _is_in_place(self) -> bool:
        return bool(self.inplace or getattr(self, "editable_mode", False))

    def _keep_reason(self, ext, reason: str) -> None:  # type: ignore[no-untyped-def]
        print(
            f"fuyou: the native extension could not be built ({reason}). The install goes on without it: I/O runs "
            "through aiofiles and AdamW through torch, which is slower. Install a C++17 compiler "
            "(and pybind11, without build isolation) and reinstall.",
            file=sys.stderr,
        )
        for path in self._reason_paths(ext):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(reason + "\n")

    def _forget_reason(self, ext) -> None:  # type: ignore[no-untyped-def]
        for path in self._reason_paths(ext):
            path.unlink(missing_ok=True)


def native_extension() -> Extension:
    try:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile
    except ImportError:  # --no-build-isolation without it: build_extension says so
        include_dirs = []
    else:
        include_dirs = [pybind11.get_include()]
        ParallelCompile("FUYOU_BUILD_JOBS", default=2).install()
    # -ffp-contract=off: a fused multiply-add that the source does not ask for would change AdamW's bits.
    flags = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
    return Extension(
        "fuyou._native",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.hpp")),
        include_dirs=["csrc", *include_dirs],
        language="c++",
        extra_compile_args=flags + (["-Werror"] if STRICT else []),
        extra_link_args=["-pthread"],
        optional=not STRICT,
    )


setup(ext_modules=[native_extension()], cmdclass={"build_ext": OptionalBuildExt})
