"""Drives that are full, cut short, read-only, broken, or silent: real ones, on file systems of the test's own.

After each: an error that names file, place and cause, or the bits of plain PyTorch; nothing hangs, nothing leaks.
"""

from __future__ import annotations

import errno
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import fault_tools
import pytest
from fault_tools import (
    KINDS,
    MIB,
    PAGE,
    Memory,
    Place,
    Training,
    assert_empty,
    mounted,
    nothing_leaks,
    open_or_skip,
    plain,
    random_pages,
    reads_stopped,
    same,
    without_frames,
)

import fuyou
from fuyou.core.errors import BudgetError, DeadlineError, StorageIOError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.tiers.io import open_engine
from fuyou.tiers.store import Store


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    open_or_skip(request.param).close()  # whatever is imported and created once
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with mounted(tmp_path, 48 * MIB) as made:
        yield made


def book() -> Ledger:
    return Ledger({"device": 0, "host": 64 * MIB, "nvme": 1 << 40})


def store_in(folder: Path, ledger: Ledger, kind: str = "auto", deadline_s: float = 60.0) -> Store:
    store = Store([str(folder)], ledger)
    store.start(lambda _: (open_engine(kind, deadline_s=deadline_s), 0.0))
    return store


def data(folder: Path) -> Path:
    return folder / "fuyou-store" / "data"


def idle(run: fuyou.Run) -> None:
    """Return when what was fetched has come, or was given up."""
    loader, until = run._movers.swapper._loader, time.monotonic() + 60
    while loader._asked or loader._reading:
        assert time.monotonic() < until
        time.sleep(0.01)


def close_broken(run: fuyou.Run) -> Exception | None:
    """Close a run whose drive is broken; the error that it says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "half-way" is what the test made
            run.close()
    except (fuyou.FuyouError, OSError) as error:
        return without_frames(error)
    return None


def train_until_refused(training: Training, steps: int) -> fuyou.FuyouError:
    for _ in range(steps):
        try:
            training.step()
        except fuyou.FuyouError as error:
            return without_frames(error)
    pytest.fail(f"{steps} steps on a broken drive and nothing was said")


# ---- a full drive


def test_a_full_drive_is_refused_before_training_with_numbers(place: Place) -> None:
    with nothing_leaks():
        place.fill()
        with pytest.raises(
            BudgetError, match=r"have no room: the extents need .* and the limit is .* short"
        ) as refused:
            Training().wrap(place.folder)
        assert refused.value.tier == "nvme" and refused.value.shortfall_bytes > MIB
        assert os.listdir(place.folder) == ["lost+found", "filler"] or "fuyou-store" not in os.listdir(place.folder)


def test_a_drive_that_filled_up_since_the_plan_is_refused_by_preallocation(place: Place) -> None:
    ledger = book()
    with nothing_leaks():
        store = store_in(place.folder, ledger)
        store.place(20 * MIB, "optimizer", 1)
        store.open()
        with pytest.raises(
            StoreError, match=r"has no room: 200.00 MiB are needed and .* MiB are free \(No space left"
        ) as no:
            store.drives[0].preallocate(20 * MIB, 200 * MIB)  # past what the plan allows: the drive itself says it
        assert str(place.folder) in str(no.value) and data(place.folder).stat().st_size == 20 * MIB
        store.close()
    assert ledger.held("nvme") == 0 and "fuyou-store" not in os.listdir(place.folder)


def test_growing_on_a_full_drive_changes_nothing_and_works_once_there_is_room(place: Place) -> None:
    ledger = book()
    memory = Memory(4 * MIB, random_pages(4 * MIB // PAGE, seed=1))
    with nothing_leaks():
        store = store_in(place.folder, ledger)
        first = store.place(MIB, "optimizer", 1)
        store.open()
        first.write(memory.address, memory).wait()
        filler = place.fill()
        held, size = ledger.held("nvme"), data(place.folder).stat().st_size
        for grow in (lambda: store.add(4 * MIB, "optimizer", 2), lambda: store.add_slot(first)):
            with pytest.raises((StoreError, BudgetError), match="have no room"):
                grow()
            assert (ledger.held("nvme"), data(place.folder).stat().st_size, len(first.slots)) == (held, size, 1)
        filler.unlink()
        second = store.add(4 * MIB, "optimizer", 1)
        second.write(memory.address, memory).wait()
        store.add_slot(first)
        target = Memory(4 * MIB)
        second.read(target.address, target).wait()
        assert target.bytes() == memory.bytes()
        first.read(target.address, target).wait()
        assert target.bytes()[:MIB] == memory.bytes()[:MIB]
        store.close()
    assert ledger.held("nvme") == 0


def test_unfreezing_on_a_full_drive_is_refused_and_goes_on_once_there_is_room(place: Place) -> None:
    def freezing(training: Training, between) -> list[float]:
        training.model[2].requires_grad_(False)
        losses = [training.step()]
        training.model[2].requires_grad_(True)
        between(training)
        return losses + [training.step() for _ in range(2)]

    oracle = Training()
    expected = freezing(oracle, lambda training: None)

    def fill_first(training: Training) -> None:
        filler = place.fill()
        with pytest.raises((StoreError, BudgetError), match="ha[sv]e? no room"):
            training.step()
        filler.unlink()
        training.optimizer.zero_grad()

    training = Training()
    training.model[2].requires_grad_(False)
    with nothing_leaks():
        with training.wrap(place.folder) as run:
            assert freezing(training, fill_first) == expected
        assert same(training.weights(), oracle.weights())
        assert_empty(run)


def test_a_drive_that_promised_room_which_is_not_there(kind: str, tmp_path: Path) -> None:
    """Thin provisioning: the file system preallocates, and the device under it has no blocks for what is written."""
    with mounted(tmp_path / "outer", 16 * MIB, make=("-O", "^has_journal")) as outer:
        with mounted(outer.folder, 64 * MIB, make=("-O", "^has_journal")) as inner, nothing_leaks():
            store = store_in(inner.folder, book(), kind)
            extents = [store.place(4 * MIB, "optimizer", 1) for _ in range(8)]
            store.open()
            memory = Memory(4 * MIB, random_pages(4 * MIB // PAGE, seed=3))
            failed = 0
            for extent in extents:
                ticket, target = extent.write(memory.address, memory), Memory(4 * MIB)
                read = extent.read(target.address, target)
                try:
                    ticket.wait()
                except StorageIOError as error:
                    assert error.errno in (errno.ENOSPC, errno.EIO) and str(data(inner.folder)) in str(error)
                    assert f"write {4 * MIB} bytes at" in str(error) and "expected 4194304 bytes, got" in str(error)
                    with pytest.raises(
                        StorageIOError, match="write"
                    ):  # what was not written is never read as if it were
                        read.wait()
                    failed += 1
                else:
                    read.wait()
                    assert target.bytes() == memory.bytes()
            assert 0 < failed < 8
            store.close()


# ---- a file that somebody else changes


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_data_file_that_lost_its_name_serves_on(kind: str, nvme: Path, how: str) -> None:
    expected, weights = plain(4)
    training = Training()
    with nothing_leaks():
        with training.wrap(nvme, io=kind) as run:
            losses = [training.step(), training.step()]
            data(nvme).unlink()
            if how == "replaced":
                data(nvme).write_bytes(b"not ours" * 100_000)
            losses += [training.step(), training.step()]
        assert losses == expected and same(training.weights(), weights)
        assert_empty(run)
    assert {*os.listdir(nvme)} <= {"fuyou-store", "fuyou-plan.json"}  # of activations, for the next run


def test_a_data_file_cut_short_is_an_error_that_names_it(kind: str, nvme: Path) -> None:
    training = Training()
    with nothing_leaks():
        run = training.wrap(nvme, io=kind)
        training.step()
        run.settle()
        os.truncate(data(nvme), data(nvme).stat().st_size // 2 // PAGE * PAGE)
        error = train_until_refused(training, 3)
        assert isinstance(error, StorageIOError) and error.errno == errno.ENODATA
        assert str(data(nvme)) in str(error) and "the file ends there; expected" in str(error)
        close_broken(run)
        assert_empty(run)


# ---- a drive that fails


def test_reads_that_fail_with_eio(kind: str, place: Path) -> None:
    with nothing_leaks(), open_or_skip(kind) as engine:
        file = engine.open(place.folder / "file")
        memory = Memory(16 * MIB, random_pages(16 * MIB // PAGE, seed=4))
        engine.write(file, 0, memory.address, 16 * MIB).wait()
        engine.flush(file).wait()
        os.sync()
        os.truncate(place.image, MIB)  # the device ends here now, and does not know it
        target = Memory(16 * MIB)
        for _ in range(2):
            with pytest.raises(StorageIOError, match="Input/output error") as caught:
                engine.read(file, 0, target.address, 16 * MIB).wait()
            assert caught.value.errno == errno.EIO
            assert f"read {16 * MIB} bytes at 0 of {file.path} failed at offset" in str(caught.value)
        assert engine.in_flight() == []


def test_training_on_a_drive_that_fails_with_eio(kind: str, place: Place) -> None:
    training = Training()
    with nothing_leaks():
        run = training.wrap(place.folder, io=kind)
        training.step()
        run.settle()
        os.sync()
        os.truncate(place.image, MIB)
        error = train_until_refused(training, 3)
        assert isinstance(error, StorageIOError) and error.errno == errno.EIO
        assert str(data(place.folder)) in str(error) and "Input/output error" in str(error)
        close_broken(run)
        assert_empty(run)
        assert not run._open


@pytest.fixture
def turns_read_only(tmp_path: Path) -> Iterator[Place]:
    with mounted(tmp_path, 48 * MIB, options="errors=remount-ro") as made:
        yield made


def test_training_on_a_file_system_that_turned_read_only(kind: str, turns_read_only: Place) -> None:
    place = turns_read_only
    trigger = Path("/sys/fs/ext4") / Path(place.device).name / "trigger_fs_error"
    if not trigger.exists():
        pytest.skip("this kernel's ext4 has no trigger_fs_error")
    training = Training()
    with nothing_leaks():
        run = training.wrap(place.folder, io=kind)
        training.step()
        run.settle()
        trigger.write_text("1")
        error = train_until_refused(training, 3)
        assert isinstance(error, StorageIOError) and error.errno in (errno.EROFS, errno.EIO)
        assert str(data(place.folder)) in str(error) and "write" in str(error)
        close_broken(run)
        assert_empty(run)
        with pytest.raises(StoreError, match=f"{place.folder}.*Read-only file system"):
            Training().wrap(place.folder, io=kind, resume=False)


def test_a_read_only_file_system_is_refused_before_training(place: Place) -> None:
    fault_tools.call("mount", "-o", "remount,ro", str(place.folder))
    with pytest.raises(StoreError, match="not writable"):
        Training().wrap(place.folder)


# ---- a drive that does not answer


def test_a_write_that_does_not_end_is_named_and_ends_when_the_drive_is_back(kind: str, place: Place) -> None:
    with nothing_leaks(), open_or_skip(kind) as engine:
        file = engine.open(place.folder / "file")
        old, new, target = (Memory(MIB, random_pages(MIB // PAGE, seed=seed)) for seed in (5, 6, 7))
        engine.write(file, 0, old.address, MIB).wait()
        engine.deadline_s = 0.3
        place.freeze()
        write = engine.write(file, 0, new.address, MIB)
        read = engine.read(file, 0, target.address, MIB)
        for what in (write.wait, read.wait, lambda: engine.close_file(file), engine.close):
            started = time.monotonic()
            with pytest.raises(DeadlineError) as caught:
                what()
            assert 0.25 < time.monotonic() - started < 5
            assert f"write {MIB} bytes at 0 of {file.path}" in str(caught.value)
            assert "operations in flight" in str(caught.value) and "does not answer" in str(caught.value)
        assert not write.done() and not read.done()
        place.thaw()
        engine.deadline_s = 60
        write.wait()
        read.wait()
        assert target.bytes() == new.bytes() == Path(file.path).read_bytes()
        engine.close()


def test_a_read_that_does_not_end_is_named_and_ends_when_the_drive_is_back(kind: str, place: Place) -> None:
    with nothing_leaks(), reads_stopped(place.folder) as go_on, open_or_skip(kind) as engine:
        file = engine.open(place.folder / "file")
        content, target = Memory(MIB, random_pages(MIB // PAGE, seed=8)), Memory(MIB)
        engine.write(file, 0, content.address, MIB).wait()
        read = engine.read(file, 0, target.address, MIB)
        with pytest.raises(
            DeadlineError, match=f"Waited 0.3 s for read {MIB} bytes at 0 of .*operations in flight: read"
        ):
            read.wait(0.3)
        go_on()
        read.wait(60)
        assert target.bytes() == content.bytes()


def test_training_goes_on_after_a_drive_that_stopped_reading(kind: str, place: Place) -> None:
    """The forward's own read stands still; nothing was changed yet, so the same batch is trained on again."""
    expected, weights = plain(4)
    training = Training()
    with nothing_leaks():
        with training.wrap(place.folder, io=kind, deadline_s=0.5) as run:
            losses = [training.step(), training.step()]
            run.settle()
            run._movers.swapper.drop_all()
            with reads_stopped(place.folder) as go_on:
                for _ in range(2):
                    started = time.monotonic()
                    with pytest.raises(DeadlineError, match=r"read \d+ bytes at \d+ of .*data"):
                        training.step()
                    assert time.monotonic() - started < 10
                go_on()
                training.optimizer.zero_grad()
                run._tiers.engine.deadline_s = run._movers.swapper._loader.deadline_s = 60
                losses += [training.step(), training.step()]
        assert losses == expected and same(training.weights(), weights)
        assert_empty(run)


def test_a_fetch_that_was_given_up_brings_nothing_later(place: Place) -> None:
    """Its room is somebody else's from then on: what the drive delivers late goes nowhere, and the next fetch is right."""
    expected, weights = plain(3)
    training = Training()
    with nothing_leaks():
        with training.wrap(place.folder, io="threads", ram="768KiB") as run:
            losses = [training.step()]
            run.settle()
            run._movers.swapper.drop_all()
            away = [unit for unit in run._units if not unit.chunks[0].weights.on_host]
            assert away
            with reads_stopped(place.folder) as go_on:
                assert run._movers.swapper.fetch(away[0])
                run._movers.swapper.drop_all()
                go_on()
                idle(run)
            assert not away[0].memory.tensor.any()
            losses += [training.step(), training.step()]
        assert losses == expected and same(training.weights(), weights)
        assert_empty(run)


def test_closing_over_a_drive_that_does_not_answer_says_so_and_can_be_repeated(kind: str, place: Place) -> None:
    oracle = Training()
    expected = [oracle.step(), oracle.backward()]
    training = Training()
    with nothing_leaks():
        run = training.wrap(place.folder, io=kind, deadline_s=0.4, ram="2500KB", update="step")
        losses = [training.step()]
        run.settle()
        place.freeze()
        losses.append(training.backward())  # its gradients are on their way to the drive
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(DeadlineError, match=r"write \d+ bytes at \d+ of .*data"):
                run.close()
            assert time.monotonic() - started < 10
        assert run._open and run._tiers.store.in_flight()
        place.thaw()
        run.close()
        assert losses == expected and same(training.weights(), oracle.weights())
        gradients = [[parameter.grad for parameter in each.model.parameters()] for each in (training, oracle)]
        assert same(*gradients)
        assert_empty(run)
        run.close()
    assert sorted(os.listdir(place.folder)) == ["fuyou-store", "lost+found"]


def test_a_step_on_a_drive_that_does_not_answer_is_torn_and_says_so(kind: str, place: Place) -> None:
    training = Training()
    with nothing_leaks():
        run = training.wrap(place.folder, io=kind, deadline_s=0.4, update="step")
        training.step()
        run.settle()
        training.backward()
        run.settle()
        place.freeze()
        with pytest.raises(DeadlineError, match=r"write \d+ bytes at \d+ of .*data"):
            training.optimizer.step()
        until = time.monotonic() + 60
        while run._updates.failure is None:  # the update's own thread waits as long, from later on
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(fuyou.StateError, match="half-way.*DeadlineError.*in flight"):
            training.backward()
        place.thaw()
        close_broken(run)
        assert not run._open
        assert_empty(run)


def test_memory_is_not_lent_again_while_a_silent_drive_may_still_move_it(place: Place) -> None:
    """A staging whose write has not ended at the deadline is released: its bytes stay taken until the write has ended."""
    from fuyou.swap.ranges import Range, WriteBehind
    from fuyou.tiers.host import Arena

    ledger = book()
    with nothing_leaks():
        store = store_in(place.folder, ledger, deadline_s=0.3)
        extent = store.place(MIB, "optimizer", 1)
        store.open()
        arena = Arena(MIB, ledger, deadline_s=0.3)
        writes = WriteBehind(arena)
        staging = writes.stage([Range(MIB, extent)], "a chunk")
        staging.views[0].fill_(7)
        place.freeze()
        writes.put(staging.store(), staging)
        with pytest.raises(DeadlineError, match="write"):
            writes.drain()
        del staging
        assert arena.try_lease(PAGE, "staging") is None and arena.lease_count == 1
        with pytest.raises(DeadlineError, match="staging 1.00 MiB"):
            arena.lease(PAGE, "staging")
        place.thaw()
        lease = arena.lease(MIB, "staging", timeout_s=60)  # comes back by itself
        lease.data.fill_(9)
        extent.read(lease.address, lease).wait(60)
        assert bool((lease.data == 7).all())
        lease.release()
        store.close()
        arena.close()
    assert ledger.held("host") == ledger.held("nvme") == 0


def test_an_error_of_one_range_does_not_free_another_ones_memory(place: Place) -> None:
    """Two ranges in one staging: the first read fails at once, the second is still under way."""
    from fuyou.swap.ranges import Range, WriteBehind
    from fuyou.tiers.host import Arena

    ledger = book()
    with nothing_leaks(), reads_stopped(place.folder) as go_on:
        store = store_in(place.folder, ledger, "threads")
        ranges = [Range(MIB, store.place(MIB, "optimizer", 1)) for _ in range(2)]
        store.open()
        arena = Arena(2 * MIB, ledger)
        writes = WriteBehind(arena)
        staging = writes.stage(ranges, "a chunk")
        for view in staging.views:
            view.fill_(7)
        staging.store().wait()
        second = staging.load(1)
        assert isinstance(ranges[0].home, fuyou.tiers.store.Extent)
        with pytest.raises(StorageIOError):
            ranges[0].home.read(PAGE, None).wait()  # page 1 is never mapped
        staging.release()
        assert not second.done() and arena.lease_count == 1 and arena.try_lease(PAGE, "staging") is None
        go_on()
        arena.lease(2 * MIB, "staging", timeout_s=60).release()
        assert second.done()
        store.close()
        arena.close()
    assert ledger.held("host") == ledger.held("nvme") == 0
