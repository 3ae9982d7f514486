"""Training on a CUDA device: exact against its definition, within the device budget, and every byte given back.

The oracle is DESIGN's definition for CUDA in plain PyTorch: forward and backward on the device, gradients summed there,
the update on CPU copies by AdamW(fused=True), the result copied back. The same tests run with device="cpu" too, where
that definition is plain training: so that this file is never stale on a machine without a GPU.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts: deterministic matrix products

import fuyou

MIB = 1 << 20
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ],
)
DEVICES = ["cpu", CUDA]
VOCABULARY, STEPS, ACCUMULATION = 96, 6, 2
WORKSPACE_BYTES = 64 * MIB  # of cuBLAS, which torch's allocator holds for the life of the process


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


# --- models -------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)  # (B, T, D)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask, dim=-1)  # (B, T, T)
        x = x + self.out(weights @ v)
        return x + self.dropout(self.mlp(x))


class Gpt(nn.Module):
    """Tied head, dropout, a frozen parameter and one with an odd number of elements."""

    def __init__(self, width: int = 32, layers: int = 3, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.scale = nn.Parameter(torch.ones(1, 1, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.odd = nn.Parameter(torch.zeros(1237))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) * self.scale
        for layer in self.layers:
            x = layer(x)
        x = self.frozen(x) + self.odd.mean()
        logits = self.head(x)  # (B, T, V)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def own_gpt() -> nn.Module:
    return Gpt()


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the Llama class is that of transformers (extra [hf])")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )

    class LossOnly(transformers.LlamaForCausalLM):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids=tokens, labels=tokens).loss

    return LossOnly(config)


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: str,
    nvme: Path | None,
    gpu: str = "1GiB",
    debug_races: int | None = None,
) -> fuyou.Run:
    """With a drive: in as little RAM as works, so that nearly everything lies on the drive. Without: all in RAM."""
    config = fuyou.Config(debug_races=debug_races)
    if nvme is None:
        return fuyou.wrap(model, optimizer, ram="256MiB", gpu=gpu, device=device, config=config)
    with pytest.raises(fuyou.BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme=nvme, ram=1, gpu=gpu, device=device)
    ram = refused.value.needed_bytes
    assert refused.value.tier == "host"
    return fuyou.wrap(model, optimizer, nvme=nvme, ram=ram, gpu=gpu, device=device, config=config)


MODELS: dict[str, Callable[[], nn.Module]] = {"own gpt": own_gpt, "llama": tiny_llama}


def batches(device: str, rows: int = 2, length: int = 9) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = STEPS * ACCUMULATION
    return [torch.randint(0, VOCABULARY, (rows, length), generator=generator).to(device) for _ in range(count)]


def two_groups(named: list[tuple[str, nn.Parameter]]) -> list[dict]:
    decay = [parameter for _, parameter in named if parameter.dim() > 1]
    rest = [parameter for _, parameter in named if parameter.dim() <= 1]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 3e-3}]


# --- the oracle ---------------------------------------------------------------------------------------------------


def plain_training(
    model: nn.Module, device: str, dtype: torch.dtype
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, compute copies and master weights after training by the definition."""
    model.to(device=device, dtype=dtype)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    masters = {name: nn.Parameter(parameter.detach().cpu().float().clone()) for name, parameter in named}
    optimizer = torch.optim.AdamW(two_groups(list(masters.items())), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    data = iter(batches(device))
    for _ in range(STEPS):
        for _ in range(ACCUMULATION):
            loss = model(next(data)) / ACCUMULATION
            loss.backward()
            losses.append(loss.item())
        for name, parameter in named:
            masters[name].grad = parameter.grad.cpu().float()
            parameter.grad = None
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, parameter in named:
                parameter.copy_(masters[name].to(dtype))
    copies = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    return losses, copies, {name: master.detach() for name, master in masters.items()}


# (family, dtype, tier, seed of the debug switch for races)
WAYS = [*itertools.product(MODELS, ("float32", "bfloat16"), ("nvme", "ram"), (None,))]
WAYS += [("own gpt", dtype, tier, seed) for seed, (_, dtype, tier, _) in enumerate(WAYS[:4])]


@pytest.mark.parametrize(("family", "dtype_name", "tier", "debug_races"), WAYS)
@pytest.mark.parametrize("device", DEVICES)
def test_training_is_bit_equal_to_its_definition(
    device: str, family: str, dtype_name: str, tier: str, debug_races: int | None, nvme: Path
) -> None:
    dtype = getattr(torch, dtype_name)
    torch.manual_seed(0)
    reference = MODELS[family]()
    torch.manual_seed(0)
    model = MODELS[family]().to(dtype)
    torch.manual_seed(7)  # dropout
    losses, copies, masters = plain_training(reference, device, dtype)

    torch.manual_seed(7)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(two_groups(trained), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    got = []
    with wrap(model, optimizer, device, nvme if tier == "nvme" else None, debug_races=debug_races) as run:
        data = iter(batches(device))
        for _ in range(STEPS):
            for _ in range(ACCUMULATION):
                loss = run.model(next(data)) / ACCUMULATION
                loss.backward()
                got.append(loss.item())
            run.optimizer.step()
            schedule.step()
            run.optimizer.zero_grad()
        assert got == losses
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.detach().cpu(), copies[name]), name
        if dtype is torch.bfloat16:
            for parameter, state in run.optimizer.state.items():
                name = names[id(parameter)]
                assert torch.equal(state["master"].cpu(), masters[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_clipping_on_handles_follows_plain_pytorch(device: str, nvme: Path) -> None:
    torch.manual_seed(0)
    reference, model = Gpt(), Gpt()
    model.load_state_dict(reference.state_dict())
    reference.to(device)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=True)
    passed = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for each in (reference, model):
        each.eval()  # no dropout: one random state serves both loops
    with wrap(model, passed, device, nvme) as run:
        for tokens in batches(device)[:4]:
            reference(tokens).backward()
            expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            plain.step()
            plain.zero_grad()
            model(tokens).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            run.optimizer.step()
            run.optimizer.zero_grad()
            assert float(norm) == pytest.approx(float(expected), rel=1e-4)
        for (name, a), b in zip(reference.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(b.detach().cpu(), a.detach().cpu(), rtol=2e-3, atol=2e-5, msg=name)


# --- memory, on a GPU only ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_device_memory_stays_within_the_budget_and_is_given_back(nvme: Path) -> None:
    """Weights of 673 MiB (and 1,346 MiB of moments) trained within 512 MiB of device memory."""
    torch.manual_seed(0)
    warm = torch.randn(256, 256, device="cuda")
    (warm @ warm).sum().item()  # the context, and cuBLAS's workspace
    del warm
    model = Gpt(width=768, layers=24, vocabulary=8192)
    weights_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    budget = 512 * MIB
    assert budget < weights_bytes
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="1GiB", gpu=budget, device="cuda") as run:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            for _ in range(ACCUMULATION):
                tokens = torch.randint(0, 8192, (2, 64), device="cuda")
                run.model(tokens).backward()
            torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.settle()
        peak = torch.cuda.max_memory_allocated() - before
        reserved = torch.cuda.max_memory_reserved()
        report = run.report().dict()
    assert peak <= budget, f"{peak / MIB:.0f} MiB allocated (reserved {reserved / MIB:.0f}) of {budget / MIB:.0f} MiB"
    device_tier = report["tiers"]["device"]
    assert device_tier["budget_bytes"] == budget
    assert 0 < device_tier["peak_bytes"] <= budget
    del tokens
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + WORKSPACE_BYTES
    for parameter in model.parameters():  # ordinary again, where they came from
        assert parameter.device.type == "cpu" and torch.isfinite(parameter).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_second_wrap_after_close_trains_on(nvme: Path) -> None:
    model = Gpt()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, fused=True)
    losses = []
    for _ in range(2):
        with wrap(model, optimizer, "cuda", nvme) as run:
            for tokens in batches("cuda")[:6]:
                loss = run.model(tokens)
                loss.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
                losses.append(loss.item())
    assert all(loss == loss for loss in losses) and losses[-1] < losses[0]
