"""Tensors that are still in their file, and look like ordinary ones.

[Note: stored] A Stored tensor shows the shape, dtype and device (the CPU) that it will have, over a NaN placeholder
without bytes, and knows its source. Two kinds of use:

- transformers, while it loads, renames, casts, stacks and splits what a checkpoint holds into what the model holds. On a
  tensor of a checkpoint this makes a Stored tensor with a source made of the others'; nothing is read.
- A parameter of the model that is used before `wrap` (its values are read, it is changed, its `.data` is taken) is read
  from the file and is an ordinary parameter from then on, as if it had been loaded: nobody ever sees the placeholder.

`wrap` streams the parameters that are still Stored from their files to their homes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fuyou.checkpoint.sources import Cast, FileRange, Joined, Part, Source, Whole, read_whole
from fuyou.checkpoint.weight_files import WeightsFile
from fuyou.core.metadata import converts_nothing, is_metadata
from fuyou.swap.unit import Member

_CASTS = frozenset("to float bfloat16 half double type".split())
_SAME_ELEMENTS = frozenset("detach contiguous clone reshape view flatten unflatten squeeze unsqueeze".split())
_LAYOUT = frozenset({"is_contiguous", "stride"})  # of the tensor to come: a placeholder has all its strides 0
_SHORTEST_RUN_BYTES = 4096  # below, single reads of runs cost more than the whole
_COMPARED_ELEMENTS = 1 << 18


class Stored(torch.Tensor):
    """See [Note: stored]."""

    source: Source

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in _LAYOUT and args:
            return func(_without_bytes(args[0]), *args[1:], **kwargs)
        if is_metadata(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Stored)]
        if func is torch.equal and len(found) == 2:
            return _equal(*found)
        if any(isinstance(each, nn.Parameter) for each in found) or _changes(func, kwargs):
            if _leaves_as_is(func, args, kwargs):
                return None if func.__name__ == "__set__" else args[0]
            for each in found:
                _read_for_good(each)
            return func(*args, **kwargs)
        return _derived(func, args, kwargs)

    def __deepcopy__(self, memo: dict) -> Any:
        _read_for_good(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _read_for_good(self)
        return self.__reduce_ex__(protocol)


def stored(source: Source, shape: torch.Size | tuple[int, ...]) -> Stored:
    placeholder = torch.full((), float("nan") if source.dtype.is_floating_point else 0, dtype=source.dtype)
    made = torch.Tensor._make_subclass(Stored, placeholder.expand(shape))
    made.source = source
    return made


def tensors_of(files: list[WeightsFile]) -> dict[str, Stored]:
    """Every tensor of the files by its name."""
    return {
        name: stored(FileRange(file, place.dtype, place.begin, math.prod(place.shape)), place.shape)
        for file in files
        for name, place in sorted(file.tensors.items())
    }


def parts_of(tensor: torch.Tensor, first: int, last: int) -> Iterator[torch.Tensor]:
    """Elements [first, last) of a tensor, wherever it is, as flat tensors in order; each is valid until the next."""
    if isinstance(tensor, Stored):
        yield from tensor.source.parts(first, last)
    else:
        yield tensor.detach().reshape(-1)[first:last]


def value_of(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor with the values of `tensor`: itself, or what is read from its file."""
    if not isinstance(tensor, Stored):
        return tensor
    return read_whole(tensor.source).view(tensor.shape)


def converted_bytes(model: nn.Module) -> int:
    """Host memory that reading the model's parameters takes beside a few pieces: of the one that takes most."""
    return max((each.source.whole_bytes for each in model.parameters() if isinstance(each, Stored)), default=0)


def let_go(members: Iterable[Member]) -> None:
    """What was Stored is at home now: ordinary parameters, whose bytes are away, and files that nobody has open."""
    for member in members:
        if isinstance(member.parameter, Stored):
            member.original_class = nn.Parameter
            make_ordinary(member.parameter)


# --- what is made of them -----------------------------------------------------------------------------------------


def _derived(func: Callable, args: tuple, kwargs: dict) -> Any:
    """What `func` gives, without reading anything where it gives tensors."""
    try:
        elsewhere = {name: value for name, value in kwargs.items() if name != "device"}
        result = func(*tree_map(_without_bytes, args), **tree_map(_without_bytes, elsewhere))
    except (RuntimeError, NotImplementedError, TypeError):
        # Placeholders cannot say what this gives (an item, a branch on a value): it is computed below, of bytes that are read,
        # where an error that is the caller's is raised again.
        result = None
    if isinstance(result, torch.Tensor):
        return stored(_source(func, args, kwargs, result), result.shape)
    if isinstance(result, (tuple, list)) and result and all(isinstance(each, torch.Tensor) for each in result):
        return tuple(_split(func, args, kwargs, list(result)))
    return _computed(func, args, kwargs)


def _source(func: Callable, args: tuple, kwargs: dict, result: torch.Tensor) -> Source:
    name, first = func.__name__, args[0] if args else None
    if isinstance(first, Stored):
        same = name == "__getitem__" and args[1] is Ellipsis or name in _SAME_ELEMENTS or name in _CASTS
        if same and first.dtype is result.dtype:
            return first.source
        if name in _CASTS:
            return Cast(first.source, result.dtype)
    if name in ("cat", "concat", "stack"):
        joined = args[0] if args else kwargs["tensors"]
        rows = math.prod(result.shape[: _dimension(args, kwargs, 1, result.dim())])
        sources = [_source_of(each) for each in joined]
        if len({source.dtype for source in sources}) == 1 and _long_runs(sources, rows):
            return Joined(sources, rows)
    return _whole(lambda: _computed(func, args, kwargs), args, kwargs, result)


def _split(func: Callable, args: tuple, kwargs: dict, results: list[torch.Tensor]) -> Iterator[Stored]:
    if func.__name__ not in ("chunk", "split") or not (args and isinstance(args[0], Stored)):
        for index, result in enumerate(results):
            whole = _whole(lambda index=index: _computed(func, args, kwargs)[index], args, kwargs, result)  # type: ignore[misc]
            yield stored(whole, result.shape)
        return
    dimension = _dimension(args, kwargs, 2, results[0].dim())
    source, offset = args[0].source, 0
    for result in results:
        rows, run = math.prod(result.shape[:dimension]), math.prod(result.shape[dimension:])
        yield stored(Part(source, rows, offset, run), result.shape)
        offset += run


def _whole(compute: Callable[[], torch.Tensor], args: tuple, kwargs: dict, result: torch.Tensor) -> Source:
    inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    nbytes = sum(each.numel() * each.itemsize for each in inputs)
    return Whole(compute, result.dtype, result.numel(), nbytes)


def _computed(func: Callable, args: tuple, kwargs: dict) -> Any:
    def value(each: Any) -> Any:
        return value_of(each) if isinstance(each, torch.Tensor) else each

    return func(*tree_map(value, args), **tree_map(value, kwargs))


def _source_of(tensor: torch.Tensor) -> Source:
    if isinstance(tensor, Stored):
        return tensor.source
    return Whole(lambda: tensor.detach(), tensor.dtype, tensor.numel(), 0)


def _long_runs(sources: list[Source], rows: int) -> bool:
    return all(source.count * source.dtype.itemsize >= rows * _SHORTEST_RUN_BYTES for source in sources) or rows == 1


def _dimension(args: tuple, kwargs: dict, position: int, count: int) -> int:
    return int(kwargs.get("dim", args[position] if len(args) > position else 0)) % count


def _without_bytes(each: Any) -> Any:
    if not isinstance(each, torch.Tensor):
        return each
    return torch.empty(each.shape, dtype=each.dtype, device="meta")


def _leaves_as_is(func: Callable, args: tuple, kwargs: dict) -> bool:
    """A conversion to what the parameter is already, and the `.data = itself` that Module.to makes of one."""
    if not args or not isinstance(args[0], Stored):
        return False
    if func.__name__ == "__set__":
        return args[1] is args[0]
    return converts_nothing(func, torch.empty((), dtype=args[0].dtype), args, kwargs)


def _changes(func: Callable, kwargs: dict) -> bool:
    name = func.__name__
    return "out" in kwargs or name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))


def _read_for_good(tensor: Stored) -> None:
    if not isinstance(tensor, Stored):
        return  # it was among the arguments twice
    value = value_of(tensor)
    make_ordinary(tensor)
    tensor.data = value


def make_ordinary(tensor: torch.Tensor) -> None:
    """From here on it is what its placeholder is; the caller gives it its data."""
    with torch._C.DisableTorchFunctionSubclass():
        tensor.__class__ = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor
    for name in ("source", "_is_param"):
        vars(tensor).pop(name, None)


def _equal(left: Stored, right: Stored) -> bool:
    """torch.equal, some elements at a time."""
    if left.shape != right.shape or left.dtype is not right.dtype:
        return False
    count = left.numel()
    for start in range(0, count, _COMPARED_ELEMENTS):
        stop = min(start + _COMPARED_ELEMENTS, count)
        some = [torch.cat([part.clone() for part in each.source.parts(start, stop)]) for each in (left, right)]
        if not torch.equal(*some):
            return False
    return True
