"""For Config(debug_races): an engine around another one, whose operations start late and end late."""

from __future__ import annotations

import contextlib
import errno
import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from fuyou.core.errors import DeadlineError, StateError, StorageIOError
from fuyou.core.races import Races
from fuyou.tiers.io.engine import Engine, Failure, IoTicket, Kind, Request
from fuyou.tiers.io.files import File

THREAD_COUNT = 16  # operations that are late, or in the inner engine, at a time
LOOK_S = 60.0  # a wait for the inner engine is begun anew after this: its end is the drive's business, not a deadline's


class _Op(Request):
    """One operation: its ticket, and the earlier ones that it must follow, both in beginning and in ending."""

    __slots__ = ("address", "begun", "ended", "file", "predecessors", "ticket")

    def __init__(self, kind: Kind, file: File, offset: int, address: int, nbytes: int, ticket: IoTicket) -> None:
        super().__init__(kind, offset, nbytes)
        self.file = file
        self.address = address
        self.ticket = ticket
        self.predecessors: list[_Op] = []
        self.begun = threading.Event()  # the inner engine has it, or refused it
        self.ended = threading.Event()


class LateEngine(Engine):
    """Delays the start and the end of each operation of `inner`, which it owns, by what `races` draws.

    Files are opened through this engine. A thread takes an operation, is late, gives it to `inner`, waits for it, is late
    again, and settles the ticket. Operations that must keep their order reach `inner` in it, which keeps it, and their
    tickets are done in it too. They are taken in the order of submission, so a thread only ever waits for an operation
    that another thread has: there is no deadlock, however few threads there are.
    """

    def __init__(self, inner: Engine, races: Races) -> None:
        super().__init__(inner.note)
        self.name = inner.name
        self.tuning = inner.tuning
        self.deadline_s = inner.deadline_s
        self._inner = inner
        self._races = races
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards _active and _refusing; notified when an operation ends
        self._active: dict[int, _Op] = {}  # not ended, in the order of submission
        self._refusing = False
        self._taken: queue.SimpleQueue[tuple[int, _Op] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._loop, name=f"fuyou-io-late-{index}", daemon=True)
            for index in range(THREAD_COUNT)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError as error:
            self._end_threads()
            inner.close()
            raise StateError(f"No threads are to be had for debug_races ({error}): leave it out.") from error

    def register(self, address: int, nbytes: int) -> bool:
        self._check_usable()
        return self._inner.register(address, nbytes)

    def unregister(self, address: int) -> None:
        self._check_usable()
        self._inner.unregister(address)

    @property
    def registration_note(self) -> str:
        return self._inner.registration_note

    def in_flight(self) -> list[str]:
        self._check_process()
        with self._changed:
            return [op.ticket.text for op in self._active.values()]

    def poll(self, ticket: IoTicket) -> bool:
        self._check_process()
        return ticket.op.ended.is_set()

    def await_ticket(self, ticket: IoTicket, timeout_s: float) -> bool:
        self._check_process()
        return ticket.op.ended.wait(timeout_s)

    def _start(self, kind: Kind, file: File, offset: int, address: int, nbytes: int, keep: Any) -> IoTicket:
        ticket = IoTicket(self, kind, file, offset, nbytes, keep)
        op = ticket.op = _Op(kind, file, offset, address, nbytes, ticket)
        with self._changed:
            if self._refusing or file.closed:  # closed by another thread since we checked
                raise StateError(f"Cannot {ticket.text}: the file or the I/O engine is closed.")
            op.predecessors = [each for each in self._active.values() if each.file is file and op.must_follow(each)]
            number = next(self._numbers)
            self._active[number] = op
            self._taken.put((number, op))  # under the lock: the queue is in the order of submission
        return ticket

    def _loop(self) -> None:
        while (taken := self._taken.get()) is not None:
            number, op = taken
            failure = self._run(op)
            self._races.delay()
            for earlier in op.predecessors:  # who sees a flush done takes the writes before it for done
                earlier.ended.wait()
            op.predecessors.clear()
            op.ticket.settle(failure)
            with self._changed:
                del self._active[number]
                op.ended.set()
                self._changed.notify_all()
            del taken, op  # what the operation kept alive must not live until the next one comes

    def _run(self, op: _Op) -> Failure | None:
        """From an operation's turn to its end in the inner engine; how it failed."""
        try:
            try:
                self._races.delay()
                for earlier in op.predecessors:
                    earlier.begun.wait()
                inner = self._inner._start(op.kind, op.file, op.offset, op.address, op.nbytes, None)
            finally:
                op.begun.set()
            while not self._inner.await_ticket(inner, LOOK_S):
                pass
            inner.wait(0.0)
        except StorageIOError as error:
            return error.errno or errno.EIO, error.strerror or str(error)
        except Exception as error:
            return getattr(error, "errno", None) or errno.EIO, f"{op.ticket.text} failed: {error}"
        return None

    def _attach(self, file: File) -> None:
        self._inner._attach(file)

    def _detach(self, file: File, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        if not self._wait_until(lambda: not any(op.file is file for op in self._active.values()), until):
            return False
        return self._inner._detach(file, max(0.0, until - time.monotonic()))

    def _stop(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        with self._changed:
            self._refusing = True
        if not self._wait_until(lambda: not self._active, until):
            return False
        self._inner.deadline_s = max(0.0, until - time.monotonic())
        try:
            self._inner.close()
        except DeadlineError:
            return False
        self._end_threads()
        return True

    def _wait_until(self, idle: Callable[[], bool], until: float) -> bool:
        with self._changed:
            return self._changed.wait_for(idle, max(0.0, until - time.monotonic()))

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._taken.put(None)
        for thread in self._threads:
            with contextlib.suppress(RuntimeError):  # one that never started
                thread.join()
