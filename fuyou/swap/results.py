"""Results of a block's costly operations, saved beside its inputs so that its recomputation need not compute them again.

A recomputing block repeats its forward; an operation whose result was saved is not run then, its result is put in its
place (what torch calls selective activation checkpointing). Operations are known by their ordinal among the costly ones
of one forward: those whose FLOPs torch.utils.flop_counter knows.

[Note: changed results] A result that is written to after its operation cannot stand for it: running the block again would write
to it once more. Version counters do not tell: a linear layer of three dimensions gives its product on through
aten::_unsafe_view, whose result has the same bytes and a counter of its own. So every write is looked for by storage while
the block runs, and a result whose storage leaves the block, where nobody looks, is not saved either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Operation(NamedTuple):
    """One costly operation of a forward: its name, when it began and ended, bytes of its results, and whether these can
    stand for it."""

    name: str
    began: Any
    ended: Any
    result_bytes: int
    replaceable: bool


class Results:
    """The results of a block's operations, by ordinal, and which of them were written to since."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}  # storage → ordinal
        self._names: list[StorageWeakRef] = []  # keep the storages' names from being used again
        self.changed: set[int] = set()  # ordinals

    def made(self, ordinal: int, tensors: Sequence[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._of[storage._cdata] = ordinal
            self._names.append(StorageWeakRef(storage))

    def of(self, tensor: torch.Tensor) -> int | None:
        return self._of.get(tensor.untyped_storage()._cdata)

    def note_writes(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not func._schema.is_mutable:
            return
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name, args[position] if position < len(args) else None)
            self.note_changed(value if isinstance(value, (list, tuple)) else [value])

    def note_changed(self, values: Iterable[Any]) -> None:
        for value in values:
            ordinal = self.of(value) if isinstance(value, torch.Tensor) and value.layout is torch.strided else None
            if ordinal is not None:
                self.changed.add(ordinal)


class Counting(TorchDispatchMode):
    """Lists the costly operations of what runs under it. `mark()` is the time now."""

    def __init__(self, mark: Callable[[], Any], results: Results) -> None:
        super().__init__()
        self._mark = mark
        self._results = results
        self._operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_costly(func):
            self._results.note_writes(func, args, kwargs)
            return func(*args, **kwargs)
        began = self._mark()
        result = func(*args, **kwargs)
        ended = self._mark()
        tensors = tensors_of(result)
        nbytes = sum(each.untyped_storage().nbytes() for each in tensors or ())
        replaceable = tensors is not None and _draws_nothing(func, args, kwargs)
        self._results.made(len(self._operations), tensors or [])
        self._operations.append(Operation(str(func), began, ended, nbytes, replaceable))
        return result

    def operations(self) -> list[Operation]:
        return [
            each._replace(replaceable=each.replaceable and ordinal not in self._results.changed)
            for ordinal, each in enumerate(self._operations)
        ]


class Saving(TorchDispatchMode):
    """Saves the results of the operations that `wanted` has by ordinal: `save(tensor, tier)` gives what `load` takes."""

    def __init__(self, wanted: Mapping[int, str], save: Callable[[torch.Tensor, str], Any]) -> None:
        super().__init__()
        self._wanted = wanted
        self._save = save
        self._ordinal = 0
        self._results = Results()
        self._made: dict[int, tuple[list[Any], bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_costly(func):
            self._results.note_writes(func, args, kwargs)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        tier = self._wanted.get(self._ordinal)
        tensors = tensors_of(result) if tier is not None and _draws_nothing(func, args, kwargs) else None
        if tensors is not None and tier is not None:
            self._results.made(self._ordinal, tensors)
            self._made[self._ordinal] = [self._save(each, tier) for each in tensors], isinstance(result, torch.Tensor)
        self._ordinal += 1
        return result

    def results(self, outputs: Iterable[Any]) -> dict[int, tuple[list[Any], bool]]:
        """{ordinal: (what was saved, whether it is one tensor)} of those that can stand for their operations; see
        [Note: changed results]. `outputs`: what leaves the block."""
        self._results.note_changed(outputs)
        return {ordinal: made for ordinal, made in self._made.items() if ordinal not in self._results.changed}


class Giving(TorchDispatchMode):
    """Puts saved results in the place of their operations."""

    def __init__(self, results: Mapping[int, tuple[list[Any], bool]], load: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()
        self._results = results
        self._load = load
        self._ordinal = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_costly(func):
            return func(*args, **(kwargs or {}))
        saved = self._results.get(self._ordinal)
        self._ordinal += 1
        if saved is None:
            return func(*args, **(kwargs or {}))
        tensors = [self._load(each) for each in saved[0]]
        return tensors[0] if saved[1] else tuple(tensors)


def is_costly(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._overloadpacket in flop_registry


def tensors_of(result: Any) -> list[torch.Tensor] | None:
    """The tensors that a result consists of; None where it has anything else, or shares memory with an argument."""
    if isinstance(result, torch.Tensor):
        return [result] if result.layout is torch.strided else None
    if isinstance(result, (tuple, list)) and all(type(each) is torch.Tensor for each in result):
        return list(result)
    return None


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Without it, later random numbers of the block are what they would be."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            value = kwargs.get(argument.name, args[position] if position < len(args) else argument.default_value)
            return not value
    return True
