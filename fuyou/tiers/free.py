"""Free byte ranges of one address space, first fit."""

from __future__ import annotations

from collections import deque


class FreeRanges:
    """What is free of `nbytes`, as sorted (offset, nbytes) that never touch. Not thread-safe: its owner locks for `take`.

    `give` may come at any time, from any thread and in the middle of a `take`, for a garbage collection there may be what
    gives back: it only leaves word (an append is atomic), and the next `take` sees to it.
    """

    __slots__ = ("_given", "_ranges")

    def __init__(self, nbytes: int) -> None:
        self._ranges: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []
        self._given: deque[tuple[int, int]] = deque()

    def take(self, nbytes: int) -> int | None:
        """The offset of `nbytes` that are free no more, None where no range is that large."""
        self._merge()
        for index, (offset, free) in enumerate(self._ranges):
            if free >= nbytes:
                self._ranges[index : index + 1] = [(offset + nbytes, free - nbytes)] if free > nbytes else []
                return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """`nbytes` at `offset`, which were taken, are free again."""
        self._given.append((offset, nbytes))

    def _merge(self) -> None:
        """What was given, among what was free."""
        given = [self._given.popleft() for _ in range(len(self._given))]
        if not given:
            return
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self._ranges, *given]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._ranges = merged
