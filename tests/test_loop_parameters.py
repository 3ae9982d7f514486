"""Parameters read and written between steps: the same values, and the same bits after, with fuyou as without."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from sides import Side, compare_bf16, started
from torch import nn

import fuyou

# --- parameters ---------------------------------------------------------------------------------------------------


def test_parameters_are_read_between_steps(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for _ in range(2):
            seen += side.backwards(1)
            for _, each in side.named():
                seen += [each.sum().item(), each.data.clone(), each.detach().norm(), each.abs().max().item()]
                seen += [each[0].clone().detach(), each.view(-1)[1:3].tolist(), each.detach().numpy().sum()]
                seen += [(each * 2).sum().item(), each.detach().double(), torch.equal(each, each.clone())]
                seen += [len(each), each.T.sum().item() if each.dim() == 2 else 0, bool((each > 0).any())]
            seen.append(nn.utils.parameters_to_vector(side.model.parameters()).detach())
            seen.append({name: value.clone() for name, value in side.model.state_dict().items()})
            twin = copy.deepcopy(side.model)
            assert all(type(each) is nn.Parameter for each in twin.parameters())
            torch.manual_seed(9)
            seen.append(models.loss_of(twin, side.case.batch(9)).item())
            stream = io.BytesIO()
            torch.save(side.model.state_dict(), stream)
            stream.seek(0)
            seen.append(dict(torch.load(stream)))
            seen += side.finish()
        return seen

    compare(script)


def test_a_penalty_on_weights(compare):
    def script(side: Side) -> Any:
        seen = []
        for step in range(3):
            torch.manual_seed(step)
            loss = models.loss_of(side.model, side.case.batch(step))
            penalty = sum(each.square().sum() for _, each in side.named())
            (loss + 1e-3 * penalty).backward()
            (1e-3 * side.model.layers[0].qkv.weight.abs().sum()).backward()
            seen += [loss.item(), penalty.item(), *side.finish()]
        return seen

    compare(script)


def _load_halved(side: Side) -> None:
    state = {name: value.clone() * 0.5 for name, value in side.model.state_dict().items()}
    side.model.load_state_dict(state)


def _foreach_halve(side: Side) -> None:
    torch._foreach_mul_([each for _, each in side.named()], 0.5)


def _shift_by_vector(side: Side) -> None:
    vector = nn.utils.parameters_to_vector(side.model.parameters())
    nn.utils.vector_to_parameters(vector + 0.01, side.model.parameters())


def _each(change: Callable[[nn.Parameter], Any]) -> Callable[[Side], None]:
    def apply(side: Side) -> None:
        for _, each in side.named():
            change(each)

    return apply


WRITES: dict[str, Callable[[Side], Any]] = {
    "data.mul_": _each(lambda each: each.data.mul_(0.99)),
    "data item": _each(lambda each: each.data[0].add_(0.1)),
    "data slice": _each(lambda each: each.data.__setitem__(0, 0.25)),
    "data set": _each(lambda each: setattr(each, "data", each.data * 0.5)),
    "clamp_": _each(lambda each: each.clamp_(-0.05, 0.05)),
    "copy_": _each(lambda each: each.copy_(torch.full_like(each, 0.01))),
    "item": _each(lambda each: each.__setitem__(0, 0.25)),
    "view": _each(lambda each: each.view(-1)[1:].mul_(0.5)),
    "chained view": _each(lambda each: each[0].fill_(0.3)),
    "detach": _each(lambda each: each.detach().add_(0.01)),
    "iadd": _each(lambda each: each.__iadd__(0.01)),
    "out": _each(lambda each: torch.mul(each, 0.5, out=each)),
    "set_": _each(lambda each: each.data.set_(each.data * 0.5)),
    "init": _each(lambda each: nn.init.normal_(each, std=0.02)),
    "init twice": _each(lambda each: (nn.init.zeros_(each), nn.init.uniform_(each, -0.1, 0.1))),
    "foreach": _foreach_halve,
    "vector_to_parameters": _shift_by_vector,
    "load_state_dict": _load_halved,
    "reset_parameters": lambda side: side.model.layers[0].qkv.reset_parameters(),
    "apply": lambda side: side.model.apply(
        lambda module: nn.init.normal_(module.weight, std=0.1) if isinstance(module, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("how", WRITES)
def test_parameters_are_written(compare, how):
    def script(side: Side) -> Any:
        def write() -> list[float]:
            torch.manual_seed(side.step)
            with torch.no_grad():
                WRITES[how](side)
            return [each.sum().item() for _, each in side.named()]

        seen = side.steps(1) + write() + side.steps(1)
        seen += side.backwards() + write() + side.finish()  # gradients of other weights than the update starts from
        return seen + write() + write() + side.steps(1)

    compare(script)


def test_a_moving_average_is_kept_and_swapped_in(compare):
    def script(side: Side) -> Any:
        average = torch.optim.swa_utils.AveragedModel(
            side.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        by_hand = {name: each.detach().clone() for name, each in side.named()}
        seen: list[Any] = []
        for _ in range(3):
            seen += side.steps(1)
            average.update_parameters(side.model)
            with torch.no_grad():
                for name, each in side.named():
                    by_hand[name].lerp_(each, 0.1)
        seen += [each.detach().clone() for each in average.parameters()] + list(by_hand.values())
        backup = {name: each.detach().clone() for name, each in side.named()}
        with torch.no_grad():
            for name, each in side.named():
                each.copy_(by_hand[name])
            torch.manual_seed(1)
            seen.append(models.loss_of(side.model, side.case.batch(1)).item())
            for name, each in side.named():
                each.data.copy_(backup[name])
        return seen + side.steps(1)

    compare(script)


def test_parameters_frozen_for_a_while(compare):
    def script(side: Side) -> Any:
        seen = side.steps(1)
        side.model.layers[0].requires_grad_(False)
        seen += side.steps(2)
        seen.append(side.model.layers[0].qkv.weight.grad is None)
        side.model.layers[0].requires_grad_(True)
        return seen + side.steps(1)

    compare(script)


@pytest.mark.parametrize("how", WRITES)
def test_bf16_parameters_are_written(how, nvme):
    """Where a write changes the compute copy the master is what was written; elsewhere it keeps its low bits."""

    def script(side: Side) -> Any:
        def write() -> None:
            torch.manual_seed(side.step)
            with torch.no_grad():
                WRITES[how](side)
                if isinstance(side.optimizer, models.PlainBf16):
                    side.optimizer.copies_were_written()

        seen = side.steps(1)
        write()
        seen += side.backwards()
        write()
        return seen + side.finish() + side.steps(1)

    compare_bf16(script, nvme)


def test_bf16_masters_know_of_a_write_at_once(nvme):
    case, model, optimizer, scheduler = started("gpt")
    with fuyou.wrap(
        model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu", config=fuyou.Config(precision="bf16")
    ) as run:
        Side(case, model, run.optimizer, scheduler).steps(1)
        for each in model.parameters():
            data = each.data
            data.fill_(17.0)
            assert bool((run.optimizer.state[each]["master"] == 17.0).all())


@pytest.mark.parametrize("how", ["data", "step"])
def test_weights_changed_behind_a_recompute_are_refused(how, nvme):
    """Plain PyTorch differentiates what forward saw and says nothing; running the block again would see other weights."""
    case, model, optimizer, _ = started("gpt")
    with fuyou.wrap(
        model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu", config=fuyou.Config(activations="recompute")
    ) as run:
        models.loss_of(model, case.batch(0)).backward()
        loss = models.loss_of(model, case.batch(1))
        if how == "step":
            run.optimizer.step()
        else:
            model.layers[0].qkv.weight.data.mul_(2)
        with pytest.raises(
            fuyou.StateError, match="modified by an inplace operation between its forward and its backward.*keep"
        ):
            loss.backward()
        run.optimizer.zero_grad()
        models.loss_of(model, case.batch(1)).backward()
        run.optimizer.step()
