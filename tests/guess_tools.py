"""A small model trained plain and wrapped: what tests of guessed and deferred updates share.

A script takes a `User` and returns what it saw. Both sides run it; everything that the user saw, the weights, the
optimizer's state and its hyperparameters must be the same bits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from sides import Side
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import fuyou
from fuyou.core.errors import BudgetError

WIDTH, WORDS, WIDE = 12, 40, 400
PLACES = {"nvme": 0.0, "between": 7.0, "ram": None}  # host memory beyond streaming, bytes a parameter; None: no drive
UPDATES = ("deferred", "speculative", "auto")


class Feed(nn.Module):
    """A residual layer with dropout; the wide one has 10,000 parameters: three of the planner's smallest chunks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden, bias=hidden == WIDE), nn.Linear(hidden, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + functional.dropout(self.down(functional.gelu(self.up(x))), 0.1, self.training)


class Tiny(nn.Module):
    """A tied head, a parameter that the model itself owns, a small layer and a wide one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(Feed(hidden) for hidden in (WIDTH, WIDE))
        self.head = nn.Linear(WIDTH, WORDS)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.scale
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def batch(index: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(WORDS, (2, 5), generator=torch.Generator().manual_seed(index))
    return {"tokens": tokens, "labels": tokens.roll(-1, 1)}


CASE = models.Case(Tiny, batch)


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Another learning rate at every step, for as many steps as a program has."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1.0, 0.7, 1.3, 0.9)[step % 4])


# --- a side -------------------------------------------------------------------------------------------------------


class User(Side):
    """A Side whose steps are taken apart. `run` is the wrapped side's, None in plain PyTorch."""

    run: fuyou.Run | None = None
    folder: Path | None = None

    def begin(self) -> None:
        """Remember how groups are, for `restore`."""
        self.kept: dict[str, Any] = {}  # what actions leave for later ones
        self.groups = [{**group, "params": list(group["params"])} for group in self.optimizer.param_groups]

    def restore(self) -> None:
        """Groups, frozen parameters and the model's mode as they were at first; nothing that costs a read."""
        del self.optimizer.param_groups[len(self.groups) :]
        for group, first in zip(self.optimizer.param_groups, self.groups, strict=True):
            group.update({**first, "params": list(first["params"])})
        self.scheduler = schedule_of(self.optimizer)
        self.model.requires_grad_(True).train()

    def keep(self) -> None:
        """Copies of weights and state, for `recall`."""
        self.kept["all"] = copy.deepcopy((models.values_of(self.model), self.optimizer.state_dict()))

    def recall(self) -> None:
        weights, state = self.kept.pop("all")
        with torch.no_grad():
            for name, each in self.named():
                each.copy_(weights[name])
        self.optimizer.load_state_dict(state)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def graded(self) -> list[nn.Parameter]:
        return [each for each in self.parameters() if each.grad is not None]

    def loss(self, index: int) -> torch.Tensor:
        torch.manual_seed(index)
        return models.loss_of(self.model, self.case.batch(index))

    def backward(self, index: int, share: int = 1) -> float:
        loss = self.loss(index) / share
        loss.backward()
        return loss.item()


def copied(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda each: each.detach().clone(), value)


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Name → a parameter's state, and the groups' hyperparameters."""
    state = {name: copied(dict(optimizer.state.get(each, {}))) for name, each in model.named_parameters()}
    groups = [{**dict(sorted(group.items())), "params": len(group["params"])} for group in optimizer.param_groups]
    return {"state": state, "groups": groups}


# --- the same on both sides ---------------------------------------------------------------------------------------


def identical(a: Any, b: Any) -> bool:
    """The same bits, signs of zeros included; any NaN is any other."""
    if isinstance(a, float) and isinstance(b, float):
        a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = (a == b) & (torch.signbit(a) == torch.signbit(b))
    return bool((same | (torch.isnan(a) & torch.isnan(b))).all())


def check_same(found: Any, expected: Any) -> None:
    left, right = pytree.tree_flatten_with_path(found)[0], pytree.tree_flatten_with_path(expected)[0]
    steps = list(found)
    for (path, a), (other, b) in zip(left, right, strict=False):
        assert path == other, f"{pytree.keystr(path)} is where {pytree.keystr(other)} should be"
        if not identical(a, b):
            before = steps[: steps.index(path[0].key) + 1][-7:]
            pytest.fail(f"first at {pytree.keystr(path)}: {a} is not {b}; the last steps: {' | '.join(before)}")
    assert len(left) == len(right)


@dataclasses.dataclass
class Trained:
    """What a side saw, and what it left."""

    seen: dict[str, Any]
    values: dict[str, torch.Tensor]
    state: dict[str, Any]


class PlainBf16(models.PlainBf16):
    """With the groups and the state that a user sees: of the model's parameters, beside their masters."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> dict[nn.Parameter, dict[str, torch.Tensor]]:
        kept = {copy: self.inner.state.get(master, {}) for copy, master in self.masters.items()}
        return {copy: {**state, "master": self.masters[copy]} for copy, state in kept.items() if state}


def user_of(case: models.Case, bf16: bool = False) -> User:
    """A plain one, whose matrices decay and whose other parameters learn faster; `bf16`: against masters in fp32."""
    model = case.model()
    optimizer: Any
    if bf16:
        optimizer = PlainBf16(model)
        user = User(case, model, optimizer, schedule_of(optimizer.inner))
    else:
        optimizer = models.optimizer_of(models.groups_of(model))
        user = User(case, model, optimizer, schedule_of(optimizer))
    user.begin()
    return user


Script = Callable[[User], dict[str, Any]]


@functools.lru_cache(maxsize=64)
def plain(script: Script, case: models.Case, bf16: bool) -> Trained:
    user = user_of(case, bf16)
    seen = script(user)
    return Trained(seen, models.values_of(user.model), state_of(user.optimizer, user.model))


@functools.cache
def least_ram_bytes(case: models.Case) -> int:
    """The host memory that streaming this model takes, as wrap says when it refuses less."""
    user = user_of(case)
    with pytest.raises(BudgetError) as refused:
        fuyou.wrap(user.model, user.optimizer, nvme=Path.home(), ram=1, gpu="1GiB", device="cpu")
    return refused.value.needed_bytes


@contextlib.contextmanager
def wrapped(user: User, nvme: Path, place: str, **options: Any) -> Any:
    """The user goes on with a wrapped model; `options` are Config's."""
    share = PLACES[place]
    folder, ram = (None, 64 * 2**20) if share is None else (nvme, None)
    if share is not None:
        count = sum(each.numel() for each in user.model.parameters())
        ram = least_ram_bytes(user.case) + int(share * count)
    config = fuyou.Config(**options)
    with fuyou.wrap(user.model, user.optimizer, folder, ram=ram, gpu="1GiB", device="cpu", config=config) as run:
        user.run, user.optimizer, user.folder = run, run.optimizer, nvme
        yield run


def check(script: Script, nvme: Path, place: str, case: models.Case = CASE, **options: Any) -> dict[str, Any]:
    """Both sides run it and are the same, while it is wrapped and after; the wrapped side's report."""
    bf16 = options.get("precision") == "bf16"
    expected = plain(script, case, bf16)
    user = user_of(case)
    passed = user.optimizer
    with wrapped(user, nvme, place, **options) as run:
        assert len(expected.seen) > 0
        check_same(script(user), expected.seen)
        check_same(models.values_of(user.model), expected.values)
        check_same(state_of(user.optimizer, user.model), expected.state)
        report = run.report().dict()
    check_same(models.values_of(user.model), expected.values)  # given back by close()
    if not bf16:  # masters are given back among it
        check_same(state_of(passed, user.model), expected.state)
    return copy.deepcopy(report)


def updates_of(run: fuyou.Run) -> dict[str, int]:
    """Chunks since the run began: guessed, accepted, dropped, deferred."""
    return dict(run.report().dict()["updates"])
