"""A causal language model with fewer of its layers, so that training it in plain PyTorch fits in memory."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.transformers_folder import import_transformers, in_words, quiet
from fuyou.core.blocks import find_blocks
from fuyou.core.errors import BudgetError, ConfigError
from fuyou.core.sizes import format_bytes
from fuyou.train.model import folder_of


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers that holds most of the model. ConfigError where it has none."""
    blocks = {id(block.module) for block in find_blocks(model)}
    lists = [
        each
        for each in model.modules()
        if isinstance(each, nn.ModuleList) and len(each) and all(id(layer) in blocks for layer in each)
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers of which some could be left out: verify it whole, on a machine with "
            "more memory."
        )
    return max(lists, key=elements_of)


def elements_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def layers_that_fit(model: nn.Module, bytes_per_parameter: int, given_bytes: int, tier: str) -> int:
    """How many of the model's layers can be trained in `given_bytes`; BudgetError where not even one can."""
    total = elements_of(model)
    if total * bytes_per_parameter <= given_bytes:
        return len(layers_of(model))
    layers = layers_of(model)
    each = elements_of(layers) / len(layers)
    rest = total - elements_of(layers)
    count = int((given_bytes / bytes_per_parameter - rest) / each)
    if count < 1:
        needed = int((rest + each) * bytes_per_parameter)
        raise BudgetError(
            f"Plain PyTorch cannot train even one of the {len(layers)} layers here, and so nothing can be compared: that takes "
            f"{format_bytes(needed)} ({bytes_per_parameter} bytes a parameter) of {tier} memory, and {format_bytes(given_bytes)} "
            "can be had. Verify a smaller model of the same kind, or on a larger machine.",
            tier=tier, needed_bytes=needed, given_bytes=given_bytes,
        )  # fmt: skip
    return min(count, len(layers))


def cut(model: Any, count: int) -> None:
    """Leave the first `count` layers in `model`, and say so in its configuration."""
    layers = layers_of(model)
    before = len(layers)
    del layers[count:]
    shorten(model.config, before, count)


def shorten(configuration: Any, before: int, count: int) -> None:
    """`configuration` of a model of `before` layers becomes that of the first `count`, with what it lists a layer."""
    text = configuration.get_text_config()
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, key, value[:count])
    text.num_hidden_layers = count


def plain_model(name: str, dtype: torch.dtype | None, before: int, count: int) -> Any:
    """What transformers' `from_pretrained` gives, with the first `count` of `before` layers only: nothing of fuyou's."""
    transformers = import_transformers()
    folder = folder_of(name)
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": False}
    with in_words(name), quiet(transformers):
        if count < before:
            configuration = copy.deepcopy(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))
            shorten(configuration, before, count)
            options["config"] = configuration
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
