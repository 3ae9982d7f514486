"""A loss of power, or a kill, at any write of a training or of its recovery: what is resumed is the newest step that was
committed by then, or a later one that is whole, bit for bit, and never a mixture."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from resuming import Loop, differences, digest
from write_log import Log, Platter

from fuyou.tiers.folders import FOLDER
from fuyou.tiers.record_files import RecordFiles
from fuyou.tiers.records import read_newest

STEPS = 5
BEFORE = 2  # steps that a recovery which is cut goes on from
SHORT = 8  # cuts of a scenario by default
Label = tuple[int, int]  # (step, how often it was changed after it)


class Steady(Loop):
    """A step is committed once: nothing changes it after it."""

    def clamp(self) -> None:
        pass


class Clamped(Loop):
    """A step is committed as it is, and again with its weights clamped."""


class Oracle:
    """Plain PyTorch: the losses, and the digest of the state of every label."""

    def __init__(self, kind: type[Loop]) -> None:
        loop, self.digests, self.losses = kind(), {}, []
        clamp = loop.clamp
        loop.clamp = lambda: None  # type: ignore[method-assign]
        self.digests[0, 0], self.states = weights_of(loop), {}
        for step in range(1, STEPS + 1):
            self.losses.append(loop.step())
            self.digests[step, 0] = digest(loop.state())
            clamp()
            self.states[step] = loop.state()
            self.digests[step, 1] = digest(self.states[step])

    def other(self, loop: Loop, step: int) -> list[str]:
        return differences(loop.state(), self.states[step])


def weights_of(loop: Loop) -> str:
    """Before any step an optimizer has no state, and fuyou's has zeros."""
    return digest({name: each.detach() for name, each in loop.model.state_dict().items()})


@pytest.fixture(scope="module")
def oracles() -> dict[type[Loop], Oracle]:
    return {kind: Oracle(kind) for kind in (Steady, Clamped)}


@contextmanager
def recorded(log: Log) -> Iterator[None]:
    """Every record that is on the drive for sure is marked by (step, how often before in that file's store)."""
    write, seen = RecordFiles.write, {}

    def marked(files: RecordFiles, place: int, record: bytes) -> None:
        write(files, place, record)
        (step,) = struct.unpack_from("<Q", record, 24)
        key = (id(files), step)
        seen[key] = seen.get(key, -1) + 1
        log.mark((step, min(seen[key], 1)))

    with log.recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordFiles, "write", marked)
        yield


def train(kind: type[Loop], folders: Sequence[Path], steps: int, **options: Any) -> Loop:
    loop = kind()
    with loop.wrapped(folders, **options):
        loop.steps(steps)
    return loop


class Cuts:
    """`count` moments of `log`, each put back and resumed with one of the `options`."""

    def __init__(self, log: Log, oracle: Oracle, kind: type[Loop], seed: object, least: Label) -> None:
        self.log, self.oracle, self.kind, self.least = log, oracle, kind, least
        self.draw = random.Random(str(seed))
        self.found: list[Label] = []

    def check(self, count: int, folders: Sequence[Path], options: Sequence[dict[str, Any]]) -> None:
        platter = Platter(self.log)
        for end in sorted(self.draw.randint(self.log.begin, len(self.log.events)) for _ in range(count)):
            platter.go_to(end)
            platter.put(self.draw)
            least = max([self.least, *platter.marks])
            chosen = self.draw.choice(options)
            try:
                self.resume(folders, least, chosen)
            except BaseException as error:
                raise AssertionError(f"cut before event {end} of {len(self.log.events)}, {least}, {chosen}") from error

    def resume(self, folders: Sequence[Path], least: Label, options: dict[str, Any]) -> None:
        loop = self.kind()
        with torch.no_grad():
            next(loop.model.parameters()).add_(0.0 if least == (0, 0) else 1.0)  # what is not replaced shows
        with loop.wrapped(**{"nvme": folders, **options}, resume=True) as run:
            step = run.committed_step
            assert step >= least[0]
            if step == 0:
                assert weights_of(loop) == self.oracle.digests[0, 0]
                self.found.append((0, 0))
                return
            state = digest(loop.state())
            labels = [each for each in ((step, 0), (step, 1)) if each >= least and self.oracle.digests[each] == state]
            assert labels, f"step {step} has other bits of {self.oracle.other(loop, step)}"
            assert run.user_state == {"read": 2 * step}
            self.found.append(labels[0])
            if step < STEPS and self.draw.random() < 0.2:
                loop.clamp()  # which the killed loop may not have come to
                assert loop.step() == self.oracle.losses[step]
                assert digest(loop.state()) == self.oracle.digests[step + 1, 1]


def folders_in(place: Path, count: int) -> list[Path]:
    """Under a folder of their own, which a log has as its root."""
    folders = [place / "drives" / f"drive-{index}" for index in range(count)]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


SEEDS = [(0, SHORT), *(pytest.param((seed, 63), marks=pytest.mark.slow) for seed in range(1, 5))]
ENGINES = ("io_uring", "threads", "aiofiles")
UPDATES = ("auto", "step", "deferred", "speculative")


@pytest.mark.parametrize("turn", SEEDS, ids=lambda turn: f"seed {turn[0]}")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", [Steady, Clamped])
def test_a_cut_training_goes_on_from_its_newest_step(place, oracles, kind, count, turn):
    seed, cuts = turn
    folders = folders_in(place, count)
    log = Log(place / "drives")
    with recorded(log):
        train(kind, folders, STEPS - 1, update=UPDATES[seed % 4], ram=("1MiB", "64MiB")[seed % 2])
    cut = Cuts(log, oracles[kind], kind, (kind.__name__, count, seed), (0, 0))
    cut.check(cuts, folders, [{}, {"ram": "64MiB"}, {"ram": "600KiB"}])
    assert len(set(cut.found)) > 1, cut.found


@dataclass(frozen=True)
class Recovery:
    """A run goes on from a step on the drives `before`, with `options` on the drives `after`, and is cut. `prepare` is what
    has become of the step by then."""

    before: tuple[int, ...] = (0,)
    after: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path, random.Random], None] = lambda folder, draw: None


def damage(folder: Path, draw: random.Random) -> None:
    """One copy of the newest record, or of the layout."""
    newest = Path(read_newest([str(folder)]).path).name
    path = folder / FOLDER / draw.choice([newest[:-1] + "a", newest[:-1] + "b", "layout-a", "layout-b"])
    content = bytearray(path.read_bytes())
    content[draw.randrange(200)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


RECOVERIES = {
    "as it lies": Recovery(),
    "in memory": Recovery(options={"ram": "64MiB"}),
    "a damaged copy": Recovery(prepare=damage),
    "two drives": Recovery((0, 1), (0, 1)),
    "another layout": Recovery(options={"ram": "600KiB"}),
    "one drive more": Recovery((0,), (0, 1)),
    "one drive less": Recovery((0, 1), (0,)),
    "without the first": Recovery((0, 1), (1,)),
}


@pytest.mark.parametrize("turn", SEEDS, ids=lambda turn: f"seed {turn[0]}")
@pytest.mark.parametrize("name", RECOVERIES)
def test_a_cut_recovery_loses_nothing(place, oracles, name, turn):
    recovery, (seed, cuts) = RECOVERIES[name], turn
    folders = folders_in(place, 2)
    before, after = ([folders[each] for each in its] for its in (recovery.before, recovery.after))
    train(Steady, before, BEFORE)
    recovery.prepare(before[0], random.Random(seed))
    log = Log(place / "drives")
    with recorded(log):
        train(Steady, after, STEPS - 1 - BEFORE, resume=True, **recovery.options)
    cut = Cuts(log, oracles[Steady], Steady, (name, seed), (BEFORE, 0))
    cut.check(cuts, after, [recovery.options, {}, {"nvme": before}])
    assert cuts == SHORT or len(set(cut.found)) > 1, cut.found
