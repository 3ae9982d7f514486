"""Giving a model on the meta device the weights of a folder: they stay in their files until `wrap` streams them home."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.adapters import unwrapped
from fuyou.checkpoint.imports import import_pretrained, refuse_other_weights
from fuyou.checkpoint.sources import Cast
from fuyou.checkpoint.stored import Stored, stored, tensors_of, value_of
from fuyou.checkpoint.weight_files import open_weights
from fuyou.core.errors import ConfigError

Undo = Callable[[], None]


def give_weights(model: nn.Module, folder: str | os.PathLike[str]) -> Undo:
    """Every parameter of `model` on the meta device becomes one that is Stored in the folder's files, in the parameter's
    dtype, and stays the same object; persistent buffers and those on the meta device get their values. Parameters that are
    in memory stay. Returns what takes all of it back.

    Raises ConfigError, with nothing changed, for what is missing, has no place or another shape, naming all of it.
    """
    inner = unwrapped(model)
    if not any(parameter.is_meta for parameter in inner.parameters()):
        raise ConfigError(
            f"weights={str(folder)!r} are for a model on the meta device, and every parameter of this {type(model).__name__} "
            "has its values already: leave weights out."
        )
    found, strict = _tensors_for(inner, folder)
    aliases, wanted = _survey(inner)
    chosen = {key: next((name for name in aliases[key] if name in found), None) for key in wanted}
    known = {name for names in aliases.values() for name in names}
    refuse_other_weights(
        str(folder),
        missing=[aliases[key][0] for key, name in chosen.items() if name is None and wanted[key][2].is_meta],
        wrong=[
            (name, found[name].shape, wanted[key][2].shape)
            for key, name in chosen.items()
            if name is not None and found[name].shape != wanted[key][2].shape
        ],
        unused=sorted(found.keys() - known) if strict else (),
        strict=strict,
    )
    undo = [
        _put(module, last, tensor, found[name])
        for key, name in chosen.items()
        if name is not None
        for module, last, tensor in [wanted[key]]
    ]

    def take_back() -> None:
        while undo:
            undo.pop()()

    return take_back


def _survey(model: nn.Module) -> tuple[dict[Any, list[str]], dict[Any, tuple[nn.Module, str, torch.Tensor]]]:
    """(all names of each parameter and buffer; (module, name there, tensor) of what is on the meta device, and of persistent
    buffers). Tied parameters are one object, and have one key."""
    aliases: dict[Any, list[str]] = {}
    wanted: dict[Any, tuple[nn.Module, str, torch.Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            is_buffer = name in module._buffers
            key = (id(module), name) if is_buffer else id(tensor)
            aliases.setdefault(key, []).append(_plain(f"{prefix}.{name}" if prefix else name))
            if tensor.is_meta or (is_buffer and name not in module._non_persistent_buffers_set):
                wanted[key] = module, name, tensor
    return aliases, wanted


def _plain(name: str) -> str:
    """The name from before PEFT put a layer around it."""
    return name.replace(".base_layer.", ".")


def _tensors_for(model: nn.Module, folder: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], bool]:
    """(name in `model` → its tensor; whether each must have a place there). Of a class of transformers another model is
    imported, without weights: it knows which buffers are computed, and what the files' names mean."""
    if not (hasattr(model, "from_pretrained") and hasattr(model, "config")):
        return dict(tensors_of(open_weights(folder))), True
    there = [_plain(name) for name, each in model.named_parameters(remove_duplicate=False) if not each.is_meta]
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    with torch.random.fork_rng(devices=[]):
        twin = import_pretrained(folder, type(model), dtype, there).model
    named = [*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False)]
    return dict(named), False


def _put(module: nn.Module, name: str, old: torch.Tensor, new: torch.Tensor) -> Undo:
    """`new` in the place of `old`, in its dtype; returns what puts it back. Parameters keep their identity: an optimizer
    over them, and weights tied to them, follow."""
    if name in module._buffers:
        module._buffers[name] = value_of(new).to(old.dtype)
        return lambda: module._buffers.__setitem__(name, old)
    value: torch.Tensor
    if isinstance(new, Stored):
        value = stored(new.source if new.dtype is old.dtype else Cast(new.source, old.dtype), new.shape)
    else:
        value = new.detach().to(old.dtype)
    parameter = nn.Parameter(value, requires_grad=old.requires_grad)
    torch.utils.swap_tensors(old, parameter)
    return lambda: torch.utils.swap_tensors(old, parameter)
