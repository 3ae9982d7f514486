"""How long the phases of a step take, from the seconds that each keeps every resource busy.

[Note: cost model] A step is three kinds of work: forward, backward, update. Each keeps five resources busy for some
seconds: device compute, the link each way, the drives (reads and writes take turns), and host memory, which bounds CPU
Adam. What a phase of n blocks takes is a pipeline's time, the slowest resource and the others' first and last block:

    phase = max(resources) + (sum(resources) - max(resources)) / n

Where updates run is in `Choice.update`; u is the update's work and f, b are forward's and backward's:

    "step"         phase(f) + phase(b) + phase(u)
    "backward"     phase(f) + phase(b + u)                         under this backward only, as the Fuyou paper does
    "deferred"     phase(f + u) + phase(b)                         under the next forward only
    "speculative"  the least over x of phase(f + x u) + phase(b + (1 - x) u)

and every step has `Machine.tail_s` on top, which nothing hides. "speculative" is, for n → ∞, at least max over resources of
f + b + u, which no schedule can beat, and equals it where one resource bounds both phases. With accumulation, forward and
backward come as often, and the update runs under the first forward and the last backward only: it needs the whole gradient.

Without a GPU (`Machine.shared_compute`) compute, Adam and copies use the same cores. Compute and Adam are measured on all of
them, so their seconds add up; a copy is one core's work, so 1/cores of its seconds is added too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Literal

from fuyou.plan.machine import Machine

Update = Literal["step", "backward", "deferred", "speculative"]
Busy = Mapping[str, float]  # seconds by resource


def phase_seconds(
    machine: Machine, when: Update, times: int, blocks: int, forwards: Busy, backwards: Busy, update: Busy
) -> tuple[float, float, float]:
    """Seconds of (all forwards, all backwards, the update where it has a phase of its own) of a step of `times` forwards and
    backwards, by what each phase keeps busy; [Note: cost model]."""
    stages = max(1, blocks)
    forward, backward, update = (_shared(machine, each) for each in (forwards, backwards, update))
    forward, backward = ({name: value / times for name, value in each.items()} for each in (forward, backward))
    if when == "step":
        return times * _phase(forward, stages), times * _phase(backward, stages), _phase(update, stages)
    others = [(times - 1) * _phase(each, stages) if times > 1 else 0.0 for each in (forward, backward)]

    def split(share: float) -> tuple[float, float, float]:
        """With `share` of the update under the first forward, the rest under the last backward."""
        return (
            others[0] + _phase(_with(forward, update, share), stages),
            others[1] + _phase(_with(backward, update, 1 - share), stages),
            0.0,
        )

    if when != "speculative":
        return split(1.0 if when == "deferred" else 0.0)
    # Both phases are convex and, between the points where another resource becomes the slowest, linear in the share.
    turns = _crossings(forward, update) | {1 - each for each in _crossings(backward, update)}
    return min((split(share) for share in sorted({0.0, 1.0} | turns)), key=sum)


def _phase(busy: Busy, stages: int) -> float:
    slowest = max(busy.values())
    return slowest if slowest == math.inf else slowest + (sum(busy.values()) - slowest) / stages


def _shared(machine: Machine, busy: Busy) -> Busy:
    if not machine.shared_compute:
        return busy
    copies = busy["host_to_device"] + busy["device_to_host"]
    return {**busy, "compute": busy["compute"] + busy["adam"] + copies / machine.cores, "adam": 0.0}


def _with(busy: Busy, update: Busy, share: float) -> Busy:
    return {name: value + share * update[name] for name, value in busy.items()} if share else busy


def _crossings(busy: Busy, update: Busy) -> set[float]:
    """The shares of `update`, between 0 and 1, at which two resources are busy for as long."""
    found = set()
    for one, other in itertools.combinations(busy, 2):
        slope = update[one] - update[other]
        if slope and math.isfinite(slope):
            found.add((busy[other] - busy[one]) / slope)
    return {each for each in found if 0 < each < 1}
