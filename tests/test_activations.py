"""Activations that leave the device: what comes back is what was saved, and no tier holds more than it may.

The oracle is plain PyTorch on the same seeds (tests/models.py). The models are small, so the size from which a storage is
worth moving is set to one byte: everything moves that can.
"""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fuyou
from fuyou.swap import stash
from fuyou.swap.placement import PLACEMENTS, Placement

GPU = "1GiB"
MODES = {
    "host": Placement("host"),
    "nvme": Placement("nvme"),
    "recompute, inputs on the host": Placement("recompute", "host"),
    "recompute, inputs on NVMe": Placement("recompute", "nvme"),
    "recompute, some results kept": Placement("recompute", results=((0, "device"), (3, "device"))),
    "recompute, inputs and results on three tiers": Placement(
        "recompute", "host", ((0, "nvme"), (1, "host"), (3, "nvme"), (4, "device"))
    ),
}


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch):
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)


@contextlib.contextmanager
def placed(placement: Placement, monkeypatch) -> Any:
    """A config whose blocks all have this placement, whether the public names have it or not."""
    name = "nvme" if "nvme" in (placement.saved, placement.inputs) else "host"  # the tiers that are planned for
    monkeypatch.setitem(PLACEMENTS, name, placement)
    yield name


def oracle(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    seen = models.train(model, optimizer, models.schedule_of(optimizer), case, clip=True)
    return seen, models.values_of(model)


def check_equal(
    name: str, mode: str, nvme: Path | None, monkeypatch, ram: str = "4MiB", **options: Any
) -> fuyou.Report:
    seen, expected = oracle(name)
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    with placed(MODES[mode], monkeypatch) as public:
        config = fuyou.Config(activations=public, **options)
        with fuyou.wrap(model, optimizer, nvme, ram=ram, gpu=GPU, device="cpu", config=config) as run:
            assert models.train(model, run.optimizer, scheduler, case, clip=True) == seen
            report = run.report()
            assert models.differing(model, expected) == []
            assert run._ledger.held("device", "activations") == 0
            assert run._ledger.held("host", "activations") == 0
    return report


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in models.CASES if name != "wide"])
def test_equal_to_plain_pytorch(name, mode, nvme, monkeypatch):
    report = check_equal(name, mode, nvme, monkeypatch).dict()
    tiers = {MODES[mode].saved, MODES[mode].inputs, *(tier for _, tier in MODES[mode].results)} & {"host", "nvme"}
    for tier in tiers:
        assert report["tiers"][tier]["by_category"]["activations"] > 0


@pytest.mark.parametrize("mode", ["host", "recompute, inputs on the host"])
@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_equal_without_a_drive(name, mode, monkeypatch):
    report = check_equal(name, mode, None, monkeypatch, ram="64MiB").dict()
    assert report["tiers"]["host"]["by_category"]["activations"] > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", MODES)
def test_equal_under_random_delays(mode, seed, nvme, monkeypatch):
    check_equal("gpt", mode, nvme, monkeypatch, debug_races=seed)


# --- what a block may do ------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """x · sin(x), with a tensor saved that is neither an input nor an output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        sine = x.sin()
        ctx.save_for_backward(x, sine)
        return x * sine

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        x, sine = ctx.saved_tensors
        return gradient * (sine + x * x.cos())


class Odd(nn.Module):
    """Saves one tensor many times, in views; changes a matmul's result in place; has a custom function."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.register_buffer("mask", torch.rand(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu_()
        a, b, c = y.chunk(3, -1)
        z = a * b + b * c + c.t().contiguous().t() * a + y[:, : x.shape[1]].exp()
        z = torch.nn.functional.dropout(Double.apply(z), 0.2, self.training) * self.mask
        return x + self.second(torch.cat([z, a, b], -1)) * x


class Inner(nn.Module):
    """A block with the user's own checkpoint inside."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.odd, self.other, self.reentrant = Odd(), nn.Linear(24, 24), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.odd, torch.tanh(self.other(x)), use_reentrant=self.reentrant) + x


class Stack(nn.Module):
    def __init__(self, make: Any, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Cast(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def both_ways(make: Any, loop: Any, mode: str, nvme: Path, monkeypatch, **options: Any) -> None:
    """`loop(model, optimizer)` sees the same on a plain and on a wrapped model."""
    plain = make()
    seen = loop(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True))
    model = make()
    with placed(MODES[mode], monkeypatch) as public:
        config = fuyou.Config(activations=public, **options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        with fuyou.wrap(model, optimizer, nvme, ram="4MiB", gpu=GPU, device="cpu", config=config) as run:
            found = loop(model, run.optimizer)
            assert run._ledger.held("device", "activations") == 0
            assert run._ledger.held("host", "activations") == 0
    assert len(found) == len(seen) > 0
    for index, (a, b) in enumerate(zip(found, seen, strict=True)):
        assert torch.equal(a, b), index


def steps(model: nn.Module, optimizer: Any, backward: Any = lambda loss: loss.backward(), count: int = 3) -> list[Any]:
    seen = []
    for step in range(count):
        torch.manual_seed(step)
        loss = model(torch.randn(17, 24, requires_grad=True)).square().mean()
        backward(loss)
        seen += [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen + [each.detach().clone() for each in model.parameters()]


@pytest.mark.parametrize("mode", MODES)
def test_views_in_place_changes_and_custom_functions(mode, nvme, monkeypatch):
    both_ways(lambda: Stack(Odd), steps, mode, nvme, monkeypatch, debug_races=1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["host", "nvme", "recompute, inputs on NVMe"])
def test_the_users_own_checkpoint_inside(mode, reentrant, nvme, monkeypatch):
    both_ways(lambda: Stack(lambda: Inner(reentrant)), steps, mode, nvme, monkeypatch, debug_races=2)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, nvme, monkeypatch):
    both_ways(lambda: Cast(Odd), steps, mode, nvme, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_that_is_retained_is_differentiated_twice(mode, nvme, monkeypatch):
    def twice(loss):
        loss.backward(retain_graph=True)
        loss.backward()

    both_ways(lambda: Stack(Odd), lambda *sides: steps(*sides, twice), mode, nvme, monkeypatch, debug_races=3)


@pytest.mark.parametrize("mode", ["host", "nvme"])
def test_a_gradient_of_a_gradient(mode, nvme, monkeypatch):
    def loop(model, optimizer):
        seen = []
        for step in range(2):
            torch.manual_seed(step)
            x = torch.randn(5, 24, requires_grad=True)
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            slope.square().sum().backward()
            seen += [slope.detach(), x.grad]
            optimizer.step()
            optimizer.zero_grad()
        return seen + [each.detach().clone() for each in model.parameters()]

    both_ways(
        lambda: Stack(lambda: nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))),
        loop,
        mode,
        nvme,
        monkeypatch,
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_forward_without_a_backward_gives_everything_back(mode, nvme, monkeypatch):
    def loop(model, optimizer):
        seen = [model(torch.ones(3, 24) * number).detach() for number in range(3)]
        kept = model(torch.ones(3, 24))  # its graph lives over a whole step
        seen += steps(model, optimizer, count=1)
        del kept
        return seen

    both_ways(lambda: Stack(lambda: nn.Sequential(Odd(), nn.Linear(24, 24))).eval(), loop, mode, nvme, monkeypatch)


@pytest.mark.parametrize("mode", MODES)
def test_two_graphs_at_once_are_differentiated_in_the_order_of_their_making(mode, nvme, monkeypatch):
    def loop(model, optimizer):
        torch.manual_seed(0)
        losses = [model(torch.randn(7, 24)).square().mean() for _ in range(2)]
        for loss in losses:
            loss.backward()
        optimizer.step()
        return [loss.detach() for loss in losses] + [each.detach().clone() for each in model.parameters()]

    both_ways(lambda: Stack(Odd), loop, mode, nvme, monkeypatch, debug_races=4)


class Spoiler(nn.Module):
    """Changes what `exp` saved for its backward: its own result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).exp()
        y.mul_(2.0)
        return y


@pytest.mark.parametrize("mode", ["keep", "host", "nvme"])
def test_a_saved_tensor_that_was_changed_is_refused_as_torch_does(mode, nvme):
    model = Stack(Spoiler)
    x = torch.randn(5, 24)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()
    config = fuyou.Config(activations=mode)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme, ram="4MiB", gpu=GPU, device="cpu", config=config):
        with pytest.raises(fuyou.StateError, match=r"modified by an inplace operation: a tensor of shape \(5, 24\)"):
            model(x).sum().backward()


@pytest.mark.parametrize("mode", ["host", "nvme", "recompute, inputs and results on three tiers"])
def test_a_graph_that_outlives_its_run_is_refused_and_holds_nothing(mode, nvme, monkeypatch):
    model = Stack(Odd)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with placed(MODES[mode], monkeypatch) as public:
        run = fuyou.wrap(
            model, optimizer, nvme, ram="4MiB", gpu=GPU, device="cpu", config=fuyou.Config(activations=public)
        )
    loss = model(torch.randn(17, 24)).sum()
    run.close()
    assert run._ledger.held("host") == 0 and run._ledger.held("nvme") == 0
    with pytest.raises(fuyou.StateError):
        loss.backward()
    del loss
    gc.collect()
    torch.ones(1, requires_grad=True).sum().backward()  # torch keeps a graph whose backward failed until the next one
    assert all(run._ledger.held(tier) == 0 for tier in ("device", "host", "nvme"))
    run.close()


class Onward(nn.Module):
    """Changes the inputs of its blocks when they have run, which nothing that a block saves forbids: it saves a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Clipped() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            y = block(x)
            with torch.no_grad():
                x.mul_(3.0)
            x = y
        return x


class Clipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bias).exp()


@pytest.mark.parametrize("inputs", ["device", "host", "nvme"])
def test_an_input_that_is_changed_after_its_block_is_told_where_the_block_runs_again(inputs, nvme, monkeypatch):
    model = Onward()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with placed(Placement("recompute", inputs), monkeypatch) as public:
        config = fuyou.Config(activations=public)
        with fuyou.wrap(model, optimizer, nvme, ram="4MiB", gpu=GPU, device="cpu", config=config):
            with pytest.raises(
                fuyou.StateError, match="An input of block blocks.2 was modified by an inplace operation"
            ):
                model(torch.zeros(5, 24)).sum().backward()


class Written(nn.Module):
    """Writes to the results of linear layers of three dimensions: inside, and where the block's output is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 24)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        y += 1.0
        z = self.second(y)
        out = self.third(z.sigmoid_())
        return out, (out * 1.5).exp()  # of `out` itself nothing is saved, and running it again needs it


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Written() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(0, (1, -1))
        for block in self.blocks:
            x, y = block(x)
            x *= 2.0
            x = x + y.tanh()
        return x


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
def test_results_that_are_written_to_are_computed_again(tier, nvme, monkeypatch):
    monkeypatch.setitem(MODES, "all results", Placement("recompute", results=tuple((each, tier) for each in range(3))))
    both_ways(Outside, steps, "all results", nvme, monkeypatch, debug_races=6)


@pytest.mark.parametrize(("ordinals", "left"), [((), 4), ((0,), 2), ((0, 1), 0), ((1,), 2), ((2,), 4)])
def test_an_operation_whose_result_was_saved_is_not_run_again(ordinals, left, nvme, monkeypatch):
    """Two blocks of three matmuls, the last of which nothing needs: two each to run again."""

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counter.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(24, 48), nn.Linear(48, 48), nn.Linear(48, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.third(self.second(self.first(x).tanh()).tanh())

    placement = Placement("recompute", results=tuple((ordinal, "nvme") for ordinal in ordinals))
    model = Stack(Mlp, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with placed(placement, monkeypatch), fuyou.wrap(
        model, optimizer, nvme, ram="4MiB", gpu=GPU, device="cpu", config=fuyou.Config(activations="host")
    ):  # fmt: skip
        loss = model(torch.randn(5, 24)).sum()
        with Counter():
            loss.backward()
    assert Counter.count == left
