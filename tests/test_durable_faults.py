"""Faults beside the bytes of a step: a load that is left half-way, a drive that gives no byte of one copy of a record, a checkpoint
whose draft cannot be removed, locks that are waited for, stores that another run has taken."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_tools import REPOSITORY
from resuming import Loop, differences
from test_power_loss import BEFORE, Steady, folders_in, train

from fuyou.checkpoint import checkpoints, saves
from fuyou.core.errors import StorageIOError
from fuyou.runtime import recovery
from fuyou.tiers import lock, record_files, records
from fuyou.tiers.folders import FOLDER, RECORDS
from fuyou.tiers.lock import FolderLock
from fuyou.tiers.saved import open_saved
from fuyou.tiers.saving import SavedWriter


def state_after(nvme: Path) -> dict[str, torch.Tensor]:
    loop = Loop()
    with loop.wrapped(nvme, resume=True):
        return loop.state()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageIOError(errno.EIO, "no drive")])
def test_a_load_that_is_left_half_way_is_never_a_step(
    nvme: Path, tmp_path: Path, error: BaseException, monkeypatch
) -> None:
    """Some of the checkpoint's weights are there, others are the run's own: the newest step is the one before."""
    whole = checkpoints.load
    loop = Loop()
    with pytest.raises(type(error)), loop.wrapped(nvme) as run:
        loop.steps(1)
        run.save(tmp_path / "saved")
        loop.steps(3)
        run.settle()
        expected = loop.state()

        def half(found: Any, units: Any, *others: Any) -> None:
            whole(found, units[: len(units) // 2], *others)
            raise error

        monkeypatch.setattr(checkpoints, "load", half)
        run.load(tmp_path / "saved")
    monkeypatch.undo()
    assert differences(state_after(nvme), expected) == []


def test_a_checkpoint_whose_draft_cannot_be_removed_holds_up_nothing(nvme: Path, tmp_path: Path, monkeypatch) -> None:
    """The drive of the checkpoint fails, and is read-only from then on: training and the next checkpoint go on."""

    def fails(*_: object) -> None:
        raise StorageIOError(errno.EIO, "no drive")

    def read_only(self: FolderLock) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    expected = Loop().steps(6)
    loop, losses = Loop(), []
    with loop.wrapped(nvme) as run:
        losses += loop.steps(1)
        with monkeypatch.context() as patched:
            patched.setattr(saves._Target, "write", fails)
            patched.setattr(SavedWriter, "clone", lambda *_: False)
            patched.setattr(FolderLock, "release", read_only)
            run.save(tmp_path / "saved")
            with pytest.raises(StorageIOError, match="no drive"):
                run._saves.wait()
        losses += loop.steps(4)
        run.save(tmp_path / "other")
        losses += loop.steps(1)
    assert losses == expected and (tmp_path / "other").is_dir()


class NoByte(io.RawIOBase):
    """A file of whose sectors the drive gives none."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, *_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def close(self) -> None:
        self._file.close()


@pytest.mark.parametrize("name", ["record", "layout-a"])
def test_a_copy_that_the_drive_does_not_give_is_replaced_by_the_other(nvme: Path, monkeypatch, name: str) -> None:
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(2)
        run.settle()
        expected = loop.state()
    home = nvme / FOLDER
    if name == "record":
        newest = records.read_newest([str(nvme)]).path
        place = RECORDS.index(Path(newest).name) // 2
        name, whole = RECORDS[2 * place], RECORDS[2 * place + 1]
    else:
        whole = "layout-b"
    fdopen = os.fdopen

    def opened(descriptor: int, mode: str) -> Any:
        file = fdopen(descriptor, mode)
        return NoByte(file) if os.readlink(f"/proc/self/fd/{descriptor}") == str((home / name).resolve()) else file

    def plainly(path: str, mode: str) -> Any:
        file = open(path, mode)
        return NoByte(file) if os.path.realpath(path) == str((home / name).resolve()) else file

    length = (home / whole).stat().st_size
    (home / name).write_bytes(bytes(length))  # what a new sector would hold
    monkeypatch.setattr(records.os, "fdopen", opened)
    monkeypatch.setattr(record_files, "open", plainly, raising=False)
    again = Loop()
    with again.wrapped(nvme, resume=True):
        assert differences(again.state(), expected) == []
        monkeypatch.undo()
        size = 64
        assert (home / name).read_bytes()[:size] == (home / whole).read_bytes()[:size] != bytes(size)


class TestLock:
    def test_one_that_finds_no_room_for_its_number_is_not_held(self, tmp_path: Path, monkeypatch) -> None:
        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patched:
            patched.setattr(lock.os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                FolderLock(str(tmp_path))
        FolderLock(str(tmp_path)).release()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_who_waits_for_a_file_that_is_removed_locks_the_one_that_is_there(self, tmp_path: Path) -> None:
        """The holder removes its file; another file may be there before the waiter has a lock on the first."""
        script = (
            f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from fuyou.tiers.lock import FolderLock\n"
            f"held = FolderLock({str(tmp_path)!r}); print('held', flush=True); sys.stdin.readline(); held.release()"
        )
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == b"held\n"
            release = threading.Timer(0.2, lambda: (holder.stdin.write(b"\n"), holder.stdin.flush()))
            release.start()
            mine = FolderLock(str(tmp_path))
            status = os.stat(tmp_path / "lock")
            assert (status.st_dev, status.st_ino) == mine._key
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
            mine.release()


def test_a_store_that_another_run_has_begun_where_the_step_came_from_stays(nvme: Path, monkeypatch) -> None:
    """Of two drives the run goes on with the first alone; before the step is at home, another run begins on the second."""
    one, two = folders_in(nvme, 2)
    train(Steady, [one, two], BEFORE)
    forget = recovery.forget

    def late(source: Any) -> None:
        monkeypatch.undo()
        shutil.rmtree(two / FOLDER)
        train(Steady, [two], 2)
        forget(source)

    monkeypatch.setattr(recovery, "forget", late)
    train(Steady, [one], 0, resume=True)
    assert open_saved([str(two)]).step == 2 and open_saved([str(one)]).step == BEFORE


def test_what_is_left_of_a_moved_steps_store_goes(nvme: Path) -> None:
    one, two = folders_in(nvme, 2)
    train(Steady, [one, two], BEFORE)
    train(Steady, [one], 0, resume=True)
    assert not (two / FOLDER).exists()
