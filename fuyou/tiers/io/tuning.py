"""How an engine talks to its drive: the size and number of its requests, and how reads and writes take turns."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Tuning:
    """Requests are cut into pieces of `piece_bytes`, of which `queue_depth` are under way at a time.

    While reads and writes both wait, each kind has `burst_bytes` in turn. The speeds are those measured with these
    values, 0.0 where nothing was measured.
    """

    piece_bytes: int
    queue_depth: int
    burst_bytes: int
    read_bytes_per_s: float = 0.0
    write_bytes_per_s: float = 0.0
    mixed_bytes_per_s: float = 0.0


def default_tuning(backend: str) -> Tuning:
    """What does well on most drives: good enough where a measurement is not worth its time."""
    return Tuning(MIB, 8 if backend == "threads" else 32, 64 * MIB)
