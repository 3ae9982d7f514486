"""The files of a store's commit records: made whole before training, then written in place."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fuyou.core.errors import StorageIOError
from fuyou.tiers.drives import preallocate
from fuyou.tiers.folders import LAYOUTS, RECORDS
from fuyou.tiers.records import (
    COPIES,
    LAYOUT_HEADER,
    LAYOUT_MAGIC,
    PART,
    PLACES,
    VERSION,
    Record,
    layout_bytes,
    overhead_bytes,
    record_bytes,
    record_nbytes,
)

__all__ = ["PLACES", "RecordFiles", "Reserved"]


class Reserved(NamedTuple):
    """Records of so many extents in at most so many parts: what the files have room for."""

    extents: int
    parts: int

    def of(self, name: str) -> int:
        """Bytes of one file."""
        if self == NOTHING:
            return 0
        return record_bytes(self.extents) if name in RECORDS else layout_bytes(self.parts)

    @property
    def nbytes(self) -> int:
        return 0 if self == NOTHING else overhead_bytes(self.extents, self.parts)

    def plus(self, extents: int, parts: int) -> Reserved:
        return Reserved(max(self.extents, 0) + extents, max(self.parts, 0) + parts)


NOTHING = Reserved(-1, -1)


class RecordFiles:
    """Records and layout in the folder of the first drive.

    There, and not on every drive: a step is complete when one record says so, and copies on several drives could say
    different things. Nothing is lost by it, for without any one of the drives no extent that is striped is whole.

    Written through the page cache and then flushed: they are small, need no aligned memory, and so need no engine.
    `reserve` and `append` are called by one thread at a time; `write` by the commit thread.
    """

    def __init__(self, folder: str, drive_count: int) -> None:
        self._paths = {name: os.path.join(folder, name) for name in (*RECORDS, *LAYOUTS)}
        self._files: dict[str, int] = {}
        self.reserved = NOTHING
        self._header = LAYOUT_HEADER.pack(LAYOUT_MAGIC, VERSION, drive_count)
        self._flushed_parts = -1
        self.part_count = 0  # of the layout so far
        self.layout_crc = zlib.crc32(self._header)

    def open(self) -> None:
        try:
            for name, path in self._paths.items():
                self._files[name] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _storage_error(error, f"make {path}") from error

    def reserve(self, wanted: Reserved) -> None:
        """Make room. StoreError where the drive is full."""
        for name, path in self._paths.items():
            more = wanted.of(name) - self.reserved.of(name)
            if more > 0:
                preallocate(path, self.reserved.of(name), more)
        self.reserved = wanted

    def shrink(self, reserved: Reserved) -> None:
        """Back to what `reserved` was: nobody uses what came, or was to come, since."""
        for name, path in self._paths.items():
            if os.stat(path).st_size > reserved.of(name):
                os.truncate(path, reserved.of(name))
        self.reserved = reserved

    def append(self, parts: Sequence[tuple[int, int, int, int, int]]) -> None:
        """Add (extent, slot, drive, offset, bytes) to the layout; it is on the drive with the next record."""
        rows = np.array(parts, PART).tobytes()
        for name in LAYOUTS:
            if self.part_count == 0:
                self._write(name, self._header, 0)
            self._write(name, rows, len(self._header) + self.part_count * PART.itemsize)
        self.part_count += len(parts)
        self.layout_crc = zlib.crc32(rows, self.layout_crc)

    def flush_layout(self, part_count: int) -> None:
        """So many parts are on the drive when this returns."""
        if part_count > self._flushed_parts:
            self._flush(LAYOUTS)
            self._flushed_parts = part_count

    def write(self, place: int, record: bytes) -> None:
        """Both copies of one place; they are on the drive when this returns.

        One after the other, flush and all: a loss of power damages one of them at most, and where both are damaged
        something else has done it.
        """
        for name in RECORDS[COPIES * place : COPIES * (place + 1)]:
            self._write(name, record, 0)
            self._flush((name,))

    def restore(self, record: Record, extents: int) -> None:
        """Go on behind a record that was read: what it names is as it was, and every damaged copy of it is made whole.

        The copy that was read is not touched; `extents`: numbers that are taken.
        """
        self.part_count, self.layout_crc = record.part_count, record.layout_crc
        self.reserved = Reserved(extents, record.part_count)
        size = LAYOUT_HEADER.size + record.part_count * PART.itemsize
        for source, copies, nbytes in ((record.layout_path, LAYOUTS, size), (record.path, _copies(record.path), None)):
            whole = _head(source, nbytes or record_nbytes(record))
            for name in copies:
                if _head_or_nothing(self._paths[name], len(whole)) != whole:  # writing it anew mends a sector, too
                    self._write(name, whole, 0)
                    self._flush((name,))

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _write(self, name: str, data: bytes, offset: int) -> None:
        view = memoryview(data)
        try:
            while view:
                count = os.pwrite(self._files[name], view, offset)
                if count == 0:
                    raise OSError(errno.EIO, "the drive takes no more")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise _storage_error(error, f"write {len(view)} bytes at {offset} of {self._paths[name]}") from error

    def _flush(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                os.fdatasync(self._files[name])
            except OSError as error:
                raise _storage_error(error, f"flush {self._paths[name]}") from error


def _copies(path: str) -> tuple[str, ...]:
    """The names of both copies of a record."""
    place = RECORDS.index(os.path.basename(path)) // COPIES
    return RECORDS[COPIES * place : COPIES * (place + 1)]


def _head_or_nothing(path: str, nbytes: int) -> bytes:
    try:
        return _head(path, nbytes)
    except OSError:
        return b""


def _head(path: str, nbytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(nbytes)


def _storage_error(error: OSError, what: str) -> StorageIOError:
    return StorageIOError(error.errno or 0, f"cannot {what}: {error.strerror}")
