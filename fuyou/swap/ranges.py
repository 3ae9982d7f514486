"""Byte ranges with a home, and the staging through which those that live on NVMe are used.

Callers never ask where bytes live: a range on the host is used in place, one on NVMe through a piece of a lease.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from fuyou.core.errors import DeadlineError
from fuyou.core.forked import refuse_forked
from fuyou.core.sizes import align_up
from fuyou.core.ticket import DONE, AllOf, Ticket
from fuyou.tiers.host import PAGE_BYTES, Arena, Lease
from fuyou.tiers.store import Extent


class Range:
    """`nbytes` in a host lease or an NVMe extent. `written` is False until somebody has put bytes there.

    `spare`: a second lease, so that an update can be made ahead of its step and taken back (an extent has a second slot
    for that). `through`: an extent that gets a copy of what is written to the lease (durability "step").
    """

    __slots__ = ("home", "nbytes", "spare", "through", "written")

    def __init__(self, nbytes: int, home: Lease | Extent) -> None:
        self.nbytes = nbytes
        self.home = home
        self.spare: Lease | None = None
        self.through: Extent | None = None
        self.written = False

    @property
    def on_host(self) -> bool:
        return isinstance(self.home, Lease)

    @property
    def staging_bytes(self) -> int:
        """Host memory needed to use it: none where it is at home there."""
        return 0 if self.on_host else align_up(self.nbytes, PAGE_BYTES)

    @property
    def can_guess(self) -> bool:
        """It has a place for new bytes beside those of now. What was never written has none of now."""
        if isinstance(self.home, Lease):
            return self.written and self.spare is not None
        return self.written and len(self.home.slots) > 1

    @property
    def can_write_ahead(self) -> bool:
        """That place is free: no commit names it."""
        return isinstance(self.home, Lease) or self.home.can_write_ahead

    @property
    def extent(self) -> Extent | None:
        """Where it is on the drives, as its home or as a copy."""
        return self.through if isinstance(self.home, Lease) else self.home

    def await_free(self) -> None:
        """It may be written: no commit and no checkpoint under way needs the place."""
        if self.extent is not None:
            self.extent.await_free()

    def pinned(self) -> Ticket:
        """What a write to the drives waits for when no commit is in its way: a checkpoint that has still to copy what is
        there."""
        return DONE if self.extent is None else self.extent.pinned()

    def accept(self) -> None:
        """The bytes written ahead are those of now."""
        if isinstance(self.home, Extent):
            self.home.accept()
        elif self.spare is not None:
            self.home, self.spare = self.spare, self.home

    def drop(self) -> None:
        """The bytes written ahead are nothing."""
        if isinstance(self.home, Extent):
            self.home.drop()

    def release(self) -> None:
        for lease in (self.home, self.spare):
            if isinstance(lease, Lease):
                lease.release()


class Staging:
    """Host views of several ranges: those on NVMe side by side in one lease, those on the host where they are.

    `views[i]` is range i as a (nbytes,) uint8 host tensor. Load before reading them, store after changing them. Whoever
    made it holds it, `hold` makes one holder more, and `release` one less; when the last lets go, the host memory goes
    back as soon as what was started on it has ended, well or not. `give_back` takes the lease and those operations.
    """

    __slots__ = ("_give_back", "_holders", "_lease", "_lock", "_moves", "ranges", "views")

    def __init__(
        self,
        ranges: Sequence[Range],
        lease: Lease | None,
        give_back: Callable[[Lease, list[Ticket]], None] | None = None,
    ) -> None:
        self.ranges = tuple(ranges)
        self._lease = lease
        self._give_back = give_back or Lease.release_after
        self._moves: list[Ticket] = []
        self._holders = 1
        self._lock = threading.Lock()  # a gradient's is held by the training thread and by the one of the updates
        self.views: list[torch.Tensor] = []
        offset = 0
        for each in self.ranges:
            if isinstance(each.home, Lease):
                self.views.append(each.home.data)
            elif lease is not None:
                self.views.append(lease.data[offset : offset + each.nbytes])
                offset += each.staging_bytes

    def load(self, *indices: int, check: bool = False) -> Ticket:
        """Start reading those ranges (all when none is named); ranges on the host are there already. `check`: as in
        Extent.read, for bytes that get a checksum anew wherever they go."""
        return AllOf([self._move(index, "read", check=check) for index in indices or range(len(self.ranges))])

    def store(self, *indices: int, ahead: bool = False) -> Ticket:
        """Start writing those ranges (all when none is named) from their views.

        ahead: beside the bytes of now, which stay until Range.accept; a range on the host is left as it is then.
        """
        tickets = []
        for index in indices or range(len(self.ranges)):
            tickets.append(self._move(index, "write", ahead=ahead))
            self.ranges[index].written = True  # ahead too: only what is written already can be written beside
        return AllOf(tickets)

    def hold(self) -> bool:
        """False: the last holder has let go already."""
        with self._lock:
            self._holders += self._holders > 0
            return self._holders > 0

    @property
    def shared(self) -> bool:
        with self._lock:
            return self._holders > 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders or self._lease is None:
                return
            lease, self._lease = self._lease, None
            self.views.clear()
        self._give_back(lease, self._moves)

    def _move(self, index: int, kind: str, *, ahead: bool = False, check: bool = False) -> Ticket:
        home, address = self.ranges[index].home, self.views[index].data_ptr()
        if isinstance(home, Lease):
            through = self.ranges[index].through
            if kind == "read" or ahead or through is None:
                return DONE
            ticket = through.write(address, home)
        elif kind == "read":
            ticket = home.read(address, self._lease, check=check)
        else:
            ticket = home.write(address, self._lease, ahead=ahead)
        self._moves.append(ticket)
        return ticket


class WriteBehind:
    """Stagings whose writes are under way, oldest first: room is made by waiting for the oldest.

    Used by one thread at a time (the one that runs the step or the backward).
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._pid = os.getpid()
        self._pending: deque[tuple[Ticket, Staging]] = deque()
        # How others make room: by letting go of what they hold only to spare a read; then by sending home what can go.
        self.let_go: Callable[[], bool] = lambda: False
        self.reclaim: Callable[[], bool] = lambda: False

    def stage(self, ranges: Sequence[Range], what: str, *, wait: bool = True) -> Staging | None:
        """A staging for `ranges`. Without room: others let go, the oldest write is waited for, or others send home what
        they hold; None when there is none of this and `wait` is False. StateError in a forked child."""
        refuse_forked(self._pid, "This run")
        nbytes = sum(each.staging_bytes for each in ranges)
        if nbytes == 0:
            return Staging(ranges, None)
        self.reap()
        while (lease := self._arena.try_lease(nbytes, "staging")) is None:
            if self.let_go():
                continue
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

    def try_stage(self, ranges: Sequence[Range]) -> Staging | None:
        """A staging where there is room for it now, and nobody has to make any."""
        refuse_forked(self._pid, "This run")
        self.reap()
        lease = self._arena.try_lease(sum(each.staging_bytes for each in ranges), "staging")
        return None if lease is None else Staging(ranges, lease)

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
