"""The plans for a run's activations that could be the fastest, from what its blocks were measured to cost. Numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fuyou.plan.activations import Activations, NoRoom, Room, choose_activations, fixed_activations
from fuyou.plan.cost import Action, BlockNumbers, Choice, Item, Prediction, Traffic
from fuyou.plan.machine import Machine

WORTH_TRYING = (
    1.3  # times the best prediction: the model is that far from the truth at most, or this is not worth a step
)
MOST_CANDIDATES = 4
REST = "rest"  # the name of the item that is all a block saves but results of costly operations


@dataclass(frozen=True)
class Operation:
    """A costly operation of a block: bytes of its result, its seconds, and whether backward reads the result."""

    ordinal: int
    result_bytes: int
    seconds: float
    saved: bool


@dataclass(frozen=True)
class Measured:
    """A block as it was watched, for one forward and backward. `saved_bytes`: without the inputs. Seconds: `backward_s`
    without the recomputation, which takes `recompute_s`."""

    index: int
    elements: int
    weight_bytes: int
    forward_s: float
    backward_s: float
    recompute_s: float
    saved_bytes: int
    input_bytes: int
    operations: tuple[Operation, ...]


@dataclass(frozen=True)
class Candidate:
    """`actions[i]` of the i-th block: (of what it saves beside results, {ordinal: tier of a result that is saved}); `inputs`
    as Choice has them."""

    name: str
    saved: tuple[str, ...]
    results: tuple[Mapping[int, str], ...]
    inputs: tuple[str, ...]
    prediction: Prediction

    @property
    def seconds(self) -> float:
        return self.prediction.seconds_per_step


def numbers_of(block: Measured) -> BlockNumbers:
    """Its items are the results of its operations, by ordinal, and the rest."""
    spared = sum(each.seconds for each in block.operations)
    # Operations were timed one by one, which takes longer than running them: never more than the whole.
    scale = min(1.0, block.recompute_s / spared) if spared > 0 else 0.0
    items = [
        Item(str(each.ordinal), each.result_bytes, scale * each.seconds, read_by_backward=each.saved)
        for each in block.operations
    ]
    saved = sum(each.result_bytes for each in block.operations if each.saved)
    rest = max(0, block.saved_bytes - saved) + block.input_bytes
    items.append(Item(REST, rest, max(0.0, block.recompute_s - scale * spared)))
    return BlockNumbers(
        str(block.index), block.elements, block.weight_bytes, block.forward_s, block.backward_s, block.input_bytes,
        tuple(items),
    )  # fmt: skip


def candidates(
    machine: Machine, blocks: Sequence[Measured], choice: Choice, room: Room, traffic: Traffic
) -> list[Candidate]:
    """All that have room, the fastest by the cost model first."""
    numbers = [numbers_of(each) for each in blocks]
    # Whole blocks: what backward reads is all that need be there, and no input beside it.
    whole = [_without_unread(each) for each in numbers]
    # The room is beside what recomputing everything holds; what is swapped is on the device before it has left and when it
    # is back, and that may be more.
    recomputed = fixed_activations(machine, whole, choice, "recompute", traffic)
    most = _on_device(recomputed) + room.device_bytes - sum(each.input_bytes for each in blocks)
    found: dict[str, Activations] = {}
    try:
        mixed = choose_activations(machine, numbers, choice, room, traffic)
        while _on_device(mixed) > most and mixed.device_bytes > 0:
            less = max(0, min(room.device_bytes, mixed.device_bytes) - (_on_device(mixed) - most))
            mixed = choose_activations(machine, numbers, choice, replace(room, device_bytes=less), traffic)
        found["mixed"] = mixed
    except NoRoom:
        if recomputed.device_bytes > room.device_bytes:
            return []
    fixed: tuple[tuple[str, Action, int], ...] = (
        ("recompute", "recompute", room.device_bytes),
        ("keep", "keep", room.device_bytes),
        ("host", "host", room.host_bytes),
        ("nvme", "nvme", room.nvme_bytes),
    )
    for name, action, limit in fixed:
        each = fixed_activations(machine, whole, choice, action, traffic)
        if max(each.device_bytes, each.host_bytes, each.nvme_bytes) <= limit:
            found[name] = each
    listed = [
        _candidate(name, each, whole if name != "mixed" else numbers)
        for name, each in found.items()
        if name in ("recompute", "keep") or _on_device(each) <= most
    ]
    listed.sort(key=lambda each: each.name == "mixed")  # of two that are alike, the name that says more
    unlike = [each for number, each in enumerate(listed) if not any(_alike(each, other) for other in listed[:number])]
    return sorted(unlike, key=lambda each: (each.name != "keep", each.seconds))


def worth_trying(plans: Sequence[tuple[str, float]]) -> int:
    """How many of plans, by name and predicted seconds, best first, the cost model cannot tell apart well enough. Where all
    can be kept nothing moves and nothing is repeated, and there is nothing to try."""
    if plans and plans[0][0] == "keep":
        return 1
    return sum(seconds <= WORTH_TRYING * plans[0][1] for _, seconds in plans[:MOST_CANDIDATES])


def _on_device(activations: Activations) -> int:
    return activations.prediction.peak_bytes["device"]["activations"]


def _without_unread(block: BlockNumbers) -> BlockNumbers:
    items = tuple(each for each in block.items if each.read_by_backward)
    lost = sum(each.recompute_s for each in block.items if not each.read_by_backward)
    *others, rest = items
    rest = Item(rest.name, rest.nbytes, rest.recompute_s + lost)
    return BlockNumbers(
        block.name, block.elements, block.weight_bytes, block.forward_s, block.backward_s, block.input_bytes,
        (*others, rest), block.working_bytes, block.tied_bytes,
    )  # fmt: skip


def _candidate(name: str, activations: Activations, blocks: Sequence[BlockNumbers]) -> Candidate:
    saved: list[str] = []
    results: list[Mapping[int, str]] = []
    for block, actions in zip(blocks, activations.actions, strict=True):
        its = dict(zip((each.name for each in block.items), actions, strict=True))
        rest = its.pop(REST)
        read = {each.name for each in block.items if each.read_by_backward} - {REST}
        if any(its[each] == "recompute" for each in read):
            rest = "recompute"  # a part of it must run again, and that needs no more than the input
        tiers = {
            int(ordinal): "device" if tier == "keep" else tier for ordinal, tier in its.items() if tier != "recompute"
        }
        saved.append(rest)
        results.append({ordinal: tier for ordinal, tier in tiers.items() if rest == "recompute" or tier != _tier(rest)})
    return Candidate(name, tuple(saved), tuple(results), activations.inputs, activations.prediction)


def _tier(action: str) -> str:
    return "device" if action == "keep" else action


def _alike(one: Candidate, other: Candidate) -> bool:
    return (one.saved, one.results) == (other.saved, other.results) and all(
        saved != "recompute" or mine == its
        for saved, mine, its in zip(one.saved, one.inputs, other.inputs, strict=True)
    )
