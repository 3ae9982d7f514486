"""What a block's forward can change beside its result, taken before it runs so that it can run again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fuyou.core.errors import StateError

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) | {"forward"}  # hooks, parameters, buffers, submodules, training


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf of the same bytes that requires grad where `tensor` does."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def is_opaque(value: Any) -> bool:
    """Whether `snapshot` shares the value as it is, without a look inside."""
    return isinstance(value, (*_ATOMS, nn.Module, nn.Parameter)) or callable(value)


def snapshot(
    value: Any,
    *,
    detach: bool = False,
    objects: bool = True,
    replace: Callable[[torch.Tensor], torch.Tensor] | None = None,
    _seen: dict[int, Any] | None = None,
) -> Any:
    """A structural copy: containers and (with `objects`) plain objects are copied, tensors and modules are shared.

    `detach`: tensors that require grad are replaced by detached leaves that require it too, so that the copy holds no
    autograd graph. `replace`: what to put in a tensor's place. What occurs twice stays the same object.
    """
    replace = detached if detach else replace
    seen: dict[int, Any] = {} if _seen is None else _seen
    if is_opaque(value):
        return value
    if id(value) in seen:
        return seen[id(value)][1]

    def inner(item: Any) -> Any:
        return snapshot(item, objects=objects, replace=replace, _seen=seen)

    result: Any
    if isinstance(value, torch.Tensor):
        result = replace(value) if replace is not None else value
    elif isinstance(value, tuple):
        items = [inner(item) for item in value]
        result = type(value)(*items) if hasattr(value, "_fields") else tuple(items) if type(value) is tuple else value
    elif isinstance(value, list):
        result = copy.copy(value)
        seen[id(value)] = (value, result)
        result[:] = [inner(item) for item in value]
    elif isinstance(value, dict):
        result = copy.copy(value)
        seen[id(value)] = (value, result)
        for key, item in value.items():
            copied = inner(item)
            if copied is not item:
                result[key] = copied
    elif isinstance(value, set):
        result = set(value)
    elif objects and hasattr(value, "__dict__"):
        result = copy.copy(value)
        seen[id(value)] = (value, result)
        for name, item in list(vars(value).items()):
            result.__dict__[name] = inner(item)
    else:
        result = value
    seen[id(value)] = (value, result)  # the original too: its id must not be reused while this runs
    return result


def tensors_in(value: Any, _seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every distinct tensor in a structure that `snapshot` copies; parameters are not inputs."""
    seen = set() if _seen is None else _seen
    if is_opaque(value) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value), seen)


class _Buffer(NamedTuple):
    """A buffer as a forward found it; `before` is a copy of its values, where one was taken."""

    key: str
    owner: nn.Module
    tensor: torch.Tensor
    version: int
    before: torch.Tensor | None


class ModuleState:
    """Attributes and buffers of a module tree before a forward: attributes by identity, containers by their items.

    A forward may write into a buffer, or put another tensor in its place (buffers are known by identity too). The first
    call of a block in training, and the first in eval, copy all buffers to see which modules write theirs; later calls
    copy the buffers of those (`mutable`, by name and mode, is the block's memory of it).
    """

    def __init__(self, module: nn.Module, mutable: dict[str, bool]) -> None:
        self._mutable = mutable
        self._attributes = [
            (child, {name: snapshot(item, objects=False) for name, item in _own(child).items()})
            for child in module.modules()
        ]
        self._registered = [(child, dict(child._buffers)) for child in module.modules()]
        self._buffers = [
            _Buffer(key, owner, tensor, tensor._version, tensor.detach().clone() if mutable.get(key, True) else None)
            for key, owner, tensor in _buffers_of(module)
        ]

    def after_forward(self) -> None:
        """Learn what changed, and keep only that."""
        # By module: what writes one of its buffers may write all, even where a first batch left some as they were.
        writers = {id(each.owner) for each in self._buffers if self._was_written(each)}
        for each in self._buffers:
            self._mutable[each.key] = id(each.owner) in writers
        self._buffers = [each for each in self._buffers if id(each.owner) in writers]
        self._registered = [(child, before) for child, before in self._registered if not _identical(child, before)]
        self._attributes = [(child, before) for child, before in self._attributes if _changed(child, before)]

    def _was_written(self, buffer: _Buffer) -> bool:
        written = buffer.tensor._version != buffer.version
        if buffer.before is None:
            if written:
                raise StateError(
                    f"Buffer {buffer.key} was changed by a forward for the first time after its block's first one, so that "
                    "forward cannot be run again in backward: wrap with Config(activations='keep')."
                )
            return False
        # Known to change: not compared again, which would make the host wait for the device.
        if written or self._mutable.get(buffer.key, False):
            return True
        # Running statistics are written past the version counter, and perhaps not by the block's first call.
        statistics = isinstance(buffer.owner, _NormBase) and buffer.owner.training
        return statistics or not torch.equal(buffer.before, buffer.tensor)

    @property
    def changed_attributes(self) -> list[str]:
        """Of which modules, by class, the forward changed attributes; known after `after_forward`."""
        return sorted({type(child).__name__ for child, _ in self._attributes})

    def restore(self) -> None:
        """Everything as it was before the call."""
        for child, before in self._attributes:
            _replace(child, snapshot(before, objects=False))
        for child, tensors in self._registered:
            _register(child, tensors)
        with torch.no_grad():
            for each in self._buffers:
                if each.before is not None:
                    each.tensor.detach().copy_(each.before)

    @contextlib.contextmanager
    def before_forward(self) -> Iterator[None]:
        """As it was before the call, for the length of the `with`; then as it is now again."""
        attributes = [(child, _own(child)) for child, _ in self._attributes]
        registered = [(child, dict(child._buffers)) for child, _ in self._registered]
        buffers = [(each.tensor, each.tensor.detach().clone()) for each in self._buffers]
        try:
            self.restore()
            yield
        finally:
            for child, now in attributes:
                _replace(child, now)
            for child, tensors in registered:
                _register(child, tensors)
            with torch.no_grad():
                for buffer, now_value in buffers:
                    buffer.detach().copy_(now_value)


def _buffers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Each distinct buffer with its module and a key that says whether that is training: a norm may write only then."""
    seen: set[int] = set()
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name} ({'training' if child.training else 'eval'})", child, buffer


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: item for name, item in vars(module).items() if name not in _MODULE_INTERNALS}


def _replace(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in list(_own(module)):
        if name not in attributes:
            del module.__dict__[name]
    module.__dict__.update(attributes)


def _identical(module: nn.Module, buffers: dict[str, torch.Tensor | None]) -> bool:
    """Whether the module's buffers are these very tensors."""
    now = module._buffers
    return now.keys() == buffers.keys() and all(now[name] is tensor for name, tensor in buffers.items())


def _register(module: nn.Module, buffers: dict[str, torch.Tensor | None]) -> None:
    module._buffers.clear()
    module._buffers.update(buffers)


def _changed(module: nn.Module, before: dict[str, Any]) -> bool:
    now = _own(module)
    return now.keys() != before.keys() or any(not _same(before[name], item) for name, item in now.items())


def _same(before: Any, now: Any) -> bool:
    """Equal as far as a forward could tell: containers by their items, everything else by identity or plain value."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(now, (list, tuple)):
        return len(before) == len(now) and all(_same(a, b) for a, b in zip(before, now, strict=True))
    if isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(before[key], item) for key, item in now.items())
    return isinstance(now, (bool, int, float, str, bytes, set)) and before == now
