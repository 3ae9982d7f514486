"""Architectures of transformers train as in plain PyTorch, bit for bit, with their weights streamed block by block.

Four steps of AdamW with two backwards each and clipping, dropout as the config has it. The budgets are the smallest that
`wrap` accepts: nothing but staging in host memory, and room on the device for one block at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from architectures import TEXTS, UNREPEATABLE, Architecture
from architectures_media import CANNOT, MEDIA
from torch import nn
from torch.utils import _pytree as pytree

import fuyou
from fuyou.swap import stash
from fuyou.swap.placement import PLACEMENTS, Placement

ARCHITECTURES = {**TEXTS, **MEDIA, **UNREPEATABLE}
BY_DEFAULT = ("Albert", "Bart", "CLIP", "IBert", "Mamba", "MobileViT", "Wav2Vec2")  # the rest is slow, taken together
CHECKPOINTED = ("Bert", "Llama", "Mixtral", "T5", "ViT", "Wav2Vec2", "Whisper")
STEPS, ACCUMULATION, LR, CLIP = 4, 2, 1e-3, 1.0


@dataclasses.dataclass
class Outcome:
    """What a training saw (losses, norms, the next random number of each backward), and what it left."""

    seen: list[float]
    values: dict[str, torch.Tensor]  # parameters and buffers


def loss_of(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The model's own loss, else the mean square of each of its outputs, summed."""
    result = model(**batch)
    if getattr(result, "loss", None) is not None:
        return result.loss.mean()
    outputs = [each for each in pytree.tree_leaves(result) if isinstance(each, torch.Tensor) and each.requires_grad]
    return torch.stack([each.float().square().mean() for each in outputs]).sum()


def train(model: nn.Module, optimizer: Any, architecture: Architecture) -> list[float]:
    seen = []
    for step in range(STEPS):
        for micro in range(ACCUMULATION):
            seed = 100 * step + micro
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            loss = loss_of(model, architecture.batch(seed))
            (loss / ACCUMULATION).backward()
            seen += [loss.item(), torch.rand(()).item(), random.random(), numpy.random.rand()]
        seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return seen


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


# Some results are saved on each tier, the rest is recomputed from inputs that are away.
MIXED = Placement("recompute", "nvme", ((0, "host"), (1, "nvme"), (3, "device"), (4, "nvme")))


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch):
    """However small; and "mixed" stands in the place of "host"."""
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)
    monkeypatch.setitem(PLACEMENTS, "host", MIXED)


def outcome_of(model: nn.Module, seen: list[float]) -> Outcome:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return Outcome(seen, {name: tensor.detach().clone() for name, tensor in tensors})


@functools.lru_cache(maxsize=2)  # all kinds of activations in a row
def plain(name: str, reentrant: bool | None = None) -> Outcome:
    model = built(name, reentrant)
    return outcome_of(model, train(model, optimizer_of(model), ARCHITECTURES[name]))


def built(name: str, reentrant: bool | None) -> nn.Module:
    """`reentrant`: with transformers' own gradient checkpointing, of this kind."""
    model = ARCHITECTURES[name].build()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    return model


def with_fuyou(name: str, folder: Path, activations: str, reentrant: bool | None = None, more: int = 0) -> Outcome:
    """Within the smallest budgets (`more` bytes on the device); checks that weights came from NVMe and were never all on
    the device."""
    model, architecture = built(name, reentrant), ARCHITECTURES[name]
    optimizer = optimizer_of(model)
    total = sum(each.numel() * each.itemsize for each in [*model.parameters(), *model.buffers()])
    config = fuyou.Config(activations="host" if activations == "mixed" else activations)

    def wrap(**budgets: int) -> fuyou.Run:
        return fuyou.wrap(model, optimizer, nvme=folder, device="cpu", config=config, **budgets)

    with pytest.raises(fuyou.BudgetError) as short:
        wrap(ram=2**40, gpu=1)
    gpu = short.value.needed_bytes + architecture.lent + more
    with pytest.raises(fuyou.BudgetError) as short:
        wrap(ram=1, gpu=gpu)
    most = 0

    def sample(*_: Any) -> None:
        nonlocal most
        most = max(most, run._ledger.held("device", "weights"))

    with wrap(ram=short.value.needed_bytes, gpu=gpu) as run:
        hook = torch.nn.modules.module.register_module_forward_hook(sample)
        try:
            seen = train(model, run.optimizer, architecture)
        finally:
            hook.remove()
        traffic = run.report().dict()["traffic"]
        assert traffic["nvme_read_bytes_per_step"] > 0 and traffic["nvme_write_bytes_per_step"] > 0
        assert 0 < most < total + architecture.lent + more, (
            f"{most} of {total} bytes of weights were on the device at once"
        )
    return outcome_of(model, seen)


def differences(found: Outcome, expected: Outcome) -> list[str]:
    numbers = [
        f"number {index}: {a!r} is not {b!r}"
        for index, (a, b) in enumerate(zip(found.seen, expected.seen, strict=True))
        if a != b
    ]
    assert found.values.keys() == expected.values.keys()
    return numbers[:3] + [name for name, value in found.values.items() if not torch.equal(value, expected.values[name])]


def check(name: str, folder: Path, activations: str, reentrant: bool | None = None, more: int = 0) -> None:
    expected = plain(name, reentrant)
    different = differences(with_fuyou(name, folder, activations, reentrant, more), expected)
    if different:
        plain.cache_clear()
        again = differences(plain(name, reentrant), expected)
        pytest.fail(f"{name}: {different[:8]}" + (f"; plain PyTorch differs from itself: {again[:8]}" if again else ""))


@pytest.mark.parametrize("activations", ["recompute", "keep", "nvme", "mixed"])
@pytest.mark.parametrize("name", BY_DEFAULT)
def test_one_of_a_kind_as_plain_pytorch(name, activations, nvme):
    check(name, nvme, activations)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["recompute", "keep", "nvme", "mixed"])
@pytest.mark.parametrize("name", [name for name in (*TEXTS, *MEDIA) if name not in BY_DEFAULT])
def test_as_plain_pytorch(name, activations, nvme):
    check(name, nvme, activations)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_with_gradient_checkpointing_of_transformers(name, reentrant, activations, nvme):
    if name != "T5" or reentrant:
        check(name, nvme, activations, reentrant)
        return
    # Its checkpoints stand inside of the blocks, and two blocks take turns in backward while torch holds views of both's
    # weights: with room for one it is refused, never trained on memory that has gone.
    with pytest.raises(fuyou.BudgetError, match="for (en|de)coder.block"):
        check(name, nvme, activations, reentrant)
    check(name, nvme, activations, reentrant, more=2**17)


@pytest.mark.slow
@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_trained_still_cannot(name):
    package, architecture = CANNOT[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here: {name} may train")
    with pytest.raises(ImportError, match=package):
        loss_of(architecture.build(), architecture.batch(0)).backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", UNREPEATABLE)
def test_what_differs_from_itself(name, monkeypatch, nvme):
    """Plain PyTorch twice, then the same with seeds that repeat: fuyou's are plain PyTorch's."""
    first = plain(name)
    plain.cache_clear()
    assert differences(plain(name), first)
    monkeypatch.setattr(torch, "seed", lambda: int(torch.randint(2**31, ())))
    for activations in ("recompute", "keep"):
        plain.cache_clear()
        (nvme / activations).mkdir()
        check(name, nvme / activations, activations)
    plain.cache_clear()


# --- that the architectures have the peculiarities they are there for --------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith("experts without a token")])
def test_some_expert_gets_no_token(name):
    model = built(name, None)
    loss_of(model, ARCHITECTURES[name].batch(0)).backward()
    experts = [each for key, each in model.named_parameters() if "experts" in key]
    idle = [each for each in experts if each.grad is None or (each.grad.flatten(1) == 0).all(1).any()]
    busy = [each for each in experts if each.grad is not None and each.grad.any()]
    assert idle and busy


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "GPT2", "T5"])
def test_some_share_weights(name):
    model = built(name, None)
    assert len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IBert", "MobileViT", "ResNet", "Levit"])
def test_some_change_buffers_in_their_forward(name):
    buffers = {key: each.clone() for key, each in built(name, None).named_buffers()}
    after = plain(name).values
    assert any(not torch.equal(each, after[key]) for key, each in buffers.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bart", "GPT2", "Llama", "Mamba", "T5"])
def test_some_use_a_cache_in_training(name):
    assert built(name, None).config.use_cache
