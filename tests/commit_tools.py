"""What tests of commits share: a reader of records of its own, from the format that fuyou/tiers/records.py describes, with a
CRC-32C of its own; a store with commits; a gate that holds commits up."""

from __future__ import annotations

import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_io import Memory

from fuyou.core.ledger import Ledger
from fuyou.core.ticket import Ticket
from fuyou.tiers.commits import RecordFiles
from fuyou.tiers.folders import check_folders
from fuyou.tiers.io import open_engine
from fuyou.tiers.store import Extent, Store

PAGE = 4096


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    """RFC 3720's, bit by bit reversed, a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


CHECKSUM = {b"crc32c": crc32c, b"crc32": zlib.crc32}


@dataclass
class Step:
    number: int
    step: int
    checksum: bytes
    payload: dict
    entries: dict[int, tuple[int, int, int]]  # extent: (slot, bytes, checksum)
    parts: int
    layout_crc: int


def home(folder: Path | str) -> Path:
    return Path(folder) / "fuyou-store"


def parse(data: bytes) -> Step | None:
    """None where anything is not as it should be."""
    if len(data) < 72 or data[:8] != b"FUYOUCMT" or struct.unpack_from("<I", data, 68)[0] != zlib.crc32(data[:68]):
        return None
    version, count, number, step, name, payload_bytes, layout_crc, parts, crc = struct.unpack_from(
        "<IIQQ16sIIQI", data, 8
    )
    end = 72 + 20 * count + payload_bytes
    if version != 1 or len(data) < end or zlib.crc32(data[72:end]) != crc:
        return None
    entries = {}
    for row in range(count):
        nbytes, extent, checksum, slot = struct.unpack_from("<QIII", data, 72 + 20 * row)
        entries[extent] = (slot, nbytes, checksum)
    payload = json.loads(data[72 + 20 * count : end])
    return Step(number, step, name.rstrip(b"\0"), payload, entries, parts, layout_crc)


def newest(folder: Path | str) -> Step | None:
    found = [parse((home(folder) / f"commit-{place}-{copy}").read_bytes()) for place in (0, 1) for copy in "ab"]
    return max((each for each in found if each is not None), key=lambda each: each.number, default=None)


def places(folder: Path | str, step: Step, copy: str = "a") -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """By (extent, slot): its (drive, offset, bytes)."""
    data = (home(folder) / f"layout-{copy}").read_bytes()[: 16 + 24 * step.parts]
    assert data[:8] == b"FUYOULAY" and zlib.crc32(data) == step.layout_crc
    found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for row in range(step.parts):
        extent, slot, drive, offset, nbytes = struct.unpack_from("<IHHQQ", data, 16 + 24 * row)
        found.setdefault((extent, slot), []).append((drive, offset, nbytes))
    return found


def contents(folders: Sequence[Path | str], step: Step, copy: str = "a") -> dict[int, bytes]:
    """Every extent's bytes where the record says that they are; they have their checksums, or it is an assertion."""
    where = places(folders[0], step, copy)
    found = {}
    for extent, (slot, nbytes, checksum) in step.entries.items():
        data = b""
        for drive, offset, size in where[extent, slot]:
            with open(home(folders[drive]) / "data", "rb") as file:
                data += os.pread(file.fileno(), size, offset)
        assert len(data) == nbytes
        assert CHECKSUM[step.checksum](data) == checksum, (
            f"extent {extent} of step {step.step} is not what was committed"
        )
        found[extent] = data
    return found


# ---- a store with commits


class Job:
    """A store with commits and what goes into it. `keep` holds the memory of every write until the end."""

    def __init__(
        self, *folders: Path, durable: bool = True, kind: str = "auto", nvme: int = 1 << 40, verify: bool = False
    ):
        self.folders = folders
        self.book = Ledger({"device": 0, "host": 0, "nvme": nvme})
        self.store = Store(check_folders([str(each) for each in folders]), self.book, durable=durable, verify=verify)
        self.store.start(lambda _: (open_engine(kind, deadline_s=60), 0.0))

    def open(self, *wanted: tuple[int, int], committed: bool = True) -> list[Extent]:
        extents = [self.store.place(nbytes, "optimizer", slots, committed=committed) for nbytes, slots in wanted]
        self.store.open()
        return extents

    def start(self, extent: Extent, content: bytes, *, ahead: bool = False) -> Ticket:
        memory = Memory(extent.nbytes, content)
        return extent.write(memory.address, memory, ahead=ahead)

    def write(self, extent: Extent, content: bytes) -> None:
        extent.free_after().wait()
        self.start(extent, content).wait()

    def read(self, extent: Extent) -> bytes:
        memory = Memory(extent.nbytes)
        extent.read(memory.address, memory).wait()
        return memory.bytes()


@pytest.fixture
def job() -> Iterator[Callable[..., Job]]:
    made: list[Job] = []

    def make(*folders: Path, **options) -> Job:
        made.append(Job(*folders, **options))
        return made[-1]

    yield make
    for each in made:
        each.store.close()
        assert each.book.held("nvme") == 0


class Gate:
    """Commits reach their record only when they are let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._passes = threading.Semaphore(0)
        write = RecordFiles.write

        def waiting(files: RecordFiles, place: int, record: bytes) -> None:
            assert self._passes.acquire(timeout=60)
            write(files, place, record)

        monkeypatch.setattr(RecordFiles, "write", waiting)

    def open(self, count: int = 1) -> None:
        if count:
            self._passes.release(count)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open(1000)


def fill(value: int, extent: Extent) -> bytes:
    return bytes([value]) * extent.nbytes
