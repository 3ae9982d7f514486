"""Host tensors whose bytes are a file's: they take drive space and page cache, which the kernel has back when it wants."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence

import torch

from fuyou.core.errors import StorageIOError, StoreError
from fuyou.core.sizes import format_bytes

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_libc = ctypes.CDLL(None)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def mapped_tensor(folders: Sequence[str], shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros of `shape`, in a file of its own without a name in that of `folders` with the most room. It is an ordinary tensor,
    and nothing of the file is left when its storage goes. StoreError where no drive has the room, StorageIOError."""
    count = torch.Size(shape).numel()
    nbytes = count * dtype.itemsize
    folder = max(folders, key=lambda each: shutil.disk_usage(each).free)
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)  # a page that the drive has no room for would be a SIGBUS
            flat = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=count, dtype=dtype)
    except OSError as error:
        code = error.errno or errno.EIO
        if code in _FULL:
            free = shutil.disk_usage(folder).free
            raise StoreError(
                f"The nvme folder {folder} has no room for a copy of weights: {format_bytes(nbytes)} are needed and "
                f"{format_bytes(free)} are free ({os.strerror(code)}): free some."
            ) from error
        raise StorageIOError(code, f"cannot map {nbytes} bytes of a file in {folder}: {os.strerror(code)}") from error
    return flat.resize_(shape)  # no view: its base would live beside it


def let_go(tensor: torch.Tensor) -> None:
    """The process holds none of a mapped tensor's pages until it touches them again; they are in the file."""
    storage = tensor.untyped_storage()
    _libc.madvise(storage.data_ptr(), storage.nbytes(), mmap.MADV_DONTNEED)
