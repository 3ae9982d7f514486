"""Seconds a step: plain PyTorch in RAM against fuyou with everything on NVMe, in interleaved turns of one process.

    python scripts/bench_step.py [--nvme DIR] [--device cpu] [--rounds 3] [--steps 2] [--json FILE]

The model is a Llama-like GPT of 100M parameters, fp32, at 2 x 128 and 16 x 256 tokens a step. Plain: AdamW(fused=True)
and torch's activation checkpointing around every layer. fuyou: the same, wrapped, with a quarter of 12 bytes a parameter
(weights and moments; gradients are 4 more) as its RAM. The two take turns of several steps on the same batches, so that
a slow minute of the machine hits both. A turn is timed from the end of a step to the end of a later one: what is left
for the next forward is paid in it. Medians of the turns are compared. The losses of all steps are compared too: they must
be equal to the bit.

A third turn is plain PyTorch's again, on a model of its own, while another process moves the bytes a second of fuyou's
turn, in the same mix, with next to no processor time: a drive's work takes memory bandwidth, and on a virtual machine the
host's processors, from whoever computes beside it. No schedule can be faster than that.

The drive is measured in the same rounds, for the mix of reads and writes that fuyou's turn had. fuyou's step can be no
shorter than the larger of plain's compute and its bytes over that speed; the target is 1.15 times that (at 16 x 256 the
larger is plain by far: 1.15 times plain).

With --deepspeed-python, the interpreter of an environment with DeepSpeed, ZeRO-3 with its optimizer on NVMe runs the same
model afterwards, once for each of a few settings: its best is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_deepspeed import SETTINGS
from bench_gpt import LAYERS, VOCABULARY, Gpt
from bench_tools import BusyDrive, DriveGauge, Turn, machine, timed_turn, write_json
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("2x128", "16x256")  # rows x tokens a row
STATE_BYTES = 12  # a parameter
TARGET = 1.15


# --- measuring ----------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Side:
    """One side's steps over the batches, and its turns."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, run: Any = None
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._run = run
        self._tokens = iter(())
        self.turns: list[Turn] = []

    def step(self) -> float:
        loss = self._model(next(self._tokens))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        value = loss.item()
        synchronize(self._device)
        return value

    def turn(self, batches: list[torch.Tensor], warmup: int) -> Turn:
        self._tokens = iter(batches)
        self.turns.append(timed_turn(self.step, len(batches) - warmup, self._run, warmup))
        return self.turns[-1]

    @property
    def step_s(self) -> float:
        return statistics.median(turn.step_s for turn in self.turns)

    @property
    def losses(self) -> list[float]:
        return [loss for turn in self.turns for loss in turn.losses]


def bench_shape(rows: int, length: int, args: argparse.Namespace, folder: Path, gauge: DriveGauge) -> dict[str, Any]:
    import fuyou

    device = torch.device(args.device)
    torch.manual_seed(0)
    plain = Gpt(checkpointed=True, layers=args.layers, max_tokens=length)
    wrapped = Gpt(layers=args.layers, max_tokens=length)
    wrapped.load_state_dict(plain.state_dict())
    parameters = sum(parameter.numel() for parameter in plain.parameters())
    plain.to(device)
    passed = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
    config = fuyou.Config(activations="recompute", io=args.io, update=args.update, durability=args.durability)
    ram = args.ram or STATE_BYTES * parameters // 4
    beside = Gpt(checkpointed=True, layers=args.layers, max_tokens=length)
    beside.load_state_dict(plain.state_dict())
    beside.to(device)
    generator = torch.Generator().manual_seed(1)
    speeds, paces = [], []
    with (
        contextlib.closing(BusyDrive(folder.parent)) as busy,
        fuyou.wrap(wrapped, passed, nvme=folder, ram=ram, gpu=args.gpu, device=args.device, config=config) as run,
    ):
        sides = [
            Side(plain, torch.optim.AdamW(plain.parameters(), lr=1e-4, fused=True), device),
            Side(run.model, run.optimizer, device, run),
            Side(beside, torch.optim.AdamW(beside.parameters(), lr=1e-4, fused=True), device),
        ]
        for _ in range(args.rounds):
            shape = (args.warmup + args.steps, rows, length)
            batches = list(torch.randint(0, VOCABULARY, shape, generator=generator).to(device))
            for side in sides[:2]:
                turn = side.turn(batches, args.warmup)
            moved = turn.read_bytes + turn.write_bytes
            share = turn.read_bytes / max(1, moved)
            speeds.append(gauge.bytes_per_s(share))
            busy.start(share, max(1, moved) / turn.seconds)
            sides[2].turn(batches, args.warmup)
            paces.append(busy.stop())
        report = run.report().dict()
    plain_s, fuyou_s, beside_s = (side.step_s for side in sides)
    read, write = (
        statistics.median(getattr(turn, name) / turn.steps for turn in sides[1].turns)
        for name in ("read_bytes", "write_bytes")
    )
    drive_s = (read + write) / statistics.median(speeds)
    return {
        "rows": rows,
        "tokens_per_row": length,
        "parameters": parameters,
        "plain_s": plain_s,
        "fuyou_s": fuyou_s,
        "ratio": fuyou_s / plain_s,
        "plain_with_busy_drive_s": beside_s,
        "busy_drive_bytes_per_s": statistics.median(paces),
        "ratio_to_plain_with_busy_drive": fuyou_s / beside_s,
        "nvme_read_bytes": read,
        "nvme_write_bytes": write,
        "drive_bytes_per_s": statistics.median(speeds),
        "drive_s": drive_s,
        "ratio_to_bound": fuyou_s / max(plain_s, drive_s),
        "turns_s": {
            name: [turn.step_s for turn in side.turns]
            for name, side in zip(("plain", "fuyou", "plain_with_busy_drive"), sides, strict=True)
        },
        "losses_equal": sides[0].losses == sides[1].losses == sides[2].losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(sides[0].losses, sides[1].losses, strict=True)),
        "traffic": report.get("traffic"),
        "stalled_share": stalled_share(report),
        "tiers": report.get("tiers"),
    }


def stalled_share(report: dict[str, Any]) -> dict[str, float] | None:
    """Cause → share of the steps' seconds (without the first) spent waiting on it; None where the report does not say."""
    measured = [step for step in report.get("steps") or [] if step.get("seconds")][1:]
    if not any("stalls" in step for step in measured):
        return None
    total = sum(step["seconds"] for step in measured)
    causes = sorted({cause for step in measured for cause in step.get("stalls") or {}})
    return {cause: sum((step.get("stalls") or {}).get(cause, 0.0) for step in measured) / total for cause in causes}


def bench_deepspeed(rows: int, length: int, args: argparse.Namespace, nvme: Path) -> dict[str, Any]:
    """Every setting in a process of its own: {"settings": [...], "best": the one with the fewest seconds a step}."""
    found: list[dict[str, Any]] = []
    for setting in SETTINGS:
        command = [
            args.deepspeed_python, str(Path(__file__).with_name("bench_deepspeed.py")), "--nvme", str(nvme),
            "--rows", str(rows), "--length", str(length), "--layers", str(args.layers), "--steps", str(args.steps),
            "--setting", json.dumps(setting),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            found.append({"setting": setting, "problem": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]})
            continue
        result = json.loads(done.stdout.strip().splitlines()[-1])
        found.append({"setting": setting, "step_s": statistics.median(result["steps_s"]), **result})
    worked = [each for each in found if "step_s" in each]
    return {"settings": found, "best": min(worked, key=lambda each: each["step_s"]) if worked else None}


# --- printing -----------------------------------------------------------------------------------------------------


def print_result(result: dict[str, Any]) -> None:
    moved = result["nvme_read_bytes"] + result["nvme_write_bytes"]
    print(
        f"\n{result['rows']} x {result['tokens_per_row']} tokens, {result['parameters'] / 1e6:.1f}M parameters, fp32\n"
        f"  plain PyTorch in RAM     {result['plain_s']:9.3f} s a step (median of {len(result['turns_s']['plain'])} turns)\n"
        f"  fuyou                    {result['fuyou_s']:9.3f} s a step\n"
        f"  plain, the drive busy    {result['plain_with_busy_drive_s']:9.3f} s a step, another process moving "
        f"{result['busy_drive_bytes_per_s'] / 1e9:.2f} GB/s\n"
        f"  NVMe read, written       {result['nvme_read_bytes'] / 1e6:9.1f} MB, {result['nvme_write_bytes'] / 1e6:.1f} MB a step\n"
        f"  the drive alone          {result['drive_s']:9.3f} s for these {moved / 1e6:.1f} MB, "
        f"at {result['drive_bytes_per_s'] / 1e9:.2f} GB/s\n"
        f"  to plain PyTorch         {result['ratio']:9.2f}; with the drive busy {result['ratio_to_plain_with_busy_drive']:.2f}\n"
        f"  to the larger of both    {result['ratio_to_bound']:9.2f} (target {TARGET})"
    )
    if result["losses_equal"]:
        print("  losses                   equal to the bit")
    else:
        print(f"  losses                   DIFFER by up to {result['largest_loss_difference']:.3g}")
    for name, count in (result["traffic"] or {}).items():
        if name in ("host_to_device_bytes_per_step", "device_to_host_bytes_per_step"):
            label = name.removesuffix("_bytes_per_step").replace("_", " ")
            print(f"  {label:<24} {count / 1e6:9.1f} MB a step")
    host = result["tiers"]["host"]
    print(
        f"  host memory              {host['peak_bytes'] / 1e6:9.1f} MB at peak of {host['budget_bytes'] / 1e6:.1f} MB"
    )
    for cause, share in (result["stalled_share"] or {}).items():
        if share:
            print(f"  {'waiting: ' + cause:<24} {100 * share:9.1f} % of the step")


def print_deepspeed(found: dict[str, Any]) -> None:
    for each in found["settings"]:
        words = ", ".join(f"{key} {value}" for key, value in each["setting"].items())
        if "step_s" in each:
            peak = f"{each['peak_rss_bytes'] / 1e9:.2f} GB resident at peak"
            best = "  <- best" if each is found["best"] else ""
            print(f"  DeepSpeed {each['version']} ZeRO-3  {each['step_s']:9.3f} s a step, {peak} ({words}){best}")
        else:
            print(f"  DeepSpeed ({words}): {each['problem']}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a turn (default 2)")
    parser.add_argument("--warmup", type=int, default=2, help="steps at its beginning that are left out (default 2)")
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="ROWSxTOKENS", help=f"(default {' '.join(SHAPES)})"
    )
    parser.add_argument("--nvme", metavar="DIR", help="folder on the drive to measure (default runs/ of the checkout)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--ram", help="host budget (default: a quarter of 12 bytes a parameter)")
    parser.add_argument("--gpu", default="4GiB", help="device budget (default 4GiB: ample)")
    parser.add_argument("--io", default="auto", help="I/O backend (default auto)")
    parser.add_argument("--update", choices=("step", "deferred", "speculative", "auto"), default="auto")
    parser.add_argument("--durability", choices=("step", "checkpoint"), help="(default: fuyou's)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"layers of 7.1M parameters (default {LAYERS})")
    parser.add_argument("--deepspeed-python", metavar="PYTHON", help="interpreter of an environment with DeepSpeed")
    parser.add_argument("--json", "--out", metavar="FILE", help="write the results there")
    parser.add_argument("--machine", metavar="FILE", help="write the machine's description there and stop")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.layers) < 1 or args.warmup < 0:
        parser.error("--rounds, --steps and --layers must be at least 1, --warmup at least 0")
    try:
        args.sizes = [tuple(int(each) for each in shape.split("x", 1)) for shape in args.shapes]
    except ValueError:
        parser.error(f"--shapes {' '.join(args.shapes)}: each must be like {SHAPES[0]}")
    if args.device.startswith("cuda") and not torch.cuda.is_available() and not args.machine:
        parser.error(f"--device {args.device}: torch sees no CUDA device")
    return args


def has_deepspeed(python: str | None) -> bool:
    """Whether `import deepspeed` works in that interpreter; says so where one was named and it does not."""
    if not python:
        return False
    try:
        done = subprocess.run([python, "-c", "import deepspeed"], capture_output=True, text=True)
    except OSError as error:
        print(f"no comparison with DeepSpeed: {python} cannot be run: {error}")
        return False
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        print(f"no comparison with DeepSpeed: {python} cannot import it: {why}")
    return done.returncode == 0


def main() -> int:
    args = arguments()
    if args.machine:
        Path(args.machine).write_text(json.dumps(machine(), indent=2) + "\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no gigabytes in the folder
    nvme = Path(args.nvme) if args.nvme else ROOT / "runs"
    nvme.mkdir(parents=True, exist_ok=True)
    described = machine(nvme)
    print(", ".join(str(described[key]) for key in ("cpu", "cores", "gpu", "torch") if described[key]))
    deepspeed = has_deepspeed(args.deepspeed_python)
    results = []
    for rows, length in args.sizes:
        gauge = DriveGauge(nvme)
        try:
            with tempfile.TemporaryDirectory(prefix="bench-step-", dir=nvme) as folder:
                gauge.share_tuning(folder)
                results.append(bench_shape(rows, length, args, Path(folder), gauge))
        finally:
            gauge.close()
        print_result(results[-1])
        if deepspeed:
            results[-1]["deepspeed"] = bench_deepspeed(rows, length, args, nvme)
            print_deepspeed(results[-1]["deepspeed"])
        sys.stdout.flush()
    write_json(args.json, described, args, results=results)
    return 0 if all(result["losses_equal"] for result in results) or args.device != "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
