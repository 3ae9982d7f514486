"""Checkpoints written beside training: training has the bits that it had without, and they are those of their step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from drive_tools import file_size_limit
from fault_tools import REPOSITORY, call
from resuming import Loop, differences, trainer

import fuyou
from fuyou.core.errors import StorageIOError
from fuyou.runtime.committing import Committing
from fuyou.tiers.folders import FOLDER
from fuyou.tiers.saving import SavedWriter
from fuyou.tiers.store import Store

STEPS = 8
PLACES = {
    "on the drive": {"ram": "1MiB"},
    "in memory": {"ram": "64MiB"},
    "at the step": {"ram": "1MiB", "update": "step"},
    "deferred": {"ram": "600KiB", "update": "deferred"},
    "two drives": {"ram": "1MiB"},
}


MOST = [*list(PLACES)[:2], *(pytest.param(place, marks=pytest.mark.slow) for place in list(PLACES)[2:])]


def history(clamps: bool) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and state after so many steps."""
    loop, losses, found = trainer(clamps), [], []
    for _ in range(STEPS + 1):
        found.append((list(losses), loop.state()))
        losses += loop.steps(1)
    return found


@pytest.fixture(scope="module")
def plain() -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    return history(clamps=True)


@pytest.fixture(scope="module", params=[True, False], ids=["clamped", "free"])
def both(request: pytest.FixtureRequest, plain: list) -> tuple[bool, list]:
    return request.param, plain if request.param else history(clamps=False)


@pytest.fixture
def slow_writer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every 16 KiB of a checkpoint take 3 ms more: training comes to slots before they are copied. Sizes of the pieces."""
    written, passed = [], SavedWriter.passed

    def slowly(self: SavedWriter, data: memoryview) -> int:
        time.sleep(0.003 * max(1, data.nbytes / 16384))
        written.append(data.nbytes)
        return passed(self, data)

    monkeypatch.setattr(SavedWriter, "passed", slowly)
    return written


def folders_of(place: str, nvme: Path) -> list[Path]:
    found = [nvme / "a", nvme / "b"] if place == "two drives" else [nvme / "a"]
    for each in found:
        each.mkdir(exist_ok=True)
    return found


def loaded(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The state of a run that goes on from a checkpoint, on other drives."""
    (tmp_path / "other").mkdir(exist_ok=True)
    loop = Loop()
    with loop.wrapped(tmp_path / "other", ram="64MiB", resume=str(folder)):
        return loop.state()


@pytest.mark.parametrize("place", MOST)
def test_every_step_is_saved_while_training_goes_on(nvme, tmp_path, both, place):
    clamps, plain = both
    loop, losses = trainer(clamps), []
    with loop.wrapped(folders_of(place, nvme), **PLACES[place], debug_races=3) as run:
        for step in range(1, STEPS + 1):
            losses += loop.steps(1)
            run.save(tmp_path / f"step-{step}")
        assert losses == plain[STEPS][0] and differences(loop.state(), plain[STEPS][1]) == []
    for step in range(1, STEPS + 1):
        assert differences(loaded(tmp_path / f"step-{step}", tmp_path), plain[step][1]) == []


@pytest.mark.parametrize("place", MOST)
def test_a_slot_that_is_not_copied_yet_is_copied_before_it_is_written(nvme, tmp_path, both, slow_writer, place):
    clamps, plain = both
    loop, losses = trainer(clamps), []
    with loop.wrapped(folders_of(place, nvme), **PLACES[place]) as run:
        losses += loop.steps(2)
        run.save(tmp_path / "saved")
        begun = len(slow_writer)
        losses += loop.steps(STEPS - 2)
        assert not (tmp_path / "saved").exists() or len(slow_writer) > begun  # it was not all written in save()
        run.settle()
        assert (tmp_path / "saved" / FOLDER).is_dir()
        assert run.report().dict()["update_seconds"]["checkpoint"] > 0.01  # the case that this test is about was met
        assert losses == plain[STEPS][0] and differences(loop.state(), plain[STEPS][1]) == []
    assert differences(loaded(tmp_path / "saved", tmp_path), plain[2][1]) == []


def test_what_is_changed_by_hand_meanwhile_is_not_in_it(nvme, tmp_path, plain, slow_writer):
    """Weights written twice, an optimizer state loaded, a run loaded: none of it goes over a slot that is to be copied."""
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(3)
        run.save(tmp_path / "saved")
        state = loop.optimizer.state_dict()
        for value in (1.0, 2.0):
            with torch.no_grad():
                for each in loop.model.parameters():
                    each.fill_(value)
            run._settle()  # all but waiting for the checkpoint
        loop.optimizer.load_state_dict(state)
        loop.steps(1)
        run.load(tmp_path / "saved")
        assert differences(loop.state(), plain[3][1]) == []
    assert differences(loaded(tmp_path / "saved", tmp_path), plain[3][1]) == []


def test_in_the_middle_of_a_step(nvme, tmp_path, plain):
    """After a backward whose step is still to come: the checkpoint is of the step before, with the data read since."""
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(2)
        before = loop.state()
        tokens = torch.arange(24).reshape(4, 6)
        loop.model(tokens).backward()
        run.save(tmp_path / "saved")
        loop.optimizer.step()
        loop.steps(2)
    found = loaded(tmp_path / "saved", tmp_path)
    moved = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "seen", "torch"}  # by that forward
    assert set(differences(found, before)) <= moved


def test_a_save_that_fails_is_told_once_and_training_goes_on(nvme, tmp_path, plain, slow_writer):
    loop, losses = Loop(), []
    with loop.wrapped(nvme, ram="64MiB") as run:
        losses += loop.steps(1)
        run.settle()
        with file_size_limit(100_000), pytest.raises(StorageIOError, match="room.*File too large"):
            run.save(tmp_path / "saved")  # of that it is told at once
        run.save(tmp_path / "saved")
        with file_size_limit(24 * 4096):
            with pytest.raises(StorageIOError, match="File too large"):
                run.save(tmp_path / "other")
        assert not list(tmp_path.glob("*saved*")) and not list(tmp_path.glob("*other*"))
        losses += loop.steps(1)
        run.save(tmp_path / "saved")
        losses += loop.steps(1)
    assert losses == plain[3][0] and differences(loaded(tmp_path / "saved", tmp_path), plain[2][1]) == []


def test_a_commit_that_begins_while_it_is_asked_for(nvme, tmp_path, monkeypatch):
    """The commit's thread is in the middle of giving the checkpoint to its writer when save(), and who waits, look for it."""
    pin, at_commit = Store.pin, Committing.at_commit

    def pins_slowly(*arguments):
        time.sleep(0.2)
        return pin(*arguments)

    def answers_late(*arguments):
        answer = at_commit(*arguments)
        time.sleep(0.1)
        return answer

    monkeypatch.setattr(Store, "pin", pins_slowly)
    monkeypatch.setattr(Committing, "at_commit", answers_late)
    monkeypatch.setattr("fuyou.checkpoint.checkpoints.save", lambda *_: pytest.fail("it was written twice"))
    loop = trainer(clamps=False)
    with loop.wrapped(nvme, update="deferred") as run:
        for step in range(1, 4):
            loop.steps(1)
            run.save(tmp_path / f"step-{step}")
            run._saves.wait()
            assert (tmp_path / f"step-{step}").is_dir()
        assert differences(loaded(tmp_path / "step-3", tmp_path), loop.state()) == []


def test_a_run_that_is_taken_down_writes_no_more_of_a_checkpoint(nvme, tmp_path, plain, slow_writer, monkeypatch):
    """Giving the weights back is interrupted while a checkpoint is being written: it is not there, rather than in part."""
    loop = Loop()
    with pytest.raises(KeyboardInterrupt), loop.wrapped(nvme) as run:
        loop.steps(2)
        run.settle()
        run.save(tmp_path / "saved")

        def interrupted() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(run._saves, "wait", interrupted)
    assert not list(tmp_path.glob("*saved*"))
    assert run._tiers.lease_count == 0


def test_a_save_that_fails_is_told_by_close(nvme, tmp_path, monkeypatch):
    monkeypatch.setattr(SavedWriter, "begin", lambda *_: (_ for _ in ()).throw(StorageIOError(5, "no drive")))
    loop = Loop()
    with pytest.raises(StorageIOError, match="no drive"), loop.wrapped(nvme) as run:
        loop.steps(1)
        run.settle()
        monkeypatch.setattr(SavedWriter, "put", lambda *_: None)
        run.save(tmp_path / "saved")
    assert run._tiers.lease_count == 0 and not fuyou.api.is_wrapped(loop.model)


def test_what_a_killed_save_left_is_removed_by_the_next_one_of_that_name(nvme, tmp_path):
    script = f"""
        import os, signal, sys
        from fuyou.tiers.saving import SavedWriter
        writer = SavedWriter({str(tmp_path / "saved")!r}, 1 << 20)
        writer.put(0, memoryview(bytes(1 << 16)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    lines = "\n".join(line.strip() for line in script.splitlines())
    subprocess.run([sys.executable, "-c", lines], cwd=REPOSITORY, check=False)
    assert len(list(tmp_path.glob(".saved.*"))) == 1
    with SavedWriter(str(tmp_path / "saved"), 1 << 20):
        assert len(list(tmp_path.glob(".saved.*"))) == 1
        with SavedWriter(str(tmp_path / "saved"), 1 << 20):  # the first is being written: it stays
            assert len(list(tmp_path.glob(".saved.*"))) == 2
    assert not list(tmp_path.glob(".saved*"))


def test_a_save_holds_no_memory_beside_its_buffers(nvme, tmp_path):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(2)
        run.settle()
        before, leases = run._ledger.summary()["host"], run._tiers.lease_count
        run.save(tmp_path / "saved")
        run.settle()
        after = run._ledger.summary()["host"]
        assert run._tiers.lease_count == leases and after == before


@pytest.mark.parametrize("update", ["auto", "deferred", "step"])
def test_a_step_that_is_never_complete_has_no_checkpoint(nvme, tmp_path, monkeypatch, update):
    """An update fails while the save waits for its step's commit: nothing hangs, and nothing is there."""
    loop = Loop()
    with pytest.warns(UserWarning, match="ended half-way"), loop.wrapped(nvme, update=update, deadline_s=20) as run:
        loop.steps(2)
        run.settle()
        failing = iter(range(3))

        def fails(*arguments, **options):
            if next(failing, None) is None:
                raise RuntimeError("no update")
            apply_update(*arguments, **options)

        apply_update = fuyou.swap.updates.apply_update
        monkeypatch.setattr(fuyou.swap.updates, "apply_update", fails)
        with pytest.raises((RuntimeError, fuyou.FuyouError), match="no update"):
            loop.step()
            run.save(tmp_path / "saved")
            run.settle()
    assert not (tmp_path / "saved").exists() and not list(tmp_path.glob(".saved*"))


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_file_system_with_reflinks_shares_the_blocks(tmp_path, plain, kind):
    """On the store's own file system: next to no room is taken until training writes, and what it writes is not in it."""
    if os.geteuid() != 0 or shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"no mkfs.{kind}, or nobody who may mount what it makes")
    image, root = tmp_path / "image", tmp_path / "root"
    root.mkdir()
    with open(image, "wb") as made:
        made.truncate(512 << 20)
    call(f"mkfs.{kind}", "-q", str(image))
    call("mount", "-o", "loop", str(image), str(root))
    try:
        (root / "nvme").mkdir()
        loop = Loop()
        with loop.wrapped(root / "nvme") as run:
            losses = loop.steps(2)
            run.settle()
            os.sync()
            written = run._tiers.store.read_bytes
            run.save(root / "saved")
            run.settle()
            assert run._tiers.store.read_bytes == written  # nothing was copied
            losses += loop.steps(STEPS - 2)
            assert losses == plain[STEPS][0] and differences(loop.state(), plain[STEPS][1]) == []
        assert differences(loaded(root / "saved", tmp_path), plain[2][1]) == []
    finally:
        call("umount", "-l", str(root))
