"""The schedule of a step: what is fetched, released, taken off the device and updated, and when.

    forward:   for each block in turn: get its weights · start fetching the next blocks' · compute · release
    backward:  for each block in turn, last first: get its weights · start fetching those before · recompute and
               differentiate · each gradient leaves the device as soon as it is summed, and where it is complete its chunk's
               update goes into the queue as a guess · release
    step:      guesses that were right are accepted, the other updates go into the queue; the next forward's first blocks
               are fetched, each chunk behind its own update

    the queue, beside all of this: for each chunk, soonest needed first: read i+2 · update i · write i−1

Order is learnt from what happens and used only as a hint for fetching and updating ahead: a block that is called twice,
never, or out of turn is right, only slower.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fuyou.core.errors import StateError
from fuyou.core.phase import phase
from fuyou.core.recorder import Recorder
from fuyou.plan.planner import SLOT_BLOCKS
from fuyou.runtime.away import Away
from fuyou.runtime.foresight import Foresight
from fuyou.runtime.gauges import Gauge
from fuyou.runtime.handle import GradientHandle
from fuyou.runtime.measure import StepClock
from fuyou.runtime.micro_batch import MicroBatches
from fuyou.runtime.placing import Placing
from fuyou.runtime.state_handle import StateHandle
from fuyou.swap.activations import Frame, HookStack
from fuyou.swap.book import TensorBook
from fuyou.swap.gradients import Gradients
from fuyou.swap.optimizer_state import StateAccess
from fuyou.swap.placement import KEEP
from fuyou.swap.snapshot import tensors_in
from fuyou.swap.stash import Stash
from fuyou.swap.surroundings import Autocast
from fuyou.swap.unit import Chunk, Member, Unit
from fuyou.swap.update import MemberUpdate
from fuyou.swap.updates import Updates
from fuyou.swap.weights import Swapper
from fuyou.tiers.device import Device

FETCH_BLOCKS = SLOT_BLOCKS - 1  # ahead of the one that computes, as far as the device has room


class BlockCalls:
    """What the schedule knows of one block (or, with no index, of the model's own forward)."""

    def __init__(self, index: int | None, name: str, module: nn.Module, units: list[Unit]) -> None:
        self.index = index
        self.name = name
        self.module = module
        # Compiled in place (module.compile()), its call is the compiled code; module hooks then run inside of it.
        self.compiled = module._compiled_call_impl is not None
        self.forward: Callable = module._compiled_call_impl if self.compiled else module.forward  # type: ignore[assignment]
        self.units = units
        self.has_children = any(True for _ in module.children())
        self.mutable_buffers: dict[str, bool] = {}


class Schedule:
    """Where weights, gradients, activations and optimizer state meet. Called by what install.py puts on the model."""

    def __init__(
        self,
        *,
        blocks: list[BlockCalls],
        units: list[Unit],
        swapper: Swapper,
        gradients: Gradients,
        updates: Updates,
        away: Away,
        book: TensorBook,
        stash: Stash,
        hooks: HookStack,
        clock: StepClock,
        gauge: Gauge,
        device: Device,
        placing: Placing,
        update: str,
        micro_batches: MicroBatches,
        traffic: Callable[[], dict[str, int]],
        recorder: Recorder,
    ) -> None:
        self._recorder = recorder
        self._backward_began = 0.0  # of `_current`
        self.blocks = blocks
        self._units = units
        self._swapper = swapper
        self._gradients = gradients
        self._updates = updates
        self._away = away
        self._book = book
        self._stash = stash
        self._hooks = hooks
        self._clock = clock
        self._gauge = gauge
        self._device = device
        self._placing = placing
        self._guess = update in ("auto", "speculative")
        self.planned: Callable[[Member], MemberUpdate | None] = lambda member: None
        self._foresight = Foresight(lambda member: self.planned(member), patient=update == "auto")
        self._micro_batches = micro_batches
        self._traffic = traffic
        self._moved = traffic()
        self._placed: set[Unit] = set()  # in this forward
        self._dropped = 0  # guesses, until the last step
        self.enlist: Callable[[Member], None] = lambda member: None
        # [Note: what a commit holds]: before the updates of a step are asked for; before a forward.
        self.stepped: Callable[[int], None] = lambda step: None
        self.before_forward: Callable[[], None] = lambda: None
        self.restart = "Start again from a checkpoint (run.save): Config(resume=FOLDER)."  # after a step that is torn
        self._lock = threading.RLock()
        self._after: dict[tuple[str, int | None], int] = {}  # (phase, block) → the block that came next last time
        self._last: dict[str, int | None] = {}  # phase → the block before this one
        self._frames: weakref.WeakKeyDictionary[Frame, BlockCalls] = weakref.WeakKeyDictionary()
        self._last_frame: Callable[[], Frame | None] = lambda: None  # of the last call
        self._next_frame: Frame | None = None  # whose activations come back when gradients have left
        self._current: BlockCalls | None = None  # whose weights backward holds
        self._entered: weakref.WeakSet[Frame] = weakref.WeakSet()  # of its calls, those that backward has come to
        self._tasks: set[int] = set()  # graph tasks that will call end_backward
        self._aside: dict[Member, GradientHandle] = {}  # `p.grad` of before, while autograd sums the new one
        self._handles: dict[Member, weakref.ref[GradientHandle]] = {}

    @contextlib.contextmanager
    def told(self, during: str) -> Iterator[None]:
        """Errors are told to whoever writes post-mortems before they go on."""
        try:
            yield
        except BaseException as error:
            self._device.failed(error, during)
            raise

    # Forward ---------------------------------------------------------------------------------------------------------

    def model_forward(self, model: BlockCalls, args: tuple, kwargs: dict) -> Any:
        """The model's own forward: its loose parameters are there for all of it."""
        self._last["forward"] = None
        self._placed.clear()
        if torch._C._current_graph_task_id() == -1:
            self.end_backward()  # an earlier backward may have ended in an exception
        self._away.settle()
        self._gradients.send_home()
        if torch.is_grad_enabled():
            self._placing.begin_forward(sum(each.numel() for each in tensors_in((args, kwargs))))
        return self.block_forward(model, args, kwargs)

    def block_forward(self, block: BlockCalls, args: tuple, kwargs: dict) -> Any:
        """One call of a block: weights in, the next block's on their way, compute, weights free to go."""
        self.before_forward()
        self._clock.begin()
        self._stash.turn()
        self._gradients.discharge_left()
        held = self._get(block)
        frames: list[Frame] = []  # one for each slice of rows

        def run(args: tuple, kwargs: dict) -> Any:
            if not torch.is_grad_enabled():
                return block.forward(*args, **kwargs)
            frames.append(self._frame(block))
            return frames[-1].run(args, kwargs)

        try:
            self._prefetch("forward", block)
            name = f"forward {block.name}"
            lane = "model" if block.index is None else "compute"
            with self._device.within_budget(block.name), phase(f"fuyou::{name}"), self._recorder.timed(lane, name):
                result = self._micro_batches.run(block, args, kwargs, run)
            result = self._without_weight_views(result)
            if Autocast().enabled:  # its cache would keep casts of weights that are released now
                torch.clear_autocast_cache()
            self._gauge.sample()
        finally:
            for unit in held:
                self._swapper.release(unit)
        if frames and block.index is not None:
            self._watch(result, frames[-1])
        return result

    def _frame(self, block: BlockCalls) -> Frame:
        hooks_inside = block.compiled and (block.module._forward_hooks or block.module._forward_pre_hooks)
        place, watch = self._placing.of(block.index) if block.index is not None else (KEEP, None)
        if hooks_inside and place.saved == "recompute":  # hooks must run once
            place, watch = KEEP, None
        if block.compiled:  # operations are inside of compiled code, where nobody counts them
            place, watch = replace(place, results=()), None
        frame = Frame(
            block.name, block.module, block.forward, self, self._book, self._hooks, self._device, stash=self._stash,
            place=place, mutable_buffers=block.mutable_buffers, before=self._last_frame(),
            watch=watch,
        )  # fmt: skip
        self._last_frame = weakref.ref(frame)
        self._frames[frame] = block
        return frame

    def _without_weight_views(self, result: Any) -> Any:
        """A result that is a view of a weight would be gone with it: give a copy."""
        tensors = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor)]
        if not any(self.unit_of(each) is not None for each in tensors):
            return result
        return pytree.tree_map_only(
            torch.Tensor, lambda each: each.clone() if self.unit_of(each) is not None else each, result
        )

    def _watch(self, result: Any, frame: Frame) -> None:
        """Backward announces itself at the block's outputs, before it needs anything."""
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(lambda gradient, frame=frame: self._announced(frame))

    # Backward --------------------------------------------------------------------------------------------------------

    def unit_of(self, tensor: torch.Tensor) -> Unit | None:
        if tensor.layout is not torch.strided or isinstance(tensor, (GradientHandle, StateHandle)):
            return None
        return self._swapper.unit_of(tensor)

    def _announced(self, frame: Frame) -> None:
        block = self._frames[frame]
        with self.told(f"the backward of {block.name}"):
            self._bring(frame)
            # A leaf module that saved nothing to run again for (an embedding) needs no weights in backward. One with
            # children may hold the user's own checkpoint, which saves out of our sight.
            if frame.needs_weights or block.has_children:
                self.backward_of(frame)

    def backward_of(self, frame: Frame) -> None:
        block = self._frames[frame]
        self._expect_end()
        if block.index is None:
            return
        if block is self._current:
            self._entered.add(frame)
            return
        with self._lock:
            # Autograd runs the youngest nodes first: when another block begins, all of this one's that are ready have
            # run. One that was not (it waits for a gradient from elsewhere) fetches again.
            self._leave_current()
            self._gradients.discharge_left()
            self._get(block)
            self._current = block
            self._backward_began = time.perf_counter()
            self._entered.add(frame)
            self._placing.begin_backward(block.index)
            self._prefetch("backward", block)
            for unit in block.units:
                for chunk in unit.chunks:
                    self._gradients.fetch(chunk)
            self._bring(frame)
            self._gauge.sample()

    def _bring(self, frame: Frame) -> None:
        """What left the device for this block's backward comes back, and what the next one needs behind it: when the gradients
        of the blocks so far have left, or this block's begin to, so that the device need not hold a large one beside two
        blocks' activations."""
        self._next_frame = frame.before if frame.fetch() else None
        self._bring_next()

    def _bring_next(self, *, at_once: bool = False) -> None:
        if self._next_frame is not None and (at_once or not self._gradients.leaving()):
            frame, self._next_frame = self._next_frame, None
            frame.fetch()

    def writes_of(self, frame: Frame) -> int:
        """Grows with every change to the weights of the frame's block."""
        return sum(unit.writes for unit in self._frames[frame].units)

    def resident_view(self, unit: Unit, frame: Frame) -> torch.Tensor:
        self.backward_of(frame)
        self._bring_next()
        if not (self._current is not None and unit in self._current.units):
            with self._clock.stall("weights"):
                self._swapper.get(unit)  # of the model's own forward: pinned, so it stays after the release
            self._swapper.release(unit)
        return unit.flat

    def before_accumulate(self, member: Member) -> None:
        """Autograd is about to sum into `p.grad`: what is there by handle goes aside, and is added when it is done."""
        self._expect_end()
        parameter = member.parameter
        handle = parameter.grad
        mine = isinstance(handle, GradientHandle) and handle.gradient.member is member
        reference = self._handles.get(member)
        old = reference() if reference is not None and not mine else None
        if old is not None and (handle is None or isinstance(handle, GradientHandle)) and member not in self._aside:
            self._gradients.save(old.gradient)  # gone from `p.grad`, but somebody still looks at it
        if isinstance(handle, GradientHandle):
            self._aside[member] = handle
            parameter.grad = None

    def after_accumulate(self, member: Member) -> None:
        """`p.grad` holds what this backward brought: it leaves the device."""
        parameter = member.parameter
        new, old = parameter.grad, self._aside.pop(member, None)
        if new is None:
            return
        if new.layout is not torch.strided:
            raise StateError(f"The gradient of {member.name} is sparse: use dense gradients (Embedding(sparse=False)).")
        self._bring_next(at_once=True)
        self._gauge.sample(new.numel() * new.itemsize)
        with self._clock.stall("gradients"), phase(f"fuyou::gradient {member.name}"):
            self._foresight.summed(member)
            gradient = self._gradients.take(member, new, old.gradient if old is not None else None)
        if old is None or old.gradient is not gradient:
            old = GradientHandle(gradient, self._gradients)
            self._handles[member] = weakref.ref(old)
        parameter.grad = old

    def end_backward(self) -> None:
        """A backward is over, or was left by an exception."""
        if self._tasks:
            self._placing.end_backward()
        self._tasks.clear()
        with self._lock:
            self._leave_current()
        for member, handle in self._aside.items():  # autograd.grad: the first hook fires, the second does not
            if member.parameter.grad is None:
                member.parameter.grad = handle
        self._aside.clear()
        self._gradients.end_backward()
        self._next_frame = None
        self._stash.rest()
        self._last["backward"] = None

    def _expect_end(self) -> None:
        task = torch._C._current_graph_task_id()
        if task not in self._tasks and task != -1:
            if not self._tasks:
                self._away.settle()  # what was changed since forward: backward sees it, as it would in plain PyTorch
            self._tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)

    def _leave_current(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._placing.end_block()  # before the compute stream is made to wait for the next one's weights
            self._recorder.span("compute", self._backward_began, time.perf_counter(), f"backward {current.name}")
        for frame in list(self._entered):
            frame.leave()
        self._entered.clear()
        for unit in current.units if current is not None else ():
            self._swapper.release(unit)

    # Step ------------------------------------------------------------------------------------------------------------

    def complete(self, chunk: Chunk) -> None:
        """All that a backward brings for a chunk's gradient is home, or on its way: its update may be guessed."""
        if self._guess:
            wanted = self._foresight.of(chunk)
            if wanted is not None:
                self._updates.guess(chunk, wanted)

    def step(self, updates: dict[Member, MemberUpdate]) -> None:
        """Update the members given, chunk by chunk in the order in which the next forward needs them."""
        self.stepped(self._updates.step + 1)
        self._gradients.end_backward()  # what was changed since is on its way home
        wanted: dict[Chunk, dict[Member, MemberUpdate]] = {}
        for unit in sorted(self._units, key=lambda unit: unit.place):
            if any(member in updates for member in unit.members):
                self._swapper.invalidate(unit)
                unit.writes += 1
                for chunk in unit.chunks:
                    its = {member: updates[member] for member, _, _ in chunk.parts if member in updates}
                    if its:
                        wanted[chunk] = its
        record: dict[str, Any] = {}
        with self._clock.stall("update"):
            self._updates.request(wanted, record)
        dropped = self._updates.counts["dropped"]
        self._foresight.end_step(dropped > self._dropped)
        self._dropped = dropped
        for member, update in updates.items():
            member.step = update.step
        self._gradients.end_step()
        now = self._traffic()
        self._clock.end({name: now[name] - self._moved[name] for name in now}, record)
        self._moved = now
        self._gauge.end_step()
        self._last.clear()
        self._placing.end_step(record.get("seconds", 0.0))
        self._fetch_ahead("forward", None)

    def plan_summary(self) -> dict[str, Any]:
        """Of what was decided about activations, for a report: see Placing.summary."""
        return self._placing.summary()

    @property
    def torn(self) -> str:
        """Why nothing may be trained on or saved any more."""
        error = self._updates.failure
        if error is None:
            return ""
        return (
            f"Step {self._updates.step} ended half-way ({type(error).__name__}: {error}): the weights are partly those "
            f"of before and partly those of after it. {self.restart}"
        )

    def before_step(self) -> None:
        """What the user changed through loans is part of what the step starts from."""
        self.end_backward()
        self._away.settle(stale=True)

    def settle_weights(self) -> None:
        """What the user changed through loans is home: a master that is read now knows of it."""
        self._away.settle()

    def replace_state(self, member: Member, values: dict[str, torch.Tensor], access: StateAccess) -> None:
        """Write optimizer state, and with a master the weights: nothing on the device or in a loan shows these any more."""
        self.end_backward()
        self._away.settle(stale_of=member if "master" in values else None)
        self._swapper.invalidate(member.unit)
        member.unit.writes += "master" in values
        access.write(member, values)

    # Weights ---------------------------------------------------------------------------------------------------------

    def _get(self, block: BlockCalls) -> list[Unit]:
        """The block's weights, each held once; on an error none is."""
        held: list[Unit] = []
        try:
            for unit in block.units:
                with self._clock.stall("weights"):
                    self._swapper.get(unit)
                held.append(unit)
                self._notice_unfrozen(unit)
        except BaseException:
            for unit in held:
                self._swapper.release(unit)
            raise
        return held

    def _notice_unfrozen(self, unit: Unit) -> None:
        """Before anything is computed with it, a parameter that was frozen until now gets a home for its gradient."""
        if torch.is_grad_enabled():
            for member in unit.members:
                if not member.watched and member.parameter.requires_grad:
                    self.enlist(member)

    def _prefetch(self, phase: str, block: BlockCalls) -> None:
        """Start fetching what came after this block last time."""
        if block.index is None:
            return
        self._after[phase, self._last.get(phase)] = block.index
        self._last[phase] = block.index
        if phase == "forward" and torch.is_grad_enabled():
            for unit in block.units:
                if unit not in self._placed:
                    self._placed.add(unit)
                    unit.place = len(self._placed)
        self._fetch_ahead(phase, block.index)

    def _fetch_ahead(self, phase: str, index: int | None) -> None:
        for _ in range(FETCH_BLOCKS):
            index = self._after.get((phase, index))
            if index is None or not all(self._swapper.fetch(unit) for unit in self.blocks[index].units):
                return
