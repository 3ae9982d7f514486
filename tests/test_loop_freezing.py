"""Parameters frozen, unfrozen and added to the optimizer while training: as plain PyTorch does, and read-only while frozen."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from sides import Side, compare_bf16, started
from torch import nn

import fuyou
from fuyou.runtime.handle import GradientHandle


def freeze_all_but_the_head(model: nn.Module) -> None:
    model.requires_grad_(False)
    for name, each in model.named_parameters():
        if name.startswith(("head", "norm")):
            each.requires_grad_(True)


def add(side: Side, parameters: list[nn.Parameter], **options: Any) -> None:
    """As fine-tuning by gradual unfreezing does: unfreeze, then a group of its own."""
    for each in parameters:
        each.requires_grad_(True)
    side.optimizer.add_param_group({"params": parameters, **options})
    side.scheduler = models.schedule_of(side.optimizer)


def gradual(side: Side) -> Any:
    seen = side.steps(2)
    add(side, list(side.model.layers[1].parameters()), lr=3e-3)
    seen += side.steps(2)
    add(side, [side.model.layers[0].qkv.weight], weight_decay=0.3)  # one of its unit's parameters
    seen += side.steps(2)
    add(side, [each for each in side.model.parameters() if not each.requires_grad])
    seen += side.steps(2)
    state = side.optimizer.state
    return [*seen, [state[each]["exp_avg"].clone() for each in side.model.parameters() if each in state]]


def test_gradual_unfreezing(compare):
    compare(gradual, prepare=freeze_all_but_the_head)


def test_unfrozen_between_the_backwards_of_a_step(compare):
    def script(side: Side) -> Any:
        seen = side.steps(1)
        seen += side.backwards(1)
        add(side, list(side.model.layers[0].parameters()))
        side.step -= 1
        seen += side.backwards(2)
        seen.append(side.model.layers[0].qkv.weight.grad.norm().item())
        return seen + side.finish() + side.steps(1)

    compare(script, prepare=freeze_all_but_the_head)


def test_unfrozen_first_and_added_after_the_backward(compare):
    """Its gradient has a home before its state has one."""

    def script(side: Side) -> Any:
        seen = side.steps(1)
        parameters = list(side.model.layers[1].parameters())
        for each in parameters:
            each.requires_grad_(True)
        seen += side.backwards()
        add(side, parameters)
        return seen + side.finish() + side.steps(1)

    compare(script, prepare=freeze_all_but_the_head)


def test_a_frozen_parameter_in_the_optimizer_is_unfrozen(nvme):
    """AdamW(model.parameters()) with some frozen is the usual way; they cost nothing while they are."""
    sides = []
    for wrapped in (False, True):
        case = models.CASES["gpt"]
        model = case.model()
        optimizer = models.optimizer_of(models.groups_of(model))  # all in the optimizer, frozen after
        model.layers[0].requires_grad_(False)
        run = fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu") if wrapped else None
        side = Side(case, model, run.optimizer if run else optimizer, models.schedule_of(optimizer))
        seen = side.steps(2)
        if run is not None:
            before = run.report().dict()["tiers"]["nvme"]["by_category"]["optimizer"]
        model.layers[0].requires_grad_(True)
        seen += side.backwards() + [each.grad.norm().item() for each in model.layers[0].parameters()]
        if run is not None:  # the gradients leave the device as all others do
            assert all(isinstance(each.grad, GradientHandle) for each in model.parameters())
            assert run._ledger.held("device", "gradients") == 0
        seen += side.finish() + side.steps(1)
        if run is not None:
            assert run.report().dict()["tiers"]["nvme"]["by_category"]["optimizer"] > before
            run.close()
        sides.append((seen, models.values_of(model)))
    assert sides[0][0] == sides[1][0]
    assert all(torch.equal(a, b) for a, b in zip(sides[0][1].values(), sides[1][1].values(), strict=True))


def test_bf16_gradual_unfreezing(nvme):
    compare_bf16(gradual_in_the_optimizer, nvme, freeze=freeze_all_but_the_head)


def gradual_in_the_optimizer(side: Side) -> Any:
    """PlainBf16 has no groups to add: what is frozen is in its groups already."""
    seen = side.steps(2)
    for each in side.model.parameters():
        each.requires_grad_(True)
    return seen + side.steps(2)


def test_state_of_what_is_frozen_when_it_is_wrapped_is_kept(nvme):
    """Trained plainly, frozen, wrapped, unfrozen: the moments go on."""
    finals = []
    for wrapped in (False, True):
        case, model, optimizer, scheduler = started("gpt")
        Side(case, model, optimizer, scheduler).steps(2)
        model.layers[0].requires_grad_(False)
        run = fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu") if wrapped else None
        side = Side(case, model, run.optimizer if run else optimizer, scheduler)
        side.step = 2
        side.steps(1)
        model.layers[0].requires_grad_(True)
        side.steps(1)
        if run is not None:
            run.close()
        finals.append((models.values_of(model), [optimizer.state[each] for each in model.parameters()]))
    for name, value in finals[0][0].items():
        assert torch.equal(value, finals[1][0][name]), name
    for plain, ours in zip(finals[0][1], finals[1][1], strict=True):
        assert all(torch.equal(plain[key], ours[key]) for key in plain)


def test_groups_that_torch_refuses_are_refused(compare):
    def script(side: Side) -> Any:
        first = next(iter(side.model.parameters()))
        with pytest.raises(ValueError, match="more than one parameter group"):
            side.optimizer.add_param_group({"params": [first]})
        with pytest.raises(ValueError, match="non-leaf"):
            side.optimizer.add_param_group({"params": [first * 2]})
        return side.steps(1)

    compare(script)


def test_a_group_of_strangers_or_of_options_that_are_not_computed(nvme):
    _, model, optimizer, _ = started("gpt", freeze_all_but_the_head)
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu") as run:
        groups = len(run.optimizer.param_groups)
        with pytest.raises(fuyou.FuyouError, match=r"shape \(3,\) in the optimizer was not in the model"):
            run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
        with pytest.raises(fuyou.FuyouError, match="amsgrad=True"):
            run.optimizer.add_param_group({"params": list(model.layers[0].parameters()), "amsgrad": True})
        assert len(run.optimizer.param_groups) == groups == len(optimizer.param_groups)


def test_a_step_that_only_parameters_added_later_would_take_is_refused(nvme):
    """What get_peft_model after wrap comes to."""
    case, model, optimizer, _ = started("gpt")
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu") as run:
        model.requires_grad_(False)
        model.head = nn.Sequential(model.head, nn.Linear(model.head.out_features, model.head.out_features))
        models.loss_of(model, case.batch(0)).backward()
        with pytest.raises(fuyou.FuyouError, match="head.1.weight has a gradient and was added to the model after"):
            run.optimizer.step()


def test_without_room_the_group_is_refused_before_anything_is_trained():
    case, model, optimizer, scheduler = started("gpt", freeze_all_but_the_head)
    with pytest.raises(fuyou.BudgetError) as short:
        fuyou.wrap(model, optimizer, None, ram="4KiB", gpu="1GiB", device="cpu")
    just_enough = short.value.needed_bytes
    with fuyou.wrap(model, optimizer, None, ram=just_enough, gpu="1GiB", device="cpu") as run:
        side = Side(case, model, run.optimizer, scheduler)
        side.steps(1)
        before = models.values_of(model)
        model.layers[0].requires_grad_(True)
        model.layers[1].requires_grad_(True)
        with pytest.raises(fuyou.BudgetError, match="and there is no nvme folder") as caught:
            run.optimizer.add_param_group({"params": [*model.layers[0].parameters(), *model.layers[1].parameters()]})
        assert caught.value.tier == "host" and caught.value.shortfall_bytes > 0
        assert len(run.optimizer.param_groups) == 2 and models.differing(model, before) == []
        for layer in model.layers:
            layer.requires_grad_(False)
        side.steps(1)  # goes on as it was


def test_frozen_weights_are_read_only(nvme):
    """Never written, no gradient, no state: bytes and traffic are those of what is trained."""
    case, model, optimizer, scheduler = started("gpt", freeze_all_but_the_head)
    frozen = {name: each.detach().clone() for name, each in model.named_parameters() if not each.requires_grad}
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    config = fuyou.Config(update="step")  # so that a step's writes are in that step
    with fuyou.wrap(model, optimizer, nvme, ram="320KiB", gpu="1GiB", device="cpu", config=config) as run:
        Side(case, model, run.optimizer, scheduler).steps(3)
        report = run.report().dict()
        held = {kind: report["tiers"]["nvme"]["by_category"][kind] + report["tiers"]["host"]["by_category"][kind]
                for kind in ("gradients", "optimizer")}  # fmt: skip
        pages = 2 * 4096  # two units, each rounded up to a page; alignment within them takes less
        assert 4 * trained <= held["gradients"] <= 4 * trained + pages
        assert 8 * trained <= held["optimizer"] <= 2 * (8 * trained + pages)  # two slots
        rewritten = 2 * (4 * trained + pages) + (4 * trained + pages) + (8 * trained + pages)  # gradients twice
        assert 0 < report["traffic"]["nvme_write_bytes_per_step"] <= rewritten
        assert sum(4 * each.numel() for each in frozen.values()) > 4 * rewritten  # it would show
        for name, each in model.named_parameters():
            if name in frozen:
                assert each.grad is None and torch.equal(each, frozen[name]), name
