"""What bounds a step and what would help, in words: each gain is the cost model asked again, not a guess."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fuyou.core.sizes import format_bytes
from fuyou.plan.cost import BlockNumbers, Choice, Item, Prediction, predict
from fuyou.plan.machine import Machine

_WORDS = {
    "compute": "compute on the device",
    "host_to_device": "the link from host to device",
    "device_to_host": "the link from device to host",
    "nvme": "the drives",
    "adam": "the update's traffic in host memory",
}


@dataclass(frozen=True)
class Remedy:
    """A change, and the seconds a step (and a row of the batch, where that changes) that the model predicts for it."""

    change: str
    gain: float  # 1.25: a quarter faster, per row


def remedies(prediction: Prediction) -> list[Remedy]:
    """What would make a step at least 3 % faster, best first; each predicted, with activations as they were chosen."""
    question = prediction.question
    machine, blocks, choice, traffic = question.machine, question.blocks, question.choice, question.traffic
    before = prediction.seconds_per_step
    tried: list[tuple[str, Prediction, float]] = []

    def attempt(change: str, machine: Machine, choice: Choice, blocks: Sequence[BlockNumbers], rows: float = 1) -> None:
        tried.append((change, predict(machine, blocks, choice, traffic), rows))

    if machine.drives:
        faster = replace(
            machine, drives=machine.drives * 2, array_bytes_per_s=machine.array_bytes_per_s * 2
        )  # an array's cap is doubled too: twice as many drives on one cap is what `fuyou plan --drives` is for
        attempt("twice the drives", faster, choice, blocks)
    quick = [
        replace(each, forward_s=each.forward_s / 2, backward_s=each.backward_s / 2, items=_halved(each.items))
        for each in blocks
    ]
    attempt("a device twice as fast", machine, choice, quick)
    h2d, d2h = machine.host_to_device_bytes_per_s * 2, machine.device_to_host_bytes_per_s * 2
    attempt(
        "twice the link",
        replace(machine, host_to_device_bytes_per_s=h2d, device_to_host_bytes_per_s=d2h),
        choice,
        blocks,
    )
    attempt(
        "twice the memory bandwidth", replace(machine, dram_bytes_per_s=machine.dram_bytes_per_s * 2), choice, blocks
    )
    if min(choice.host_weights, choice.host_gradients, choice.host_state) < 1:
        home = replace(choice, host_weights=1.0, host_gradients=1.0, host_state=1.0)
        needed = predict(machine, blocks, home, traffic).tier_bytes("host")
        attempt(f"ram for weights, gradients and state ({format_bytes(needed)} in all)", machine, home, blocks)
    attempt("twice the batch, where it fits", machine, choice, [_doubled(each) for each in blocks], rows=2)
    found = [Remedy(change, rows * before / after.seconds_per_step) for change, after, rows in tried]
    return sorted((each for each in found if each.gain >= 1.03), key=lambda each: -each.gain)


def explain(prediction: Prediction) -> str:
    """What bounds the step, how busy everything is, and what would help, in words."""
    total = prediction.seconds_per_step
    shares = sorted(prediction.busy_s.items(), key=lambda each: -each[1])
    busy = ", ".join(f"{_WORDS[name]} {value / total:.0%}" for name, value in shares if value >= 0.005 * total)
    text = f"The step is bound by {_WORDS[prediction.bound_by]}. Of {total:.3g} s a step, busy: {busy}."
    help_ = remedies(prediction)[:3]
    if not help_:
        return f"{text} No single change of the machine would make it 3 % faster."
    return f"{text} What would help: {'; '.join(f'{each.change}, {each.gain:.2f} times as fast' for each in help_)}."


def _halved(items: tuple[Item, ...]) -> tuple[Item, ...]:
    return tuple(replace(each, recompute_s=each.recompute_s / 2) for each in items)


def _doubled(block: BlockNumbers) -> BlockNumbers:
    """The block with twice the rows."""
    items = tuple(Item(each.name, each.nbytes * 2, each.recompute_s * 2) for each in block.items)
    return replace(
        block,
        forward_s=block.forward_s * 2,
        backward_s=block.backward_s * 2,
        input_bytes=block.input_bytes * 2,
        working_bytes=block.working_bytes * 2,
        items=items,
    )
