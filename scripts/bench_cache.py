"""NVMe bytes a step against the RAM budget: RAM is a cache, and the more of it there is, the less the drive moves.

    python scripts/bench_cache.py FOLDER [--percents 10 40 100] [--steps 5] [--json FILE]

The model is bench_sleeper's with sleeps of 0, 25M parameters by default. A percentage is of 12 bytes a parameter: fp32
weights and Adam's two moments. Gradients are 4 more, and staging comes out of the same budget, so that nothing moves
only from somewhat above 133 %. Everything else is left to fuyou; each budget is a run of its own, under both
durabilities: with "step" what an update makes is written in every step, whatever the RAM, and with "checkpoint" it may
stay there. Bytes are counted from the end of a step to the end of a later one, after warm-up, and divided by parameters
and steps.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
from bench_sleeper import STATE_BYTES, Plain, Remote, Setup
from bench_tools import DriveGauge, machine, write_json

DURABILITIES = ("checkpoint", "step")


@dataclass(frozen=True)
class Row:
    """Of one budget: bytes and seconds are those of a step."""

    durability: str
    percent: float
    ram_bytes: int
    read_bytes: float
    write_bytes: float
    read_a_parameter: float
    write_a_parameter: float
    step_s: float
    host_peak_bytes: int
    rss_grown_bytes: int
    steps: int
    hash: str

    def line(self) -> str:
        over = "" if self.host_peak_bytes <= self.ram_bytes else "  OVER THE BUDGET"
        return (
            f"{self.percent:5.0f} % {self.ram_bytes / 1e6:8.1f} MB {self.read_a_parameter:9.2f} {self.write_a_parameter:9.2f} "
            f"{self.step_s:9.3f} s {self.host_peak_bytes / 1e6:8.1f} MB{over}"
        )


def measure(durability: str, percent: float, options: argparse.Namespace, gauge: DriveGauge) -> Row:
    setup = Setup("", 0, options.blocks, options.width)
    ram = int(STATE_BYTES * setup.parameters * percent / 100)
    with tempfile.TemporaryDirectory(prefix="bench-cache-", dir=options.folder) as folder:
        gauge.share_tuning(folder)
        run = Remote(Setup(folder, ram, options.blocks, options.width, update=options.update, durability=durability))
        try:
            run.ready()
            turn = run.turn(options.steps, 0.0, options.warmup)
            summary: dict[str, Any] = run.summary()
        finally:
            run.close()
    read, write = turn.read_bytes / turn.steps, turn.write_bytes / turn.steps
    return Row(
        durability, percent, ram, read, write, read / setup.parameters, write / setup.parameters, turn.step_s,
        summary["memory"]["host_peak_bytes"], summary["memory"]["rss_grown_bytes"], summary["steps"], summary["hash"],
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="on the drive to be used")
    parser.add_argument("--percents", type=float, nargs="+", default=[10, 20, 40, 60, 80, 100, 120, 160])
    parser.add_argument("--steps", type=int, default=5, help="timed (default 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before (default 3)")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=512, help="a block has 4 weights of width x width (default 512)")
    parser.add_argument("--update", choices=("step", "deferred", "speculative", "auto"), default="auto")
    parser.add_argument("--json", "--out", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no gigabytes in the folder
    torch.set_num_threads(1)
    rows: list[Row] = []
    gauge = DriveGauge(options.folder)
    try:
        for durability in DURABILITIES:
            print(f"\ndurability={durability!r}: bytes a parameter a step")
            print("    RAM                    read   written   a step   host peak")
            for percent in options.percents:
                rows.append(measure(durability, percent, options, gauge))
                print(rows[-1].line(), flush=True)
    finally:
        gauge.close()
    expected = Plain(options.blocks, options.width, clipping=False).hashes({each.steps for each in rows})
    equal = all(each.hash == expected[each.steps] for each in rows)
    print(f"\nweights of all runs: {'equal to the bit to' if equal else 'NOT ALL EQUAL TO'} plain PyTorch's")
    write_json(
        options.json, machine(options.folder), options, bits_equal=equal, results=[asdict(each) for each in rows]
    )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
