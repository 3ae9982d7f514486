"""A complete step as files hold it: a run's store, or a checkpoint, read by plain I/O and trusted in nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Sequence
from typing import Any

from fuyou.core.beside import read_text
from fuyou.core.errors import StorageIOError, StoreError
from fuyou.tiers.checksum import checksum_named
from fuyou.tiers.folders import DATA, DIRTY, FOLDER, HOME, OPEN
from fuyou.tiers.records import Record, payload_of_newest, read_newest

PIECE_BYTES = 1 << 20  # read at a time where bytes are only looked at


class Saved:
    """The newest step in `folders`, read-only; `close` it. Nothing here is a run's: no lock is taken, no engine opened.

    Blobs are byte strings in extents of their own (fuyou/swap/aside.py): `payload["blobs"]` says in which.
    """

    def __init__(self, folders: Sequence[str], record: Record) -> None:
        self.folders = tuple(folders)
        self.record = record
        self._checksum = checksum_named(record.checksum)
        self._files: list[int] = []
        try:
            for folder in folders:
                path = _data(folder)
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
        except OSError as error:
            self.close()
            raise StoreError(f"{path} cannot be read ({error.strerror}).") from error

    @property
    def step(self) -> int:
        return self.record.step

    @property
    def payload(self) -> dict[str, Any]:
        return self.record.payload

    def has(self, extent: int) -> bool:
        """The step has bytes of it."""
        return self.record.entry(extent) is not None

    def nbytes(self, extent: int) -> int:
        """Of an extent that it has; 0 of another."""
        entry = self.record.entry(extent)
        return 0 if entry is None else int(entry["nbytes"])

    def read(self, extent: int, offset: int, target: memoryview) -> None:
        """Fill `target` with the extent's bytes from `offset` on. StoreError where it has no such bytes, StorageIOError."""
        entry = self.record.entry(extent)
        if entry is None or offset < 0 or offset + target.nbytes > int(entry["nbytes"]):
            raise StoreError(
                f"The step in {self.folders[0]} has no bytes {offset} to {offset + target.nbytes} of extent {extent}."
            )
        for part in self.record.parts_of(extent, int(entry["slot"])):
            drive, start, size = int(part["drive"]), int(part["offset"]), int(part["nbytes"])
            count = min(size - offset, target.nbytes)
            if count > 0:
                self._fill(drive, start + offset, target[:count])
                target = target[count:]
            offset = max(offset - size, 0)

    def check(self, extent: int, what: str) -> None:
        """StoreError where the extent's bytes are not those that were committed; `what` they are, for the message."""
        entry = self.record.entry(extent)
        if entry is None:
            return
        piece = ctypes.create_string_buffer(PIECE_BYTES)
        found, nbytes = 0, int(entry["nbytes"])
        for offset in range(0, nbytes, PIECE_BYTES):
            count = min(PIECE_BYTES, nbytes - offset)
            self.read(extent, offset, memoryview(piece).cast("B")[:count])
            found = self._checksum.of(ctypes.addressof(piece), count, found)
        if found != int(entry["checksum"]):
            raise StoreError(self.damaged(extent, what))

    def damaged(self, extent: int, what: str) -> str:
        """The sentence for bytes that are not what was committed."""
        return damaged(self.record, self.folders, extent, what)

    def blob(self, name: str) -> bytes:
        """A byte string of the step, checked. StoreError where it is not there or damaged."""
        nbytes, extents = self._blob(name)
        whole = bytearray(nbytes)
        view, offset = memoryview(whole), 0
        for extent in extents:
            self.check(extent, f"the {name} of the step")
            count = min(self.nbytes(extent), nbytes - offset)
            self.read(extent, 0, view[offset : offset + count])
            offset += count
        if offset != nbytes:
            raise StoreError(f"The step in {self.folders[0]} has {offset} of the {nbytes} bytes of its {name}.")
        return bytes(whole)

    def blob_extents(self, name: str) -> list[int]:
        return self._blob(name)[1] if name in self.payload.get("blobs", {}) else []

    def _blob(self, name: str) -> tuple[int, list[int]]:
        blobs = self.payload.get("blobs")
        found = blobs.get(name) if isinstance(blobs, dict) else None
        match found:
            case [int(nbytes), [*extents]] if nbytes >= 0 and all(type(each) is int for each in extents):
                if len(set(extents)) == len(extents) and nbytes <= sum(map(self.nbytes, extents)):
                    return nbytes, extents
        raise StoreError(
            f"The step in {self.folders[0]} does not say where its {name} lies: it was not written by fuyou."
        )

    def close(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _fill(self, drive: int, offset: int, target: memoryview) -> None:
        while target.nbytes:
            try:
                count = os.preadv(self._files[drive], [target], offset)
            except OSError as error:
                raise StorageIOError(
                    error.errno or 0,
                    f"cannot read {target.nbytes} bytes at {offset} of {_data(self.folders[drive])}: {error.strerror}",
                ) from error
            if count == 0:
                raise StoreError(f"{_data(self.folders[drive])} ends at {offset}, {target.nbytes} bytes too early.")
            target, offset = target[count:], offset + count


def damaged(record: Record, folders: Sequence[str], extent: int, what: str) -> str:
    entry = record.entry(extent)
    parts = record.parts_of(extent, 0 if entry is None else int(entry["slot"]))
    places = ", ".join(
        f"{part['nbytes']} bytes at {part['offset']} of {_data(folders[int(part['drive'])])}" for part in parts
    )
    return (
        f"The bytes of {what} in step {record.step} are not those that were committed ({places}): the drive gave other ones. "
        "Begin from a saved checkpoint, or anew with Config(resume=False)."
    )


def open_saved(folders: Sequence[str]) -> Saved | None:
    """The newest step of the store that `folders` hold together, whichever of them has its records and wherever the others
    of its drives are; None where no commit was ever through. StoreError where a step was and cannot be read; a store whose
    drives another one has taken is passed over for that, where it has the step too."""
    found = []
    for home in dict.fromkeys([*folders, *map(_home_of, folders)]):
        newest = payload_of_newest(os.path.join(home, FOLDER))
        if newest is not None:
            found.append((*newest, home))
    failure: StoreError | None = None
    last = max((step for step, _, _ in found), default=0)
    for _, payload, home in [each for each in found if each[0] == last]:
        try:
            drives = _drives(home, payload, folders)
            return Saved(drives, read_newest(drives))
        except StoreError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return None


def was_left_open(folder: str) -> bool:
    """The run whose store this is did not end in order."""
    return os.path.lexists(os.path.join(_home_of(folder), FOLDER, OPEN))


def is_dirty(folder: str) -> bool:
    """A live store without commits, of no single step."""
    return os.path.lexists(os.path.join(folder, FOLDER, DIRTY))


def _home_of(folder: str) -> str:
    """The folder with the records of the store that `folder` is a drive of: itself, or as is written there."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        told = read_text(os.path.join(folder, FOLDER, HOME))
        if os.path.isabs(told) and "\0" not in told:
            return told
    return folder


def _drives(home: str, payload: dict[str, Any], given: Sequence[str]) -> list[str]:
    """The folders of a store's drives, in its order: as its record says where they are there still, else as they were
    given (a drive may be mounted elsewhere by now). StoreError where one is no drive of another folder's store any more."""
    told = payload.get("folders")
    folders = [home, *(each for each in given if each != home)]
    if isinstance(told, list) and told and all(isinstance(each, str) and os.path.isabs(each) for each in told):
        told = [home, *told[1:]]
        if all(os.path.isfile(_data(each)) for each in told):
            folders = told
    for each in folders[1:]:
        if not os.path.lexists(os.path.join(each, FOLDER, HOME)):
            raise StoreError(
                f"The store of {home} has a drive in {each}, where another run has a store of its own now."
            )
    return folders


def _data(folder: str) -> str:
    return os.path.join(folder, FOLDER, DATA)
