"""Free byte ranges of one address space, first fit."""

from __future__ import annotations


class FreeRanges:
    """What is free of `nbytes`, as sorted (offset, nbytes) that never touch. Not thread-safe: its owner locks."""

    __slots__ = ("_ranges",)

    def __init__(self, nbytes: int) -> None:
        self._ranges: list[tuple[int, int]] = [(0, nbytes)] if nbytes else []

    def take(self, nbytes: int) -> int | None:
        """The offset of `nbytes` that are free no more, None where no range is that large."""
        for index, (offset, free) in enumerate(self._ranges):
            if free >= nbytes:
                self._ranges[index : index + 1] = [(offset + nbytes, free - nbytes)] if free > nbytes else []
                return offset
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """`nbytes` at `offset`, which were taken, are free again."""
        self._ranges.append((offset, nbytes))
        self._ranges.sort()
        merged: list[tuple[int, int]] = []
        for start, size in self._ranges:
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._ranges = merged
