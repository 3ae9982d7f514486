"""The activations' resident: what a block's forward saves for backward, kept or recomputed.

[Note: saved tensors] Every tensor that autograd saves inside a block goes through `Frame.pack`. A view of a unit's
weights becomes its place in that unit and is fetched when backward asks for it, in any order. A view of one of the
block's inputs is kept: the frame holds the input anyway. Anything else is kept (KEEP), or counted and dropped
(RECOMPUTE): the first unpack of a backward runs the block's forward again on the inputs, under the random state,
autocast, attributes and buffers of the first run, and keeps what it saves until it is asked for. The inputs are held by
what may ask for it, which autograd lets go of as backward uses it: a loss that outlives its backward holds none. All of
this is one autograd graph: nothing that leaves a block otherwise than by its return value is cut off.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fuyou.core.errors import StateError
from fuyou.core.phase import phase
from fuyou.swap.book import Held, TensorBook
from fuyou.swap.packed import Kept, SavedAway, SavedHere, SavedWeight
from fuyou.swap.placement import Placement
from fuyou.swap.results import Giving, Saving
from fuyou.swap.snapshot import ModuleState, detached, snapshot, tensors_in
from fuyou.swap.stash import Stash
from fuyou.swap.stashed import Stashed
from fuyou.swap.surroundings import Autocast, RandomState
from fuyou.swap.unit import Unit
from fuyou.swap.version import Version
from fuyou.tiers.device import Device


class Weights(Protocol):
    """What a frame needs of whoever schedules the weights."""

    def unit_of(self, tensor: torch.Tensor) -> Unit | None: ...

    def backward_of(self, frame: Frame) -> None:
        """Backward needs this frame's block: its weights are on the device on return, until another block's are."""

    def writes_of(self, frame: Frame) -> int:
        """Grows with every change to the weights of the frame's block."""

    def resident_view(self, unit: Unit, frame: Frame) -> torch.Tensor:
        """The unit's flat weights on the device, for a backward that is under way."""


class Watch(Protocol):
    """Who measures a call of a block that recomputes."""

    def inputs(self, tensors: list[torch.Tensor]) -> None: ...

    def saved(self, tensor: torch.Tensor) -> None: ...

    def forward(self) -> contextlib.AbstractContextManager[None]: ...

    def recomputation(self) -> contextlib.AbstractContextManager[None]: ...


class HookStack:
    """The saved-tensor hooks that are in force now, one pair a thread and nesting."""

    def __init__(self) -> None:
        self._depth = threading.local()

    @contextlib.contextmanager
    def entered(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> Iterator[None]:
        depth = getattr(self._depth, "value", 0)
        self._depth.value = depth + 1
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            self._depth.value = depth

    def at_least_keeping(self) -> contextlib.AbstractContextManager[None]:
        """Outside of every frame: save the value that a parameter has now, not the parameter, which goes away again."""
        if getattr(self._depth, "value", 0):
            return contextlib.nullcontext()
        return self.entered(Kept, Kept.value)


class Rerun:
    """What it takes to run a frame's forward again. Every SavedIndex holds it, the frame itself only during its forward: it is
    gone with the last of those."""

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], writes: int, state: ModuleState, random: RandomState
    ) -> None:
        self.args, self.kwargs = args, kwargs
        self.writes = writes  # to the block's weights, before it
        self.state = state
        self.random = random
        self.autocast = Autocast()
        self.inputs: dict[int, Held] = {}  # storage → one input
        self.versions: list[Version] = []  # of the inputs
        self.away: dict[int, tuple[torch.Tensor, SavedAway, bool]] = {}  # id of what stands for an input → input
        self.results: Mapping[int, tuple[list[Any], bool]] = {}  # of costly operations, that were saved
        self.again: dict[int, dict[int, Held]] = {}  # graph task → index → tensor


class SavedIndex:
    """The index-th tensor that a frame's forward saved and dropped."""

    __slots__ = ("index", "rerun")

    def __init__(self, rerun: Rerun, index: int) -> None:
        self.rerun = rerun
        self.index = index


class _Enough(Exception):
    """Ends a recomputation once everything that was saved has been saved again."""


class Frame:
    """One call of one block: what it takes to give back every tensor that its forward saved."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        forward: Callable[..., Any],
        weights: Weights,
        book: TensorBook,
        hooks: HookStack,
        device: Device,
        *,
        stash: Stash,
        place: Placement,
        mutable_buffers: dict[str, bool],
        before: Frame | None,
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.needs_weights = False
        self._before = weakref.ref(before) if before is not None else None
        self._forward = forward
        self._weights = weights
        self._book = book
        self._hooks = hooks
        self._device = device
        self._stash = stash
        self._place = place
        self._watch = watch
        self._mutable_buffers = mutable_buffers
        self._saved: list[tuple[torch.Size, torch.dtype]] = []
        self._rerun: Rerun | None = None
        self._tiers: dict[int, tuple[str, StorageWeakRef]] = {}  # storage → where it goes, if not with the others
        self._stashed: list[Stashed] = []  # in the order in which they were saved; claimed by who saved them

    # Forward ---------------------------------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward, its saved tensors packed. The caller has its weights on the device."""
        if self._place.saved != "recompute":
            with self._placing(), self._hooks.entered(self.pack, self.unpack):
                return self._forward(*args, **kwargs)
        writes = self._weights.writes_of(self)
        kept_args, kept_kwargs = snapshot((args, kwargs), detach=True)
        state = ModuleState(self.module, self._mutable_buffers)
        random = RandomState(self._device.device)  # also where no input says on which device it draws
        rerun = self._rerun = Rerun(kept_args, kept_kwargs, writes, state, random)
        try:
            return self._run_first(rerun, args, kwargs)
        finally:
            self._rerun = None

    def _run_first(self, rerun: Rerun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        versions = []
        for tensor in tensors_in((rerun.args, rerun.kwargs)):
            held = Held(tensor, self._book, f"the inputs of {self.name}")
            rerun.inputs.setdefault(tensor.untyped_storage()._cdata, held)
            versions.append((tensor, tensor._version))
        rerun.versions = [Version(tensor) for tensor, _ in versions]
        if self._watch is not None:
            self._watch.inputs([tensor for tensor, _ in versions])
        watched = self._watch.forward() if self._watch is not None else contextlib.nullcontext()
        saving = Saving(dict(self._place.results), self._save_result) if self._place.results else None
        with watched, saving or contextlib.nullcontext(), self._hooks.entered(self.pack, self.unpack):
            result = self._forward(*args, **kwargs)
        rerun.results = saving.results(tensors_in(result)) if saving is not None else {}
        rerun.state.after_forward()
        if any(tensor._version != version for tensor, version in versions):
            raise StateError(
                f"Block {self.name} changes one of its inputs in place, so its forward cannot be run again in backward: "
                "wrap with Config(activations='keep')."
            )
        if self._place.inputs != "device":
            self._inputs_leave(rerun)
        return result

    def _placing(self) -> contextlib.AbstractContextManager[Any]:
        """Results of costly operations that are saved at all are saved where the placement says."""
        if not self._place.results:
            return contextlib.nullcontext()

        def note(tensor: torch.Tensor, tier: str) -> None:
            storage = tensor.untyped_storage()
            self._tiers[storage._cdata] = tier, StorageWeakRef(storage)  # which keeps the name from being used again

        return Saving(dict(self._place.results), note)

    def _save_result(self, tensor: torch.Tensor, tier: str) -> SavedAway | Held:
        away = self._put(tensor, tier) if tier != "device" else None
        return away or Held(tensor.detach(), self._book, f"what {self.name} saves")

    def _inputs_leave(self, rerun: Rerun) -> None:
        """What the forward has used: the recomputation brings it back."""

        def leave(tensor: torch.Tensor) -> torch.Tensor:
            away = self._put(tensor, self._place.inputs)
            if away is None:
                return tensor
            rerun.inputs.pop(tensor.untyped_storage()._cdata, None)
            stand_in = tensor.new_empty(0)
            rerun.away[id(stand_in)] = stand_in, away, tensor.requires_grad
            return stand_in

        rerun.args, rerun.kwargs = snapshot((rerun.args, rerun.kwargs), replace=leave)

    def _put(self, tensor: torch.Tensor, tier: str) -> SavedAway | None:
        stashed = self._stash.put(tensor, tier, f"what {self.name} saves")
        if stashed is None:
            return None
        if not self._stashed or self._stashed[-1] is not stashed:
            self._stashed.append(stashed)
        return SavedAway(stashed, tensor)

    # Both are called in the middle of a compiled module's code, and Dynamo would go on to compile them too.
    @torch.compiler.disable
    def pack(self, tensor: torch.Tensor) -> Any:
        unit = self._weights.unit_of(tensor)
        if unit is not None:
            self.needs_weights = True
            return SavedWeight(unit, tensor)
        if self._rerun is None:
            tier, _ = self._tiers.get(tensor.untyped_storage()._cdata, (self._place.saved, None))
            away = self._put(tensor, tier) if tier in ("host", "nvme") else None
            # Detached: autograd hands a leaf itself, and a parameter of another block goes away again after this call.
            return away or SavedHere(tensor, self._book, f"what {self.name} saves")
        if tensor.untyped_storage()._cdata in self._rerun.inputs:
            away = self._put(tensor, self._place.inputs) if self._place.inputs != "device" else None
            return away or SavedHere(tensor, self._book, f"the inputs of {self.name}")
        self.needs_weights = True
        if self._watch is not None:
            self._watch.saved(tensor)
        self._saved.append((tensor.shape, tensor.dtype))
        return SavedIndex(self._rerun, len(self._saved) - 1)

    # Backward --------------------------------------------------------------------------------------------------------

    @property
    def before(self) -> Frame | None:
        """The one that backward comes to after this one."""
        return self._before() if self._before is not None else None

    def fetch(self) -> bool:
        """Backward is here, or comes here next: what left comes back, what is needed first first. False where the device has no
        room for all of it now."""
        return all(stashed.fetch() for stashed in reversed(self._stashed))

    def leave(self) -> None:
        """Backward has gone on to another block: what this one brought back is at home, if anybody still refers to it."""
        for stashed in self._stashed:
            stashed.leave_again()

    @torch.compiler.disable
    def unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, SavedHere):
            return packed.value()
        if isinstance(packed, SavedAway):
            return packed.value()
        if isinstance(packed, SavedWeight):
            packed.version.check()
            flat = self._weights.resident_view(packed.unit, self)
            view = flat.as_strided(packed.size, packed.stride, packed.offset)
            # A graph of the backward itself (create_graph) may keep it longer than the weights stay.
            return view.clone() if torch.is_grad_enabled() else view
        return self._recomputed(packed.rerun, packed.index)

    def _recomputed(self, rerun: Rerun, index: int) -> torch.Tensor:
        task = torch._C._current_graph_task_id()
        tensors = rerun.again.get(task)
        if tensors is None or index not in tensors:  # asked for twice (retain_graph, create_graph): run once more
            self._weights.backward_of(self)
            tensors = rerun.again[task] = self._run_again(rerun)
        held = tensors.pop(index)
        if not tensors:
            del rerun.again[task]
        return held.tensor

    def _run_again(self, rerun: Rerun) -> dict[int, Held]:
        if self._weights.writes_of(self) != rerun.writes:
            raise StateError(
                f"The weights of block {self.name} were modified by an inplace operation between its forward and its "
                "backward, which runs it again and would see other weights: run backward first, or wrap with "
                "Config(activations='keep')."
            )
        if any(version.changed for version in rerun.versions):
            raise StateError(
                f"An input of block {self.name} was modified by an inplace operation between its forward and its backward, "
                "which runs it again and would see other values: wrap with Config(activations='keep')."
            )
        tensors: dict[int, Held] = {}
        count = 0

        def keep(tensor: torch.Tensor) -> Any:
            nonlocal count
            unit = self._weights.unit_of(tensor)
            if unit is not None:
                return SavedWeight(unit, tensor)
            if tensor.untyped_storage()._cdata in inputs:
                return tensor.detach()
            if count < len(self._saved) and (tensor.shape, tensor.dtype) != self._saved[count]:
                raise self._differs(count, (tensor.shape, tensor.dtype))
            tensors[count] = Held(tensor.detach(), self._book, f"what {self.name} saves")
            count += 1
            if count == len(self._saved):
                raise _Enough
            return tensor.detach()

        def give(packed: Any) -> torch.Tensor:
            return self.unpack(packed) if isinstance(packed, SavedWeight) else packed

        def back(tensor: torch.Tensor) -> torch.Tensor:
            _, away, requires_grad = rerun.away.get(id(tensor), (None, None, False))
            return detached(tensor) if away is None else away.tensor().requires_grad_(requires_grad)

        def result_of(saved: SavedAway | Held) -> torch.Tensor:
            return saved.tensor() if isinstance(saved, SavedAway) else saved.tensor.detach()

        watched = self._watch.recomputation() if self._watch is not None else contextlib.nullcontext()
        args, kwargs = snapshot((rerun.args, rerun.kwargs), replace=back)
        inputs = {each.untyped_storage()._cdata for each in tensors_in((args, kwargs))}
        with (
            watched,
            phase(f"fuyou::recompute {self.name}"),
            self._device.recorder.timed("recompute", f"recompute {self.name}"),
            self._device.within_budget(self.name),
            RandomState(rerun.random.device).kept(),
            rerun.autocast.entered(),
            rerun.state.before_forward(),
            torch.enable_grad(),
            Giving(rerun.results, result_of) if rerun.results else contextlib.nullcontext(),
            self._hooks.entered(keep, give),
            contextlib.suppress(_Enough),
        ):
            rerun.random.restore()
            self._forward(*args, **kwargs)
        if count != len(self._saved):
            raise self._differs(count, None)
        return tensors

    def _differs(self, count: int, got: tuple[torch.Size, torch.dtype] | None) -> StateError:
        expected = f"{len(self._saved)} tensors" if got is None else f"{self._saved[count]} as tensor {count}"
        seen = f"{count}" if got is None else f"{got}"
        return StateError(
            f"Block {self.name} saved {expected} in its forward and {seen} when it was run again for backward: its forward "
            "depends on something that changed in between. Wrap with Config(activations='keep')."
        )
