"""Results of a block's costly operations, saved beside its inputs so that its recomputation need not compute them again.

A recomputing block repeats its forward; an operation whose result was saved is not run then, its result is put in its
place (what torch calls selective activation checkpointing). Operations are known by their ordinal among the costly ones
of one forward: those whose FLOPs torch.utils.flop_counter knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fuyou.swap.version import Version


class Operation(NamedTuple):
    """One costly operation of a forward: its name, when it began and ended, bytes of its results, and whether these can
    stand for it."""

    name: str
    began: Any
    ended: Any
    result_bytes: int
    replaceable: bool


class Counting(TorchDispatchMode):
    """Lists the costly operations of what runs under it. `mark()` is the time now; `made(ordinal, results)` is told."""

    def __init__(self, mark: Callable[[], Any], made: Callable[[int, list[torch.Tensor]], None]) -> None:
        super().__init__()
        self._mark = mark
        self._made = made
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_costly(func):
            return func(*args, **(kwargs or {}))
        began = self._mark()
        result = func(*args, **(kwargs or {}))
        ended = self._mark()
        tensors = tensors_of(result)
        nbytes = sum(each.untyped_storage().nbytes() for each in tensors or ())
        replaceable = tensors is not None and _draws_nothing(func, args, kwargs or {})
        self._made(len(self.operations), tensors or [])
        self.operations.append(Operation(str(func), began, ended, nbytes, replaceable))
        return result


class Saving(TorchDispatchMode):
    """Saves the results of the operations that `wanted` has by ordinal: `save(tensor, tier)` gives what `load` takes."""

    def __init__(self, wanted: Mapping[int, str], save: Callable[[torch.Tensor, str], Any]) -> None:
        super().__init__()
        self._wanted = wanted
        self._save = save
        self._ordinal = 0
        self._made: dict[int, tuple[list[Version], list[Any], bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_costly(func):
            tier = self._wanted.get(self._ordinal)
            tensors = tensors_of(result) if tier is not None and _draws_nothing(func, args, kwargs or {}) else None
            if tensors is not None and tier is not None:
                versions = [Version(each) for each in tensors]
                saved = [self._save(each, tier) for each in tensors]
                self._made[self._ordinal] = versions, saved, isinstance(result, torch.Tensor)
            self._ordinal += 1
        return result

    def results(self) -> dict[int, tuple[list[Any], bool]]:
        """{ordinal: (what was saved, whether it is one tensor)}, without those that the forward changed afterwards: a
        recomputation would change them once more."""
        return {
            ordinal: (saved, single)
            for ordinal, (versions, saved, single) in self._made.items()
            if not any(version.changed for version in versions)
        }


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
