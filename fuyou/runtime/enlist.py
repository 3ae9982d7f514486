"""Homes for what is trained later than planned: parameters that are unfrozen, or added to the optimizer, while wrapped."""

from __future__ import annotations

from collections.abc import Callable

from fuyou.runtime.tiers import Tiers
from fuyou.swap.ranges import Range
from fuyou.swap.unit import Member, chunks_of
from fuyou.swap.updates import Updates
from fuyou.tiers.store import Extent


class Enlisting:
    """Gives single parameters, chunk by chunk, what their unit was planned without; other parameters stay as they are.

    Both verbs are idempotent, change nothing that is under way (nobody uses a range that is not there yet), and raise
    BudgetError or StoreError where there is no room, which is before any update: what was given by then is kept.
    """

    def __init__(self, tiers: Tiers, updates: Updates, watch: Callable[[Member], None]) -> None:
        self._tiers = tiers
        self._updates = updates
        self._watch = watch

    def gradient(self, member: Member) -> None:
        """A home for its gradient, and hooks that send it there."""
        for chunk in chunks_of(member):
            if chunk.gradient is None:
                nbytes = chunk.count * member.unit.dtype.itemsize
                chunk.gradient = Range(nbytes, self._tiers.home(nbytes, "gradients", 1, member.name))
        if member.parameter.requires_grad:
            self._watch(member)

    def state(self, member: Member) -> None:
        """A home for its optimizer state, which starts from zeros, and for its gradient. In bf16 its master is the weight."""
        self.gradient(member)
        for chunk in chunks_of(member):
            self._updates.claim(chunk)  # of other parameters in it
            if chunk.state is None:
                nbytes = chunk.count * member.unit.state_bytes_per_element
                chunk.state = Range(nbytes, self._tiers.home(nbytes, "optimizer", self._tiers.state_slots, member.name))
            if isinstance(chunk.weights.home, Extent) and self._tiers.store is not None and self._tiers.state_slots > 1:
                self._tiers.store.add_slot(chunk.weights.home)  # from now on updates rewrite it
        member.optimized = True
