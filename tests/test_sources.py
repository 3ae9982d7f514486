"""Tensors made of tensors in files: any range of any of them is what torch makes of the loaded ones, in small pieces."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fuyou.checkpoint import sources, stored
from fuyou.checkpoint.stored import Stored, parts_of, tensors_of, value_of
from fuyou.checkpoint.weight_files import open_file


@pytest.fixture
def both(tmp_path, monkeypatch) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(tensors in a file, the same in memory); pieces of 8 elements, runs of any length."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 32)
    monkeypatch.setattr(stored, "_SHORTEST_RUN_BYTES", 1)
    torch.manual_seed(0)
    tensors = {name: torch.randn(4, 6, 5) for name in "abc"} | {
        "wide": torch.randn(4, 9, 5),
        "half": torch.randn(4, 6, 5).half(),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    return tensors_of([open_file(tmp_path / "w.safetensors")]), load_file(tmp_path / "w.safetensors")


MADE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "itself": lambda t: t["a"],
    "cast": lambda t: t["a"].to(torch.bfloat16),
    "cast twice": lambda t: t["a"].bfloat16().float(),
    "stack 0": lambda t: torch.stack([t["a"], t["b"], t["c"]]),
    "stack 1": lambda t: torch.stack([t["a"], t["b"], t["c"]], dim=1),
    "stack -1": lambda t: torch.stack([t["a"], t["b"]], dim=-1),
    "cat 0": lambda t: torch.cat([t["a"], t["b"]]),
    "cat 1": lambda t: torch.cat([t["a"], t["wide"], t["b"]], dim=1),
    "cat -1": lambda t: torch.cat([t["a"], t["b"]], -1),
    "chunk 0": lambda t: torch.chunk(t["a"], 2)[1],
    "chunk 1": lambda t: torch.chunk(t["wide"], 2, dim=1)[1],
    "chunk -1": lambda t: t["a"].chunk(3, -1)[2],
    "split": lambda t: torch.split(t["wide"], [2, 3, 4], dim=1)[1],
    "experts": lambda t: torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["c"], t["a"]])], dim=1),
    "split of a stack": lambda t: torch.split(torch.stack([t["a"], t["b"]]).bfloat16(), [1, 5], dim=2)[1],
    "shape": lambda t: t["a"].reshape(8, 15).unsqueeze(0).flatten(),
    "transposed": lambda t: t["a"].transpose(1, 2).contiguous(),
    "transposed stack": lambda t: torch.stack([t["a"], t["b"]]).transpose(0, 1).contiguous().to(torch.bfloat16),
    "some of it": lambda t: t["a"][1:3, ::2],
    "computed": lambda t: t["a"] * 2 + t["b"],
    "beside one in memory": lambda t: torch.cat([t["a"], torch.ones(4, 1, 5)], dim=1),
    "unbound": lambda t: t["a"].unbind(1)[2],
    "bits": lambda t: t["a"].view(torch.int32),
    "by keyword": lambda t: torch.stack(tensors=[t["a"], t["b"]], dim=1),
    "two dtypes": lambda t: torch.cat([t["a"], t["half"]]),
}


@pytest.mark.parametrize("name", MADE)
def test_any_range_is_what_torch_makes_of_loaded_tensors(both, name):
    there, loaded = both
    found, expected = MADE[name](there), MADE[name](loaded)
    assert isinstance(found, Stored) and type(expected) is torch.Tensor
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(value_of(found), expected)
    flat, draw = expected.reshape(-1), random.Random(0)
    for _ in range(50):
        first, last = sorted(draw.choices(range(flat.numel() + 1), k=2))
        parts = [part.clone() for part in parts_of(found, first, last)]
        assert torch.equal(torch.cat([flat[:0], *parts]), flat[first:last])


def test_what_keeps_runs_together_is_read_in_pieces(both):
    """All but a transposition and arithmetic: a range takes that range's elements, and a piece at a time."""
    there, _ = both
    whole = {name for name, make in MADE.items() if make(there).source.whole_bytes}
    assert whole == {
        "transposed", "transposed stack", "some of it", "computed", "beside one in memory", "unbound", "bits", "two dtypes",
    }  # fmt: skip
    for name, make in MADE.items():
        if name not in whole:
            assert max(part.numel() for part in parts_of(make(there), 3, 60)) <= 16, name


def test_a_value_that_python_needs_is_read(both):
    there, loaded = both
    assert there["a"].sum().item() == loaded["a"].sum().item()
    assert there["a"].tolist() == loaded["a"].tolist()
    assert bool((there["a"] == loaded["a"]).all())
    assert torch.equal(there["a"], there["a"].clone()) and not torch.equal(there["a"], there["b"])
    assert not torch.equal(there["a"], there["wide"]) and not torch.equal(there["a"], there["half"])


USES: dict[str, Callable[[Any], Any]] = {
    "read": lambda p: p.sum(),
    "changed": lambda p: p.mul_(2),
    "data": lambda p: p.data.zero_(),
    "view": lambda p: p.view(-1)[:3].fill_(7),
    "element": lambda p: p.__setitem__((0, 0, 0), 5.0),
    "initialised": lambda p: nn.init.constant_(p, 3.0),
    "copied": lambda p: p.copy_(torch.ones(4, 6, 5)),
    "replaced": lambda p: setattr(p, "data", torch.ones(4, 6, 5)),
    "read through data": lambda p: p.data.norm(),
    "under grad": lambda p: (p * 2).sum(),
    "converted": lambda p: nn.ParameterList([p]).double(),
}


@pytest.mark.parametrize("trainable", [True, False], ids=["", "frozen"])
@pytest.mark.parametrize("use", USES)
def test_a_parameter_that_is_used_is_read_for_good(both, use, trainable):
    there, loaded = both
    ours, plain = (nn.Parameter(each["a"], requires_grad=trainable) for each in (there, loaded))
    assert isinstance(ours, Stored) and isinstance(ours, nn.Parameter)
    results = []
    for parameter in (ours, plain):
        with torch.set_grad_enabled(use == "under grad"):
            results.append(USES[use](parameter))
    assert type(ours) is nn.Parameter and ours.requires_grad == trainable and "source" not in vars(ours)
    assert torch.equal(ours.detach(), plain.detach())
    if use == "under grad" and trainable:
        for result in results:
            result.backward()
        assert torch.equal(ours.grad, plain.grad)


def test_what_needs_no_bytes_reads_none(both, tmp_path):
    there, _ = both
    Path(tmp_path / "w.safetensors").write_bytes(b"")  # nothing can be read any more
    parameter = nn.Parameter(there["a"])
    layer = nn.Linear(2, 2)
    layer.weight = parameter
    assert parameter.shape == (4, 6, 5) and parameter.dtype is torch.float32 and parameter.device.type == "cpu"
    assert parameter.is_contiguous() and parameter.stride() == (30, 5, 1) and parameter.stride(0) == 30
    assert parameter.numel() == 120 and parameter.requires_grad and parameter.grad is None and parameter.is_leaf
    assert torch.zeros_like(parameter).shape == parameter.shape and len({parameter, layer.weight}) == 1
    torch.optim.AdamW(layer.parameters(), fused=True)
    layer.bias = None
    layer.to("cpu", torch.float32).float().cpu()  # what it is already
    parameter.requires_grad_(False)
    assert isinstance(layer.weight, Stored) and not parameter.requires_grad


def test_copies_have_the_values(both):
    there, loaded = both
    for kind in (copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        ours, plain = nn.Parameter(there["a"]), nn.Parameter(loaded["a"])
        found = kind(ours)
        assert type(found) is nn.Parameter and found is not ours and torch.equal(found, plain)
