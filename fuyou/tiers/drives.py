"""One drive of the store: a folder with its lock, its file and an I/O engine of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat

from fuyou.core.errors import StateError, StorageIOError, StoreError
from fuyou.core.sizes import format_bytes
from fuyou.core.ticket import Ticket
from fuyou.tiers.folders import DATA, FOLDER
from fuyou.tiers.io import Engine, File
from fuyou.tiers.lock import FolderLock

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Drive:
    """A folder, claimed by its lock, and the bytes placed on it so far.

    It has an engine of its own, and so a queue of its own: what waits for another drive takes no place in it.
    `bytes_per_s`: its measured speed, 0.0 where it is not known. `registered`: its engine knows the host arena.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, FOLDER, DATA)
        self.nbytes = 0
        self.bytes_per_s = 0.0
        self.read_bytes = 0
        self.write_bytes = 0
        self.engine: Engine | None = None
        self.file: File | None = None
        self._lock: FolderLock | None = None

    def claim(self) -> None:
        """Lock the folder and clear what a killed run left in it. StoreError where it is in use or takes no file."""
        store = os.path.dirname(self.path)
        try:
            os.makedirs(store, mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(os.lstat(store).st_mode):
                raise StoreError(
                    f"{store} is not a folder (a symbolic link is not followed): remove it or give another nvme folder."
                )
            os.chmod(store, 0o700)
            self._lock = FolderLock(store)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.rmdir(store)  # only where it is empty
            raise StoreError(
                f"The nvme folder {self.folder} takes no file ({error.strerror}): free some of it, change its owner or "
                "mode, or leave it out."
            ) from error

    def open(self) -> None:
        """Preallocate the file for what has been placed: a full disk is told here, before training."""
        if self.engine is None:
            raise StateError(f"The drive {self.folder} has no I/O engine yet.")
        self.preallocate(0, self.nbytes)
        self.file = self.engine.open(self.path)

    def preallocate(self, offset: int, nbytes: int) -> None:
        """Make the file reach over `nbytes` from `offset`. StoreError where the drive is full; its size is then as before."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if nbytes:
                    os.posix_fallocate(descriptor, offset, nbytes)
            except OSError:
                os.ftruncate(descriptor, offset)  # what a file system gave before it had no more
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            code = error.errno or errno.EIO
            if code not in _FULL:
                raise StorageIOError(
                    code, f"cannot make {self.path} {nbytes} bytes longer: {os.strerror(code)}"
                ) from error
            free = shutil.disk_usage(self.folder).free
            raise StoreError(
                f"The nvme folder {self.folder} has no room: {format_bytes(nbytes)} are needed and "
                f"{format_bytes(free)} are free ({error.strerror}). Free some, or give nvme a list of folders on several drives."
            ) from error

    def shrink(self, nbytes: int) -> None:
        """Back to `nbytes`: what was placed beyond them is not used by anybody."""
        os.truncate(self.path, nbytes)
        self.nbytes = nbytes

    def transfer(self, kind: str, offset: int, address: int, nbytes: int, keep: object) -> Ticket:
        if self.engine is None or self.file is None:
            raise StateError(f"The store in {self.folder} is closed: nothing can be read or written.")
        start = self.engine.read if kind == "read" else self.engine.write
        return start(self.file, offset, address, nbytes, keep)

    def close(self) -> None:
        """Waits for what is under way. Nothing of an uncommitted store is of use after its run: the file goes, and with
        it the folder. Idempotent.

        After a DeadlineError nothing else has been touched, and the next call goes on from there: where a drive does not
        answer, removing its file would hang. StoreError where the folder cannot be removed; it is unlocked all the same.
        """
        if self.engine is not None:
            if self.file is not None:
                self.engine.close_file(self.file)
                self.file = None
            self.engine.close()
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            with contextlib.ExitStack() as removing:  # in reverse, all of it
                removing.callback(_remove_folder, os.path.dirname(self.path))
                removing.callback(lock.release)
                removing.callback(_remove_file, self.path)
        except OSError as error:
            raise StoreError(
                f"{os.path.dirname(self.path)} could not be removed after the run ({error.strerror}): remove it yourself."
            ) from error


def _remove_file(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _remove_folder(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError as error:  # the user's own files in it, or the next run's
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
