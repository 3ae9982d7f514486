"""Slots of a commit that stay as they are until they have been copied."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fuyou.core.errors import DeadlineError
from fuyou.core.ticket import DONE, Ticket

if TYPE_CHECKING:
    from fuyou.tiers.commits import Commit
    from fuyou.tiers.extents import Extent


class Pin:
    """The slots that a commit names of `extents`: none is written before it was let go of, in whatever order.

    One thread takes them, copies them and lets go. Whoever must write one waits for its ticket, and so makes it the next
    that is taken. Those of which the commit has no bytes are not pinned.
    """

    def __init__(self, commit: Commit, extents: Sequence[Extent], deadline_s: float) -> None:
        self.commit = commit
        self.deadline_s = deadline_s
        self.changed = threading.Condition()
        self._extents = {each.index: each for each in extents if commit.slot_of(each.index) >= 0}  # not let go of
        self._order = list(reversed(self._extents))  # not taken, the next one last
        self._urgent: list[int] = []

    def __str__(self) -> str:
        return f"the checkpoint of step {self.commit.step}"

    @property
    def extents(self) -> list[Extent]:
        """Not let go of yet, in their order."""
        return list(self._extents.values())

    def take(self) -> Extent | None:
        """The next to be copied: what somebody waits for, else in their order. None when all have been."""
        with self.changed:
            while self._urgent or self._order:
                index = (self._urgent or self._order).pop()
                if index in self._extents:
                    return self._extents[index]
            return None

    def let_go(self, extent: Extent) -> None:
        """It has been copied, and taken is another one next."""
        with self.changed:
            self._extents.pop(extent.index, None)
            self.changed.notify_all()

    def release(self) -> None:
        """Let go of all that is left."""
        with self.changed:
            self._extents.clear()
            self.changed.notify_all()

    def names(self, index: int, slot: int) -> bool:
        return index in self._extents and self.commit.names(index, slot)

    def ticket(self, index: int) -> Ticket:
        """What a write of the extent's pinned slot waits for."""
        return Pinned(self, index) if index in self._extents else DONE

    def hurry(self, index: int) -> None:
        with self.changed:
            self._urgent.insert(0, index)

    def holds(self, index: int) -> bool:
        return index in self._extents


class Pinned:
    """Done when an extent was let go of, copied or not: that a copy failed is told to whoever asked for it."""

    __slots__ = ("_index", "_pin")

    def __init__(self, pin: Pin, index: int) -> None:
        self._pin = pin
        self._index = index

    def __str__(self) -> str:
        return str(self._pin)

    def done(self) -> bool:
        return not self._pin.holds(self._index)

    def wait(self, timeout_s: float | None = None) -> None:
        if self.done():
            return
        self._pin.hurry(self._index)
        timeout_s = self._pin.deadline_s if timeout_s is None else timeout_s
        with self._pin.changed:
            if not self._pin.changed.wait_for(self.done, timeout_s):
                raise DeadlineError(f"Waited {timeout_s:g} s for {self._pin} to copy what is to be written next.")
