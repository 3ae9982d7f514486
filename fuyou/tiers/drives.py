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
from fuyou.tiers.folders import DATA, FOLDER, STORE_FILES
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
        self.kept_bytes = 0  # at the beginning of the file, of an earlier run
        self.bytes_per_s = 0.0
        self.read_bytes = 0
        self.write_bytes = 0
        self.engine: Engine | None = None
        self.file: File | None = None
        self._lock: FolderLock | None = None

    def claim(self, keep_bytes: int | None = None) -> None:
        """Lock the folder and clear what an earlier run left in it, but for `keep_bytes` of its data, its records and their
        layout. StoreError where it is in use or takes no file."""
        store = os.path.dirname(self.path)
        try:
            os.makedirs(store, mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(os.lstat(store).st_mode):
                raise StoreError(
                    f"{store} is not a folder (a symbolic link is not followed): remove it or give another nvme folder."
                )
            os.chmod(store, 0o700)
            self._lock = FolderLock(store)
            if keep_bytes is None:
                self._remove_files(all_but=DATA)
                sync_folder(store)  # no record is found again whose data is cut off now
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            else:
                os.truncate(self.path, keep_bytes)
                self.nbytes = self.kept_bytes = keep_bytes
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
        self.preallocate(self.kept_bytes, self.nbytes - self.kept_bytes)
        self.file = self.engine.open(self.path)

    def preallocate(self, offset: int, nbytes: int) -> None:
        """Make the file reach over `nbytes` from `offset`. StoreError where the drive is full; its size is then as before."""
        preallocate(self.path, offset, nbytes)

    def shrink(self, nbytes: int) -> None:
        """Back to `nbytes`: what was placed beyond them is not used by anybody."""
        os.truncate(self.path, nbytes)
        self.nbytes = nbytes

    def transfer(self, kind: str, offset: int, address: int, nbytes: int, keep: object) -> Ticket:
        if self.engine is None or self.file is None:
            raise StateError(f"The store in {self.folder} is closed: nothing can be read or written.")
        start = self.engine.read if kind == "read" else self.engine.write
        return start(self.file, offset, address, nbytes, keep)

    def flush(self) -> Ticket:
        """Start an fdatasync of the data, after all writes submitted so far."""
        if self.engine is None or self.file is None:
            raise StateError(f"The store in {self.folder} is closed: nothing can be flushed.")
        return self.engine.flush(self.file)

    def sync_names(self) -> None:
        """The store's folder and the files in it are found again after a loss of power. StorageIOError."""
        for folder in (os.path.dirname(self.path), self.folder):
            sync_folder(folder)

    def close(self, keep: bool = False) -> None:
        """Waits for what is under way. Nothing of an uncommitted store is of use after its run: the file goes, and with
        it the folder. With `keep` all files stay, for the next run. Idempotent.

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
                if not keep:
                    removing.callback(_remove_folder, os.path.dirname(self.path))
                removing.callback(lock.release)
                if not keep:
                    removing.callback(self._remove_files)
        except OSError as error:
            raise StoreError(
                f"{os.path.dirname(self.path)} could not be removed after the run ({error.strerror}): remove it yourself."
            ) from error

    def _remove_files(self, all_but: str = "") -> None:
        for name in STORE_FILES:
            if name != all_but:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(os.path.dirname(self.path), name))


def preallocate(path: str, offset: int, nbytes: int) -> None:
    """Make a store's file reach over `nbytes` from `offset`. StoreError where the drive is full; its size is then as before."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
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
            raise StorageIOError(code, f"cannot make {path} {nbytes} bytes longer: {os.strerror(code)}") from error
        folder = os.path.dirname(os.path.dirname(path))  # the user's
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"The nvme folder {folder} has no room: {format_bytes(nbytes)} are needed and "
            f"{format_bytes(free)} are free ({error.strerror}). Free some, or give nvme a list of folders on several drives."
        ) from error


def remove_store(folder: str) -> None:
    """The store in an nvme folder that no run has open. What is not a store's own stays."""
    home = os.path.join(folder, FOLDER)
    for name in (*STORE_FILES, "lock"):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(home, name))
    with contextlib.suppress(OSError):
        _remove_folder(home)


def sync_folder(path: str) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        code = error.errno or errno.EIO
        raise StorageIOError(code, f"cannot flush the folder {path}: {os.strerror(code)}") from error


def _remove_folder(path: str) -> None:
    try:
        os.rmdir(path)
    except OSError as error:  # the user's own files in it, or the next run's
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise
