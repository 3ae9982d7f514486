"""Everything that fuyou puts on a model and on the optimizer it was given, and takes off again."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import StateError
from fuyou.runtime import away
from fuyou.runtime.schedule import BlockCalls, Schedule
from fuyou.swap.unit import Member, Unit

_MARK = "_fuyou_wrapped"
_PLACES = ("forward", "_compiled_call_impl")  # where a block's call is caught


def is_wrapped(model: nn.Module) -> bool:
    """Some module of `model` carries a live run's forward, or (under a forward that was put over it) its parameters."""
    if any(hasattr(vars(module).get(name), _MARK) for module in model.modules() for name in _PLACES):
        return True
    return any(type(parameter).__module__ == away.__name__ for parameter in model.parameters())


class Installation:
    """What is installed, in full:

    - on each block, and on the model itself: the instance attribute `forward`, which calls the original one; on a block
      that is compiled in place the attribute `_compiled_call_impl`, so that fetching stays outside of compiled code;
    - on each parameter that requires a gradient, now or later: a hook before its gradient is summed, and one after;
    - on the optimizer that was passed: the instance attribute `step`, which raises and names run.optimizer.

    Parameters change class and data while they are away ([Note: away]); Away gives them back.
    """

    def __init__(self, schedule: Schedule, model: BlockCalls, units: list[Unit], guard: Callable[[], None]) -> None:
        self._undo: list[Callable[[], None]] = []
        calls: list[tuple[BlockCalls, Callable[[BlockCalls, tuple, dict], Any]]] = [
            (block, schedule.block_forward) for block in schedule.blocks
        ]
        if not any(block.module is model.module for block in schedule.blocks):
            calls.append((model, schedule.model_forward))
        for block, run in calls:
            self._put_forward(block, run, guard, schedule.told)
        self._schedule = schedule
        for unit in units:
            if unit.trainable:
                for member in unit.members:
                    self.watch(member)

    def replace_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The passed optimizer's `step` would update NaN placeholders: it raises instead."""

        def step(*_: Any, **__: Any) -> None:
            raise StateError(
                "This optimizer was passed to fuyou.wrap, which updates its parameters by run.optimizer.step(): call that one."
            )

        step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # a scheduler built before wrap looks for this
        had = vars(optimizer).get("step")
        optimizer.step = step  # type: ignore[assignment]

        def undo() -> None:
            del optimizer.step
            if had is not None:
                optimizer.step = had  # type: ignore[method-assign]

        self._undo.append(undo)

    def watch(self, member: Member) -> None:
        """A parameter that requires a gradient: its hooks, once."""
        if member.watched:
            return
        schedule, parameter = self._schedule, member.parameter

        def accumulated(_: torch.Tensor) -> None:
            with schedule.told(f"the gradient of {member.name}"):
                schedule.after_accumulate(member)

        before = parameter.register_hook(lambda gradient: schedule.before_accumulate(member))
        after = parameter.register_post_accumulate_grad_hook(accumulated)
        self._undo += [before.remove, after.remove]
        member.watched = True

    def remove(self) -> None:
        """In reverse order, once."""
        while self._undo:
            self._undo.pop()()

    def _put_forward(
        self,
        block: BlockCalls,
        run: Callable[[BlockCalls, tuple, dict], Any],
        guard: Callable[[], None],
        told: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        removed: list[bool] = []

        @torch.compiler.disable  # compiled code would look inside and burn the fetching in
        def forward(_: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            if removed:  # somebody (Accelerate, TRL) has put a forward of their own over this one: it goes on working
                return block.forward(*args, **kwargs)
            guard()
            with told(f"the forward of {block.name}"):
                return run(block, args, kwargs)

        # A bound method with the signature of the original and nothing to unwrap: transformers reads the signature,
        # Accelerate takes a forward apart by `__wrapped__` and binds what it finds to the model.
        functools.update_wrapper(forward, block.forward, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
        del forward.__wrapped__
        forward.__signature__ = _signature_with_self(block.forward)
        setattr(forward, _MARK, True)
        module, place = block.module, _PLACES[block.compiled]
        had, ours = vars(module).get(place), types.MethodType(forward, module)
        setattr(module, place, ours)

        def undo() -> None:
            removed.append(True)
            if vars(module).get(place) is not ours:
                return
            delattr(module, place)
            if had is not None:
                setattr(module, place, had)

        self._undo.append(undo)


def _signature_with_self(bound: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(bound)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[first, *signature.parameters.values()])
