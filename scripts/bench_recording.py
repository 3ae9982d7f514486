"""What recording costs: steps with it on and off in turns, in one process, on one model.

    python scripts/bench_recording.py --nvme DIR [--layers 12] [--batch 2] [--tokens 128] [--pairs 20] [--json FILE]

The model is bench_gpt's (100M parameters with 12 layers), a quarter of 12 bytes a parameter as its RAM. A step is timed from the
end of one to the end of the next. Of every two pairs one begins with recording on and the other with it off, so that a machine
that grows slower favours neither side. Printed: the median step of each side, and the median of the pairs' ratios with the middle
half of them; under 1.01 is the promise. What the ledger counts by itself is on in both. A step's time varies by more than that
on most machines, so beside it, in steps of their own, what hardly varies: the CPU seconds that all threads spend within the
recorder (its notes, and the looks at resident memory that are made for it), as a share of the step. What reading the clock
takes is measured beside each and left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from bench_gpt import LAYERS, VOCABULARY, Gpt
from bench_tools import machine, write_json

import fuyou

WARM_STEPS = 10  # by then activations are settled
STATE_BYTES = 12  # a parameter
TIMED_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvme", required=True, help="a folder on the drive")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--gpu", default="2GiB")
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    result = measure(options)
    low, middle, high = result["ratio_quartiles"]
    print(
        f"on {result['on_s']:.4f} s, off {result['off_s']:.4f} s a step; on / off {middle:.4f} ({low:.4f} to {high:.4f}), "
        f"{options.pairs} pairs"
    )
    print(f"within the recorder {result['within_recorder_share']:.3%} of a step: {result['notes_per_step']:.0f} notes")
    write_json(options.json, machine(options.nvme), options, results=result)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Gpt(layers=options.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ram = STATE_BYTES * sum(each.numel() for each in model.parameters()) // 4
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with (
        tempfile.TemporaryDirectory(dir=options.nvme) as folder,
        fuyou.wrap(model, optimizer, nvme=folder, ram=ram, gpu=options.gpu) as run,
    ):
        recorder = run._tiers.recorder

        def step(on: bool) -> float:
            recorder.on = on
            began = time.perf_counter()
            tokens = torch.randint(0, VOCABULARY, (options.batch, options.tokens), device=run.device)
            loss = model(tokens)
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            loss.item()
            return time.perf_counter() - began

        for _ in range(WARM_STEPS):
            step(True)
        for pair in range(options.pairs):
            for on in (pair % 2 == 0, pair % 2 == 1):
                seconds[on].append(step(on))
        with Within(recorder, run._movers.gauge) as within:
            timed = [step(True) for _ in range(TIMED_STEPS)]
            run.settle()
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
    return {
        "on_s": statistics.median(seconds[True]),
        "off_s": statistics.median(seconds[False]),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "within_recorder_share": within.seconds / sum(timed),
        "notes_per_step": within.calls / TIMED_STEPS,
        "seconds": {"on": seconds[True], "off": seconds[False]},
    }


class Within:
    """CPU seconds and calls within the methods that note things, of all threads."""

    def __init__(self, recorder: Any, gauge: Any) -> None:
        self._methods = [(recorder, name) for name in ("span", "change", "step")] + [(gauge, "_look")]
        self.seconds, self.calls = 0.0, 0

    def __enter__(self) -> Within:
        for owner, name in self._methods:
            setattr(owner, name, self._timed(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name in self._methods:
            delattr(owner, name)  # the class's own is seen again

    def _timed(self, method: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> None:
            before, began = time.thread_time(), time.thread_time()
            method(*arguments, **named)
            self.seconds += (time.thread_time() - began) - (began - before)
            self.calls += 1

        return timed


if __name__ == "__main__":
    main()
