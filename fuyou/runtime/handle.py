"""`p.grad` after a backward: a tensor whose bytes are on the host or on NVMe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fuyou.swap.gradients import Gradient, Gradients

_RAW = frozenset({"numpy", "tolist", "item", "__array__", "data_ptr", "untyped_storage", "storage", "__deepcopy__",
                  "__reduce_ex__", "__dlpack__"})  # fmt: skip


class GradientHandle(torch.Tensor):
    """A gradient that left the device: the parameter's shape, dtype and device, no storage of its own.

    Clipping costs no bytes: `torch.linalg.vector_norm` answers with the norm taken while the gradient was whole on the
    device, and `mul_` by a scalar is recorded and applied, in order and rounded to the gradient's dtype, by the update.
    Any other operation brings the gradient back whole (charged to the device); in-place changes count.
    """

    gradient: Gradient
    _gradients: Gradients

    @staticmethod
    def __new__(cls, gradient: Gradient, gradients: Gradients) -> GradientHandle:
        unit = gradient.member.unit
        handle = torch.Tensor._make_wrapper_subclass(
            cls, gradient.member.entry.shape, dtype=unit.dtype, device=unit.device, requires_grad=False
        )
        handle.gradient = gradient
        handle._gradients = gradients
        return handle

    def __init__(self, gradient: Gradient, gradients: Gradients) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with self._gradients.borrowed(self.gradient) as value:
            return repr(value)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        """Calls that reach for memory directly get a real tensor; all others are dispatched operation by operation."""
        if any(not issubclass(each, GradientHandle) for each in types):
            return NotImplemented  # a parameter that is away answers first, and calls again with its values
        if getattr(function, "__name__", "") in _RAW:
            args, kwargs = pytree.tree_map_only(GradientHandle, _lend, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], (list, tuple)) and len(args[0]) > 1 and "_foreach_" in function.__name__:
            return _one_by_one(function, args, kwargs)
        fast = _FAST.get(function.overloadpacket)
        if fast is not None:
            result = fast(function, *args, **kwargs)
            if result is not NotImplemented:
                return result
        returns = function._schema.returns
        changes = any(each.alias_info is not None and each.alias_info.is_write for each in function._schema.arguments)
        is_view = not changes and any(each.alias_info is not None for each in returns)
        handles = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, GradientHandle)]
        if not changes and not is_view:
            return _read(function, handles, args, kwargs)
        held = [handle.gradient for handle in handles if not handle.gradient.lent]
        try:  # all are lent for the call, so that bringing one back does not send another one home
            real_args, real_kwargs = pytree.tree_map_only(GradientHandle, _lend, (args, kwargs))
            result = function(*real_args, **real_kwargs)
            by_value = {id(handle.gradient.live): handle for handle in handles}
        finally:
            for gradient in held if changes else ():
                gradient.lent, gradient.norm = False, None
        if not changes:
            return result  # a view: the gradient stays on the device, so that changes to the view count
        return pytree.tree_map_only(torch.Tensor, lambda each: by_value.get(id(each), each), result)


def _lend(handle: GradientHandle) -> torch.Tensor:
    return handle._gradients.materialise(handle.gradient, lent=True)


def _read(function: Any, handles: list[GradientHandle], args: tuple, kwargs: dict) -> Any:
    """An operation that neither changes nor keeps its arguments: they are whole only for its length."""
    if not handles:
        return function(*args, **kwargs)
    handle, *others = handles
    with handle._gradients.borrowed(handle.gradient) as value:
        args, kwargs = pytree.tree_map_only(
            GradientHandle, lambda each: value if each is handle else each, (args, kwargs)
        )
        return _read(function, [each for each in others if each is not handle], args, kwargs)


def _norm(function: Any, self: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not isinstance(self, GradientHandle) or ord != 2 or dim is not None or keepdim or dtype is not None:
        return NotImplemented
    norm = self._gradients.norm_of(self.gradient)
    return NotImplemented if norm is None else norm.clone()


def _scale(function: Any, self: Any, other: Any) -> Any:
    scalar = isinstance(other, (int, float)) or (
        isinstance(other, torch.Tensor) and other.dim() == 0 and other.is_floating_point()
    )
    if not isinstance(self, GradientHandle) or not scalar or isinstance(other, GradientHandle):
        return NotImplemented
    gradient = self.gradient
    if gradient.live is not None or gradient.zero:
        return NotImplemented
    gradient.scales.append(other.detach().clone() if isinstance(other, torch.Tensor) else float(other))
    return self


def _zero(function: Any, self: Any) -> Any:
    if not isinstance(self, GradientHandle):
        return NotImplemented
    self._gradients.make_zero(self.gradient)
    return self


def _alias(function: Any, self: Any) -> Any:
    """`.data`, `.detach()`: another handle of the same gradient."""
    return GradientHandle(self.gradient, self._gradients) if isinstance(self, GradientHandle) else NotImplemented


def _one_by_one(function: Any, args: tuple, kwargs: dict) -> Any:
    """An operation on lists of tensors, for one place in the lists after another: the device holds one gradient more,
    not all. Each place is computed by itself, so the bits are the same."""
    length, results = len(args[0]), []
    for index in range(length):
        mine = [
            [each[index]] if isinstance(each, (list, tuple)) and len(each) == length else each
            for each in args
        ]  # fmt: skip
        results.append(function(*mine, **kwargs))
    return None if results[0] is None else [each for result in results for each in result]


def _foreach(single: Callable) -> Callable:
    def each(function: Any, selves: list, *rest: Any) -> Any:
        other = rest[0] if rest else None
        if isinstance(other, (list, tuple)) or len(rest) > 1:
            return NotImplemented
        single(selves[0], *rest)
        return None

    return each


def _foreach_scale(self: torch.Tensor, other: Any) -> None:
    """torch's foreach rounds a number to the list's dtype first, which `mul_` does not: in bf16 the bits differ."""
    self.mul_(other if isinstance(other, torch.Tensor) else torch.tensor(other, dtype=self.dtype))


def _foreach_norm(function: Any, selves: list, ord: Any = 2, dtype: Any = None) -> Any:
    return [torch.linalg.vector_norm(selves[0], ord, dtype=dtype)]


def _unscale(function: Any, selves: list, found_inf: torch.Tensor, inverse_scale: torch.Tensor) -> Any:
    """GradScaler's check and unscaling: a finite norm says that all is finite, and then no byte is read."""
    if not isinstance(selves[0], GradientHandle):
        return NotImplemented
    norm = selves[0]._gradients.norm_of(selves[0].gradient)
    if norm is None or not bool(norm.isfinite()):
        return NotImplemented
    if inverse_scale.item() != 1.0:
        selves[0].mul_(inverse_scale)
    return None


_ATEN = torch.ops.aten
_FAST: dict[Any, Callable] = {
    _ATEN.linalg_vector_norm: _norm,
    _ATEN.mul_: _scale,
    _ATEN.zero_: _zero,
    _ATEN.detach: _alias,
    _ATEN._foreach_zero_: _foreach(torch.Tensor.zero_),
    _ATEN._foreach_mul_: _foreach(_foreach_scale),
    _ATEN._foreach_norm: _foreach_norm,
    _ATEN._amp_foreach_non_finite_check_and_unscale_: _unscale,
}
