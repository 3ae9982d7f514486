"""Writing a step as a store of its own: one folder, one slot an extent, whole or not there at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from fuyou.core.errors import ConfigError, StorageIOError, StoreError
from fuyou.core.sizes import align_up, format_bytes
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.drives import sync_folder
from fuyou.tiers.folders import DATA, FOLDER, LAYOUTS, RECORDS
from fuyou.tiers.lock import FolderLock
from fuyou.tiers.record_files import RecordFiles, Reserved
from fuyou.tiers.records import ENTRY, PAGE_BYTES, encode_payload, encode_record, overhead_bytes
from fuyou.tiers.saved import PIECE_BYTES, Saved

_FICLONERANGE = 0x4020940D
_FLUSH_BYTES = 64 << 20  # dirty page cache that a checkpoint may hold


class SavedWriter:
    """A folder that read_newest reads, written extent by extent and put under its name when all is on the drive.

    Its data file is the extents one after the other, each in whole pages: the very bytes of a store's slots, so that they
    may be copied from there by any means. Used in a `with`: what is not finished is removed.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        """`folder` must not exist yet, `nbytes` are to come. ConfigError, StoreError where there is no room."""
        self.folder = os.path.realpath(folder)
        self._file = -1
        self._draft = ""
        self._lock: FolderLock | None = None
        above = os.path.dirname(self.folder)
        if os.path.lexists(self.folder):
            raise ConfigError(f"The checkpoint {folder} exists already: name a folder that does not, or remove it.")
        try:
            os.makedirs(above, exist_ok=True)
            free = shutil.disk_usage(above).free
            needed = nbytes + overhead_bytes(1, 1) + (1 << 20)
            if needed > free:
                raise StoreError(
                    f"The checkpoint {folder} needs {format_bytes(needed)} ({needed} bytes) and {format_bytes(free)} are "
                    f"free, {format_bytes(needed - free)} short: free some, or name a folder on another drive."
                )
            prefix = f".{os.path.basename(self.folder)}."
            sweep_drafts(above, prefix)
            self._draft = tempfile.mkdtemp(dir=above, prefix=prefix)
            self._home = os.path.join(self._draft, FOLDER)
            os.mkdir(self._home, 0o700)
            self._lock = FolderLock(self._home)  # somebody is at it
            self.path = os.path.join(self._home, DATA)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(self._file, 0, max(nbytes, 1))  # no room is told now, and direct writes need not wait
        except OSError as error:
            self.discard()
            raise _storage_error(error, f"make room for the checkpoint {folder} of {nbytes} bytes") from error
        except BaseException:
            self.discard()
            raise
        self._checksum = best_checksum()
        self._entries: list[tuple[int, int, int, int]] = []
        self._parts: list[tuple[int, int, int, int, int]] = []
        self._offset = self._flushed = 0

    def __enter__(self) -> SavedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """What was not finished is removed, as far as the file system lets it be: no error hides the one that led here.
        Idempotent."""
        file, self._file = self._file, -1
        with contextlib.suppress(OSError):
            if file >= 0:
                os.close(file)
        with contextlib.suppress(OSError):
            if self._lock is not None:
                self._lock.release()
        if self._draft:
            shutil.rmtree(self._draft, ignore_errors=True)

    def begin(self, extent: int, nbytes: int) -> None:
        """The bytes of `extent` come now, by `write`."""
        self._entries.append((nbytes, extent, 0, 0))
        self._parts.append((extent, 0, 0, self._offset, nbytes))

    def write(self, data: memoryview) -> None:
        """More bytes of the extent that was begun."""
        offset = self.passed(data)
        while data.nbytes:
            try:
                count = os.pwrite(self._file, data, offset)
            except OSError as error:
                raise _storage_error(
                    error, f"write {data.nbytes} bytes at {offset} of the checkpoint {self.folder}"
                ) from error
            data, offset = data[count:], offset + count
        if self._offset - self._flushed >= _FLUSH_BYTES:
            self._flush()

    def passed(self, data: memoryview) -> int:
        """More bytes of the extent that was begun, which the caller writes to `path`, at the offset returned, and flushes."""
        nbytes, extent, checksum, slot = self._entries[-1]
        checksum = self._checksum.of(np.frombuffer(data, np.uint8).ctypes.data, data.nbytes, checksum)
        self._entries[-1] = (nbytes, extent, checksum, slot)
        self._offset += data.nbytes
        return self._offset - data.nbytes

    def clone(self, parts: Sequence[tuple[str, int, int]], checksum: int) -> bool:
        """The extent that was begun is these bytes (path, offset, count) with that checksum: the file system shares their
        blocks with this file until either is written again (FICLONERANGE, ioctl_ficlonerange(2)). False where it does not,
        and the bytes are still to come."""
        at = self._offset
        for path, offset, count in parts:
            try:
                source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.ioctl(self._file, _FICLONERANGE, struct.pack("=qQQQ", source, offset, count, at))
                finally:
                    os.close(source)
            except OSError:  # another file system, or one without reflinks: what was cloned is written over
                return False
            at += count
        nbytes, extent, _, slot = self._entries[-1]
        self._entries[-1] = (nbytes, extent, checksum, slot)
        self._offset = at
        return True

    @property
    def checksum(self) -> int:
        """Of what was written of the extent that was begun last."""
        return self._entries[-1][2]

    def put(self, extent: int, data: memoryview) -> None:
        """A whole extent, filled up with zeros to a page."""
        nbytes = align_up(data.nbytes, PAGE_BYTES)
        self.begin(extent, nbytes)
        self.write(data)
        self.write(memoryview(bytes(nbytes - data.nbytes)))

    def finish(self, step: int, payload: dict[str, Any]) -> None:
        """All is on the drive and under its name when this returns."""
        try:
            os.ftruncate(self._file, self._offset)
        except OSError as error:
            raise _storage_error(error, f"end the checkpoint {self.folder}") from error
        self._flush()
        files = RecordFiles(self._home, 1)
        files.open()
        try:
            files.reserve(Reserved(len(self._entries), len(self._parts)))
            files.append(sorted(self._parts))
            files.flush_layout(files.part_count)
            record = encode_record(
                number=0, step=step, checksum=self._checksum.name, entries=np.sort(np.array(self._entries, ENTRY), order="extent"),
                payload=encode_payload({**payload, "folders": [self.folder]}), parts=files.part_count,
                layout_crc=files.layout_crc,
            )  # fmt: skip
            files.write(0, record)
        finally:
            files.close()
        try:
            self._trim(len(record))
            for folder in (self._home, self._draft):
                sync_folder(folder)
            os.rename(self._draft, self.folder)  # still locked, or who sweeps drafts could take it for a killed one's
        except OSError as error:
            raise _storage_error(error, f"put the checkpoint {self.folder} under its name") from error
        self._draft = ""
        if self._lock is not None:
            self._lock.path = os.path.join(self.folder, FOLDER, "lock")
            with contextlib.suppress(OSError):  # a lock file that stays is nobody's
                self._lock.release()
        sync_folder(os.path.dirname(self.folder))

    def _trim(self, record_bytes: int) -> None:
        """Nothing is ever written to these files again: they need no room to grow."""
        for name in RECORDS[2:]:
            os.truncate(os.path.join(self._home, name), 0)
        for name in RECORDS[:2]:
            os.truncate(os.path.join(self._home, name), align_up(record_bytes, PAGE_BYTES))
        for name in (*RECORDS, *LAYOUTS):
            descriptor = os.open(os.path.join(self._home, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _flush(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            raise _storage_error(error, f"flush the checkpoint {self.folder}") from error
        os.posix_fadvise(self._file, 0, self._offset, os.POSIX_FADV_DONTNEED)
        self._flushed = self._offset


def sweep_drafts(folder: str, prefix: str) -> None:
    """Remove what a killed process left half-written of checkpoints in `folder`, whose draft's name begins with `prefix`."""
    for name in os.listdir(folder):
        home = os.path.join(folder, name, FOLDER)
        if name.startswith(prefix) and os.path.isdir(home) and not os.path.islink(home):
            try:
                lock = FolderLock(home)
            except StoreError:  # it is being written
                continue
            shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            lock.release()


def copy_saved(saved: Saved, folder: str) -> None:
    """The step of a store as a checkpoint in `folder`, through 1 MiB of memory; the bytes are checked on their way, so that
    what was damaged is not copied. StoreError, StorageIOError."""
    extents = [(int(each["extent"]), int(each["nbytes"])) for each in saved.record.entries]
    piece = ctypes.create_string_buffer(PIECE_BYTES)
    with SavedWriter(folder, sum(nbytes for _, nbytes in extents)) as writer:
        for extent, nbytes in extents:
            saved.check(extent, f"extent {extent}")
            writer.begin(extent, nbytes)
            for offset in range(0, nbytes, PIECE_BYTES):
                view = memoryview(piece).cast("B")[: min(PIECE_BYTES, nbytes - offset)]
                saved.read(extent, offset, view)
                writer.write(view)
        writer.finish(saved.step, saved.payload)


def _storage_error(error: OSError, what: str) -> StorageIOError:
    return StorageIOError(error.errno or 0, f"cannot {what}: {error.strerror}")
