"""The oracle of micro-batches: plain PyTorch, every block's forward applied to slices of rows, results concatenated.

Nothing here knows fuyou's slicing. A tensor argument of two or more dimensions with the batch in front is cut by
indexing; a cache that is empty for the block is a fresh one for each slice; a result is concatenated where the whole
call gives one of as many rows, else the first slice's is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from torch import nn

from fuyou.core.blocks import find_blocks

CACHED = ("llama", "gpt2", "mixtral", "t5")  # models that take use_cache


def case_of(name: str, rows: int = 8, **extra: Any) -> models.Case:
    """The case with batches of `rows` rows; `use_cache=False` where the model has it, unless `extra` says otherwise."""
    case = models.CASES[name]

    def batch(index: int) -> dict[str, Any]:
        pairs = [case.batch(1000 * index + place) for place in range(rows // 2)]
        options = {**({"use_cache": False} if name in CACHED else {}), **extra}
        return {**{key: torch.cat([each[key] for each in pairs]) for key in pairs[0]}, **options}

    return models.Case(case.build, batch)


def slice_blocks(model: nn.Module, rows: int) -> nn.Module:
    """Every block of `model` runs `rows` rows at a time from now on."""
    for block in find_blocks(model):
        block.module.forward = sliced(block.module.forward, rows)
    return model


def sliced(forward: Callable[..., Any], rows: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        batch = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)).shape[0]
        if batch <= rows:
            return forward(*args, **kwargs)
        parts = []
        for start in range(0, batch, rows):
            some = slice(start, min(start + rows, batch))
            parts.append(forward(*_cut(args, batch, some), **_cut(kwargs, batch, some)))
        if isinstance(parts[0], torch.Tensor):
            return torch.cat(parts)
        with torch.no_grad(), torch.random.fork_rng():  # shapes alone
            whole = forward(*args, **kwargs)
        return _together(parts, whole, batch)

    return run


def _cut(value: Any, batch: int, some: slice) -> Any:
    if isinstance(value, torch.Tensor):
        return value[some] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _cut(item, batch, some) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_cut(item, batch, some) for item in value)
    if type(value).__name__ == "DynamicCache":
        return type(value)()
    return value


def _together(parts: list[Any], whole: Any, batch: int) -> Any:
    if isinstance(whole, torch.Tensor):
        return torch.cat(parts) if whole.shape[0] == batch else parts[0]
    if isinstance(whole, dict):
        return type(whole)(**{key: _together([part[key] for part in parts], whole[key], batch) for key in whole})
    if isinstance(whole, tuple):
        return tuple(_together(list(each), item, batch) for *each, item in zip(*parts, whole, strict=True))
    return parts[0]
