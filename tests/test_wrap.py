"""Forwards of other kinds, errors in the loop, and what goes into a run and comes out: as in plain PyTorch, bit by bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import models
import pytest
import torch
from sides import Side, same, started
from torch import nn

import fuyou

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


class Mixed(torch.autograd.Function):
    """Saves an input, an output and a weight; keeps another weight as an attribute; has a second, integer result."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = torch.tanh(x @ weight.t()) * scale
        ctx.save_for_backward(x, weight, result)
        ctx.scale = scale  # not through save_for_backward: no hook of anybody sees it
        index = result.argmax(-1)
        ctx.mark_non_differentiable(index)
        return result, index

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, weight, result = ctx.saved_tensors
        tanh = result / ctx.scale
        inner = grads[0] * ctx.scale * (1 - tanh.square())
        flat, outer = inner.flatten(0, -2), (grads[0] * tanh).flatten(0, -2)
        return inner @ weight, flat.t() @ x.flatten(0, -2), outer.sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.layers = nn.ModuleList(CustomLayer() for _ in range(3))
        self.head = nn.Linear(32, 200)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class CustomLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed, index = Mixed.apply(x, self.weight, self.scale)
        return x + mixed + (index % 3).unsqueeze(-1) * 0.1


def test_custom_autograd_functions(compare, monkeypatch):
    monkeypatch.setitem(models.CASES, "custom", models.Case(Custom, models.CASES["llama"].batch))
    compare(lambda side: side.steps(3), "custom")


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
