"""What people do in their own training loops gives, with fuyou, the same bits as without.

Each test is a script of a loop that returns what it saw. It runs twice, on plain PyTorch and on a wrapped model, and
both must have seen the same and end with the same parameters.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
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


@pytest.fixture(params=SIDES)
def compare(request: pytest.FixtureRequest, nvme: Path) -> Callable[..., Any]:
    """Runs a script on both sides and compares; returns what the plain side saw."""
    options = dict(SIDES[request.param])

    def run(script: Script, name: str = "gpt", prepare: Callable[[nn.Module], None] | None = None) -> Any:
        case, oracle, optimizer, scheduler = started(name, prepare)
        seen = script(Side(case, oracle, optimizer, scheduler))
        case, model, optimizer, scheduler = started(name, prepare)
        folder = nvme if "nvme" not in options else None
        config = fuyou.Config(activations=options["activations"])
        with fuyou.wrap(
            model, optimizer, folder, ram=options["ram"], gpu="1GiB", device="cpu", config=config
        ) as wrapped:
            found = script(Side(case, model, wrapped.optimizer, scheduler))
            assert models.differing(model, models.values_of(oracle)) == []
        assert len(pytree.tree_leaves(seen)) > 0
        assert same(found, seen), _first_difference(found, seen)
        assert models.differing(model, models.values_of(oracle)) == []
        return seen

    return run


def _first_difference(found: Any, seen: Any) -> str:
    for (path, a), b in zip(pytree.tree_flatten_with_path(found)[0], pytree.tree_leaves(seen), strict=False):
        if not same(a, b):
            return f"first at {pytree.keystr(path)}: {a} is not {b}"
    return "of another structure"


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


# --- forwards of other kinds ----------------------------------------------------------------------------------------


def test_eval_in_the_middle_of_everything(compare):
    def script(side: Side) -> Any:
        def evaluate(**how: bool) -> list[torch.Tensor]:
            side.model.eval()
            with torch.inference_mode() if how.get("inference") else torch.no_grad():
                results = [side.model(side.case.batch(index)["tokens"]).clone() for index in (50, 51)]
            side.model.train()
            return results

        seen: list[Any] = evaluate()
        for step in range(3):
            torch.manual_seed(step)
            loss = models.loss_of(side.model, side.case.batch(step))
            if step != 1:
                seen += evaluate()  # between a forward and its backward
            loss.backward()
            seen += evaluate(inference=step == 2)
            seen += [loss.item(), *side.finish()]
            side.model.eval()
            seen.append(models.loss_of(side.model, side.case.batch(60)).item())  # a graph that nobody uses
            side.model.train()
        return seen

    compare(script)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral"])
def test_generate_in_the_middle_of_training(compare, name):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        tokens = side.case.batch(7)["input_ids"][:, :5]
        for how in (
            {"do_sample": False},
            {"do_sample": True, "temperature": 2.0},
            {"num_beams": 2, "do_sample": False},
        ):
            side.model.eval()
            torch.manual_seed(11)
            seen.append(side.model.generate(tokens, max_new_tokens=6, **how))
            side.model.train()
            seen += side.steps(1)
        return seen

    compare(script, name)


def test_shapes_and_blocks_that_vary(compare):
    def script(side: Side) -> Any:
        seen = []
        layers = side.model.layers
        for step, length in enumerate((16, 5, 33, 16)):
            tokens = torch.randint(1237, (1 + step % 2, length), generator=torch.Generator().manual_seed(step))
            torch.manual_seed(step)
            kept = list(layers)
            if step == 1:  # layer drop, then out of turn, then twice
                side.model.layers = nn.ModuleList(kept[:1])
            elif step == 2:
                side.model.layers = nn.ModuleList([kept[1], kept[0], kept[1]])
            loss = side.model(tokens, tokens)
            side.model.layers = layers
            loss.backward()
            seen += [loss.item(), *side.finish()]
        return seen

    compare(script)


def test_two_graphs_at_once(compare):
    def script(side: Side) -> Any:
        seen = []
        for step in range(2):
            losses = []
            for micro in range(3):
                torch.manual_seed(micro)
                losses.append(models.loss_of(side.model, side.case.batch(10 * step + micro)))
            losses[1].backward()
            losses[0].backward()
            del losses[2:]
            seen += [each.item() for each in losses] + side.finish()
            torch.manual_seed(8)
            both = [models.loss_of(side.model, side.case.batch(8)) for _ in range(2)]
            (both[0] * 2 + both[1]).backward()
            seen += side.finish()
        return seen

    compare(script)


def test_autocast(compare):
    def script(side: Side) -> Any:
        seen = []
        for step in range(3):
            torch.manual_seed(step)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = models.loss_of(side.model, side.case.batch(step))
            loss.backward()
            seen += [loss.item(), *side.finish()]
        return seen

    compare(script)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_models_own_checkpointing(compare, name, reentrant):
    def checkpointed(model: nn.Module) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()

    compare(lambda side: side.steps(3), name, prepare=checkpointed)


class Norms(nn.Module):
    """Buffers that a forward changes, in blocks and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(3))
        self.last = nn.BatchNorm1d(32)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(32, 200))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).flatten(0, 1)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.cross_entropy(self.head(self.last(x)), labels.flatten())


def test_buffers_and_parametrised_weights(compare, monkeypatch):
    monkeypatch.setitem(models.CASES, "norms", models.Case(Norms, models.CASES["llama"].batch))

    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(3)
        return seen + [value.clone() for value in side.model.state_dict().values()]

    compare(script, "norms")


# --- errors in the user's loop ----------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["before backward", "in a block's forward", "in a backward", "before the step"])
def test_training_goes_on_after_an_exception(compare, where):
    def script(side: Side) -> Any:
        def stop(*_: Any) -> None:
            raise Interrupted

        seen: list[Any] = side.steps(1)
        for accumulated in (0, 1):
            if accumulated:
                seen += side.backwards(1)
            with pytest.raises(Interrupted):
                hook = None
                if where == "in a block's forward":
                    hook = side.model.layers[1].mlp.register_forward_pre_hook(stop)
                try:
                    torch.manual_seed(5)
                    loss = models.loss_of(side.model, side.case.batch(5))
                    if where == "in a backward":
                        hook = side.model.layers[0].mlp[0].weight.register_hook(stop)
                    if where != "before backward":
                        loss.backward()
                    stop()
                finally:
                    if hook is not None:
                        hook.remove()
            if where != "in a backward":
                seen += [None if each.grad is None else each.grad.clone() for _, each in side.named()]
            else:
                side.optimizer.zero_grad()  # which gradients an interrupted backward has summed is nobody's promise
            seen += side.steps(1)
        return seen

    compare(script)


# --- the optimizer's state, and before and after a run ----------------------------------------------------------------


def test_optimizer_state_goes_out_and_comes_back(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(2)
        kept = copy.deepcopy(side.optimizer.state_dict())
        weights = {name: value.clone() for name, value in side.model.state_dict().items()}
        seen.append(kept["state"])
        seen.append([{key: value for key, value in group.items() if key != "params"} for group in kept["param_groups"]])
        later = side.steps(2)
        side.optimizer.load_state_dict(copy.deepcopy(kept))  # torch takes the tensors themselves
        side.model.load_state_dict(weights)
        side.scheduler = models.schedule_of(side.optimizer)
        seen += later + side.steps(2)
        stream = io.BytesIO()
        torch.save(side.optimizer.state_dict(), stream)
        stream.seek(0)
        side.optimizer.load_state_dict(torch.load(stream))
        seen += side.steps(1)
        for _, each in side.named():
            seen += [side.optimizer.state[each][kind].clone() for kind in ("exp_avg", "exp_avg_sq", "step")]
        return seen

    compare(script)


def test_plain_and_wrapped_in_turns(nvme):
    """State and gradients go into a run and come out of it: at every border, in the middle of an accumulation too."""
    case, oracle, optimizer, scheduler = started("gpt")
    plain = Side(case, oracle, optimizer, scheduler)
    case, model, optimizer, scheduler = started("gpt")
    side = Side(case, model, optimizer, scheduler)
    for turn in range(5):
        folder = nvme if turn % 4 == 1 else None
        names = set(dir(model)), list(model.state_dict())
        step = optimizer.step  # the scheduler's, installed on the optimizer
        if turn % 2:
            run = fuyou.wrap(model, optimizer, folder, ram="1MiB" if folder else "64MiB", gpu="1GiB", device="cpu")
            side.optimizer = run.optimizer
        for each in (plain, side):
            each.step = 10 * turn
        assert [*side.finish(), *side.steps(2)] == [*plain.finish(), *plain.steps(2)] if turn else True
        assert [side.steps(1), side.backwards(1)] == [plain.steps(1), plain.backwards(1)]
        if turn % 2:
            run.close()
            run.close()
            side.optimizer = optimizer
            assert all(type(each) is nn.Parameter for each in model.parameters())
            assert all(type(each.grad) is torch.Tensor for each in model.parameters())
            assert (set(dir(model)), list(model.state_dict())) == names
            assert "forward" not in vars(model) and optimizer.step == step
        assert models.differing(model, models.values_of(oracle)) == []
        for mine, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            assert torch.equal(mine.grad, theirs.grad)
            assert same(dict(optimizer.state[mine]), dict(plain.optimizer.state[theirs]))


def test_plain_state_is_loaded_into_a_run_and_the_other_way_round(nvme):
    case, oracle, optimizer, scheduler = started("gpt")
    plain = Side(case, oracle, optimizer, scheduler)
    plain.steps(2)
    case, model, passed, _ = started("gpt")
    model.load_state_dict(oracle.state_dict())
    with fuyou.wrap(model, passed, nvme, ram="640KiB", gpu="1GiB", device="cpu") as run:
        run.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        side = Side(case, model, run.optimizer, models.schedule_of(run.optimizer))
        side.step = plain.step
        plain.scheduler = models.schedule_of(optimizer)
        assert side.steps(2) == plain.steps(2)
        state, weights = copy.deepcopy(run.optimizer.state_dict()), copy.deepcopy(model.state_dict())
    case, third, optimizer, _ = started("gpt")
    third.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert {each["step"].device.type for each in optimizer.state.values()} == {"cpu"}
    other = Side(case, third, optimizer, models.schedule_of(optimizer))
    other.step = plain.step
    plain.scheduler = models.schedule_of(plain.optimizer)
    assert other.steps(2) == plain.steps(2)
    assert models.differing(third, models.values_of(oracle)) == []


def test_bf16_state_survives_a_round_trip(nvme):
    """A bf16 run's state, loaded back after further steps, gives the same steps again: master and ties included."""
    case = models.CASES["gpt"]
    model = case.model().bfloat16()
    passed = models.optimizer_of(models.groups_of(model))
    with fuyou.wrap(model, passed, nvme, ram="640KiB", gpu="1GiB", device="cpu") as run:
        side = Side(case, model, run.optimizer, models.schedule_of(run.optimizer))
        side.steps(2)
        kept = copy.deepcopy(run.optimizer.state_dict())
        assert all(value["master"].dtype is torch.float32 for value in kept["state"].values())
        first = side.steps(2)
        weights = models.values_of(model)
        run.optimizer.load_state_dict(kept)
        side.step -= 2
        side.scheduler = models.schedule_of(run.optimizer)
        side.scheduler.last_epoch = 1
        side.scheduler.step()
        run.optimizer.load_state_dict(kept)
        side.scheduler.last_epoch = 2
        assert side.steps(2) == first
        assert models.differing(model, weights) == []


# --- bf16 -------------------------------------------------------------------------------------------------------------


def compare_bf16(script: Script, nvme: Path) -> None:
    """As `compare`, against the plain loop with masters; they too must be the same in the end."""
    case = models.CASES["gpt"]
    oracle = case.model()
    plain = models.PlainBf16(oracle)
    seen = script(Side(case, oracle, plain, models.schedule_of(plain.inner)))
    case, model, optimizer, scheduler = started("gpt")
    with fuyou.wrap(
        model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu", config=fuyou.Config(precision="bf16")
    ) as run:
        found = script(Side(case, model, run.optimizer, scheduler))
        masters = [run.optimizer.state[each]["master"] for each in model.parameters()]
        assert same(masters, list(plain.masters.values()))
        assert models.differing(model, models.values_of(oracle)) == []
    assert same(found, seen), _first_difference(found, seen)


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
