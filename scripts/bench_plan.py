"""The simulator beside published times of an RTX 4090: one set of constants, every row.

    python scripts/bench_plan.py [--json FILE]

The rows are of the Fuyou paper's system (arXiv 2403.06504 and its artifact), sequence 1024, TFLOPS read as 8 N tokens / s.
Machine: fuyou/plan/hardware/rtx4090-12xp5510.json; system: PAPER_SYSTEM of fuyou/plan/systems.py. It takes seconds.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench_tools import write_json

from fuyou.plan.machine import load_machine
from fuyou.plan.shapes import Work, gpt
from fuyou.plan.simulator import Request, default_budgets, simulate
from fuyou.plan.systems import PAPER_SYSTEM

MACHINE = "rtx4090-12xp5510"
VOCAB, SEQUENCE = 50257, 1024
MODELS = {
    "13B": gpt(40, 40, 5120, VOCAB, head=False, name="13B"),
    "175B": gpt(96, 96, 12288, VOCAB, head=False, name="175B"),
}
# model, batch, drives, published TFLOPS; None: out of memory
PUBLISHED = (
    ("13B", 8, 12, 42.8), ("13B", 16, 12, 84.3), ("13B", 32, 12, 143.1), ("13B", 64, 12, 155.8), ("13B", 128, 12, 153.8),
    ("13B", 32, 1, 37.5), ("13B", 32, 2, 64.3), ("13B", 32, 3, 81.1), ("13B", 32, 6, 121.7), ("13B", 32, 12, 142.0),
    ("175B", 8, 12, 52.6), ("175B", 16, 12, 86.9), ("175B", 32, 12, None),
)  # fmt: skip


def row(name: str, batch: int, drives: int, published: float | None) -> dict[str, Any]:
    machine = load_machine(MACHINE).with_drives(drives)
    budgets = default_budgets(machine, PAPER_SYSTEM)
    found = simulate(Request(MODELS[name], machine, PAPER_SYSTEM, Work(batch, SEQUENCE), 1, budgets))
    its: dict[str, Any] = {"model": name, "batch": batch, "drives": drives, "published_tflops": published}
    its |= {"fits": found.fits, "device_bytes": found.prediction.tier_bytes("device"), "device_budget": budgets.device}
    if found.fits and found.activations is not None:
        its |= {
            "predicted_tflops": found.tflops(8),
            "error": found.tflops(8) / published - 1 if published else None,
            "seconds": found.prediction.seconds_per_step,
            "bound_by": found.prediction.bound_by,
            "swapped_bytes": found.activations.swapped_bytes,
        }
    return its


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model, batch, drives | published | predicted | error | seconds | bound by | swapped |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        title = f"| {each['model']}, {each['batch']}, {each['drives']} "
        if not each["fits"]:
            needed = f"{each['device_bytes'] / 1e9:.1f} of {each['device_budget'] / 1e9:.1f} GB"
            lines.append(f"{title}| out of memory | does not fit: {needed} | | | | |")
            continue
        lines.append(
            f"{title}| {each['published_tflops']} | {each['predicted_tflops']:.1f} | {each['error']:+.1%} "
            f"| {each['seconds']:.1f} | {each['bound_by']} | {each['swapped_bytes'] / 1e9:.0f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="a file to write as well")
    arguments = parser.parse_args()
    rows = [row(*each) for each in PUBLISHED]
    errors = [abs(each["error"]) for each in rows if each.get("error") is not None]
    print(table(rows))
    print(f"worst {max(errors):.1%}, mean {sum(errors) / len(errors):.1%} of {len(errors)} rows")
    if arguments.json:
        described = {"hardware": MACHINE, "system": PAPER_SYSTEM.name, "tflops": "8N"}
        write_json(arguments.json, described, arguments, rows=rows)


if __name__ == "__main__":
    main()
