"""Stores in pieces, as kills in particular moments leave them: a first commit that is torn, a step on its way to another
layout, a drive that another store has taken. What is found is the newest step, or none where none was complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
from resuming import digest
from test_power_loss import BEFORE, Oracle, Steady, folders_in, train

from fuyou.core.errors import StoreError
from fuyou.runtime.moving import MOVED
from fuyou.tiers.folders import DATA, FOLDER, LAYOUTS, RECORDS
from fuyou.tiers.records import read_newest
from fuyou.tiers.saved import open_saved
from fuyou.tiers.saving import copy_saved


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(Steady)


def resumed(folders: list[Path], oracle: Oracle) -> int:
    """The step, whose bits are right."""
    loop = Steady()
    with loop.wrapped(folders, resume=True) as run:
        step = run.committed_step
        assert step == 0 or digest(loop.state()) == oracle.digests[step, 0]
        assert not any((folder / MOVED).exists() for folder in folders)
        assert not [name for folder in folders for name in os.listdir(folder) if name.startswith(f".{MOVED}")]
        return step


def test_a_first_commit_that_was_torn_is_no_step_and_damage_is(nvme, oracle):
    train(Steady, [nvme], 1)
    left = nvme.parent / "left"
    shutil.copytree(nvme, left)
    first = Path(read_newest([str(nvme)]).path).name[:-1]
    store = nvme / FOLDER

    def put(copies: dict[str, bytes]) -> None:
        shutil.rmtree(nvme)
        shutil.copytree(left, nvme)
        for copy, content in copies.items():
            (store / f"{first}{copy}").write_bytes(content)

    whole = (store / f"{first}a").read_bytes()
    torn, blank = whole[:512] + bytes(len(whole) - 512), bytes(len(whole))
    put({"a": torn, "b": blank})
    assert resumed([nvme], oracle) == 0
    put({"a": whole, "b": blank})
    assert resumed([nvme], oracle) == 1
    for copies in ({"a": blank, "b": torn}, {"a": torn, "b": torn}):  # no torn write is like this
        put(copies)
        with pytest.raises(StoreError, match="no complete step"):
            resumed([nvme], oracle)


@pytest.mark.parametrize("names", [("commit-0-a",), ("commit-0-a", "commit-0-b", "commit-1-a"), (*RECORDS, LAYOUTS[0])])
def test_a_store_that_was_killed_while_it_was_made_has_no_step(nvme, oracle, names):
    (nvme / FOLDER).mkdir()
    for name in names:
        (nvme / FOLDER / name).touch()
    assert resumed([nvme], oracle) == 0


PIECES = {
    "layout removed": LAYOUTS,
    "older records left": (*LAYOUTS, "newest a", "newest b"),
    "one record left": (*LAYOUTS, *RECORDS[:3]),
    "no record": (*LAYOUTS, *RECORDS),
    "data cut": (DATA,),
}


@pytest.mark.parametrize("gone", PIECES)
def test_a_step_that_is_on_its_way_is_found_beside_a_store_in_pieces(nvme, oracle, gone):
    train(Steady, [nvme], BEFORE)
    newest = Path(read_newest([str(nvme)]).path).name[:-1]
    with contextlib.closing(open_saved([str(nvme)])) as saved:
        copy_saved(saved, str(nvme / MOVED))
    (nvme / f".{MOVED}.draft").mkdir()
    for name in PIECES[gone]:
        path = nvme / FOLDER / name.replace("newest ", newest)
        os.truncate(path, 0) if name == DATA else path.unlink()
    assert resumed([nvme], oracle) == BEFORE


def test_a_store_that_is_whole_is_gone_on_from_beside_a_damaged_copy_and_two_damaged_are_told(nvme, oracle):
    train(Steady, [nvme], BEFORE)
    with contextlib.closing(open_saved([str(nvme)])) as saved:
        copy_saved(saved, str(nvme / MOVED))
    os.truncate(nvme / MOVED / FOLDER / DATA, 0)
    shutil.copytree(nvme, nvme.parent / "left")
    assert resumed([nvme], oracle) == BEFORE
    os.truncate(nvme.parent / "left" / FOLDER / DATA, 0)
    with pytest.raises(StoreError, match="parts beyond the 0 bytes"):
        resumed([nvme.parent / "left"], oracle)


def test_a_store_whose_drive_another_one_has_taken_is_passed_over_for_it(nvme, oracle):
    one, two = folders_in(nvme, 2)
    train(Steady, [one, two], BEFORE)
    shutil.copytree(one, nvme / "one")
    train(Steady, [two], 0, resume=True)
    shutil.rmtree(one)
    shutil.copytree(nvme / "one", one)  # as a kill leaves it, before that store was removed
    assert resumed([one, two], oracle) == BEFORE
    shutil.rmtree(two / FOLDER)
    shutil.rmtree(one)
    shutil.copytree(nvme / "one", one)
    with pytest.raises(StoreError):
        resumed([one, two], oracle)
