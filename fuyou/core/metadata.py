"""Which uses of a tensor ask for its shape, dtype and the like only, so that bytes that are elsewhere may stay there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Property reads that need the bytes; every other property is metadata. Likewise methods and functions that need none.
VALUE_PROPERTIES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_METADATA = frozenset(
    """size dim ndimension numel nelement stride storage_offset element_size is_contiguous is_floating_point is_complex
    is_signed is_same_size get_device register_hook register_post_accumulate_grad_hook requires_grad_ retain_grad
    __hash__ __len__ is_shared is_pinned is_inference is_conj is_neg has_names _is_view dense_dim sparse_dim
    zeros_like empty_like ones_like full_like rand_like randn_like randint_like new_empty new_zeros new_ones new_full
    new_tensor new_empty_strided __dir__ _has_compatible_shallow_copy_type""".split()
)
# Change nothing where a tensor is what they ask for already: Module.to, which every client calls.
_CONVERSIONS = frozenset({"to", "cpu", "cuda", "float", "bfloat16", "half", "double", "contiguous"})


def attribute_of(function: Callable) -> str:
    """The name of the property that `function` of `__torch_function__` reads or sets; "" where it is a call."""
    if function.__name__ not in ("__get__", "__set__"):
        return ""
    return getattr(getattr(function, "__self__", None), "__name__", "")


def is_metadata(function: Callable) -> bool:
    """A call of `function` needs no bytes."""
    attribute = attribute_of(function)
    return attribute not in VALUE_PROPERTIES if attribute else function.__name__ in _METADATA


def converts_nothing(function: Callable, like: Any, args: tuple, kwargs: dict) -> bool:
    """A conversion that gives the tensor itself back, told from a small tensor of its dtype and device."""
    if function.__name__ not in _CONVERSIONS or "memory_format" in kwargs:
        return False
    return function(like, *args[1:], **kwargs) is like
