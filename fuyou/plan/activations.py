"""Which saved tensors are kept, swapped to host or NVMe, or recomputed: numbers in, a frozen answer out.

[Note: order] What is worth most is what spares the most seconds of recomputation a byte moved (in a GPT block the output of
the MLP's second product: 4 times the rest). Items are taken in that order: on the device while there is room, where they
move nothing; then to host memory, then to NVMe. Recomputation that is spared shrinks with each byte, and the traffic's
time grows, so the predicted time of a step is convex in what is taken, and the search stops where it stops falling
(the Fuyou paper, section 4; the same order and stop).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fuyou.plan.cost import (
    FUYOU_BF16,
    Action,
    BlockNumbers,
    Choice,
    Place,
    Prediction,
    Traffic,
    predict,
    step_seconds,
    swapped_bytes,
)
from fuyou.plan.machine import Machine

INPUT_ORDERS: tuple[tuple[Place, ...], ...] = (
    ("device", "host", "nvme"),
    ("host", "nvme", "device"),
    ("nvme", "host", "device"),
)


@dataclass(frozen=True)
class Room:
    """Bytes that activations may take while they wait for backward, of one device; and of one block, how many may be swapped
    (they are on the device until they have left, and again before they are needed)."""

    device_bytes: int
    host_bytes: int = 0
    nvme_bytes: int = 0
    swapped_bytes_per_block: int | None = None


@dataclass(frozen=True)
class Activations:
    """`actions` and `inputs` as Choice has them; `choice` is the given one with both; `device_bytes`, `host_bytes` and
    `nvme_bytes` wait there for backward."""

    actions: tuple[tuple[Action, ...], ...]
    inputs: tuple[Place, ...]
    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    choice: Choice
    prediction: Prediction

    @property
    def swapped_bytes(self) -> int:
        """Moved off the device and back."""
        return self.host_bytes + self.nvme_bytes


class NoRoom(Exception):
    """Even with everything recomputed the blocks' inputs have no place. `short_bytes`: of all three tiers together."""

    def __init__(self, short_bytes: int) -> None:
        super().__init__(f"{short_bytes} bytes short for the inputs of blocks")
        self.short_bytes = short_bytes


def choose_activations(
    machine: Machine,
    blocks: Sequence[BlockNumbers],
    choice: Choice,
    room: Room,
    traffic: Traffic = FUYOU_BF16,
) -> Activations:
    """The fastest of what the order above gives, for each way of placing the inputs; of equals the one that moves least.

    `choice` says everything else about the step; its actions and inputs are not looked at. NoRoom where the inputs of
    blocks have no place.
    """
    found: list[Activations] = []
    for places in INPUT_ORDERS:
        inputs, left = place_inputs(blocks, room, places)
        order = _order(blocks, room, left)
        found.append(_stop(machine, blocks, choice, traffic, inputs, order))
    return min(found, key=lambda each: (round(each.prediction.seconds_per_step, 9), each.swapped_bytes))


def fixed_activations(
    machine: Machine, blocks: Sequence[BlockNumbers], choice: Choice, action: Action, traffic: Traffic = FUYOU_BF16
) -> Activations:
    """Every item treated alike, whatever room there is: what a mode that the user fixes costs. Inputs go where swapped
    tensors do, or stay."""
    place: Place = "host" if action == "host" else "nvme" if action == "nvme" else "device"
    actions = tuple((action,) * len(each.items) for each in blocks)
    return _result(machine, blocks, choice, traffic, (place,) * len(blocks), actions)


def place_inputs(
    blocks: Sequence[BlockNumbers], room: Room, places: Sequence[Place]
) -> tuple[tuple[Place, ...], dict[Place, int]]:
    """Each input in the first of `places` that has room, and what is left in each; NoRoom."""
    left: dict[Place, int] = {"device": room.device_bytes, "host": room.host_bytes, "nvme": room.nvme_bytes}
    inputs: list[Place] = []
    for number, block in enumerate(blocks):
        if not block.items:
            inputs.append("device")  # recomputes nothing, needs none
            continue
        place = next((each for each in places if left[each] >= block.input_bytes), None)
        if place is None:
            needed = sum(each.input_bytes for each in blocks[number:] if each.items)
            raise NoRoom(needed - max(0, *left.values()))
        left[place] -= block.input_bytes
        inputs.append(place)
    return tuple(inputs), left


def _order(blocks: Sequence[BlockNumbers], room: Room, left: dict[Place, int]) -> list[tuple[int, int, Action]]:
    """(block, item, where to) in [Note: order], each in the first tier with room; what finds none is not in it.

    Of equals the last block's come first: it is needed again soonest, and what stays on the device is always there in time.
    """
    items = [
        (block, index, item)
        for block, each in enumerate(blocks)
        for index, item in enumerate(each.items)
        if item.recompute_s > 0
    ]
    items.sort(key=lambda each: (-each[2].recompute_s / max(each[2].nbytes, 1), -each[0], each[1]))
    left = dict(left)
    swapped = [0] * len(blocks)
    limit = math.inf if room.swapped_bytes_per_block is None else room.swapped_bytes_per_block
    tiers: tuple[tuple[Place, Action], ...] = (("device", "keep"), ("host", "host"), ("nvme", "nvme"))
    order: list[tuple[int, int, Action]] = []
    for block, index, item in items:
        for tier, action in tiers:
            if left[tier] < item.nbytes or (tier != "device" and swapped[block] + item.nbytes > limit):
                continue
            left[tier] -= item.nbytes
            swapped[block] += item.nbytes if tier != "device" else 0
            order.append((block, index, action))
            break
    return order


def _stop(
    machine: Machine,
    blocks: Sequence[BlockNumbers],
    choice: Choice,
    traffic: Traffic,
    inputs: tuple[Place, ...],
    order: Sequence[tuple[int, int, Action]],
) -> Activations:
    """All that stays on the device, which costs nothing, and the fastest prefix of the rest, the shortest of those."""
    kept = [each for each in order if each[2] == "keep"]
    moved = [each for each in order if each[2] != "keep"]
    tried: dict[int, float] = {}

    def chosen(count: int) -> tuple[tuple[Action, ...], ...]:
        actions: list[list[Action]] = [["recompute"] * len(each.items) for each in blocks]
        for block, index, action in (*kept, *moved[:count]):
            actions[block][index] = action
        return tuple(map(tuple, actions))

    def seconds(count: int) -> float:
        if count not in tried:
            plan = replace(choice, actions=chosen(count), inputs=inputs)
            tried[count] = round(step_seconds(machine, blocks, plan, traffic), 9)
        return tried[count]

    low, high = 0, len(moved)
    while low < high:  # convex: where one more does not help, no more does
        middle = (low + high) // 2
        if seconds(middle + 1) < seconds(middle):
            low = middle + 1
        else:
            high = middle
    return _result(machine, blocks, choice, traffic, inputs, chosen(low))


def _result(
    machine: Machine,
    blocks: Sequence[BlockNumbers],
    choice: Choice,
    traffic: Traffic,
    inputs: tuple[Place, ...],
    actions: tuple[tuple[Action, ...], ...],
) -> Activations:
    chosen = replace(choice, actions=actions, inputs=inputs)
    held = swapped_bytes(blocks, chosen)
    return Activations(
        actions, inputs, held["device"], held["host"], held["nvme"], chosen,
        predict(machine, blocks, chosen, traffic),
    )  # fmt: skip
