"""Opening a file for direct I/O, and what the file system then asks of addresses, offsets and sizes."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

from fuyou.core.errors import StorageIOError

DEFAULT_ALIGNMENT_BYTES = 4096  # enough for every drive we know of, where the kernel does not say

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_BYTES = 256
_STATX_DIO_OFFSET = 152  # stx_dio_mem_align, then stx_dio_offset_align, both u32


class File:
    """A file opened by one engine, which owns the descriptor until `Engine.close_file`.

    `direct`: O_DIRECT is in force, and every address, offset and size is a multiple of `alignment_bytes` (1 where it is
    not). `fd` may be used for fallocate, fstat and locks, not for closing.
    """

    __slots__ = ("alignment_bytes", "closed", "direct", "engine_id", "fd", "key", "path", "writable")

    def __init__(self, path: str, fd: int, *, direct: bool, alignment_bytes: int, writable: bool) -> None:
        self.path = path
        self.fd = fd
        self.direct = direct
        self.alignment_bytes = alignment_bytes
        self.writable = writable
        self.closed = False
        self.key = -1  # the engine's own handle
        self.engine_id = 0  # id() of the engine that opened it

    @property
    def size_bytes(self) -> int:
        """The file's size now, asked of the file system."""
        return os.fstat(self.fd).st_size

    def __repr__(self) -> str:
        how = f"direct, {self.alignment_bytes}-byte aligned" if self.direct else "buffered"
        return f"File({self.path!r}, {how}{', closed' if self.closed else ''})"


def open_file(path: str | os.PathLike[str], *, writable: bool) -> tuple[File, str]:
    """Open `path` with O_DIRECT where that is taken, creating it (mode 0600) when `writable`.

    Returns the file and, where it had to be opened buffered, the reason. Raises StorageIOError.
    """
    name = os.fspath(path)
    flags = (os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY) | os.O_CLOEXEC
    reason = ""
    try:
        try:
            fd = os.open(name, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            reason = f"the file system of {Path(name).parent} refuses O_DIRECT ({error.strerror})"
            fd = os.open(name, flags, 0o600)
    except OSError as error:
        code = error.errno or errno.EIO
        raise StorageIOError(code, f"cannot open {name}: {os.strerror(code)}") from error
    direct = not reason
    alignment = direct_alignment_bytes(fd) if direct else 1
    return File(name, fd, direct=direct, alignment_bytes=alignment, writable=writable), reason


def direct_alignment_bytes(fd: int) -> int:
    """What O_DIRECT on `fd` needs address, offset and size to be multiples of: statx(STATX_DIOALIGN), else 4096."""
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except (OSError, AttributeError):  # a C library without it
        return DEFAULT_ALIGNMENT_BYTES
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if statx(ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH), ctypes.c_uint(_STATX_DIOALIGN), answer) != 0:
        return DEFAULT_ALIGNMENT_BYTES
    (mask,) = struct.unpack_from("=I", answer, 0)
    memory, offset = struct.unpack_from("=II", answer, _STATX_DIO_OFFSET)
    if not mask & _STATX_DIOALIGN or offset == 0:
        return DEFAULT_ALIGNMENT_BYTES
    return max(memory, offset)
