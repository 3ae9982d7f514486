"""How an engine talks to its drive: the size and number of its requests, and how reads and writes take turns."""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass, fields
from typing import Any

from fuyou.core.beside import read_beside, write_beside

MIB = 1 << 20
FILE = "fuyou-io.json"  # in the nvme folder, beside the store
VERSION = 1


@dataclass(frozen=True)
class Tuning:
    """Requests are cut into pieces of `piece_bytes`, of which `queue_depth` are under way at a time.

    While reads and writes both wait, each kind has `burst_bytes` in turn. The speeds are those measured with these
    values (mixed: reads and writes together, half of each), 0.0 where nothing was measured.
    """

    piece_bytes: int
    queue_depth: int
    burst_bytes: int
    read_bytes_per_s: float = 0.0
    write_bytes_per_s: float = 0.0
    mixed_bytes_per_s: float = 0.0


def default_tuning(backend: str) -> Tuning:
    """What does well on most drives: good enough where a measurement is not worth its time."""
    if backend == "threads":
        return Tuning(MIB, 8, 64 * MIB)
    return Tuning(4 * MIB, 16, 64 * MIB)


def remembered(folder: str, backend: str) -> Tuning | None:
    """What was measured in `folder` for `backend` on this file system under this kernel; None where nothing was."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return _checked(_tunings(folder)[backend])
    return None


def remember(folder: str, backend: str, tuning: Tuning) -> None:
    """Keep `tuning` beside the store for the next run."""
    tunings = _tunings(folder) | {backend: asdict(tuning)}
    write_beside(folder, FILE, {"version": VERSION, "machine": _machine(folder), "tunings": tunings})


def _tunings(folder: str) -> dict[str, Any]:
    """By backend, unchecked. Empty where the file is not there, is of another machine, or is anything else: anybody may
    have written it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = read_beside(folder, FILE)
        if content["version"] == VERSION and content["machine"] == _machine(folder):
            return dict(content["tunings"])
    return {}


def _machine(folder: str) -> dict[str, Any]:
    """What a measurement depends on and can be told without measuring: the file system and the kernel."""
    return {"file_system": os.statvfs(folder).f_fsid, "kernel": os.uname().release}


def _checked(values: dict[str, Any]) -> Tuning:
    """ValueError where a value cannot be one of a Tuning."""
    tuning = Tuning(**{field.name: values[field.name] for field in fields(Tuning)})
    counts = (tuning.piece_bytes, tuning.queue_depth, tuning.burst_bytes)
    speeds = (tuning.read_bytes_per_s, tuning.write_bytes_per_s, tuning.mixed_bytes_per_s)
    if not (
        all(type(each) is int for each in counts)
        and all(type(each) in (int, float) and 0 <= each < 1e15 for each in speeds)  # false for NaN
        and 4096 <= tuning.piece_bytes <= 1 << 30
        and tuning.piece_bytes % 4096 == 0
        and 1 <= tuning.queue_depth <= 256
        and 0 <= tuning.burst_bytes <= 1 << 40
    ):
        raise ValueError(f"not a tuning: {values}")
    return tuning
