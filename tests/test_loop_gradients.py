"""Steps and gradients as people write them in their own loops: the same bits with fuyou as without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from sides import Side, compare_bf16
from torch import nn

import fuyou

# --- the step -----------------------------------------------------------------------------------------------------


def test_accumulation_varies_from_step_to_step(compare):
    compare(lambda side: [side.backwards(count) + side.finish() for count in (1, 3, 2, 1)])


@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_gradients_are_zeroed_instead_of_dropped(compare, whose):
    def script(side: Side) -> Any:
        seen = []
        for step in range(4):
            if step != 2:  # a step on zeros decays and moves on
                seen += side.backwards()
            side.optimizer.step()
            getattr(side, whose).zero_grad(set_to_none=False)
            seen.append([each.grad.abs().sum().item() for _, each in side.named()])
        return seen

    compare(script)


def test_a_step_with_a_closure(compare):
    def script(side: Side) -> Any:
        def closure() -> torch.Tensor:
            side.optimizer.zero_grad()
            torch.manual_seed(side.step)
            loss = models.loss_of(side.model, side.case.batch(side.step))
            loss.backward()
            return loss

        seen = []
        for side.step in range(3):
            seen.append(side.optimizer.step(closure).item())
        return seen

    compare(script)


def test_hyperparameters_changed_by_hand_and_by_another_scheduler(compare):
    def script(side: Side) -> Any:
        seen = side.steps(1)
        side.optimizer.param_groups[0]["lr"] *= 0.1
        side.optimizer.param_groups[1].update(betas=(0.7, 0.9), eps=1e-5, weight_decay=0.2)
        seen += side.backwards() + side.finish()
        side.scheduler = torch.optim.lr_scheduler.OneCycleLR(side.optimizer, [1e-2, 1e-3], total_steps=10)
        return seen + side.steps(3)  # cycles betas too

    compare(script)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_other_ways_to_clip(compare, norm_type):
    def script(side: Side) -> Any:
        seen = []
        for step in range(3):
            seen += side.backwards()
            parameters = list(side.model.parameters())
            if step == 1:
                torch.nn.utils.clip_grad_value_(parameters, 1e-3)
            norm = torch.nn.utils.clip_grad_norm_(
                parameters, 0.1, norm_type=norm_type, error_if_nonfinite=True, foreach=None if step else False
            )
            seen += [norm.item(), torch.nn.utils.get_total_norm([each.grad for each in parameters]).item()]
            seen += side.finish()
        return seen

    compare(script)


# --- gradients ----------------------------------------------------------------------------------------------------


def test_gradients_are_read(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for _ in range(2):
            for accumulated in (1, 1):  # in the middle of an accumulation too
                seen += side.backwards(accumulated)
                for _, each in side.named():
                    grad = each.grad
                    seen += [grad.norm().item(), grad.abs().max().item(), grad.clone(), grad.detach().sum()]
                    seen += [
                        grad.data.mean(),
                        grad.view(-1)[0].item(),
                        (grad * 2 + 1).sum(),
                        grad.float().numpy().sum(),
                    ]
                    seen += [tuple(grad.shape), grad.dtype, grad.is_sparse, bool(torch.isfinite(grad).all())]
                    seen += [grad.reshape(-1)[:3].tolist(), copy.deepcopy(grad), torch.equal(grad, grad.clone())]
                seen.append(torch.stack([each.grad.norm() for _, each in side.named()]))
                seen.append(torch.cat([each.grad.flatten() for _, each in side.named()]))
            seen += side.finish()
        return seen

    compare(script)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipped_by_value(compare, foreach):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for _ in range(3):
            seen += side.backwards()
            torch.nn.utils.clip_grad_value_(side.model.parameters(), 1e-3, foreach=foreach)
            seen.append(max(each.grad.abs().max().item() for each in side.model.parameters()))
            seen += side.finish()
        return seen

    compare(script)


LISTS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "abs_": lambda grads: torch._foreach_abs_(grads),
    "abs": lambda grads: torch._foreach_abs(grads),
    "clamp_": lambda grads: (torch._foreach_clamp_min_(grads, -1e-3), torch._foreach_clamp_max_(grads, 1e-3)),
    "add_ lists": lambda grads: torch._foreach_add_(grads, [torch.full_like(each, 1e-3) for each in grads], alpha=0.5),
    "add_ each other": lambda grads: torch._foreach_add_(grads, grads),
    "addcmul_": lambda grads: torch._foreach_addcmul_(grads, grads, grads, 0.5),
    "mul_ numbers": lambda grads: torch._foreach_mul_(grads, [0.1 * index for index in range(len(grads))]),
    "mul_ number": lambda grads: torch._foreach_mul_(grads, 0.3),
    "zero_": lambda grads: torch._foreach_zero_(grads),
    "norms": lambda grads: torch._foreach_norm(grads, 2.0),
    "norms of order 1": lambda grads: torch._foreach_norm(grads, 1.0),
}


@pytest.mark.parametrize("how", LISTS)
def test_lists_of_gradients(compare, how):
    def script(side: Side) -> Any:
        seen: list[Any] = side.backwards()
        seen.append(LISTS[how]([each.grad for each in side.model.parameters()]))
        seen += [each.grad.clone() for each in side.model.parameters()]
        return seen + side.finish() + side.steps(1)

    compare(script)


def test_all_gradients_are_changed_within_the_device_budget(nvme):
    """Changed one after another, those that nobody holds go home for the next: a budget that cannot hold them all does."""

    def train(model: nn.Module, optimizer: Any) -> list[Any]:
        seen = []
        for step in range(2):
            torch.manual_seed(step)
            model(torch.randn(4, 512)).square().mean().backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 1e-5)
            for each in model.parameters():
                each.grad.add_(1e-6)  # stays changed on the device, until its room is wanted
            seen.append([each.grad.norm().item() for each in model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
        return seen

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)])
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    oracle, optimizer = build()
    expected = train(oracle, optimizer)
    model, optimizer = build()
    with pytest.raises(fuyou.BudgetError) as short:
        fuyou.wrap(model, optimizer, nvme, ram="8MiB", gpu="1MiB", device="cpu")
    with fuyou.wrap(model, optimizer, nvme, ram="8MiB", gpu=short.value.needed_bytes, device="cpu") as run:
        assert train(model, run.optimizer) == expected
        held = run.report().dict()["tiers"]["device"]
        assert sum(4 * each.numel() for each in model.parameters()) > 16 * 2**20
        assert held["peak_bytes"] <= held["budget_bytes"]
    assert models.differing(model, models.values_of(oracle)) == []


@pytest.mark.timeout(60)  # what is tested here once waited for its deadline
def test_gradients_that_were_read_give_their_staging_to_whoever_needs_it(nvme):
    """In the smallest host memory: state is read, weights are exported and the run is closed with every gradient there."""
    model, optimizer = (models.CASES["gpt"].model(), None)
    optimizer = models.optimizer_of(models.groups_of(model))
    with pytest.raises(fuyou.BudgetError) as short:
        fuyou.wrap(model, optimizer, nvme, ram=1, gpu="1GiB", device="cpu")
    with fuyou.wrap(model, optimizer, nvme, ram=short.value.needed_bytes, gpu="1GiB", device="cpu") as run:
        models.loss_of(model, models.CASES["gpt"].batch(0)).backward()
        run.optimizer.step()
        models.loss_of(model, models.CASES["gpt"].batch(0)).backward()
        expected = [each.grad.clone() for each in model.parameters()]
        moments = [run.optimizer.state[each]["exp_avg"].clone() for each in model.parameters()]
        norms = [each.grad.abs().sum().item() for each in model.parameters()]
        run.save_pretrained(nvme / "exported")
        assert norms == [each.abs().sum().item() for each in expected]
    assert all(torch.equal(each.grad, value) for each, value in zip(model.parameters(), expected, strict=True))
    assert all(
        torch.equal(optimizer.state[each]["exp_avg"], value)
        for each, value in zip(model.parameters(), moments, strict=True)
    )


@pytest.mark.parametrize("clip", [False, True], ids=["", "unscale_ and clip"])
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_grad_scaler(compare, scale, clip):
    """torch.amp.GradScaler: scaled losses, a step skipped for an inf, growth and backoff, its own state."""

    def script(side: Side) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        seen: list[Any] = []
        for step in range(1, 6):
            for micro in range(2):
                torch.manual_seed(10 * step + micro)
                loss = models.loss_of(side.model, side.case.batch(10 * step + micro)) / 2
                scaler.scale(loss).backward()
                seen.append(loss.item())
            if step == 3:
                list(side.model.parameters())[3].grad.view(-1)[5] = float("inf")
            if clip:
                scaler.unscale_(side.optimizer)
                seen.append(torch.nn.utils.clip_grad_norm_(side.model.parameters(), models.CLIP).item())
            scaler.step(side.optimizer)
            scaler.update()
            seen += [scaler.get_scale(), scaler.state_dict()]
            seen += [each.grad.norm().item() for each in side.model.parameters()] if step != 3 else []
            side.scheduler.step()
            side.optimizer.zero_grad()
        return seen

    seen = compare(script)
    scales = [each["scale"] for each in seen if isinstance(each, dict)]
    assert scales[2] < scales[1] > scales[0] and len(scales) == 5  # it grew, and backed off at the inf


@pytest.mark.parametrize("how", ["by loops", "by foreach", "on the loss"])
def test_loss_scaled_by_hand(compare, how):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for step in range(1, 4):
            torch.manual_seed(step)
            loss = models.loss_of(side.model, side.case.batch(step))
            (loss * 3000.0).backward()
            grads = [each.grad for each in side.model.parameters()]
            if how == "by loops":
                for each in grads:
                    each.div_(3000.0)
            elif how == "by foreach":
                torch._foreach_div_(grads, 3000.0)
            else:
                for each in side.model.parameters():
                    each.grad = each.grad * (1 / 3000.0)
            finite = all(bool(torch.isfinite(each.grad).all()) for each in side.model.parameters())
            seen += [loss.item(), finite, *side.finish()]
        return seen

    compare(script)


CHANGES: dict[str, Callable[[torch.Tensor, nn.Parameter], Any]] = {
    "mul_ number": lambda grad, _: grad.mul_(0.3),
    "mul_ tensor": lambda grad, _: grad.mul_(torch.tensor(0.3)),
    "mul_ twice": lambda grad, _: grad.mul_(0.1).mul_(0.7),
    "mul_ whole": lambda grad, parameter: grad.mul_(torch.full_like(parameter, 0.3)),
    "div_": lambda grad, _: grad.div_(3.0),
    "data": lambda grad, _: grad.data.mul_(0.3),
    "detach": lambda grad, _: grad.detach().mul_(0.3),
    "add_ weights": lambda grad, parameter: grad.add_(parameter, alpha=1e-2),
    "add_ weights' data": lambda grad, parameter: grad.add_(parameter.data, alpha=1e-2),
    "clamp_": lambda grad, _: grad.clamp_(-1e-3, 1e-3),
    "item": lambda grad, _: grad.__setitem__(0, 0.0),
    "view": lambda grad, _: grad.view(-1)[1:].fill_(0.01),
    "zero_": lambda grad, _: grad.zero_(),
    "copy_": lambda grad, _: grad.copy_(torch.ones_like(grad)),
    "normal_": lambda grad, _: (torch.manual_seed(5), grad.normal_()),
    "out": lambda grad, _: torch.mul(grad, 0.5, out=grad),
    "foreach": lambda grad, _: torch._foreach_mul_([grad], 0.3),
    "foreach tensor": lambda grad, _: torch._foreach_mul_([grad], torch.tensor(0.3)),
    "foreach list": lambda grad, _: torch._foreach_mul_([grad], [0.3]),
    "foreach add": lambda grad, _: torch._foreach_add_([grad], 1e-3),
    "foreach div": lambda grad, _: torch._foreach_div_([grad], 3.0),
}


@pytest.mark.parametrize("how", CHANGES)
def test_gradients_are_changed_in_place(compare, how):
    def script(side: Side) -> Any:
        seen = []
        for step in range(3):
            for part in range(2):  # before more is accumulated, and before the step
                seen += side.backwards(1)
                if part == 0 and step == 0:
                    continue
                with torch.no_grad():
                    for _, each in side.named():
                        CHANGES[how](each.grad, each)
            seen += side.finish()
        return seen

    compare(script)


def test_gradients_are_replaced_and_dropped(compare):
    def script(side: Side) -> Any:
        seen = []
        for step in range(5):
            seen += side.backwards()
            parameters = dict(side.named())
            if step in (0, 2):
                parameters["layers.0.qkv.weight"].grad = None  # its own step count falls behind
                parameters["position"].grad = None
            if step == 1:
                weight = parameters["layers.1.out.weight"]
                weight.grad = weight.grad * 0.5
                parameters["head.bias"].grad = torch.full_like(parameters["head.bias"], 1e-3)
            if step == 3:
                for each in parameters.values():
                    each.grad = each.grad.clone().mul_(0.1)
                seen += models.accumulate(side.model, side.case, 77)  # on top of what was set by hand
            seen += side.finish(clip=step != 1)
            seen.append([value["step"].item() for _, value in sorted(side.optimizer.state_dict()["state"].items())])
        return seen

    compare(script)


def test_gradients_are_exchanged_between_parameters(compare):
    """Of one shape: each is used, and accumulated on, where it was put."""

    def script(side: Side) -> Any:
        seen = []
        for step in range(4):
            seen += side.backwards(1)
            first, second = (layer.out.weight for layer in side.model.layers)
            with torch.no_grad():
                first.grad.mul_(0.5)  # recorded, and part of what moves
            first.grad, second.grad = second.grad, first.grad
            seen += [first.grad.clone(), second.grad.sum().item()]
            if step % 2:
                seen += side.backwards(2) + [first.grad.clone(), second.grad.clone()]
            seen += side.finish(clip=step > 1)
        return seen

    compare(script)


def test_a_gradient_kept_by_the_user_outlives_the_step(compare):
    def script(side: Side) -> Any:
        seen, kept = [], []
        for _ in range(3):
            seen += side.backwards()
            kept = [each.grad for _, each in side.named()]
            side.finish(clip=False)
            seen += [each.clone() for each in kept]
            seen += side.backwards(1)  # a new backward must not change what is kept
            seen += [each.clone() for each in kept]
            for each, (_, parameter) in zip(kept, side.named(), strict=True):
                parameter.grad.add_(each)
            seen += side.finish()
        return seen

    compare(script)


def test_autograd_grad_retain_graph_and_double_backward(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for _ in range(2):
            seen += side.backwards()
            torch.manual_seed(3)
            loss = models.loss_of(side.model, side.case.batch(3))
            weights = [side.model.layers[0].qkv.weight, side.model.scale]
            seen += [each.clone() for each in torch.autograd.grad(loss, weights, retain_graph=True)]
            loss.backward(retain_graph=True)
            loss.backward()
            torch.manual_seed(4)
            loss = models.loss_of(side.model, side.case.batch(4))
            slopes = torch.autograd.grad(
                loss, [side.model.scale, side.model.layers[1].mlp[0].weight], create_graph=True
            )
            (sum(each.square().sum() for each in slopes) + loss).backward()
            seen += side.finish()
        return seen

    def math_attention(model: nn.Module) -> None:  # torch's fused attention has no second derivative
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda *_: torch.backends.cuda.enable_flash_sdp(False))

    try:
        compare(script, prepare=math_attention)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_the_users_own_hooks(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        model = side.model
        handles = [
            model.layers[0].qkv.weight.register_hook(lambda grad: grad * 0.5),
            model.scale.register_hook(lambda grad: seen.append(grad.sum().item())),
            model.layers[1].out.weight.register_post_accumulate_grad_hook(
                lambda each: seen.append(each.grad.norm().item())
            ),
            model.layers[1].register_full_backward_hook(lambda _, before, after: seen.append(after[0].sum().item())),
            model.layers[0].register_forward_hook(lambda module, _, result: result * (1 + module.out.bias.mean())),
            model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(module.qkv.weight.sum().item())),
            model.layers[1].mlp.register_forward_hook(lambda module, _, result: result + module[0].weight.mean()),
        ]
        seen += side.steps(2)
        for each in handles:
            each.remove()
        return seen + side.steps(1)

    assert len(compare(script)) > 20


@pytest.mark.parametrize("how", CHANGES)
def test_bf16_gradients_are_changed_in_place(how, nvme):
    def script(side: Side) -> Any:
        seen = side.backwards(2)
        for part in range(2):
            with torch.no_grad():
                for _, each in side.named():
                    CHANGES[how](each.grad, each)
            seen += side.backwards(1) if part == 0 else side.finish()
        return seen + side.steps(1)

    compare_bf16(script, nvme)
