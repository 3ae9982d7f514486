"""The host tier: one arena of page-aligned memory, leased by byte ranges."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence

import torch

from fuyou.core.errors import BudgetError, DeadlineError, StateError
from fuyou.core.ledger import Ledger
from fuyou.core.races import Races
from fuyou.core.sizes import align_up, format_bytes
from fuyou.core.ticket import DEADLINE_S, Ticket
from fuyou.tiers.free import FreeRanges
from fuyou.tiers.pages import PAGE_BYTES, Pages

LATE_POLL_S = 0.05  # nobody tells an arena that an operation has ended


class Lease:
    """A page-aligned host byte range with one holder at a time, charged to the ledger under its category.

    `address` is its first byte, `data` a (nbytes,) uint8 host tensor over it. `release` gives it back, once.
    """

    __slots__ = ("_arena", "address", "category", "data", "nbytes", "offset")

    def __init__(self, arena: Arena, offset: int, nbytes: int, category: str) -> None:
        self._arena: Arena | None = arena
        self.offset = offset
        self.nbytes = nbytes
        self.category = category
        self.address = arena.address + offset
        self.data = arena.bytes[offset : offset + nbytes]

    def release(self) -> None:
        if self._arena is None:
            raise StateError(f"A host lease of {self.nbytes} bytes at offset {self.offset} was released twice.")
        arena, self._arena = self._arena, None
        arena.give_back(self)

    def release_after(self, tickets: Sequence[Ticket]) -> None:
        """`release`, now or when the last of `tickets` has ended: nobody else may get bytes that a drive still moves."""
        if all(ticket.done() for ticket in tickets):
            self.release()
        elif self._arena is not None:
            self._arena.keep_until(tickets, self)


class Arena:
    """One mapping of exactly `nbytes` (rounded up to a page), sub-allocated first-fit.

    torch's pinned allocator rounds every block up to a power of two (pytorch#150517); this one rounds to the page. A
    forked child does not inherit it, so DataLoader workers neither double it nor copy it on write. It lies on huge pages
    where the kernel gives them: a drive then gets few large segments instead of many small ones (scripts/bench_io.py
    shows what that is worth).
    With `pin`, a CUDA device, it is registered with CUDA; where that fails it stays pageable and `note` says why.
    With `races` what is not leased is poisoned: a view that outlives its lease, or a lease read before anything was put
    there, shows NaN, and what is written to bytes that nobody holds is a StateError of whoever leases them next.
    """

    def __init__(
        self,
        nbytes: int,
        ledger: Ledger,
        *,
        pin: torch.device | None = None,
        deadline_s: float = DEADLINE_S,
        races: Races | None = None,
    ) -> None:
        self.nbytes = align_up(max(nbytes, PAGE_BYTES), PAGE_BYTES)
        self.note = ""
        self.pinned: torch.device | None = None  # for which it is registered
        self._ledger = ledger
        self._free = FreeRanges(self.nbytes)
        self._changed = threading.Condition()
        self._leases = 0
        self._late: list[tuple[tuple[Ticket, ...], Lease]] = []  # released, but operations move their bytes
        self._held: Counter[str] = Counter()  # bytes by category, for a message
        self._deadline_s = deadline_s
        self._races = races
        self._pages: Pages | None = Pages(self.nbytes)
        self.bytes = self._pages.bytes
        self.address = self._pages.address
        if pin is not None:
            self._pin(pin)
        if races is not None:
            races.fill(self.bytes)

    @property
    def lease_count(self) -> int:
        self.reap()
        return self._leases

    def keep_until(self, tickets: Sequence[Ticket], lease: Lease) -> None:
        """Called by Lease.release_after only."""
        with self._changed:
            self._late.append((tuple(tickets), lease))

    def reap(self) -> None:
        """Take back what was released under operations that have ended by now."""
        with self._changed:
            late, self._late = self._late, []
            for tickets, lease in late:
                lease.release_after(tickets)

    def try_lease(self, nbytes: int, category: str) -> Lease | None:
        """A lease where a free range is large enough now, else None."""
        with self._changed:
            self.reap()
            return self._take(nbytes, category)

    def lease(self, nbytes: int, category: str, what: str = "", timeout_s: float | None = None) -> Lease:
        """A lease of `nbytes`, waiting for others to release. BudgetError where the arena can never hold it, DeadlineError
        where nobody releases enough in `timeout_s` (None: the arena's deadline)."""
        if align_up(nbytes, PAGE_BYTES) > self.nbytes:
            raise BudgetError(
                f"{what or category} needs {format_bytes(nbytes)} of host memory in one piece and the arena made from "
                f"the ram budget has {format_bytes(self.nbytes)}: give ram at least {nbytes - self.nbytes} bytes more.",
                tier="host", needed_bytes=nbytes, given_bytes=self.nbytes,
            )  # fmt: skip
        timeout_s = self._deadline_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while (lease := self.try_lease(nbytes, category)) is None:
                left = deadline - time.monotonic()
                if not self._changed.wait(min(left, LATE_POLL_S) if self._late else left) and left <= LATE_POLL_S:
                    raise DeadlineError(
                        f"Waited {timeout_s:g} s for {format_bytes(nbytes)} of host memory for {what or category}: "
                        f"{self._leases} leases hold the {format_bytes(self.nbytes)} arena ({self._holders()}) and not "
                        "enough came back. What they are held for has not ended: see the system log for a drive that does "
                        "not answer, or give ram more."
                    )
            return lease

    def give_back(self, lease: Lease) -> None:
        """Called by Lease.release only."""
        with self._changed:
            size = align_up(lease.nbytes, PAGE_BYTES)
            if self._races is not None:  # before anybody else can have them; nothing is left of them after `close`
                self._races.fill(self.bytes[lease.offset : lease.offset + size])
            self._free.give(lease.offset, size)
            self._leases -= 1
            self._held[lease.category] -= size
            self._ledger.discharge("host", lease.category, size)
            self._changed.notify_all()

    def close(self) -> None:
        """Give the pages back to the system, whoever still holds a view. Idempotent."""
        if self._pages is None:
            return
        self.reap()
        if self.pinned is not None:
            with torch.cuda.device(self.pinned):
                if int(torch.cuda.cudart().cudaHostUnregister(self.address)):
                    _take_last_error(self.pinned)
        self._pages.drop()  # a view that outlives us reads zeros, and costs nothing
        self._pages = None
        self.bytes = torch.empty(0, dtype=torch.uint8)

    def _take(self, nbytes: int, category: str) -> Lease | None:
        size = align_up(nbytes, PAGE_BYTES)
        offset = self._free.take(size)
        if offset is None:
            return None
        if self._races is not None:
            what = f"host memory for {category} ({nbytes} bytes at offset {offset} of the arena)"
            self._races.check(self.bytes[offset : offset + size], what)
        self._ledger.charge("host", category, size)
        self._leases += 1
        self._held[category] += size
        return Lease(self, offset, nbytes, category)

    def _holders(self) -> str:
        return ", ".join(f"{category} {format_bytes(held)}" for category, held in self._held.most_common() if held)

    def _pin(self, device: torch.device) -> None:
        with torch.cuda.device(device):  # or a context would be made on the first one
            result = int(torch.cuda.cudart().cudaHostRegister(self.address, self.nbytes, 0))
        if result == 0:
            self.pinned = device
            return
        _take_last_error(device)
        self.note = (
            f"host memory is not pinned (cudaHostRegister of {format_bytes(self.nbytes)} failed with error {result} of the CUDA "
            "runtime): copies go through the driver's own staging and are slower; raise `ulimit -l` or give less ram"
        )


def _take_last_error(device: torch.device) -> None:
    """A failed call of the CUDA runtime leaves its error to this thread's next kernel launch, whose own it is not: launch one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
