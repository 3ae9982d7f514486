"""Updates that are guessed in backward or deferred into the next forward, and whatever users do meanwhile: plain PyTorch's bits.

Predictions are learnt in ordinary steps and are right there; then one step does something else.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import guess_actions
import pytest
from guess_steps import ENDINGS, WINDOWS, Program, Step
from guess_tools import CASE, PLACES, UPDATES, check, updates_of, user_of, wrapped

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # a skipped first
PAIRS = [
    (action, window)
    for action in guess_actions.ACTIONS
    for window in WINDOWS
    if window != "later" or action not in guess_actions.GRADIENTS  # they are cleared then
]
# The default run takes two windows: before step(), and after it as late as the action means something.
MAIN = [
    (action, window)
    for action, window in PAIRS
    if window != "between" and (window, action in guess_actions.GRADIENTS) != ("after", False)
]
POISON = ("inf", "nan")
NEEDS = {"load_state_dict()": "state_dict() saved", "held grads changed": "grads held"}  # an earlier step does this
PLACED = list(itertools.product(PLACES, UPDATES))


def episode(number: int, accumulation: int = 1, **special: tuple[str, ...] | str) -> list[Step]:
    """An ordinary step, which the one before it was too; the special one; an ordinary one."""
    ordinary = Step(accumulation, clip=(None, 1e6)[number % 2])  # with the clip, gradients are scaled by 1
    change = functools.partial(dataclasses.replace, ordinary)
    actions = {each for value in special.values() if isinstance(value, tuple) for each in value}
    earlier = {"later" if "state" in each else "before": (NEEDS[each],) for each in actions if each in NEEDS}
    if actions.isdisjoint(POISON):
        return [change(first="restore", **earlier), change(**special), ordinary]
    return [
        change(first="restore"),
        change(first="keep"),
        ordinary,
        change(**special),
        ordinary,
        change(first="recall"),
    ]


def packed(share: int, of: int, accumulation: int) -> Program:
    """Every `of`-th pair and ending, each in an episode of its own, in one run."""
    specials: list[dict[str, Any]] = [{window: (action,)} for action, window in MAIN]
    specials += [{"ending": each} for each in ENDINGS if each != "step"]
    chosen = list(enumerate(specials))[share::of]
    return Program(tuple(step for number, each in chosen for step in episode(number // of // 8, accumulation, **each)))


@pytest.mark.parametrize(("place", "update"), PLACED)
def test_actions(place, update, nvme):
    """Each action in each window at one place and update; `-m slow` runs the product."""
    index = PLACED.index((place, update))
    check(packed(index, len(PLACED), 1 + (index % 4 == 0)), nvme, place, update=update, durability="checkpoint")


def test_actions_with_every_step_committed(nvme):
    check(packed(1, 8, 1), nvme, "nvme", update="speculative", durability="step")


SPECIALS = [*guess_actions.ACTIONS, *(each for each in ENDINGS if each != "step")]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("special", SPECIALS)
def test_every_action_everywhere(special, accumulation, nvme):
    """In every window, alone in its run, at every place, update and durability."""
    choices: list[dict[str, Any]] = [{window: (action,)} for action, window in PAIRS if action == special]
    programs = [
        Program(tuple([Step(accumulation)] * 2 + episode(number, accumulation, **each)))
        for number, each in enumerate(choices or [{"ending": special}])
    ]
    for number, (program, (place, update), durability) in enumerate(
        itertools.product(programs, PLACED, ("checkpoint", "step"))
    ):
        if durability == "step" and place == "ram":
            continue
        folder = nvme / str(number)
        folder.mkdir()
        check(program, folder, place, update=update, durability=durability)


# --- that guesses are made, and validated -------------------------------------------------------------------------


def counted(nvme: Path, place: str, update: str, *specials: Step) -> tuple[dict[str, int], dict[str, int]]:
    """What the counters grew by in four ordinary steps after learning; and in those `specials`, each then learnt from.

    Settled first: so that updates under way are counted with the steps that they belong to.
    """
    user = user_of(CASE)
    with wrapped(user, nvme, place, update=update) as run:

        def growth(steps: list[Step]) -> dict[str, int]:
            run.settle()
            before = updates_of(run)
            Program(tuple(steps))(user)
            run.settle()
            after = updates_of(run)
            return {name: after[name] - before[name] for name in ("guessed", "accepted", "dropped", "deferred")}

        growth([Step()] * 4)
        return growth([Step()] * 4), growth([each for special in specials for each in (special, Step(), Step())])


def test_right_guesses_are_accepted(nvme):
    steady, scaled_by_one = counted(nvme, "nvme", "speculative", Step(clip=1e6))
    for each in (steady, scaled_by_one):
        assert each["accepted"] > 0 and each["dropped"] == 0
        assert each["guessed"] == each["accepted"]


WRONG = {
    "lr": Step(before=("lr",)),
    "weight_decay": Step(before=("weight_decay",)),
    "clipped": Step(clip=0.01),
    "one more backward": Step(accumulation=3),
    "skipped": Step(ending="skipped"),
    "found inf": Step(ending="a scaler finds inf"),
    "gradient replaced": Step(before=("grad = plain tensor",)),
    "gradients cleared": Step(before=("zero_grad()",)),
    "weights written": Step(before=("p.mul_",)),
    "state written": Step(before=("exp_avg.mul_",)),
}


@pytest.mark.parametrize("how", WRONG)
def test_wrong_guesses_are_dropped(how, nvme):
    steady, special = counted(nvme, "nvme", "speculative", WRONG[how])
    assert steady["dropped"] == 0 < steady["guessed"]
    assert special["dropped"] > 0
    assert special["guessed"] == special["accepted"] + special["dropped"]


def test_nothing_is_guessed_that_was_not_asked_for(nvme):
    grown = {}
    for update in ("step", "deferred", "speculative", "auto"):
        folder = nvme / update
        folder.mkdir()
        grown[update], _ = counted(folder, "nvme", update)
    assert set(grown["step"].values()) == {0}
    assert grown["deferred"]["guessed"] == grown["deferred"]["accepted"] == grown["deferred"]["dropped"] == 0
    for update in ("speculative", "auto"):  # every chunk's update is a guess that was right, or deferred
        assert grown[update]["accepted"] + grown[update]["deferred"] == grown["deferred"]["deferred"] > 0
