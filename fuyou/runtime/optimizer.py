"""run.optimizer: a real torch.optim.Optimizer whose state lies in the tiers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import ConfigError, StateError
from fuyou.core.phase import phase
from fuyou.runtime.enlist import Enlisting
from fuyou.runtime.handle import GradientHandle
from fuyou.runtime.schedule import Schedule
from fuyou.runtime.state import StateAttribute, StateView
from fuyou.swap.adam import AdamHyper
from fuyou.swap.gradients import Gradient, Gradients
from fuyou.swap.optimizer_state import StateAccess
from fuyou.swap.unit import Member
from fuyou.swap.update import MemberUpdate

_REFUSED_FLAGS = ("amsgrad", "maximize", "capturable", "differentiable")


class Optimizer(torch.optim.Optimizer):
    """AdamW or Adam over a wrapped model: shares the passed optimizer's groups, so its schedulers go on working.

    `step` applies the gradients that `p.grad` shows, with the group's hyperparameters of that moment; the arithmetic is
    torch's fused CPU kernel's, bit for bit, and so is what it makes of a scaler's `grad_scale` and `found_inf`, as of any
    fused optimizer. `state` and `state_dict` give handles: bytes are read where they are used.
    """

    state = StateAttribute()
    _step_supports_amp_scaling = True  # torch.amp.GradScaler: scales arrive as `grad_scale` and `found_inf`

    def __init__(
        self,
        model: nn.Module,
        passed: torch.optim.Optimizer,
        members: dict[int, Member],
        schedule: Schedule,
        gradients: Gradients,
        access: StateAccess,
        enlisting: Enlisting,
        guard: Callable[[], None],
    ) -> None:
        self._ready = False
        super().__init__(passed.param_groups, passed.defaults)
        self.param_groups = passed.param_groups  # the list itself
        self._model = model
        self._passed = passed
        self._members = members
        self._group_of: dict[int, dict[str, Any]] = {}  # by id of a parameter, until the next step
        self._by_hand: list[Gradient] = []  # of gradients that were set as plain tensors, until the next step
        self._schedule = schedule
        self._gradients = gradients
        self._access = access
        self._enlisting = enlisting
        self._guard = guard
        self.state = StateView(members, access, schedule, self._member, guard)
        self._ready = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's loss."""
        self._guard()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._passed._opt_called = True  # type: ignore[attr-defined]  # a scheduler of the passed optimizer looks here
        if float(getattr(self, "found_inf", 0)):
            self._begin()
            return loss  # as the fused kernel: neither weights nor step counts move
        self._schedule.before_step()
        self._unscale(getattr(self, "grad_scale", None))
        self._group_of.clear()
        self._by_hand.clear()
        found: dict[Member, tuple[AdamHyper, list[float | torch.Tensor]]] = {}
        for group in self.param_groups:
            hyper = self._hyper(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    member = self._member(parameter)
                    found[member] = hyper, self._scales(member)
        if not found:
            self._refuse_strangers()
        values = _numbers([scale for _, scales in found.values() for scale in scales])
        updates = {
            # A gradient times 1 is itself: clipping that does not bite changes nothing that was guessed.
            member: MemberUpdate(hyper, member.step + 1, tuple(value for value in map(values, scales) if value != 1.0))
            for member, (hyper, scales) in found.items()
        }
        with phase("fuyou::step"), self._schedule.told("step()"):
            self._schedule.step(updates)
        return loss

    def planned(self, member: Member) -> MemberUpdate | None:
        """What step() would do to a parameter, as its group stands now, with an unscaled gradient."""
        if not self._group_of:
            self._group_of = {id(each): group for group in self.param_groups for each in group["params"]}
        group = self._group_of.get(id(member.parameter))
        return None if group is None else MemberUpdate(self._hyper(group), member.step + 1, ())

    def _hyper(self, group: Mapping[str, Any]) -> AdamHyper:
        return _hyper(group, decoupled=isinstance(self._passed, torch.optim.AdamW))

    def _begin(self) -> None:
        """A first step that an inf skips: as torch's, state is there from now on, zeros at step 0."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state.begin(self._member(parameter))

    def _unscale(self, scale: torch.Tensor | None) -> None:
        """The fused kernel divides gradients by the scale, in place. By a power of two that is a multiplication."""
        if scale is None:
            return
        value = float(scale.item())
        exact = math.frexp(value)[0] == 0.5 and 2.0**-100 < value < 2.0**100
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and value != 1.0:
                    parameter.grad.mul_(1 / value) if exact else parameter.grad.div_(value)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._schedule.end_backward()  # left by an exception: what it put aside comes back before it is cleared
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. A parameter that was in no group so far gets homes for its gradient and state: BudgetError where
        the budgets have no room for them, and no group is added."""
        if not self._ready:
            super().add_param_group(param_group)
            return
        self._guard()
        refuse_flags(type(self._passed).__name__, param_group)
        super().add_param_group(param_group)
        try:
            for parameter in self.param_groups[-1]["params"]:
                member = self._known(parameter)
                if parameter.requires_grad:
                    self._enlisting.state(member)
        except BaseException:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As torch's: {"state": {index: {...}}, "param_groups": [...]}. Reads nothing: its tensors are handles, which
        show the state of now ([Note: state handles]) and are read one by one as they are used, copied or saved."""
        self._guard()
        groups, state, index = [], {}, 0
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["params"] = list(range(index, index + len(group["params"])))
            groups.append(packed)
            for parameter in group["params"]:
                if parameter in self.state:
                    state[index] = dict(self.state[parameter])
                index += 1
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Groups are updated in place; moments and master are written as they are, never cast to the weights' dtype, and
        what is there already (a handle of that very state) is left alone. A parameter without state given has none."""
        self._guard()
        groups = state_dict["param_groups"]
        sizes, given = [len(group["params"]) for group in self.param_groups], [len(group["params"]) for group in groups]
        if sizes != given:
            raise ConfigError(
                f"load_state_dict: this optimizer has groups of {sizes} parameters and was given {given}."
            )
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in groups for index in group["params"]]
        states = [state_dict["state"].get(index, {}) for index in indices]
        self.state.load(zip(parameters, states, strict=True))
        for mine, theirs in zip(self.param_groups, groups, strict=True):
            mine.update({key: value for key, value in theirs.items() if key != "params"})

    def _member(self, parameter: torch.Tensor) -> Member:
        """The parameter's, with a home for its state."""
        member = self._known(parameter)
        if not member.optimized:
            self._enlisting.state(member)
        return member

    def _known(self, parameter: torch.Tensor) -> Member:
        member = self._members.get(id(parameter))
        if member is None:
            raise StateError(
                f"A parameter of shape {tuple(parameter.shape)} in the optimizer was not in the model when fuyou.wrap was "
                "called: add it to the model before wrapping."
            )
        return member

    def _refuse_strangers(self) -> None:
        """A step that would train nothing, though backward reached parameters that came after wrap (get_peft_model)."""
        for name, parameter in self._model.named_parameters():
            if id(parameter) not in self._members and parameter.grad is not None:
                raise StateError(
                    f"step() has nothing to update: {name} has a gradient and was added to the model after fuyou.wrap, "
                    "which does not know it. Build the whole model (adapters too) and its optimizer first, then wrap."
                )

    def _scales(self, member: Member) -> list[float | torch.Tensor]:
        """Bring the gradient's bytes at home up to date; what is left to apply to them."""
        grad = member.parameter.grad
        if isinstance(grad, GradientHandle) and grad.gradient.member is member:
            gradient = grad.gradient
            self._gradients.flush(gradient)
            return list(gradient.scales)
        if isinstance(grad, GradientHandle):  # another parameter's, whose bytes are not where this one's are
            grad = self._gradients.materialise(grad.gradient, lent=True)
        if grad is None or grad.layout is not torch.strided:
            raise StateError(f"The gradient of {member.name} is sparse: use dense gradients.")
        self._by_hand.append(Gradient(member))  # held until its bytes are used
        self._gradients.adopt(self._by_hand[-1], grad)
        return []


def _numbers(scales: Sequence[float | torch.Tensor]) -> Callable[[float | torch.Tensor], float]:
    """Scales as numbers. Those on a device come over in one copy: each by itself would wait for the device once more."""
    tensors = {id(each): each for each in scales if isinstance(each, torch.Tensor)}
    on_device = {key: each for key, each in tensors.items() if each.device.type != "cpu"}
    values = {key: float(each) for key, each in tensors.items() if key not in on_device}
    if on_device:
        together = torch.stack([each.double() for each in on_device.values()]).tolist()
        values.update(zip(on_device, together, strict=True))
    return lambda scale: values[id(scale)] if isinstance(scale, torch.Tensor) else float(scale)


def check_optimizer(optimizer: Any) -> None:
    """ConfigError for anything but torch's AdamW or Adam with options that fuyou computes."""
    base = next((cls for cls in (torch.optim.AdamW, torch.optim.Adam) if isinstance(optimizer, cls)), None)
    if base is None or type(optimizer).step not in (torch.optim.AdamW.step, torch.optim.Adam.step):
        raise ConfigError(
            f"fuyou trains with torch.optim.AdamW or Adam and was given {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}: pass one of those two."
        )
    for group in optimizer.param_groups:
        refuse_flags(type(optimizer).__name__, group)
    if not all(group.get("fused") for group in optimizer.param_groups):
        warnings.warn(
            f"{type(optimizer).__name__} is trained with the arithmetic of fused=True, whatever foreach or fused say: it "
            "differs from the other two in about 0.3 % of elements by one unit in the last place.",
            stacklevel=4,
        )


def refuse_flags(name: str, group: Mapping[str, Any]) -> None:
    for flag in _REFUSED_FLAGS:
        if group.get(flag):
            raise ConfigError(f"{name}({flag}=True) is not supported: pass {flag}=False.")


def _hyper(group: Mapping[str, Any], *, decoupled: bool) -> AdamHyper:
    beta1, beta2 = group["betas"]
    return AdamHyper(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group.get("decoupled_weight_decay", decoupled)),
    )
