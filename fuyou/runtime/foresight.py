"""What backward may guess of the step to come: that a gradient is complete, and what step() will do with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from fuyou.swap.unit import Chunk, Member
from fuyou.swap.update import MemberUpdate

WRONG_IN_A_ROW = 2  # steps with a guess that was wrong, after which guessing pauses
LONGEST_PAUSE = 62  # steps


class Foresight:
    """Learns how often each parameter's gradient is summed in a step: that covers the backwards of a step and parameters
    that are reached several times in one. A chunk is complete when each of its parameters has been as often as last time.

    `planned(member)` is what a step() with the hyperparameters of now would do to a parameter, None for one that is in no
    group. With `patient` guessing pauses after steps that went otherwise: 2 steps, then 6, 14, … 62; a step that went as
    guessed begins anew.
    """

    def __init__(self, planned: Callable[[Member], MemberUpdate | None], *, patient: bool) -> None:
        self._planned = planned
        self._patient = patient
        self._seen: Counter[Member] = Counter()
        self._expected: Counter[Member] = Counter()
        self._wrong = 0
        self._pause = 0
        self._last_pause = 0

    def summed(self, member: Member) -> None:
        """A gradient has been summed into the parameter's."""
        self._seen[member] += 1

    def of(self, chunk: Chunk) -> dict[Member, MemberUpdate] | None:
        """What step() will want of a chunk whose gradient has come home; None where it is not complete, or nobody knows."""
        if self._pause or chunk.state is None:
            return None
        wanted = {}
        for member, _, _ in chunk.parts:
            expected = self._expected[member]
            if self._seen[member] != expected:
                return None
            if expected:
                update = self._planned(member)
                if update is None:
                    return None
                wanted[member] = update
        return wanted or None

    def end_step(self, wrong: bool) -> None:
        """A step is over; `wrong`: a guess of it was."""
        self._expected, self._seen = self._seen, Counter()
        if self._pause:
            self._pause -= 1
            return
        self._wrong = self._wrong + 1 if wrong else 0
        if not wrong:
            self._last_pause = 0
        elif self._patient and self._wrong >= WRONG_IN_A_ROW:
            self._pause = self._last_pause = min(2 * self._last_pause + 2, LONGEST_PAUSE)
            self._wrong = WRONG_IN_A_ROW - 1  # one more wrong step after the pause is enough for the next
