"""The safetensors files of a model folder, checked and open for reading: regular files only, no pickle."""

from __future__ import annotations

import os
import stat
import weakref
from pathlib import Path

from fuyou.checkpoint.export import INDEX, WEIGHTS
from fuyou.checkpoint.headers import (
    HEADER_LIMIT_BYTES,
    LENGTH_BYTES,
    Place,
    header_bytes,
    parse_header,
    parse_index,
)
from fuyou.core.errors import ConfigError, StorageIOError
from fuyou.core.sizes import format_bytes

_DROP_BYTES = 64 << 20


class WeightsFile:
    """One file, open as long as somebody refers to it: what was checked is what is read, whatever takes its name.

    What was read is read once: it is dropped from the page cache, so that an import pushes no other data out of it.
    """

    def __init__(self, path: Path, descriptor: int, tensors: dict[str, Place]) -> None:
        self.path = path
        self.tensors = tensors
        self._descriptor = descriptor
        self._read_bytes = 0
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) from `offset`; StorageIOError where the drive fails or the file has become shorter."""
        start, rest = offset, target
        while rest.nbytes:
            try:
                count = os.preadv(self._descriptor, [rest], start)
            except OSError as error:
                raise StorageIOError(
                    error.errno,
                    f"read of {self.path} failed: {error.strerror} (errno {error.errno}), at offset {start}, "
                    f"{format_bytes(rest.nbytes)} asked. Copy the model to another drive and load it again.",
                ) from error
            if count == 0:
                raise StorageIOError(
                    f"{self.path} has become shorter while it was read: nothing at offset {start}, where "
                    f"{format_bytes(rest.nbytes)} belong. Copy or download it again."
                )
            start, rest = start + count, rest[count:]
        self._read_bytes += target.nbytes
        if self._read_bytes >= _DROP_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, start, os.POSIX_FADV_DONTNEED)
            self._read_bytes = 0


def open_weights(folder: str | os.PathLike[str]) -> list[WeightsFile]:
    """model.safetensors, or all shards that the index names, in the order of their names. ConfigError naming what is
    missing, damaged, no regular file, or in another format than safetensors, and a tensor that two shards hold."""
    path = Path(folder)
    if not (path / WEIGHTS).exists() and not (path / INDEX).exists():
        _refuse_other_formats(path)
    if (path / WEIGHTS).exists():
        return [open_file(path / WEIGHTS)]
    placed = parse_index(_read_index(path / INDEX), str(path / INDEX))
    shards = sorted(set(placed.values()))
    missing = [shard for shard in shards if not (path / shard).exists()]
    if missing:
        raise ConfigError(
            f"Model folder {folder} lacks {len(missing)} of the {len(shards)} shards that {INDEX} names, such as "
            f"{missing[0]}: copy or download it again."
        )
    files = [open_file(path / shard) for shard in shards]
    holder: dict[str, str] = {}
    for file in files:
        for name in file.tensors:
            if name in holder:
                raise ConfigError(
                    f"Two shards of {folder}, {holder[name]} and {file.path.name}, hold {name!r}: they do not belong "
                    "together. Copy or download the model again."
                )
            holder[name] = file.path.name
    for name, shard in placed.items():
        if holder.get(name) != shard:
            raise ConfigError(
                f"The index {path / INDEX} is damaged: it says that {name!r} lies in {shard}, which does not hold it. "
                "Copy or download the model again."
            )
    return files


def open_file(path: Path) -> WeightsFile:
    """ConfigError where the file is no regular one, cannot be read, or is not whole (told from its header)."""
    descriptor, nbytes = _open_regular(path)
    try:
        length = header_bytes(os.pread(descriptor, LENGTH_BYTES, 0), nbytes, str(path))
        tensors = parse_header(os.pread(descriptor, length, LENGTH_BYTES), nbytes, str(path))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise _unreadable(path, error) from error
        raise
    return WeightsFile(path, descriptor, tensors)


def _read_index(path: Path) -> bytes:
    descriptor, nbytes = _open_regular(path)
    with os.fdopen(descriptor, "rb") as file:
        if nbytes > HEADER_LIMIT_BYTES:
            raise ConfigError(f"The index {path} is damaged: it is {format_bytes(nbytes)} long. Copy it again.")
        return file.read(HEADER_LIMIT_BYTES)


def _open_regular(path: Path) -> tuple[int, int]:
    """(descriptor, bytes) of a file or a link to one, as the hub's cache has them. Looked at before it is opened, since
    that alone can set a device to work, and after, since it may have been replaced; a pipe's writer is not waited for."""
    try:
        regular = stat.S_ISREG(os.stat(path).st_mode)
        if regular:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(descriptor)
            regular = stat.S_ISREG(status.st_mode)
            if not regular:
                os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not regular:
        raise ConfigError(f"The weights {path} are no regular file (a folder, pipe or device): copy the model again.")
    return descriptor, status.st_size


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"The weights {path} cannot be read: {error.strerror} (errno {error.errno}).")


def _refuse_other_formats(path: Path) -> None:
    pickled = sorted(each.name for each in path.glob("*.bin")) if path.is_dir() else []
    if pickled:
        raise ConfigError(
            f"Model folder {path} has no file named {WEIGHTS} and no {INDEX}, only {pickled[0]}, a pickle, which can run "
            "any code when it is loaded. fuyou reads none: where you trust it, AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(another_folder) makes a safetensors copy."
        )
    raise ConfigError(
        f"Model folder {path} has no file named {WEIGHTS} and no {INDEX}: its weights are not there. Copy or download the "
        "model again."
    )
