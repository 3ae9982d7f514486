"""A wrapped model's tensors as sources for export."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fuyou.core.errors import StateError
from fuyou.swap.ranges import WriteBehind
from fuyou.swap.unit import Member, chunks_of, overlap


class MemberSource:
    """One parameter's compute copy, chunk by chunk from its home: host memory is that of one chunk."""

    def __init__(self, name: str, member: Member, writes: WriteBehind) -> None:
        self.name = name
        self.dtype: torch.dtype = member.unit.dtype
        self.shape = tuple(member.entry.shape)
        self._member = member
        self._writes = writes

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order; each part is valid until the next is asked for."""
        for chunk in chunks_of(self._member):
            staging = self._writes.stage([chunk.weights], f"the export of {self.name}")
            if staging is None:
                raise StateError(f"No host memory came free for the export of {self.name}.")
            try:
                staging.load(check=True).wait()
                first, last, at = overlap(self._member, chunk)
                part = staging.views[0].view(self.dtype)[at : at + last - first]
                yield part.view(torch.uint8).numpy().data
            finally:
                staging.release()
