"""Where the elements of a tensor come from that is not in memory: a file, and what was made of it, piece by piece.

A source is a flat row of `count` elements. Casting, stacking, concatenating and splitting keep runs of elements together,
so that any range of the result is a few ranges of files, and nothing but a piece is ever in memory. What moves single
elements (a transposition) is computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fuyou.checkpoint.weight_files import WeightsFile

PIECE_BYTES = 1 << 20  # in a core's second cache: it is converted and copied right after it was read


class Source(Protocol):
    """`whole_bytes`: host memory that one reader needs beside a few pieces."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def count(self) -> int: ...

    @property
    def whole_bytes(self) -> int: ...

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Elements [first, last) in order, as flat host tensors of any length; each is valid until the next."""
        ...


@dataclass(frozen=True)
class FileRange:
    """`count` elements from byte `begin` of a file."""

    file: WeightsFile
    dtype: torch.dtype
    begin: int
    count: int

    whole_bytes = 0

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        step = PIECE_BYTES // self.dtype.itemsize
        buffer = torch.empty(min(step, last - first), dtype=self.dtype)
        for start in range(first, last, step):
            piece = buffer[: last - start]
            self.file.read(self.begin + start * self.dtype.itemsize, piece.view(torch.uint8).numpy().data)
            yield piece


@dataclass(frozen=True)
class Cast:
    """Every element rounded to `dtype`, as Tensor.to does it."""

    source: Source
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return self.source.count

    @property
    def whole_bytes(self) -> int:
        return self.source.whole_bytes

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        for part in self.source.parts(first, last):
            yield part.to(self.dtype)


@dataclass(frozen=True)
class Joined:
    """`rows` times: the next run of each source, one behind the other (a concatenation along any dimension)."""

    sources: Sequence[Source]
    rows: int

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def count(self) -> int:
        return sum(source.count for source in self.sources)

    @property
    def whole_bytes(self) -> int:
        return max(source.whole_bytes for source in self.sources)

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        runs = [source.count // self.rows for source in self.sources]
        width = sum(runs)
        for row in range(first // width, -(-last // width)) if width else ():
            at = row * width
            for source, run in zip(self.sources, runs, strict=True):
                start, stop = max(first, at), min(last, at + run)
                if start < stop:
                    yield from source.parts(row * run + start - at, row * run + stop - at)
                at += run


@dataclass(frozen=True)
class Part:
    """`rows` times: `run` elements of each row of a source, from `offset` in the row on (a slice along any dimension)."""

    source: Source
    rows: int
    offset: int
    run: int

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def count(self) -> int:
        return self.rows * self.run

    @property
    def whole_bytes(self) -> int:
        return self.source.whole_bytes

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        width = self.source.count // self.rows
        for row in range(first // self.run, -(-last // self.run)) if self.run else ():
            start, stop = max(first, row * self.run), min(last, (row + 1) * self.run)
            shift = row * width + self.offset - row * self.run
            yield from self.source.parts(start + shift, stop + shift)


class Whole:
    """What `compute` makes of whole tensors, kept from its first element's reading to its last one's."""

    def __init__(self, compute: Callable[[], torch.Tensor], dtype: torch.dtype, count: int, input_bytes: int) -> None:
        self.dtype = dtype
        self.count = count
        self.whole_bytes = input_bytes + 2 * count * dtype.itemsize  # and one intermediate result
        self._compute = compute
        self._value: torch.Tensor | None = None

    def parts(self, first: int, last: int) -> Iterator[torch.Tensor]:
        if self._value is None:
            self._value = self._compute().contiguous().view(-1)
        part = self._value[first:last]
        if last == self.count:
            self._value = None
        yield part


def read_whole(source: Source) -> torch.Tensor:
    """All of it, flat, in host memory."""
    value = torch.empty(source.count, dtype=source.dtype)
    at = 0
    for part in source.parts(0, source.count):
        value[at : at + part.numel()] = part
        at += part.numel()
    return value
