"""A byte that a drive gives wrongly, anywhere in a store or a checkpoint: it is told by name, or changes nothing. The step
that is gone on from is the newest, with its bits."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resuming import Loop, digest
from test_power_loss import Steady, folders_in

from fuyou.core.errors import StoreError
from fuyou.tiers.folders import DATA, FOLDER, LAYOUTS, RECORDS
from fuyou.tiers.records import LAYOUT_HEADER, PART, Record, read_newest, record_nbytes

STEPS = 3
OTHERS = ("open", "home", "lock", "fuyou-plan.json", "fuyou-saved.json")
# What is changed, drawn alike often: of most bytes of a file it can be told at once that nobody reads them.
KINDS = ("newest record", "older record", "layout", "weights and state", "blobs", "unused", "others")
KINDS_SAVED = ("newest record", "layout", "weights and state", "blobs")


class Left:
    """What a kill leaves of a run on `drives` drives, and its checkpoint beside it; `copy` it, and `spoil` a byte."""

    def __init__(self, place: Path, drives: int, options: dict[str, Any]) -> None:
        self.place, self.folders = place, folders_in(place, drives)
        loop = Steady()
        with loop.wrapped(self.folders, **options) as run:
            loop.steps(STEPS)
            run.settle()
            shutil.copytree(place / "drives", place / "left" / "drives")
            run.save(place / "left" / "saved")
            run.settle()
            self.state = digest(loop.state())

    def copy(self, what: str) -> tuple[list[Path], Record]:
        """Back under the names that it had; and its record."""
        shutil.rmtree(self.place / what, ignore_errors=True)
        shutil.copytree(self.place / "left" / what, self.place / what)
        folders = self.folders if what == "drives" else [self.place / what]
        return folders, read_newest([str(each) for each in folders])

    def places(self, folders: list[Path], record: Record, kind: str) -> list[tuple[Path, int, int]]:
        """(file, first byte, past the last) of what is read as `kind`."""
        home = folders[0] / FOLDER
        of_blobs = record.payload["blobs"].values()
        blobs = {extent for nbytes, extents in of_blobs for extent in extents if nbytes}
        empty = {extent for nbytes, extents in of_blobs for extent in extents if not nbytes}
        newest = Path(record.path).name[:-1]
        match kind:
            case "newest record" | "older record":
                names = [each for each in RECORDS if each.startswith(newest) == (kind == "newest record")]
                return [(home / each, 0, record_nbytes(record)) for each in names if (home / each).stat().st_size]
            case "layout":
                return [(home / each, 0, LAYOUT_HEADER.size + record.part_count * PART.itemsize) for each in LAYOUTS]
            case "weights and state" | "blobs":
                rows = [row for row, each in enumerate(record.entries["extent"]) if each not in empty]
                its = [row for row in rows if (record.entries["extent"][row] in blobs) == (kind == "blobs")]
                return [_place(folders, part) for row in its for part in record.parts(row)]
            case "unused":
                rows = [each for each in record.entries if each["extent"] not in empty]
                named = {(int(each["extent"]), int(each["slot"])) for each in rows}
                return [_place(folders, part) for part in record.layout if (part["extent"], part["slot"]) not in named]
            case _:
                files = [
                    each / name for each in folders for name in (*(f"{FOLDER}/{n}" for n in OTHERS[:3]), *OTHERS[3:])
                ]
                return [(each, 0, each.stat().st_size) for each in files if each.is_file() and each.stat().st_size]


def _place(folders: list[Path], part: Any) -> tuple[Path, int, int]:
    first = int(part["offset"])
    return folders[int(part["drive"])] / FOLDER / DATA, first, first + int(part["nbytes"])


def spoil(draw: random.Random, places: list[tuple[Path, int, int]]) -> Path:
    path, first, last = draw.choice(places)
    with open(path, "r+b") as file:
        file.seek(draw.randrange(first, last))
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ draw.randrange(1, 256)]))
    return path


def goes_on(open_run: Callable[[Loop], Any], state: str) -> None:
    loop = Steady()
    with open_run(loop) as run:
        assert run.committed_step == STEPS and run.user_state == {"read": 2 * STEPS}
        assert digest(loop.state()) == state


SEEDS = [(0, 28), *(pytest.param((seed, 84), marks=pytest.mark.slow) for seed in range(1, 13))]
RUNS = {"one drive": (1, {}), "two drives, in memory": (2, {"ram": "64MiB"})}


@pytest.mark.parametrize("turn", SEEDS, ids=lambda turn: f"seed {turn[0]}")
@pytest.mark.parametrize("name", RUNS)
def test_a_wrong_byte_in_a_store_is_told_or_changes_nothing(place, name, turn):
    left, (seed, count) = Left(place, *RUNS[name]), turn
    draw = random.Random(f"{name} {seed}")
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        folders, record = left.copy("drives")
        path = spoil(draw, left.places(folders, record, kind))
        options = draw.choice([{}, {"ram": "64MiB"}, {"ram": "600KiB"}, {"nvme": folders[0]}])

        def resumed(loop: Loop, folders: Any = folders, options: dict[str, Any] = options) -> Any:
            return loop.wrapped(**{"nvme": folders, **options}, resume=True)

        if kind in ("weights and state", "blobs"):
            with pytest.raises(StoreError, match="are not those that were committed") as told:
                goes_on(resumed, left.state)
            assert str(path) in str(told.value)
            with pytest.raises(StoreError, match="are not those that were committed"):  # and nothing was lost by it
                goes_on(resumed, left.state)
        else:
            goes_on(resumed, left.state)


@pytest.mark.parametrize("turn", [(0, 44), *(pytest.param((s, 100), marks=pytest.mark.slow) for s in range(1, 11))])
def test_a_wrong_byte_in_a_checkpoint_is_told_or_changes_nothing(place, turn):
    left, (seed, count) = Left(place, 1, {}), turn
    draw = random.Random(f"checkpoint {seed}")
    loop = Steady()
    with loop.wrapped(left.folders[0], resume=False) as run:
        loop.steps(1)
        for number in range(count):
            kind = KINDS_SAVED[number % len(KINDS_SAVED)]
            folders, record = left.copy("saved")
            path = spoil(draw, left.places(folders, record, kind))
            before = digest(loop.state())
            if kind in ("weights and state", "blobs"):
                with pytest.raises(StoreError, match="are not those that were committed") as told:
                    run.load(folders[0])
                assert str(path) in str(told.value) and digest(loop.state()) == before
            else:
                run.load(folders[0])
                assert digest(loop.state()) == left.state
                loop.steps(1)
