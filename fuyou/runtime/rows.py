"""The rows of a block's call: its arguments cut along the batch, and what its slices give put together.

[Note: rows] A call has as many rows as its first tensor of two or more dimensions has in dimension 0. A tensor argument
with that many in dimension 0 is cut; every other one (broadcast masks, tables of positions, scalars) goes to each slice
whole. Containers and plain objects (a cache of keys and values) are copied for each slice around their cut tensors. What
a slice returns per row is concatenated; what has nothing to do with the rows (a position bias of batch 1) is taken from
the first slice. What slices put into their copies of an argument is put together the same way and then into the
argument itself. Whether all this is true of a block, micro_batch.py tries before it relies on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import StateError
from fuyou.swap.snapshot import is_opaque, snapshot, tensors_in

Call = tuple[tuple[Any, ...], dict[str, Any]]
Path = tuple[Any, ...]  # the keys from the top of a structure to one of its items
Kinds = dict[Path, bool]  # of each tensor of a structure, whether it is per row


def row_count(call: Call) -> int:
    """Size of dimension 0 of the first tensor of two or more dimensions; 0 where there is none."""
    return next((tensor.shape[0] for tensor in tensors_in(call) if tensor.dim() >= 2), 0)


def is_by_row(tensor: torch.Tensor, rows: int) -> bool:
    return tensor.dim() >= 1 and tensor.shape[0] == rows and not isinstance(tensor, nn.Parameter)


def cut(call: Call, rows: int, size: int) -> list[Call]:
    """The call's slices of `size` rows, the last perhaps of fewer. Tensors are views.

    One `split` a tensor: its backward concatenates the slices' gradients, where a `narrow` each would add up as many
    tensors of the whole size, zero but for one slice: the same values.
    """
    pieces: dict[int, tuple[torch.Tensor, ...]] = {}

    def slice_of(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def piece(tensor: torch.Tensor) -> torch.Tensor:
            if not is_by_row(tensor, rows):
                return tensor
            if id(tensor) not in pieces:
                pieces[id(tensor)] = tensor.split(size)
            return pieces[id(tensor)][index]

        return piece

    return [snapshot(call, replace=slice_of(index)) for index in range(-(-rows // size))]


def signature(call: Call, rows: int) -> tuple[Any, ...]:
    """What a call has in common with the next of its kind: everything but sizes and numbers."""
    return tuple(
        (path, value.dtype, value.dim(), is_by_row(value, rows))
        if isinstance(value, torch.Tensor)
        else (path, value if isinstance(value, (bool, str, type(None))) else type(value))
        for path, value in leaves(call)
    )


def leaves(value: Any, path: Path = (), _seen: frozenset[int] = frozenset()) -> Iterator[tuple[Path, Any]]:
    """(path, item) for everything in a structure that is no container."""
    items = _items(value)
    if items is None:
        yield path, value
    elif id(value) not in _seen:
        for key, item in items.items():
            yield from leaves(item, (*path, key), _seen | {id(value)})


class Mismatch(StateError):
    """Slices of one call gave what cannot be put together."""


def join(parts: Sequence[Any], kinds: Kinds, path: Path = (), known: dict[int, Any] | None = None) -> Any:
    """One value from the slices' values, in order. `known`: by id, copies of arguments and what they are copies of."""
    first = parts[0]
    if known is not None and id(first) in known:
        return known[id(first)]
    if any(type(part) is not type(first) for part in parts):
        raise Mismatch(f"{_said(path)} is {' and '.join(sorted({type(part).__name__ for part in parts}))}")
    if isinstance(first, torch.Tensor):
        if path not in kinds:
            raise Mismatch(f"{_said(path)} is a tensor that was not there when this was tried")
        return torch.cat(list(parts)) if kinds[path] else first
    items = [_items(part) for part in parts]
    if items[0] is None:
        if any(part is not first and part != first for part in parts):
            raise Mismatch(f"{_said(path)} is {' and '.join(sorted({repr(part) for part in parts}))}")
        return first
    if any(each.keys() != items[0].keys() for each in items):  # type: ignore[union-attr]
        raise Mismatch(f"{_said(path)} has different items")
    joined = {key: join([each[key] for each in items], kinds, (*path, key), known) for key in items[0]}  # type: ignore[index]
    return _rebuilt(first, joined)


class Before:
    """A structure as it is now, to find later what was put into it."""

    __slots__ = ("items", "value")

    def __init__(self, value: Any, _seen: dict[int, Before] | None = None) -> None:
        seen = {} if _seen is None else _seen
        self.value = value
        self.items: dict[Any, Before] = {}
        seen[id(value)] = self
        for key, item in (_items(value) or {}).items():
            self.items[key] = seen[id(item)] if id(item) in seen else Before(item, seen)


def write_back(original: Any, copies: Sequence[Before], kinds: Kinds, path: Path, known: dict[int, Any]) -> None:
    """What slices put into their `copies` of `original`, put together, into `original`; fills `known` for `join`."""
    now = [_items(each.value) for each in copies]
    if now[0] is None or id(copies[0].value) in known:
        return
    if copies[0].value is not original:
        known[id(copies[0].value)] = original
    for key in now[0]:
        old = [each.items.get(key) for each in copies]
        new = [each[key] for each in now if each is not None and key in each]
        if len(new) != len(copies):
            raise Mismatch(f"{_said((*path, key))} is not there in every slice")
        if all(before is not None and before.value is value for before, value in zip(old, new, strict=True)):
            write_back(_items(original)[key], old, kinds, (*path, key), known)  # type: ignore[index, arg-type]
        else:
            _put(original, key, join(new, kinds, (*path, key), known))
    for key in [key for key in _items(original) or () if key not in now[0]]:
        _remove(original, key)


# --- structures -------------------------------------------------------------------------------------------------------


def _items(value: Any) -> dict[Any, Any] | None:
    """The items of a container or plain object by their keys; None for everything else."""
    if isinstance(value, torch.Tensor) or is_opaque(value):
        return None
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _rebuilt(first: Any, items: dict[Any, Any]) -> Any:
    """A container like `first` with other items of the same keys."""
    if isinstance(first, tuple):
        return type(first)(*items.values()) if hasattr(first, "_fields") else type(first)(items.values())
    result = copy.copy(first)
    for key, item in items.items():
        _put(result, key, item)
    return result


def _put(container: Any, key: Any, item: Any) -> None:
    if isinstance(container, tuple):
        raise Mismatch("an item of a tuple was changed")
    if isinstance(container, list) and key == len(container):
        container.append(item)
    elif isinstance(container, (dict, list)):
        container[key] = item
    else:
        vars(container)[key] = item


def _remove(container: Any, key: Any) -> None:
    if isinstance(container, list):
        container.pop()
    elif isinstance(container, dict):
        del container[key]
    else:
        del vars(container)[key]


def _said(path: Path) -> str:
    inside = "".join(f"[{key!r}]" for key in path[1:])
    return ("what it returns" if path[:1] == (0,) else "what it was given") + inside
