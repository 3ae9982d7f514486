"""Streaming export: safetensors files written tensor by tensor, a few MiB in memory, whole or not there at all.

The format is told in headers.py, which reads it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fuyou.checkpoint.headers import DTYPES, HEADER_LIMIT_BYTES
from fuyou.checkpoint.partial import PREFIX, PartialFile, sync_folder
from fuyou.core.errors import ConfigError, StorageIOError, StoreError
from fuyou.core.sizes import format_bytes

SHARD_BYTES = 50 * 10**9  # transformers' own
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CHUNK_BYTES = 4 << 20
_SLACK_BYTES = 1 << 20  # index, file system metadata

_DTYPES = {dtype: name for name, dtype in DTYPES.items()}


class TensorSource(Protocol):
    """One tensor to write: what it is, and its bytes in row-major order, in pieces of any size."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self) -> Iterator[memoryview | bytes]: ...


@dataclass(frozen=True)
class MemoryTensor:
    """The source of a tensor that is in memory, on any device: a buffer, a loose parameter."""

    name: str
    tensor: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def chunks(self) -> Iterator[memoryview]:
        if self.tensor.numel() == 0:
            return
        flat = self.tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for piece in flat.split(_CHUNK_BYTES):
            yield memoryview(piece.cpu().numpy())


def write_safetensors(
    folder: str | os.PathLike[str],
    sources: Sequence[TensorSource],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> list[Path]:
    """Write `sources` as STEM.safetensors, or as shards of at most `shard_bytes` and their index, and name the files.

    A tensor larger than `shard_bytes` has a shard of its own. Files appear under their names only when all of them are
    complete and on the drive; the weights of an earlier export into the folder are replaced. `metadata` is
    {"format": "pt"} unless given, as Hugging Face readers expect.

    Raises ConfigError for a name or dtype that cannot be written, StoreError for a folder that cannot be used or has no
    room, StorageIOError when a write fails or a source gives another number of bytes than its shape says.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    path = _usable_folder(folder)
    _check_sources(sources, shard_bytes)
    _remove_leftovers(path)
    shards = _shards(sources, shard_bytes)
    whole, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    names = [whole] if len(shards) == 1 else [_shard_name(stem, i, len(shards)) for i in range(len(shards))]
    headers = [_header(shard, metadata) for shard in shards]
    _check_room(path, sum(map(len, headers)) + sum(map(_nbytes, sources)))

    with ExitStack() as unfinished:
        files = []
        for name, shard, header in zip(names, shards, headers, strict=True):
            file = PartialFile(path / name)
            unfinished.callback(file.discard)
            _write_shard(file, shard, header)
            files.append(file)
        if len(shards) > 1:
            listing = PartialFile(path / index)
            unfinished.callback(listing.discard)
            listing.write(memoryview(_index(names, shards)))
            listing.finish()
            files.append(listing)
        _publish(path, files, stem)
    return [file.final for file in files]


# --- the format ---------------------------------------------------------------------------------------------------


def _nbytes(source: TensorSource) -> int:
    count = source.dtype.itemsize
    for size in source.shape:
        count *= size
    return count


def _shards(sources: Sequence[TensorSource], shard_bytes: int) -> list[list[TensorSource]]:
    """Split in the given order, filling one shard after the other; at least one, empty if there is nothing."""
    shards: list[list[TensorSource]] = [[]]
    used_bytes = 0
    for source in sources:
        if shards[-1] and used_bytes + _nbytes(source) > shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(source)
        used_bytes += _nbytes(source)
    for shard in shards:
        # Wide dtypes first (a stable sort): every tensor of a mapped file is then aligned to its own dtype.
        shard.sort(key=lambda source: -source.dtype.itemsize)
    return shards


def _header(shard: Sequence[TensorSource], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for source in shard:
        end = offset + _nbytes(source)
        entries[source.name] = {
            "dtype": _DTYPES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise ConfigError(
            f"the header of one safetensors file would take {format_bytes(len(text))} for {len(shard)} tensors, and "
            f"readers accept {format_bytes(HEADER_LIMIT_BYTES)}; export with a smaller shard_bytes."
        )
    return struct.pack("<Q", len(text)) + text


def _index(names: Sequence[str], shards: Sequence[Sequence[TensorSource]]) -> bytes:
    weight_map = {source.name: name for name, shard in zip(names, shards, strict=True) for source in shard}
    total = sum(_nbytes(source) for shard in shards for source in shard)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def _shard_name(stem: str, index: int, count: int) -> str:
    return f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(file: PartialFile, shard: Sequence[TensorSource], header: bytes) -> None:
    file.write(memoryview(header))
    for source in shard:
        expected, got = _nbytes(source), 0
        for chunk in source.chunks():
            view = memoryview(chunk)
            got += view.nbytes
            if got > expected:
                break
            file.write(view)
        if got != expected:
            more = "at least " if got > expected else ""
            raise StorageIOError(
                f"tensor {source.name!r} of shape {list(source.shape)} {source.dtype} gave {more}{got} bytes where "
                f"{expected} belong, while {file.final} was written; nothing was left under that name."
            )
    file.finish()


# --- the folder ---------------------------------------------------------------------------------------------------


def _usable_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise StoreError(f"cannot export to {path}: it is, or lies below, a file; name a folder.") from None
    except OSError as error:
        raise StoreError(f"cannot create the folder {path}: {error.strerror}; name one that you may write.") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise StoreError(f"cannot export to {path}: the folder is not writable; change its mode or name another.")
    return path


def _check_sources(sources: Sequence[TensorSource], shard_bytes: int) -> None:
    if shard_bytes <= 0:
        raise ConfigError(f"shard_bytes={shard_bytes} must be more than 0 bytes.")
    seen: set[str] = set()
    for source in sources:
        if not source.name or source.name == "__metadata__" or not source.name.isprintable():
            raise ConfigError(f"a tensor cannot be called {source.name!r} in a safetensors file; rename it.")
        if source.name in seen:
            raise ConfigError(f"two tensors to export are called {source.name!r}; a file holds each name once.")
        if source.dtype not in _DTYPES:
            raise ConfigError(
                f"tensor {source.name!r} is {source.dtype}, which safetensors files cannot hold; cast it."
            )
        seen.add(source.name)


def _check_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed + _SLACK_BYTES > free:
        raise StoreError(
            f"the export needs {format_bytes(needed + _SLACK_BYTES)} in {folder}, where {format_bytes(free)} are free "
            f"(an earlier export there counts until it is replaced); {format_bytes(needed + _SLACK_BYTES - free)} are "
            "short. Free them or name a folder on another drive."
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted export left under temporary names."""
    for path in folder.glob(PREFIX + "*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _publish(folder: Path, files: Sequence[PartialFile], stem: str) -> None:
    """Put the finished files in place. Readers take STEM.safetensors first, else the index: so the name that makes an
    export visible comes last, and no reader ever finds old and new shards under one index.
    """
    new = {file.final.name for file in files}
    index = f"{stem}.safetensors.index.json"
    if index in new:
        (folder / index).unlink(missing_ok=True)
    for file in files:
        file.publish()
    sync_folder(folder)
    earlier = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(index)}")
    for path in folder.iterdir():
        if path.name not in new and earlier.fullmatch(path.name):
            path.unlink()
    sync_folder(folder)
