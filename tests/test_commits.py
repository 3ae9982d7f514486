"""Commits of the store: whatever is written, guessed and dropped, the newest record's bytes are those of its step."""

from __future__ import annotations

import functools
import os
import random
import threading

import commit_tools
import pytest
from commit_tools import PAGE, Gate, contents, fill, home, newest
from commit_tools import gate as gate
from commit_tools import job as job
from drive_tools import MIB, file_size_limit, folders_in, on_disk

from fuyou.core.errors import BudgetError, StateError, StoreError
from fuyou.tiers.records import overhead_bytes, read_newest

RECORD_FILES = {f"commit-{place}-{copy}" for place in (0, 1) for copy in "ab"} | {"layout-a", "layout-b"}


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 60))])
def test_random_programs_never_touch_what_the_newest_record_names(nvme, monkeypatch, job, seed):
    """Real engines and files; commits stay in flight for a while, several at a time.

    In half of the programs a commit that was let through is waited for, so that what must be refused is known.
    """
    monkeypatch.setattr(commit_tools, "CHECKSUM", {b"crc32c": functools.lru_cache(4096)(commit_tools.crc32c)})
    gate, draw = Gate(monkeypatch), random.Random(seed)
    made = job(*folders_in(nvme, 1 + seed % 2), kind=("io_uring", "threads", "aiofiles")[seed % 3])
    extents = made.open(*[(draw.choice((4096, 8192, 12288)), 2) for _ in range(5)], (4096, 1))
    frozen = extents.pop()
    current, guesses, committed, commits = {frozen: draw.randbytes(4096)}, {}, {}, []
    made.start(frozen, current[frozen])
    blocked = ahead = through = 0
    steady = seed % 4 < 2

    def let_through(count: int) -> None:
        nonlocal through
        gate.open(count)
        through += count
        if steady:
            for commit in commits[:through]:
                commit.wait()

    for _ in range(250):
        extent, action = draw.choice(extents), draw.random()
        if action < 0.35:
            after = extent.free_after()
            if not after.done():
                blocked += 1
                assert after in commits
                if steady:
                    with pytest.raises(StateError, match="free_after"):
                        made.start(extent, fill(0, extent))
                    guesses.pop(extent, None)  # dropped all the same
                let_through(len(commits) - through)
                after.wait()
            current[extent] = draw.randbytes(extent.nbytes)
            made.start(extent, current[extent])
            guesses.pop(extent, None)
        elif action < 0.55 and extent not in guesses:
            guess = draw.randbytes(extent.nbytes)
            if extent.can_write_ahead:
                ahead += 1
                made.start(extent, guess, ahead=True)
                guesses[extent] = guess
            elif steady:
                with pytest.raises(StateError, match="no slot to go to"):
                    made.start(extent, guess, ahead=True)
        elif action < 0.7 and extent in guesses:
            if draw.random() < 0.5:
                current[extent] = guesses[extent]
                extent.accept()
            else:
                extent.drop()
            del guesses[extent]
        elif action < 0.8:
            step = len(committed) + 1
            committed[step] = {each.index: content for each, content in current.items()}
            commits.append(made.store.commit(step, {"step": step}))
        elif action < 0.9 and through < len(commits):
            let_through(1)
        elif extent in current:
            assert made.read(extent) == current[extent]
        durable = made.store.committed_step
        if (record := newest(made.folders[0])) is not None:
            assert contents(made.folders, record) == committed[record.step]
            assert record.payload == {"step": record.step} and record.step >= durable
    gate.open(1000)
    for commit in commits:
        commit.wait()
    assert made.store.committed_step == len(committed) == newest(made.folders[0]).step
    assert contents(made.folders, newest(made.folders[0])) == committed[len(committed)]
    assert read_newest([str(each) for each in made.folders]).step == len(committed)
    for extent, content in current.items():
        assert made.read(extent) == content
    assert blocked and ahead
    made.store.close()
    assert contents(made.folders, newest(made.folders[0])) == committed[len(committed)]  # it stays


class TestSlots:
    def test_a_second_write_within_a_step_is_in_place_and_a_named_slot_waits(self, nvme, gate, job):
        made = job(nvme)
        (extent,) = made.open((PAGE, 2))
        made.write(extent, fill(1, extent))
        made.write(extent, fill(2, extent))  # nothing is named yet: they alternate
        assert (on_disk(extent, 0), on_disk(extent, 1)) == (fill(1, extent), fill(2, extent))
        first = made.store.commit(1, {})  # names slot 1
        made.write(extent, fill(3, extent))  # to slot 0
        made.write(extent, fill(4, extent))  # and again, in place
        assert (on_disk(extent, 0), on_disk(extent, 1)) == (fill(4, extent), fill(2, extent))
        assert not first.done() and made.store.committed_step == 0
        gate.open()
        first.wait()
        assert made.store.committed_step == 1
        made.write(extent, fill(5, extent))  # record 1 names slot 1 still
        assert (on_disk(extent, 0), on_disk(extent, 1)) == (fill(5, extent), fill(2, extent))
        second = made.store.commit(2, {})  # names slot 0, record 1 slot 1
        assert extent.free_after() is second and not extent.can_write_ahead
        with pytest.raises(StateError, match=r"commit of step 2 is under way.*free_after\(\)"):
            made.start(extent, fill(6, extent))
        third = made.store.commit(3, {})  # names slot 0 too
        assert extent.free_after() is second  # which is enough
        gate.open()
        second.wait()
        assert extent.free_after().done() and extent.can_write_ahead
        made.write(extent, fill(6, extent))
        assert (on_disk(extent, 0), on_disk(extent, 1)) == (fill(5, extent), fill(6, extent))
        gate.open()
        third.wait()

    def test_a_guess_is_not_current_until_it_is_accepted(self, nvme, job):
        made = job(nvme)
        extent, single = made.open((PAGE, 2), (PAGE, 1))
        with pytest.raises(StateError, match="no slot to go to: it was never written"):
            made.start(extent, fill(1, extent), ahead=True)
        assert not extent.can_write_ahead
        made.write(extent, fill(1, extent))
        made.write(single, fill(1, single))
        with pytest.raises(StateError, match="it has only one"):
            made.start(single, fill(2, single), ahead=True)
        for use in (extent.accept, extent.drop):
            with pytest.raises(StateError, match="there is none"):
                use()
        made.start(extent, fill(2, extent), ahead=True).wait()
        with pytest.raises(StateError, match="neither accepted nor dropped"):
            made.start(extent, fill(3, extent), ahead=True)
        assert made.read(extent) == fill(1, extent)
        extent.drop()
        made.start(extent, fill(3, extent), ahead=True).wait()
        made.store.commit(1, {}).wait()
        assert contents([nvme], newest(nvme)) == {0: fill(1, extent), 1: fill(1, single)}  # not of the guess
        extent.accept()
        assert made.read(extent) == fill(3, extent)
        assert not extent.can_write_ahead  # the other slot is record 1's
        made.store.commit(2, {}).wait()
        assert contents([nvme], newest(nvme))[0] == fill(3, extent)
        made.start(extent, fill(4, extent), ahead=True).wait()
        made.write(extent, fill(5, extent))  # drops the guess
        with pytest.raises(StateError, match="there is none"):
            extent.accept()
        assert made.read(extent) == fill(5, extent)

    def test_one_slot_that_a_record_names_needs_a_second(self, nvme, gate, job):
        made = job(nvme)
        (extent,) = made.open((PAGE, 1))
        made.write(extent, fill(1, extent))
        made.write(extent, fill(2, extent))  # nothing names it yet
        gate.open()
        made.store.commit(1, {}).wait()
        for use in (extent.free_after, lambda: made.start(extent, fill(3, extent))):
            with pytest.raises(StateError, match="add_slot"):
                use()
        made.store.add_slot(extent)
        made.write(extent, fill(3, extent))
        gate.open()
        made.store.commit(2, {}).wait()
        assert contents([nvme], newest(nvme), "b") == {0: fill(3, extent)}

    def test_without_commits_slots_alternate_and_one_is_written_in_place(self, nvme, job):
        made = job(nvme, durable=False)
        double, single = made.open((PAGE, 2), (PAGE, 1))
        for value in (1, 2):
            made.write(double, fill(value, double))
            made.write(single, fill(value, single))
        made.start(double, fill(3, double), ahead=True).wait()
        assert (on_disk(double, 0), on_disk(double, 1)) == (fill(3, double), fill(2, double))
        assert made.read(double) == fill(2, double) and on_disk(single, 0) == fill(2, single)
        assert double.can_write_ahead and not single.can_write_ahead and double.free_after().done()
        double.accept()
        assert made.read(double) == fill(3, double)
        with pytest.raises(StateError, match="durability is not 'step'"):
            made.store.commit(1, {})
        assert made.store.committed_step == 0

    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_store_without_commits_is_marked_before_the_first_write_over_a_step(self, nvme, job, ahead):
        made = job(nvme, durable=False)
        extent, other = made.store.place(PAGE, "optimizer", 2, committed=True), made.store.place(PAGE, "gradients", 1)
        made.store.open()
        for value in (1, 2):
            made.write(other, fill(value, other))  # gradients are of no step
        made.write(extent, fill(1, extent))
        assert sorted(os.listdir(home(nvme))) == ["data", "lock"]
        made.start(extent, fill(2, extent), ahead=ahead).wait()
        assert sorted(os.listdir(home(nvme))) == ["data", "dirty", "lock"]
        made.store.close()
        assert os.listdir(nvme) == []


class TestStore:
    def test_what_is_not_of_a_step_stands_in_no_record(self, nvme, job):
        made = job(nvme)
        extents = [made.store.place(PAGE, "optimizer", 2, committed=index != 1) for index in range(4)]
        made.store.open()
        for extent in extents[:3]:
            made.write(extent, fill(1, extent))
        made.store.commit(1, {"text": "\u00fc", "lr": [0.1, None, True]}).wait()
        record = newest(nvme)
        assert record.payload == {"text": "\u00fc", "lr": [0.1, None, True]}
        assert contents([nvme], record) == {
            extents[0].index: fill(1, extents[0]),
            extents[2].index: fill(1, extents[2]),
        }
        for value in (2, 3):  # nor does a record hold it up
            made.write(extents[1], fill(value, extents[1]))
        assert extents[1].can_write_ahead

    def test_extents_that_come_later_stand_in_the_next_record(self, nvme, job):
        made = job(*folders_in(nvme, 2))
        made.open((64 * PAGE, 2))
        made.store.commit(1, {}).wait()
        assert contents(made.folders, newest(made.folders[0])) == {}
        later = [made.store.add(MIB, "optimizer", 1 + index % 2, committed=True) for index in range(3)]
        other = made.store.add(MIB, "gradients", 1)
        for value, extent in enumerate([*later, other]):
            made.write(extent, fill(value, extent))
        made.store.add_slot(later[0])
        made.store.commit(2, {}).wait()
        record = read_newest([str(each) for each in made.folders])
        assert (record.step, len(record.entries), len(record.parts(0))) == (2, 3, 1 + (MIB >= 2 * MIB))
        step = newest(made.folders[0])
        assert list(step.entries) == [1, 2, 3]
        assert all(step.entries[extent.index][:2] == (0, MIB) for extent in later)
        made.write(later[0], fill(9, later[0]))
        made.store.commit(3, {}).wait()
        assert newest(made.folders[0]).entries[1][0] == 1  # the slot that was added

    def test_every_byte_of_the_records_is_booked_and_preallocated(self, nvme, job):
        made = job(nvme)
        extents = made.open((PAGE, 2), (PAGE, 1))
        sizes = {name: (home(nvme) / name).stat() for name in RECORD_FILES}
        nbytes = sum(status.st_size for status in sizes.values())
        assert nbytes == overhead_bytes(2, 3) == made.book.held("nvme", "staging")
        assert all(status.st_blocks * 512 >= status.st_size for status in sizes.values())
        for extent in extents:
            made.write(extent, fill(1, extent))
        made.store.commit(1, {"x": "y" * 1_000_000}).wait()
        assert {name: (home(nvme) / name).stat().st_size for name in RECORD_FILES} == {
            name: status.st_size for name, status in sizes.items()
        }
        for _ in range(400):  # over the edge of a page
            made.store.add(PAGE, "optimizer", 2, committed=True)
        nbytes = sum((home(nvme) / name).stat().st_size for name in RECORD_FILES)
        assert nbytes == overhead_bytes(402, 803) == made.book.held("nvme", "staging")
        assert made.book.held("nvme") == nbytes + (home(nvme) / "data").stat().st_size

    def test_room_is_kept_for_a_part_on_every_drive(self, nvme, job):
        made = job(*folders_in(nvme, 2))
        made.open(*[(PAGE, 2)] * 100)
        assert made.book.held("nvme", "staging") == overhead_bytes(100, 2 * 2 * 100) > overhead_bytes(100, 2 * 100)

    def test_without_room_for_records_nothing_begins(self, nvme, job):
        made = job(nvme, nvme=2 * PAGE + overhead_bytes(1, 2) - 1)
        with pytest.raises(BudgetError, match="records of its commits"):
            made.open((PAGE, 2))
        assert os.listdir(nvme) == []
        made = job(nvme, nvme=2 * PAGE + overhead_bytes(1, 2))
        (extent,) = made.open((PAGE, 2))
        before = {name: (home(nvme) / name).stat().st_size for name in (*RECORD_FILES, "data")}
        with pytest.raises(BudgetError):
            made.store.add(PAGE, "optimizer", 2, committed=True)
        assert before == {name: (home(nvme) / name).stat().st_size for name in before}
        made.write(extent, fill(1, extent))
        made.store.commit(1, {}).wait()
        made.store.close()
        with file_size_limit(MIB):  # stands for a quota
            made = job(nvme)
            with pytest.raises(StoreError, match="no room"):
                made.open((PAGE, 2))
        assert os.listdir(nvme) == []  # what was there had been given up by then

    def test_growth_that_fails_takes_its_records_room_back(self, nvme, job):
        made = job(nvme)
        (extent,) = made.open((2 * MIB, 2))
        made.write(extent, fill(1, extent))
        held, files = made.book.held("nvme"), {name: (home(nvme) / name).stat().st_size for name in RECORD_FILES}
        with file_size_limit(5 * MIB):
            for _ in range(300):  # so many that the records would grow by a page
                with pytest.raises(StoreError, match="no room"):
                    made.store.add(2 * MIB, "optimizer", 1, committed=True)
        assert made.book.held("nvme") == held
        assert files == {name: (home(nvme) / name).stat().st_size for name in RECORD_FILES}
        made.store.commit(1, {}).wait()
        assert contents([nvme], newest(nvme))[0] == fill(1, extent)

    def test_steps_go_up_and_a_closed_store_takes_none(self, nvme, job):
        made = job(nvme)
        with pytest.raises(StateError, match="not open"):
            made.store.commit(1, {})
        made.open((PAGE, 2))
        made.store.commit(0, {}).wait()
        made.store.commit(3, {}).wait()
        made.store.commit(3, {"again": 1}).wait()
        assert newest(nvme).payload == {"again": 1} and made.store.committed_step == 3
        for step in (2, -1, 1 << 63):
            with pytest.raises(StateError, match="steps go up"):
                made.store.commit(step, {})
        made.store.close()
        with pytest.raises(StateError, match="closed"):
            made.store.commit(4, {})
        assert not any(thread.name == "fuyou-commits" for thread in threading.enumerate())

    def test_a_forked_child_is_refused_even_while_the_books_are_in_use(self, nvme, job):
        made = job(nvme)
        (extent,) = made.open((PAGE, 2))
        made.write(extent, fill(1, extent))
        with made.store.lock:
            holder = threading.Thread(target=lambda: made.read(extent))
            holder.start()
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    made.read(extent)
                except StateError as error:
                    code = 0 if "forked child" in str(error) else 2
                finally:
                    os._exit(code)
        holder.join()
        assert os.waitpid(child, 0)[1] == 0

    def test_threads_that_write_guess_read_and_commit_at_once(self, nvme, job):
        made = job(*folders_in(nvme, 2))
        extents = made.open(*[(2 * PAGE, 2)] * 4)
        for extent in extents:
            made.write(extent, fill(0, extent))
        stop, problems = threading.Event(), []

        def loop(work) -> None:
            draw = random.Random(work.__name__)
            try:
                while not stop.is_set():
                    work(draw)
            except BaseException as error:
                problems.append(error)

        def update(draw):  # the only one that writes, as a run has it
            extent = draw.choice(extents)
            if draw.random() < 0.5 and extent.can_write_ahead:
                made.start(extent, fill(draw.randrange(256), extent), ahead=True)
                extent.accept() if draw.random() < 0.5 else extent.drop()
            else:
                try:
                    made.write(extent, fill(draw.randrange(256), extent))
                except StateError as error:  # a commit came between free_after() and write()
                    assert "under way" in str(error)

        def read(draw):
            extent = draw.choice(extents)
            content = made.read(extent)
            assert content == content[:1] * extent.nbytes  # of one write, whole

        threads = [threading.Thread(target=loop, args=(work,)) for work in (update, read)]
        for thread in threads:
            thread.start()
        for step in range(1, 40):
            made.store.commit(step, {}).wait()
            assert all(
                content == content[:1] * len(content)
                for content in contents(made.folders, newest(made.folders[0])).values()
            )
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []
