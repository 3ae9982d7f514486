"""Vertical micro-batches: inside a block the batch is run `micro_batch` rows at a time.

A block's weights come once a call and its gradients leave once a backward, whatever the batch size: all slices are in one
autograd graph, which sums their gradients before a parameter sees them. Each slice is a call of its own to whoever runs
the block, with random numbers of its own and, in backward, a recomputation of its own. This is plain PyTorch with every
block applied to the same slices of rows ([Note: rows]) and the results concatenated (the order of GreedySnake).

[Note: tried] What a block does with its rows is not guessed. Before the first call of each kind (module mode, structure
of the arguments) is cut, the block is run four times without gradients on the first and the last row: on one of them,
on both, and on both with the other's floating numbers NaN and the other's integers replaced. What was returned for a
row may not have changed with the other; what scales with the rows is per row, the rest may depend on neither. So a
block that normalises over the batch, has time in dimension 0, or was given a tensor whose dimension 0 is as large as the
batch by chance, runs whole, and this is said once. Random state, buffers and attributes are as before afterwards; hooks
on modules inside of the block do not see these runs.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fuyou.core.errors import FuyouError
from fuyou.core.phase import phase
from fuyou.runtime.rows import (
    Before,
    Call,
    Kinds,
    Mismatch,
    cut,
    is_by_row,
    join,
    leaves,
    row_count,
    signature,
    write_back,
)
from fuyou.swap.snapshot import ModuleState, snapshot, tensors_in
from fuyou.swap.surroundings import RandomState


class BlockCall(Protocol):
    """What is asked of a block: see schedule.BlockCalls."""

    index: int | None
    name: str
    module: nn.Module
    compiled: bool
    forward: Callable[..., Any]
    mutable_buffers: dict[str, bool]


class Verdict(NamedTuple):
    """Why a kind of call is not cut, or else which tensors that come of it are per row."""

    reason: str
    kinds: Kinds


class MicroBatches:
    """Runs each block's calls `size` rows at a time where that can be done; None never cuts."""

    def __init__(self, size: int | None, blocks: Sequence[BlockCall], notes: list[str]) -> None:
        self._size = size
        self._notes = notes
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self._said: set[str] = set()
        self._batches: set[int] = set()  # dimension 0 of what the model's own forward was given last
        self._in_model = 0
        if size is not None:
            for block in blocks:
                if _normalises_over_the_batch(block.module):
                    self._say(block, "it normalises over the batch")

    def run(self, block: BlockCall, args: tuple, kwargs: dict[str, Any], run: Callable[[tuple, dict], Any]) -> Any:
        """The block's result, from `run(args, kwargs)`, called once for each slice of rows. Its weights are there."""
        if self._size is None:
            return run(args, kwargs)
        if block.index is None:
            return self._model(args, kwargs, run)
        call = (args, kwargs)
        rows = row_count(call)
        if rows <= self._size:
            return run(args, kwargs)
        verdict = self._verdict(block, call, rows)
        if verdict.reason:
            self._say(block, verdict.reason)
            return run(args, kwargs)
        return self._slices(block, call, rows, self._size, verdict.kinds, run)

    def _model(self, args: tuple, kwargs: dict[str, Any], run: Callable[[tuple, dict], Any]) -> Any:
        self._batches = {tensor.shape[0] for tensor in tensors_in((args, kwargs)) if tensor.dim() >= 2}
        self._in_model += 1
        try:
            return run(args, kwargs)
        finally:
            self._in_model -= 1

    def _slices(
        self, block: BlockCall, call: Call, rows: int, size: int, kinds: Kinds, run: Callable[[tuple, dict], Any]
    ) -> Any:
        slices = cut(call, rows, size)
        before = [Before(each) for each in slices]
        results = [run(*each) for each in slices]
        known: dict[int, Any] = {}
        try:
            for place, original in enumerate(call):
                copies = [each.items[place] for each in before]
                write_back(original, copies, kinds, (1 + place,), known)
            return join(results, kinds, (0,), known)
        except Mismatch as error:
            raise Mismatch(
                f"Block {block.name} cannot be put together from its slices of {size} of {rows} rows: {error}. Leave "
                "micro_batch out, and use a smaller batch with accumulation."
            ) from None

    def _verdict(self, block: BlockCall, call: Call, rows: int) -> Verdict:
        # In a backward too: a checkpoint of the user's runs the block again, and must find what the forward found.
        known = self._in_model or torch._C._current_graph_task_id() != -1
        if known and self._batches and rows not in self._batches:
            batch = " or ".join(map(str, sorted(self._batches)))
            return Verdict(f"its first tensor has {rows} rows where the model's own inputs have {batch}", {})
        if _normalises_over_the_batch(block.module):
            return Verdict("it normalises over the batch", {})
        if any(block.mutable_buffers.values()):
            return Verdict("its forward changes its buffers", {})
        key = (block.index, block.module.training, signature(call, rows))
        if key not in self._verdicts:
            with phase(f"fuyou::try rows {block.name}"):
                self._verdicts[key] = tried(block, call, rows)
        return self._verdicts[key]

    def _say(self, block: BlockCall, reason: str) -> None:
        kind = re.sub(r"\d+", "", reason)  # another length of text is no other reason
        if kind in self._said:
            return
        self._said.add(kind)
        message = (
            f"micro_batch={self._size}: block {block.name} runs its whole batch at once, because {reason}. Other blocks of "
            "which this is true are not named."
        )
        self._notes.append(message)
        warnings.warn(message, stacklevel=2)


# --- [Note: tried] ----------------------------------------------------------------------------------------------------


def tried(block: BlockCall, call: Call, rows: int) -> Verdict:
    """Whether the block does to each row the same whatever the others are; the block is left as it was."""
    module = block.module
    forward = module.forward if block.compiled else block.forward  # compiled, each size would be compiled
    try:
        learnt: dict[str, bool] = {}
        state = ModuleState(module, learnt)
        try:
            with _unnoticed(module, call):
                verdict = _tried(module, forward, call, rows)
        finally:
            state.after_forward()
            state.restore()
    except FuyouError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        return Verdict(f"it cannot run on some of its rows ({type(error).__name__}: {said:.200})", {})
    return Verdict("its forward changes its buffers", {}) if any(learnt.values()) else verdict


def _tried(module: nn.Module, forward: Callable[..., Any], call: Call, rows: int) -> Verdict:
    random = RandomState(next((each.device for each in tensors_in(call) if each.is_cuda), torch.device("cpu")))

    def outcome(given: Call) -> dict[tuple, torch.Tensor]:
        random.restore()
        result = forward(*given[0], **given[1])
        return {path: leaf for path, leaf in leaves((result, *given)) if isinstance(leaf, torch.Tensor)}

    one = outcome(_rows_of(call, rows, [0]))
    given = _rows_of(call, rows, [0, -1])
    copies = [(tensor, tensor.clone()) for tensor in tensors_in(given)]
    both = outcome(given)
    if not all(_equal(tensor, before) for tensor, before in copies):
        return Verdict("it changes an argument in place", {})
    state = ModuleState(module, {})
    changed = [outcome(_rows_of(call, rows, [0, -1], spoilt=spoilt)) for spoilt in (1, 0)]
    state.after_forward()
    if state.changed_attributes:
        return Verdict(f"its forward keeps something in attributes ({', '.join(state.changed_attributes)})", {})
    if any(each.keys() != both.keys() for each in (one, *changed)):
        return Verdict("what it returns has another structure for other rows", {})
    if any(_is_floating(each) and bool(each.isnan().any()) for each in both.values()):
        return Verdict("what it returns holds nan, which hides what depends on what", {})
    kinds: Kinds = {}
    for path, tensor in both.items():
        kind = _kind_of(one[path], tensor)
        if kind is None:
            shape = tuple(tensor.shape)
            return Verdict(f"a tensor that it returns has no part for each row (it is {shape} for two rows)", {})
        kinds[path] = kind
        parts = tensor.tensor_split(2) if kind else (tensor, tensor)
        others = [each[path].tensor_split(2)[row] if kind else each[path] for row, each in enumerate(changed)]
        for part, other in zip(parts, others, strict=True):
            if not _equal(part, other):
                return Verdict("what it returns for a row depends on the other rows", {})
    return Verdict("", kinds)


def _kind_of(one: torch.Tensor, two: torch.Tensor) -> bool | None:
    """Per row (True) or the same for all (False), from what came of one row and of two; None: neither."""
    if one.shape == two.shape:
        return False
    scales = one.dim() == two.dim() >= 1 and two.shape[0] == 2 * one.shape[0] and two.shape[1:] == one.shape[1:]
    return True if scales else None


def _rows_of(call: Call, rows: int, which: list[int], *, spoilt: int | None = None) -> Call:
    """A copy of the call with some of its rows, one of these spoilt; nothing of it is shared with the call."""

    def some(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if not is_by_row(tensor, rows):
            return tensor.clone()
        taken = torch.stack([tensor[row] for row in which])
        if spoilt is not None:
            kept = taken[1 - spoilt]
            taken[spoilt] = torch.full_like(kept, torch.nan) if _is_floating(tensor) else kept
        return taken

    return snapshot(call, replace=some)


def _is_floating(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same but for rounding: with other tokens beside it, an expert multiplies in another order."""
    if left.shape != right.shape:
        return False
    if not _is_floating(left):
        return torch.equal(left, right)
    if not torch.equal(left.isfinite(), right.isfinite()):
        return False
    tolerance = max(1e-5, torch.finfo(left.dtype).eps)
    left, right = (each.nan_to_num(0.0, 0.0, 0.0).double() for each in (left, right))
    return bool((left - right).norm() <= tolerance * left.norm())


@contextlib.contextmanager
def _unnoticed(module: nn.Module, call: Call) -> Iterator[None]:
    """Nothing but the module's state knows of what is run: no graph, hook inside, kept cast, random number or warning."""
    inside = [child for child in module.modules() if child is not module and child._forward_hooks]
    hooks = [child._forward_hooks for child in inside]
    cached = torch.is_autocast_cache_enabled()
    device = next((each.device for each in tensors_in(call) if each.is_cuda), torch.device("cpu"))
    try:
        for child in inside:
            child._forward_hooks = OrderedDict()
        # Older versions of torch would give the forward after this a cast that was made without a graph.
        torch.set_autocast_cache_enabled(False)
        with torch.no_grad(), RandomState(device).kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        for child, had in zip(inside, hooks, strict=True):
            child._forward_hooks = had


def _normalises_over_the_batch(module: nn.Module) -> bool:
    return any(
        isinstance(each, _BatchNorm) and (each.training or each.running_mean is None) for each in module.modules()
    )
