"""What happens during the steps of a run, in rings: operations by resource, bytes held, resident memory.

Always on, so each note is one append to a ring, which holds its last `kept` entries and nothing else however long the run is;
no lock is taken (an append is atomic) and no device is waited for. Times are those of time.perf_counter().
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple, TypeVar

LANES = (
    "model",  # the model's own forward, around those of its blocks
    "compute",  # forward and backward of a block; on CUDA when it was queued, not when the device ran it
    "recompute",  # a block's forward once more, within its backward
    "host_to_device",  # copies; on CUDA when they were queued
    "device_to_host",
    "nvme_read",  # from the first piece at the drive to the last one back
    "nvme_write",
    "adam",
    "commit",  # from its beginning, and so with the writes that it waits for
    "stall",  # the training thread waits, for the cause that is its name
)
KEPT = 8192
KEPT_STEPS = 256
T = TypeVar("T")


class Span(NamedTuple):
    began: float
    ended: float
    name: str
    nbytes: int


class Change(NamedTuple):
    """A charge or discharge: `nbytes` more (or less) of a category, of which `held` bytes are held from then on."""

    at: float
    category: str
    nbytes: int
    held: int


class Recorder:
    """`on` may be turned off, to measure what recording costs. `most_resident` is the highest note of resident memory, and
    `held_then` the bytes that tiers held at that time."""

    def __init__(self, kept: int = KEPT) -> None:
        self.on = True
        self._spans: dict[str, deque[tuple[float, float, str, int]]] = {lane: deque(maxlen=kept) for lane in LANES}
        self._changes: dict[str, deque[tuple[float, str, int, int]]] = {}
        self._resident: deque[tuple[float, int]] = deque(maxlen=kept)
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=KEPT_STEPS)
        self._kept = kept
        self.most_resident = 0
        self.held_then: dict[str, int] = {}

    # Notes ------------------------------------------------------------------------------------------------------------

    def span(self, lane: str, began: float, ended: float, name: str, nbytes: int = 0) -> None:
        if self.on:
            self._spans[lane].append((began, ended, name, nbytes))

    def timed(self, lane: str, name: str, nbytes: int = 0) -> Timed:
        """`with recorder.timed("adam", …):` notes a span around its body."""
        return Timed(self, lane, name, nbytes)

    def change(self, tier: str, category: str, nbytes: int, held: int) -> None:
        if self.on:
            ring = self._changes.get(tier)
            if ring is None:
                ring = self._changes.setdefault(tier, deque(maxlen=self._kept))
            ring.append((time.perf_counter(), category, nbytes, held))

    def resident(self, nbytes: int) -> bool:
        """Resident memory of the process is `nbytes` now; whether that is more than ever noted."""
        if not self.on:
            return False
        self._resident.append((time.perf_counter(), nbytes))
        if nbytes <= self.most_resident:
            return False
        self.most_resident = nbytes
        return True

    def step(self, number: int, began: float, ended: float) -> None:
        if self.on:
            self._steps.append((number, began, ended))

    # Reading ----------------------------------------------------------------------------------------------------------

    def spans(self, lane: str) -> list[Span]:
        return [Span(*each) for each in _copied(self._spans[lane])]

    def changes(self, tier: str) -> list[Change]:
        return [Change(*each) for each in _copied(self._changes.get(tier, deque()))]

    def residents(self) -> list[tuple[float, int]]:
        return _copied(self._resident)

    def steps(self) -> list[tuple[int, float, float]]:
        """(number, began, ended) of the last ones, oldest first."""
        return _copied(self._steps)

    def whole_since(self) -> float:
        """From here on nothing has been overwritten yet: the time of the oldest entry of the rings that are full."""
        full = [ring for ring in self._spans.values() if len(ring) == self._kept]
        oldest = [ring[0][1] for ring in full]
        oldest += [ring[0][0] for ring in self._changes.values() if len(ring) == self._kept]
        return max(oldest, default=float("-inf"))


class Timed:
    __slots__ = ("_began", "_lane", "_name", "_nbytes", "_recorder")

    def __init__(self, recorder: Recorder, lane: str, name: str, nbytes: int) -> None:
        self._recorder = recorder
        self._lane = lane
        self._name = name
        self._nbytes = nbytes

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._recorder.span(self._lane, self._began, time.perf_counter(), self._name, self._nbytes)


def _copied(ring: deque[T]) -> list[T]:
    while True:
        try:
            return list(ring)
        except RuntimeError:  # another thread noted something meanwhile
            continue
