"""From what a run measures to the plans for its activations: the machine's rates, the room, the cost model's answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import torch

from fuyou.core.config import Config
from fuyou.core.ledger import Ledger
from fuyou.core.sizes import align_up
from fuyou.plan.activations import Room, fixed_activations
from fuyou.plan.candidates import Candidate, Measured, Operation, candidates, numbers_of
from fuyou.plan.cost import FUYOU_BF16, FUYOU_FP32, Choice, Prediction, Traffic, predict
from fuyou.plan.explain import explain
from fuyou.plan.machine import Drive, Machine
from fuyou.plan.phases import Update
from fuyou.plan.planner import KINDS, Plan, UnitNumbers, chunk_spans
from fuyou.runtime.placing import Decided
from fuyou.runtime.placing import Plan as ActivationPlan
from fuyou.runtime.profile import BlockProfile, StepProfile
from fuyou.runtime.remembered import Remembered
from fuyou.runtime.tiers import Tiers
from fuyou.swap.placement import Placement
from fuyou.swap.rates import Rates
from fuyou.swap.stash import Stash
from fuyou.swap.updates import Updates
from fuyou.tiers.scratch import REGION_BYTES

MARGIN = 0.05  # of the device's budget that no plan takes: batches of one size do not need the same to the byte
UNKNOWN_DRAM_BYTES_PER_S = 20e9  # until an update has been timed
UNKNOWN_DRIVE_BYTES_PER_S = 2e9

_UPDATES: dict[str, Update] = {
    "step": "step",
    "deferred": "deferred",
    "speculative": "speculative",
    "auto": "speculative",
}


class Deciding:
    """Answers the questions of runtime/placing.py's Auto for one run. `folder`: where plans are remembered, or None."""

    def __init__(
        self, *, plan: Plan, numbers: Sequence[UnitNumbers], tiers: Tiers, ledger: Ledger, stash: Stash, updates: Updates,
        config: Config, folder: str | None,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._numbers = numbers
        self._tiers = tiers
        self._ledger = ledger
        self._stash = stash
        self._updates = updates
        self._config = config
        self._remembered = Remembered(folder, self._key())

    def device_room(self) -> int:
        """Bytes that could stay on the device now."""
        return self._ledger.room("device") - int(MARGIN * self._ledger.budgets["device"])

    def decide(self, step: StepProfile) -> list[ActivationPlan]:
        """The plans that have room; none where nothing but recomputing has. The cost model is held to what the watched steps
        took: what it leaves out comes on top of every plan, and where it says more (Adam and compute were timed beside each
        other, on the same cores) everything is as much quicker."""
        measured = [self._measured(index, step.blocks[index], step.backwards) for index in sorted(step.blocks)]
        self._updates.pause()  # what the drives can do is measured while they do nothing else
        rates = self._stash.rates()
        machine, choice, traffic = self._machine(rates), self._choice(step.backwards), self._traffic()
        whole = [numbers_of(each) for each in measured]
        watched = fixed_activations(machine, whole, choice, "recompute", traffic)
        left_out_s = step.seconds - watched.prediction.seconds_per_step
        if left_out_s >= 0:
            machine = replace(machine, tail_s=left_out_s)
        elif step.seconds > 0:
            share = step.seconds / watched.prediction.seconds_per_step
            machine, measured = quicker(machine, share), [quicker_block(each, share) for each in measured]
        found = candidates(machine, measured, choice, self._room(measured, rates), traffic)
        return [_plan_of(each, measured, self._peaks(each.prediction, watched.prediction, step)) for each in found]

    def account(
        self, blocks: Mapping[int, tuple[float, float]], seconds: float, backwards: int, rates: Rates
    ) -> Prediction:
        """What the cost model says of steps as they were: `blocks` gives, by index, a block's seconds of compute in all
        forwards and in all backwards of a step, recomputation with them. Held to the step's `seconds` as `decide` is."""
        numbers = [
            numbers_of(self._measured(index, BlockProfile(*each), backwards)) for index, each in sorted(blocks.items())
        ]
        numbers = [replace(each, items=()) for each in numbers]
        machine, choice, traffic = self._machine(rates), self._choice(backwards), self._traffic()
        first = predict(machine, numbers, choice, traffic)
        if seconds >= first.seconds_per_step:
            machine = replace(machine, tail_s=seconds - first.seconds_per_step)
        else:
            share = seconds / first.seconds_per_step
            machine = quicker(machine, share)
            numbers = [
                replace(each, forward_s=share * each.forward_s, backward_s=share * each.backward_s) for each in numbers
            ]
        return predict(machine, numbers, choice, traffic)

    def prepare(self, plan: ActivationPlan) -> None:
        """Called before a plan is followed: where it has use for host memory, that is taken now."""
        if any(
            "host" in (each.saved, each.inputs, *(tier for _, tier in each.results))
            for each in plan.placements.values()
        ):
            self._stash.use_pool(self._tiers.open_pool())

    def recall(self, size: int) -> Decided | None:
        """What an earlier run settled on for batches of `size`, if this one's tiers have the room that it takes."""
        decided = self._remembered.recall(size)
        if decided is None or any(
            nbytes > self._ledger.budgets[tier] for tier, nbytes in decided.plan.peak_bytes.items()
        ):
            return None
        return decided

    def remember(self, size: int, decided: Decided) -> None:
        """For the next run."""
        self._remembered.remember(size, decided)

    def _key(self) -> dict[str, Any]:
        """All that a plan depends on, but the size of the batch."""
        return {
            "units": [[each.name, each.elements, each.itemsize, each.trainable] for each in self._numbers],
            "budgets": {tier: self._ledger.budgets[tier] for tier in ("device", "host")},
            "device": str(self._tiers.link.device),
            "drives": len(self._tiers.store.drives) if self._tiers.store is not None else 0,
            "config": [self._config.update, self._config.durability, self._config.micro_batch],
            "torch": torch.__version__,
        }

    # Numbers ---------------------------------------------------------------------------------------------------------

    def _measured(self, index: int, profile: BlockProfile, backwards: int) -> Measured:
        """One forward and backward of a block: the step had so many."""
        mine = [each for each in self._numbers if index in each.owners]
        return Measured(
            index=index,
            elements=sum(each.elements for each in mine if each.trainable and each.owners[0] == index),
            weight_bytes=sum(each.weight_bytes for each in mine),
            forward_s=profile.forward_s / backwards,
            backward_s=max(0.0, profile.backward_s - profile.recompute_s) / backwards,
            recompute_s=profile.recompute_s / backwards,
            saved_bytes=profile.saved_bytes // backwards,
            input_bytes=profile.input_bytes // backwards,
            operations=tuple(
                Operation(ordinal, each.result_bytes // backwards, each.seconds / backwards, each.saved)
                for ordinal, each in sorted(profile.operations.items())
                if each.replaceable and each.result_bytes
            ),
        )

    def _machine(self, rates: Rates) -> Machine:
        is_cuda = self._tiers.link.is_cuda
        store = self._tiers.store
        # Where no activation can go to the drives the state does all the same, at a speed that only matters to what is said.
        known = store.drives[0].bytes_per_s * len(store.drives) if store is not None else 0.0
        read, write = rates.nvme_read_bytes_per_s, rates.nvme_write_bytes_per_s
        usual = known or UNKNOWN_DRIVE_BYTES_PER_S
        drive = Drive(read or usual, write or usual, self._ledger.budgets["nvme"])
        return Machine(
            name="this machine", flops_per_s=1.0, device_bytes=self._ledger.budgets["device"],
            host_to_device_bytes_per_s=rates.in_bytes_per_s, device_to_host_bytes_per_s=rates.out_bytes_per_s,
            host_bytes=self._ledger.budgets["host"], dram_bytes_per_s=self._dram_bytes_per_s(),
            cores=psutil.cpu_count(logical=False) or 1, drives=(drive,) if store is not None else (),
            shared_compute=not is_cuda,
        )  # fmt: skip

    def _dram_bytes_per_s(self) -> float:
        elements = sum(each.elements for each in self._numbers if each.optimized)
        seconds = self._updates.seconds["adam"]
        if not seconds or not self._updates.step:
            return UNKNOWN_DRAM_BYTES_PER_S
        return self._updates.step * elements * self._traffic().dram_bytes / seconds

    def _traffic(self) -> Traffic:
        return FUYOU_BF16 if any(each.itemsize == 2 for each in self._numbers) else FUYOU_FP32

    def _choice(self, backwards: int) -> Choice:
        on_host, total = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
        for index, unit in enumerate(self._numbers):
            for number, (_, count) in enumerate(chunk_spans(unit.elements, self._plan.chunk_elements)):
                for kind in KINDS:
                    nbytes = unit.bytes_of(kind, count)
                    total[kind] += nbytes
                    on_host[kind] += nbytes if (index, number) in self._plan.on_host else 0
        share = {kind: on_host[kind] / total[kind] if total[kind] else 1.0 for kind in KINDS}
        return Choice(
            host_weights=share["weights"], host_gradients=share["gradients"], host_state=share["optimizer"],
            update=_UPDATES[self._config.update], durable=self._plan.through, accumulation=backwards,
        )  # fmt: skip

    def _peaks(self, plan: Prediction, watched: Prediction, step: StepProfile) -> dict[str, int]:
        """Of each tier: what it held at its peak while everything was recomputed, with other activations."""
        tiers = self._ledger.summary()

        def more(tier: str) -> int:
            return plan.peak_bytes[tier]["activations"] - watched.peak_bytes[tier]["activations"]

        # When forward ends all waits, and nothing runs; when the first block's backward has run, less waits.
        forward = step.forward_bytes + plan.forward_bytes - watched.forward_bytes
        backward = step.backward_bytes + more("device")
        return {
            "device": tiers["device"]["reserve_bytes"] + max(forward, backward),
            "host": tiers["host"]["peak_bytes"] + more("host"),
            "nvme": self._ledger.held("nvme") + align_up(more("nvme"), REGION_BYTES),
        }

    def _room(self, measured: Sequence[Measured], rates: Rates) -> Room:
        """Beside what a step held at its peak when everything was recomputed; the inputs it held are the plan's to place."""
        tiers = self._ledger.summary()
        budget = tiers["device"]["budget_bytes"]
        free = max(0, budget - tiers["device"]["peak_bytes"] - int(MARGIN * budget))
        return Room(
            device_bytes=free + sum(each.input_bytes for each in measured),
            # A storage begins a page of its own: as many bytes do not all fit.
            host_bytes=int(0.9 * self._tiers.pool_room_bytes),
            nvme_bytes=int(0.95 * self._ledger.room("nvme")) if rates.nvme_read_bytes_per_s else 0,
            swapped_bytes_per_block=free + max((each.input_bytes for each in measured), default=0),
        )


def quicker(machine: Machine, share: float) -> Machine:
    """Everything that it moves takes `share` of the time."""
    return replace(
        machine,
        host_to_device_bytes_per_s=machine.host_to_device_bytes_per_s / share,
        device_to_host_bytes_per_s=machine.device_to_host_bytes_per_s / share,
        dram_bytes_per_s=machine.dram_bytes_per_s / share,
        drives=tuple(
            replace(
                each, read_bytes_per_s=each.read_bytes_per_s / share, write_bytes_per_s=each.write_bytes_per_s / share
            )
            for each in machine.drives
        ),
    )


def quicker_block(block: Measured, share: float) -> Measured:
    """Everything that it computes takes `share` of the time."""
    return replace(
        block,
        forward_s=share * block.forward_s,
        backward_s=share * block.backward_s,
        recompute_s=share * block.recompute_s,
        operations=tuple(replace(each, seconds=share * each.seconds) for each in block.operations),
    )


def _plan_of(candidate: Candidate, measured: Sequence[Measured], peak_bytes: Mapping[str, int]) -> ActivationPlan:
    placements = {
        block.index: Placement(saved, inputs if saved == "recompute" else "device", tuple(sorted(results.items())))
        for block, saved, inputs, results in zip(
            measured, candidate.saved, candidate.inputs, candidate.results, strict=True
        )
    }
    return ActivationPlan(candidate.name, placements, candidate.seconds, explain(candidate.prediction), peak_bytes)
