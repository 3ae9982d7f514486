"""What users do between backward, step and the next forward: a table. Each action returns what it saw."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from guess_tools import WIDTH, User, schedule_of
from safetensors.torch import load_file
from torch import nn

Act = Callable[[User], Any]

# --- parameters ---------------------------------------------------------------------------------------------------


def each_parameter(act: Callable[[nn.Parameter], Any]) -> Act:
    def on_all(user: User) -> Any:
        torch.manual_seed(user.step)
        with torch.no_grad():
            return [act(each) for each in user.parameters()]

    return on_all


def _ema(user: User) -> Any:
    average = user.kept.setdefault("average", [torch.zeros_like(each) for each in user.parameters()])
    with torch.no_grad():
        for mine, each in zip(average, user.parameters(), strict=True):
            mine.lerp_(each, 0.25)
    return average


def _ema_in(user: User) -> None:
    with torch.no_grad():
        for mine, each in zip(_ema(user), user.parameters(), strict=True):
            each.copy_(mine)


def _load_weights(user: User) -> None:
    user.model.load_state_dict({name: value.clone() * 0.9 for name, value in user.model.state_dict().items()})


def _fill(each: nn.Parameter) -> None:
    each.copy_(torch.linspace(-0.3, 0.2, each.numel()).view_as(each))


def _set_data(each: nn.Parameter) -> None:
    each.data = each.data * 0.99


PARAMETERS: dict[str, Act] = {
    "p.sum()": each_parameter(lambda each: each.sum().item()),
    "p.data": each_parameter(lambda each: each.data),
    "p.detach().clone()": each_parameter(lambda each: each.detach().clone()),
    "p.numpy()": each_parameter(lambda each: float(each.detach().numpy().sum())),
    "one p": lambda user: user.model.layers[1].up.weight.detach()[3].clone(),
    "model.state_dict()": lambda user: dict(user.model.state_dict()),
    "deepcopy of the model": lambda user: [each.detach() for each in copy.deepcopy(user.model).parameters()],
    "p.mul_": each_parameter(lambda each: each.mul_(0.99).sum().item()),
    "p.copy_": each_parameter(_fill),
    "init": each_parameter(lambda each: nn.init.normal_(each, std=0.1).sum().item()),
    "p.data.mul_": each_parameter(lambda each: each.data.mul_(0.99) is None),
    "p.data =": each_parameter(_set_data),
    "one element": each_parameter(lambda each: each.view(-1)[-1].add_(0.01) is None),
    "one p written": lambda user: user.model.layers[1].down.weight.data.mul_(0.9) is None,
    "reset_parameters": lambda user: user.model.layers[0].up.reset_parameters(),
    "EMA": _ema,
    "EMA copied in": _ema_in,
    "model.load_state_dict()": _load_weights,
}

# --- the optimizer's state ----------------------------------------------------------------------------------------


def each_state(act: Callable[[dict[str, torch.Tensor]], Any]) -> Act:
    def on_all(user: User) -> Any:
        return [act(user.optimizer.state[each]) for each in user.parameters() if each in user.optimizer.state]

    return on_all


def _replace_state(user: User) -> None:
    each = user.model.layers[1].up.weight
    if each in user.optimizer.state:
        mine = {key: value.clone() for key, value in user.optimizer.state[each].items()}
        user.optimizer.state[each] = {**mine, "exp_avg": mine["exp_avg"] * 0.5}


def _save_state(user: User) -> Any:
    """By the parameters' numbers. torch's own does not work for a parameter with state that is in no group any more."""
    if sum(len(group["params"]) for group in user.optimizer.param_groups) < len(user.parameters()):
        return None
    user.kept["state"] = copy.deepcopy(user.optimizer.state_dict())
    return dict(sorted(user.kept["state"]["state"].items()))


def _load_state(user: User) -> None:
    """Also hyperparameters come back; but groups may have been split since."""
    saved, groups = user.kept.get("state"), user.optimizer.param_groups
    if saved and [len(each["params"]) for each in saved["param_groups"]] == [len(each["params"]) for each in groups]:
        user.optimizer.load_state_dict(copy.deepcopy(saved))


def _del_state(user: User) -> None:
    each = user.model.layers[1].down.weight
    if each in user.optimizer.state:
        del user.optimizer.state[each]


def _set_moment(state: dict[str, torch.Tensor]) -> None:
    state["exp_avg_sq"] = state["exp_avg_sq"] * 1.5


def _count_on(state: dict[str, torch.Tensor]) -> None:
    state["step"] += 3


STATE: dict[str, Act] = {
    "exp_avg read": each_state(lambda state: state["exp_avg"].sum().item()),
    "step read": each_state(lambda state: state["step"].item()),
    "exp_avg.mul_": each_state(lambda state: state["exp_avg"].mul_(0.9).sum().item()),
    "exp_avg_sq set": each_state(_set_moment),
    "state[p] =": _replace_state,
    "state_dict() saved": _save_state,
    "load_state_dict()": _load_state,
    "del state[p]": _del_state,
    "state[p]['step'] +=": each_state(_count_on),
    "state.clear()": lambda user: user.optimizer.state.clear(),
}

# --- hyperparameters ----------------------------------------------------------------------------------------------


def every_group(**options: Any) -> Act:
    """The values given, or a number times what it was, for a number under a name that ends in _times."""

    def on_all(user: User) -> None:
        for group in user.optimizer.param_groups:
            for name, value in options.items():
                known = name.removesuffix("_times")
                group[known] = value if known == name else group[known] * value

    return on_all


def _one_group(user: User) -> None:
    user.optimizer.param_groups[0]["lr"] *= 0.5


def _there_and_back(user: User) -> None:
    rates = [group["lr"] for group in user.optimizer.param_groups]
    for group in user.optimizer.param_groups:
        group["lr"] = 0.0
    for group, rate in zip(user.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _split_group(user: User) -> None:
    """One parameter goes on in a group of its own."""
    groups = user.optimizer.param_groups
    if len(groups) == 2:
        each = groups[0]["params"].pop(1)
        user.optimizer.add_param_group({"params": [each], "lr": 3e-3, "betas": (0.8, 0.95)})
        user.scheduler = schedule_of(user.optimizer)


def _leave_out(user: User) -> None:
    if len(user.optimizer.param_groups[0]["params"]) > 3:
        user.optimizer.param_groups[0]["params"].pop(2)


def _exchange(user: User) -> None:
    """Two groups exchange their parameters."""
    first, second = user.optimizer.param_groups[:2]
    first["params"], second["params"] = second["params"], first["params"]


HYPER: dict[str, Act] = {
    "lr": every_group(lr_times=0.5),
    "lr of a group": _one_group,
    "lr there and back": _there_and_back,
    "betas": every_group(betas=(0.8, 0.97)),
    "eps": every_group(eps=1e-4),
    "weight_decay": every_group(weight_decay=0.3),
    "scheduler.step()": lambda user: user.scheduler.step(),
    "add_param_group": _split_group,
    "left out of its group": _leave_out,
    "groups exchange": _exchange,
}

# --- gradients ----------------------------------------------------------------------------------------------------


def each_gradient(act: Callable[[torch.Tensor], Any]) -> Act:
    def on_all(user: User) -> Any:
        torch.manual_seed(user.step)
        with torch.no_grad():
            return [act(each.grad) for each in user.graded()]

    return on_all


def set_gradient(make: Callable[[torch.Tensor], torch.Tensor | None]) -> Act:
    def on_all(user: User) -> None:
        torch.manual_seed(user.step)
        for each in user.graded():
            each.grad = make(each.grad)

    return on_all


def _drop_one(user: User) -> None:
    user.model.layers[1].up.weight.grad = None


def _exchange_gradients(user: User) -> None:
    first, second = user.model.layers[0].up.weight, user.model.layers[0].down.weight
    first.grad, second.grad = second.grad, first.grad


def put(value: float) -> Act:
    """Into one gradient: what it does to the weight stays, and spreads."""

    def into_one(user: User) -> None:
        if user.model.layers[1].up.weight.grad is not None:
            user.model.layers[1].up.weight.grad.view(-1)[4100] = value

    return into_one


def _hold(user: User) -> None:
    user.kept["gradients"] = [each.grad for each in user.graded()]


def _change_held(user: User) -> Any:
    """Held since an earlier step, whose update must not see this."""
    return [each.mul_(3.0).clone() for each in user.kept.pop("gradients", [])]


def clip(norm: float) -> Act:
    return lambda user: torch.nn.utils.clip_grad_norm_(user.model.parameters(), norm).item()


GRADIENTS: dict[str, Act] = {
    "grad.norm()": each_gradient(lambda grad: grad.norm().item()),
    "grad.sum()": each_gradient(lambda grad: grad.sum().item()),
    "grad.clone()": each_gradient(lambda grad: grad.clone()),
    "grad.mul_(1.0)": each_gradient(lambda grad: grad.mul_(1.0) is None),
    "grad.mul_(0.5)": each_gradient(lambda grad: grad.mul_(0.5) is None),
    "grad.mul_(0-dim)": each_gradient(lambda grad: grad.mul_(torch.tensor(0.3)) is None),
    "grad.mul_(0.5).mul_(2.0)": each_gradient(lambda grad: grad.mul_(0.5).mul_(2.0) is None),
    "grad.div_(3)": each_gradient(lambda grad: grad.div_(3.0) is None),
    "grad.zero_()": each_gradient(lambda grad: grad.zero_() is None),
    "grad.clamp_()": each_gradient(lambda grad: grad.clamp_(-1e-3, 1e-3) is None),
    "grad.add_(noise)": each_gradient(
        lambda grad: grad.add_(torch.randn(grad.shape, dtype=grad.dtype), alpha=1e-2) is None
    ),
    "grad[0] =": each_gradient(lambda grad: grad.__setitem__(0, 0.01)),
    "grad.data.mul_()": each_gradient(lambda grad: grad.data.mul_(0.3) is None),
    "grad = None": set_gradient(lambda grad: None),
    "grad = grad": set_gradient(lambda grad: grad),
    "grad = grad.clone()": set_gradient(lambda grad: grad.clone()),
    "grad = plain tensor": set_gradient(lambda grad: torch.randn(grad.shape, dtype=grad.dtype) * 0.1),
    "one grad = None": _drop_one,
    "grads exchanged": _exchange_gradients,
    "grads held": _hold,
    "held grads changed": _change_held,
    "clip_grad_norm_ bites": clip(0.01),
    "clip_grad_norm_ does not": clip(1e6),
    "clip_grad_value_": lambda user: (
        torch.nn.utils.clip_grad_value_(  # torch refuses a list without any gradient
            user.model.parameters(), 1e-3
        )
        if any(each.grad is not None for each in user.model.parameters())
        else None
    ),
    "zero_grad()": lambda user: user.optimizer.zero_grad(),
    "model.zero_grad(zeros)": lambda user: user.model.zero_grad(set_to_none=False),
    "inf": put(float("inf")),
    "nan": put(float("nan")),
}

# --- the loop around ----------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def _stop(*_: Any) -> None:
    raise Interrupted


def interrupted(in_backward: bool) -> Act:
    """Caught, and everything cleared: which gradients an interrupted backward has summed is nobody's promise."""

    def run(user: User) -> float:
        layer = user.model.layers[0]
        hook = layer.up.weight.register_hook(_stop) if in_backward else layer.register_forward_pre_hook(_stop)
        try:
            user.backward(7000 + user.step)
        except Interrupted:
            user.optimizer.zero_grad()
        else:
            raise RuntimeError("nothing interrupted it")
        finally:
            hook.remove()
        return user.backward(7100 + user.step)

    return run


def _evaluate(user: User) -> float:
    user.model.eval()
    with torch.no_grad():
        seen = user.loss(50).item()
    user.model.train()
    return seen


def _part(user: User) -> float:
    """A backward that reaches some parameters alone."""
    loss = (
        user.model.layers[0](torch.ones(1, WIDTH, dtype=user.model.scale.dtype)).square().mean()
        + user.model.scale.sum() * 0.1
    )
    loss.backward()
    return loss.item()


def _inputs(user: User) -> float:
    loss = user.loss(60)
    loss.backward(inputs=[user.model.layers[1].up.weight, user.model.scale])
    return loss.item()


def _autograd_grad(user: User) -> Any:
    return torch.autograd.grad(user.loss(61), [user.model.layers[1].up.weight, user.model.scale])


def _toggle(user: User) -> None:
    user.model.layers[1].requires_grad_(False)
    user.model.layers[1].requires_grad_(True)


def _freeze(user: User) -> None:
    """Until the groups are restored, or it is frozen again: its gradient still counts at this step."""
    wanted = not user.model.layers[0].up.weight.requires_grad
    user.model.layers[0].requires_grad_(wanted)


def on_the_run(act: Callable[[Any], Any]) -> Act:
    return lambda user: act(user.run) if user.run is not None else None


def _export(user: User) -> Any:
    if user.run is None:
        return {name: value for name, value in user.model.state_dict().items() if name != "head.weight"}  # it is tied
    folder = user.folder / f"exported-{len(list(user.folder.glob('exported-*')))}"
    user.run.save_pretrained(folder)
    found = load_file(folder / "model.safetensors")
    return {name: found[name] for name in user.model.state_dict() if name in found}


LOOP: dict[str, Act] = {
    "the same batch again": lambda user: user.backward(100 * user.step),
    "another batch": lambda user: user.backward(8000 + user.step),
    "a backward of some": _part,
    "backward(inputs=)": _inputs,
    "autograd.grad": _autograd_grad,
    "an eval forward": _evaluate,
    "a forward alone": lambda user: user.loss(51).item(),
    "requires_grad_ off and on": _toggle,
    "frozen": _freeze,
    "eval() and train()": lambda user: user.model.eval().train() is None,
    "run.settle()": on_the_run(lambda run: run.settle()),
    "run.report()": on_the_run(lambda run: None if run.report() else None),
    "save_pretrained()": _export,
    "one more step()": lambda user: user.optimizer.step(),
    "step() by hand, and zero_grad()": lambda user: (user.optimizer.step(), user.optimizer.zero_grad())[0],
    "interrupted in forward": interrupted(False),
    "interrupted in backward": interrupted(True),
}

ACTIONS = {**PARAMETERS, **STATE, **HYPER, **GRADIENTS, **LOOP}
