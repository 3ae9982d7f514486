"""How named tensors are packed in one range of bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fuyou.core.sizes import align_up

# Tensors start at multiples of 128 elements: 256 bytes in bf16, 512 in fp32. One element offset then serves every array
# of a unit (weights, gradients, both moments, low halves), F.linear's bits do not depend on the packing (at 4- or
# 8-byte alignment they do), and chunk edges stay multiples of 16 elements from each tensor's start.
ALIGN_ELEMENTS = 128


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout: `start` and `count` in elements."""

    name: str
    shape: torch.Size
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


class Layout:
    """Immutable map name → (dtype, shape, offset) of tensors of one dtype, packed in one range."""

    def __init__(self, dtype: torch.dtype, tensors: Iterable[tuple[str, torch.Size]]) -> None:
        self.dtype = dtype
        entries, start = [], 0
        for name, shape in tensors:
            entries.append(Entry(name, torch.Size(shape), start, torch.Size(shape).numel()))
            start = align_up(entries[-1].stop, ALIGN_ELEMENTS)
        self.entries = tuple(entries)
        self.count = start  # elements, padding included

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors, in order, as views of `flat` ((count,), dtype of the layout): nothing is copied."""
        return [flat[entry.start : entry.stop].view(entry.shape) for entry in self.entries]

    def within(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(entry index, first element, past-the-last element) of every part of a tensor inside [start, stop)."""
        return [
            (index, max(entry.start, start), min(entry.stop, stop))
            for index, entry in enumerate(self.entries)
            if entry.start < stop and entry.stop > start
        ]
