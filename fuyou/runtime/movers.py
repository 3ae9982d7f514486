"""What moves a run's tensors, put together: the four residents, the stash, and the schedule where they meet."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn

from fuyou.core.config import Config
from fuyou.runtime.away import Away
from fuyou.runtime.committing import Committing
from fuyou.runtime.deciding import Deciding
from fuyou.runtime.gauges import AllocatorGauge, Gauge, ResidentGauge
from fuyou.runtime.measure import StepClock
from fuyou.runtime.micro_batch import MicroBatches
from fuyou.runtime.placing import Auto, Fixed, Placing
from fuyou.runtime.planned import Planned
from fuyou.runtime.profile import Profiler, Stopwatch
from fuyou.runtime.schedule import BlockCalls, Schedule
from fuyou.runtime.tiers import Tiers
from fuyou.swap.activations import HookStack
from fuyou.swap.book import TensorBook
from fuyou.swap.gradients import Gradients
from fuyou.swap.loader import Loader
from fuyou.swap.optimizer_state import StateAccess
from fuyou.swap.placement import PLACEMENTS
from fuyou.swap.stash import Stash
from fuyou.swap.unit import Unit
from fuyou.swap.updates import Updates
from fuyou.swap.weights import Swapper
from fuyou.tiers.scratch import Scratch


class Movers:
    """Made before anything is installed on the model. `units` have their homes; the tiers outlive this."""

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        planned: Planned,
        tiers: Tiers,
        committing: Committing,
        config: Config,
    ) -> None:
        plan, hooks, ledger = planned.plan, HookStack(), tiers.ledger
        self._units = units
        self._tiers = tiers
        self._committing = committing
        self.away = Away(ledger, hooks, planned.folders)
        self.gradients = Gradients(
            tiers.link, ledger, tiers.writes, drop_idle=lambda: self.swapper.drop_idle(),
            complete=lambda chunk: self.schedule.complete(chunk),
        )  # fmt: skip
        self.updates = Updates(
            tiers.kernels, tiers.buffers(plan.update_buffer_bytes, plan.staging.updates),
            handover=self.gradients.handover, commit=committing.commit if tiers.durable else None,
            complete=committing.complete, at_step=config.update == "step", deadline_s=tiers.deadline_s,
            in_flight=tiers.in_flight, races=tiers.races, recorder=tiers.recorder,
        )  # fmt: skip
        self.gradients.start(self.updates)
        inbound = plan.staging.inbound
        loader = Loader(
            tiers.link, tiers.buffers(plan.inbound_buffer_bytes, inbound) if tiers.link.is_cuda else None, count=inbound,
            settle=self.updates.settle, pending=self.updates.pending, in_flight=tiers.in_flight, races=tiers.races,
        )  # fmt: skip
        self.swapper = Swapper(
            device=tiers.link, ledger=ledger, loader=loader, writes=tiers.writes, claims=self.updates,
            limit_bytes=plan.slot_limit_bytes, bind=self.away.bind, unbind=self.away.unbind,
        )  # fmt: skip
        self.access = StateAccess(tiers.kernels, tiers.writes, self.updates)
        self.away.start(self.swapper, self.access)
        self.clock = StepClock(tiers.recorder)
        book, memory = TensorBook(ledger, tiers.link.device), plan.activations
        self.stash = Stash(
            tiers.link, ledger, book, piece_bytes=memory.piece_bytes, pool=tiers.pool,
            scratch=Scratch(tiers.store, "activations") if tiers.store is not None and memory.buffers else None,
            buffers=tiers.buffers(memory.piece_bytes, memory.buffers) if memory.buffers else None,
            stall=lambda: self.clock.stall("activations"), in_flight=tiers.in_flight, races=tiers.races,
        )  # fmt: skip
        self.gauge: Gauge = (
            AllocatorGauge(tiers.link.device, ledger, committed=lambda: tiers.committed_bytes, recorder=tiers.recorder)
            if tiers.link.is_cuda
            else ResidentGauge(ledger, committed=lambda: tiers.committed_bytes, recorder=tiers.recorder)
        )
        self.model_calls = BlockCalls(None, "the model", model, [unit for unit in units if not unit.owners])
        calls = [
            BlockCalls(index, each.name or "the model", each.module, [unit for unit in units if index in unit.owners])
            for index, each in enumerate(planned.blocks)
        ]
        self.schedule = Schedule(
            blocks=calls,
            units=list(units), swapper=self.swapper, gradients=self.gradients, updates=self.updates, away=self.away, book=book,
            stash=self.stash, hooks=hooks, clock=self.clock, gauge=self.gauge, device=tiers.link,
            placing=self._placing(planned, config), update=config.update,
            micro_batches=MicroBatches(config.micro_batch, calls, tiers.notes), traffic=tiers.traffic, recorder=tiers.recorder,
        )  # fmt: skip
        committing.attach(self.updates)
        if tiers.durable:
            self.schedule.restart = "The newest complete step is on the drives: Config(resume=True) goes on from it."

    def _placing(self, planned: Planned, config: Config) -> Placing:
        """Who says where activations go."""
        tiers = self._tiers
        self.deciding = Deciding(
            plan=planned.plan, numbers=planned.numbers, tiers=tiers, ledger=tiers.ledger, stash=self.stash,
            updates=self.updates, config=config, folder=planned.folders[0] if planned.folders else None,
        )  # fmt: skip
        if config.activations != "auto":
            return Fixed(config.activations, PLACEMENTS[config.activations])
        held = tiers.ledger.watermark("device")
        return Auto(
            self.deciding,
            lambda: Profiler(tiers.link.device, self.clock.stalled_s, held.take),
            Stopwatch(tiers.link.device),
        )

    def close(self) -> None:
        """Give back what the residents hold; the tiers themselves close after this."""
        with contextlib.ExitStack() as closing:
            for unit in self._units:
                for chunk in unit.chunks:
                    for each in (chunk.weights, chunk.state, chunk.gradient):
                        if each is not None:
                            closing.callback(each.release)
            closing.callback(self.swapper.close)
            closing.callback(self._committing.close)
            closing.callback(self.updates.close)
            closing.callback(self.gradients.close)
            closing.callback(self.stash.close)
            closing.callback(self._tiers.writes.drain)
        for unit in self._units:
            unit.chunks.clear()
