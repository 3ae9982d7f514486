"""What clients put over a wrapped model's forward (TRL's head, Accelerate's and Fabric's autocast) stays theirs."""

from __future__ import annotations

import inspect
import types

import models
import pytest
import torch
from sides import started
from torch import nn

import fuyou


def loss_of(model: nn.Module) -> float:
    torch.manual_seed(0)  # dropout
    return models.loss_of(model, models.CASES["gpt"].batch(0)).item()


def patched(model: nn.Module, calls: list[str]) -> None:
    inner = model.forward

    def forward(self: nn.Module, *args, **kwargs):
        calls.append("theirs")
        return inner(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def test_a_forward_put_over_ours_outlives_the_run(nvme):
    _, model, optimizer, _ = started("gpt")
    expected = loss_of(model)
    calls: list[str] = []
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu"):
        patched(model, calls)
        assert loss_of(model) == expected and calls == ["theirs"]
    assert loss_of(model) == expected and calls == ["theirs"] * 2


def test_a_model_whose_forward_is_covered_is_not_wrapped_twice(nvme, tmp_path):
    model = nn.Linear(4, 4)  # one block: its forward is the only one that is ours
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu"):
        patched(model, [])
        again = torch.optim.AdamW(model.parameters(), fused=True)
        with pytest.raises(fuyou.ConfigError, match="wrapped already"):
            fuyou.wrap(model, again, tmp_path, ram="640KiB", gpu="1GiB", device="cpu")


def test_the_forward_is_a_bound_method_with_its_own_signature(nvme):
    """Accelerate takes it apart and binds it again; transformers reads what it takes."""
    _, model, optimizer, _ = started("gpt")
    before, expected = inspect.signature(model.forward), loss_of(model)
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu"):
        assert inspect.signature(model.forward) == before
        assert isinstance(model.forward, types.MethodType) and not hasattr(model.forward, "__wrapped__")
        model.forward = types.MethodType(model.forward.__func__, model)
        assert loss_of(model) == expected
        del model.forward
    assert "forward" not in vars(model) and inspect.signature(model.forward) == before
