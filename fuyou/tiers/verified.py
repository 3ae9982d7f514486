"""Reads whose bytes are compared with the checksum of what was written, before anybody uses them."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from fuyou.core.errors import StorageIOError
from fuyou.core.ticket import Ticket
from fuyou.tiers.checksum import best_checksum

if TYPE_CHECKING:
    from fuyou.tiers.extents import Slot


class Verified:
    """The ticket of a read of `what` from `slot` to `address`, which was written with `checksum`.

    Whoever first asks whether the read has ended checks the bytes, on the thread that asks (about 1 ms for each 10 MB,
    without the interpreter's lock); a later answer is the same one. So until somebody has been told that it has ended the
    memory is the operation's, as of every ticket: it holds the bytes that were read and nothing else, whatever becomes of
    it afterwards, and `keep` lives so long. `wait` raises StorageIOError (EIO) for other bytes than were written.
    """

    __slots__ = (
        "_address", "_checked", "_expected", "_failure", "_keep", "_lock", "_nbytes", "_read", "_slot", "_what",
    )  # fmt: skip

    def __init__(self, read: Ticket, address: int, checksum: int, slot: Slot, what: str, keep: object) -> None:
        self._read = read
        self._address = address
        self._nbytes = sum(part.nbytes for part in slot)
        self._expected = checksum
        self._slot = slot
        self._what = what
        self._keep: object = keep
        self._lock = threading.Lock()
        self._checked = False
        self._failure = ""

    def done(self) -> bool:
        return self._checked or (self._read.done() and self._check())

    def wait(self, timeout_s: float | None = None) -> None:
        self._read.wait(timeout_s)  # first its own error: a read that failed has left any bytes
        self._check()
        if self._failure:
            raise StorageIOError(errno.EIO, self._failure)

    def _check(self) -> bool:
        """Once; True when it has been. Who comes meanwhile waits."""
        with self._lock:
            if not self._checked:
                checksum = best_checksum()
                found = checksum.of(self._address, self._nbytes)
                if found != self._expected:
                    self._failure = self._text(checksum.name, found)
                self._keep = None
                self._checked = True  # last: a reader that sees it without the lock sees the failure too
        return True

    def _text(self, name: str, found: int) -> str:
        places = ", ".join(f"{part.nbytes} bytes at {part.offset} of {part.drive.path}" for part in self._slot)
        return (
            f"{self._what[:1].upper()}{self._what[1:]} came back from the drive with other bytes than were written there: "
            f"their {name} is {found:08x}, not {self._expected:08x} ({places}). Nothing was computed with them. A drive or "
            "its link is failing, or something else writes to that file: see the system log. Close the run; "
            "Config(resume=True) goes on from its newest complete step, all of which it checks, and Config(resume=FOLDER) "
            "from a checkpoint."
        )
