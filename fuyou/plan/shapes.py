"""A model as the products of matrices that its blocks compute, and from them the seconds and bytes of each block.

Formulas: a product of T tokens with a weight of m x n takes 2 T m n operations, its backward twice that; attention over
sequences of S takes 4 T S w forward (w = heads x head size; scores and their sum over values), not halved for causality.
For a GPT block of width h that is 24 T h^2 + 4 T S h: Narayanan et al., "Efficient Large-Scale Language Model Training on
GPU Clusters" (arXiv 2104.04473), section 5.1 and appendix. Bytes that a block saves follow from what each operation's
backward reads: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198),
section 4, with attention that does not store scores (FlashAttention) and without dropout: 16 T h elements with the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fuyou.core.errors import ConfigError
from fuyou.plan.cost import BlockNumbers, Item


@dataclass(frozen=True)
class Product:
    """A weight of inputs x outputs that each token is multiplied with; `share`: of the tokens, for experts (8 experts of
    which 2 are used are one Product of all 8 with share 0.25 and 8 times the outputs)."""

    name: str
    inputs: int
    outputs: int
    share: float = 1.0

    @property
    def saved_width(self) -> float:
        """Elements a token of its output."""
        return self.outputs * self.share


@dataclass(frozen=True)
class BlockShape:
    """A block: `elements` trained here, `weight_elements` fetched for it (more where a weight is another block's too).

    `width`: of its input. `products` in order; of a layer the last one's output is the block's. `attention_width`: heads x
    head size, 0 without attention. `elementwise_width`: elements a token that norms and activation functions save.
    `is_layer`: False for embedding and head, whose saved tensors are theirs alone and are kept.
    """

    name: str
    elements: int
    weight_elements: int
    width: int
    products: tuple[Product, ...] = ()
    attention_width: int = 0
    elementwise_width: float = 0.0
    is_layer: bool = True
    tied_elements: int = 0  # of weight_elements, those stored with another block

    @property
    def flops_per_token(self) -> float:
        """Of one forward, without attention's own."""
        return sum(2.0 * each.inputs * each.outputs * each.share for each in self.products)


@dataclass(frozen=True)
class ModelShape:
    name: str
    blocks: tuple[BlockShape, ...]

    @property
    def elements(self) -> int:
        return sum(each.elements for each in self.blocks)

    @property
    def active_elements(self) -> float:
        """Parameters that a token meets: all, but for experts that it is not sent to. This is the N of 6N and 8N."""
        unused = sum(each.inputs * each.outputs * (1 - each.share) for block in self.blocks for each in block.products)
        return self.elements - unused


def gpt(
    layers: int, heads: int, hidden: int, vocab: int | None = None, *, head: bool = True, name: str = ""
) -> ModelShape:
    """A GPT-3 by its numbers: layers of 12 h^2 + 13 h parameters; with `vocab`, an embedding, and a head tied to it.

    ConfigError where hidden is no multiple of heads.
    """
    for label, value in (("--layers", layers), ("--heads", heads), ("--hidden", hidden), ("--vocab", vocab)):
        if value is not None and value < 1:
            raise ConfigError(f"{label} {value} must be at least 1.")
    if hidden % heads:
        raise ConfigError(f"--hidden {hidden} is no multiple of --heads {heads}: every head is as wide as the others.")
    layer = gpt_layer("layers.0", hidden)
    blocks = [layer] * layers
    if vocab is not None:
        table = vocab * hidden
        blocks.insert(0, BlockShape("embedding", table, table, hidden, is_layer=False))
        if head:
            blocks.append(
                BlockShape(
                    "head", 0, table, hidden, (Product("logits", hidden, vocab),), is_layer=False, tied_elements=table
                )
            )
    return ModelShape(name or f"{layers} layers, {heads} heads, hidden {hidden}", tuple(blocks))


def gpt_layer(name: str, h: int) -> BlockShape:
    products = (
        Product("qkv", h, 3 * h),
        Product("attention projection", h, h),
        Product("mlp input", h, 4 * h),
        Product("mlp output", 4 * h, h),
    )
    elements = 12 * h * h + 13 * h  # weights; biases 9 h, two norms 4 h
    # Both norms' outputs, 2 h, and the activation function's, 4 h. The inputs of the norms are the block's input and the
    # sum after attention, which stands for the projection's output.
    return BlockShape(name, elements, elements, h, products, attention_width=h, elementwise_width=6 * h)


@dataclass(frozen=True)
class Work:
    """One backward's rows on one device: `batch` rows of `sequence` tokens."""

    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence


def block_numbers(
    blocks: Sequence[BlockShape], work: Work, *, flops_per_s: float, itemsize: int, temporaries: bool, tile_bytes: int
) -> tuple[BlockNumbers, ...]:
    """What the cost model needs. `itemsize`: bytes an element of weights and activations. `temporaries`: count gradients of
    activations beside what was saved (else they are taken to reuse it). `tile_bytes`: of logits at a time in the head."""
    memo: dict[BlockShape, BlockNumbers] = {}
    for each in blocks:
        if each not in memo:
            memo[each] = _numbers(each, work, flops_per_s, itemsize, temporaries, tile_bytes)
    return tuple(memo[each] for each in blocks)


def _numbers(
    shape: BlockShape, work: Work, flops_per_s: float, itemsize: int, temporaries: bool, tile_bytes: int
) -> BlockNumbers:
    tokens = work.tokens
    attention = 4.0 * tokens * work.sequence * shape.attention_width
    forward_s = (tokens * shape.flops_per_token + attention) / flops_per_s
    row = tokens * itemsize  # bytes of a tensor one element wide

    def numbers(items: tuple[Item, ...], working: float) -> BlockNumbers:
        return BlockNumbers(
            shape.name, shape.elements, shape.weight_elements * itemsize, forward_s, 2 * forward_s, row * shape.width,
            items, round(working), shape.tied_elements * itemsize,
        )  # fmt: skip

    if not shape.is_layer:
        # The head's logits exist a tile at a time (fuyou/train/loss.py); what an embedding saves is as small as its input.
        logits = row * max((each.outputs for each in shape.products), default=0)
        return numbers((), 2 * row * shape.width + min(2 * logits, tile_bytes))
    items = [
        Item(
            product.name,
            round(row * product.saved_width),
            2.0 * tokens * product.inputs * product.outputs * product.share / flops_per_s,
            read_by_backward=number < len(shape.products) - 1,
        )
        for number, product in enumerate(shape.products)
    ]
    if shape.attention_width:
        items.append(Item("attention", row * shape.attention_width, attention / flops_per_s))
    items.append(Item("norms and activations", round(row * shape.elementwise_width), 0.0))
    # While the widest product's gradient is made, so is that of the residual stream.
    widest = max((each.saved_width for each in shape.products), default=0.0)
    return numbers(tuple(items), row * (widest + shape.width) if temporaries else 0)
