"""Programs of steps: what is done in each window of a step (guess_actions.py), how the step ends, and both run.

A step has four windows: between its backwards (after the first), before `step()`, right after it (gradients are still
there), and later, before the next forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from guess_actions import ACTIONS
from guess_tools import User, copied

WINDOWS = ("between", "before", "after", "later")


@dataclasses.dataclass(frozen=True)
class Step:
    """Backwards, a norm above which gradients are clipped, actions by name, how it ends, and what comes first.

    `first`: "restore" puts groups, frozen parameters and the mode back; "keep" and "recall" take and load copies of
    weights and state, for steps between them that leave NaN.
    """

    accumulation: int = 2
    clip: float | None = None
    between: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    ending: str = "step"
    first: str = ""

    def __str__(self) -> str:
        """What is out of the ordinary: failures name steps by it."""
        fields = ((each.name, getattr(self, each.name), each.default) for each in dataclasses.fields(self))
        return ", ".join(f"{name}={value!r}" for name, value, default in fields if value != default) or "ordinary"


# --- endings ------------------------------------------------------------------------------------------------------


def _step(user: User) -> None:
    user.optimizer.step()


def _skip(user: User) -> None:
    """Clear the gradients without a step, as ever after."""


def _twice(user: User) -> None:
    user.optimizer.step()
    user.optimizer.step()


def _closure(user: User) -> Any:
    def closure() -> torch.Tensor:
        user.optimizer.zero_grad()
        loss = user.loss(9000 + user.step)
        loss.backward()
        return loss

    return user.optimizer.step(closure)


def _cleared(user: User) -> None:
    user.optimizer.zero_grad()
    user.optimizer.step()


def _zeros(user: User) -> None:
    """Moments decay and weights move on."""
    user.optimizer.zero_grad(set_to_none=False)
    user.optimizer.step()


def scaler(inf: bool) -> Callable[[User], Any]:
    """torch.amp.GradScaler, which steps with `grad_scale`, or not at all where it found an inf."""

    def run(user: User) -> Any:
        scaling = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaling.scale(torch.ones(()))
        if inf and user.graded():
            user.graded()[-1].grad.view(-1)[0] = float("inf")
        if user.graded():
            scaling.step(user.optimizer)
            scaling.update()
        return scaling.get_scale()

    return run


def _looked_for_inf(user: User) -> bool:
    """By hand, as loops with a loss scale of their own do."""
    finite = all(bool(torch.isfinite(each.grad).all()) for each in user.graded())
    if finite:
        user.optimizer.step()
    return finite


ENDINGS: dict[str, Callable[[User], Any]] = {
    "step": _step,
    "step, gradients kept": _step,
    "skipped": _skip,
    "skipped, gradients kept": _skip,
    "two steps": _twice,
    "a closure": _closure,
    "cleared, then a step": _cleared,
    "zeroed, then a step": _zeros,
    "a scaler": scaler(inf=False),
    "a scaler finds inf": scaler(inf=True),
    "inf looked for by hand": _looked_for_inf,
}


# --- running ------------------------------------------------------------------------------------------------------


def take(user: User, step: Step) -> list[Any]:
    """The whole step, and what was seen on the way; whatever was seen is a copy."""
    user.step += 1
    seen: list[Any] = []

    def window(name: str) -> None:
        seen.extend((name, each, copied(ACTIONS[each](user))) for each in getattr(step, name))

    if step.first:
        getattr(user, step.first)()
    for micro in range(step.accumulation):
        seen.append(user.backward(100 * user.step + micro, step.accumulation))
        if micro == 0:
            window("between")
    window("before")
    if step.clip is not None:
        seen.append(torch.nn.utils.clip_grad_norm_(user.model.parameters(), step.clip).item())
    seen.append(copied(ENDINGS[step.ending](user)))
    window("after")
    user.scheduler.step()
    if not step.ending.endswith("kept"):
        user.optimizer.zero_grad()
    window("later")
    return seen


@dataclasses.dataclass(frozen=True)
class Program:
    """A script of these steps; equal ones are one, so that the plain side runs once for all places."""

    steps: tuple[Step, ...]

    def __call__(self, user: User) -> dict[str, Any]:
        return {f"{number} {each}": take(user, each) for number, each in enumerate(self.steps)}
