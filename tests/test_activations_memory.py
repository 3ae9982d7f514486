"""What activations hold on each tier: formulas written out, budgets kept, and longer sequences within one budget."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

import fuyou
from fuyou.core.ledger import Ledger
from fuyou.swap import stash
from fuyou.swap.placement import PLACEMENTS, Placement
from fuyou.tiers.device import THREAD_COPY_BYTES, Device
from fuyou.tiers.scratch import REGION_BYTES

MIB = 1 << 20
BLOCKS, WIDTH = 6, 64


class Mlp(nn.Module):
    """Saves, in plain PyTorch: its input (norm), the norm's result and two small statistics (first), the result of first
    (gelu), and that of gelu (second)."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.gelu(self.first(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Mlp() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def held_at_most(monkeypatch) -> dict[str, int]:
    """{tier: the most activation bytes that its ledger ever held}, kept up to date."""
    most = {"device": 0, "host": 0, "nvme": 0}
    book = Ledger._book

    def watched(self: Ledger, tier: str, category: str, nbytes: int) -> None:
        book(self, tier, category, nbytes)
        most[tier] = max(most[tier], self._held[tier]["activations"])

    monkeypatch.setattr(Ledger, "_book", watched)
    return most


def step(model: nn.Module, optimizer: Any, tokens: int) -> None:
    model(torch.randn(tokens, WIDTH)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def peaks(placement: Placement, nvme: Any, monkeypatch, tokens: int, steps: int = 3) -> dict[str, int]:
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)
    monkeypatch.setitem(PLACEMENTS, "host", placement)
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(activations="host")
    most = held_at_most(monkeypatch)
    with fuyou.wrap(model, optimizer, nvme, ram="96MiB", gpu="1GiB", device="cpu", config=config) as run:
        for _ in range(steps):
            step(model, run.optimizer, tokens)
    return most


TOKENS = 2048
ROW = TOKENS * WIDTH * 4
INPUT = ROW
STATISTICS = 2 * TOKENS * 4  # the norm's mean and 1 / standard deviation
SAVED = ROW + STATISTICS + 4 * ROW + 4 * ROW  # without the input: norm, its statistics, first, gelu
LOSS = ROW  # what square() saves beyond all blocks, in the model's own frame or outside: charged where it is a frame's


def test_kept_activations_are_the_sum_of_all_blocks(nvme, monkeypatch):
    most = peaks(Placement("keep"), nvme, monkeypatch, TOKENS)
    assert most == {"device": BLOCKS * (INPUT + SAVED), "host": 0, "nvme": 0}


def test_recomputed_activations_are_the_inputs_and_one_block(nvme, monkeypatch):
    most = peaks(Placement("recompute"), nvme, monkeypatch, TOKENS)
    assert most == {"device": BLOCKS * INPUT + SAVED, "host": 0, "nvme": 0}


def test_recomputed_activations_without_inputs_are_one_block_and_the_inputs_of_two(nvme, monkeypatch):
    most = peaks(Placement("recompute", "host"), nvme, monkeypatch, TOKENS)
    # Forward: the input of the running block and the one of the block before, on its way. Backward: of this block and of
    # the next one, which is on its way back, and what this block saves again.
    assert INPUT + SAVED <= most["device"] <= 2 * INPUT + SAVED
    assert most["host"] == BLOCKS * INPUT
    assert most["nvme"] == 0


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_swapped_activations_are_two_blocks_on_the_device_and_all_at_home(tier, nvme, monkeypatch):
    copy_out = Device.copy_out

    def slow(*args: Any, **kwargs: Any) -> Any:  # or nothing would be left to be waited for
        time.sleep(2e-3)
        return copy_out(*args, **kwargs)

    monkeypatch.setattr(Device, "copy_out", slow)
    most = peaks(Placement(tier), nvme, monkeypatch, TOKENS)
    # Forward: what the running block saves and what the one before has not finished sending. Backward: what this block
    # needs, and what the next one will.
    assert INPUT + SAVED <= most["device"] <= 2 * (INPUT + SAVED)
    page = 4096  # every storage begins a page of the host of its own; the drives' files grow by regions
    most_at_home = BLOCKS * (INPUT + SAVED + 5 * page) if tier == "host" else 2 * REGION_BYTES
    assert BLOCKS * (INPUT + SAVED) <= most[tier] <= most_at_home
    assert most[{"host": "nvme", "nvme": "host"}[tier]] == 0


def test_results_on_the_device_are_those_and_the_inputs_and_one_block(nvme, monkeypatch):
    most = peaks(Placement("recompute", "device", ((0, "device"),)), nvme, monkeypatch, TOKENS)
    first = 4 * ROW  # the result of the block's first product
    assert most["device"] == BLOCKS * (INPUT + first) + SAVED - first


class Twice(nn.Module):
    """Saves one storage five times, in three views."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x * self.scale).exp()
        return y * y.flip(0).detach() + y[: len(y)] * y.view(-1, WIDTH) * y.t().t()


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_a_storage_that_is_saved_many_times_moves_once(tier, nvme):
    model = nn.Sequential(Twice(), Twice())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    plain = Twice()
    saved: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.setdefault(each.data_ptr(), each), lambda each: each
    ):
        plain(torch.randn(TOKENS, WIDTH).requires_grad_())
    distinct = {each.untyped_storage().data_ptr() for each in saved.values() if each.untyped_storage().nbytes() >= ROW}
    config = fuyou.Config(activations=tier)
    with fuyou.wrap(model, optimizer, nvme, ram="24MiB", gpu="1GiB", device="cpu", config=config) as run:
        step(model, run.optimizer, TOKENS)
        before = run._tiers.link.device_to_host_bytes
        loss = model(torch.randn(TOKENS, WIDTH).requires_grad_())
        for worker in run._movers.stash._workers.values():
            worker.submit(lambda: None, "nothing, behind all the rest").wait()
        assert run._tiers.link.device_to_host_bytes - before == 2 * len(distinct) * ROW
        loss.sum().backward()


def test_a_full_pool_sends_the_rest_to_the_drives(nvme, monkeypatch):
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    most = held_at_most(monkeypatch)
    with fuyou.wrap(
        model, optimizer, nvme, ram="24MiB", gpu="1GiB", device="cpu", config=fuyou.Config(activations="host")
    ) as run:
        for _ in range(2):
            step(model, run.optimizer, 2 * TOKENS)
        tiers = run.report().dict()["tiers"]
    assert 2 * BLOCKS * (INPUT + SAVED) > tiers["host"]["budget_bytes"]  # they cannot all be there
    assert most["host"] > 0 and most["nvme"] > 0
    assert tiers["host"]["peak_bytes"] <= tiers["host"]["budget_bytes"]


def test_drives_without_the_room_are_told_in_the_first_forward_and_a_smaller_batch_goes_on(nvme):
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    before = [each.detach().clone() for each in model.parameters()]
    config = fuyou.Config(activations="nvme")
    with fuyou.wrap(
        model, optimizer, nvme, nvme_limit="16MiB", ram="24MiB", gpu="1GiB", device="cpu", config=config
    ) as run:
        with pytest.raises(fuyou.BudgetError, match=r"nvme budget nvme_limit=16.00 MiB .*activations") as refused:
            step(model, run.optimizer, 4 * TOKENS)
        assert refused.value.tier == "nvme"
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))  # no update had begun
        for _ in range(2):
            step(model, run.optimizer, 64)
        assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_one_device_budget_trains_sequences_eight_times_as_long_as_keeping_can(nvme):
    def works(mode: str, tokens: int) -> bool:
        model = Stack(56)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        config = fuyou.Config(activations=mode, resume=False)  # the one before may have ended in a refusal
        try:
            with fuyou.wrap(model, optimizer, nvme, ram="64MiB", gpu="68MiB", device="cpu", config=config) as run:
                for _ in range(2):
                    step(model, run.optimizer, tokens)
                device = run.report().dict()["tiers"]["device"]
                assert device["peak_bytes"] <= device["budget_bytes"]
            return True
        except fuyou.BudgetError as error:
            assert error.tier == "device"
            return False

    longest = max(tokens for tokens in (64, 128, 256, 512) if works("keep", tokens))
    assert not works("keep", 2 * longest)
    assert works("nvme", 8 * longest)


def held_activations(run: Any) -> int:
    return run.report().dict()["tiers"]["device"]["held_by_category"]["activations"]


def test_a_loss_that_outlives_its_backward_holds_no_inputs(nvme):
    """As in plain PyTorch with its own checkpoints: what backward has used is free, whoever still refers to the loss."""
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(activations="recompute")
    with fuyou.wrap(model, optimizer, nvme, ram="96MiB", gpu="1GiB", device="cpu", config=config) as run:
        loss = model(torch.randn(TOKENS, WIDTH)).square().mean()
        held = held_activations(run)
        assert held >= BLOCKS * INPUT
        loss.backward(retain_graph=True)
        assert held_activations(run) == held  # a second backward may come
        first = [parameter.grad.clone() for parameter in model.parameters()]
        loss.backward()
        assert held_activations(run) == 0
        assert all(torch.equal(each.grad, 2 * one) for each, one in zip(model.parameters(), first, strict=True))
        with pytest.raises(RuntimeError, match="second time"):  # torch's own words
            loss.backward()


@pytest.mark.parametrize("told", [True, False], ids=["by the thread that copies", "as on CUDA, by the next forward"])
def test_a_gradient_that_has_left_is_charged_no_longer(told, nvme, monkeypatch):
    width = 512
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False))
    assert model[0].weight.nbytes >= THREAD_COPY_BYTES  # a thread takes it away, and no other gradient comes after it
    if not told:
        monkeypatch.setattr(Device, "after_copies_out", lambda self, told: None)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme, ram="96MiB", gpu="1GiB", device="cpu") as run:
        model(torch.randn(8, width)).square().mean().backward()
        deadline = time.monotonic() + 10
        held = {"gradients": 1}
        while held["gradients"] and time.monotonic() < deadline:  # its copy takes a moment
            time.sleep(0.01)
            if not told:
                with torch.no_grad():
                    model(torch.randn(1, width))
            held = run.report().dict()["tiers"]["device"]["held_by_category"]
        assert held["gradients"] == 0


class Headed(nn.Module):
    """Blocks, and a head whose gradient is larger than what a block saves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Mlp() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 16 * TOKENS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:1])


def test_the_block_after_the_next_comes_back_when_a_large_gradient_has_left(nvme, monkeypatch):
    model = Headed()
    head = model.head.weight.nbytes
    assert head > SAVED / 2
    most = {"activations": 0}
    book, copy = Ledger._book, Device._copy

    def watched(self: Ledger, tier: str, category: str, nbytes: int) -> None:
        book(self, tier, category, nbytes)
        if tier == "device" and self._held[tier]["gradients"] >= head:
            most["activations"] = max(most["activations"], self._held[tier]["activations"])

    def slow(self: Device, lane: str, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        if lane == "device_to_host" and threading.current_thread().name == "fuyou-copies-out":
            time.sleep(0.2)
        copy(self, lane, target, source, nbytes)

    monkeypatch.setattr(Ledger, "_book", watched)
    monkeypatch.setattr(Device, "_copy", slow)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(activations="nvme")
    with fuyou.wrap(model, optimizer, nvme, ram="96MiB", gpu="1GiB", device="cpu", config=config) as run:
        for _ in range(3):
            step(model, run.optimizer, TOKENS)
    assert SAVED < most["activations"] < 2 * SAVED  # the last block's, and not yet those of the one before it
