"""How much of a step's traffic hides under its compute, on a model that sleeps in place of computing.

    python scripts/bench_overlap.py FOLDER [--only none|clip|half] [--steps 20] [--json FILE]

The blocks of the model sleep (the GIL is free) for as long as they are told, so compute takes that time whatever the
machine is; NVMe traffic, copies and CPU Adam are real, on a third of the state (12 bytes a parameter) in RAM. At each
balance, traffic alone being about 0.5, 1 and 2 times compute alone:

    efficiency = max(compute alone, traffic alone) / together        (target 0.90; 0.85 with clipping)

Compute alone: the same model in RAM, forward, backward and clipping, without fuyou and without an optimizer. Traffic
alone: fuyou's run with sleeps of 0. Together: that run with its sleeps. They take turns. Time is counted from the end of
a step to the end of a later one, so what a step leaves for the next forward is in it as often as it is paid.

The drive is measured beside traffic alone, for the same mix of reads and writes: bytes moved over that is what the drive
needs, and traffic alone should be at most 1.1 times as long. Printed beside: the other schedules (`update=`), and serial:
update="step" with nothing fetched ahead. Every run ends with a comparison of all weights, to the bit, with plain PyTorch
and AdamW(fused=True) on the same gradients, which depend on the weights, the step and the block.

"clip": clip_grad_norm_ in every step, which scales the gradients in one step of ten; traffic alone is without it.
"half": half of the RAM costs time, and no bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_sleeper import STATE_BYTES, Plain, Remote, Setup
from bench_tools import DriveGauge, Turn, machine, timed_turn, write_json

# name -> (what differs from "auto", in words)
BESIDE: dict[str, tuple[dict[str, Any], str]] = {
    "serial": ({"update": "step", "prefetch": False}, "update='step', nothing fetched ahead"),
    "in backward only": (
        {"update": "speculative", "settled": True},
        "update='speculative', all done at the end of step()",
    ),
    "after backward": ({"update": "step"}, "update='step'"),
    "in forward only": ({"update": "deferred"}, "update='deferred'"),
}
TARGETS = {"none": 0.90, "clip": 0.85}
TRAFFIC_TARGET = 1.10


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Balance:
    """One balance: seconds a step, bytes a step, and what follows. `wanted`: traffic alone over compute alone."""

    wanted: float
    sleep_s: float
    steps: int
    compute_s: float
    traffic_s: float
    together_s: float
    read_bytes: int
    write_bytes: int
    drive_bytes_per_s: float  # as the gauge found it in these turns, for this mix
    beside_s: dict[str, float]
    rounds_s: dict[str, list[float]]
    efficiency: float
    traffic_over_drive: float

    @classmethod
    def of(cls, wanted: float, sleep_s: float, turns: dict[str, list[Turn]], drive_bytes_per_s: float) -> Balance:
        seconds = {name: pooled(found) for name, found in turns.items()}
        compute_s, traffic_s, together_s = (seconds.pop(name) for name in ("compute", "traffic", "together"))
        traffic_steps = sum(turn.steps for turn in turns["traffic"])
        read_bytes = sum(turn.read_bytes for turn in turns["traffic"]) // traffic_steps
        write_bytes = sum(turn.write_bytes for turn in turns["traffic"]) // traffic_steps
        return cls(
            wanted, sleep_s, sum(turn.steps for turn in turns["together"]), compute_s, traffic_s, together_s,
            read_bytes, write_bytes, drive_bytes_per_s, seconds,
            {name: [turn.step_s for turn in found] for name, found in turns.items()},
            efficiency=max(compute_s, traffic_s) / together_s,
            traffic_over_drive=traffic_s * drive_bytes_per_s / max(1, read_bytes + write_bytes),
        )  # fmt: skip


def pooled(turns: Sequence[Turn]) -> float:
    """Seconds a step over all turns together."""
    return sum(each.seconds for each in turns) / sum(each.steps for each in turns)


class Bench:
    """The options, the drive's gauge, and a folder for every run."""

    def __init__(self, options: argparse.Namespace, gauge: DriveGauge) -> None:
        self.options = options
        self.gauge = gauge

    @contextlib.contextmanager
    def runs(self, changes: dict[str, dict[str, Any]]) -> Iterator[dict[str, Remote]]:
        """A run for each name, with what differs from `self.setup`."""
        with (
            tempfile.TemporaryDirectory(prefix="bench-overlap-", dir=self.options.folder) as parent,
            contextlib.ExitStack() as stack,
        ):
            found = {}
            for number, (name, change) in enumerate(changes.items()):
                folder = Path(parent) / str(number)
                folder.mkdir()
                self.gauge.share_tuning(folder)
                found[name] = Remote(replace(self.setup(str(folder)), **change))
                stack.callback(found[name].close)
            for run in found.values():
                run.ready()
            yield found

    def setup(self, folder: str = "") -> Setup:
        o = self.options
        setup = Setup(folder, 0, o.blocks, o.width, durability=o.durability)
        return replace(setup, ram=int(STATE_BYTES * setup.parameters * o.share))

    def plain(self, clipping: bool) -> Plain:
        return Plain(self.options.blocks, self.options.width, clipping)

    # Sections ---------------------------------------------------------------------------------------------------------

    def balances(self, clipping: bool) -> dict[str, Any]:
        """Every balance, then the bits of every run."""
        target = TARGETS["clip" if clipping else "none"]
        print(f"\n{'clip_grad_norm_, firing in one step of ten' if clipping else 'no clipping'}")
        plain = self.plain(clipping)
        # Beside clipping, traffic alone is that of a run without it: what a failed prediction costs must not flatter.
        others = {"unclipped": {}} if clipping else {name: change for name, (change, _) in BESIDE.items()}
        changes = {"auto": {"clipping": clipping}, **others}
        with self.runs(changes) as runs:
            source = runs.pop("unclipped", runs["auto"])
            calibration_s = source.turn(3, 0.0, 3).step_s
            found = []
            for wanted in self.options.balances:
                found.append(self._balance(wanted, calibration_s, plain, source, runs))
                print_balance(found[-1], target)
            summaries = {name: run.summary() for name, run in runs.items()}
        compare_bits(plain, summaries)
        return {"target": target, "balances": [asdict(each) for each in found], "runs": summaries}

    def _balance(
        self, wanted: float, calibration_s: float, plain: Plain, source: Remote, runs: dict[str, Remote]
    ) -> Balance:
        """`calibration_s`, of `source`'s traffic alone, sets the sleeps. What is compared is measured here, in turns."""
        options, auto = self.options, runs["auto"]
        beside = [name for name in runs if name != "auto"]
        plain.model.sleep(0.0)
        own_s = timed_turn(plain.compute, 2).step_s  # gradients, probes, clipping: compute that is no sleep
        sleep_s = max(0.0, calibration_s / wanted - own_s)
        plain.model.sleep(sleep_s)
        each = -(-options.steps // options.rounds)
        turns: dict[str, list[Turn]] = {name: [] for name in ("compute", "traffic", "together", *beside)}
        speeds = []
        for _ in range(options.rounds):
            turns["compute"].append(timed_turn(plain.compute, max(1, each // 4), warmup=0))
            turns["traffic"].append(source.turn(max(1, each // 2), 0.0, options.warmup))
            traffic = turns["traffic"][-1]
            speeds.append(self.gauge.bytes_per_s(traffic.read_bytes / max(1, traffic.read_bytes + traffic.write_bytes)))
            turns["together"].append(auto.turn(each, sleep_s, options.warmup))
            for name in beside:
                turns[name].append(runs[name].turn(options.beside_steps, sleep_s, 1))
        return Balance.of(wanted, sleep_s, turns, statistics.median(speeds))

    def half(self) -> dict[str, Any]:
        """The same run with all of the RAM and with half of it, in turns, at the balance of 1."""
        print("\nhalf of the RAM")
        options, ram = self.options, self.setup().ram
        turns: dict[str, list[Turn]] = {"whole": [], "half": []}
        with self.runs({"whole": {}, "half": {"ram": ram // 2}}) as runs:
            sleep_s = runs["whole"].turn(3, 0.0, 3).step_s
            for _ in range(options.rounds):
                for name, run in runs.items():
                    turns[name].append(run.turn(2 * options.beside_steps, sleep_s, options.warmup))
            summaries = {name: run.summary() for name, run in runs.items()}
        seconds = {name: pooled(found) for name, found in turns.items()}
        ratio = seconds["half"] / seconds["whole"]
        print(f"  {seconds['whole']:.3f} s a step, with half {seconds['half']:.3f} s: {ratio:.2f}x")
        compare_bits(self.plain(False), summaries)
        return {"seconds": seconds, "ratio": ratio, "runs": summaries}


def compare_bits(plain: Plain, summaries: dict[str, dict[str, Any]]) -> None:
    """Put into each run's summary whether it has the weights that plain PyTorch has after as many steps; print all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # nothing is measured now
    expected = plain.hashes({each["steps"] for each in summaries.values()})
    torch.set_num_threads(threads)
    for name, each in summaries.items():
        each["bits_equal"] = each["hash"] == expected[each["steps"]]
        print_run(name, each)


# --- printing ---------------------------------------------------------------------------------------------------------


def print_balance(found: Balance, target: float) -> None:
    moved_gb = (found.read_bytes + found.write_bytes) / 1e9
    print(
        f"  traffic {found.wanted:g}x compute: compute {found.compute_s:.3f} s, traffic {found.traffic_s:.3f} s, together "
        f"{found.together_s:.3f} s a step over {found.steps} steps: efficiency {found.efficiency:.3f} (target {target:.2f})\n"
        f"    traffic alone: {found.read_bytes / 1e9:.2f} GB read, {found.write_bytes / 1e9:.2f} GB written, "
        f"{moved_gb / found.traffic_s:.2f} GB/s where the engine alone does {found.drive_bytes_per_s / 1e9:.2f}: "
        f"{found.traffic_over_drive:.2f}x what the drive needs (target {TRAFFIC_TARGET:.2f})"
    )
    bound = max(found.compute_s, found.traffic_s)
    rows = [(name, seconds, BESIDE[name][1]) for name, seconds in found.beside_s.items()]
    rows += [("the two in turn", found.compute_s + found.traffic_s, "compute alone + traffic alone")] if rows else []
    for name, seconds, words in rows:
        print(f"    {name:<17} {seconds:7.3f} s a step, efficiency {bound / seconds:.3f}   ({words})")
    sys.stdout.flush()


def print_run(name: str, summary: dict[str, Any]) -> None:
    memory = summary["memory"]
    mb = {key: f"{value / 1e6:.0f}" for key, value in memory.items()}
    equal = "equal to the bit" if summary["bits_equal"] else "DIFFER FROM PLAIN PYTORCH'S"
    over = "" if memory["host_peak_bytes"] <= memory["ram_bytes"] else ", OVER THE BUDGET"
    print(
        f"  {name:<17} {summary['steps']} steps, weights {equal}; host {mb['host_peak_bytes']} of {mb['ram_bytes']} MB{over}, "
        f"device {mb['device_peak_bytes']} of {mb['gpu_bytes']} MB; the process grew by {mb['rss_grown_bytes']} MB, budgets "
        f"are {(memory['ram_bytes'] + memory['gpu_bytes']) / 1e6:.0f} MB together"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", help="on the drive to be used: at the defaults the five runs and the gauge take 17 GB"
    )
    parser.add_argument("--only", choices=("none", "clip", "half"), help="one section (default: all three)")
    parser.add_argument("--balances", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="traffic over compute")
    parser.add_argument("--steps", type=int, default=20, help="timed together at each balance (default 20)")
    parser.add_argument("--beside-steps", type=int, default=3, help="a round of each other schedule (default 3)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before each turn (default 2)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024, help="a block has 4 weights of width x width (default 1024)")
    parser.add_argument("--share", type=float, default=1 / 3, help="RAM, of the state's bytes (default 1/3)")
    parser.add_argument("--durability", choices=("step", "checkpoint"), help="(default: fuyou's)")
    parser.add_argument("--json", "--out", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no gigabytes in the folder
    torch.set_num_threads(1)  # compute alone, as in the runs' processes
    gauge = DriveGauge(options.folder)
    try:
        bench = Bench(options, gauge)
        setup = bench.setup()
        print(
            f"{setup.parameters / 1e6:.1f}M parameters in {setup.blocks} blocks, state of {STATE_BYTES} bytes each "
            f"{STATE_BYTES * setup.parameters / 1e6:.0f} MB, ram {setup.ram / 1e6:.0f} MB, gpu {setup.gpu / 1e6:.0f} MB"
        )
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "none": lambda: bench.balances(clipping=False),
            "clip": lambda: bench.balances(clipping=True),
            "half": bench.half,
        }
        results = {name: run() for name, run in sections.items() if options.only in (None, name)}
    finally:
        gauge.close()
    described = machine(options.folder) | {"engine": asdict(gauge.tuning) if gauge.tuning is not None else None}
    write_json(options.json, described, options, results=results)
    return 0 if all(run["bits_equal"] for each in results.values() for run in each["runs"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
