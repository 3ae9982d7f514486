"""What a step costs: seconds, bytes moved, and peak bytes a tier, of any plan on any machine. Numbers in, numbers out.

Here the work is added up; how long it takes is [Note: cost model] of plan/phases.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fuyou.plan.machine import Machine
from fuyou.plan.phases import Update, phase_seconds

Action = Literal["keep", "recompute", "host", "nvme"]  # of a saved tensor: on the device, dropped, swapped out
Place = Literal["device", "host", "nvme"]
RESOURCES = ("compute", "host_to_device", "device_to_host", "nvme", "adam")
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "staging")
TIERS = ("device", "host", "nvme")


@dataclass(frozen=True)
class Item:
    """What a block saves for backward and may be kept, swapped or recomputed as one: `recompute_s` is the time that having
    it spares, over the whole batch. `read_by_backward`: False for what backward itself does not read, such as the output of a
    block's last product, whose only use is that it need not be computed again: it takes no room while its block runs."""

    name: str
    nbytes: int
    recompute_s: float
    read_by_backward: bool = True


@dataclass(frozen=True)
class BlockNumbers:
    """A block on one device, for one forward and backward of the whole batch.

    `elements`: trained parameters; `weight_bytes`: of the compute copy of all parameters. `backward_s`: without any
    recomputation. `input_bytes`: what recomputing starts from. `working_bytes`: temporaries while it runs, beside what it
    saves.
    """

    name: str
    elements: int
    weight_bytes: int
    forward_s: float
    backward_s: float
    input_bytes: int
    items: tuple[Item, ...] = ()
    working_bytes: int = 0
    tied_bytes: int = 0  # of weight_bytes, what is stored with another block: fetched here too, kept once


@dataclass(frozen=True)
class Traffic:
    """Bytes a parameter that a system moves a step. `state` is the optimizer's beside the compute copy.

    Weights are read from where they live `forward_reads` times a forward and `backward_reads` times a backward, gradients
    are written once and read by the update, which reads and writes `state_bytes` and writes the compute copy. `dram_bytes`:
    host memory traffic of the update alone.
    """

    name: str
    weight_bytes: float
    gradient_bytes: float
    state_bytes: float
    dram_bytes: float
    forward_reads: int = 1
    backward_reads: int = 1
    gradients_wait: bool = True  # False: the update takes each gradient as it comes, and none is held in host memory


# fuyou, from fuyou/plan/planner.py's bytes of each kind and [Note: split master] of swap/adam.py: on NVMe alone 16 bytes a
# parameter are read and 14 written in bf16 (hi 2; lo 2, m 4, v 4), 20 and 16 in fp32. What README measures is this.
FUYOU_BF16 = Traffic("fuyou, bf16", weight_bytes=2, gradient_bytes=2, state_bytes=10, dram_bytes=26)
FUYOU_FP32 = Traffic("fuyou, fp32", weight_bytes=4, gradient_bytes=4, state_bytes=8, dram_bytes=28)
# The Fuyou paper's system: fp32 master, m and v, and an fp16 copy. 14 bytes a parameter each way (its artifact): the copy is
# read from the drives once, and gradients are used in host memory.
PAPER = Traffic(
    "the Fuyou paper's system", weight_bytes=2, gradient_bytes=2, state_bytes=12, dram_bytes=28, backward_reads=0,
    gradients_wait=False,
)  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """A plan, as far as it costs anything.

    `actions`: for each block, what is done with each of its items; () recomputes all. `inputs`: where each block's input
    waits for backward; () is the device. `host_*`: share of each kind that lives in host memory, 0 to 1, the rest on NVMe.
    `durable`: steps are committed, so that what is in host memory is written to NVMe too. `state_slots`: of what updates
    rewrite there. `device_slots` and `gradient_slots`: blocks whose weights, and gradients, are on the device at once.
    `in_flight`: blocks whose swapped tensors are on their way besides the one that runs. `slices`: parts of the batch that a
    block runs at a time. `accumulation`: backwards a step. The other bytes are what tiers hold whatever is chosen.
    """

    actions: tuple[tuple[Action, ...], ...] = ()
    inputs: tuple[Place, ...] = ()
    host_weights: float = 0.0
    host_gradients: float = 0.0
    host_state: float = 0.0
    update: Update = "speculative"
    durable: bool = False
    state_slots: int = 1
    device_slots: int = 4
    gradient_slots: int = 1
    in_flight: int = 1
    slices: int = 1
    accumulation: int = 1
    pinned_bytes: int = 0  # weights and buffers that never leave the device
    device_working_bytes: int = 0
    staging_bytes: int = 0  # of host memory

    def action(self, block: int, item: int) -> Action:
        return self.actions[block][item] if self.actions else "recompute"

    def input_place(self, block: int) -> Place:
        return self.inputs[block] if self.inputs else "device"


@dataclass(frozen=True)
class Work:
    """Of one phase: seconds of compute, and bytes over each path, of one device or of the machine (NVMe, DRAM)."""

    compute_s: float = 0.0
    host_to_device_bytes: float = 0.0
    device_to_host_bytes: float = 0.0
    nvme_read_bytes: float = 0.0
    nvme_write_bytes: float = 0.0
    dram_bytes: float = 0.0

    def seconds(self, machine: Machine) -> dict[str, float]:
        """How long each resource is busy with it."""
        return {
            "compute": self.compute_s,
            "host_to_device": self.host_to_device_bytes / machine.host_to_device_bytes_per_s,
            "device_to_host": self.device_to_host_bytes / machine.device_to_host_bytes_per_s,
            "nvme": machine.nvme_s(self.nvme_read_bytes, self.nvme_write_bytes),
            "adam": self.dram_bytes / machine.dram_bytes_per_s,
        }


@dataclass(frozen=True)
class Question:
    """What was asked of the model: all that `predict` was given."""

    machine: Machine
    blocks: tuple[BlockNumbers, ...]
    choice: Choice
    traffic: Traffic


@dataclass(frozen=True)
class Prediction:
    """Seconds and bytes of a step. `busy_s`: of each of RESOURCES, over the step. `update_s`: what the update adds to a step
    that has none. `peak_bytes[tier][category]`: on the device, of one GPU; elsewhere of all. `forward_bytes`: activations on
    the device when forward ends, which is not when most are there where blocks recompute."""

    seconds_per_step: float
    forward_s: float
    backward_s: float
    update_s: float
    busy_s: Mapping[str, float]
    peak_bytes: Mapping[str, Mapping[str, int]]
    forward_bytes: int
    nvme_read_bytes: int
    nvme_write_bytes: int
    host_to_device_bytes: int
    device_to_host_bytes: int
    question: Question = field(repr=False, compare=False)

    def tier_bytes(self, tier: str) -> int:
        return sum(self.peak_bytes[tier].values())

    @property
    def bound_by(self) -> str:
        """The one of RESOURCES whose absence would shorten the step most; of equals, the busiest."""
        if self.seconds_per_step == math.inf:
            return max(RESOURCES, key=lambda name: self.busy_s[name])
        seconds = {name: sum(_times(self.question, without=name)) for name in RESOURCES}
        return min(RESOURCES, key=lambda name: (seconds[name], -self.busy_s[name]))


def predict(
    machine: Machine, blocks: Sequence[BlockNumbers], choice: Choice, traffic: Traffic = FUYOU_BF16
) -> Prediction:
    """Cost of a step; [Note: cost model]. Says nothing about whether it fits: compare `peak_bytes` with what there is."""
    question = Question(machine, tuple(blocks), choice, traffic)
    work = work_of(machine, blocks, choice, traffic)
    times = _times(question)
    busy = [each.seconds(machine) for each in work]
    return Prediction(
        seconds_per_step=sum(times) + machine.tail_s,
        forward_s=times[0],
        backward_s=times[1],
        update_s=sum(times) - sum(_times(question, update=False)) if sum(times) < math.inf else math.inf,
        busy_s={name: sum(each[name] for each in busy) for name in RESOURCES},
        peak_bytes=peak_bytes(machine, blocks, choice, traffic),
        forward_bytes=forward_bytes(blocks, choice),
        nvme_read_bytes=round(sum(each.nvme_read_bytes for each in work)),
        nvme_write_bytes=round(sum(each.nvme_write_bytes for each in work)),
        host_to_device_bytes=round(sum(each.host_to_device_bytes for each in work)),
        device_to_host_bytes=round(sum(each.device_to_host_bytes for each in work)),
        question=question,
    )


def step_seconds(machine: Machine, blocks: Sequence[BlockNumbers], choice: Choice, traffic: Traffic) -> float:
    """predict(...).seconds_per_step alone, for those who compare many plans."""
    return sum(_times(Question(machine, tuple(blocks), choice, traffic))) + machine.tail_s


def _times(question: Question, *, without: str = "", update: bool = True) -> tuple[float, float, float]:
    """Seconds of forward, backward and the update after them; as if the resource `without` took no time."""
    machine, choice = question.machine, question.choice
    work = work_of(machine, question.blocks, choice, question.traffic)
    busy = [
        {name: 0.0 if name == without else value for name, value in each.seconds(machine).items()}
        for each in (*work[:2], work[2] if update else Work())
    ]
    return phase_seconds(machine, choice.update, choice.accumulation, len(question.blocks), busy[0], busy[1], busy[2])


def work_of(
    machine: Machine, blocks: Sequence[BlockNumbers], choice: Choice, traffic: Traffic
) -> tuple[Work, Work, Work]:
    """(all forwards, all backwards, the update) of a step."""
    times, gpus = choice.accumulation, machine.gpu_count
    weights = sum(each.weight_bytes for each in blocks)
    elements = sum(each.elements for each in blocks)
    gradients, state = elements * traffic.gradient_bytes, elements * traffic.state_bytes
    from_nvme = weights * (1 - choice.host_weights)
    recompute_s = sum(
        item.recompute_s
        for block, each in enumerate(blocks)
        for index, item in enumerate(each.items)
        if choice.action(block, index) == "recompute"
    )
    swapped = swapped_bytes(blocks, choice)
    out, to_nvme = swapped["host"] + swapped["nvme"], swapped["nvme"] * gpus
    spilled = gradients * (1 - choice.host_gradients)
    forward = Work(
        compute_s=times * sum(each.forward_s for each in blocks),
        host_to_device_bytes=times * weights,
        device_to_host_bytes=times * out,
        nvme_read_bytes=times * from_nvme * traffic.forward_reads,
        nvme_write_bytes=times * to_nvme,
    )
    # Gradients of several backwards, or of several GPUs, are added in host memory: two read, one written.
    sums = times * gpus - 1
    backward = Work(
        compute_s=times * (sum(each.backward_s for each in blocks) + recompute_s),
        host_to_device_bytes=times * (weights + out),
        device_to_host_bytes=times * gradients,
        nvme_read_bytes=times * (from_nvme * traffic.backward_reads + to_nvme) + (times - 1) * spilled,
        nvme_write_bytes=times * spilled,
        dram_bytes=3 * sums * gradients,
    )
    trained = elements * traffic.weight_bytes
    written_state, written_weights = (1.0, 1.0) if choice.durable else (1 - choice.host_state, 1 - choice.host_weights)
    update = Work(
        nvme_read_bytes=state * (1 - choice.host_state) + spilled,
        nvme_write_bytes=state * written_state + trained * written_weights,
        dram_bytes=elements * traffic.dram_bytes,
    )
    return forward, backward, update


def swapped_bytes(blocks: Sequence[BlockNumbers], choice: Choice) -> dict[str, int]:
    """Bytes that wait for backward in each tier, of one device: saved tensors, and inputs of blocks that recompute."""
    found = {"device": 0, "host": 0, "nvme": 0}
    for block, each in enumerate(blocks):
        for index, item in enumerate(each.items):
            action = choice.action(block, index)
            if action != "recompute":
                found["device" if action == "keep" else action] += item.nbytes
        if needs_input(each, block, choice):
            found[choice.input_place(block)] += each.input_bytes
    return found


def needs_input(block: BlockNumbers, index: int, choice: Choice) -> bool:
    """Whether a block recomputes anything, for which it needs its input."""
    return any(choice.action(index, item) == "recompute" for item in range(len(block.items)))


def peak_bytes(
    machine: Machine, blocks: Sequence[BlockNumbers], choice: Choice, traffic: Traffic
) -> dict[str, dict[str, int]]:
    """Bytes by tier and category at the worst moment, term by term.

    Device, activations: what waits there for backward; and of the block whose backward runs, all that is not kept (one slice
    of it), its temporaries, its input, and of `in_flight` blocks what was swapped.
    """
    weights = sum(each.weight_bytes - each.tied_bytes for each in blocks)
    elements = sum(each.elements for each in blocks)
    gradients, state = elements * traffic.gradient_bytes, elements * traffic.state_bytes
    swapped = swapped_bytes(blocks, choice)
    largest = max((each.weight_bytes for each in blocks), default=0)
    largest_gradient = max((each.elements for each in blocks), default=0) * traffic.gradient_bytes
    running = max((_running_bytes(each, index, choice) for index, each in enumerate(blocks)), default=0)
    off_host = (1.0, 1.0) if choice.durable else (1 - choice.host_weights, 1 - choice.host_state)
    found: dict[str, dict[str, float]] = {
        "device": {
            "weights": choice.pinned_bytes + min(choice.device_slots * largest, weights),
            "gradients": min(choice.gradient_slots * largest_gradient, gradients),
            "activations": swapped["device"] + running,
            "staging": choice.device_working_bytes,
        },
        "host": {
            "weights": weights * choice.host_weights,
            "gradients": gradients * choice.host_gradients if traffic.gradients_wait else 0,
            "optimizer": state * choice.host_state,
            "activations": swapped["host"] * machine.gpu_count,
            "staging": choice.staging_bytes,
        },
        "nvme": {
            "weights": choice.state_slots * weights * off_host[0],
            "gradients": gradients * (1 - choice.host_gradients),
            "optimizer": choice.state_slots * state * off_host[1],
            "activations": swapped["nvme"] * machine.gpu_count,
        },
    }
    return {tier: {name: round(its.get(name, 0)) for name in CATEGORIES} for tier, its in found.items()}


def forward_bytes(blocks: Sequence[BlockNumbers], choice: Choice) -> int:
    """Activations on the device when forward ends: what waits there, and what the last blocks swap, which is on its way."""
    last = range(max(0, len(blocks) - 1 - choice.in_flight), len(blocks))
    leaving = sum(
        item.nbytes
        for block in last
        for index, item in enumerate(blocks[block].items)
        if choice.action(block, index) in ("host", "nvme")
    )
    inputs = sum(
        blocks[block].input_bytes
        for block in last
        if needs_input(blocks[block], block, choice) and choice.input_place(block) != "device"
    )
    return swapped_bytes(blocks, choice)["device"] + leaving + inputs


def _running_bytes(block: BlockNumbers, index: int, choice: Choice) -> int:
    actions = [choice.action(index, item) for item in range(len(block.items))]
    away = sum(
        item.nbytes
        for item, action in zip(block.items, actions, strict=True)
        if action != "keep" and item.read_by_backward
    )
    swapped = sum(item.nbytes for item, action in zip(block.items, actions, strict=True) if action in ("host", "nvme"))
    fetched = block.input_bytes if choice.input_place(index) != "device" and "recompute" in actions else 0
    return (away + block.working_bytes) // choice.slices + fetched + choice.in_flight * (swapped + fetched)
