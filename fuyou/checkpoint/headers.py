"""The parsers of what a model folder says of its weights: safetensors headers and indexes. Nothing is trusted before it is
checked, and whatever the bytes are, ConfigError is the only error.

The format is that of https://github.com/huggingface/safetensors: eight bytes (little-endian length of the header), the
header (JSON: name → dtype, shape, [begin, end) in the data), then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fuyou.core.errors import ConfigError
from fuyou.core.sizes import format_bytes

LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 100_000_000  # the format's own; an index is held to it too
_MOST_DIMENSIONS = 64  # torch's own
_AGAIN = "Copy or download the file again."

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: bytes [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def header_bytes(start: bytes, file_bytes: int, path: str) -> int:
    """The length of the header, from the file's first eight bytes; ConfigError where it is none."""
    length = struct.unpack("<Q", start)[0] if len(start) == LENGTH_BYTES else 0
    if len(start) < LENGTH_BYTES or length > min(HEADER_LIMIT_BYTES, file_bytes - LENGTH_BYTES):
        raise ConfigError(
            f"The weights {path} are damaged: {format_bytes(file_bytes)} long, and not a safetensors file from its first "
            f"bytes on. {_AGAIN}"
        )
    return int(length)


def parse_header(text: bytes, file_bytes: int, path: str) -> dict[str, Place]:
    """Name → place of every tensor. ConfigError for anything but tensors of known dtypes that fill the file's data, each
    as long as its dtype and shape say, without a gap or an overlap."""
    entries = _object(text, f"The weights {path} are damaged: the header cannot be read")
    entries.pop("__metadata__", None)
    data = LENGTH_BYTES + len(text)
    found = {name: _place(name, entry, data, path) for name, entry in entries.items()}
    end, last = data, ""
    for name, each in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if each.begin != end:
            what = "overlap" if each.begin < end else f"leave {each.begin - end} bytes between them"
            _damaged(path, f"{last!r} and {name!r} {what}" if last else f"{name!r} does not begin where the data does")
        end, last = each.end, name
    if file_bytes != end:
        wrong = "cut short" if file_bytes < end else "too long"
        raise ConfigError(
            f"The weights {path} are {wrong}: the header says {end} bytes ({format_bytes(end)}), and the file has "
            f"{file_bytes}. {_AGAIN}"
        )
    return found


def parse_index(text: bytes, path: str) -> dict[str, str]:
    """Tensor → name of the shard that holds it, a plain file name. ConfigError for anything else."""
    damage = f"The index {path} is damaged: it does not say which file holds which tensor"
    found = _object(text, damage).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{damage}. {_AGAIN}")
    for name, shard in found.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise ConfigError(
                f"The index {path} is damaged: it says that {name!r} lies in {_short(shard)}, which is no name of a "
                f".safetensors file in its folder. {_AGAIN}"
            )
    return found


def _place(name: str, entry: Any, data: int, path: str) -> Place:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _damaged(path, f"{name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(
            f"The weights {path} hold {name!r} as {_short(dtype)}, which fuyou cannot read: convert the model to one of "
            f"{', '.join(DTYPES)}."
        )
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        _damaged(path, f"{name!r} has the shape {_short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        _damaged(path, f"{name!r} has the data_offsets {_short(offsets)}")
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    begin, end = offsets
    if end - begin != count:
        _damaged(path, f"{name!r} is {dtype} of shape {shape}, {count} bytes, and has {end - begin} of them")
    return Place(DTYPES[dtype], tuple(shape), data + begin, data + end)


def _are_counts(values: Any) -> bool:
    """A list of integers from 0 on that a file can be as long as."""
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 2**63 for each in values)


def _is_plain(name: str) -> bool:
    """The name of a weights file beside the index, and nothing that leads elsewhere."""
    return name.endswith(".safetensors") and name.isprintable() and not any(sign in name for sign in ("/", "\\", ".."))


def _object(text: bytes, damage: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):  # of UTF-8, of JSON, of a name that comes twice
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{damage}. {_AGAIN}")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _short(value: Any) -> str:
    text = ascii(value) if not isinstance(value, int) else "a number"
    return text if len(text) <= 60 else text[:57] + "..."


def _damaged(path: str, what: str) -> NoReturn:
    raise ConfigError(f"The weights {path} are damaged: {what}. {_AGAIN}")
