"""Whether the safetensors files of a model folder are whole, told from their headers alone, file by file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from fuyou.checkpoint.export import INDEX, WEIGHTS
from fuyou.core.errors import ConfigError
from fuyou.core.sizes import format_bytes

_HEADER_LIMIT_BYTES = 100_000_000  # the format's own


def check_weights(folder: str | os.PathLike[str]) -> None:
    """ConfigError naming the file of `folder` that is missing, cut short or damaged: model.safetensors, or the index and
    every shard that it names. A folder with neither is left to who reads it (other formats)."""
    path = Path(folder)
    if (path / WEIGHTS).exists():
        check_file(path / WEIGHTS)
    elif (path / INDEX).exists():
        shards = sorted(set(_weight_map(path / INDEX).values()))
        missing = [shard for shard in shards if not (path / shard).is_file()]
        if missing:
            raise ConfigError(
                f"Model folder {folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names, such as "
                f"{missing[0]}: copy or download it again."
            )
        for shard in shards:
            check_file(path / shard)


def check_file(path: Path) -> None:
    """ConfigError where the file is not as long as its header says, or its header cannot be read."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or length > min(_HEADER_LIMIT_BYTES, nbytes - 8):
            raise ConfigError(
                f"The weights {path} are damaged: {format_bytes(nbytes)} long, and not a safetensors file from its first "
                "bytes on. Copy or download the file again."
            )
        try:
            entries = json.loads(file.read(length))
            end = max(
                (entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0
            )
            needed = 8 + length + int(end)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ConfigError(
                f"The weights {path} are damaged: the header cannot be read. Copy or download the file again."
            ) from None
    if nbytes != needed:
        wrong = "cut short" if nbytes < needed else "too long"
        raise ConfigError(
            f"The weights {path} are {wrong}: the header says {needed} bytes ({format_bytes(needed)}), and the file has "
            f"{nbytes}. Copy or download the file again."
        )


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(path.read_text("utf-8"))["weight_map"]
        if isinstance(found, dict) and all(isinstance(shard, str) for shard in found.values()):
            return found
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise ConfigError(f"The index {path} is damaged: it does not say which file holds which tensor. Copy it again.")
