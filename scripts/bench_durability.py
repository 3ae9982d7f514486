"""What it costs that nothing is lost: every step committed against none, and checkpoints beside training.

    python scripts/bench_durability.py FOLDER [--only step|save] [--rounds 3] [--json FILE]

The sleeping model of bench_overlap.py, with real NVMe traffic and real CPU Adam, at two balances: traffic alone half of
compute, and as long.

"step": durability="step" against "checkpoint" at equal budgets, in turns. What is kept in RAM is then written to the drives
too, once a step: extra written bytes over the bytes of weights and state that the other run keeps there (target: within
1 %), and added time (target: under 5 % where traffic is at most half of compute; printed where it equals it).

"save": turns with a checkpoint asked for at their begin, until a step after it is there, against turns of as many steps
without (target: under 5 % where traffic is at most half of compute; elsewhere no more than its bytes, read and written, at
the speed of the drive for that mix, and 5 %). Memory is that of a turn without. At the end the last checkpoint is loaded,
and its weights are compared, to the bit, with plain PyTorch's after as many steps.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_sleeper import STATE_BYTES, Contestant, Plain, Remote, Setup
from bench_tools import MIB, DriveGauge, drive_bytes, machine, peak_rss_bytes, reset_peak_rss, weights_hash, write_json

BALANCES = (0.5, 1.0)
TIME_TARGET, BYTES_TARGET = 0.05, 0.01
CALIBRATION_STEPS = 4


@dataclass(frozen=True)
class Moved:
    """`steps` steps from one settled moment to another: the seconds of the steps, and what was written in all."""

    steps: int
    seconds: float
    write_bytes: int
    peak_rss_bytes: int
    kept_bytes: int  # weights and optimizer state that host memory holds

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


class Keeper(Contestant):
    """A contestant whose turns begin and end settled, so that bytes are those of whole steps."""

    def moved(self, steps: int, compute_s: float, save: str | None = None) -> Moved:
        """With `save` a checkpoint is asked for at the begin; then steps are made until one after it is there, and at least
        so many."""
        self.run.model.sleep(compute_s)
        self.step()
        self.run.settle()
        reset_peak_rss()
        before, made, after = drive_bytes(self.run), 0, 0
        began = time.perf_counter()
        if save is not None:
            self.run.save(save)
        while made < steps or (save is not None and after < 1):
            after += save is not None and Path(save).exists()
            self.step()
            made += 1
        seconds = time.perf_counter() - began
        self.run.settle()
        host = self.run.report().dict()["tiers"]["host"]["by_category"]
        written = drive_bytes(self.run)[1] - before[1]
        return Moved(made, seconds, written, peak_rss_bytes(), host["weights"] + host["optimizer"])

    def load(self, folder: str, step: int) -> str:
        """The weights of a checkpoint of that step, which the run goes on from."""
        self.run.load(folder)
        self._steps = step
        return weights_hash(self.run.model)

    def steps_made(self) -> int:
        return self._steps


def opened(options: argparse.Namespace, gauge: DriveGauge, parent: Path, durability: str) -> Remote:
    folder = parent / durability
    folder.mkdir()
    gauge.share_tuning(folder)
    setup = Setup(str(folder), 0, options.blocks, options.width, durability=durability)
    setup = replace(setup, ram=int(STATE_BYTES * setup.parameters * options.share))
    remote = Remote(setup, Keeper)
    remote.ready()
    return remote


def bench_step(options: argparse.Namespace, gauge: DriveGauge, parent: Path) -> list[dict[str, Any]]:
    print("\nevery step committed, against none")
    runs = {name: opened(options, gauge, parent, name) for name in ("step", "checkpoint")}
    try:
        traffic_s = runs["step"]._ask("moved", CALIBRATION_STEPS, 0.0).step_s
        return [_step_at(balance, traffic_s / balance, options, runs) for balance in BALANCES]
    finally:
        for run in runs.values():
            run.close()


def _step_at(balance: float, sleep_s: float, options: argparse.Namespace, runs: dict[str, Remote]) -> dict[str, Any]:
    turns: dict[str, list[Moved]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            turns[name].append(run._ask("moved", options.steps, sleep_s))
    seconds = {name: statistics.median(each.step_s for each in found) for name, found in turns.items()}
    written = {
        name: sum(each.write_bytes for each in found) / sum(each.steps for each in found)
        for name, found in turns.items()
    }
    kept = turns["checkpoint"][-1].kept_bytes
    extra, added = written["step"] - written["checkpoint"], seconds["step"] / seconds["checkpoint"] - 1
    print(
        f"  traffic {balance:g}x compute: {seconds['checkpoint']:.3f} s a step, committed {seconds['step']:.3f} s: {added:+.1%}"
        f" (target {TIME_TARGET:.0%} up to 0.5x); {extra / 1e6:.1f} MB more written a step, {kept / 1e6:.1f} MB kept in RAM: "
        f"{extra / kept - 1:+.2%} (target {BYTES_TARGET:.0%})"
    )
    sys.stdout.flush()
    return {
        "traffic_over_compute": balance, "sleep_s": sleep_s, "added_time": added, "extra_bytes": extra, "kept_bytes": kept,
        "extra_over_kept": extra / kept, "turns": {name: [asdict(each) for each in found] for name, found in turns.items()},
    }  # fmt: skip


def bench_save(options: argparse.Namespace, gauge: DriveGauge, parent: Path) -> list[dict[str, Any]]:
    print("\na checkpoint beside training")
    run = opened(options, gauge, parent, "step")
    try:
        traffic_s = run._ask("moved", CALIBRATION_STEPS, 0.0).step_s
        found = [_save_at(balance, traffic_s / balance, options, run, gauge, parent / "saved") for balance in BALANCES]
    finally:
        run.close()
    return found


def _save_at(
    balance: float,
    sleep_s: float,
    options: argparse.Namespace,
    run: Remote,
    gauge: DriveGauge,
    folder: Path,
) -> dict[str, Any]:
    without, saving, speeds = [], [], []
    for _ in range(options.rounds):
        shutil.rmtree(folder, ignore_errors=True)
        at = run._ask("steps_made") + 1  # of the checkpoint: a turn begins with a step
        saving.append(run._ask("moved", 1, sleep_s, str(folder)))
        without.append(run._ask("moved", saving[-1].steps, sleep_s))
        speeds.append(gauge.bytes_per_s(0.5))
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    pairs = [(one.seconds - other.seconds, other.seconds) for one, other in zip(saving, without, strict=True)]
    added_s = statistics.median(added for added, _ in pairs)
    share = statistics.median(added / whole for added, whole in pairs)
    needed_s = 2 * nbytes / statistics.median(speeds)
    allowed_s = TIME_TARGET * statistics.median(each.seconds for each in without)
    allowed_s += needed_s if balance > 0.5 else 0.0
    peak = max(each.peak_rss_bytes for each in saving) - max(each.peak_rss_bytes for each in without)
    print(
        f"  traffic {balance:g}x compute: {nbytes / MIB:.0f} MiB beside {saving[-1].steps} steps of "
        f"{statistics.median(each.step_s for each in without):.3f} s: {added_s:+.3f} s, {share:+.1%} (target at most "
        f"{allowed_s:.3f} s; its bytes alone take the drive {needed_s:.3f} s); peak memory {peak / 1e6:+.1f} MB"
    )
    loaded = run._ask("load", str(folder), at)
    equal = loaded == Plain(options.blocks, options.width, clipping=False).hashes({at})[at]
    print(f"    the last one, loaded: weights {'equal to the bit' if equal else 'DIFFER FROM PLAIN PYTORCH'}")
    sys.stdout.flush()
    return {
        "traffic_over_compute": balance, "sleep_s": sleep_s, "bytes": nbytes, "added_s": added_s, "added_time": share,
        "allowed_s": allowed_s, "needed_s": needed_s, "peak_rss_more_bytes": peak, "bits_equal": equal,
        "with": [asdict(each) for each in saving], "without": [asdict(each) for each in without],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="on the drive to be used: at the defaults it takes 9 GB")
    parser.add_argument("--only", choices=("step", "save"), help="one section (default: both)")
    parser.add_argument("--steps", type=int, default=6, help="of a turn (default 6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="a block has 4 weights of width x width (default 1024)")
    parser.add_argument("--share", type=float, default=0.34, help="RAM, of the state's bytes (default 0.34)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gauge = DriveGauge(options.folder)
    results: dict[str, Any] = {}
    try:
        for name, bench in (("step", bench_step), ("save", bench_save)):
            if options.only in (None, name):
                with tempfile.TemporaryDirectory(prefix="bench-durability-", dir=options.folder) as parent:
                    results[name] = bench(options, gauge, Path(parent))
    finally:
        gauge.close()
    write_json(options.json, machine(options.folder), options, results=results)
    return 0 if all(each["bits_equal"] for each in results.get("save", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
