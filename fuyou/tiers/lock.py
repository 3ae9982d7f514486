"""One run at a time in a store folder; one thread at a time, of one process, in its books."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time

from fuyou.core.errors import DeadlineError, StoreError
from fuyou.core.forked import refuse_forked
from fuyou.core.ticket import DEADLINE_S

RETRY_S = 5.0  # a killed holder's descriptors can take a moment to die

# POSIX record locks do not exclude their own process, and closing ANY descriptor of the file drops them. So the files
# that this process holds are kept here, and are looked up before one is opened.
_held: set[tuple[int, int]] = set()


class FolderLock:
    """An fcntl record lock on `folder`/lock, which holds the pid. StoreError naming the pid where it is taken."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, "lock")
        deadline = time.monotonic() + RETRY_S
        while not self._take(folder, deadline):
            pass  # its holder has removed the file that was waited for

    def _take(self, folder: str, deadline: float) -> bool:
        """False where what was locked is not, or no more, the file of that name: that would keep nobody out."""
        with contextlib.suppress(FileNotFoundError):
            if _identity(os.stat(self.path)) in _held:
                raise StoreError(_in_use(folder, os.getpid()))
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(descriptor, folder, deadline)
            key = _identity(os.fstat(descriptor))
            try:
                is_file = key == _identity(os.stat(self.path))
            except FileNotFoundError:
                is_file = False
            if is_file:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        if not is_file:
            os.close(descriptor)
            return False
        self._fd, self._key = descriptor, key
        _held.add(key)
        return True

    def release(self) -> None:
        """Idempotent. The file is removed while it is still locked; who waits for it finds that it is gone."""
        if self._fd < 0:
            return
        descriptor, self._fd = self._fd, -1
        try:
            if os.path.exists(self.path):
                os.unlink(self.path)
        finally:  # on a file system that was made read-only the file stays, and is nobody's
            _held.discard(self._key)
            os.close(descriptor)


def refuse_in_use(folder: str) -> None:
    """StoreError naming the pid where a run has the lock of `folder`; a file that a killed one left is nobody's."""
    if os.path.exists(os.path.join(folder, "lock")):
        with contextlib.suppress(OSError):  # where no lock can be had, whoever needs it says why
            FolderLock(folder).release()


class ProcessLock:
    """A lock between threads, which may be taken again by its holder (a collection may run anything at any moment).

    StateError in a forked child: there a thread that does not exist may hold it for ever. DeadlineError where its holder
    stands still, as under a file system that does not answer.
    """

    def __init__(self, what: str, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._what = what
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def __enter__(self) -> None:
        refuse_forked(self._pid, self._what)
        if not self._lock.acquire(timeout=self.deadline_s):
            raise DeadlineError(
                f"Waited {self.deadline_s:g} s for {self._what}, which another thread has not let go of. The drive, or the "
                "file system under it, does not answer: see the system log."
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _lock(descriptor: int, folder: str, deadline: float) -> None:
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() > deadline:
                holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                raise StoreError(_in_use(folder, holder or "unknown")) from error
            time.sleep(0.05)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _in_use(folder: str, pid: object) -> str:
    return f"The nvme folder {folder} is in use by process {pid}: close that run (run.close()), or give this one another folder."
