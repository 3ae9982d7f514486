"""A store on several drives: what one that is stuck, broken or taken does to the rest."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading

import mounts
import pytest
from drive_tools import (
    MIB,
    Run,
    file_size_limit,
    folders_in,
    on_disk,
    open_files,
    random_bytes,
    sizes,
    wait_until,
)

from fuyou.core.errors import DeadlineError, FuyouError, StateError, StorageIOError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.tiers.folders import check_folders
from fuyou.tiers.io import open_engine
from fuyou.tiers.store import Store


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
