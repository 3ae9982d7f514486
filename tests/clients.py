"""What the tests of clients share: a tiny Llama, a tokenizer, rows, adapters, and one script on plain PyTorch and on fuyou.

A script drives a real, unmodified library with what a `Side` gives it, and returns what the library logged. Both sides
must log the same and leave the same parameters, bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import models
import pytest
import sides
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fuyou

VOCABULARY = 400
WORDS = [word for thing in (nn.Module, torch.optim.AdamW, nn.Linear) for word in (thing.__doc__ or "").split()]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclasses.dataclass
class Side:
    """A model in training, plain (`run` is None) or wrapped, and a folder for what the client writes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    folder: Path
    run: fuyou.Run | None


Script = Callable[[Side], Any]
Build = Callable[[], nn.Module]
KEEP, RECOMPUTE = fuyou.Config(activations="keep"), fuyou.Config(activations="recompute")


def started(build: Build, groups: Callable[[nn.Module], list[dict]] = models.groups_of) -> tuple[nn.Module, Any, Any]:
    """Model, AdamW and a warm-up schedule: the same each time."""
    torch.manual_seed(0)
    model = build()
    optimizer = models.optimizer_of(groups(model))
    return model, optimizer, models.schedule_of(optimizer)


def wrapped(model: nn.Module, optimizer: torch.optim.Optimizer, nvme: Path | None, **changes: Any) -> fuyou.Run:
    """State on NVMe and blocks recomputed; or, without a folder, all in RAM and activations kept."""
    options = {"ram": "440KiB" if nvme else "64MiB", "gpu": "1GiB", "config": RECOMPUTE if nvme else KEEP, **changes}
    return fuyou.wrap(model, optimizer, nvme=nvme, device="cpu", **options)


def plain(script: Script, build: Build, folder: Path, groups: Any = models.groups_of) -> tuple[Any, dict[str, Any]]:
    """What the oracle saw, and its parameters."""
    model, optimizer, scheduler = started(build, groups)
    seen = script(Side(model, optimizer, scheduler, folder, None))
    assert len(pytree.tree_leaves(seen)) > 0
    return seen, models.values_of(model)


def compare(
    script: Script, build: Build, tmp_path: Path, nvme: Path, groups: Any = models.groups_of, ram: str = "440KiB"
) -> Any:
    """On plain PyTorch, with state on NVMe (`ram` holds only a part of it), and all in RAM. What the plain side saw."""
    seen, values = plain(script, build, tmp_path / "plain", groups)
    for name, folder in (("on-nvme", nvme), ("in-ram", None)):
        model, optimizer, scheduler = started(build, groups)
        with wrapped(model, optimizer, folder, **({"ram": ram} if folder else {})) as run:
            found = script(Side(model, run.optimizer, scheduler, tmp_path / name, run))
            assert models.differing(model, values) == [], name
            assert bool(run.report().dict()["traffic"]["nvme_read_bytes_per_step"]) == bool(folder), name
        assert sides.same(found, seen), f"{name}: {sides._first_difference(found, seen)}"
        assert models.differing(model, values) == [], f"{name}, after close"
    return seen


def slow_but(kept: Iterable[str], every: Iterable[str]) -> list[Any]:
    """All of `every` as parameters, marked slow but for those in `kept`."""
    return [each if each in set(kept) else pytest.param(each, marks=pytest.mark.slow) for each in every]


# --- what is trained ------------------------------------------------------------------------------------------------


def llama(**changes: Any) -> nn.Module:
    """Tied embeddings, dropout in attention, 400 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1, "attn_implementation": "sdpa",
        "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": True,
        "max_position_embeddings": 256, **changes,
    })).train()  # fmt: skip


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(**{
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": targets, "task_type": "CAUSAL_LM", **changes,
    })  # fmt: skip


def with_adapters(config: Any = None, base: Build = llama) -> nn.Module:
    """`base` under peft's model for `config` (default: LoRA), in training."""
    from peft import get_peft_model

    model = base()
    torch.manual_seed(1)
    return get_peft_model(model, lora() if config is None else config).train()


def batch(index: int, rows: int = 2, length: int = 12) -> torch.Tensor:
    """(rows, length) tokens, without special ones."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(index))


def loader(rows: int = 16, batch_size: int = 2) -> torch.utils.data.DataLoader:
    items = [{"input_ids": batch(index, rows=1)[0]} for index in range(rows)]
    return torch.utils.data.DataLoader(items, batch_size=batch_size, shuffle=False)  # type: ignore[arg-type]


# --- text -----------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    """Byte-level, trained on the spot, with a chat template that marks what the assistant says."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator([" ".join(WORDS)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + index) % len(WORDS)] for index in range(count))


def texts(rows: int = 16) -> list[dict[str, Any]]:
    return [{"text": words(13 * row, 5 + 7 * row % 30)} for row in range(rows)]


def chats(rows: int = 16) -> list[dict[str, Any]]:
    def turns(row: int) -> list[dict[str, str]]:
        start = 11 * row
        return [
            {"role": "user", "content": words(start, 6)},
            {"role": "assistant", "content": words(start + 6, 6 + row % 5)},
            {"role": "user", "content": "Go on"},
            {"role": "assistant", "content": words(start + 12, 8)},
        ]

    return [{"messages": turns(row)} for row in range(rows)]


def completions(rows: int = 16) -> list[dict[str, Any]]:
    return [{"prompt": words(11 * row, 6), "completion": " " + words(11 * row + 6, 6 + row % 5)} for row in range(rows)]


def preferences(rows: int = 16) -> list[dict[str, Any]]:
    return [
        {"prompt": words(11 * row, 6), "chosen": " " + words(11 * row + 6, 6), "rejected": " " + words(7 * row + 60, 6)}
        for row in range(rows)
    ]
