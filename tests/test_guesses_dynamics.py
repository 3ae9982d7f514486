"""Models that call their blocks otherwise from step to step, with guessed and deferred updates: plain PyTorch's bits.

What a forward does is part of its batch, a `Route`; a script of batches makes a kind of model.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import models
import pytest
import torch
from guess_tools import PLACES, UPDATES, User, check
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, HIDDEN = 12, 192  # a block of 4,800 parameters: two of the planner's smallest chunks
BLOCKS, EXPERTS = 4, 3
ALL = tuple(range(BLOCKS))


@dataclasses.dataclass(frozen=True)
class Route:
    """Blocks in the order in which they are called, experts that get tokens, rows; and how blocks are checkpointed."""

    order: tuple[int, ...] = ALL
    experts: tuple[int, ...] = (0, 1, 2)
    rows: int = 6
    reentrant: bool | None = None  # None: not checkpointed


class Mixture(nn.Module):
    """A dense layer, and beside it one expert for each token."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(experts))

    def forward(self, x: torch.Tensor, chosen: tuple[int, ...]) -> torch.Tensor:
        y = x + functional.dropout(self.down(torch.tanh(self.up(x))), 0.1, self.training)
        if len(self.experts) == 0:
            return y
        token = torch.arange(len(x)) % len(chosen)
        for number, expert in enumerate(chosen):
            y = y.index_add(0, (token == number).nonzero()[:, 0], self.experts[expert](x[token == number]))
        return y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Mixture(EXPERTS if number == 1 else 0) for number in ALL)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, route: Route) -> torch.Tensor:
        x = self.first(x)
        for number in route.order:
            layer = self.layers[number]
            if route.reentrant is None:
                x = layer(x, route.experts)
            else:
                x = checkpoint(layer, x, route.experts, use_reentrant=route.reentrant)
        return functional.linear(self.norm(x), self.first.weight).square().mean()  # tied by hand


def forward(user: User, index: int, route: Route) -> torch.Tensor:
    torch.manual_seed(index)
    return user.model(torch.randn(route.rows, WIDTH), route)


CASE = models.Case(Routed, lambda index: {})
DROPPED = [
    tuple(b for b in ALL if random.Random(seed).random() > 0.3 or b == 0 or (b * 7 + seed) % 3) for seed in range(16)
]
# kind → the route of each step's backwards; a step of two routes accumulates
KINDS: dict[str, list[tuple[Route, ...]]] = {
    "an expert without a token": [
        (Route(experts=each),) for each in ((0, 1, 2), (0, 1, 2), (0, 1), (0, 1), (2,), (1, 2), (0, 1, 2), (0,), (0, 1))
    ],
    "layer drop": [(Route(order=DROPPED[2 * n]), Route(order=DROPPED[2 * n + 1])) for n in range(8)],
    "a block called twice": [(Route(order=each),) for each in (ALL, ALL, (0, 1, 1, 2, 3), (0, 1, 2, 3, 0), ALL, ALL, (2, 2), ALL)],
    "a block not called for a while": [(Route(order=each),) for each in (ALL, ALL, ALL, *[(0, 1, 3)] * 3, ALL, (1,), ALL)],
    "a block called late for the first time": [(Route(order=each),) for each in (*[(0, 1, 3)] * 3, ALL, ALL, (0, 1, 3), ALL)],
    "early exit": [(Route(order=ALL[:depth]),) for depth in (4, 4, 2, 3, 4, 1, 4, 4, 0, 4)],
    "out of turn": [(Route(order=each),) for each in (ALL, ALL, ALL[::-1], ALL, (2, 0, 3, 1), ALL, ALL[::-1], ALL[::-1])],
    "alternating shapes": [(Route(rows=rows),) for rows in (6, 6, 17, 3, 6, 40, 3, 3)],
    "a second backward reaches other blocks": [
        (Route(), Route(order=each)) for each in (ALL, ALL, (0,), (1, 3), ALL, (3,), (2, 0), ALL)
    ],
    "more backwards than last time": [(Route(),) * count for count in (2, 2, 3, 1, 2, 2, 4, 2)],
    "the user's checkpointing": [(Route(reentrant=False), Route(reentrant=False))] * 5,
    "the user's reentrant checkpointing": [(Route(reentrant=True), Route())] * 5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Loop:
    """Trains a kind. `zeros`: gradients are zeroed, not dropped, so that what no backward reached is updated all the same.
    `evaluate`: eval forwards by other routes between the backwards of a step, before and after `step()`."""

    kind: str
    zeros: bool = False
    evaluate: bool = False
    clip: float | None = None

    def __call__(self, user: User) -> dict[str, Any]:
        return {f"{step} {routes}": self._step(user, step, routes) for step, routes in enumerate(KINDS[self.kind])}

    def _step(self, user: User, step: int, routes: tuple[Route, ...]) -> list[Any]:
        seen: list[Any] = []
        for micro, route in enumerate(routes):
            loss = forward(user, 100 * step + micro, route) / len(routes)
            loss.backward()
            seen.append(loss.item())
            seen += self._evaluated(user, step, Route(order=ALL[step % BLOCKS :]))
        if self.clip is not None:
            seen.append(torch.nn.utils.clip_grad_norm_(user.model.parameters(), self.clip).item())
        user.optimizer.step()
        seen += self._evaluated(user, step, Route(order=(3,), rows=2)) if step % 3 == 1 else []
        user.scheduler.step()
        user.optimizer.zero_grad(set_to_none=not self.zeros)
        return seen

    def _evaluated(self, user: User, step: int, route: Route) -> list[Any]:
        if not self.evaluate:
            return []
        user.model.eval()
        with torch.inference_mode() if step % 2 else torch.no_grad():
            seen = [forward(user, 5, route).item()]
        user.model.train()
        return seen


PLACED = list(itertools.product(PLACES, UPDATES))


def loops(kind: str) -> list[Loop]:
    return [
        Loop(kind),
        Loop(kind, zeros=True, clip=1e6),
        Loop(kind, evaluate=True),
        Loop(kind, evaluate=True, clip=0.05),
    ]


@pytest.mark.parametrize(("kind", "turn"), list(itertools.product(KINDS, range(2))))
def test_dynamic_models(kind, turn, nvme):
    """Each kind at two places and updates; `-m slow` runs the product."""
    number = list(KINDS).index(kind) + 5 * turn
    place, update = PLACED[(4 * number) % len(PLACED)]
    check(loops(kind)[(number + turn) % 4], nvme, place, CASE, update=update, durability="checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "update"), PLACED)
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_models_everywhere(kind, place, update, nvme):
    for number, loop in enumerate(loops(kind)):
        folder = nvme / str(number)
        folder.mkdir()
        durability = "step" if number % 2 and place != "ram" else "checkpoint"
        activations = ("recompute", "keep")[number // 2]
        check(loop, folder, place, CASE, update=update, durability=durability, activations=activations)


def generating(user: User) -> dict[str, Any]:
    """generate() between backward and step, and before the next forward."""
    seen: dict[str, Any] = {}

    def generate() -> torch.Tensor:
        user.model.eval()
        tokens = user.model.generate(user.case.batch(7)["input_ids"][:, :4], max_new_tokens=3, do_sample=False)
        user.model.train()
        return tokens

    for step in range(5):
        seen[f"loss {step}"] = user.backward(step)
        seen[f"before {step}"] = generate() if step == 3 else None
        user.optimizer.step()
        user.optimizer.zero_grad()
        seen[f"after {step}"] = generate() if step in (2, 3) else None
    return seen


@pytest.mark.parametrize("update", UPDATES[:2])
def test_generate_between(update, nvme):
    check(generating, nvme, "nvme", models.CASES["llama"], update=update, durability="checkpoint")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "update"), PLACED)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_generate_between_everywhere(name, place, update, nvme):
    check(generating, nvme, place, models.CASES[name], update=update, durability="checkpoint")
