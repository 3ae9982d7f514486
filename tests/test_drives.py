"""A store on several drives: where the bytes lie, who gets how much, and growth.

Drives are folders where that is enough, else file systems of their own on loop devices.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import mounts
import pytest
from drive_tools import (
    MIB,
    PAGE,
    Run,
    assert_no_overlap,
    file_size_limit,
    folders_in,
    on_disk,
    random_bytes,
    sizes,
)

from fuyou.core.errors import BudgetError, StoreError
from fuyou.tiers.folders import rooms_of


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
