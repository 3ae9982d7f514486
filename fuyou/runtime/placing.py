"""Where each block's activations go: as Config says, or ("auto") as the cost model and the first steps of a run decide.

    steps 1 to 3  everything is recomputed; the machine warms up, the order of blocks is learnt
    steps 4 to 6  the same, and every block is watched: its seconds, then what it saves and its operations (profile.py)
    then          the cost model names the plans that could be the fastest (plan/candidates.py); where it can tell them
                  apart that is all, else each is tried for a few steps, and the one that was fastest stays

A plan is made for a size of batch. A larger one is watched and planned for anew; so is one that has been much smaller for
a while. What a plan keeps on the device is recomputed all the same by a frame that finds less room there than it needs.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fuyou.plan.candidates import worth_trying
from fuyou.runtime.profile import FrameWatch, Profiler, StepProfile, StepTime, Stopwatch
from fuyou.swap.activations import Watch
from fuyou.swap.placement import Placement

RECOMPUTE = Placement("recompute")
WARM_STEPS = 3  # the gauge of temporaries makes two slower, and one more has the heap that it trimmed to fill again
TRIED_STEPS = 4  # of each plan; the first has the one before it in it, and is not counted
LARGER, SMALLER, SMALL_STEPS = 1.02, 0.5, 20  # batches that a plan is not for: by this much, this often


@dataclass(frozen=True)
class Plan:
    """A placement for each block by index, the seconds a step and peak bytes a tier that are expected of it, and what
    bounds it in words."""

    name: str
    placements: Mapping[int, Placement]
    seconds: float
    words: str = ""
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decided:
    """A plan, and the bytes that each block's forward saves for a batch of its size."""

    plan: Plan
    saved_bytes: Mapping[int, int]


class Placing(Protocol):
    """What the schedule asks and tells."""

    def of(self, block: int) -> tuple[Placement, Watch | None]:
        """Of a call that begins: where its activations go, and who measures it."""

    def begin_forward(self, size: int) -> None:
        """The model is called with `size` elements of input."""

    def begin_backward(self, block: int) -> None: ...

    def end_block(self) -> None:
        """The backward of the block that began last is queued to its end."""

    def end_backward(self) -> None: ...

    def end_step(self, seconds: float) -> None: ...

    def summary(self) -> dict[str, Any]:
        """{name, settled, predicted_seconds_per_step (None where nothing was predicted), predicted_peak_bytes by tier, words,
        blocks ({how: how many}), considered ({name: {seconds_per_step, peak_bytes}}), tried ({name: seconds of its steps})}"""


class Fixed:
    """The same for every block."""

    def __init__(self, name: str, placement: Placement) -> None:
        self._name = name
        self._placement = placement

    def summary(self) -> dict[str, Any]:
        return {
            "name": self._name, "settled": True, "predicted_seconds_per_step": None, "predicted_peak_bytes": {}, "words": "",
            "blocks": {}, "considered": {}, "tried": {},
        }  # fmt: skip

    def of(self, block: int) -> tuple[Placement, Watch | None]:
        return self._placement, None

    def begin_forward(self, size: int) -> None: ...

    def begin_backward(self, block: int) -> None: ...

    def end_block(self) -> None: ...

    def end_backward(self) -> None: ...

    def end_step(self, seconds: float) -> None: ...


class Decider(Protocol):
    """What Auto asks, once for a run."""

    def decide(self, step: StepProfile) -> list[Plan]:
        """The plans that have room, the most promising first."""

    def prepare(self, plan: Plan) -> None:
        """A plan is about to be followed."""

    def device_room(self) -> int:
        """Bytes free on the device now."""

    def recall(self, size: int) -> Decided | None:
        """What was settled on before for batches of `size`."""

    def remember(self, size: int, decided: Decided) -> None: ...


class Auto:
    """Watches, decides, tries and settles. `profiler()` makes a new one."""

    def __init__(self, decider: Decider, profiler: Callable[[], Profiler], stopwatch: Stopwatch) -> None:
        self._decider = decider
        self._profiler = profiler
        self._stopwatch = stopwatch
        self._began = stopwatch.mark()  # of this step's first forward
        self._steps = 0
        self._watching: Profiler | None = None
        self._bytes: Mapping[int, int] = {}  # that a block's forward saves, for a batch of `_size`
        self._running_bytes = 0
        self._plans: list[Plan] = []
        self._considered: list[Plan] = []
        self._plan: Plan | None = None
        self._times: dict[
            str, list[tuple[StepTime, int]]
        ] = {}  # of the plans that have been tried: steps and their elements
        self._size = 0  # of the batch that the plan is for
        self._step_size = self._forward_size = 0  # of this step, of this forward
        self._recent: deque[int] = deque(maxlen=SMALL_STEPS)

    @property
    def plan(self) -> Plan | None:
        """What is in force, None while nothing has been decided."""
        return self._plan

    @property
    def trying(self) -> bool:
        return len(self._plans) > 1

    def summary(self) -> dict[str, Any]:
        if self._plan is None:
            return Fixed("recompute", RECOMPUTE).summary() | {"settled": False}
        return {
            "name": self._plan.name,
            "settled": not self.trying,
            "predicted_seconds_per_step": self._plan.seconds,
            "predicted_peak_bytes": dict(self._plan.peak_bytes),
            "considered": {
                each.name: {"seconds_per_step": each.seconds, "peak_bytes": dict(each.peak_bytes)}
                for each in self._considered
            },
            "tried": {name: [each * self._size for each in self._seconds(name)] for name in self._times},
            "words": self._plan.words,
            "blocks": dict(Counter(str(each) for each in self._plan.placements.values())),
        }

    def of(self, block: int) -> tuple[Placement, Watch | None]:
        if self._watching is not None:
            return RECOMPUTE, FrameWatch(self._watching, block)
        if self._plan is None or self._forward_size > LARGER * self._size:
            return RECOMPUTE, None
        placement = self._plan.placements.get(block, RECOMPUTE)
        stays = placement.saved == "keep" or any(tier == "device" for _, tier in placement.results)
        if stays and self._decider.device_room() < self._bytes.get(block, 0) + self._running_bytes:
            return RECOMPUTE, None
        return placement, None

    def begin_forward(self, size: int) -> None:
        if not self._step_size:
            self._began = self._stopwatch.mark()
        self._forward_size = size
        self._step_size += size

    def begin_backward(self, block: int) -> None:
        if self._watching is not None:
            self._watching.backward_begins(block)

    def end_block(self) -> None:
        if self._watching is not None:
            self._watching.block_ends()

    def end_backward(self) -> None:
        if self._watching is not None:
            self._watching.backward_ends()

    def end_step(self, seconds: float) -> None:
        took = StepTime(seconds, self._began, self._stopwatch.mark())
        size, self._step_size = self._step_size, 0
        self._steps += 1
        self._recent.append(self._forward_size)
        if self._watching is not None:
            if self._watching.step_ends(took):
                self._decide(self._watching.read())
        elif self._plan is None:
            if self._steps >= WARM_STEPS:
                self._watch()
        elif self._forward_size > LARGER * self._size or (
            len(self._recent) == SMALL_STEPS and max(self._recent) < SMALLER * self._size
        ):
            self._watch()
        elif self.trying:
            self._times.setdefault(self._plan.name, []).append((took, max(size, 1)))
            self._try_next()

    def _seconds(self, name: str) -> list[float]:
        """A step and element, of a plan that has been tried. On CUDA this waits for the last of these steps."""
        return [took.seconds(self._stopwatch) / size for took, size in self._times.get(name, ())]

    def _watch(self) -> None:
        """Plan anew, unless that has been done for batches of this size."""
        self._plan, self._plans, self._times = None, [], {}
        known = self._decider.recall(self._forward_size)
        if known is None:
            self._watching = self._profiler()
        else:
            self._begin(known.saved_bytes)
            self._follow(known.plan)

    def _follow(self, plan: Plan) -> None:
        self._decider.prepare(plan)
        self._plan = plan

    def _begin(self, saved_bytes: Mapping[int, int]) -> None:
        self._size = self._forward_size
        self._bytes = saved_bytes
        self._running_bytes = max(saved_bytes.values(), default=0)
        self._recent.clear()

    def _decide(self, step: StepProfile | None) -> None:
        self._watching = None
        if step is None:
            return
        self._begin({index: each.saved_bytes // step.backwards for index, each in step.blocks.items()})
        self._considered = self._decider.decide(step)
        self._plans = self._considered[: worth_trying([(each.name, each.seconds) for each in self._considered])]
        plan = self._plans[0] if self._plans else Plan("recompute", {}, 0.0)
        self._follow(plan)
        if not self.trying:
            self._decider.remember(self._size, Decided(plan, self._bytes))

    def _try_next(self) -> None:
        tried = [each for each in self._plans if len(self._times.get(each.name, ())) >= TRIED_STEPS]
        if len(tried) < len(self._plans):
            self._follow(next(each for each in self._plans if each not in tried))
            return
        plan = min(tried, key=lambda each: statistics.median(self._seconds(each.name)[1:]))
        self._follow(plan)
        self._plans = []
        self._decider.remember(self._size, Decided(plan, self._bytes))


__all__ = ["RECOMPUTE", "Auto", "Decided", "Fixed", "Placing", "Plan"]
