"""Writing a file that appears under its name only when all of it is on the drive."""

from __future__ import annotations

import os
from pathlib import Path

from fuyou.core.errors import StorageIOError
from fuyou.core.sizes import format_bytes

PREFIX = ".fuyou-partial-"  # of everything unfinished; a later export into the same folder removes leftovers
_FLUSH_BYTES = 64 << 20  # dirty page cache that one export may hold


class PartialFile:
    """A file under a temporary name in its final folder; `finish` makes it durable, `publish` renames it.

    Plain buffered writes: the bytes are read once more by nobody, so every 64 MiB they are flushed and dropped from
    the page cache, and an export does not push other data out of it.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(PREFIX + final.name)
        self.written_bytes = 0
        self._flushed_bytes = 0
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._error("open", error, 0) from error

    def write(self, data: memoryview) -> None:
        """Append bytes; StorageIOError with the errno's text, file, offset and sizes when the drive refuses."""
        rest = data.cast("B") if data.nbytes else data
        while rest.nbytes:
            try:
                count = os.write(self._descriptor, rest)
            except OSError as error:
                raise self._error("write", error, rest.nbytes) from error
            rest = rest[count:]  # a short write is finished here
            self.written_bytes += count
        if self.written_bytes - self._flushed_bytes >= _FLUSH_BYTES:
            self._flush()

    def finish(self) -> None:
        """Everything is on the drive; the file is closed, still under its temporary name."""
        self._flush()
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def publish(self) -> None:
        try:
            os.replace(self.path, self.final)
        except OSError as error:
            raise self._error("rename", error, self.written_bytes) from error

    def discard(self) -> None:
        """Close and remove what is unfinished; harmless after `publish`."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.path.unlink(missing_ok=True)

    def _flush(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._error("fsync", error, self.written_bytes - self._flushed_bytes) from error
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, self.written_bytes, os.POSIX_FADV_DONTNEED)
        self._flushed_bytes = self.written_bytes

    def _error(self, verb: str, error: OSError, count: int) -> StorageIOError:
        return StorageIOError(
            error.errno,
            f"{verb} of {self.path} failed: {error.strerror} (errno {error.errno}), at offset {self.written_bytes}, "
            f"{format_bytes(count)} asked; nothing was left under {self.final.name!r}. Free room or choose another "
            "folder and export again.",
        )


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
