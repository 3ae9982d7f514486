"""Small models in folders, and training them: for tests of models that are imported from their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

BUDGETS: dict[str, Any] = {"ram": "8MiB", "gpu": "128MiB", "device": "cpu"}
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Under all names, so that ties show too; buffers that are not saved as well."""
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **values: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **values})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # values that the smaller dtypes round, some of them to inf and to zero
            parameter.mul_(torch.randn(parameter.shape).exp())
        model.lm_head.weight[0, :3] = torch.tensor([60000.0, 1e-7, -0.0]).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def batch(index: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(index))
    return {"input_ids": tokens, "labels": tokens}


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> list[float]:
    model.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**batch(step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2, fused=True)


def same(model: nn.Module, expected: nn.Module) -> None:
    found, wanted = tensors_of(model), tensors_of(expected)
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor), name


def change(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
