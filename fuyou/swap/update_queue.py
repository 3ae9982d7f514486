"""What is in the queue of updates, and what becomes of it."""

from __future__ import annotations

import enum
import heapq
import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping

from fuyou.core.errors import StateError
from fuyou.core.ticket import DONE, AllOf, Failed, Ticket
from fuyou.swap.buffers import Buffers
from fuyou.swap.unit import Chunk, Member
from fuyou.swap.update import MemberUpdate, Phase, StepUpdates, Update
from fuyou.tiers.host import Lease

READ_AHEAD = 8  # updates that may wait for the kernels: a more urgent one waits for these


class Kind(enum.IntEnum):
    """What is in the queue."""

    UPDATE = 0
    THROUGH = 1


class UpdateQueue:
    """Everything here is done under `_changed`, which is told of every change; nothing here waits, reads or computes.

    `counts` of chunks, since the run began: guessed, accepted, dropped (guesses), deferred (not guessed, or wrongly).
    `failure`: why an update of a step could not be made; the weights are then partly those of before the step.
    """

    def __init__(self, buffers: Buffers, commit: Callable[[int], Ticket] | None, *, at_step: bool) -> None:
        self._buffers = buffers
        self._commit = commit
        self._at_step = at_step
        self._changed = threading.Condition()
        self._queue: list[tuple] = []  # a heap of (step, not urgent, kind, place, number, Update or Range)
        self._numbers = itertools.count()
        self._updates: dict[Chunk, Update] = {}  # not ended
        self._holding: dict[Update, None] = {}  # QUEUED ones that hold a gradient
        self._read: deque[Update] = deque()  # READING, in the order in which they were begun
        self._steps: dict[int, StepUpdates] = {}  # those of which something is left to do, in their order
        self._committed: Ticket = DONE  # of the last step of which nothing is
        self._at_commit: tuple[int, Callable[[Ticket], None]] | None = None  # of a step of which something is
        self.step = 0  # steps asked for
        self.counts = dict.fromkeys(("guessed", "accepted", "dropped", "deferred"), 0)
        self.failure: BaseException | None = None

    def _put(self, update: Update) -> None:
        self._updates[update.chunk] = update
        if update.gradient is not None:
            self._holding[update] = None
        heapq.heappush(self._queue, (update.step, True, Kind.UPDATE, update.chunk.place, next(self._numbers), update))

    def _hurry(self, update: Update) -> None:
        if update.phase is Phase.QUEUED:
            heapq.heappush(
                self._queue, (update.step, False, Kind.UPDATE, update.chunk.place, next(self._numbers), update)
            )
            self._changed.notify_all()

    def _make_firm(self, update: Update, wanted: Mapping[Member, MemberUpdate]) -> bool:
        """The step wants this of a chunk that was guessed. False: it must be done anew."""
        right = update.wanted == wanted
        self.counts["accepted" if right else "dropped"] += 1
        if update.phase in (Phase.QUEUED, Phase.READING):  # not computed yet: what is wanted is computed
            update.wanted, update.firm = wanted, True
            self.counts["deferred"] += not right
            return True
        if not right:
            self._discard(update)
            return False
        update.firm = True
        if update.phase is Phase.AHEAD:
            for each in update.chunk.rewritten:
                each.accept()
            self._publish(update)
        return True

    def _drop(self, update: Update) -> None:
        self.counts["dropped"] += 1
        self._discard(update)

    def _discard(self, update: Update) -> None:
        """A guess that is not wanted: forgotten, now or by the thread that has it."""
        update.rejected = True
        self._updates.pop(update.chunk, None)
        if update.phase is Phase.AHEAD:
            for each in update.chunk.rewritten:
                each.drop()
        if update.phase in (Phase.QUEUED, Phase.AHEAD):
            self._release(update)

    def _publish(self, update: Update) -> None:
        """The bytes of now are those after the update's step."""
        step = self._steps[update.step]
        step.unpublished -= 1
        step.nonfinite |= update.nonfinite
        step.record["nonfinite_gradients"] = len(step.nonfinite)
        for each in update.chunk.rewritten:
            if each.through is not None:
                step.unwritten += 1
                heapq.heappush(
                    self._queue, (update.step, True, Kind.THROUGH, update.chunk.place, next(self._numbers), each)
                )
        self._updates.pop(update.chunk, None)
        self._release(update)
        self._end_steps()
        self._changed.notify_all()

    def _end_steps(self) -> None:
        """Steps that are over, in their order: one in which nothing had a gradient is over at once."""
        while self._steps:
            number, step = next(iter(self._steps.items()))
            if step.unpublished or step.unwritten or not step.captured:
                return
            del self._steps[number]
            if self._commit is not None and self.failure is None:
                self._committed = self._commit(number)
            self._tell_commit(number)
            self._changed.notify_all()

    def _tell_commit(self, step: int) -> None:
        """Whoever wants to know of the step's commit is told: that it has begun, or never will."""
        if self._at_commit is not None and self._at_commit[0] <= step:
            (number, told), self._at_commit = self._at_commit, None
            error = self.failure or StateError(f"Step {number} was not committed: the run ended before.")
            told(Failed(error) if self.failure is not None or number in self._steps else self._committed)

    def _release(self, update: Update) -> None:
        """→ ENDED."""
        update.phase = Phase.ENDED
        self._holding.pop(update, None)
        for staging in (update.gradient, update.staging):
            if staging is not None:
                staging.release()
        update.gradient = update.staging = None

    def _pending(self, chunk: Chunk | None) -> bool:
        if self.failure is not None:
            return False
        if chunk is None:
            return any(step.unpublished for step in self._steps.values())
        update = self._updates.get(chunk)
        return update is not None and update.firm

    def _first(self) -> bool:
        """There is something to do at the queue's head. What was dropped, or put there twice, is taken off."""
        while self._queue:
            kind, item = self._queue[0][2], self._queue[0][5]
            if kind is Kind.THROUGH:
                return True
            if item.phase is Phase.QUEUED:
                return len(self._read) < READ_AHEAD
            heapq.heappop(self._queue)
        return False

    def _checkpoint(self) -> Ticket:
        """What the queue's head waits for beside commits: a checkpoint copies what it will write over."""
        kind, item = self._queue[0][2], self._queue[0][5]
        if kind is Kind.THROUGH:
            return item.pinned()
        return AllOf([each.pinned() for each in item.chunk.rewritten if not each.on_host])

    def _take_first(self, buffer: Lease | None) -> Update | None:
        """The first update there is now: while a buffer was waited for, a more urgent one may have come, or none be left."""
        with self._changed:
            if self._first() and self._queue[0][2] is Kind.UPDATE and self._checkpoint().done():
                update = self._queue[0][5]
                if not (update.firm or all(each.can_write_ahead for each in update.chunk.rewritten)):
                    self._drop(update)  # what the user wrote is in the place that a guess would need
                elif update.needs_buffer == (buffer is not None):
                    heapq.heappop(self._queue)
                    update.phase = Phase.READING
                    self._holding.pop(update, None)
                    return update
        if buffer is not None:
            self._buffers.put(buffer, [])
        return None

    def _take_read(self) -> None:
        self._read.popleft()
        self._changed.notify_all()
