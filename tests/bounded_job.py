"""A 100M-parameter model trained within budgets, in a process of its own: prints what the kernel says it held.

Run by test_bounded.py. `peak_bytes` is the sum of high-water marks of this process and its children from the end of
`wrap` on, `limit_bytes` what the promise allows.
"""

import json
import os
import sys
import threading
from pathlib import Path

import psutil
import torch
from torch import nn

import fuyou

SLACK = 1.05


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process and its children, in bytes."""
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                total += int(line.split()[1]) * 1024
    return total


def train(model: nn.Module, optimizer: torch.optim.Optimizer, vocabulary: int, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        for _ in range(2):
            loss = model(torch.randint(0, vocabulary, (1, 64))) / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def main(nvme: str, vocabulary: int, width: int, layers: int, steps: int) -> None:
    tiny = Model(64, 32, 1, 2)
    train(tiny, torch.optim.AdamW(tiny.parameters(), fused=True), 64, 1)
    del tiny
    baseline = memory("VmRSS")
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    torch.manual_seed(0)
    model = Model(vocabulary, width, layers, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    children = [model.embed, model.norm, model.head, *model.layers]
    largest = max(sum(4 * parameter.numel() for parameter in child.parameters()) for child in children)
    ram, gpu = 256 * 2**20, 3 * largest + 128 * 2**20
    run = fuyou.wrap(model, optimizer, nvme=nvme, ram=ram, gpu=gpu, device="cpu")
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    losses = train(model, run.optimizer, vocabulary, steps)
    peak = memory("VmHWM")
    tiers = run.report().dict()["tiers"]
    run.close()
    print(json.dumps({
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
        "peak_bytes": peak,
        "limit_bytes": int(baseline + SLACK * (ram + gpu)),
        "baseline_bytes": baseline,
        "tiers": tiers,
        "held_after_close": {tier: run._ledger.held(tier) for tier in tiers},
        "leases_after_close": run._tiers.lease_count,
        "files": [files, len(os.listdir("/proc/self/fd"))],
        "threads": [threads, threading.active_count()],
        "left_in_nvme": os.listdir(nvme),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], *(int(each) for each in sys.argv[2:]))
