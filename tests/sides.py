"""Runs a script of a training loop twice, on plain PyTorch and on a wrapped model: both must see and leave the same.

A script takes a `Side` and returns what it saw. The fixture `compare` (conftest.py) runs it with state on NVMe and with
all in RAM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fuyou

Script = Callable[["Side"], Any]


class Side:
    """A model in training, plain or wrapped: what a script needs."""

    def __init__(self, case: models.Case, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        self.case = case
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.step = 0

    def backwards(self, accumulation: int = models.ACCUMULATION) -> list[float]:
        """The forwards and backwards of the next step; losses."""
        self.step += 1
        return models.accumulate(self.model, self.case, self.step, accumulation)

    def finish(self, *, clip: bool = True) -> list[float]:
        """The rest of the step; the norm."""
        norm = [torch.nn.utils.clip_grad_norm_(self.model.parameters(), models.CLIP).item()] if clip else []
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return norm

    def steps(self, count: int = 2, *, clip: bool = True) -> list[float]:
        return [value for _ in range(count) for value in self.backwards() + self.finish(clip=clip)]

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())


def started(name: str, prepare: Callable[[nn.Module], None] | None = None) -> tuple[models.Case, nn.Module, Any, Any]:
    case = models.CASES[name]
    model = case.model()
    if prepare is not None:
        prepare(model)
    optimizer = models.optimizer_of(models.groups_of(model))
    return case, model, optimizer, models.schedule_of(optimizer)


def same(left: Any, right: Any) -> bool:
    (lefts, tree), (rights, other) = pytree.tree_flatten(left), pytree.tree_flatten(right)
    return tree == other and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(lefts, rights, strict=True)
    )


SIDES = {  # every script runs with all of this
    "on NVMe, recompute": {"ram": "640KiB", "activations": "recompute"},
    "in RAM, keep": {"nvme": None, "ram": "64MiB", "activations": "keep"},
}


def compare_on(
    options: dict[str, Any],
    nvme: Path,
    script: Script,
    name: str = "gpt",
    prepare: Callable[[nn.Module], None] | None = None,
) -> Any:
    """Returns what the plain side saw."""
    options = {"nvme": nvme, **options}
    activations = options.pop("activations")
    case, oracle, optimizer, scheduler = started(name, prepare)
    seen = script(Side(case, oracle, optimizer, scheduler))
    case, model, optimizer, scheduler = started(name, prepare)
    config = fuyou.Config(activations=activations)
    with fuyou.wrap(model, optimizer, **options, gpu="1GiB", device="cpu", config=config) as run:
        found = script(Side(case, model, run.optimizer, scheduler))
        assert models.differing(model, models.values_of(oracle)) == []
    assert len(pytree.tree_leaves(seen)) > 0
    assert same(found, seen), _first_difference(found, seen)
    assert models.differing(model, models.values_of(oracle)) == []
    return seen


def compare_bf16(script: Script, nvme: Path, freeze: Callable[[nn.Module], None] | None = None) -> None:
    """As `compare_on`, against the plain loop with masters; they too must be the same in the end.

    `freeze`: what is frozen when it is wrapped, in weights that bf16 holds (a frozen weight has no master until it is
    unfrozen, and then its bf16 value is it); it is in the optimizer's groups all the same.
    """
    case, oracle = models.CASES["gpt"], models.CASES["gpt"].model()
    if freeze is not None:
        _round(oracle)
    plain = models.PlainBf16(oracle)
    if freeze is not None:
        freeze(oracle)
    seen = script(Side(case, oracle, plain, models.schedule_of(plain.inner)))
    case, model, optimizer, scheduler = started("gpt", _round if freeze is not None else None)
    if freeze is not None:
        freeze(model)
    with fuyou.wrap(
        model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu", config=fuyou.Config(precision="bf16")
    ) as run:
        found = script(Side(case, model, run.optimizer, scheduler))
        masters = [run.optimizer.state[each]["master"] for each in model.parameters()]
        assert same(masters, list(plain.masters.values()))
        assert models.differing(model, models.values_of(oracle)) == []
    assert same(found, seen), _first_difference(found, seen)


def _round(model: nn.Module) -> None:
    for each in model.parameters():
        each.data = each.data.bfloat16().float()


def _first_difference(found: Any, seen: Any) -> str:
    for (path, a), b in zip(pytree.tree_flatten_with_path(found)[0], pytree.tree_leaves(seen), strict=False):
        if not same(a, b):
            return f"first at {pytree.keystr(path)}: {a} is not {b}"
    return "of another structure"
