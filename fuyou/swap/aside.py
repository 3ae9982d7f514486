"""Byte strings that are committed with a step and are too large for its record: the map of the extents, buffers, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fuyou.swap.buffers import Buffers
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.store import Extent, Store

SPARE = "spare"  # the name of extents that hold nothing yet
SLOTS = 2
Part = tuple[int, torch.Tensor]  # offset in the byte string, (count,) uint8 on the host


class Aside:
    """Named byte strings in extents of `piece_bytes` with two slots each, written through one buffer of that size.

    Extents, because a record is written whole with every step and these are not: a piece is written only where its bytes
    have changed, and is checked, kept and superseded as weights are. One thread at a time uses this.
    """

    def __init__(
        self, store: Store, buffers: Buffers, piece_bytes: int, pieces: int, adopted: Mapping[str, Sequence[int]]
    ) -> None:
        """Before the store opens: `pieces` are placed, and whoever needs more adds to them. `adopted`: the numbers of an
        earlier run's by name, where the store goes on from it; `put` fills them anew."""
        self._store = store
        self._buffers = buffers
        self._piece_bytes = piece_bytes
        self._extents = {name: [self._place(number) for number in numbers] for name, numbers in adopted.items()}
        spare = self._extents.setdefault(SPARE, [])
        spare += [self._place(None) for _ in range(pieces - sum(map(len, self._extents.values())))]
        self._nbytes = dict.fromkeys(self._extents, 0)
        self._checksums: dict[Extent, int] = {}

    def reserve(self, name: str, nbytes: int) -> None:
        """Room for so many bytes. BudgetError or StoreError where the drives have none."""
        extents = self._extents.setdefault(name, [])
        self._nbytes.setdefault(name, 0)
        while len(extents) * self._piece_bytes < nbytes:
            spare = self._extents[SPARE]
            extents.append(
                spare.pop(0) if spare else self._store.add(self._piece_bytes, "staging", SLOTS, committed=True)
            )

    def put(self, name: str, nbytes: int, parts: Sequence[Part], before_write: Callable[[], None]) -> None:
        """Make these the bytes of `name`, from the next commit on; what no part covers is zero. `before_write` is called
        before a byte of the last commit's is superseded."""
        self.reserve(name, nbytes)
        for number, extent in enumerate(self._extents[name]):
            start = number * self._piece_bytes
            if start < nbytes:
                self._put_piece(extent, start, parts, before_write)
        self._nbytes[name] = nbytes

    def table(self) -> dict[str, list]:
        """Where each lies, for the record: its bytes, and the numbers of its extents."""
        return {
            name: [self._nbytes[name], [extent.index for extent in extents]] for name, extents in self._extents.items()
        }

    def close(self) -> None:
        self._buffers.close()

    def _place(self, number: int | None) -> Extent:
        return self._store.place(self._piece_bytes, "staging", SLOTS, committed=True, adopt=number)

    def _put_piece(self, extent: Extent, start: int, parts: Sequence[Part], before_write: Callable[[], None]) -> None:
        buffer = self._buffers.take()
        moves = []
        try:
            whole = buffer.data[: self._piece_bytes]
            whole.zero_()
            for offset, data in parts:
                first, last = max(offset, start), min(offset + data.numel(), start + self._piece_bytes)
                if first < last:
                    whole[first - start : last - start].copy_(data[first - offset : last - offset])
            checksum = best_checksum().of(buffer.address, self._piece_bytes)
            if not extent.written or self._checksums.get(extent) != checksum:
                before_write()
                extent.await_free()
                moves.append(extent.write(buffer.address, buffer))
                self._checksums[extent] = checksum
        finally:
            self._buffers.put(buffer, moves)
