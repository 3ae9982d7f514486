"""The optimizer's state and the weights as tensors that lie elsewhere: what plain PyTorch shows and keeps, they do too."""

from __future__ import annotations

import collections
import copy
import gc
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import psutil
import pytest
import safetensors.torch
import torch
from sides import Side, compare_bf16, same, started
from torch import nn

import fuyou
from fuyou.core.sizes import format_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_of(side: Side) -> dict[str, dict[str, torch.Tensor]]:
    """Name → the state of a parameter, where it has some; of a plain bf16 loop, of its master."""
    plain = isinstance(side.optimizer, models.PlainBf16)
    state = side.optimizer.inner.state if plain else side.optimizer.state
    keys = {name: side.optimizer.masters[each] if plain else each for name, each in side.named()}
    return {name: state[key] for name, key in keys.items() if key in state}


def copies(side: Side) -> list[torch.Tensor]:
    """What the whole state is now."""
    kinds = ("step", *MOMENTS)
    return [each[kind].clone() for each in state_of(side).values() for kind in kinds]


@pytest.fixture
def trained(nvme: Path) -> Iterator[tuple[fuyou.Run, Side, Side]]:
    """(run, its side, the plain side), three steps in; state on NVMe."""
    case, oracle, optimizer, scheduler = started("gpt")
    plain = Side(case, oracle, optimizer, scheduler)
    case, model, optimizer, scheduler = started("gpt")
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu") as run:
        side = Side(case, model, run.optimizer, scheduler)
        assert side.steps(3) == plain.steps(3)
        yield run, side, plain


def traffic(run: fuyou.Run) -> tuple[int, int]:
    return run._tiers.store.read_bytes, run._tiers.store.write_bytes


# --- reading ----------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda each: each.numpy().sum(),
    "tolist": lambda each: each.flatten()[:3].tolist(),
    "item": lambda each: (each.flatten()[0].item(), float(each.max()), bool((each > 0).any()), f"{each.sum():.3e}"),
    "norm": lambda each: (each.norm(), torch.linalg.vector_norm(each, 1), each.abs().mean()),
    "views": lambda each: [part.clone() for part in (each.view(-1)[1:5], each.T, each[0], each[..., :2], each[None])],
    "parts": lambda each: [part.sum() for part in (*each.flatten().split(each.numel() // 5 + 1), *each[:4], each[:2][1:])],
    "data": lambda each: (each.data.sum(), each.detach().clone(), each.data.view(-1)[0].clone()),
    "casts": lambda each: (each.double(), each.to(torch.bfloat16), each.float().sum(), each.cpu().sum()),
    "arithmetic": lambda each: (each * 2, 1 - each, each + each, torch.stack([each, each]), torch.equal(each, each + 0)),
    "like": lambda each: (torch.zeros_like(each), each.new_ones(3), torch.full_like(each.T, 2).stride()),
    "foreach": lambda each: (torch._foreach_norm([each, each]), torch._foreach_mul([each, each], 2.0)),
    "metadata": lambda each: (each.shape, each.stride(), each.dtype, each.device, each.requires_grad, len(each), each.dim()),
    "repr": repr,
    "copy": lambda each: (copy.copy(each).sum(), copy.deepcopy(each), each.clone()),
}  # fmt: skip


@pytest.mark.parametrize("how", READS)
def test_state_is_read(how, trained):
    _, side, plain = trained
    for (name, mine), theirs in zip(state_of(side).items(), state_of(plain).values(), strict=True):
        for kind in MOMENTS:
            assert same(READS[how](mine[kind]), READS[how](theirs[kind])), (name, kind)


def test_state_leaves_as_ordinary_tensors(trained, tmp_path):
    """Saved, pickled and copied: plain tensors with the right bytes, and a plain optimizer goes on from them."""
    _, side, plain = trained
    expected = plain.optimizer.state_dict()["state"]
    state = side.optimizer.state_dict()["state"]
    torch.save(state, tmp_path / "state.pt")
    flat = {f"{index}.{kind}": value for index, each in state.items() for kind, value in each.items()}
    safetensors.torch.save_file(flat, tmp_path / "state.safetensors")
    again = safetensors.torch.load_file(tmp_path / "state.safetensors")
    ways = [
        torch.load(tmp_path / "state.pt", weights_only=True),
        pickle.loads(pickle.dumps(state)),
        copy.deepcopy(state),
        {index: {kind: again[f"{index}.{kind}"] for kind in each} for index, each in state.items()},
        {
            index: {kind: torch.from_numpy(value.numpy()) for kind, value in each.items()}
            for index, each in state.items()
        },
    ]
    for got in ways:
        assert all(type(value) is torch.Tensor for each in got.values() for value in each.values())
        assert same(got, expected)
    kept = copy.deepcopy(side.optimizer.state[side.named()[0][1]])
    assert type(kept) is dict and same(kept, expected[0])


def test_handles_follow_later_steps(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        state = side.optimizer.state_dict()
        rows = [each["exp_avg"][0] for each in state["state"].values()]  # views follow too
        seen += side.steps(2)
        seen += [value.clone() for each in state["state"].values() for value in each.values()]
        return seen + [row.clone() for row in rows]

    compare(script)


def test_the_mapping_is_torchs(compare):
    def script(side: Side) -> Any:
        state, (_, first) = side.optimizer.state, side.named()[0]
        seen: list[Any] = [len(state), first in state, state.get(first, 5), state.get(first)]
        seen += side.steps(1)
        seen += [len(state), first in state, list(state[first]), sum(len(each) for each in state.values())]
        return [*seen, [name for name, each in side.named() if any(each is key for key in state)], dict(state[first])]

    compare(script)


# --- writing ----------------------------------------------------------------------------------------------------------


def _each(change: Callable[[torch.Tensor], Any]) -> Callable[[Side], None]:
    def apply(side: Side) -> None:
        for state in state_of(side).values():
            for kind in MOMENTS:
                change(state[kind])

    return apply


def _foreach(side: Side) -> None:
    torch._foreach_mul_([each[kind] for each in state_of(side).values() for kind in MOMENTS], 0.5)


def _exchange(side: Side) -> None:
    """One moment into the other, and both from one tensor."""
    for state in state_of(side).values():
        state["exp_avg"].copy_(state["exp_avg_sq"])
        torch.add(state["exp_avg"], state["exp_avg_sq"], out=state["exp_avg"])


def _put(side: Side) -> None:
    for state in state_of(side).values():
        before = state["exp_avg"]
        state["exp_avg"] = before * 0.5
        assert not torch.equal(before, state["exp_avg"])  # who holds the old tensor keeps it
        state["exp_avg_sq"] *= 0.25
        state["step"] += 3


def _update(side: Side) -> None:
    for state in state_of(side).values():
        state.update(exp_avg=torch.full_like(state["exp_avg"], 0.25))


def _steps(side: Side) -> None:
    for state in state_of(side).values():
        state["step"].fill_(7)


def _restart(side: Side) -> None:
    for state in state_of(side).values():
        state["step"].zero_()


WRITES: dict[str, Callable[[Side], Any]] = {
    "zero_": _each(lambda each: each.zero_()),
    "mul_": _each(lambda each: each.mul_(0.5)),
    "copy_": _each(lambda each: each.copy_(torch.full(each.shape, 0.01))),
    "item": _each(lambda each: each.__setitem__(0, 0.25)),
    "views": _each(lambda each: (each.view(-1)[1:].mul_(0.5), each.T[:1].fill_(0.125), each.unbind(0)[0].add_(1))),
    "data": _each(lambda each: each.data.mul_(0.5)),
    "data set": _each(lambda each: setattr(each, "data", each * 0.5)),
    "random": _each(lambda each: each.uniform_(0, 0.01)),
    "iadd": _each(lambda each: each.__iadd__(0.01)),
    "clone": _each(lambda each: each.clone().zero_()),  # changes nothing
    "foreach": _foreach,
    "from each other": _exchange,
    "put": _put,
    "update": _update,
    "step": _steps,
    "step zero": _restart,
}


@pytest.mark.parametrize("how", WRITES)
def test_state_is_written(how, compare):
    def script(side: Side) -> Any:
        torch.manual_seed(5)
        seen: list[Any] = side.steps(1)
        WRITES[how](side)
        seen += copies(side) + side.backwards()
        WRITES[how](side)
        return seen + side.finish() + side.steps(1) + copies(side)

    compare(script)


@pytest.mark.parametrize("how", WRITES)
def test_bf16_state_is_written(how, nvme):
    """The tie bit of the master lies beside exp_avg_sq: it survives what is written there."""

    def script(side: Side) -> Any:
        torch.manual_seed(5)
        seen: list[Any] = side.steps(1)
        WRITES[how](side)
        return seen + side.steps(1) + copies(side)

    compare_bf16(script, nvme)


def test_bf16_masters_are_written(nvme):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        for _, each in side.named():
            held = each.data
            if isinstance(side.optimizer, models.PlainBf16):
                master = side.optimizer.masters[each]
                master.mul_(0.7)
                each.data = master.bfloat16()
            else:
                side.optimizer.state[each]["master"].mul_(0.7)
            held.fill_(5.0)  # what was read before is the parameter's no more
        return seen + [each.detach().clone() for _, each in side.named()] + side.steps(1)

    compare_bf16(script, nvme)


def _clear(side: Side) -> None:
    side.optimizer.state.clear()


def _assign_empty(side: Side) -> None:
    side.optimizer.state = collections.defaultdict(dict)


def _delete_one(side: Side) -> None:
    del side.optimizer.state[side.named()[1][1]]


def _empty_one(side: Side) -> None:
    side.optimizer.state[side.named()[1][1]] = {}


def _pop_one(side: Side) -> list[Any]:
    return list(side.optimizer.state.pop(side.named()[1][1]).values())


def _load_the_first(side: Side) -> None:
    side.optimizer.load_state_dict(side.first)


def _assign_one(side: Side) -> None:
    given = {"step": torch.tensor(4.0)}
    for kind in MOMENTS:
        given[kind] = torch.full(side.named()[1][1].shape, 0.02)
    side.optimizer.state[side.named()[1][1]] = given


def _set_up(side: Side) -> None:
    """As optimizers do in their own step."""
    _clear(side)
    for _, each in side.named():
        state = side.optimizer.state[each]
        if len(state) == 0:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.full_like(each, 0.01)
            state["exp_avg_sq"] = torch.full_like(each, 0.02)


def _turn_round(side: Side) -> None:
    """Give two parameters of one shape each other's state."""
    (one, other) = (dict(side.named())[f"layers.{index}.qkv.weight"] for index in range(2))
    state = side.optimizer.state_dict()
    places = [each for group in side.optimizer.param_groups for each in group["params"]]
    i, j = (next(k for k, each in enumerate(places) if each is wanted) for wanted in (one, other))
    state["state"][i], state["state"][j] = state["state"][j], state["state"][i]
    side.optimizer.load_state_dict(state)


REPLACED: dict[str, Callable[[Side], Any]] = {
    each.__name__.strip("_"): each
    for each in (
        _clear, _assign_empty, _delete_one, _empty_one, _pop_one, _load_the_first, _assign_one, _set_up, _turn_round
    )
}  # fmt: skip


@pytest.mark.parametrize("how", REPLACED)
def test_state_is_replaced(how, compare):
    def script(side: Side) -> Any:
        side.first = side.optimizer.state_dict()  # empty: it is loaded later
        seen: list[Any] = side.steps(2)
        held = [value for each in state_of(side).values() for value in each.values()]
        result = REPLACED[how](side)
        seen += [result, [value.clone() for value in held]]  # tensors from before keep what they showed
        return seen + side.steps(2) + copies(side)

    compare(script)


def test_what_cannot_be_put_into_state_is_refused(trained):
    _, side, plain = trained
    name, parameter = side.named()[1]
    state = side.optimizer.state[parameter]
    before = copies(side)
    moments = {kind: torch.zeros(parameter.shape) for kind in MOMENTS}
    for wrong, words in [
        (lambda: state.__setitem__("average", torch.zeros(3)), "'average' was put into the optimizer's state of"),
        (lambda: state.__setitem__("exp_avg", torch.zeros(3)), r"exp_avg of scale has shape \(3,\)"),
        (lambda: state.__delitem__("exp_avg"), "whole or not there"),
        (lambda: state.pop("exp_avg"), "whole or not there"),
        (lambda: state["exp_avg"].resize_(3), "shapes and dtypes of optimizer state are fixed"),
        (lambda: setattr(state["exp_avg"], "data", torch.zeros(3)), "shapes of optimizer state are fixed"),
        (lambda: state["step"].fill_(0.5), "counts steps"),
        (lambda: side.optimizer.state.__setitem__(parameter, moments), "lacks step"),
        (lambda: side.optimizer.state.__setitem__(parameter, {**moments, "step": -1}), "counts steps"),
        (lambda: side.optimizer.state.__setitem__(nn.Parameter(torch.zeros(3)), moments), "was not in the model"),
    ]:
        with pytest.raises(fuyou.FuyouError, match=words):
            wrong()
    broken = copy.deepcopy(plain.optimizer.state_dict())
    broken["state"][5]["exp_avg"] = torch.zeros(1, 2, 3)
    broken["param_groups"][0]["lr"] = 5.0
    with pytest.raises(fuyou.FuyouError, match=r"has shape \(1, 2, 3\)"):
        side.optimizer.load_state_dict(broken)
    assert same(copies(side), before) and side.steps(1) == plain.steps(1)


# --- nothing moves that need not ---------------------------------------------------------------------------------------


def test_loading_a_runs_own_state_moves_nothing(trained):
    run, side, plain = trained
    before = traffic(run)
    side.optimizer.load_state_dict(side.optimizer.state_dict())
    for _, each in side.named():
        side.optimizer.state[each] = side.optimizer.state[each]
    moved = side.optimizer.state_dict()
    for each in moved["state"].values():  # as a client moves it to a device and back; "meta" stands for cuda
        each.update({kind: value.to("meta") for kind, value in each.items()})
    assert {value.device.type for each in moved["state"].values() for value in each.values()} == {"meta"}
    side.optimizer.load_state_dict(moved)
    assert traffic(run) == before
    assert side.steps(1) == plain.steps(1)
    with pytest.raises(fuyou.FuyouError, match="copied to meta and not used before the optimizer changed it"):
        side.optimizer.load_state_dict(moved)


def test_accelerate_prepares_a_trained_run_without_moving_state(trained):
    accelerate = pytest.importorskip("accelerate")
    run, side, plain = trained
    before = traffic(run)
    _, optimizer = accelerate.Accelerator(cpu=True).prepare(side.model, side.optimizer)
    assert traffic(run) == before
    side.optimizer = optimizer
    assert side.steps(2) == plain.steps(2)


def test_trainer_begins_on_a_trained_run_without_moving_state(nvme, tmp_path):
    transformers = pytest.importorskip("transformers")
    case, model, optimizer, scheduler = started("llama")
    with fuyou.wrap(model, optimizer, nvme, ram="320KiB", gpu="1GiB", device="cpu") as run:
        Side(case, model, run.optimizer, scheduler).steps(1)
        run.settle()
        for unit in run._units:
            unit.arrival.wait()  # the next forward's first blocks are on their way already
        before, seen = traffic(run), []

        class Begin(transformers.TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                seen.append(traffic(run))

        rows = [{key: value[0] for key, value in case.batch(index).items()} for index in range(4)]
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
        )
        transformers.Trainer(
            model, arguments, train_dataset=rows, optimizers=(run.optimizer, scheduler), callbacks=[Begin()]
        ).train()
        assert seen == [before]


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_handles_outlive_their_run(trained):
    run, side, plain = trained
    state = side.optimizer.state_dict()["state"]
    row = state[0]["exp_avg"][0]
    copied = state[1]["exp_avg"].to("meta")
    passed = run._passed
    run.close()
    assert same(copy.deepcopy(state), plain.optimizer.state_dict()["state"])
    state[0]["exp_avg"].mul_(2.0)  # it is the passed optimizer's now
    (first, *_), (theirs, *_) = [[each for group in one.param_groups for each in group["params"]]
                                 for one in (passed, plain.optimizer)]  # fmt: skip
    plain.optimizer.state[theirs]["exp_avg"].mul_(2.0)
    assert torch.equal(passed.state[first]["exp_avg"], plain.optimizer.state[theirs]["exp_avg"])
    assert torch.equal(row, plain.optimizer.state[theirs]["exp_avg"][0]) and copied.norm().device.type == "meta"
    with pytest.raises(fuyou.FuyouError, match="closed"):
        side.optimizer.state[side.named()[0][1]]


def test_handles_that_do_not_fit_say_so(trained, monkeypatch):
    run, side, _ = trained
    state = side.optimizer.state_dict()["state"]
    wanted = state[0]["step"]
    monkeypatch.setattr(
        "fuyou.runtime.handing_back.free_host_bytes", lambda: 300_000
    )  # the weights, 269 KB, and no state
    monkeypatch.setattr("fuyou.runtime.state.free_host_bytes", lambda: 8)
    with pytest.warns(UserWarning, match="state .* does not fit"):
        run.close()
    assert wanted.item() == 3.0
    with pytest.raises(fuyou.FuyouError, match="did not fit into free memory"):
        state[0]["exp_avg"].sum()


def test_a_forked_child_may_not_use_state(trained):
    run, side, _ = trained
    handles = side.optimizer.state_dict()["state"][0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for each in handles.values():
                try:
                    each.sum()
                except fuyou.FuyouError as error:
                    os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read().count("forked child") == 3
    assert handles["exp_avg"].norm() > 0


# --- weights are lent once ----------------------------------------------------------------------------------------------


def test_weights_read_twice_are_the_same_memory(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        state = side.model.state_dict()
        seen.append(state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr())
        seen.append(len({value.data_ptr() for value in state.values()}))
        for _, each in side.named():
            a, b, c, whole = each.data, each.data, each.detach(), each.detach().view(-1)
            a.add_(1)
            seen += [b.clone(), c.clone(), whole.clone(), each.sum().item()]
            whole.mul_(0.5)
            seen += [a.clone(), b.clone(), each.detach().clone()]
        seen += [value.clone() for value in state.values()] + side.steps(1)
        for _, each in side.named():
            old = each.data
            each.data = old * 0.5
            old.zero_()  # not the parameter's any more
            each.data = each.data
            seen.append(each.detach().clone())
        return seen + side.steps(1)

    compare(script)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "mul_": lambda each: each.mul_(2),
    "view": lambda each: each.view(-1)[0].fill_(1),
    "detach": lambda each: each.detach().mul_(2),
    "data": lambda each: each.data.mul_(2),  # which no version counter sees: backward takes the new values
    "nothing": lambda each: each.sum(),
}


@pytest.mark.parametrize("how", CHANGES)
def test_weights_changed_under_a_graph(how, compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        for _, each in side.named():
            penalty = each.square().sum() + each.exp().mean()
            with torch.no_grad():
                CHANGES[how](each)
            try:
                penalty.backward()
                seen.append(each.grad.clone())
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                seen.append("refused")
            each.grad = None
        return seen + side.steps(1)

    seen = compare(script)
    assert ("refused" in [each for each in seen if isinstance(each, str)]) == (how in ("mul_", "view", "detach"))


@pytest.mark.parametrize("how", ["mul_", "view", "detach", "nothing"])
def test_weights_changed_between_forward_and_backward(how, compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        for name, each in side.named():
            if each.dim() == 2 and "position" not in name:
                loss = models.loss_of(side.model, side.case.batch(3))
                with torch.no_grad():
                    CHANGES[how](each)
                try:
                    loss.backward()
                    seen.append((name, loss.item()))
                except RuntimeError as error:
                    assert "modified by an inplace operation" in str(error)
                    seen.append(name)
                side.optimizer.zero_grad()
        return seen + side.steps(1)

    refused = [each for each in compare(script) if isinstance(each, str)]
    assert bool(refused) == (how != "nothing")


def test_weights_read_before_moments_were_written_are_the_parameters_still(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        held = [each.data for _, each in side.named()]
        _each(lambda each: each.mul_(0.5))(side)
        for each in held:
            each.mul_(0.5)
        return seen + [each.detach().clone() for _, each in side.named()] + side.steps(1)

    compare(script)


def test_deepcopy_knows_what_was_just_changed(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.steps(1)
        for _, each in side.named():
            held = each.data
            held.mul_(3)
            seen += [copy.deepcopy(each).sum().item(), held.sum().item()]
        return seen

    compare(script)


# --- reads that are refused -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_after_a_read_that_was_refused(nvme):
    """The half of a state_dict() hangs in a frame that refers to itself, as transformers' do: its loans end all the same."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return models.Gpt(width=64, layers=6).train()

    case = models.CASES["gpt"]
    plain = Side(case, build(), None, None)
    plain.optimizer = models.optimizer_of(models.groups_of(plain.model))
    plain.scheduler = models.schedule_of(plain.optimizer)
    model = build()
    passed = models.optimizer_of(models.groups_of(model))
    whole = sum(each.numel() * 4 for each in model.parameters())

    class Keeps:
        def save(self) -> Any:
            self.me, self.half = self, {}
            for name, each in model.named_parameters():
                self.half[name] = each.data

    gc.disable()
    try:
        with fuyou.wrap(model, passed, nvme, ram="2MiB", gpu="1GiB", device="cpu") as run:
            run._ledger.budgets["device"] = whole + run._ledger._allowance["device"] - 4096
            side = Side(case, model, run.optimizer, models.schedule_of(run.optimizer))
            assert side.steps(1) == plain.steps(1)
            for _ in range(2):
                with pytest.raises(fuyou.BudgetError) as refused:
                    Keeps().save()
                words = str(refused.value)
                assert words.startswith("Reading ") and "read before are still referred to" in words
                assert format_bytes(whole) in words and "run.save_pretrained(folder) streams them" in words
                assert refused.value.tier == "device" and refused.value.shortfall_bytes > 0
                del refused
                assert side.steps(1) == plain.steps(1)
            assert run.report().dict()["tiers"]["device"]["peak_bytes"] <= run._ledger.budgets["device"]
            assert models.differing(model, models.values_of(plain.model)) == []
    finally:
        gc.enable()


def test_torchs_own_fused_update_is_refused(trained):
    _, side, plain = trained
    own = torch.optim.AdamW(side.model.parameters(), fused=True)
    assert side.backwards() == plain.backwards()
    with pytest.raises(
        fuyou.FuyouError, match="torch.optim's fused update was called on parameters of a wrapped model"
    ):
        own.step()
    assert side.finish() == plain.finish()
    assert models.differing(side.model, models.values_of(plain.model)) == []


def test_state_dict_reads_nothing(trained):
    """Handles cost no bytes, and a saved one is read alone."""
    run, side, _ = trained
    before = traffic(run)
    state = side.optimizer.state_dict()["state"]
    assert len(side.optimizer.state) == len(state) and traffic(run) == before
    wanted = state[0]["exp_avg"]  # of the embedding, 1237 rows of 32
    torch.save(wanted, io.BytesIO())
    once = traffic(run)[0] - before[0]
    assert wanted.nbytes <= once <= 3 * wanted.nbytes + (1 << 17)  # the chunks that it lies in: weights and state
    rows = [row.sum() for row in wanted[:50]]  # taken apart: read once for all rows
    assert len(rows) == 50 and traffic(run)[0] - before[0] == 2 * once


def test_saving_state_takes_the_memory_of_one_tensor(nvme):
    torch.manual_seed(0)
    model = models.Gpt(width=256, layers=6, vocabulary=2000)
    passed = models.optimizer_of(models.groups_of(model))
    with fuyou.wrap(model, passed, nvme, ram="12MiB", gpu="1GiB", device="cpu") as run:
        tokens = torch.randint(0, 2000, (1, 16))
        models.loss_of(model, {"tokens": tokens, "labels": tokens}).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        state = run.optimizer.state_dict()
        whole = sum(value.nbytes for each in state["state"].values() for value in each.values())
        process, sizes = psutil.Process(), []

        class Sink(io.BytesIO):
            def write(self, data: Any) -> int:
                sizes.append(process.memory_info().rss)
                return len(data)

        before = process.memory_info().rss
        torch.save(state, Sink())
        assert max(sizes) - before < whole / 2, (whole, max(sizes) - before)
