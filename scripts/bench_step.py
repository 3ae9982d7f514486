"""Seconds a step: plain PyTorch in RAM against fuyou with everything on NVMe, interleaved in one process.

    python scripts/bench_step.py [--nvme DIR] [--device cpu] [--steps 5] [--json FILE]

The model is a Llama-like GPT of 100M parameters, fp32, at 2 x 128 and 16 x 256 tokens a step. Plain: AdamW(fused=True)
and torch's activation checkpointing around every layer. fuyou: the same, wrapped, with so little RAM that nothing is
cached. The two take turns step by step on the same batches, so that a slow minute of the machine hits both; warm-up is
left out and medians are compared. Their losses are compared too: they must be equal to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ((2, 128), (16, 256))  # rows, tokens a row
VOCABULARY, WIDTH, HIDDEN, HEADS, LAYERS = 10_240, 768, 2_048, 12, 12


# --- the model: 12 layers of 7.1M, embedding and head of 7.9M each: 100.7M parameters ------------------------------


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = RmsNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = RmsNorm(width)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape  # (B, T, D)
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, d))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # (B, T, hidden)
        return x + self.down(F.silu(gate) * up)


class Gpt(nn.Module):
    """`checkpointed` applies torch's activation checkpointing to every layer, which is what fuyou does by itself."""

    def __init__(self, checkpointed: bool = False, *, layers: int = LAYERS, max_tokens: int = 256) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(max_tokens, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH, HIDDEN, HEADS) for _ in range(layers))
        self.norm = RmsNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each row's next token. tokens: (B, T) int64."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


# --- measuring ----------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, settle: Callable[[], None] | None = None
) -> tuple[float, float]:
    """One step of training → (seconds, loss). `settle` waits for what the step left under way: it is the step's own
    time, and must not run under the other's turn."""
    synchronize(tokens.device)
    start = time.perf_counter()
    loss = model(tokens)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    if settle is not None:
        settle()
    synchronize(tokens.device)
    return time.perf_counter() - start, value


def bench_shape(rows: int, length: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import fuyou

    device = torch.device(args.device)
    torch.manual_seed(0)
    plain = Gpt(checkpointed=True, layers=args.layers, max_tokens=length)
    wrapped = Gpt(layers=args.layers, max_tokens=length)
    wrapped.load_state_dict(plain.state_dict())
    plain.to(device)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True)
    passed = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {"plain": [], "fuyou": []}
    losses: dict[str, list[float]] = {"plain": [], "fuyou": []}
    config = fuyou.Config(activations="recompute", io=args.io)
    with fuyou.wrap(
        wrapped, passed, nvme=str(folder), ram=args.ram, gpu=args.gpu, device=args.device, config=config
    ) as run:
        turns: list[tuple[str, Callable[[torch.Tensor], tuple[float, float]]]] = [
            ("plain", lambda tokens: timed_step(plain, plain_optimizer, tokens)),
            ("fuyou", lambda tokens: timed_step(run.model, run.optimizer, tokens, run.settle)),
        ]
        for _ in range(args.warmup + args.steps):
            tokens = torch.randint(0, VOCABULARY, (rows, length), generator=generator).to(device)
            for name, turn in turns:
                step_seconds, loss = turn(tokens)
                seconds[name].append(step_seconds)
                losses[name].append(loss)
        report = run.report().dict()
    return {
        "rows": rows,
        "tokens_per_row": length,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
        "plain_s": statistics.median(seconds["plain"][args.warmup :]),
        "fuyou_s": statistics.median(seconds["fuyou"][args.warmup :]),
        "ratio": statistics.median(seconds["fuyou"][args.warmup :])
        / statistics.median(seconds["plain"][args.warmup :]),
        "steps_s": {name: values[args.warmup :] for name, values in seconds.items()},
        "losses_equal": losses["plain"] == losses["fuyou"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["plain"], losses["fuyou"], strict=True)),
        "traffic": report.get("traffic"),
        "stalled_share": stalled_share(report, args.steps),
        "tiers": report.get("tiers"),
    }


def stalled_share(report: dict[str, Any], steps: int) -> dict[str, float] | None:
    """Cause → share of the last `steps` steps' seconds spent waiting on it; None where the report does not say."""
    measured = [step for step in report.get("steps") or [] if step.get("seconds")][-steps:]
    if not measured or not any("stalls" in step for step in measured):
        return None
    total = sum(step["seconds"] for step in measured)
    causes = sorted({cause for step in measured for cause in step.get("stalls") or {}})
    return {cause: sum((step.get("stalls") or {}).get(cause, 0.0) for step in measured) / total for cause in causes}


def machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers; names of hardware and versions only."""
    import psutil

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["driver"] = nvidia_driver()
    return found


def nvidia_driver() -> str | None:
    import subprocess

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


# --- printing -----------------------------------------------------------------------------------------------------


def print_result(result: dict[str, Any]) -> None:
    print(
        f"\n{result['rows']} x {result['tokens_per_row']} tokens, {result['parameters'] / 1e6:.1f}M parameters, fp32\n"
        f"  plain PyTorch in RAM     {result['plain_s']:9.3f} s a step (median)\n"
        f"  fuyou, all on NVMe       {result['fuyou_s']:9.3f} s a step (median)\n"
        f"  ratio                    {result['ratio']:9.2f}"
    )
    if result["losses_equal"]:
        print("  losses                   equal to the bit")
    else:
        print(f"  losses                   DIFFER by up to {result['largest_loss_difference']:.3g}")
    traffic = result["traffic"]
    if not traffic:
        print("  bytes moved a step       not in this report")
    for name, count in (traffic or {}).items():
        if name.endswith("_per_step"):
            label = name.removesuffix("_bytes_per_step").replace("_", " ")
            print(f"  {label:<24} {count / 1e6:9.1f} MB a step")
    cached = ((result["tiers"] or {}).get("host") or {}).get("by_category") or {}
    kept = sum(cached.get(category, 0) for category in ("weights", "gradients", "optimizer"))
    print(f"  {'of that state in RAM':<24} {kept / 1e6:9.1f} MB at peak")
    shares = result["stalled_share"]
    if shares is None:
        print("  waiting                  not in this report")
    elif not any(shares.values()):
        print("  waiting                  on nothing")
    for cause, share in (shares or {}).items():
        if share:
            print(f"  {'waiting: ' + cause:<24} {100 * share:9.1f} % of the step")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each (default 5)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each that are left out (default 2)")
    parser.add_argument("--nvme", metavar="DIR", help="folder on the drive to measure (default runs/ of the checkout)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--ram", default="64MiB", help="host budget (default 64MiB: 2 % of the state is cached, and printed)"
    )
    parser.add_argument("--gpu", default="4GiB", help="device budget (default 4GiB: ample)")
    parser.add_argument("--io", default="auto", help="I/O backend (default auto)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of 7.1M parameters (default {LAYERS})")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--machine", metavar="FILE", help="write the machine's description there and stop")
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 0 or args.layers < 1:
        parser.error("--steps and --layers must be at least 1, --warmup at least 0")
    if args.machine:
        Path(args.machine).write_text(json.dumps(machine(), indent=2) + "\n")
        return 0
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no gigabytes in the folder
    nvme = Path(args.nvme) if args.nvme else ROOT / "runs"
    nvme.mkdir(parents=True, exist_ok=True)
    described = machine()
    print(", ".join(str(described[key]) for key in ("cpu", "cores", "gpu", "torch") if described[key]))
    print(f"device {args.device}, ram {args.ram}, gpu {args.gpu}, {args.steps} steps after {args.warmup} of warm-up")
    results = []
    for rows, length in SHAPES:
        with tempfile.TemporaryDirectory(prefix="bench-step-", dir=nvme) as folder:
            results.append(bench_shape(rows, length, args, Path(folder)))
        print_result(results[-1])
        sys.stdout.flush()
    if args.json:
        options = {key: getattr(args, key) for key in ("device", "ram", "gpu", "io", "steps", "warmup", "layers")}
        Path(args.json).write_text(
            json.dumps({"machine": described, "options": options, "results": results}, indent=2) + "\n"
        )
    return 0 if all(result["losses_equal"] for result in results) or args.device != "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
