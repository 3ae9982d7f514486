"""What every I/O engine does the same way: opening, checking requests, tickets, closing."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal

from fuyou.core.errors import DeadlineError, StateError, StorageIOError
from fuyou.core.recorder import Recorder
from fuyou.core.ticket import DEADLINE_S, Ticket, list_text
from fuyou.tiers.io.files import File, open_file
from fuyou.tiers.io.tuning import Tuning

Kind = Literal["read", "write", "flush"]
Failure = tuple[int, str]  # errno, text

_unfinished: set[Engine] = set()  # closed in vain: a drive may still read or write their operations' memory


class Request:
    """What an operation asks for, and which earlier ones of its file it must not overtake."""

    __slots__ = ("kind", "nbytes", "offset")

    def __init__(self, kind: Kind, offset: int, nbytes: int) -> None:
        self.kind = kind
        self.offset = offset
        self.nbytes = nbytes

    def must_follow(self, earlier: Request) -> bool:
        if earlier.kind == "flush":
            return False
        if self.kind == "flush":
            return earlier.kind == "write"
        if self.kind == earlier.kind == "read":
            return False
        return self.offset < earlier.offset + earlier.nbytes and earlier.offset < self.offset + self.nbytes


class IoTicket:
    """One operation of an engine. The engine holds it, and it holds `keep`, until the operation has ended."""

    __slots__ = ("_engine", "_failure", "_settled", "keep", "kind", "nbytes", "op", "text", "where")

    def __init__(self, engine: Engine, kind: Kind, file: File, offset: int, nbytes: int, keep: Any) -> None:
        self._engine = engine
        self.kind = kind
        self.nbytes = nbytes
        self.where = file.path
        self._failure: Failure | None = None
        self._settled = False
        self.keep = keep
        self.op: Any = None  # the engine's own handle
        self.text = f"{kind} of {file.path}" if kind == "flush" else f"{kind} {nbytes} bytes at {offset} of {file.path}"

    def settle(self, failure: Failure | None) -> None:
        """Called by the engine when the operation has ended; a second call changes nothing."""
        if self._settled:
            return
        self._failure = failure
        self.keep = None
        self._settled = True  # last: a reader that sees it sees the failure too

    def record(self, began: float, ended: float) -> None:
        """Called by the engine, once: when the operation was at the drive."""
        if self.kind != "flush":
            self._engine.recorder.span(f"nvme_{self.kind}", began, ended, self.where, self.nbytes)

    def done(self) -> bool:
        return self._settled or self._engine.poll(self)

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises this operation's StorageIOError (errno, file, offset, bytes), or DeadlineError."""
        timeout_s = self._engine.deadline_s if timeout_s is None else timeout_s
        if not self._settled and not self._engine.await_ticket(self, timeout_s):
            raise self._engine.past_deadline(f"Waited {timeout_s:g} s for {self.text}, which has not ended")
        if self._failure is not None:
            raise StorageIOError(*self._failure)


class Engine(ABC):
    """Asynchronous reads and writes between host addresses and files.

    Operations of one file whose ranges overlap run in the order of their submission, `flush` after all writes submitted
    so far; submitting never blocks. Every method may be called from any thread, and only in the process that opened the
    engine: a forked child gets StateError. `deadline_s` is that of its tickets' waits and of closing.
    """

    name = ""  # "io_uring" | "threads" | "aiofiles"

    def __init__(self, note: str = "") -> None:
        self.note = note  # why this engine, "" when it is the first choice
        self.tuning: Tuning | None = None  # of an engine that can be tuned
        self.recorder = Recorder(1)  # of reads and writes; a run puts its own here
        self.deadline_s = DEADLINE_S  # open_engine puts the run's own here
        self._pid = os.getpid()
        self._closed = False
        self._buffered_warned = False
        self._files: dict[int, File] = {}
        self._files_lock = threading.Lock()

    # ---- files

    def open(self, path: str | os.PathLike[str], *, writable: bool = True) -> File:
        """Open (and with `writable` create) a file, with O_DIRECT where the file system takes it."""
        self._check_usable()
        file, reason = open_file(path, writable=writable)
        if reason and not self._buffered_warned:
            self._buffered_warned = True
            warnings.warn(
                f"{file.path} is read and written through the page cache, which costs RAM outside the budget and speed:"
                f" {reason}.",
                RuntimeWarning,
                stacklevel=2,
            )
        try:
            self._attach(file)
        except BaseException:
            os.close(file.fd)
            raise
        file.engine_id = id(self)
        with self._files_lock:
            self._files[file.fd] = file
        return file

    def close_file(self, file: File) -> None:
        """Wait for the file's operations and close it. A second time does nothing."""
        self._check_process()
        if file.closed:
            return
        if self._closed or file.engine_id != id(self):
            raise StateError(f"{file.path} was not opened by this I/O engine, or the engine is closed.")
        file.closed = True  # no new operations from here on
        if not self._detach(file, self.deadline_s):
            file.closed = False
            raise self.past_deadline(f"Waited {self.deadline_s:g} s to close {file.path}")
        with self._files_lock:
            del self._files[file.fd]
        os.close(file.fd)

    # ---- operations

    def read(self, file: File, offset: int, address: int, nbytes: int, keep: Any = None) -> Ticket:
        """Start reading `nbytes` at `offset` into memory at `address`. `keep` lives until the operation has ended.

        Raises StorageIOError for a request that the file cannot take, StateError for a closed file or engine.
        """
        self._check_request("read", file, offset, address, nbytes)
        return self._start("read", file, offset, address, nbytes, keep)

    def write(self, file: File, offset: int, address: int, nbytes: int, keep: Any = None) -> Ticket:
        """Start writing `nbytes` from memory at `address` to `offset`; otherwise as `read`."""
        self._check_request("write", file, offset, address, nbytes)
        return self._start("write", file, offset, address, nbytes, keep)

    def flush(self, file: File) -> Ticket:
        """Start an fdatasync that runs after all writes submitted so far to `file`. Their errors are their tickets'."""
        self._check_file("flush", file)
        return self._start("flush", file, 0, 0, 0, None)

    def register(self, address: int, nbytes: int) -> bool:
        """Register memory with the kernel, so that operations in it cost less. False where that fails: never fatal.

        Registered memory must not be unmapped before `unregister` or `close`: the kernel keeps its pages.
        """
        self._check_usable()
        return False

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that began at `address`."""
        self._check_usable()

    @property
    def registration_note(self) -> str:
        """Why registered buffers are not in use; "" where they are, or were not asked for."""
        return "registered buffers need io_uring"

    @abstractmethod
    def in_flight(self) -> list[str]:
        """One line for each operation that has not ended, in the order of submission."""

    def close(self) -> None:
        """Wait for every operation, then give back threads and descriptors. Idempotent; later use is StateError.

        After a DeadlineError nothing has been given back, and the next call goes on; until then the engine, and with it
        the memory of its operations, lives as long as the process.
        """
        if os.getpid() != self._pid:
            return  # a forked child inherited an object, not an engine
        if not self._closed and not self._stop(self.deadline_s):
            _unfinished.add(self)
            raise self.past_deadline(f"Waited {self.deadline_s:g} s to close the I/O engine")
        _unfinished.discard(self)
        self._closed = True
        with self._files_lock:
            files = list(self._files.values())
            self._files.clear()
        for file in files:
            file.closed = True
            os.close(file.fd)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- for the backends

    @abstractmethod
    def _attach(self, file: File) -> None: ...

    @abstractmethod
    def _detach(self, file: File, timeout_s: float) -> bool:
        """Wait for the file's operations and forget it; False when they have not ended in time."""

    @abstractmethod
    def _start(self, kind: Kind, file: File, offset: int, address: int, nbytes: int, keep: Any) -> IoTicket: ...

    @abstractmethod
    def _stop(self, timeout_s: float) -> bool:
        """Refuse new operations, wait for those in flight, end all threads; False when they have not ended in time."""

    @abstractmethod
    def poll(self, ticket: IoTicket) -> bool:
        """For IoTicket.done: settle it if its operation has ended."""

    @abstractmethod
    def await_ticket(self, ticket: IoTicket, timeout_s: float) -> bool:
        """For IoTicket.wait: settle it when its operation ends; False when it has not ended in time."""

    def past_deadline(self, what: str) -> DeadlineError:
        """For whoever has waited in vain: `what`, and what is in flight."""
        operations = self.in_flight()
        return DeadlineError(
            f"{what}; {len(operations)} operations in flight: {list_text(operations)}. "
            "The drive, or the file system under it, does not answer: see the system log."
        )

    # ---- checks

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StateError(
                f"This I/O engine belongs to process {self._pid} and was used in its forked child {os.getpid()}: "
                "open one in the child, or use the run in the process that made it."
            )

    def _check_usable(self) -> None:
        self._check_process()
        if self._closed:
            raise StateError("This I/O engine is closed.")

    def _check_file(self, kind: Kind, file: File) -> None:
        self._check_usable()
        if file.closed:
            raise StateError(f"Cannot {kind} {file.path}: the file is closed.")
        if file.engine_id != id(self):
            raise StateError(f"Cannot {kind} {file.path}: it was opened by another I/O engine.")

    def _check_request(self, kind: Kind, file: File, offset: int, address: int, nbytes: int) -> None:
        self._check_file(kind, file)
        what = f"{kind} {nbytes} bytes at {offset} of {file.path} refused"
        if offset < 0:
            raise StorageIOError(errno.EINVAL, f"{what}: the offset is negative")
        if nbytes <= 0:
            raise StorageIOError(errno.EINVAL, f"{what}: the size must be positive")
        if address <= 0:
            raise StorageIOError(errno.EFAULT, f"{what}: the memory address is {address}")
        if offset + nbytes > 2**63 - 1:
            raise StorageIOError(errno.EFBIG, f"{what}: its end is past 2^63 - 1")
        if not file.direct:
            return
        unaligned = [
            f"the {part} {value} is {value % file.alignment_bytes} bytes past a multiple"
            for part, value in (("address", address), ("offset", offset), ("size", nbytes))
            if value % file.alignment_bytes
        ]
        if unaligned:
            raise StorageIOError(
                errno.EINVAL,
                f"{what}: the file is open for direct I/O, which needs multiples of {file.alignment_bytes} bytes, and "
                + ", and ".join(unaligned),
            )
