"""Small models with their batches, and plain PyTorch training: the oracle that fuyou must equal bit for bit.

Nothing here knows fuyou: `train` is the loop that both sides run, with their own optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

STEPS, ACCUMULATION = 8, 2
LR, OTHER_LR, WEIGHT_DECAY, CLIP = 1e-3, 3e-3, 0.1, 0.5  # the clip bites: first norms are above 1
VOCABULARY = 1237


class Layer(nn.Module):
    """A transformer layer with dropout, on torch's own attention."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.first_norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.second_norm(x))


class Gpt(nn.Module):
    """A GPT of our own: a tied head with a bias of 1,237 elements, and parameters that the model itself owns."""

    def __init__(self, width: int = 32, layers: int = 2, vocabulary: int = VOCABULARY, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(64, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(width))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        x = (self.embedding(tokens) + self.position[: tokens.shape[1]]) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.logits(tokens)
        return logits if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Wide(nn.Module):
    """One parameter of 25,009,997 elements (an odd number: its tail counts) and one of 1,237."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 5003)
        self.wide = nn.Linear(5003, 4999, bias=False)
        self.scale = nn.Parameter(torch.ones(VOCABULARY))

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.wide(self.embedding(tokens))
        logits = hidden[..., :VOCABULARY] * self.scale
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + hidden.square().mean()


@dataclasses.dataclass(frozen=True)
class Case:
    """How to build a model and its i-th batch."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]

    def model(self) -> nn.Module:
        """The same weights each time."""
        torch.manual_seed(0)
        return self.build().train()


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**batch)
    return result if isinstance(result, torch.Tensor) else result.loss


# --- training, as everybody writes it -----------------------------------------------------------------------------


class Stepper(Protocol):
    """What a training loop asks of an optimizer."""

    def step(self) -> Any: ...

    def zero_grad(self) -> None: ...


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: matrices decay, the rest learns faster and does not. Frozen parameters are in neither."""
    trained = [each for each in model.parameters() if each.requires_grad]
    return [
        {"params": [each for each in trained if each.dim() > 1]},
        {"params": [each for each in trained if each.dim() <= 1], "lr": OTHER_LR, "weight_decay": 0.0},
    ]


def optimizer_of(
    groups: list[dict[str, Any]], kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    return kind(groups, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def schedule_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then decay: another learning rate at every step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) / (1 + 0.1 * step))


def accumulate(model: nn.Module, case: Case, step: int, accumulation: int = ACCUMULATION) -> list[float]:
    """The forwards and backwards of one step; the losses."""
    losses = []
    for micro in range(accumulation):
        torch.manual_seed(1000 * step + micro)  # dropout
        loss = loss_of(model, case.batch(100 * step + micro)) / accumulation
        loss.backward()
        losses.append(loss.item())
    return losses


def train(
    model: nn.Module,
    optimizer: Stepper,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    case: Case,
    *,
    clip: bool,
    steps: Sequence[int] = range(STEPS),
    accumulation: Callable[[int], int] = lambda step: ACCUMULATION,
) -> list[float]:
    """Losses and, with `clip`, the norms before clipping, in order."""
    seen = []
    for step in steps:
        seen += accumulate(model, case, step, accumulation(step))
        if clip:
            seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return seen


class PlainBf16:
    """The plain loop of bf16 mode: fp32 masters, bf16 compute copies in the model, bf16 gradients cast up.

    Takes a model in fp32 or bf16 and makes its parameters bf16. Clipping works on the model's gradients, in bf16.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.masters = {each: each.detach().clone().float() for each in model.parameters()}
        groups = groups_of(model)
        for group in groups:
            group["params"] = [self.masters[each] for each in group["params"]]
        self.inner = optimizer_of(groups)
        for copy, master in self.masters.items():
            copy.data = master.bfloat16()

    def step(self) -> None:
        for copy, master in self.masters.items():
            master.grad = None if copy.grad is None else copy.grad.float()
        self.inner.step()
        for copy, master in self.masters.items():
            copy.data.copy_(master.bfloat16())

    def zero_grad(self) -> None:
        for copy in self.masters:
            copy.grad = None

    def copies_were_written(self) -> None:
        """Somebody wrote to the model's parameters: their masters follow where a value changed."""
        for copy, master in self.masters.items():
            changed = copy.data.view(torch.int16) != master.data.bfloat16().view(torch.int16)
            master.data[changed] = copy.data[changed].float()


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def differing(model: nn.Module, expected: dict[str, torch.Tensor]) -> list[str]:
    """The names whose values are not bit-equal: an empty list is what tests want."""
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


# --- the cases ----------------------------------------------------------------------------------------------------


def _tokens(vocabulary: int, rows: int = 2, length: int = 16) -> Callable[[int], dict[str, torch.Tensor]]:
    def batch(index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.clone()}

    return batch


def _own(vocabulary: int) -> Callable[[int], dict[str, torch.Tensor]]:
    def batch(index: int) -> dict[str, torch.Tensor]:
        tokens = _tokens(vocabulary)(index)["input_ids"]
        return {"tokens": tokens, "labels": tokens.roll(-1, 1)}

    return batch


def _masked(index: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(200)(index)["input_ids"]
    masked = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(index)) < 0.3
    return {"input_ids": tokens.masked_fill(masked, 2), "labels": tokens.masked_fill(~masked, -100)}


def _images(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "labels": torch.randint(10, (2,), generator=generator),
    }


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1, attn_implementation="sdpa", pad_token_id=0,
    ))  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        vocab_size=200, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager", bos_token_id=1,
        eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.1,
        decoder_start_token_id=0, attn_implementation="eager",
    ))  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        attn_implementation="sdpa",
    ))  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, attn_implementation="eager",
    ))  # fmt: skip


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attention_dropout=0.1,
        output_router_logits=True, attn_implementation="sdpa", pad_token_id=0,
    ))  # fmt: skip


CASES = {
    "gpt": Case(Gpt, _own(VOCABULARY)),
    "llama": Case(_llama, _tokens(200)),
    "gpt2": Case(_gpt2, _tokens(200)),
    "t5": Case(_t5, _tokens(200)),
    "bert": Case(_bert, _masked),
    "vit": Case(_vit, _images),
    "mixtral": Case(_mixtral, _tokens(200)),
    "wide": Case(Wide, _own(64)),
}
