"""What tests of a store on several drives share: a store as a run has it, and what its files hold."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fuyou.core.ledger import Ledger
from fuyou.tiers.folders import check_folders
from fuyou.tiers.host import Arena
from fuyou.tiers.io import open_engine
from fuyou.tiers.store import Extent, Store

MIB = 1 << 20
PAGE = 4096


class Run:
    """A store on `folders` with its ledger and host memory, as a run has them."""

    def __init__(
        self, folders: Sequence[Path], speeds: Sequence[float] = (), kind: str = "auto", deadline_s: float = 60
    ):
        self.book = Ledger({"device": 0, "host": 64 * MIB, "nvme": 1 << 40})
        self.store = Store(check_folders([str(each) for each in folders]), self.book)
        self.arena = Arena(32 * MIB, self.book)
        speed_of = dict(zip(map(str, folders), speeds, strict=True)) if speeds else {}

        def open_drive(folder: str):
            return open_engine(kind, deadline_s=deadline_s), speed_of.get(folder, 0.0)

        self.store.start(open_drive)
        self.store.register(self.arena.address, self.arena.nbytes)

    def open(self, *wanted: tuple[int, int]) -> list[Extent]:
        """Extents of (bytes, slots)."""
        extents = [self.store.place(nbytes, "optimizer", slots) for nbytes, slots in wanted]
        self.store.open()
        return extents

    def write(self, extent: Extent, content: bytes):
        """(ticket, lease): release the lease when the ticket is done."""
        lease = self.arena.lease(extent.nbytes, "staging")
        lease.data.numpy()[:] = memoryview(content)
        return extent.write(lease.address, lease), lease

    def write_all(self, contents: dict[Extent, bytes]) -> None:
        for extent, content in contents.items():
            ticket, lease = self.write(extent, content)
            ticket.wait()
            lease.release()

    def read(self, extent: Extent) -> bytes:
        lease = self.arena.lease(extent.nbytes, "staging")
        try:
            extent.read(lease.address, lease).wait()
            return lease.data.numpy().tobytes()
        finally:
            lease.release()

    def held(self) -> list[int]:
        return [drive.nbytes for drive in self.store.drives]

    def close(self) -> None:
        self.store.close()
        self.arena.close()
        assert self.book.held("nvme") == 0


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    """Makes Runs; closes them in the end."""
    made: list[Run] = []

    def make(*arguments, **options) -> Run:
        made.append(Run(*arguments, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def folders_in(place: Path, count: int) -> list[Path]:
    folders = [place / f"drive-{index}" for index in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


def random_bytes(extents: Sequence[Extent], seed: int) -> dict[Extent, bytes]:
    draw = random.Random(seed)
    return {extent: draw.randbytes(extent.nbytes) for extent in extents}


def on_disk(extent: Extent, slot: int) -> bytes:
    """What the files hold where the layout says."""
    found = []
    for drive, offset, nbytes in extent.slots[slot]:
        with open(Path(drive.folder) / "fuyou-store" / "data", "rb") as file:
            found.append(os.pread(file.fileno(), nbytes, offset))
    return b"".join(found)


def assert_no_overlap(extents: Sequence[Extent]) -> None:
    """No two parts on one drive share a byte, and together they fill its file."""
    parts = [part for extent in extents for slot in extent.slots for part in slot]
    for drive in {part.drive for part in parts}:
        spans = sorted((part.offset, part.offset + part.nbytes) for part in parts if part.drive is drive)
        assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
        assert spans[0][0] == 0 and spans[-1][1] == drive.nbytes == os.stat(drive.path).st_size


def sizes(extent: Extent, slot: int = 0) -> dict[str, int]:
    return {Path(part.drive.folder).name: part.nbytes for part in extent.slots[slot]}


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@contextlib.contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """RLIMIT_FSIZE: making or writing more of a file is EFBIG (Python ignores SIGXFSZ)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def open_files(folder: Path) -> list[str]:
    links = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if os.path.islink(link)]
    return [path for path in paths if path.startswith(str(folder))]
