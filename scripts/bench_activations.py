"""Where activations should go: "auto" against every fixed mode, over compute speeds, drive speeds and budgets.

    python scripts/bench_activations.py FOLDER [--only grid|pipeline|predicted] [--rounds 5] [--steps 2] [--json FILE]

The model's blocks sleep instead of computing (time.sleep releases the GIL, as a GPU would) and save real bytes for their
backward, which looks at samples of them. Four processes train it under the fixed modes and one under "auto"; they take
turns of a few steps, and the medians of the turns are compared. A mode that the device's budget cannot hold is left out of
its row. A slower drive is this one behind a gate that lets so many bytes a second through.

The control of a row is the sleeping model without fuyou, and the drive alone, before every round: where one of the two
moved by more than 10 % (its best and worst turn left out) the row is run once more, and both are printed.

"pipeline": compute takes twice as long as the swapped bytes at the drive's measured speed; what does swapping them cost
over keeping them? The target is 5 %. Twice: with blocks that save 12 MiB, and with half as many that save 24 MiB. What a block
costs in Python is the same for both, and a layer of a model that needs swapping saves hundreds.

"predicted": a real model, at batches and places of its state. A run under "auto" says what it expects of every mode, in seconds
and in peak bytes a tier; a run under each mode says what it took: medians of its turns, of seconds and of each turn's own
peaks (warm-up left out of both), and beside them the peak over the whole run where that differs by more than 1 %.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from bench_gpt import VOCABULARY, Gpt
from bench_sleeper import Remote
from bench_tools import MIB, DriveGauge, Turn, machine, timed_turn, write_json
from torch import Tensor, nn

MODES = ("keep", "recompute", "host", "nvme", "auto")
BLOCKS, SAVED_BYTES = 24, 12 * MIB
SAMPLE_FLOATS = 16 * 1024  # one in so many is written and looked at, by the core that a GPU would leave free
FORWARD_S = (0.002, 0.008)  # of a block; its backward takes twice that
DRIVES = (None, 0.7e9)  # bytes a second; None: as fast as it is
# Blocks whose activations the device holds beside what a step needs anyway, and host memory. 288 MiB are saved in all.
BUDGETS = {"tight": (3, 256 * MIB), "half": (11, 256 * MIB), "all": (24, 384 * MIB)}
PIPELINES = ((24, 12 * MIB), (12, 24 * MIB))  # (blocks, bytes each saves); glibc maps more than 32 MiB anew
WORKING_BYTES = 100 * MIB  # what fuyou insists on, and slots
SETTLING_STEPS = 22  # of "auto", until it has tried what it wants to try
PREDICTING_STEPS = 7  # until it has said what it expects
REAL_LAYERS = 8
# (rows, tokens, where the state is, bytes of the device): where all can be kept nothing else is predicted.
REAL_SETTINGS = (
    (4, 128, "on the drives", 2 << 30),
    (8, 128, "on the drives", 2 << 30),
    (8, 128, "on the drives", 560 * MIB),
    (8, 128, "in host memory", 560 * MIB),
    (4, 256, "on the drives", 600 * MIB),
)
REAL_PLACES: dict[str, dict[str, Any]] = {
    "on the drives": {"ram": 320 * MIB},
    "in host memory": {"ram": 3 << 30, "with_nvme": False},
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
TARGET, PIPELINE_TARGET, CONTROL = 1.07, 1.05, 0.10


# --- the model --------------------------------------------------------------------------------------------------------


class _Work(torch.autograd.Function):
    """x + a number of the weights, after a sleep; saves `nbytes` whose value depends on x, and checks them in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, nbytes: int, forward_s: list[float]) -> Tensor:
        time.sleep(forward_s[0])
        # Numpy's memory, for torch's on a CPU comes anew each time, page by page and cleared: see `keep_the_heap`.
        memory = numpy.empty(nbytes // 4, numpy.float32)
        memory[::SAMPLE_FLOATS] = float(
            x.view(-1)[0]
        )  # every page is written, by one core: a GPU would take none of them
        ctx.save_for_backward(torch.from_numpy(memory), weight)
        ctx.forward_s, ctx.expected = forward_s, float(x.view(-1)[0])
        return x + weight.view(-1)[0]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        saved, weight = ctx.saved_tensors
        if not (saved.numpy()[::SAMPLE_FLOATS] == ctx.expected).all():
            raise SystemExit("An activation came back changed.")
        time.sleep(2 * ctx.forward_s[0])
        return gradient, torch.full_like(weight, 1e-3), None, None


class Block(nn.Module):
    def __init__(self, nbytes: int, forward_s: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(64, 64))
        self._nbytes, self._forward_s = nbytes, forward_s

    def forward(self, x: Tensor) -> Tensor:
        return _Work.apply(x, self.weight, self._nbytes, self._forward_s)


class Model(nn.Module):
    def __init__(self, blocks: int, nbytes: int, forward_s: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.forward_s = [forward_s]
        self.layers = nn.ModuleList(Block(nbytes, self.forward_s) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sum()


def step_of(model: nn.Module, optimizer: Any, batch: Tensor) -> float:
    loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# --- who trains it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """`drive`: bytes a second that its gate lets through, or None. `device_blocks`: see BUDGETS. `mode` "plain": torch alone."""

    mode: str
    folder: str
    ram: int
    device_blocks: int
    forward_s: float
    drive: float | None = None
    blocks: int = BLOCKS
    nbytes: int = SAVED_BYTES

    @property
    def gpu(self) -> int:
        """Bytes of the device budget."""
        return WORKING_BYTES + self.device_blocks * self.nbytes


@dataclass(frozen=True)
class RealSetup:
    """`folder`: None keeps the state in host memory. Bytes."""

    mode: str
    folder: str | None
    ram: int
    gpu: int
    rows: int
    tokens: int
    drive: float | None = None


class Contestant:
    """What a process of a row does: makes its model, and steps when it is told."""

    def __init__(self, setup: Setup | RealSetup) -> None:
        if isinstance(setup, RealSetup):
            torch.manual_seed(0)
            model: nn.Module = Gpt(layers=REAL_LAYERS)
            self._batch = torch.randint(VOCABULARY, (setup.rows, setup.tokens))
        else:
            keep_the_heap()
            model = Model(setup.blocks, setup.nbytes, setup.forward_s)
            self._batch = torch.zeros(1024)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        self.run: Any = None
        self._marks: dict[str, Any] = {}  # tier → its watermark
        self._peaks: dict[str, list[int]] = {}  # tier → each turn's
        if setup.mode != "plain":
            import fuyou

            if setup.drive is not None:
                put_behind_a_gate(setup.drive)
            config = fuyou.Config(activations=setup.mode)
            self.run = fuyou.wrap(
                model, optimizer, nvme=setup.folder, ram=setup.ram, gpu=setup.gpu, device="cpu", config=config
            )
            optimizer = self.run.optimizer
            self._marks = {tier: self.run._ledger.watermark(tier) for tier in ("device", "host", "nvme")}
            self._peaks = {tier: [] for tier in self._marks}
        self._model, self._optimizer = model, optimizer

    def turn(self, steps: int, warmup: int) -> Turn | str:
        """The turn, or why it cannot be."""
        from fuyou import BudgetError

        def step() -> float:
            nonlocal warmup
            if not warmup:  # the turn begins here
                for mark in self._marks.values():
                    mark.take()
            warmup -= 1
            return step_of(self._model, self._optimizer, self._batch)

        try:
            turn = timed_turn(step, steps, self.run, warmup)
        except BudgetError as error:
            return f"over budget by {error.shortfall_bytes} bytes"
        for tier, mark in self._marks.items():
            reserve = self.run.report().dict()["tiers"][tier]["reserve_bytes"]
            self._peaks[tier].append(mark.take() + reserve)
        return turn

    def summary(self) -> dict[str, Any]:
        if self.run is None:
            return {}
        report = self.run.report().dict()
        peaks = {tier: (its["peak_bytes"], its["budget_bytes"]) for tier, its in report["tiers"].items()}
        of_turns = {tier: statistics.median(its) for tier, its in self._peaks.items() if its}
        return {"plan": report["plan"], "peaks": peaks, "peaks_of_turns": self._peaks, "median_peaks": of_turns}

    def close(self) -> None:
        if self.run is not None:
            self.run.close()


def keep_the_heap() -> None:
    """glibc hands a freed range on to the next of its size, as CUDA's caching allocator does, and returns none to the system by
    itself: the sleeping model stands for a GPU, whose memory is not cleared page by page."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(M_TRIM_THRESHOLD, 1024 * MIB)


def put_behind_a_gate(bytes_per_s: float) -> None:
    """Every engine that a run of this process opens lets so many bytes a second through, reads and writes together."""
    from fuyou.runtime import tiers
    from fuyou.tiers.io.late import LateEngine

    class Gate:
        """Stands where LateEngine expects delays, and makes none."""

        def delay(self) -> None: ...

    class Gated(LateEngine):
        free_at, lock = 0.0, threading.Lock()

        def _run(self, op: Any) -> Any:
            failure = super()._run(op)
            with Gated.lock:
                Gated.free_at = max(Gated.free_at, time.perf_counter() - 0.005) + op.nbytes / bytes_per_s
                until = Gated.free_at
            time.sleep(max(0.0, until - time.perf_counter()))
            return failure

    opened = tiers.open_for_drive
    tiers.open_for_drive = lambda *args, **kwargs: Gated(opened(*args, **kwargs), Gate())  # type: ignore[assignment,arg-type]


# --- a row ------------------------------------------------------------------------------------------------------------


def run_row(
    folder: str,
    base: dict[str, Any],
    modes: tuple[str, ...],
    rounds: int,
    steps: int,
    gauge: DriveGauge,
    kind: Any = Setup,
    settling: int = SETTLING_STEPS,
) -> dict:
    """{mode: {step_s, turns, …}, "moved": …} of one setting."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        remotes: dict[str, Remote] = {}
        try:
            for mode in ("plain", *modes):
                own = tempfile.mkdtemp(dir=inside) if base.get("with_nvme", True) else None
                fields = {name: value for name, value in base.items() if name != "with_nvme"}
                remotes[mode] = Remote(kind(mode=mode, folder=own, **fields), Contestant)
            for remote in remotes.values():
                remote.ready()
            turns: dict[str, list[float]] = {mode: [] for mode in remotes}
            drive: list[float] = []
            refused: dict[str, str] = {}
            for number in range(rounds):
                drive.append(gauge.bytes_per_s(0.5, 0.6))
                for mode, remote in remotes.items():
                    if mode in refused:
                        continue
                    warmup = 1 if number else settling if mode == "auto" else 2
                    turn = remote.turn(steps, warmup)
                    if isinstance(turn, str):
                        refused[mode] = turn
                    else:
                        turns[mode].append(turn.step_s)
            summaries = {mode: remote.summary() for mode, remote in remotes.items() if mode not in refused}
        finally:
            for remote in remotes.values():
                remote.close()
    row: dict[str, Any] = {
        mode: {"step_s": statistics.median(its), "turns_s": its, **summaries[mode]}
        for mode, its in turns.items()
        if its
    }
    row["refused"] = refused
    row["drive_bytes_per_s"] = drive
    plain = row["plain"]["turns_s"]
    row["moved"] = max(_spread(each) for each in (plain, drive))
    return row


def _spread(turns: list[float]) -> float:
    """How far a control moved, its best and its worst turn left out where there are enough."""
    middle = sorted(turns)[1:-1] if len(turns) >= 5 else turns
    return max(middle) / min(middle) - 1


def print_row(name: str, row: dict, note: str) -> float:
    fixed = {mode: row[mode]["step_s"] for mode in MODES[:-1] if mode in row}
    best = min(fixed, key=lambda mode: fixed[mode])
    ratio = row["auto"]["step_s"] / fixed[best]
    cells = " ".join(f"{row[mode]['step_s'] * 1e3:8.0f}" if mode in row else "       -" for mode in MODES)
    over = [tier for tier, (peak, budget) in row["auto"]["peaks"].items() if peak > budget]
    print(
        f"{name:32}{cells}  {best:10}{ratio:6.2f}  {row['auto']['plan']['name']:10} moved {row['moved']:4.0%} {note}"
        f"{'  OVER BUDGET: ' + ', '.join(over) if over else ''}",
        flush=True,
    )
    return ratio


def grid(folder: str, args: argparse.Namespace, gauge: DriveGauge) -> list[dict]:
    print(
        f"ms a step, medians of {args.rounds} turns of {args.steps} steps; auto to the best fixed mode (target {TARGET})"
    )
    print(f"{'forward, drive, budget':32}{' '.join(f'{mode:>8}' for mode in MODES)}  {'best':10}{'auto':>6}  chosen")
    rows = []
    for forward_s, drive, budget in itertools.product(FORWARD_S, DRIVES, BUDGETS):
        device_blocks, ram = BUDGETS[budget]
        base = {"forward_s": forward_s, "drive": drive, "ram": ram, "device_blocks": device_blocks}
        name = f"{forward_s * 1e3:g} ms, {'as it is' if drive is None else f'{drive / 1e9:g} GB/s'}, {budget}"
        if args.rows not in name:
            continue
        for attempt in range(2):
            row = run_row(folder, base, MODES, args.rounds, args.steps, gauge)
            moved = row["moved"] > CONTROL
            ratio = print_row(name, row, "(repeated)" if moved and not attempt else "")
            rows.append({"name": name, "ratio": ratio, "attempt": attempt, **base, **row})
            if not moved:
                break
    last = {row["name"]: row["ratio"] for row in rows}
    print(
        f"within {TARGET}: {sum(each <= TARGET for each in last.values())} of {len(last)}; worst {max(last.values()):.2f}"
    )
    return rows


def pipeline(folder: str, args: argparse.Namespace, gauge: DriveGauge) -> list[dict]:
    """Compute at twice the traffic's time: swapping to the drives, and to the host, against keeping."""
    rows = []
    for blocks, nbytes in PIPELINES:
        speed = gauge.bytes_per_s(0.5)
        traffic_s = 2 * blocks * nbytes / speed
        base = {
            "forward_s": 2 * traffic_s / (3 * blocks), "ram": 1024 * MIB, "device_blocks": blocks + 4, "blocks": blocks,
            "nbytes": nbytes,
        }  # fmt: skip
        row = run_row(folder, base, ("keep", "host", "nvme"), args.rounds, args.steps, gauge)
        print(
            f"{blocks} blocks of {nbytes // MIB} MiB: compute {2 * traffic_s:.3f} s, activation traffic {traffic_s:.3f} s at "
            f"{speed / 1e9:.2f} GB/s (mixed)"
        )
        for mode in ("plain", "keep", "host", "nvme"):
            ratio = row[mode]["step_s"] / row["keep"]["step_s"]
            print(f"  {mode:8} {row[mode]['step_s']:.3f} s a step, {ratio:.3f} of keeping (target {PIPELINE_TARGET})")
        rows.append({**base, **row})
    return rows


def predicted(folder: str, args: argparse.Namespace, gauge: DriveGauge) -> list[dict]:
    print("a real model: predicted by a run under auto, and measured under each mode")
    print(
        f"{'rows x tokens, state, device, mode':44}{'s':>8}{'expected':>10}{'error':>8}   error of peaks: device, host, nvme"
    )
    rows = []
    for rows_count, tokens, place, gpu in REAL_SETTINGS:
        setting = f"{rows_count} x {tokens}, {place}, {gpu // MIB} MiB"
        if args.rows not in setting:
            continue
        base = {"rows": rows_count, "tokens": tokens, "gpu": gpu, **REAL_PLACES[place]}
        row = run_row(folder, base, MODES, args.rounds, args.steps, gauge, RealSetup, PREDICTING_STEPS)
        considered = row["auto"]["plan"]["considered"]
        for mode in MODES[:-1]:
            if mode not in row or mode not in considered:
                continue
            expected, took = considered[mode], row[mode]["step_s"]
            error = expected["seconds_per_step"] / took - 1
            most = {tier: peak for tier, (peak, _) in row[mode]["peaks"].items()}
            taken = {tier: peak for tier, peak in row[mode]["median_peaks"].items() if peak}
            peaks = {tier: expected["peak_bytes"][tier] / peak - 1 for tier, peak in taken.items()}
            cells = " ".join(
                f"{tier} {off:+.1%}"
                + (
                    f" (once {expected['peak_bytes'][tier] / most[tier] - 1:+.1%})"
                    if most[tier] > 1.01 * taken[tier]
                    else ""
                )
                for tier, off in peaks.items()
            )
            name = f"{setting}, {mode}"
            print(f"{name:44}{took:8.3f}{expected['seconds_per_step']:10.3f}{error:+8.1%}   {cells}", flush=True)
            rows.append(
                {
                    "name": name,
                    "error": error,
                    "peak_errors": peaks,
                    "step_s": took,
                    "expected": expected,
                    "peaks": most,
                    "peaks_of_turns": row[mode]["peaks_of_turns"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a folder on the drive to measure with")
    parser.add_argument("--only", choices=("grid", "pipeline", "predicted"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rows", default="", help="only those with this in their names")
    parser.add_argument("--json")
    args = parser.parse_args()
    described = machine(args.folder)
    gauge = DriveGauge(args.folder)
    try:
        found: dict[str, Any] = {}
        for name, part in (("pipeline", pipeline), ("grid", grid), ("predicted", predicted)):
            if args.only in (None, name):
                found[name] = part(args.folder, args, gauge)
    finally:
        gauge.close()
    write_json(args.json, described, args, **found)


if __name__ == "__main__":
    main()
