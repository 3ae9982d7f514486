"""Byte counts as people write and read them."""

from __future__ import annotations

import re
import reprlib
from typing import Any

from fuyou.core.errors import ConfigError

_UNITS = {
    "": 1, "b": 1,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


MOST_BYTES = 1 << 63  # what no file and no address reaches
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
_REPR.maxlevel = 3


def parse_bytes(value: int | str, name: str) -> int:
    """`48GiB`, `1.5TB`, `4096` → bytes. ConfigError naming `name` for anything else, and for zero and below."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ConfigError(f"{name}={shown(value)} is not a size: give bytes as an int, or a string such as '48GiB'.")
    if isinstance(value, int):
        count = value
    else:
        match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", value)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(
                f"{name}={shown(value)} is not a size: use KiB, MiB, GiB, TiB, KB, MB, GB or TB, as in '48GiB'."
            )
        count = (
            int(float(match[1]) * _UNITS[match[2].lower()])
            if "." in match[1]
            else int(match[1]) * _UNITS[match[2].lower()]
        )
    if not 0 < count < MOST_BYTES:
        raise ConfigError(f"{name}={shown(value)} must be more than 0 bytes, and less than 2^63.")
    return count


def shown(value: Any) -> str:
    """`value` in a message: its repr, of which a long or deep one is cut."""
    return _REPR.repr(value)


def format_bytes(count: float) -> str:
    """Three significant digits with a binary unit, and the exact count while it is short: '1.50 GiB', '512 B'."""
    sign, size = ("-" if count < 0 else ""), abs(float(count))
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.2f} {unit}"


def align_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
