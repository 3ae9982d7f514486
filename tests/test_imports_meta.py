"""Models on the meta device, which are given their weights by `wrap`: the bits of from_pretrained, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from import_tools import BUDGETS, adamw, bits, change, llama, same, tensors_of, train
from safetensors.torch import load_file, save_file
from torch import nn

import fuyou
from fuyou.core.errors import ConfigError


def on_meta(folder: Path, buffers: bool = True) -> Any:
    configuration = transformers.AutoConfig.from_pretrained(folder)
    if buffers:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(configuration)
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(configuration)
    model.tie_weights()
    return model


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers on meta", "buffers in memory"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_model_on_the_meta_device_is_given_its_weights(tmp_path, nvme, tied, buffers):
    folder = llama(tmp_path / "m", tie_word_embeddings=tied, shard="20KB")
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder)
    losses = train(expected, adamw(expected))
    model = on_meta(folder, buffers)
    optimizer = adamw(model)
    before = torch.get_rng_state()
    with fuyou.wrap(model, optimizer, nvme, weights=folder, **BUDGETS) as run:
        assert torch.equal(torch.get_rng_state(), before)
        assert train(model, run.optimizer) == losses
    same(model, expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_is_in_memory_stays(tmp_path, nvme):
    folder = llama(tmp_path / "m")
    model = on_meta(folder)
    model.lm_head = nn.Linear(32, 64, bias=False)
    change(folder, lambda tensors: tensors.pop("lm_head.weight"))
    expected = model.lm_head.weight.detach().clone()
    with fuyou.wrap(model, adamw(model), nvme, weights=folder, **BUDGETS):
        pass
    assert bits(model.lm_head.weight) == bits(expected)
    stored = load_file(folder / "model.safetensors")
    assert all(bits(each) == bits(stored[name]) for name, each in model.named_parameters() if name != "lm_head.weight")


class Plain(nn.Module):
    """Not of transformers; its scratch buffer is in no file."""

    def __init__(self, scratch_on: str | None = "cpu") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(3))
        self.register_buffer("scratch", torch.ones(3, device=scratch_on), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scratch.sum()


def test_a_plain_module_takes_the_names_of_its_state_dict(tmp_path, nvme):
    torch.manual_seed(0)
    expected = Plain()
    for _ in range(3):
        expected(torch.randn(5, 8))  # the batch norms' buffers have values
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Plain()
    with fuyou.wrap(model, adamw(model), nvme, weights=tmp_path, **BUDGETS) as run:
        x = torch.randn(5, 8)
        ours, theirs = model(x), expected(x)
        assert bits(ours) == bits(theirs)
        ours.sum().backward(), theirs.sum().backward()
        run.optimizer.step(), adamw(expected).step()
    same(model, expected)
    with torch.device("meta"):
        model = Plain(scratch_on=None)
    with pytest.raises(ConfigError, match=r"lack 1 tensor of the model, .*: scratch"):
        fuyou.wrap(model, adamw(model), nvme, weights=tmp_path, **BUDGETS)
    change(tmp_path, lambda tensors: tensors.update(extra=torch.ones(1)))
    with torch.device("meta"):
        model = Plain()
    with pytest.raises(ConfigError, match="hold 1 tensor that the model has no place for: extra"):
        fuyou.wrap(model, adamw(model), nvme, weights=tmp_path, **BUDGETS)


def test_nothing_has_changed_when_it_is_refused(tmp_path, nvme):
    folder = llama(tmp_path / "m")
    model = on_meta(folder)
    optimizer = adamw(model)
    before = tensors_of(model)
    with pytest.raises(fuyou.BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme, weights=folder, ram=1, gpu="128MiB", device="cpu")
    with pytest.raises(ConfigError, match="does not exist"):
        fuyou.wrap(model, optimizer, nvme, weights=folder / "none", **BUDGETS)
    change(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ConfigError, match="model.norm.weight"):
        fuyou.wrap(model, optimizer, nvme, weights=folder, **BUDGETS)
    with pytest.raises(ConfigError, match="weights=folder"):
        fuyou.wrap(model, optimizer, nvme, **BUDGETS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(llama(tmp_path / "loaded"))
    with pytest.raises(ConfigError, match="has its values already"):
        fuyou.wrap(loaded, adamw(loaded), nvme, weights=folder, **BUDGETS)
    after = tensors_of(model)
    assert all(after[name] is tensor and tensor.is_meta for name, tensor in before.items())
    assert all(type(each) is nn.Parameter for each in model.parameters()) and optimizer.param_groups[0]["params"]
    folder = llama(tmp_path / "whole")
    with fuyou.wrap(model, optimizer, nvme, weights=folder, ram=refused.value.needed_bytes, gpu="128MiB", device="cpu"):
        pass
    same(model, transformers.AutoModelForCausalLM.from_pretrained(folder))
