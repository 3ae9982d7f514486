"""A model folder as a shape: its configuration on the meta device, cut into the blocks that `wrap` finds. No weights are
read, and nothing is asked of a hub."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.transformers_folder import import_transformers
from fuyou.core.blocks import Block, find_blocks, loose_parameters, owners
from fuyou.core.errors import ConfigError
from fuyou.plan.shapes import BlockShape, ModelShape, Product
from fuyou.train.model import load_configuration

_ATTENTION = re.compile(r"(^|[._])(self_)?att(n|ention)([._]|$)", re.IGNORECASE)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def load_shape(name: str) -> tuple[ModelShape, list[str]]:
    """(the shape, what a person should know of it) of a local folder, or of an id that is in the hub's cache here.
    ConfigError for what cannot be read."""
    configuration = load_configuration(name, local_only=True)
    transformers = import_transformers()
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(configuration)
    except Exception as error:  # whatever the model's own code raises for values that do not go together
        raise ConfigError(
            f"Model {name} cannot be built from its config.json: {type(error).__name__}: {error}"
        ) from error
    text = configuration.get_text_config()
    notes = []
    if _share_of_experts(text) < 1:
        notes.append(
            f"of {name}'s experts each token meets {_share_of_experts(text):.0%}; all are fetched and updated in each step"
        )
    return shape_of(model, text, name), notes


def shape_of(model: nn.Module, configuration: Any, name: str) -> ModelShape:
    """`configuration`: of the text model, for heads and experts."""
    blocks = find_blocks(model)
    owned = owners(model, blocks)
    classes = Counter(type(block.module) for block in blocks)
    shapes = [_block_shape(block, index, owned, configuration, classes) for index, block in enumerate(blocks)]
    loose = sum(parameter.numel() for _, parameter in loose_parameters(model, blocks))
    if loose:
        shapes.append(BlockShape("the model's own parameters", loose, loose, 0, is_layer=False))
    return ModelShape(name, tuple(shapes))


def _block_shape(
    block: Block, index: int, owned: dict[int, tuple[int, ...]], configuration: Any, classes: Counter[type]
) -> BlockShape:
    parameters = list(block.module.parameters())
    weights = sum(each.numel() for each in parameters)
    tied = sum(each.numel() for each in parameters if owned[id(each)][0] != index)  # stored with the first that has it
    hidden = int(configuration.hidden_size)
    attends = any(_ATTENTION.search(name) for name, _ in block.module.named_modules())
    heads = int(getattr(configuration, "num_attention_heads", 0) or 0)
    head_size = int(getattr(configuration, "head_dim", None) or (hidden // heads if heads else 0))
    products = _products(block.module, hidden, _share_of_experts(configuration))
    norms = sum("norm" in type(module).__name__.lower() for module in block.module.modules())
    is_layer = attends or (classes[type(block.module)] > 1 and bool(products))
    # A gated MLP keeps the activation function's output and its product with the other half.
    gated = any("gate_proj" in each.name or "gate_up" in each.name for each in products)
    last = products[-1] if products else None  # back to the model's width; of all experts, as many times as wide
    inner = last.inputs * last.share * max(1.0, last.outputs / hidden) if last else 0.0
    return BlockShape(
        name=block.name,
        elements=weights - tied,
        weight_elements=weights,
        width=hidden,
        products=products,
        attention_width=heads * head_size if attends else 0,
        elementwise_width=norms * hidden + (2 if gated else 1) * inner if is_layer else 0.0,
        is_layer=is_layer,
        tied_elements=tied,
    )


def _products(module: nn.Module, hidden: int, share: float) -> tuple[Product, ...]:
    """In order of registration, which is that of computing in all decoders that transformers has."""
    found = []
    for name, each in module.named_modules():
        experts = share if ".experts." in f".{name}." else 1.0
        for label, parameter in each.named_parameters(recurse=False):
            at = f"{name}.{label}" if name else label
            if parameter.dim() == 2 and not isinstance(each, nn.Embedding):
                outputs, inputs = parameter.shape
                if type(each).__name__ == "Conv1D":  # GPT-2's, the other way round
                    outputs, inputs = inputs, outputs
                found.append(Product(at, int(inputs), int(outputs), experts))
            elif parameter.dim() == 3 and "conv" not in type(each).__name__.lower():  # all experts in one tensor
                count, *sides = parameter.shape
                # One side is the model's width: what goes in, but for the projection that leads back.
                other = int(sides[1] if sides[0] == hidden else sides[0])
                back = "down" in label
                inputs, width = (other, hidden) if back else (hidden, other)
                found.append(Product(at, int(inputs), int(count * width), share))
    return tuple(found)


def _share_of_experts(configuration: Any) -> float:
    used = getattr(configuration, "num_experts_per_tok", None)
    count = next((getattr(configuration, key) for key in _EXPERT_COUNTS if getattr(configuration, key, None)), None)
    return min(1.0, used / count) if used and count else 1.0
