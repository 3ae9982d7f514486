"""Room on the drives for bytes of one step, which no record names: taken when they come, given back when they are used."""

from __future__ import annotations

import contextlib
import threading

from fuyou.core.errors import StateError, StoreError
from fuyou.core.sizes import align_up
from fuyou.core.ticket import Ticket
from fuyou.tiers.extents import Extent, Slot, Transfer, slice_of
from fuyou.tiers.free import FreeRanges
from fuyou.tiers.shares import UNIT_BYTES
from fuyou.tiers.store import Store
from fuyou.tiers.verified import Verified

# What a drive's file grows by: often enough that little is held that nobody needs, seldom enough that growing costs nothing.
REGION_BYTES = 64 << 20


class Place:
    """`nbytes` (a multiple of 4096) on the drives with one holder, who writes them once, reads them, and gives them back.

    `release` may come at any time: the memory is the operations' own, and engines order what overlaps in a file.
    """

    __slots__ = ("_checksum", "_offset", "_region", "_scratch", "_slot", "_what", "_written", "nbytes")

    def __init__(self, scratch: Scratch, region: int, offset: int, nbytes: int, slot: Slot, what: str) -> None:
        self._scratch: Scratch | None = scratch
        self._region = region
        self._offset = offset
        self._slot = slot
        self._what = what
        self._written: Ticket | None = None
        self._checksum: int | None = None  # of what was written, in a store that verifies
        self.nbytes = nbytes

    def write(self, address: int, keep: object) -> Ticket:
        """Start writing `nbytes` from `address`; `keep` lives until that has ended."""
        if self._scratch is not None:
            self._checksum = self._scratch.checksum_of(address, self.nbytes)
        self._written = self._transfer("write", address, keep)
        return self._written

    def read(self, address: int, keep: object) -> Ticket:
        """Start reading to `address`, behind the write, whose error the ticket raises too."""
        if self._written is None:
            raise StateError(f"{self.nbytes} bytes of scratch on the drives were read before they were written.")
        read = Transfer(self._transfer("read", address, keep), self._written)
        if self._checksum is None:
            return read
        return Verified(read, address, self._checksum, self._slot, f"{self._what} ({self.nbytes} bytes)", keep)

    def release(self) -> None:
        """Once; idempotent."""
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.give_back(self._region, self._offset, self.nbytes)

    def _transfer(self, kind: str, address: int, keep: object) -> Ticket:
        if self._scratch is None:
            raise StateError(f"{self.nbytes} bytes of scratch on the drives were used after they were given back.")
        return self._scratch.transfer(kind, self._slot, address, keep)


class Scratch:
    """Sub-allocates extents of the store, which it makes as they are needed and keeps. Any thread may call.

    In regions of up to `region_bytes`, striped over the drives as every extent is; what is left of the budget may be less.
    """

    def __init__(self, store: Store, category: str, region_bytes: int = REGION_BYTES) -> None:
        self._store = store
        self._category = category
        self._region_bytes = align_up(region_bytes, UNIT_BYTES)
        self._lock = threading.Lock()
        self._regions: list[tuple[Extent, FreeRanges]] = []

    def take(self, nbytes: int, what: str = "scratch") -> Place:
        """Room for `nbytes`, rounded up to 4096, of `what`. BudgetError or StoreError where the drives have none."""
        size = align_up(nbytes, UNIT_BYTES)
        with self._lock:
            for index, (extent, free) in enumerate(self._regions):
                offset = free.take(size)
                if offset is not None:
                    return Place(self, index, offset, size, slice_of(extent.slots[0], offset, size), what)
            extent = self._grow(size)
            free = FreeRanges(extent.nbytes)
            free.take(size)
            self._regions.append((extent, free))
            return Place(self, len(self._regions) - 1, 0, size, slice_of(extent.slots[0], 0, size), what)

    def _grow(self, nbytes: int) -> Extent:
        """One region more, with room for `nbytes` at least."""
        region = min(self._region_bytes, self._store.room_bytes) // UNIT_BYTES * UNIT_BYTES
        if region > nbytes:
            with contextlib.suppress(StoreError):  # the drives have less than the budget: others write there too
                return self._store.add(region, self._category, 1)
        return self._store.add(nbytes, self._category, 1)

    def give_back(self, region: int, offset: int, nbytes: int) -> None:
        """Called by Place.release only, perhaps by a garbage collection within `take`: without the lock, which `give` needs not."""
        self._regions[region][1].give(offset, nbytes)

    def checksum_of(self, address: int, nbytes: int) -> int | None:
        """Called by Place only: of memory, in a store that verifies."""
        return self._store.checksum_of(address, nbytes) if self._store.verify else None

    def transfer(self, kind: str, slot: Slot, address: int, keep: object) -> Ticket:
        """Called by Place only."""
        with self._store.lock:  # of the drives' counters
            return self._store.transfer(kind, slot, address, keep)
