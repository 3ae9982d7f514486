"""A training whose every step depends on all that a commit must hold, in plain PyTorch or wrapped, whole or in pieces."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from torch import nn

import fuyou

ROWS, BATCH, ACCUMULATION = 24, 4, 2


class Normed(nn.Module):
    """Batch norm (its statistics are buffers), dropout, a tied weight, a frozen one, and a large buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 64)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 192), nn.Dropout(0.2), nn.GELU(), nn.Linear(192, 64)) for _ in range(3)
        )
        self.norm = nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(64, 61, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(5000, dtype=torch.int64))  # more than fits into a record
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens).mean(1)
        for layer in self.layers:
            x = x + layer(x)
        x = self.norm(x) + self.frozen(x)
        if self.training:
            self.seen[tokens.flatten()] += 1
        return nn.functional.cross_entropy(self.head(x).float(), tokens[:, 0])


class Rows:
    """Row numbers in an order of its own, an epoch after the other; fetches the next before it is asked for."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.order = torch.randperm(ROWS, generator=self.generator)
        self.at = 0

    def __next__(self) -> list[int]:
        if self.at == ROWS:
            self.order, self.at = torch.randperm(ROWS, generator=self.generator), 0
        self.at += BATCH
        return self.order[self.at - BATCH : self.at].tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.order, self.at = state["order"], state["at"]


class Loop:
    """`step` returns the loss. Random numbers of Python, numpy and torch go into every batch; the schedule changes the rate
    with every step; the weights of one layer are clamped after it."""

    def __init__(self, precision: str = "fp32") -> None:
        torch.manual_seed(0), random.seed(1), np.random.seed(2)
        self.model = Normed(torch.float32 if precision == "fp32" else torch.bfloat16)
        trained = [each for each in self.model.parameters() if each.requires_grad]
        groups = [
            {"params": [each for each in trained if each.dim() > 1]},
            {"params": [each for each in trained if each.dim() <= 1], "lr": 3e-2, "weight_decay": 0.0},
        ]
        self.passed = torch.optim.AdamW(groups, lr=1e-2, fused=True)
        self.optimizer: Any = self.passed
        self.schedule = models.schedule_of(self.passed)
        self.scheduled = True
        self.rows = Rows()
        self.read: list[list[int]] = []
        self.run: fuyou.Run | None = None

    @contextlib.contextmanager
    def wrapped(self, nvme: Any, ram: str = "1MiB", **config: Any) -> Iterator[fuyou.Run]:
        with fuyou.wrap(
            self.model, self.passed, nvme=nvme, ram=ram, gpu="256MiB", device="cpu", config=fuyou.Config(**config)
        ) as run:
            self.run, self.optimizer = run, run.optimizer
            run.register("schedule", self.schedule)
            run.register("rows", self.rows)
            yield run

    def step(self) -> float:
        total = 0.0
        for _ in range(ACCUMULATION):
            rows = next(self.rows)
            self.read.append(rows)
            noise = random.randrange(7) + int(np.random.randint(5))
            tokens = torch.stack([torch.arange(6) * (row + 1) + noise for row in rows]) % 61
            tokens[torch.rand(tokens.shape) < 0.1] = 0
            loss = self.model(tokens) / ACCUMULATION
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        if self.run is not None:
            self.run.user_state["read"] = self.run.user_state.get("read", 0) + ACCUMULATION
        self.optimizer.step()
        if self.scheduled:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.clamp()
        return total

    def clamp(self) -> None:
        """What the loop changes after its step, and does not mind having changed twice."""
        with torch.no_grad():
            self.model.layers[1][0].weight.clamp_(-0.15, 0.15)

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that a later step depends on, as tensors."""
        found = {name: each.detach().clone() for name, each in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {
                f"{index} {kind}": torch.as_tensor(value).clone() for kind, value in state.items() if kind != "master"
            }
        for index, group in enumerate(self.passed.param_groups):
            found[f"lr {index}"] = torch.tensor(group["lr"], dtype=torch.float64)
        found["rates"] = torch.tensor(self.schedule.get_last_lr(), dtype=torch.float64)
        found["torch"], found["order"] = torch.get_rng_state(), self.rows.order.clone()
        found["numpy"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
        found["python"] = torch.tensor(random.getstate()[1])
        return found


def trainer(clamps: bool) -> Loop:
    """With `clamps` a weight is written after every step, which waits for all updates; without, they go on under what follows."""
    loop = Loop()
    if not clamps:
        loop.clamp = lambda: None  # type: ignore[method-assign]
    return loop


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """What is not bit-equal."""
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


def digest(state: dict[str, torch.Tensor]) -> str:
    whole = hashlib.sha256()
    for name, value in sorted(state.items()):
        whole.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def uninterrupted(
    steps: int, precision: str = "fp32", nvme: Path | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and state of plain PyTorch; in bf16, whose plain loop has other state, of one run that nothing interrupts."""
    loop = Loop(precision)
    if precision == "fp32":
        return loop.steps(steps), loop.state()
    with loop.wrapped(None, ram="64MiB"):
        return loop.steps(steps), loop.state()
