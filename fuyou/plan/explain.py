"""What bounds a step and what would help, in words: each gain is the cost model asked again, not a guess."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from fuyou.core.sizes import format_bytes
from fuyou.plan.cost import BlockNumbers, Prediction, Question, peak_bytes, predict

WORDS = {
    "compute": "compute on the device",
    "host_to_device": "the link from host to device",
    "device_to_host": "the link from device to host",
    "nvme": "the drives",
    "adam": "the update's traffic in host memory",
}


WORTH = 1.03  # a gain below this is not worth saying
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the state that is not in host memory, for which more of it is tried
NEARLY_ALL = 0.9  # of a gain


@dataclass(frozen=True)
class Remedy:
    """A change, and how many times as fast a row of the batch is trained with it."""

    change: str
    gain: float


def remedies(prediction: Prediction) -> list[Remedy]:
    """What would make training at least 3 % faster, best first; each predicted, with activations as they were chosen.

    Where two resources bind at once no single change helps: then pairs.
    """
    question = prediction.question
    changes = [_drives, _device, _link, _memory_bandwidth, _host_memory, _batch]
    others = [change for change in changes if change is not _host_memory]
    single = [found for change in others if (found := _gain(prediction, change(question))) is not None]
    single += _amounts_of_host_memory(prediction)
    pairs = [
        found
        for one, other in itertools.combinations(changes[:-1], 2)
        if not single and (found := _gain(prediction, one(question), other)) is not None
    ]
    return sorted(single or pairs, key=lambda each: -each.gain)


# Each change: the question with it, its words, and how many times the rows; None where it means nothing.
Change: TypeAlias = "tuple[Question, str, int] | None"


def _gain(prediction: Prediction, change: Change, more: Callable[[Question], Change] | None = None) -> Remedy | None:
    if change is not None and more is not None:
        further = more(change[0])
        change = (further[0], f"{change[1]} and {further[1]}", change[2]) if further is not None else None
    if change is None:
        return None
    its, words, rows = change
    after = predict(its.machine, its.blocks, its.choice, its.traffic)
    if rows > 1 and after.tier_bytes("device") > its.machine.device_bytes:
        return None
    gain = rows * prediction.seconds_per_step / after.seconds_per_step
    return Remedy(words, gain) if gain >= WORTH else None


def _drives(question: Question) -> Change:
    """With an array whose cap is doubled too: more drives on one cap is what `fuyou plan --drives` is for."""
    machine = question.machine
    if not machine.drives:
        return None
    twice = replace(machine, drives=machine.drives * 2, array_bytes_per_s=machine.array_bytes_per_s * 2)
    return replace(question, machine=twice), "twice the drives", 1


def _device(question: Question) -> Change:
    blocks = tuple(
        replace(
            each,
            forward_s=each.forward_s / 2,
            backward_s=each.backward_s / 2,
            items=tuple(replace(item, recompute_s=item.recompute_s / 2) for item in each.items),
        )
        for each in question.blocks
    )
    return replace(question, blocks=blocks), "a device twice as fast", 1


def _link(question: Question) -> Change:
    there, back = question.machine.host_to_device_bytes_per_s, question.machine.device_to_host_bytes_per_s
    machine = replace(question.machine, host_to_device_bytes_per_s=2 * there, device_to_host_bytes_per_s=2 * back)
    return replace(question, machine=machine), "twice the link", 1


def _memory_bandwidth(question: Question) -> Change:
    machine = replace(question.machine, dram_bytes_per_s=2 * question.machine.dram_bytes_per_s)
    return replace(question, machine=machine), "twice the memory bandwidth", 1


def _host_memory(question: Question, part: float = 1.0) -> Change:
    """Memory for `part` of the state that is not there yet."""
    before = question.choice
    weights, gradients, state = (
        share + part * (1 - share) for share in (before.host_weights, before.host_gradients, before.host_state)
    )
    if before.host_weights == before.host_gradients == before.host_state == 1:
        return None
    its = replace(question, choice=replace(before, host_weights=weights, host_gradients=gradients, host_state=state))
    held = _in_host_memory(its)
    whole = _in_host_memory(replace(question, choice=replace(before, host_weights=1, host_gradients=1, host_state=1)))
    more = held - _in_host_memory(question)
    what = "all" if part == 1 else f"{held / whole:.0%}"
    return its, f"{format_bytes(more)} more ram, to keep {what} of the model's state in memory", 1


def _in_host_memory(question: Question) -> int:
    """Bytes of the model's state there."""
    held = peak_bytes(question.machine, question.blocks, question.choice, question.traffic)["host"]
    return sum(held[kind] for kind in ("weights", "gradients", "optimizer"))


def _amounts_of_host_memory(prediction: Prediction) -> list[Remedy]:
    """The least amount that is worth saying, and the least that helps nearly as much as room for all of the state."""
    tried = [_gain(prediction, _host_memory(prediction.question, part)) for part in PARTS]
    found = [each for each in tried if each is not None]
    if not found:
        return []
    enough = next(each for each in found if each.gain - 1 >= NEARLY_ALL * (found[-1].gain - 1))
    return [found[0]] if enough is found[0] else [found[0], enough]


def _batch(question: Question) -> Change:
    return replace(question, blocks=tuple(_doubled(each) for each in question.blocks)), "twice the batch", 2


def explain(prediction: Prediction) -> str:
    """What bounds the step, how busy everything is, and what would help, in words."""
    total = prediction.seconds_per_step
    shares = sorted(prediction.busy_s.items(), key=lambda each: -each[1])
    busy = ", ".join(f"{WORDS[name]} {value / total:.0%}" for name, value in shares if value >= 0.005 * total)
    text = f"The step is bound by {WORDS[prediction.bound_by]}. Of {total:.3g} s a step, busy: {busy}."
    helping = remedies(prediction)[:3]
    if not helping:
        return f"{text} No change of the machine that was tried would make it 3 % faster."
    return f"{text} What would help: {'; '.join(f'{each.change}, {each.gain:.2f} times as fast' for each in helping)}."


def _doubled(block: BlockNumbers) -> BlockNumbers:
    """The block with twice the rows."""
    items = tuple(replace(each, nbytes=each.nbytes * 2, recompute_s=each.recompute_s * 2) for each in block.items)
    return replace(
        block,
        forward_s=block.forward_s * 2,
        backward_s=block.backward_s * 2,
        input_bytes=block.input_bytes * 2,
        working_bytes=block.working_bytes * 2,
        items=items,
    )
