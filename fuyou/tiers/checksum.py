"""The checksum of an extent's bytes: CRC-32C by the native extension, zlib's CRC-32 where that is missing."""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple


class Checksum(NamedTuple):
    """`of(address, nbytes)` of host memory; `name` stands in every record, so that a reader knows what to compute."""

    name: str  # "crc32c" | "crc32"
    of: Callable[[int, int], int]


@functools.cache
def best_checksum() -> Checksum:
    try:
        from fuyou._native import crc32c
    except ImportError:  # not built, or built from older sources
        return Checksum("crc32", _crc32)
    return Checksum("crc32c", crc32c)


def _crc32(address: int, nbytes: int) -> int:
    return zlib.crc32((ctypes.c_char * nbytes).from_address(address))
