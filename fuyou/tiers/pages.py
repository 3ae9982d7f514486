"""Anonymous host memory on huge pages, exact to the page, that can be handed on without being cleared."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

PAGE_BYTES = 4096
HUGE_BYTES = 2 << 20  # of x86-64, and of arm64 with 4 KiB pages
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4  # <linux/mman.h>
MAP_FIXED = 0x10

_libc = ctypes.CDLL(None)
_mremap = getattr(_libc, "mremap", None)
if _mremap is not None:
    _mremap.restype = ctypes.c_void_p
    _mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
    )  # fmt: skip


class Pages:
    """An address range of `nbytes` whose pages come when they are touched, and go with `drop`.

    `bytes` is a (nbytes,) uint8 host tensor over it. From 2 MiB on it begins at a multiple of HUGE_BYTES and lies on huge
    pages as far as they are whole: the rest is not, where a huge page would hold more than was asked for. A forked child
    does not inherit it (MADV_DONTFORK). Nothing unmaps it while somebody holds the tensor.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        slack = HUGE_BYTES - PAGE_BYTES if nbytes >= HUGE_BYTES else 0  # never touched, so it costs nothing
        self._map = mmap.mmap(-1, max(nbytes, 1) + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._start = -torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr() % HUGE_BYTES if slack else 0
        self._advise()
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8, offset=self._start)[:nbytes]
        self.address = self.bytes.data_ptr()

    def _advise(self) -> None:
        whole = self.nbytes - self.nbytes % HUGE_BYTES
        for advice, *part in (("MADV_DONTFORK",), ("MADV_HUGEPAGE", self._start, whole)):
            if not part or whole:
                with contextlib.suppress(AttributeError, OSError):  # a kernel or a Python built without them
                    self._map.madvise(getattr(mmap, advice), *part)

    def drop(self) -> None:
        """Give the pages back to the system: the bytes read as zeros from now on, and cost nothing."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def take_over(self, other: Pages) -> bool:
        """The pages of `other`, with what is in them, are these from now on, as far as both reach; `other` has none there
        (mremap(2), MREMAP_DONTUNMAP of Linux 5.7). False where the kernel does not do it: `other` is as it was then, and
        these bytes may be zeros.

        A page that is touched anew is cleared first, which costs as much as copying it. Nobody may be reading, writing or
        moving the bytes of either meanwhile.
        """
        length = min(self.nbytes, other.nbytes) // PAGE_BYTES * PAGE_BYTES
        if _mremap is None or not length:
            return False
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
        if _mremap(other.address, length, length, flags, self.address) == self.address:
            return True
        # What was mapped there goes first, so a kernel short of memory can fail with nothing there: mapped once more.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
        if _libc.mmap(self.address, length, mmap.PROT_READ | mmap.PROT_WRITE, private, -1, 0) != self.address:
            raise MemoryError(f"The system has no room for {length} bytes of address space that it just had.")
        self._advise()
        return False
