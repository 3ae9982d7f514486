"""Commits when something goes wrong: kills, damaged copies, drives that fail or hang. The older step is always whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from commit_tools import PAGE, contents, fill, home, newest, parse
from commit_tools import job as job
from drive_tools import MIB, folders_in
from fault_tools import FIRST, run_script
from test_faults_results import inside
from test_faults_results import preload as preload

from fuyou.core.errors import DeadlineError, StateError, StoreError
from fuyou.tiers.commits import RecordFiles
from fuyou.tiers.drives import Drive
from fuyou.tiers.records import read_newest


def test_a_kill_at_any_moment_leaves_the_newest_complete_step(nvme: Path) -> None:
    """The killed process is a fork, so that one start serves many kills; what it has left is read by the test's own reader."""
    folders = folders_in(nvme, 2)
    run_script(
        """
        import itertools, os, random, select, shutil, signal, sys, time
        from pathlib import Path
        from commit_tools import PAGE, Job, contents, newest
        folders = [Path(each) for each in sys.argv[1:]]
        def content(step, index, nbytes):
            return random.Random(step * 1000 + index).randbytes(nbytes)
        def work(pipe):
            made, draw = Job(*folders), random.Random(os.getpid())
            extents = made.open(*[((1 + index % 3) * PAGE, 2) for index in range(6)])
            for step in itertools.count(1):
                for extent in extents:
                    right = content(step, extent.index, extent.nbytes)
                    if draw.random() < 0.5 and extent.can_write_ahead:
                        made.start(extent, right if draw.random() < 0.5 else bytes(extent.nbytes), ahead=True)
                        extent.accept()
                    extent.free_after().wait()
                    made.start(extent, right)
                made.store.commit(step, {"step": step})
                os.write(pipe, made.store.committed_step.to_bytes(8, "little"))
        draw, steps = random.Random(7), []
        for turn in range(12):
            ours, theirs = os.pipe()
            child = os.fork()
            if child == 0:
                work(theirs)
            os.close(theirs)
            told = os.read(ours, 8)
            time.sleep(draw.random() * 0.2)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            while more := os.read(ours, 1 << 16):
                told = more[len(more) // 8 * 8 - 8:]
            os.close(ours)
            record = newest(folders[0])
            assert len(told) == 8
            step = int.from_bytes(told, "little")
            assert (record.step if record else 0) >= step, (record, step)
            if record is not None:
                assert record.payload == {"step": record.step}
                assert contents(folders, record) == {
                    index: content(record.step, index, (1 + index % 3) * PAGE) for index in range(6)
                }
                steps.append(record.step)
        assert len(set(steps)) > 3, steps
        made = Job(*folders)  # what was left is cleared
        assert sorted(os.listdir(folders[0] / "fuyou-store")) == ["data", "lock"]
        made.store.close()
        print("OK")
        """,
        *map(str, folders),
    )


def test_one_damaged_copy_is_passed_over_and_two_are_never_passed_over_for_an_older_step(nvme: Path, job) -> None:
    made = job(nvme)
    (extent,) = made.open((PAGE, 2))
    for step in (1, 2):
        made.write(extent, fill(step, extent))
        made.store.commit(step, {}).wait()
    for place, copy in ((0, "a"), (0, "b")):  # step 2 is in place 0
        path = home(nvme) / f"commit-{place}-{copy}"
        assert parse(path.read_bytes()).step == 2
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), b"\xff" * 30, 60)
        if copy == "a":
            record = read_newest([str(nvme)])
            assert record.step == 2 and str(path) in record.problems[-1]
            assert contents([nvme], newest(nvme)) == {0: fill(2, extent)}
    with pytest.raises(StoreError, match="both copies of a record are damaged.*remove .*commit-0-a and .*commit-0-b"):
        read_newest([str(nvme)])
    assert contents([nvme], newest(nvme)) == {0: fill(1, extent)}  # as whoever removes them has it
    for copy in "ab":
        (home(nvme) / f"commit-1-{copy}").write_bytes(b"garbage")
    with pytest.raises(StoreError, match="no complete step.*commit-0-a.*commit-0-b.*Begin from"):
        read_newest([str(nvme)])


def test_everything_that_a_record_names_is_on_the_drives_before_it(nvme: Path, job, monkeypatch) -> None:
    """A loss of power cannot be had here: the order of writes and flushes stands for it."""
    made = job(*folders_in(nvme, 2))
    extents = made.open(*[(8 << 20, 2)] * 2, (PAGE, 2))
    events: list[tuple[str, object]] = []
    tickets: dict[str, list] = {"write": [], "flush": []}

    def watch(owner: type, name: str, what: str) -> None:
        plain = getattr(owner, name)

        def watched(self, *arguments):
            kind = arguments[0] if what == "write" else what
            events.append((kind, SimpleNamespace(writes=[ticket.done() for ticket in tickets["write"]],
                                                 flushes=[ticket.done() for ticket in tickets["flush"]])))  # fmt: skip
            result = plain(self, *arguments)
            if kind in tickets:
                tickets[kind].append(result)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(Drive, "transfer", "write")
    watch(Drive, "flush", "flush")
    watch(RecordFiles, "_write", "record")
    watch(RecordFiles, "_flush", "record flush")
    for step in (1, 2):
        events.clear()
        tickets["write"], tickets["flush"] = [], []
        for extent in extents:
            made.start(extent, fill(step, extent))
        made.store.commit(step, {}).wait()
        kinds = [kind for kind, _ in events]
        flushes = ["flush", "flush"] + ["record flush"] * (step == 1)  # the layout, once
        # One copy after the other: a loss of power damages one at most.
        assert kinds == ["write"] * 5 + flushes + ["record", "record flush"] * 2
        for kind, seen in events:
            if kind == "flush":
                assert all(seen.writes) and len(seen.writes) == 5
            elif kind.startswith("record"):
                assert all(seen.flushes) and len(seen.flushes) == 2


def test_commits_wait_for_the_drive_and_close_says_what_it_waited_for(nvme: Path, job, monkeypatch) -> None:
    made = job(nvme)
    (extent,) = made.open((PAGE, 2))
    made.write(extent, fill(1, extent))
    made.store._commits._worker.deadline_s = 0.1
    hold, write = threading.Event(), RecordFiles.write

    def held(self, place, record):
        assert hold.wait(60)
        write(self, place, record)

    monkeypatch.setattr(RecordFiles, "write", held)
    commit = made.store.commit(1, {})
    for wait in (commit.wait, made.store.close):
        with pytest.raises(TimeoutError, match="0.1 s.*the commit of step 1"):
            wait()
    hold.set()
    commit.wait(60)
    made.store.close()
    assert contents([nvme], newest(nvme)) == {0: fill(1, extent)} and not (home(nvme) / "lock").exists()


def test_a_lock_that_is_not_let_go_of_is_told(nvme: Path, job):
    made = job(nvme)
    (extent,) = made.open((PAGE, 2))
    made.store.lock.deadline_s = 0.05
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with made.store.lock:
            taken.set()
            assert done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(60)
    with pytest.raises(DeadlineError, match="0.05 s for the store"):
        extent.free_after()
    done.set()
    holder.join()


def test_a_write_in_place_that_begins_on_some_drives_only_is_of_no_step(nvme: Path, job):
    made = job(*folders_in(nvme, 2))
    (extent,) = made.open((4 * MIB, 2))
    made.write(extent, fill(1, extent))
    made.store.commit(1, {}).wait()
    made.write(extent, fill(2, extent))
    last = made.store.drives[1]
    last.engine.close_file(last.file)
    with pytest.raises(StateError, match="file is closed"):
        made.start(extent, fill(3, extent))  # in place, for record 1 names the other slot
    with pytest.raises(StateError, match="could not be started as a whole"):
        made.store.commit(2, {}).wait()
    assert contents(made.folders, newest(made.folders[0])) == {0: fill(1, extent)}


SCRIPT = """
    from commit_tools import Job, contents, fill, newest
    def begin(name, count=2):
        place = folder / name
        place.mkdir()
        made = Job(place, kind=kind)
        extents = made.open(*[(PAGE, 2)] * count)
        for extent in extents:
            made.write(extent, fill(1, extent))
        made.store.commit(1, {}).wait()
        return made, extents
    def check(made, extents, *steps):
        record = newest(made.folders[0])
        assert record.step in steps, record
        assert contents(made.folders, record) == {each.index: fill(record.step, each) for each in extents}
    def fails(use, words):
        with pytest.raises(StorageIOError, match=words) as caught:
            use()
        assert caught.value.errno == errno.EIO and "Input/output error" in str(caught.value)
"""


@pytest.mark.parametrize("kind", FIRST)
def test_a_failed_write_or_flush_of_data_fails_the_commit(preload: str, kind: str, nvme: Path) -> None:
    inside(preload, kind, nvme, SCRIPT + """
    for which in (WRITE, FLUSH):
        made, extents = begin(f"data-{which}")
        inject(which, FAIL, errno.EIO)
        tickets = [made.start(each, fill(2, each)) for each in extents]
        commit = made.store.commit(2, {})
        words = "write 4096 bytes.*data" if which == WRITE else "flush of.*data"
        for _ in range(2):
            fails(commit.wait, words)
        assert injected(which) == 1 and made.store.committed_step == 1
        check(made, extents, 1)
        fails(made.store.commit(3, {}).wait, words)  # no later one can be trusted
        for value in (4, 5):  # but nothing was named: training may go on
            for each in extents:
                made.write(each, fill(value, each))
                assert made.read(each) == fill(value, each)
        fails(made.store.commit(6, {}).wait, words)
        check(made, extents, 1)
        assert made.store.committed_step == 1
        made.store.close()  # somebody was told
        made, extents = begin(f"untold-{which}")
        inject(which, FAIL, errno.EIO)
        for each in extents:
            made.start(each, fill(2, each))
        made.store.commit(2, {})
        made.store.commit(3, {})
        fails(made.store.close, words)
        check(made, extents, 1)  # what was complete stays
        assert made.book.held("nvme") == 0
        made.store.close()
    print("OK")
    """)  # fmt: skip


def test_a_failed_write_or_flush_of_a_record_fails_the_commit_and_keeps_both(preload: str, nvme: Path) -> None:
    inside(preload, "threads", nvme, SCRIPT + """
    for number, (which, path, steps) in enumerate((
        (WRITE, "commit-0-a", (1,)), (WRITE, "commit-0-b", (1, 2)), (FLUSH, "commit-0-a", (1, 2)),
        (FLUSH, "commit-0-b", (1, 2)),
    )):
        made, extents = begin(f"record-{number}")
        inject(which, FAIL, errno.EIO, path=path)
        for each in extents:
            made.write(each, fill(2, each))
        words = ("write [0-9]+ bytes at 0 of .*" if which == WRITE else "flush .*") + path
        commit = made.store.commit(2, {})
        fails(commit.wait, words)
        assert injected(which) == 1 and made.store.committed_step == 1
        check(made, extents, *steps)
        for each in extents:  # its record may be there: what it names is kept, and so is what record 1 names
            fails(each.free_after().wait, words)
            fails(lambda: made.start(each, fill(3, each)), words)
            assert not each.can_write_ahead
            assert made.read(each) == fill(2, each)
        check(made, extents, *steps)
        fails(made.store.commit(3, {}).wait, words)
        check(made, extents, *steps)
        made.store.close()
    made, extents = begin("layout")  # a short write goes on where it ended
    inject(WRITE, SHORT, 10, count=5, path="commit-0")
    for each in extents:
        made.write(each, fill(2, each))
    made.store.commit(2, {}).wait()
    assert injected(WRITE) == 5
    check(made, extents, 2)
    extents.append(made.store.add(PAGE, "optimizer", 2, committed=True))
    inject(FLUSH, FAIL, errno.EIO, path="layout-a")
    for each in extents:
        made.write(each, fill(3, each))
    fails(made.store.commit(3, {}).wait, "flush .*layout-a")
    check(made, extents[:2], 2)
    made.store.close()
    print("OK")
    """)  # fmt: skip
