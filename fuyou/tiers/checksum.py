"""The checksum of an extent's bytes: CRC-32C by the native extension, zlib's CRC-32 where that is missing."""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections.abc import Callable
from typing import NamedTuple

from fuyou.core.errors import StoreError


class Checksum(NamedTuple):
    """`of(address, nbytes, before)` of host memory, behind bytes whose checksum is `before` (0: none); `name` stands in every
    record, so that a reader knows what to compute."""

    name: str  # "crc32c" | "crc32"
    of: Callable[..., int]


@functools.cache
def best_checksum() -> Checksum:
    try:
        from fuyou._native import crc32c
    except ImportError:  # not built, or built from older sources
        return Checksum("crc32", _crc32)
    return Checksum("crc32c", crc32c)


def checksum_named(name: str) -> Checksum:
    """The one that a record names. StoreError where this machine cannot compute it."""
    if name == "crc32":
        return Checksum("crc32", _crc32)
    best = best_checksum()
    if best.name != name:
        raise StoreError(
            f"The bytes of this step have checksums {name!r}, which fuyou computes by its native extension, and that is not "
            "built here: install a C++17 compiler and fuyou again."
        )
    return best


def _crc32(address: int, nbytes: int, before: int = 0) -> int:
    return zlib.crc32((ctypes.c_char * nbytes).from_address(address), before)
