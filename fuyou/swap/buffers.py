"""A fixed number of equal host buffers, taken in turn by one thread that keeps a drive busy."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.races import Races
from fuyou.core.ticket import Ticket, await_ended
from fuyou.tiers.host import Arena, Lease


class Buffers:
    """`count` leases of `nbytes` for the length of a run: whoever takes one waits for nothing that others hold.

    A buffer that was put back with operations still moving its bytes is handed out again when they have ended.
    """

    def __init__(self, arena: Arena, nbytes: int, count: int, *, deadline_s: float, races: Races | None = None) -> None:
        self._deadline_s = deadline_s
        self._races = races
        self._changed = threading.Condition()
        self._free = [arena.lease(nbytes, "staging") for _ in range(count)] if nbytes else []
        self._busy: deque[tuple[Lease, list[Ticket]]] = deque()  # in the order in which they came back

    def put(self, lease: Lease, moves: list[Ticket]) -> None:
        with self._changed:
            self._busy.append((lease, [ticket for ticket in moves if not ticket.done()]))
            self._changed.notify_all()

    def try_take(self) -> Lease | None:
        with self._changed:
            self._reap()
            return self._free.pop() if self._free else None

    def take(self) -> Lease:
        """Waits for the buffer that came back first, or for one to come back. An operation's own error is not raised
        here: it belongs to whoever started it. DeadlineError where none comes in time."""
        lease = self.take_unless(lambda: False)
        if lease is None:
            raise StateError("A staging buffer was waited for, and given up.")
        return lease

    def take_unless(self, given_up: Callable[[], bool]) -> Lease | None:
        """`take`, or None as soon as nobody wants it any more: whoever makes that so calls `wake`."""
        until = time.monotonic() + self._deadline_s
        while True:
            with self._changed:
                self._reap()
                if given_up():
                    return None
                if self._free:
                    return self._free.pop()
                if not self._busy:
                    if not self._changed.wait(max(0.0, until - time.monotonic())):
                        raise DeadlineError(f"Waited {self._deadline_s:g} s for a staging buffer: none came back.")
                    continue
                moves = list(self._busy[0][1])
            await_ended(moves, until)

    def wake(self) -> None:
        """Whoever waits looks again whether it is still wanted."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            for lease in self._free:
                lease.release()
            for lease, moves in self._busy:
                lease.release_after(moves)
            self._free, self._busy = [], deque()

    def _reap(self) -> None:
        while self._busy and all(ticket.done() for ticket in self._busy[0][1]):
            lease, _ = self._busy.popleft()
            if self._races is not None:
                self._races.fill(lease.data)
            self._free.append(lease)
