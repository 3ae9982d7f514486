"""Which engine: io_uring, else threads, else aiofiles, and why."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path

from fuyou.core.errors import ConfigError, StorageIOError
from fuyou.core.ticket import DEADLINE_S
from fuyou.tiers.io.engine import Engine
from fuyou.tiers.io.measure import LEAST_MEMORY_BYTES, measure
from fuyou.tiers.io.tuning import Tuning, remember, remembered

WORTH_BYTES = 1 << 30  # of a store: below this a few seconds of measuring do not pay
KINDS = ("io_uring", "threads", "aiofiles")


def open_engine(kind: str = "auto", *, tuning: Tuning | None = None, deadline_s: float = DEADLINE_S) -> Engine:
    """An I/O engine whose waits end after `deadline_s`.

    "auto" takes the first of io_uring, threads, aiofiles that works here and says why in `note`. `tuning` is for the
    native ones; None is `default_tuning`.

    A kind asked for by name that cannot be had raises ConfigError saying why.
    """
    if kind not in ("auto", *KINDS):
        raise ConfigError(f'io={kind!r} is none of "auto", ' + ", ".join(f'"{name}"' for name in KINDS) + ".")
    reasons: dict[str, list[str]] = {}  # why not -> the engines that it rules out
    for name in KINDS if kind == "auto" else (kind,):
        try:
            engine = _open(name, f"{name}, because {_text(reasons)}" if reasons else "", tuning)
            engine.deadline_s = deadline_s
            return engine
        except (ImportError, OSError) as error:
            reasons.setdefault(_reason(error), []).append(name)
    raise ConfigError(f"io={kind!r} cannot be had here: {_text(reasons)}.")


def open_for_drive(
    kind: str, folder: str, store_bytes: int, address: int, nbytes: int, *, deadline_s: float = DEADLINE_S
) -> Engine:
    """`open_engine`, tuned for the drive of `folder`: as remembered there, else as measured now and remembered.

    It measures (some seconds) only where `store_bytes`, what the drive is about to hold, make that worth its while, in
    the memory [address, address + nbytes), whose content is lost. A drive that cannot be measured gets the default.
    """
    engine = open_engine(kind, deadline_s=deadline_s)
    if engine.name == "aiofiles":
        return engine
    tuning = remembered(folder, engine.name)
    if tuning is None and store_bytes >= WORTH_BYTES and nbytes >= LEAST_MEMORY_BYTES:
        open_tuned = partial(open_engine, engine.name, deadline_s=deadline_s)
        with contextlib.suppress(StorageIOError):
            tuning = measure(lambda each: open_tuned(tuning=each), engine.name, folder, address, nbytes)
            remember(folder, engine.name, tuning)
    if tuning is None:
        return engine
    engine.close()
    return open_engine(kind, tuning=tuning, deadline_s=deadline_s)


def _text(reasons: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} not available: {why}"
        for why, names in reasons.items()
    )


def _open(name: str, note: str, tuning: Tuning | None) -> Engine:
    # Imported here: each needs something (the extension, aiofiles) whose absence only rules out that engine.
    if name == "aiofiles":
        from fuyou.tiers.io.aio import AiofilesEngine

        return AiofilesEngine(note)
    from fuyou.tiers.io.native import NativeEngine

    return NativeEngine(name, note, tuning=tuning)


def _reason(error: Exception) -> str:
    if isinstance(error, ImportError):
        built = Path(__file__).parents[2] / "_native_build_error.txt"  # written by setup.py when the build fails
        why = f" (its build failed: {built.read_text().strip()})" if built.is_file() else ""
        return f"{error}{why}"
    return getattr(error, "strerror", None) or str(error)
