"""Which engine: io_uring, else threads, else aiofiles, and why."""

from __future__ import annotations

from pathlib import Path

from fuyou.core.errors import ConfigError
from fuyou.core.ticket import DEADLINE_S
from fuyou.tiers.io.engine import Engine

KINDS = ("io_uring", "threads", "aiofiles")


def open_engine(kind: str = "auto", *, deadline_s: float = DEADLINE_S) -> Engine:
    """An I/O engine whose waits end after `deadline_s`.

    "auto" takes the first of io_uring, threads, aiofiles that works here and says why in `note`.

    A kind asked for by name that cannot be had raises ConfigError saying why.
    """
    if kind not in ("auto", *KINDS):
        raise ConfigError(f'io={kind!r} is none of "auto", ' + ", ".join(f'"{name}"' for name in KINDS) + ".")
    reasons: dict[str, list[str]] = {}  # why not -> the engines that it rules out
    for name in KINDS if kind == "auto" else (kind,):
        try:
            engine = _open(name, note=f"{name}, because {_text(reasons)}" if reasons else "")
            engine.deadline_s = deadline_s
            return engine
        except (ImportError, OSError) as error:
            reasons.setdefault(_reason(error), []).append(name)
    raise ConfigError(f"io={kind!r} cannot be had here: {_text(reasons)}.")


def _text(reasons: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not available: {why}"
        for why, names in reasons.items()
    )


def _open(name: str, note: str) -> Engine:
    # Imported here: each needs something (the extension, aiofiles) whose absence only rules out that engine.
    if name == "aiofiles":
        from fuyou.tiers.io.aio import AiofilesEngine

        return AiofilesEngine(note)
    from fuyou.tiers.io.native import NativeEngine

    return NativeEngine(name, note)


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        built = Path(__file__).parents[2] / "_native_build_error.txt"  # written by setup.py when the build fails
        why = f" (its build failed: {built.read_text().strip()})" if built.is_file() else ""
        return f"{error}{why}"
    return getattr(error, "strerror", None) or str(error)
