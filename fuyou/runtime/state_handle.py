"""Handles of the optimizer's state: tensors with shape, dtype and device, whose bytes stay in the tiers.

[Note: state handles] A handle is a view of a record, and a record is one tensor of one parameter's state. Every use reads
the record whole, into memory that lives as long as the operation (or as the rows that it was taken apart into, or the
handle whose address was asked for); an in-place change is written home at once. As in
plain PyTorch a handle shows the state of now, until what it stands for is replaced (`state[p] = …`, load_state_dict, the
end of the run): then it keeps the value of before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fuyou.core.errors import StateError
from fuyou.runtime.handle import GradientHandle
from fuyou.swap.unit import Member

if TYPE_CHECKING:
    from fuyou.runtime.state import StateView

# Calls that reach for memory directly. What they give keeps the memory alive, a bare address does not: _HELD.
_RAW = frozenset({"numpy", "tolist", "__array__", "__dlpack__", "share_memory_"})
_HELD = frozenset({"data_ptr", "untyped_storage", "storage", "_typed_storage"})
_SHAPE_ONLY = frozenset(
    """zeros_like ones_like full_like empty_like rand_like randn_like new_empty new_zeros new_ones new_full
    new_empty_strided""".split()
)


class Record:
    """One tensor of a parameter's state: "step" (), or "exp_avg", "exp_avg_sq", "master", of its shape; fp32, host.

    `own`: its value, once it no longer is the optimizer's. `lost`: why it has none. `device` other than the host's: what
    `.to(device)` gave, a copy that is made when it is used, which it can be until the state is changed.
    """

    def __init__(self, state: StateView, member: Member, kind: str, device: torch.device) -> None:
        self.state = state
        self.member = member
        self.kind = kind
        self.device = device
        self.own: torch.Tensor | None = None
        self.lost = ""
        self.version = state.version(member)
        self._shared: tuple[tuple[int, int], weakref.ref[torch.Tensor]] | None = None  # read already, and still held

    @property
    def is_copy(self) -> bool:
        return self.device.type != "cpu"

    @property
    def shape(self) -> torch.Size:
        return torch.Size(()) if self.kind == "step" else torch.Size(self.member.entry.shape)

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * 4

    def is_state_of(self, state: StateView, member: Member, kind: str) -> bool:
        """It shows what the optimizer has for this parameter now."""
        mine = self.own is None and not self.lost and self.state is state and self.member is member
        return mine and self.kind == kind and (not self.is_copy or self.version == state.version(member))

    def read(self) -> torch.Tensor:
        """The whole value: a new tensor, or the one that it owns."""
        if self.own is not None:
            return self.own
        if self.lost:
            raise StateError(self.lost)
        if self.is_copy and self.version != self.state.version(self.member):
            raise StateError(
                f"{self.kind} of {self.member.name} was copied to {self.device} and not used before the optimizer changed "
                "it; such a copy is made when it is first used: use it before the next step, or clone() it."
            )
        value = self._shared_value()
        if value is None or self.kind == "master":  # which changes with the weights
            value = self.state.read(self.member, self.kind)
        return value.to(self.device) if self.is_copy else value

    def alone(self) -> torch.Tensor:
        """The same, in memory that no other handle looks at; what it owns excepted."""
        value = self.read()
        return value.clone() if value is self._shared_value() else value

    def share(self) -> torch.Tensor:
        """The same, in one place for all who ask as long as one of them holds it."""
        value, shared = self.read(), self._shared_value()
        if self.own is not None or value is shared:
            return value
        if shared is not None:
            return shared.copy_(value)
        self._shared = (self.state.version(self.member), weakref.ref(value))
        return value

    def _shared_value(self) -> torch.Tensor | None:
        current = self._shared is not None and self._shared[0] == self.state.version(self.member)
        return self._shared[1]() if current and self._shared is not None else None

    def write(self, value: torch.Tensor) -> None:
        """It was changed in place to `value`."""
        if self.own is not None:
            return  # which is what was changed
        if self.is_copy:
            self.own = value
            return
        if value.shape != self.shape or value.dtype != torch.float32:
            raise StateError(
                f"{self.kind} of {self.member.name} is {tuple(self.shape)} float32 and was made {tuple(value.shape)} "
                f"{value.dtype}: shapes and dtypes of optimizer state are fixed until run.close()."
            )
        shared = self._shared_value()
        self.state.write(self.member, {self.kind: value})
        if shared is value:
            self._shared = (self.state.version(self.member), weakref.ref(value))


class StateHandle(torch.Tensor):
    """A tensor of the optimizer's state, or a view of one: no storage of its own, see [Note: state handles]."""

    record: Record
    path: tuple[tuple[Any, tuple, dict, int | None], ...]  # the views from the record to here
    hold: list[torch.Tensor]  # the record's value, while all who share this list are there; most hold nothing
    holds: bool

    @staticmethod
    def __new__(cls, record: Record, path: tuple = (), like: torch.Tensor | None = None) -> StateHandle:
        like = torch.empty(record.shape, device="meta") if like is None else like
        handle = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(),
            dtype=like.dtype, device=record.device, requires_grad=False,
        )  # fmt: skip
        handle.record = record
        handle.path = path
        handle.hold, handle.holds = [], False
        return handle

    def __init__(self, record: Record, path: tuple = (), like: torch.Tensor | None = None) -> None:
        pass

    def plain(self, base: torch.Tensor | None = None) -> torch.Tensor:
        """Its value in memory: the same view of the record's, which is read where it is not given."""
        value = self.base() if base is None else base
        for function, args, kwargs, index in self.path:
            value = function(value, *args, **kwargs)
            value = value if index is None else value[index]
        return value

    def base(self) -> torch.Tensor:
        """The record's value."""
        if not self.holds:
            return self.record.read()
        self.hold[:] = [self.record.share()]
        return self.hold[0]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.plain())

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        value = self.plain(self.record.alone())
        memo[id(self)] = value if self.record.own is None else value.clone()
        return memo[id(self)]

    def __copy__(self) -> torch.Tensor:
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """An ordinary tensor, whose bytes torch.save reads when it writes them: one tensor at a time."""
        rebuild, args, *rest = self.plain(torch.empty(self.record.shape)).__reduce_ex__(protocol)
        if rebuild is not torch._utils._rebuild_tensor_v2 or self.record.own is not None or self.record.is_copy:
            return self.plain().__reduce_ex__(protocol)
        return rebuild, (_late_storage(self.record), *args[1:]), *rest

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        """Calls that reach for memory directly get a real tensor; all others are dispatched operation by operation."""
        if any(not issubclass(each, (StateHandle, GradientHandle)) for each in types):
            return NotImplemented  # a parameter that is away answers first, and calls again with its values
        name, owner = getattr(function, "__name__", ""), getattr(getattr(function, "__self__", None), "__name__", "")
        if name == "__set__" and owner == "data" and isinstance(args[0], StateHandle):
            return _replace(args[0], args[1])
        if name in _RAW or name in _HELD:
            real = _held if name in _HELD else _alone
            args, kwargs = pytree.tree_map_only(StateHandle, real, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if name.startswith("_foreach_"):
            lists = [each for each in args if isinstance(each, (list, tuple))]
            if len(lists[0]) > 1:
                return _one_by_one(function, len(lists[0]), args, kwargs)
        first = args[0] if args and isinstance(args[0], StateHandle) else None
        if first is not None:
            if name in ("detach", "alias"):
                return _of(first, first.path, first._stand_in())
            if name == "clone" and not first.path and first.record.own is None and not kwargs:
                return first.record.alone()
            if name == "_to_copy":
                moved = _moved(first, **kwargs)
                if moved is not None:
                    return moved
            if name in _SHAPE_ONLY and not first.path:
                return function(
                    torch.empty((), dtype=first.dtype, device=first.device).expand(first.shape), *args[1:], **kwargs
                )
            if _is_view(function):
                return _view(function, first, args[1:], kwargs)
        return _on_values(function, args, kwargs)

    def _stand_in(self) -> torch.Tensor:
        """Its shape, strides and offset, without bytes."""
        return self.plain(torch.empty(self.record.shape, device="meta"))


class _LateBytes:
    """What torch.save asks of a storage that is not in the host's memory, until it takes it there to write it."""

    class _Device:
        type = "fuyou"  # neither the host's nor one whose bytes are left out

    device = _Device()

    def __init__(self, record: Record) -> None:
        self._record = record
        self._cdata = id(self)

    def data_ptr(self) -> int:
        return 0

    def nbytes(self) -> int:
        return self._record.nbytes

    def cpu(self) -> torch.UntypedStorage:
        return self._record.read().cpu().untyped_storage()


class _LateStorage(torch.storage.TypedStorage):
    """For torch.save; any other pickler gets the bytes at once."""

    def __reduce__(self) -> Any:
        return torch.storage.TypedStorage(
            wrap_storage=self._untyped_storage.cpu(), dtype=torch.float32, _internal=True
        ).__reduce__()


def _late_storage(record: Record) -> torch.storage.TypedStorage:
    storage = object.__new__(_LateStorage)
    vars(storage).update(_untyped_storage=_LateBytes(record), dtype=torch.float32, _fake_device="cpu")
    return storage


def _is_view(function: Any) -> bool:
    arguments, returns = function._schema.arguments, function._schema.returns
    changes = any(each.alias_info is not None and each.alias_info.is_write for each in arguments)
    return not changes and any(each.alias_info is not None for each in returns)


def _view(function: Any, handle: StateHandle, args: tuple, kwargs: dict) -> Any:
    """A view is a handle too: it is read, and changed, through the whole tensor."""
    result = function(handle._stand_in(), *args, **kwargs)
    if isinstance(result, torch.Tensor):
        return _of(handle, (*handle.path, (function, args, kwargs, None)), result)
    parts = [_of(handle, (*handle.path, (function, args, kwargs, index)), each) for index, each in enumerate(result)]
    for part in parts:  # rows, say, which are looked at one after the other: read once for all
        part.hold, part.holds = (handle if handle.holds else parts[0]).hold, True
    return parts


def _of(handle: StateHandle, path: tuple, like: torch.Tensor) -> StateHandle:
    view = StateHandle(handle.record, path, like)
    view.hold, view.holds = handle.hold if handle.holds else view.hold, handle.holds
    return view


def _held(handle: StateHandle) -> torch.Tensor:
    handle.holds = True
    return handle.plain()


def _alone(handle: StateHandle) -> torch.Tensor:
    return handle.plain(handle.record.alone())


def _moved(
    handle: StateHandle,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    pin_memory: bool | None = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format | None = None,
) -> StateHandle | None:
    """`.to(device)` alone: a copy that is made when it is used (Accelerate moves state there and back)."""
    record = handle.record
    other = dtype not in (None, torch.float32) or layout not in (None, torch.strided) or pin_memory
    if device is None or other or memory_format not in (None, torch.preserve_format):
        return None
    device = torch.device(device)
    if device.type == "cpu" or handle.path or record.own is not None:
        return None
    return StateHandle(record.state.copy_record(record, device))


def _one_by_one(function: Any, count: int, args: tuple, kwargs: dict) -> Any:
    """A foreach, a tensor at a time: the same results, and memory of one."""

    def at(value: Any, index: int) -> Any:
        return [value[index]] if isinstance(value, (list, tuple)) and len(value) == count else value

    results = [
        function(*(at(each, index) for each in args), **{key: at(each, index) for key, each in kwargs.items()})
        for index in range(count)
    ]
    return None if results[0] is None else [each[0] for each in results]


def _on_values(function: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the values; what it changed in place is written home."""
    bases: dict[Record, torch.Tensor] = {}  # one value a record, however many of the arguments are views of it
    handles: dict[int, tuple[torch.Tensor, StateHandle]] = {}

    def value_of(handle: StateHandle) -> torch.Tensor:
        if handle.record not in bases:
            bases[handle.record] = handle.base()
        value = handle.plain(bases[handle.record])
        handles[id(value)] = (value, handle)
        return value

    real_args, real_kwargs = pytree.tree_map_only(StateHandle, value_of, (args, kwargs))
    result = function(*real_args, **real_kwargs)
    written = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    changed = [each.record for each in pytree.tree_leaves(written) if isinstance(each, StateHandle)]
    for record in dict.fromkeys(changed):
        record.write(bases[record])
    return pytree.tree_map_only(
        torch.Tensor, lambda each: handles[id(each)][1] if id(each) in handles else each, result
    )


def _replace(handle: StateHandle, value: torch.Tensor) -> None:
    """`handle.data = value`."""
    if value.shape != handle.shape:
        raise StateError(
            f"{handle.record.kind} of {handle.record.member.name} has shape {tuple(handle.shape)} and its data was given "
            f"{tuple(value.shape)}: shapes of optimizer state are fixed until run.close()."
        )
    if value is not handle:
        handle.copy_(value)
