"""A run that goes on from a step has the bits of one that was never interrupted, whatever it goes on with."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from drive_tools import folders_in
from resuming import Loop, differences, uninterrupted

import fuyou
from fuyou.core.errors import BudgetError, ConfigError, StateError, StoreError
from fuyou.tiers.folders import DATA, FOLDER, LAYOUTS, RECORDS
from fuyou.tiers.records import read_newest

STEPS = 7


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    return uninterrupted(STEPS)


def killed(run: fuyou.Run, nvme: Path, copy: Path) -> Path:
    """What a kill at this moment leaves on the drive."""
    run.settle()
    shutil.copytree(nvme, copy)
    return copy


def resumed(nvme: Any, steps: int, at: int, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    loop = Loop(options.pop("precision", "fp32"))
    with torch.no_grad():  # whatever the model holds is replaced
        for each in loop.model.parameters():
            each.fill_(3.0)
    with loop.wrapped(nvme, resume=options.pop("resume", True), **options) as run:
        assert run.committed_step == (at if options.get("durability") != "checkpoint" else 0)
        assert run.user_state == {"read": 2 * at}
        return loop.steps(steps), loop.state()


AGAIN = {
    "as it was": {},
    "all of it in memory": {"ram": "64MiB"},
    "less memory": {"ram": "600KiB"},
    "another engine": {"io": "threads"},
    "updates within step": {"update": "step"},
    "updates after it": {"update": "deferred"},
    "no commits": {"durability": "checkpoint"},
    "no commits, in memory": {"durability": "checkpoint", "ram": "64MiB"},
}


@pytest.mark.parametrize("first", [{}, {"ram": "64MiB"}], ids=["on the drive", "in memory"])
@pytest.mark.parametrize("again", AGAIN)
def test_a_resumed_run_has_the_bits_of_plain_pytorch(nvme, plain, first, again):
    loop = Loop()
    with loop.wrapped(nvme, **first) as run:
        losses = loop.steps(3)
        assert run.committed_step <= 3
    more, state = resumed(nvme, STEPS - 3, 3, **AGAIN[again])
    assert losses + more == plain[0] and differences(state, plain[1]) == []


@pytest.mark.parametrize("update", ["auto", "step", "deferred", "speculative"])
def test_bf16_goes_on_with_its_masters(nvme, update):
    losses, state = uninterrupted(STEPS, "bf16")
    loop = Loop("bf16")
    with loop.wrapped(nvme, update=update):
        first = loop.steps(3)
    second, _ = resumed(nvme, 2, 3, precision="bf16", update=update)
    third, found = resumed(nvme, 2, 5, precision="bf16", update=update, ram="64MiB")
    assert first + second + third == losses and differences(found, state) == []


@pytest.mark.parametrize(
    ("before", "after"), [((0,), (0, 1)), ((0, 1), (0,)), ((0, 1), (1,)), ((0, 1), (1, 0)), ((0,), (0,))]
)
def test_other_drives(nvme, plain, before, after):
    folders = folders_in(nvme, 2)
    loop = Loop()
    with loop.wrapped([folders[each] for each in before]):
        losses = loop.steps(3)
    more, state = resumed([folders[each] for each in after], STEPS - 3, 3)
    assert losses + more == plain[0] and differences(state, plain[1]) == []
    for each in set(before) - set(after):
        assert os.listdir(folders[each]) == []  # what nobody uses any more is gone
    assert not any((folder / "fuyou-moved-step").exists() for folder in folders)


def test_a_store_somewhere_else_is_gone_on_from_and_left_as_it_is(nvme, plain):
    here, there = folders_in(nvme, 2)
    loop = Loop()
    with loop.wrapped(there):
        losses = loop.steps(3)
    before = {path: path.read_bytes() for path in (there / FOLDER).iterdir()}
    for nvme_folder, ram in ((here, "1MiB"), (None, "64MiB")):
        durability = None if nvme_folder else "checkpoint"
        more, state = resumed(nvme_folder, STEPS - 3, 3, resume=str(there), ram=ram, durability=durability)
        assert losses + more == plain[0] and differences(state, plain[1]) == []
    assert before == {path: path.read_bytes() for path in (there / FOLDER).iterdir()}


def test_what_a_kill_leaves_is_gone_on_from_or_refused_and_never_lost_unasked(nvme, tmp_path, plain):
    loop = Loop()
    with loop.wrapped(nvme, ram="64MiB") as run:
        losses = loop.steps(3)
        left = killed(run, nvme, tmp_path / "left")
    with pytest.raises(StateError, match="holds step 3 of a run that did not end in order.*resume=True.*resume=False"):
        resumed(left, 1, 3, resume=None)
    more, state = resumed(left, STEPS - 3, 3)
    assert losses + more == plain[0] and differences(state, plain[1]) == []
    loop = Loop()
    with loop.wrapped(left) as run:  # that one ended in order: a new run may begin
        assert run.committed_step == 0 and loop.steps(1) == plain[0][:1]
        left = killed(run, left, tmp_path / "again")
    loop = Loop()
    with loop.wrapped(left, resume=False) as run:
        assert run.committed_step == 0 and loop.steps(1) == plain[0][:1]
    loop = Loop()
    with pytest.raises(LookupError), loop.wrapped(nvme, resume=False) as run:
        loop.steps(2)
        raise LookupError("the user's own")
    with pytest.raises(StateError, match="holds step 2"):
        resumed(nvme, 1, 2, resume=None)
    assert resumed(nvme, 1, 2)[0] == plain[0][2:3]


def test_without_a_step_a_run_that_is_to_resume_begins(nvme, plain):
    loop = Loop()
    with loop.wrapped(nvme, resume=True) as run:
        assert run.committed_step == 0 and run.user_state == {}
        assert loop.steps(2) == plain[0][:2]
        run.settle()
        assert run.committed_step == 2
    with pytest.raises(StoreError, match="no step to go on from"):
        resumed(nvme, 1, 0, resume=str(nvme.parent))


def test_every_step_is_committed_when_settle_returns_and_the_user_state_is_that_of_step(nvme):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        for step in range(1, 4):
            loop.step()
            run.user_state["later"] = step  # after step(): of the next one
            run.settle()
            assert run.committed_step == step
            payload = read_newest([str(nvme)]).payload
            assert payload["user_state"] == ({"read": 2 * step, "later": step - 1} if step > 1 else {"read": 2})


def test_what_the_loop_changes_between_step_and_the_next_forward_is_committed(nvme):
    """A schedule that waits for an evaluation, which is a forward itself."""

    def train(run: fuyou.Run | None, loop: Loop, schedule: Any, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(loop.step())
            loop.model.eval()
            with torch.no_grad():
                loss = loop.model(torch.arange(24).view(4, 6)).item()
                loop.model.layers[0][0].bias.add_(0.01)
            schedule.step(1.0)  # never better: the rate falls
            loop.model.train()
            losses.append(loss)
            if run is not None and len(losses) > 2:
                loop.model(torch.zeros(4, 6, dtype=torch.long))  # a forward that trains commits what was changed
                run.settle()
        return losses

    def made(loop: Loop) -> Any:
        loop.scheduled = False  # the other one sets the rate
        return torch.optim.lr_scheduler.ReduceLROnPlateau(loop.passed, factor=0.5, patience=0)

    oracle = Loop()
    oracle_schedule = made(oracle)
    expected = train(None, oracle, oracle_schedule, 2)
    oracle.model(torch.zeros(4, 6, dtype=torch.long))
    expected += train(None, oracle, oracle_schedule, 1)
    loop = Loop()
    schedule = made(loop)
    with loop.wrapped(nvme, ram="64MiB") as run:
        run.register("plateau", schedule)
        losses = train(run, loop, schedule, 2)
        left = killed(run, nvme, nvme.parent / "left")
    loop = Loop()
    schedule = made(loop)
    with loop.wrapped(left, resume=True) as run:
        run.register("plateau", schedule)
        loop.model(torch.zeros(4, 6, dtype=torch.long))  # which came after the step
        assert losses + train(None, loop, schedule, 1) == expected


def test_no_step_is_committed_before_the_loop_is_done_with_it(nvme, plain, monkeypatch):
    """Whatever happens within step(): after some of them the drives are measured, for which all is written."""
    loop = Loop()
    with loop.wrapped(nvme, ram="64MiB") as run:
        schedule, seen = type(loop.schedule).step, []

        def watched(self, *arguments) -> None:
            seen.append(run.committed_step < len(seen) + 1)  # of the steps before, if of any
            schedule(self, *arguments)

        monkeypatch.setattr(type(loop.schedule), "step", watched)
        assert loop.steps(STEPS) == plain[0]
        assert seen == [True] * STEPS and run.report().dict()["plan"]


def test_a_kill_after_another_layout_was_made_and_before_anything_is_registered_loses_nothing(nvme, tmp_path, plain):
    loop = Loop()
    with loop.wrapped(nvme):
        losses = loop.steps(3)
    other = Loop()
    config = fuyou.Config(resume=True)
    with fuyou.wrap(other.model, other.passed, nvme=nvme, ram="64MiB", gpu="256MiB", device="cpu", config=config):
        shutil.copytree(nvme, tmp_path / "left")
    more, state = resumed(tmp_path / "left", STEPS - 3, 3)
    assert losses + more == plain[0] and differences(state, plain[1]) == []


def test_registered_state_that_nobody_asks_for_is_told(nvme):
    loop = Loop()
    with loop.wrapped(nvme):
        loop.steps(1)
    loop = Loop()
    with fuyou.wrap(
        loop.model, loop.passed, nvme=nvme, ram="1MiB", gpu="256MiB", device="cpu", config=fuyou.Config(resume=True)
    ) as run:
        loop.optimizer = run.optimizer
        with pytest.warns(UserWarning, match="'schedule', 'rows', which was not registered"):
            loop.step()


def test_a_step_that_was_moved_has_what_nobody_registered_yet(nvme, plain):
    """Killed before `run.register`, the first run that goes on from it in another layout."""
    loop = Loop()
    with loop.wrapped(nvme):
        losses = loop.steps(3)
    other = Loop()
    with fuyou.wrap(
        other.model, other.passed, nvme=nvme, ram="600KiB", gpu="256MiB", device="cpu", config=fuyou.Config(resume=True)
    ) as run:
        left = killed(run, nvme, nvme.parent / "left")
    more, state = resumed(left, STEPS - 3, 3)
    assert losses + more == plain[0] and differences(state, plain[1]) == []


# --- refusals ---------------------------------------------------------------------------------------------------------


def wider(loop: Loop) -> None:
    loop.model.layers[2][0] = torch.nn.Linear(64, 96)
    loop.model.layers[2][3] = torch.nn.Linear(96, 64)


def deeper(loop: Loop) -> None:
    loop.model.extra = torch.nn.Linear(3, 3)


def untied(loop: Loop) -> None:
    loop.model.head.weight = torch.nn.Parameter(torch.zeros(61, 64))


def bf16(loop: Loop) -> None:
    loop.model.bfloat16()


def frozen(loop: Loop) -> None:
    loop.model.layers[0].requires_grad_(False)


def regrouped(loop: Loop) -> None:
    loop.passed.param_groups[1]["params"].insert(0, loop.passed.param_groups[0]["params"].pop())


OTHERS = {
    "shape": (wider, r"layers\.2\.0\.weight is \(192, 64\) there and \(96, 64\) here"),
    "missing": (deeper, r"it lacks extra\.weight, extra\.bias"),
    "tied": (untied, r"it lacks head\.weight"),
    "precision": (bf16, r"in float32, and this run has bfloat16.*precision that it began in"),
    "frozen": (frozen, r"optimizer state of layers\.0\.0\.weight.*requires_grad=True"),
    "groups": (regrouped, r"optimizer groups of \[7, 8\] parameters, and this optimizer has \[6, 9\]"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_model_is_refused_by_name_and_the_step_stays(nvme, what):
    loop = Loop()
    with loop.wrapped(nvme):
        losses = loop.steps(2)
    change, words = OTHERS[what]
    other = Loop()
    change(other)
    if what in ("shape", "missing", "tied"):
        other.passed = torch.optim.AdamW([each for each in other.model.parameters() if each.requires_grad], fused=True)
    with pytest.raises(ConfigError, match=words), other.wrapped(nvme, resume=True):
        pass
    assert len(losses) == 2 and resumed(nvme, 1, 2)[0]


class NoState:
    def state_dict(self) -> dict[str, Any]:
        return {"open": open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never")


def test_what_cannot_be_committed_is_refused_when_it_is_given(nvme):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        for name, obj, words in (
            ("rows", loop.rows, "another object has that name"),
            ("", loop.rows, "a string that is not empty"),
            ("x", object(), "no state_dict and no load_state_dict"),
            ("x", NoState(), r"The state of 'x'\['open'\] is a builtin_function_or_method"),
        ):
            with pytest.raises(ConfigError, match=words):
                run.register(name, obj)
        before = [each.detach().clone() for each in loop.model.parameters()]
        for value, words in (
            ({1: 2}, r"has the key 1"),
            ((1, 2), "is a tuple"),
            (float("nan"), "is nan"),
            (torch.zeros(1), "is a Tensor"),
            ("x" * 300_000, "holds 262144"),
        ):
            run.user_state["x"] = [value]
            with pytest.raises(ConfigError, match=words):
                loop.step()
            loop.optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
        del run.user_state["x"]
        loop.step()


def test_without_room_for_a_copy_another_layout_is_refused_and_the_step_stays(nvme, monkeypatch):
    loop = Loop()
    with loop.wrapped(nvme):
        loop.steps(2)
    usage, free = shutil.disk_usage, -(1 << 30)  # less than the old store leaves
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=free))  # a drive nearly full
    with pytest.raises(BudgetError) as refusal:
        resumed(nvme, 1, 2, ram="64MiB")
    free += refusal.value.shortfall_bytes * 20 // 19 + 8192  # enough for the store, and not for the copy
    with pytest.raises(BudgetError, match="Step 2 has another layout.*a copy of it must lie beside"):
        resumed(nvme, 1, 2, ram="64MiB")
    monkeypatch.undo()
    assert resumed(nvme, 1, 2, ram="64MiB")[0]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 50))])
def test_every_changed_byte_is_noticed_or_changes_nothing(nvme, tmp_path, seed, plain):
    """40 a seed: in records, in the layout, in the extents. What is resumed is the newest step, with its bits."""
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(3)
        left = killed(run, nvme, tmp_path / "left")
        expected = loop.state()
    draw = random.Random(seed)
    record = read_newest([str(left)])
    refused = 0
    for turn in range(40):
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        shutil.copytree(left, tmp_path / "again")
        name = draw.choice((*RECORDS, *LAYOUTS, *[DATA] * 6))
        path = tmp_path / "again" / FOLDER / name
        if name == DATA:
            row = draw.randrange(len(record.entries))
            part = draw.choice(record.parts(row))
            place = int(part["offset"]) + draw.randrange(int(part["nbytes"]))
        else:
            place = draw.randrange(min(path.stat().st_size, 40_000))
        with open(path, "r+b") as file:
            (byte,) = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << draw.randrange(8)]), place)
        other = Loop()
        ram = "1MiB" if turn % 2 else "64MiB"
        try:
            with other.wrapped(tmp_path / "again", resume=True, ram=ram) as run:
                assert run.committed_step == 3
                assert differences(other.state(), expected) == [], (name, place)
        except StoreError as error:
            assert name == DATA and "are not those that were committed" in str(error) and str(path) in str(error)
            refused += 1
    assert refused > 10


def test_a_damaged_copy_of_a_record_is_told_and_made_whole(nvme, tmp_path):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(2)
        left = killed(run, nvme, tmp_path / "left")
    newest = Path(read_newest([str(left)]).path)
    for name in (newest.name, "layout-a"):
        path = left / FOLDER / name
        whole = path.read_bytes()
        path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
        other = Loop()
        with other.wrapped(left, resume=True) as run:
            assert run.committed_step == 2 and any(str(path) in note for note in run.report().dict()["notes"])
            assert read_newest([str(left)]).problems == ()
