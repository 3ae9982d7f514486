"""A store on several drives: where the bytes lie, and what one drive that is full, stuck, broken or taken does to the rest.

Drives are folders where that is enough, else file systems of their own on loop devices.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mounts
import pytest

from fuyou.core.errors import BudgetError, DeadlineError, FuyouError, StateError, StorageIOError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.tiers.folders import check_folders, rooms_of
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


@pytest.mark.parametrize("kind", ["io_uring", "threads", "aiofiles"])
@pytest.mark.parametrize("speeds", [(3e9, 1e9), (1e9, 2e9, 0.5e9)], ids=["two", "three"])
def test_bytes_lie_where_the_layout_says_and_each_drive_moves_its_share(run, nvme, kind, speeds):
    made = run(folders_in(nvme, len(speeds)), speeds, kind)
    large = [8 * MIB, 5 * MIB + PAGE, 4 * MIB]
    extents = made.open(*((nbytes, 2) for nbytes in (*large, 4096, 70_000, 300_000)), (6 * MIB, 1), (5000, 1))
    assert_no_overlap(extents)
    for extent in extents:
        assert sum(sizes(extent).values()) == extent.nbytes
        for index, speed in enumerate(speeds):
            share = extent.nbytes * speed / sum(speeds)
            if extent.nbytes > 3 * MIB:
                assert abs(sizes(extent)[f"drive-{index}"] - share) <= PAGE
            else:
                assert len(extent.slots[0]) == 1
    first, second = random_bytes(extents, 1), random_bytes(extents, 2)
    made.write_all(first)
    made.write_all(second)
    for extent in extents:
        assert on_disk(extent, -1) == second[extent] == made.read(extent)
        assert len(extent.slots) == 1 or on_disk(extent, 0) == first[extent]  # what it was made from is still there
    for drive, summary in zip(made.store.drives, made.store.summary(), strict=True):
        slots = [slot for extent in extents for slot in extent.slots]
        moved = sum(part.nbytes * (3 - len(extent.slots)) for extent in extents for slot in extent.slots for part in slot
                    if part.drive is drive)  # fmt: skip
        assert summary["write_bytes"] == moved
        assert summary["read_bytes"] == sum(
            part.nbytes for extent in extents for part in extent.slots[-1] if part.drive is drive
        )
        assert summary["held_bytes"] == sum(part.nbytes for slot in slots for part in slot if part.drive is drive)
    assert made.store.write_bytes == 2 * sum(extent.nbytes for extent in extents)


def test_drives_of_unknown_speed_share_equally(run, nvme):
    made = run(folders_in(nvme, 3), (1e9, 0.0, 3e9))
    (extent,) = made.open((6 * MIB, 1))
    assert set(sizes(extent).values()) == {2 * MIB}


def test_transfers_in_flight_on_all_drives_keep_their_order(run, nvme):
    made = run(folders_in(nvme, 3), (1e9, 2e9, 0.5e9))
    extents = made.open(*[(nbytes, slots) for nbytes in (3 * MIB, 20_000, 4 * MIB + PAGE) for slots in (1, 2)])
    draw, expected, pending = random.Random(3), {}, []
    for _ in range(150):
        extent = draw.choice(extents)
        if extent.written and draw.random() < 0.5:
            lease = made.arena.lease(extent.nbytes, "staging")
            pending.append((extent.read(lease.address, lease), lease, expected[extent]))
        else:
            expected[extent] = draw.randbytes(extent.nbytes)
            pending.append((*made.write(extent, expected[extent]), None))
        while len(pending) > 4:
            ticket, lease, content = pending.pop(0)
            ticket.wait()
            assert content is None or lease.data.numpy().tobytes() == content
            lease.release()
    for ticket, lease, _ in pending:
        ticket.wait()
        lease.release()
    for extent, content in expected.items():
        assert made.read(extent) == content


class TestRoom:
    def test_a_small_drive_takes_what_it_can_and_the_others_the_rest(self, run, tmp_path):
        with mounts.drives(tmp_path, small=8 * MIB, large=48 * MIB, middle=24 * MIB) as places:
            made = run(places, (4e9, 1e9, 1e9))
            room = dict(
                zip(("small", "large", "middle"), rooms_of(list(map(str, places)), reuse=False).room_bytes, strict=True)
            )
            extents = made.open(*[(6 * MIB, 2)] * 3, *[(40_000, 2)] * 10)
            held = dict(zip(("small", "large", "middle"), made.held(), strict=True))
            assert sum(held.values()) == 36 * MIB + 20 * 40_960
            assert room["small"] - 100_000 < held["small"] <= room["small"]  # its speed would give it two thirds
            assert abs(held["large"] - held["middle"]) < 100_000  # equally fast, and neither is full
            assert all(len(sizes(extent)) == 3 for extent in extents[:3])  # and it is at work in every large one
            assert_no_overlap(extents)
            contents = random_bytes(extents, 4)
            made.write_all(contents)
            made.write_all(contents)
            assert all(made.read(extent) == content for extent, content in contents.items())
            made.close()

    def test_a_drive_without_any_room_holds_nothing(self, run, tmp_path):
        with mounts.drives(tmp_path, full=8 * MIB, free=16 * MIB) as (full, free):
            blocker = mounts.fill(full, leave_bytes=8192)
            made = run([full, free], (1e9, 1e9))
            (extent,) = made.open((4 * MIB, 2))
            assert made.held()[0] <= 8192 and sum(made.held()) == 8 * MIB
            made.write_all({extent: bytes(range(256)) * (4 * MIB // 256)})
            assert made.read(extent)[:256] == bytes(range(256))
            blocker.unlink()  # room that comes later is used by what comes later
            added = made.store.add(2 * MIB, "optimizer", 2)
            assert sizes(added) == {"full": MIB, "free": MIB}
            made.close()

    def test_without_room_on_all_together_it_is_refused_with_numbers_and_nothing_is_left(self, tmp_path):
        with mounts.drives(tmp_path, one=8 * MIB, two=16 * MIB) as places:
            made = Run(places)
            rooms = rooms_of([str(each) for each in places], reuse=False)
            with pytest.raises(BudgetError) as refusal:
                made.open((rooms.total_bytes // PAGE * PAGE + PAGE, 1))
            assert refusal.value.tier == "nvme" and 0 < refusal.value.shortfall_bytes <= PAGE
            for place in places:
                assert f"in {place}" in str(refusal.value) and list(place.iterdir()) == []
            made.close()
            made = Run(places)
            made.open((rooms.total_bytes // PAGE * PAGE - PAGE, 1))  # but for the pages that do not divide
            made.close()

    def test_two_folders_of_one_file_system_share_its_room(self, run, tmp_path):
        with mounts.drives(tmp_path, both=24 * MIB, other=24 * MIB) as (both, other):
            one, two = folders_in(both, 2)
            rooms = rooms_of([str(one), str(two), str(other)], reuse=False)
            alone = rooms_of([str(both)], reuse=False).total_bytes
            assert rooms.total_bytes == pytest.approx(2 * alone, rel=0.01) and rooms.shared == [[str(one), str(two)]]
            made = run([one, two, other], (1e9, 1e9, 0.1e9))
            made.open((15 * MIB, 2))
            assert sum(made.held()[:2]) <= alone and made.held()[0] == pytest.approx(made.held()[1], abs=2 * PAGE)
            made.close()

    def test_what_a_killed_run_left_is_cleared_and_counts_as_free(self, run, tmp_path):
        with mounts.drives(tmp_path, left=16 * MIB) as (left,):
            script = (
                "import os, signal, sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_drives\n"
                "made = test_drives.Run([pathlib.Path(sys.argv[2])]); made.open((10 << 20, 1))\n"
                "os.kill(os.getpid(), signal.SIGKILL)"
            )
            killed = subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__), str(left)])
            assert killed.returncode == -signal.SIGKILL
            assert (left / "fuyou-store" / "data").stat().st_size == 10 * MIB
            assert rooms_of([str(left)], reuse=False).total_bytes < 6 * MIB
            assert rooms_of([str(left)], reuse=True).total_bytes > 13.5 * MIB
            made = run([left])
            made.open((13 * MIB, 1))
            made.close()
            assert list(left.iterdir()) == []


class TestGrowth:
    def test_a_drive_that_refuses_gives_back_what_the_others_gave(self, run, nvme):
        """RLIMIT_FSIZE stands for a quota: the file system's free space does not show it."""
        made = run(folders_in(nvme, 3), (1e9, 3e9, 1e9))
        extents = made.open((10 * MIB, 2))
        contents = random_bytes(extents, 5)
        made.write_all(contents)
        before, booked = made.held(), made.book.held("nvme")
        with file_size_limit(before[1] + MIB), pytest.raises(StoreError, match="drive-1 has no room"):
            made.store.add(5 * MIB, "optimizer", 1)
        assert made.held() == before and made.book.held("nvme") == booked
        assert [os.stat(drive.path).st_size for drive in made.store.drives] == before
        added = made.store.add(5 * MIB, "optimizer", 1)
        made.store.add_slot(added)
        made.store.add_slot(added)  # it has two: nothing happens
        assert len(added.slots) == 2 and sizes(added) == {"drive-0": MIB, "drive-1": 3 * MIB, "drive-2": MIB}
        assert_no_overlap([*extents, added])
        contents |= random_bytes([added], 6)
        made.write_all(contents)
        assert all(made.read(extent) == content for extent, content in contents.items())

    def test_it_goes_to_the_drives_that_have_room(self, run, tmp_path):
        with mounts.drives(tmp_path, small=8 * MIB, large=32 * MIB) as (small, large):
            made = run([small, large], (1e9, 1e9))
            made.open((6 * MIB, 2))
            mounts.fill(small, leave_bytes=MIB)
            added = made.store.add(8 * MIB, "optimizer", 1)
            assert 0.8 * MIB < sizes(added)["small"] < MIB
            with pytest.raises(BudgetError, match="no room"):
                made.store.add(64 * MIB, "optimizer", 1)
            made.close()

    def test_small_extents_go_on_where_they_were(self, run, nvme):
        made = run(folders_in(nvme, 2), (3e9, 1e9))
        made.open()
        for _ in range(40):
            made.store.add(64 * 1024, "optimizer", 1)
        assert made.held() == [30 * 65536, 10 * 65536]


class TestFaults:
    def test_a_drive_that_does_not_answer_holds_up_its_own_parts_only(self, run, tmp_path):
        with mounts.drives(tmp_path, quick=48 * MIB, stuck=48 * MIB) as places:
            for kind in ("io_uring", "threads", "aiofiles"):
                made = run(places, (1e9, 1e9), kind)
                extents = made.open(*[(2 * MIB, 2)] * 10)
                small = [made.store.add(64 * 1024, "optimizer", 1) for _ in range(2)]
                assert [list(sizes(extent)) for extent in small] == [["quick"], ["stuck"]]
                contents = random_bytes([*extents, *small], 7)
                quick, stuck = made.store.drives
                with mounts.frozen(places[1]):
                    writes = [made.write(extent, contents[extent]) for extent in [*extents, small[1]]]
                    wait_until(lambda quick=quick: not quick.engine.in_flight())  # every part of its own is done
                    assert len(stuck.engine.in_flight()) == 11 == len(made.store.in_flight())
                    assert not any(ticket.done() for ticket, _ in writes)
                    made.write_all({small[0]: contents[small[0]]})  # and it goes on meanwhile, more than once
                    assert made.read(small[0]) == contents[small[0]]
                    with pytest.raises(DeadlineError, match="stuck/fuyou-store/data"):
                        writes[0][0].wait(0.05)
                for ticket, lease in writes:
                    ticket.wait()
                    lease.release()
                assert all(made.read(extent) == content for extent, content in contents.items())
                made.close()

    def test_closing_gives_the_others_back_and_the_stuck_one_at_the_next_call(self, tmp_path):
        with mounts.drives(tmp_path, stuck=16 * MIB, quick=16 * MIB) as (stuck, quick):
            made = Run([stuck, quick], deadline_s=0.2)
            (extent,) = made.open((4 * MIB, 1))
            with mounts.frozen(stuck):
                ticket, lease = made.write(extent, bytes(4 * MIB))
                with pytest.raises(DeadlineError, match=f"close {stuck}"):
                    made.store.close()
                assert list(quick.iterdir()) == [] and open_files(quick) == []
            ticket.wait()
            lease.release()
            made.close()
            assert list(stuck.iterdir()) == [] and open_files(stuck) == []

    def test_a_drive_that_is_gone_is_named_when_no_other_uses_the_memory_any_more(self, tmp_path):
        with mounts.drives(tmp_path, gone=16 * MIB, stuck=16 * MIB) as (gone, stuck):
            made = Run([gone, stuck], (1e9, 1e9))
            (extent,) = made.open((4 * MIB, 2))
            made.write_all(random_bytes([extent], 8))
            mounts.shut_down(gone)
            with pytest.raises(StorageIOError, match=f"{gone}/fuyou-store/data"):
                made.read(extent)
            with mounts.frozen(stuck):
                ticket, lease = made.write(extent, bytes(4 * MIB))
                told: list[BaseException] = []

                def wait() -> None:
                    try:
                        ticket.wait()
                    except StorageIOError as error:
                        told.append(error)

                waiting = threading.Thread(target=wait)
                waiting.start()
                wait_until(lambda: not made.store.drives[0].engine.in_flight())  # that part has failed
                waiting.join(0.2)
                assert waiting.is_alive() and not ticket.done()  # the other still reads from the memory
            waiting.join(60)
            assert ticket.done() and f"{gone}/fuyou-store/data" in str(told[0])
            with pytest.raises(StorageIOError, match=f"{gone}/fuyou-store/data"):
                extent.read(lease.address, lease).wait()  # a reader is told of the writer's error
            lease.release()
            with pytest.raises(StoreError, match=f"{gone}/fuyou-store could not be removed"):
                made.close()
            made.close()
            assert list(stuck.iterdir()) == [] and open_files(tmp_path) == []

    def test_what_cannot_be_removed_is_told_at_close_and_its_lock_is_free(self, run, tmp_path):
        with mounts.drives(tmp_path, one=16 * MIB, two=16 * MIB) as (one, two):
            made = Run([one, two])
            made.open((4 * MIB, 2))
            mounts.shut_down(one)  # every change is refused from here on
            with pytest.raises(StoreError, match=f"{one}/fuyou-store could not be removed"):
                made.close()
            made.arena.close()
            assert list(two.iterdir()) == [] and open_files(one) == []
            subprocess.run(["umount", str(one)], check=True)  # nothing holds it
            subprocess.run(["mount", "-o", "loop", f"{one}.image", str(one)], check=True)
            assert (one / "fuyou-store" / "data").exists()
            made = run([one, two])  # the lock is nobody's, and what was left is cleared
            made.open((4 * MIB, 2))
            made.close()
            assert list(one.iterdir()) == []

    def test_a_file_that_lost_its_end_fails_the_parts_in_it(self, run, nvme):
        made = run(folders_in(nvme, 2), (1e9, 1e9))
        first, last = made.open((4 * MIB, 1), (4 * MIB, 1))
        contents = random_bytes([first, last], 9)
        made.write_all(contents)
        os.truncate(nvme / "drive-1" / "fuyou-store" / "data", 3 * MIB)
        assert made.read(first) == contents[first]
        with pytest.raises(StorageIOError, match="drive-1/fuyou-store/data"):
            made.read(last)

    def test_a_reader_is_told_of_the_writers_error_though_its_own_bytes_can_be_read(self, run, nvme):
        made = run(folders_in(nvme, 2), (1e9, 1e9))
        (extent,) = made.open((4 * MIB, 2))
        made.write_all(random_bytes([extent], 11))
        with file_size_limit(3 * MIB):  # in the second slot on both drives
            ticket, lease = made.write(extent, bytes(4 * MIB))
            with pytest.raises(StorageIOError, match=r"drive-0/fuyou-store/data.*File too large"):
                ticket.wait()
        with pytest.raises(StorageIOError, match="write .*drive-0/fuyou-store/data"):
            extent.read(lease.address, lease).wait()
        lease.release()

    def test_nothing_is_under_way_after_a_transfer_that_could_not_start(self, run, nvme):
        made = run(folders_in(nvme, 2), (1e9, 1e9))
        (extent,) = made.open((4 * MIB, 2))
        contents = random_bytes([extent], 10)
        made.write_all(contents)
        closed = made.store.drives[1]
        closed.engine.close_file(closed.file)
        with pytest.raises(StateError, match="drive-1/fuyou-store/data: the file is closed"):
            made.write(extent, bytes(4 * MIB))
        assert made.store.in_flight() == []
        assert on_disk(extent, 0) == contents[extent]  # and the bytes that were current are untouched


class TestClaims:
    def test_a_folder_in_use_is_named_and_no_other_is_kept(self, nvme, monkeypatch):
        monkeypatch.setattr("fuyou.tiers.lock.RETRY_S", 0.2)
        free, taken = folders_in(nvme, 2)
        script = (
            "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, test_drives\n"
            "made = test_drives.Run([pathlib.Path(sys.argv[2])]); print('claimed', flush=True); sys.stdin.read()"
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", script, os.path.dirname(__file__), str(taken)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert holder.stdout.readline() == "claimed\n"
        book = Ledger({"device": 0, "host": 0, "nvme": 1 << 30})
        store, opened = Store(check_folders([str(free), str(taken)]), book), []
        with pytest.raises(StoreError, match=f"{taken}/fuyou-store is in use by process {holder.pid}"):
            store.start(lambda folder: opened.append(folder))
        store.close()
        assert opened == []  # no engine, and nothing measured: the other run is not disturbed
        assert list(free.iterdir()) == [] and open_files(nvme) == [] and (taken / "fuyou-store" / "data").exists()
        holder.communicate("")
        assert holder.returncode == 0

    def test_one_drive_under_two_names_is_refused(self, tmp_path):
        with mounts.drives(tmp_path, one=8 * MIB) as (one,):
            again = tmp_path / "again"
            again.mkdir()
            link = tmp_path / "link"
            link.symlink_to(one)
            subprocess.run(["mount", "--bind", str(one), str(again)], check=True)
            try:
                for other in (one, link, again):
                    with pytest.raises(StoreError, match="given twice"):
                        check_folders([str(one), str(other)])
            finally:
                subprocess.run(["umount", str(again)], check=True)

    def test_a_drive_that_takes_no_file_is_named(self, nvme):
        free, odd = folders_in(nvme, 2)
        (odd / "fuyou-store").symlink_to(free)
        store = Store([str(free), str(odd)], Ledger({"device": 0, "host": 0, "nvme": 1 << 30}))
        with pytest.raises(StoreError, match=f"{odd}/fuyou-store is not a folder"):
            store.start(lambda folder: (open_engine(), 0.0))
        store.close()
        assert list(free.iterdir()) == [] and [each.name for each in odd.iterdir()] == ["fuyou-store"]

    @pytest.mark.parametrize("kind", ["io_uring", "threads"])
    def test_too_few_descriptors_are_told_and_leave_nothing(self, nvme, kind):
        folders = folders_in(nvme, 2)
        Run(folders, kind=kind).close()  # what is imported at first use is imported
        with contextlib.ExitStack() as after:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            used = os.open("/dev/null", os.O_RDONLY)
            after.callback(os.close, used)
            while used < max(map(int, os.listdir("/proc/self/fd"))) - 1:  # the limit is on the number of a descriptor
                used = os.open("/dev/null", os.O_RDONLY)
                after.callback(os.close, used)
            told = 0
            for more in range(1, 60):
                book = Ledger({"device": 0, "host": 0, "nvme": 1 << 30})
                store = Store([str(each) for each in folders], book)
                store.place(4 * MIB, "optimizer", 2)
                resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
                try:
                    store.start(lambda folder: (open_engine(kind), 0.0))
                    store.open()
                    enough = True
                except FuyouError as error:
                    enough = False
                    assert "open files" in str(error)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                    store.close()
                assert [list(each.iterdir()) for each in folders] == [[], []] and open_files(nvme) == []
                assert book.held("nvme") == 0
                if enough:
                    break
                told += 1
            assert enough and told > 3  # every place where one can be missing was tried
