"""Byte ranges with a home, and the staging through which those that live on NVMe are used.

Callers never ask where bytes live: a range on the host is used in place, one on NVMe through a piece of a lease.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from fuyou.core.errors import DeadlineError
from fuyou.core.sizes import align_up
from fuyou.core.ticket import DONE, AllOf, Ticket
from fuyou.tiers.host import PAGE_BYTES, Arena, Lease
from fuyou.tiers.store import Extent


class Range:
    """`nbytes` in a host lease or an NVMe extent. `written` is False until somebody has put bytes there."""

    __slots__ = ("home", "nbytes", "written")

    def __init__(self, nbytes: int, home: Lease | Extent) -> None:
        self.nbytes = nbytes
        self.home = home
        self.written = False

    @property
    def on_host(self) -> bool:
        return isinstance(self.home, Lease)

    @property
    def staging_bytes(self) -> int:
        """Host memory needed to use it: none where it is at home there."""
        return 0 if self.on_host else align_up(self.nbytes, PAGE_BYTES)

    def release(self) -> None:
        if isinstance(self.home, Lease):
            self.home.release()


class Staging:
    """Host views of several ranges: those on NVMe side by side in one lease, those on the host where they are.

    `views[i]` is range i as a (nbytes,) uint8 host tensor. Load before reading them, store after changing them, and
    release when the tickets of both are done, or when one has failed: the host memory then goes back when all have ended.
    """

    __slots__ = ("_lease", "_moves", "ranges", "views")

    def __init__(self, ranges: Sequence[Range], lease: Lease | None) -> None:
        self.ranges = tuple(ranges)
        self._lease = lease
        self._moves: list[Ticket] = []
        self.views: list[torch.Tensor] = []
        offset = 0
        for each in self.ranges:
            if isinstance(each.home, Lease):
                self.views.append(each.home.data)
            elif lease is not None:
                self.views.append(lease.data[offset : offset + each.nbytes])
                offset += each.staging_bytes

    def load(self, *indices: int) -> Ticket:
        """Start reading those ranges (all when none is named); ranges on the host are there already."""
        return AllOf([self._move(index, "read") for index in indices or range(len(self.ranges))])

    def store(self, *indices: int) -> Ticket:
        """Start writing those ranges (all when none is named) from their views."""
        tickets = []
        for index in indices or range(len(self.ranges)):
            tickets.append(self._move(index, "write"))
            self.ranges[index].written = True
        return AllOf(tickets)

    def release(self) -> None:
        if self._lease is not None:
            self.views.clear()
            lease, self._lease = self._lease, None
            lease.release_after(self._moves)

    def _move(self, index: int, kind: str) -> Ticket:
        home = self.ranges[index].home
        if isinstance(home, Lease):
            return DONE
        start = home.read if kind == "read" else home.write
        ticket = start(self.views[index].data_ptr(), self._lease)
        self._moves.append(ticket)
        return ticket


class WriteBehind:
    """Stagings whose writes are under way, oldest first: room is made by waiting for the oldest.

    Used by one thread at a time (the one that runs the step or the backward).
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._pending: deque[tuple[Ticket, Staging]] = deque()
        self.reclaim: Callable[[], bool] = lambda: False  # somebody's staging that can go home now is on its way there

    def stage(self, ranges: Sequence[Range], what: str, *, wait: bool = True) -> Staging | None:
        """A staging for `ranges`. Without room: waits for the oldest write, reclaims, or is None when there is neither and
        `wait` is False."""
        nbytes = sum(each.staging_bytes for each in ranges)
        if nbytes == 0:
            return Staging(ranges, None)
        self.reap()
        while (lease := self._arena.try_lease(nbytes, "staging")) is None:
            if self._pending:
                self._retire_oldest()
            elif self.reclaim():
                continue
            elif wait:
                lease = self._arena.lease(nbytes, "staging", what)
                break
            else:
                return None
        return Staging(ranges, lease)

    def put(self, written: Ticket, staging: Staging) -> None:
        """Release `staging` once `written` is done, here or at the next call that needs room."""
        self._pending.append((written, staging))

    def reap(self) -> None:
        while self._pending and self._pending[0][0].done():
            self._retire_oldest()

    def drain(self) -> None:
        """Every write done, or the first error raised; the memory is given back in both cases."""
        error: BaseException | None = None
        timeout_s: float | None = None
        while self._pending:
            try:
                self._retire_oldest(timeout_s)
            except Exception as failure:
                error = error or failure
                if isinstance(failure, DeadlineError):
                    timeout_s = 0.0  # one deadline for a drive that does not answer, not one for each write
        if error is not None:
            raise error

    def _retire_oldest(self, timeout_s: float | None = None) -> None:
        written, staging = self._pending.popleft()
        try:
            written.wait(timeout_s)
        finally:
            staging.release()
