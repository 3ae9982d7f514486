"""The two engines of fuyou._native: io_uring, and threads with pread and pwrite."""

from __future__ import annotations

import errno
import threading
from typing import Any

import fuyou._native as _native
from fuyou.core.errors import StateError
from fuyou.tiers.io.engine import Engine, Failure, IoTicket, Kind
from fuyou.tiers.io.files import File
from fuyou.tiers.io.tuning import Tuning, default_tuning

if not hasattr(_native.IoOperation, "times"):
    raise ImportError("fuyou's native extension was built from older sources: build it again")


class NativeEngine(Engine):
    """Backend "io_uring" or "threads" of fuyou._native. Raises OSError where the system does not allow it."""

    def __init__(self, backend: str, note: str = "", *, tuning: Tuning | None = None) -> None:
        super().__init__(note)
        self.name = backend
        tuning = self.tuning = tuning or default_tuning(backend)
        self._native = _native.IoEngine(backend, tuning.queue_depth, tuning.piece_bytes, tuning.burst_bytes)
        self._tickets: dict[int, IoTicket] = {}  # started and not settled: this is what keeps their memory alive
        self._lock = threading.Lock()  # guards _tickets

    def register(self, address: int, nbytes: int) -> bool:
        self._check_usable()
        return self._native.register_buffer(address, nbytes)

    def unregister(self, address: int) -> None:
        self._check_usable()
        self._native.unregister_buffer(address)

    @property
    def registration_note(self) -> str:
        return self._native.note() if self.name == "io_uring" else super().registration_note

    def in_flight(self) -> list[str]:
        self._check_process()
        return self._native.in_flight()

    def poll(self, ticket: IoTicket) -> bool:
        self._check_process()
        return ticket.op.done() and self._settle(ticket, 0.0)

    def await_ticket(self, ticket: IoTicket, timeout_s: float) -> bool:
        self._check_process()
        return self._settle(ticket, timeout_s)

    def _settle(self, ticket: IoTicket, timeout_s: float) -> bool:
        """Wait for the operation and take over its result; False when it has not ended in time."""
        failure: Failure | None = None
        try:
            if not ticket.op.wait(timeout_s):
                return False
        except _native.IoError as error:
            failure = (error.errno or errno.EIO, error.strerror or str(error))
        with self._lock:
            if self._tickets.pop(ticket.op.id, None) is not None:
                ticket.settle(failure)
                if failure is None:  # one that failed may never have been at the drive
                    ticket.record(*ticket.op.times())
        return True

    def _start(self, kind: Kind, file: File, offset: int, address: int, nbytes: int, keep: Any) -> IoTicket:
        ticket = IoTicket(self, kind, file, offset, nbytes, keep)
        try:
            with self._lock:  # a ticket is in the table before anybody can look for it there
                if kind == "flush":
                    ticket.op = self._native.fsync(file.key)
                else:
                    submit = self._native.read if kind == "read" else self._native.write
                    ticket.op = submit(file.key, offset, address, nbytes)
                self._tickets[ticket.op.id] = ticket
        except _native.IoStateError as error:  # closed by another thread since we checked
            raise StateError(f"Cannot {ticket.text}: {error}.") from None
        self._sweep()
        return ticket

    def _sweep(self) -> None:
        """Settle what has ended meanwhile, so that tickets nobody waits for do not hold their memory."""
        for op in self._native.take_finished():
            ticket = self._tickets.get(op)  # None: its waiter was here first
            if ticket is not None:
                self._settle(ticket, 0.0)

    def _attach(self, file: File) -> None:
        file.key = self._native.add_file(file.fd, file.path, file.alignment_bytes)

    def _detach(self, file: File, timeout_s: float) -> bool:
        removed = self._native.remove_file(file.key, timeout_s)
        self._sweep()
        return removed

    def _stop(self, timeout_s: float) -> bool:
        stopped = self._native.close(timeout_s)
        self._sweep()
        return stopped
