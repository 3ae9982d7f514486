"""The format of commit records and of the layout that they name places in, and reading them back.

All numbers are little-endian. A record file (four of them: two places, each with two copies):

    header   72 bytes: magic "FUYOUCMT", u32 version, u32 entries, u64 number (of the commit: the newest has the
             largest), u64 step, 16 bytes name of the extents' checksum, u32 payload bytes, u32 CRC of the layout,
             u64 parts of the layout, u32 CRC of entries and payload, u32 CRC of the 68 bytes before
    entries  20 bytes for each extent: u64 bytes, u32 extent, u32 checksum, u32 current slot; extents ascending
    payload  a JSON object in UTF-8
    and after that whatever an earlier, longer record left.

A layout file (two copies), only ever appended to, so that an older record finds its own beginning of it unchanged:

    header   16 bytes: magic "FUYOULAY", u32 version, u32 drives
    parts    24 bytes each: u32 extent, u16 slot, u16 drive, u64 offset in that drive's data file, u64 bytes;
             the parts of a slot in the order of its bytes

The layout's CRC in a record covers its header and as many parts as the record says. CRCs here are CRC-32 (zlib); that of
the extents is named in the record: "crc32c" (RFC 3720) or "crc32" (zlib), over all bytes of the slot.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuyou.core.errors import ConfigError, StoreError
from fuyou.core.sizes import align_up, format_bytes
from fuyou.tiers.folders import DATA, FOLDER, LAYOUTS, RECORDS

MAGIC, LAYOUT_MAGIC = b"FUYOUCMT", b"FUYOULAY"
VERSION = 1
MOST_PAYLOAD_BYTES = 1 << 20
PLACES, COPIES = 2, 2  # a record's copies are RECORDS[2 * place] and the next
PAGE_BYTES = 4096  # offsets and sizes of parts are multiples of it
CHECKSUMS = ("crc32c", "crc32")

HEADER = struct.Struct("<8sIIQQ16sIIQI")  # and its own CRC
HEADER_BYTES = HEADER.size + 4
LAYOUT_HEADER = struct.Struct("<8sII")
ENTRY = np.dtype([("nbytes", "<u8"), ("extent", "<u4"), ("checksum", "<u4"), ("slot", "<u4")])
PART = np.dtype([("extent", "<u4"), ("slot", "<u2"), ("drive", "<u2"), ("offset", "<u8"), ("nbytes", "<u8")])


def record_bytes(extents: int) -> int:
    """The room that one copy of a record may need."""
    return align_up(HEADER_BYTES + extents * ENTRY.itemsize + MOST_PAYLOAD_BYTES, PAGE_BYTES)


def layout_bytes(parts: int) -> int:
    return align_up(LAYOUT_HEADER.size + parts * PART.itemsize, PAGE_BYTES)


def overhead_bytes(extents: int, parts: int) -> int:
    """What a store with commits holds beside its extents: every copy of both, for at most so many parts."""
    return len(RECORDS) * record_bytes(extents) + len(LAYOUTS) * layout_bytes(parts)


def encode_payload(payload: dict[str, Any]) -> bytes:
    """ConfigError for what JSON cannot say, or says in more than 1 MiB."""
    if not isinstance(payload, dict):
        raise ConfigError(f"What is committed with a step must be a dict, not {type(payload).__name__}.")
    try:
        text = json.dumps(payload, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"What is committed with a step cannot be written as JSON ({error}): use dicts with strings as keys, lists, "
            "strings, numbers, booleans and None."
        ) from error
    if len(text) > MOST_PAYLOAD_BYTES:
        raise ConfigError(
            f"What is committed with a step takes {len(text)} bytes as JSON, and a record holds {MOST_PAYLOAD_BYTES} "
            f"({format_bytes(MOST_PAYLOAD_BYTES)}): keep large things in files of their own, and their names here."
        )
    return text


def encode_record(
    *, number: int, step: int, checksum: str, entries: np.ndarray, payload: bytes, parts: int, layout_crc: int
) -> bytes:
    """`entries`: (extents,) of ENTRY, extents ascending."""
    body = entries.tobytes() + payload
    header = HEADER.pack(
        MAGIC, VERSION, len(entries), number, step, checksum.encode(), len(payload), layout_crc, parts, zlib.crc32(body)
    )
    return header + struct.pack("<I", zlib.crc32(header)) + body


@dataclass(frozen=True)
class Record:
    """A complete step, as its record tells it. `problems`: copies that are damaged, one line each; `path` and `layout_path`:
    those that were read.

    `entries`: (extents,) of ENTRY. `layout`: (parts,) of PART, by extent and slot, in the order of the bytes.
    """

    number: int
    step: int
    checksum: str
    payload: dict[str, Any]
    entries: np.ndarray
    layout: np.ndarray
    path: str
    layout_path: str
    layout_crc: int
    payload_bytes: int
    problems: tuple[str, ...] = ()

    @property
    def part_count(self) -> int:
        return len(self.layout)

    @functools.cached_property
    def _keys(self) -> np.ndarray:
        return _slot_keys(self.layout["extent"], self.layout["slot"])

    def parts(self, row: int) -> np.ndarray:
        """Where the bytes of `entries[row]` lie: (parts,) of PART."""
        return self.parts_of(int(self.entries["extent"][row]), int(self.entries["slot"][row]))

    def parts_of(self, extent: int, slot: int) -> np.ndarray:
        """Where a slot lies: (parts,) of PART; none where there is no such slot."""
        key = np.uint64(2 * extent + slot)
        return self.layout[np.searchsorted(self._keys, key) : np.searchsorted(self._keys, key, "right")]

    def entry(self, extent: int) -> np.void | None:
        """What the step has of an extent; None where it has no bytes."""
        row = int(np.searchsorted(self.entries["extent"], extent))
        return self.entries[row] if row < len(self.entries) and self.entries["extent"][row] == extent else None


def record_nbytes(record: Record) -> int:
    return HEADER_BYTES + len(record.entries) * ENTRY.itemsize + record.payload_bytes


def read_newest(folders: Sequence[str]) -> Record:
    """The newest step that was committed in the nvme folders of a run, in their order; every field of its record is right.

    Nothing in a file is trusted before it was checked; the extents' own bytes are not read here. StoreError, with what is
    wrong with each copy, where there is none, and where an older step is whole but a newer one may be lost.
    """
    home = os.path.join(folders[0], FOLDER)
    newest, problems, _ = _newest_record(home)
    for name in LAYOUTS:
        path = os.path.join(home, name)
        if newest is None:
            break
        try:
            layout = _read_layout(path, newest, folders)
        except StoreError as error:
            problems.append(str(error))
            continue
        return Record(
            newest.number, newest.step, newest.checksum, newest.payload, newest.entries, layout, newest.path, path,
            newest.layout_crc, newest.payload_bytes, tuple(dict.fromkeys(problems)),
        )  # fmt: skip
    raise StoreError(
        f"There is no complete step in {home}: "
        + ("; ".join(dict.fromkeys(problems)) or "no commit was ever begun")
        + ". Begin from a saved checkpoint or from the model's own weights."
    )


def payload_of_newest(home: str) -> tuple[int, dict[str, Any]] | None:
    """(step, payload) of the newest record in the folder `home`, whose layout is not looked at; None where no commit was
    ever through. StoreError as `read_newest`."""
    newest, problems, lost = _newest_record(home)
    if newest is None and lost:
        raise StoreError(f"There is no complete step in {home}: {'; '.join(problems)}.")
    return None if newest is None else (newest.step, newest.payload)


def _newest_record(home: str) -> tuple[_Found | None, list[str], bool]:
    """With what is wrong with copies, and whether a step that was complete may be lost by it.

    A torn commit leaves one damaged copy (RecordFiles.write): where both copies of a place are damaged, a step that was
    complete is lost, and an older one must not pass for the newest. Where the second copy is still blank, nothing was ever
    complete in this place; a store that was killed before it was open lacks files, and has none either.
    """
    found: list[_Found] = []
    problems: list[str] = []
    lost = False
    for place in range(PLACES):
        damaged, blank = [], []
        paths = [os.path.join(home, name) for name in RECORDS[COPIES * place : COPIES * (place + 1)]]
        for path in paths:
            try:
                record = _read_record(path)
            except StoreError as error:
                problems.append(str(error))
                damaged += [path] if os.path.lexists(path) else []
            else:
                found += [record] if record is not None else []
                blank += [path] if record is None else []
        lost |= bool(damaged) and (damaged, blank) != (paths[:1], paths[1:])
        if len(damaged) == COPIES:
            older = (
                f"; to go on from an older one all the same, remove {' and '.join(damaged)}"
                if found or place == 0
                else ""
            )
            raise StoreError(
                f"There is no complete step in {home} that is the newest for sure: both copies of a record are damaged "
                f"({'; '.join(problems)}), and it may be of a later step than the others. Begin from a saved checkpoint{older}."
            )
    return max(found, key=lambda each: each.number, default=None), problems, lost


@dataclass(frozen=True)
class _Found:
    path: str
    number: int
    step: int
    checksum: str
    payload: dict[str, Any]
    payload_bytes: int
    entries: np.ndarray
    part_count: int
    layout_crc: int


def _read_record(path: str) -> _Found | None:
    """None for a file that no record was ever written to. StoreError for one that is not there or not whole."""
    with _opened(path) as file:
        head = file.read(HEADER_BYTES)
        if not any(head):
            return None
        if len(head) < HEADER_BYTES:
            raise StoreError(f"{path} ends inside its header")
        magic, version, count, number, step, name, payload_bytes, layout_crc, parts, crc = HEADER.unpack_from(head)
        if magic != MAGIC:
            raise StoreError(f"{path} is not a commit record")
        if struct.unpack_from("<I", head, HEADER.size)[0] != zlib.crc32(head[: HEADER.size]):
            raise StoreError(f"{path} has a damaged header")
        if version != VERSION:
            raise StoreError(f"{path} is of version {version}, and this fuyou reads version {VERSION}")
        checksum = name.rstrip(b"\0").decode("ascii", "replace")
        if checksum not in CHECKSUMS:
            raise StoreError(f"{path} has checksums {checksum!r}, and this fuyou knows {', '.join(CHECKSUMS)}")
        size = count * ENTRY.itemsize + payload_bytes
        if payload_bytes > MOST_PAYLOAD_BYTES or HEADER_BYTES + size > os.fstat(file.fileno()).st_size:
            raise StoreError(f"{path} is cut short: its record has {HEADER_BYTES + size} bytes")
        body = file.read(size)
    if len(body) != size or zlib.crc32(body) != crc:
        raise StoreError(f"{path} is damaged: its bytes do not have their checksum")
    entries = np.frombuffer(body, ENTRY, count)
    if np.any(entries["extent"][1:] <= entries["extent"][:-1]) or np.any(entries["slot"] > 1):
        raise StoreError(f"{path} names extents out of order or slots that do not exist")
    return _Found(
        path,
        number,
        step,
        checksum,
        _payload(path, body[size - payload_bytes :]),
        payload_bytes,
        entries,
        parts,
        layout_crc,
    )


def _payload(path: str, text: bytes) -> dict[str, Any]:
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} has a payload that is not JSON ({error})") from error
    if not isinstance(payload, dict):
        raise StoreError(f"{path} has a payload that is not an object")
    return payload


def _read_layout(path: str, record: _Found, folders: Sequence[str]) -> np.ndarray:
    """Its parts, by extent and slot. StoreError where they are not those of `record`, or cannot be."""
    with _opened(path) as file:
        size = LAYOUT_HEADER.size + record.part_count * PART.itemsize
        if size > os.fstat(file.fileno()).st_size:
            raise StoreError(f"{path} is cut short: {record.path} needs {size} bytes of it")
        data = file.read(size)
    if len(data) != size or zlib.crc32(data) != record.layout_crc:
        raise StoreError(f"{path} is damaged, or not the layout of {record.path}")
    magic, version, drives = LAYOUT_HEADER.unpack_from(data)
    if magic != LAYOUT_MAGIC or version != VERSION:
        raise StoreError(f"{path} is not a layout of version {VERSION}")
    if drives != len(folders):
        raise StoreError(f"{path} is of a run on {drives} drives, and {len(folders)} nvme folders were given")
    parts = np.frombuffer(data, PART, offset=LAYOUT_HEADER.size)
    parts = parts[np.argsort(_slot_keys(parts["extent"], parts["slot"]), kind="stable")]
    _check_places(path, parts, folders)
    _check_entries(record, parts)
    return parts


def _check_places(path: str, parts: np.ndarray, folders: Sequence[str]) -> None:
    """Every part lies inside its drive's data file, and no two share a byte."""
    if np.any(parts["drive"] >= len(folders)) or np.any(parts["slot"] > 1):
        raise StoreError(f"{path} names a drive or a slot that does not exist")
    if np.any(parts["offset"] % PAGE_BYTES) or np.any(parts["nbytes"] % PAGE_BYTES) or not np.all(parts["nbytes"]):
        raise StoreError(f"{path} has parts that are empty or not in whole pages of {PAGE_BYTES} bytes")
    for drive, folder in enumerate(folders):
        data = os.path.join(folder, FOLDER, DATA)
        with _opened(data) as file:
            size = os.fstat(file.fileno()).st_size
        its = np.sort(parts[parts["drive"] == drive], order="offset")
        if np.any(its["offset"] > size) or np.any(its["nbytes"] > size - its["offset"]):
            raise StoreError(f"{path} has parts beyond the {size} bytes of {data}")
        if np.any(its["offset"][1:] < its["offset"][:-1] + its["nbytes"][:-1]):
            raise StoreError(f"{path} has parts that overlap in {data}")


def _check_entries(record: _Found, parts: np.ndarray) -> None:
    """Every entry's slot is in the layout, with as many bytes."""
    keys, rows = np.unique(_slot_keys(parts["extent"], parts["slot"]), return_inverse=True)
    sizes = np.zeros(len(keys) + 1, np.uint64)  # the last: of what is not there
    np.add.at(sizes, rows, parts["nbytes"])
    wanted = _slot_keys(record.entries["extent"], record.entries["slot"])
    at = np.searchsorted(keys, wanted)
    known = at < len(keys)
    known[known] = keys[at[known]] == wanted[known]
    if not np.all(known) or np.any(sizes[at] != record.entries["nbytes"]):
        raise StoreError(f"{record.path} names extents that its layout does not have, or with other sizes")


def _slot_keys(extents: np.ndarray, slots: np.ndarray) -> np.ndarray:
    return extents.astype(np.uint64) * 2 + slots.astype(np.uint64)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """The file, for reading. StoreError where it is missing, a link, or no file, and where the drive does not give its bytes:
    its other copy may be whole."""
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        with file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise StoreError(f"{path} is not a file")
            yield file
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror})") from error
