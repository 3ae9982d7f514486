"""Training with fuyou is training with plain PyTorch, bit for bit: models, tiers, I/O backends, precisions.

The oracle is a plain loop with torch's fused optimizer on the same seeds (tests/models.py).
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

import fuyou
from fuyou.core.errors import BudgetError, ConfigError
from fuyou.tiers.io import open_engine

GPU = "1GiB"
IO = ("io_uring", "threads", "aiofiles")
ALL = {"weights", "gradients", "optimizer"}
# place → (host memory in bytes a parameter beyond what streaming takes, None without a folder; what lies on the host;
# what lies on NVMe). In fp32 a chunk takes 16 bytes a parameter, in bf16 14, and is on one of the two with all its kinds.
PLACES: dict[str, tuple[float | None, set[str], set[str]]] = {
    "nvme": (0, set(), ALL),
    "a third on the host": (6, ALL, ALL),
    "most on the host": (14, ALL, ALL),
    "ram": (None, ALL, set()),
}


def matrix() -> list[tuple[str, str, str, bool, str]]:
    """(model, place, io, clip, activations): every pair of values that can meet meets; checked below."""
    rows = []
    names = [name for name in models.CASES if name != "wide"]
    for number, name in enumerate(names):
        for index, place in enumerate(("nvme", "a third on the host", "most on the host", "ram")):
            io = "none" if place == "ram" else IO[(number + index) % 3]
            clip = (number + number // 2 + index) % 2 == 0
            activations = ("recompute", "keep")[(number // 3 + index) % 2]
            rows.append((name, place, io, clip, activations))
    return rows


def test_the_matrix_has_all_pairs():
    rows = matrix()
    for left, right in itertools.combinations(range(5), 2):
        seen = {(row[left], row[right]) for row in rows}
        product = set(itertools.product({row[left] for row in rows}, {row[right] for row in rows}))
        if (left, right) == (1, 2):  # without NVMe there is no I/O
            product = {(place, io) for place, io in product if (place == "ram") == (io == "none")}
        assert product == seen, (left, right)


@functools.cache
def plain(
    name: str, clip: bool, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, steps: int = models.STEPS
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses and norms, parameters) of plain PyTorch."""
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model), kind)
    seen = models.train(model, optimizer, models.schedule_of(optimizer), case, clip=clip, steps=range(steps))
    return seen, models.values_of(model)


def wrapped(
    model: nn.Module, optimizer: torch.optim.Optimizer, place: str, folder: Path, io: str = "auto", **options: Any
) -> fuyou.Run:
    """A run whose state lies where `place` says, by its budgets."""
    config = fuyou.Config(**options, **({} if io in ("none", "auto") else {"io": io}))
    if io not in ("none", "auto"):
        try:
            open_engine(io).close()
        except (ConfigError, OSError, ImportError) as error:
            pytest.skip(f"no {io} engine on this machine: {error}")
    share = PLACES[place][0]
    if share is None:
        return fuyou.wrap(model, optimizer, ram="2GiB", gpu=GPU, device="cpu", config=config)
    if config.precision == "bf16" or next(model.parameters()).dtype is torch.bfloat16:
        share *= 14 / 16
    with pytest.raises(BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme=folder, ram=1, gpu=GPU, device="cpu", config=config)
    ram = refused.value.needed_bytes + int(share * sum(each.numel() for each in model.parameters()))
    return fuyou.wrap(model, optimizer, nvme=folder, ram=ram, gpu=GPU, device="cpu", config=config)


def check_place(run: fuyou.Run, place: str) -> None:
    tiers = run.report().dict()["tiers"]
    host, drive = ({kind for kind in ALL if tiers[tier]["by_category"][kind]} for tier in ("host", "nvme"))
    _, on_host, on_drive = PLACES[place]
    assert (host, drive) == (on_host, on_drive)


@pytest.mark.parametrize(("name", "place", "io", "clip", "activations"), matrix())
def test_equal_to_plain_pytorch(name, place, io, clip, activations, nvme):
    seen, expected = plain(name, clip)
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    with wrapped(model, optimizer, place, nvme, io, activations=activations) as run:
        losses = models.train(model, run.optimizer, scheduler, case, clip=clip)
        check_place(run, place)
        if io != "none":
            assert run.report().dict()["engine"]["io"] == io
        while_wrapped = models.differing(model, expected)
    assert losses == seen
    assert while_wrapped == []
    assert models.differing(model, expected) == []  # given back by close()


def test_adam_decays_by_its_own_formula(nvme):
    seen, expected = plain("gpt", True, torch.optim.Adam)
    assert seen != plain("gpt", True)[0]
    case = models.CASES["gpt"]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model), torch.optim.Adam)
    scheduler = models.schedule_of(optimizer)
    with wrapped(model, optimizer, "most on the host", nvme) as run:
        assert models.train(model, run.optimizer, scheduler, case, clip=True) == seen
        assert models.differing(model, expected) == []


@pytest.mark.parametrize("place", ["ram", pytest.param("a third on the host", marks=pytest.mark.slow)])
def test_a_parameter_of_25_million_elements_and_one_of_1237(place, nvme):
    seen, expected = plain("wide", True, steps=2)
    case = models.CASES["wide"]
    model = case.model()
    assert {each.numel() for each in model.parameters()} >= {25_009_997, 1237}
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    with wrapped(model, optimizer, place, nvme) as run:
        assert models.train(model, run.optimizer, scheduler, case, clip=True, steps=range(2)) == seen
        check_place(run, place)
        assert models.differing(model, expected) == []


def test_frozen_layers_and_parameters_left_out_of_the_optimizer(nvme):
    case = models.CASES["gpt"]

    def make() -> tuple[nn.Module, list[dict[str, Any]]]:
        model = case.model()
        model.layers[0].requires_grad_(False)
        model.layers[1].qkv.bias.requires_grad_(False)
        groups = models.groups_of(model)
        left_out = {id(model.scale), id(model.layers[1].out.weight)}  # trained by nobody, but part of the norm
        for group in groups:
            group["params"] = [each for each in group["params"] if id(each) not in left_out]
        return model, groups

    oracle, groups = make()
    optimizer = models.optimizer_of(groups)

    def loop(model, optimizer, scheduler):
        seen = []
        for step in range(4):
            seen += models.train(model, optimizer, scheduler, case, clip=True, steps=[step])
            seen += [model.scale.grad.sum().item()]  # nobody clears it: it goes on growing
        return seen

    seen = loop(oracle, optimizer, models.schedule_of(optimizer))
    model, groups = make()
    optimizer = models.optimizer_of(groups)
    scheduler = models.schedule_of(optimizer)
    with wrapped(model, optimizer, "nvme", nvme) as run:
        assert loop(model, run.optimizer, scheduler) == seen
        assert models.differing(model, models.values_of(oracle)) == []
        assert model.layers[0].qkv.weight.grad is None
        assert torch.equal(model.scale.grad, oracle.scale.grad)


# --- bf16 ---------------------------------------------------------------------------------------------------------

BF16 = [
    # model, given in bf16 (else fp32 with Config(precision="bf16")), place, clip, activations
    ("gpt", True, "nvme", True, "recompute"),
    ("gpt", False, "most on the host", False, "keep"),
    ("llama", True, "a third on the host", True, "keep"),
    ("gpt2", False, "ram", True, "recompute"),
    ("t5", False, "nvme", True, "keep"),
    ("bert", True, "ram", False, "keep"),
    ("mixtral", True, "nvme", False, "recompute"),
]


@pytest.mark.parametrize(("name", "given_bf16", "place", "clip", "activations"), BF16)
def test_bf16_equal_to_a_plain_loop_with_fp32_masters(name, given_bf16, place, clip, activations, nvme):
    case = models.CASES[name]

    def make() -> nn.Module:
        model = case.model()
        if given_bf16:
            for each in model.parameters():
                each.data = each.data.bfloat16()
        return model

    oracle = make()
    plain = models.PlainBf16(oracle)
    seen = models.train(oracle, plain, models.schedule_of(plain.inner), case, clip=clip)

    model = make()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    precision = None if given_bf16 else "bf16"
    with wrapped(model, optimizer, place, nvme, activations=activations, precision=precision) as run:
        assert models.train(model, run.optimizer, scheduler, case, clip=clip) == seen
        assert models.differing(model, models.values_of(oracle)) == []
        for copy, (other, master) in zip(model.parameters(), plain.masters.items(), strict=True):
            assert copy.dtype == other.dtype == torch.bfloat16
            state = run.optimizer.state[copy]
            assert torch.equal(state["master"], master)
            for kind in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state[kind], plain.inner.state[master][kind]), kind
            assert state["step"] == plain.inner.state[master]["step"]
