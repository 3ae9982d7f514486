"""Random programs of steps and actions, with guessed and deferred updates: plain PyTorch's bits, whatever comes when."""

from __future__ import annotations

import functools
import random

import pytest
from guess_actions import ACTIONS, GRADIENTS
from guess_steps import ENDINGS, WINDOWS, Program, Step
from guess_tools import PLACES, UPDATES, check

SEEDS = 200
STEPS = 14
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # a skipped first
# What would leave NaN behind for good; everything else may follow on everything else.
LEFT_OUT = {"inf", "nan"}
USUAL_ENDINGS = ("step", "skipped", "a scaler finds inf", "inf looked for by hand", "skipped, gradients kept")


ALL_ENDINGS = ("step",) * 3 + USUAL_ENDINGS + tuple(ENDINGS)
# A plain bf16 loop has no writes to weights or state that its masters would follow, and no zero_grad to zeros.
IN_BF16 = [*GRADIENTS, "p.sum()", "p.data", "exp_avg read", "lr", "lr there and back", "betas", "eps", "an eval forward",
           "the same batch again", "another batch", "a backward of some", "one more step()", "run.settle()"]  # fmt: skip
BF16_ENDINGS = ("step", "step", "step", "step, gradients kept", "skipped", "skipped, gradients kept", "two steps")


@functools.cache
def random_program(
    seed: int, actions: tuple[str, ...] = tuple(ACTIONS), endings: tuple[str, ...] = ALL_ENDINGS
) -> Program:
    """Mostly ordinary steps, so that predictions are right for a while; then any number of them fails at once."""
    chance = random.Random(seed)
    accumulation, clip = chance.choice((1, 1, 2, 3)), chance.choice((None, 1e6, 0.5))
    steps = []
    for _ in range(STEPS):
        if chance.random() < 0.12:
            accumulation = chance.choice((1, 2, 3))
        step = Step(accumulation, clip if chance.random() < 0.8 else chance.choice((None, 1e6, 0.05)))
        if chance.random() < 0.35:
            step = _disturbed(step, chance, actions, endings)
        steps.append(step)
    return Program(tuple(steps))


def _disturbed(step: Step, chance: random.Random, actions: tuple[str, ...], endings: tuple[str, ...]) -> Step:
    windows: dict[str, list[str]] = {name: [] for name in WINDOWS}
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        window = chance.choice(WINDOWS)
        known = [name for name in actions if name not in LEFT_OUT and not (window == "later" and name in GRADIENTS)]
        windows[window].append(chance.choice(known))
    return Step(
        step.accumulation,
        step.clip,
        ending=chance.choice(endings),
        **{name: tuple(each) for name, each in windows.items()},
    )


def place_of(seed: int) -> str:
    return (*PLACES, "nvme")[seed % 4]


@pytest.mark.parametrize("seed", range(12))
def test_programs(seed, nvme):
    check(random_program(seed), nvme, place_of(seed), update=UPDATES[seed % 3], durability="checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", range(12, SEEDS))
def test_more_programs(seed, update, nvme):
    check(random_program(seed), nvme, place_of(seed), update=update, durability="checkpoint")


def bf16_program(seed: int) -> Program:
    return random_program(5000 + seed, tuple(IN_BF16), BF16_ENDINGS)


@pytest.mark.parametrize("seed", range(3))
def test_bf16_programs(seed, nvme):
    update = UPDATES[seed % 3]
    check(bf16_program(seed), nvme, place_of(seed), update=update, precision="bf16", durability="checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", range(3, 60))
def test_more_bf16_programs(seed, update, nvme):
    check(bf16_program(seed), nvme, place_of(seed), update=update, precision="bf16", durability="checkpoint")


@pytest.mark.parametrize("seed", range(8))
def test_random_delays(seed, nvme):
    """Every operation in the background comes late by a time of its own, and what is given back is filled with NaN."""
    program, update = random_program(1000 + seed), UPDATES[(1 + seed) % 3]
    check(program, nvme, "nvme", update=update, durability=("checkpoint", "step")[seed % 2], debug_races=seed)


@pytest.mark.slow
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("seed", range(8, SEEDS))
def test_more_random_delays(seed, update, nvme):
    durability = ("checkpoint", "step")[seed % 2]
    check(
        random_program(1000 + seed), nvme, place_of(seed), update=update,
        durability=durability if place_of(seed) != "ram" else "checkpoint", debug_races=seed,
    )  # fmt: skip
