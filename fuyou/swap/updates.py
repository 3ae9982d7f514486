"""The optimizer's updates as one queue, worked off by two threads beside forward and backward.

[Note: guesses] PyTorch puts the update at `step()`. An update that is asked for there is *firm*, and runs under the next
forward, ahead of its chunk's next use. One that is put in the queue before, during backward, is a *guess*: that the
gradient is complete, that `step()` will come with these hyperparameters, and that until then nobody changes the gradient,
the weights or the state. A guess writes beside the bytes of now, which stay what everybody reads. `step()` compares it
with what is really wanted: equal, and what it wrote becomes the bytes of now; else that is forgotten and the update is
done again, firm. Whoever is about to change a chunk's gradient, weights or state calls `drop` first, and whoever reads
its weights or state calls `settle`: then a wrong guess is never seen, and neither is a stale byte.

Every update of a step comes before any of the next, and within a step they are in the order in which the next forward
needs them: the earliest deadline first, never idle while there is something to do.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.forked import refuse_forked
from fuyou.core.races import Races
from fuyou.core.recorder import Recorder
from fuyou.core.ticket import DONE, AllOf, Failed, Ticket, wait_for
from fuyou.swap.buffers import Buffers
from fuyou.swap.optimizer_state import apply_update, load_written
from fuyou.swap.ranges import Range, Staging
from fuyou.swap.unit import Chunk, Member
from fuyou.swap.update import MemberUpdate, Phase, StepUpdates, Update
from fuyou.swap.update_queue import Kind, UpdateQueue
from fuyou.tiers.host import Lease
from fuyou.tiers.worker import EXIT_S, before_exit

THROUGH_COUNT = 3  # chunks on their way from the host to the drives: reads are not to queue behind all of them


class Updates(UpdateQueue):
    """See [Note: guesses]. `handover(chunk)` gives a gradient's staging (held, or None where it is at home) and the ticket
    of its bytes; `commit(step)` starts a commit (durability "step"; None: steps are not committed), once every update of
    the step is written or on its way, and `captured` has been called after it. `complete()` sees to that where a commit is
    waited for. `at_step`: a step is asked for and made in one.

    `seconds`, since the run began, of the two threads: one waits for commits, checkpoints and writes, the other for reads,
    and computes.
    """

    def __init__(
        self,
        kernels: Any,
        buffers: Buffers,
        *,
        handover: Callable[[Chunk], tuple[Staging | None, Ticket]],
        commit: Callable[[int], Ticket] | None,
        complete: Callable[[], None] = lambda: None,
        at_step: bool,
        deadline_s: float,
        in_flight: Callable[[], list[str]],
        races: Races | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(buffers, commit, at_step=at_step)
        self._recorder = recorder or Recorder(1)
        self._kernels = kernels
        self._handover = handover
        self._complete = complete
        self._deadline_s = deadline_s
        self._in_flight = in_flight
        self._races = races
        self._through: deque[Ticket] = deque()
        self._writes: deque[Ticket] = deque()
        self._closing = self._given_up = False
        self._pid = os.getpid()
        self._threads: list[threading.Thread] = []
        self.seconds = dict.fromkeys(("commit", "checkpoint", "nvme_write", "nvme_read", "adam"), 0.0)

    # Asking ----------------------------------------------------------------------------------------------------------

    def guess(self, chunk: Chunk, wanted: Mapping[Member, MemberUpdate]) -> bool:
        """Put an update in the queue ahead of its step; False where it could not be taken back."""
        if self.failure is not None or not all(each.can_guess for each in chunk.rewritten):
            return False
        with self._changed:
            if chunk in self._updates:
                return False
        self._start()
        gradient, ready = self._handover(chunk)
        with self._changed:
            self._put(Update(chunk, self.step + 1, wanted, False, gradient, ready))
            self.counts["guessed"] += 1
            self._changed.notify_all()
        return True

    def request(self, wanted: dict[Chunk, dict[Member, MemberUpdate]], record: dict[str, Any]) -> None:
        """A step: exactly these updates. `record["nonfinite_gradients"]` counts, as they are made, the parameters whose
        gradient held an inf or a nan after its scales: they are updated all the same, as torch does it."""
        self._raise_failure()
        for chunk in wanted:  # an update of the step before that no forward has waited for
            update = self._updates.get(chunk)
            if update is not None and update.firm:
                self.settle(chunk)
        try:
            self._request(wanted, record)
        except BaseException as error:  # an interrupt too: some of the updates were asked for, and others not
            self.fail(error)
            raise
        if self._at_step:
            self.settle()

    def _request(self, wanted: dict[Chunk, dict[Member, MemberUpdate]], record: dict[str, Any]) -> None:
        missing = []
        self._start()
        with self._changed:
            self.step += 1
            self._steps[self.step] = StepUpdates(record, unpublished=len(wanted), captured=self._commit is None)
            record["nonfinite_gradients"] = 0
            for chunk, update in list(self._updates.items()):
                if not update.firm and chunk not in wanted:
                    self._drop(update)
            for chunk, its in wanted.items():
                guess = self._updates.get(chunk)
                if guess is None or not self._make_firm(guess, its):
                    missing.append(chunk)
            self._end_steps()
        for chunk in missing:
            gradient, ready = self._handover(chunk)
            with self._changed:
                self._put(Update(chunk, self.step, wanted[chunk], True, gradient, ready))
                self.counts["deferred"] += not self._at_step
                self._changed.notify_all()

    def settle(self, chunk: Chunk | None = None) -> None:
        """Return when the bytes of `chunk` (None: of all) are those after every step that was asked for."""
        if chunk is not None and chunk not in self._updates:  # only the training thread puts some there
            self._raise_failure()
            return
        refuse_forked(self._pid, "This run")  # before the lock, which a thread may hold that is not here
        with self._changed:
            if chunk is not None and (update := self._updates.get(chunk)) is not None and update.firm:
                self._hurry(update)
            self._await(lambda: not self._pending(chunk), "every block" if chunk is None else chunk.unit.name)
        self._raise_failure()

    def go_on(self, step: int) -> None:
        """`step` steps have been made, by an earlier run."""
        with self._changed:
            self.step = step

    def captured(self) -> None:
        """What the last step's commit holds beside the updates' bytes is there."""
        with self._changed:
            if self.step in self._steps:
                self._steps[self.step].captured = True
                self._end_steps()
                self._changed.notify_all()

    def commit_again(self) -> None:
        """The last step once more, where its commit has begun already: something was changed after it."""
        with self._changed:
            if not self._steps and self._commit is not None and self.failure is None:
                self._committed = self._commit(self.step)

    def at_commit(self, told: Callable[[Ticket], None], changed: Callable[[], bool]) -> bool:
        """Have `told` called with the last step's commit, now or when it begins, before anything is written after it; with a
        ticket that raises where it never does. False, and it is not called, where no commit of what there is now was or
        will be asked for: `changed()`, or none ever was."""
        with self._changed:
            self._raise_failure()
            if self.step in self._steps:
                self._at_commit = (self.step, told)
            elif self._committed is DONE or changed():
                return False
            else:
                told(self._committed)
            return True

    def await_begun(self) -> None:
        """The commits of all steps before the last have begun, and the last one's where it lacks updates alone: what they hold
        beside the updates may be written over."""
        with self._changed:
            self._await(
                lambda: (
                    self.failure is not None
                    or all(each >= self.step and not step.captured for each, step in self._steps.items())
                ),
                "every block",
            )
        self._raise_failure()

    def _await_written(self) -> None:
        """The last step is all that has not begun to be committed, and it lacks only what `captured` stands for."""

        def written() -> bool:
            return all(
                number == self.step and not (step.unpublished or step.unwritten or step.captured)
                for number, step in self._steps.items()
            )

        with self._changed:
            self._await(lambda: self.failure is not None or written(), "every block")
        self._raise_failure()

    def _await_commits(self) -> None:
        """The commits of all steps that were asked for have begun."""
        self._complete()
        with self._changed:
            self._await(lambda: self.failure is not None or not self._steps, "every block")
        self._raise_failure()

    def drain(self) -> None:
        """`settle`, and every write is done; the step is committed where steps are. Raises their errors."""
        self._await_commits()
        self._await_writes()

    def pause(self) -> None:
        """`settle`, and nothing is written any more; within step(), whose commit is still to come where steps are committed."""
        self.settle()
        if self._commit is not None:
            self._await_written()
        self._await_writes()

    def _await_writes(self) -> None:
        try:
            wait_for([*self._writes])
            self._committed.wait()
        except DeadlineError:
            raise
        except Exception as error:
            self.fail(error)
            raise

    def pending(self, chunk: Chunk) -> bool:
        """`settle` would wait."""
        update = self._updates.get(chunk)
        return update is not None and update.firm and self.failure is None

    def drop(self, chunk: Chunk) -> None:
        """Somebody is about to change the chunk's gradient: no update reads or will read what it was."""
        if chunk not in self._updates:
            return
        self.settle(chunk)
        with self._changed:
            update = self._updates.get(chunk)
            if update is not None:
                self._drop(update)
                self._await(lambda: update.phase is not Phase.COMPUTING, f"an update of {chunk.unit.name}")

    def claim(self, chunk: Chunk) -> None:
        """Somebody is about to change the chunk's weights or state: no update will have been made from what they were,
        and no commit names or is about to name the place where they are written.

        The last step's own commit is not waited for where it is still to come: what is changed now is part of it.
        """
        refuse_forked(self._pid, "This run")
        if self._commit is not None:
            self._await_written()
        self.drop(chunk)
        chunk.unit.copied.wait()  # a copy to the device that was under way reads them
        for each in (chunk.weights, chunk.state):
            if each is not None:
                each.await_free()

    def let_go(self) -> bool:
        """Give back the host memory of the gradient that is used last of those which wait; it is read from its home then.
        False where none can go: its bytes are not home yet, or there is none."""
        with self._changed:
            idle = [update for update in self._holding if update.gradient is not None and not update.gradient.shared]
            if not idle:
                return False
            last = max(idle, key=lambda update: (update.step, update.chunk.place))
            del self._holding[last]
            gradient, last.gradient = last.gradient, None
        if gradient is not None:
            gradient.release()
        return True

    def give_up(self) -> None:
        """After a failure: whoever reads gets what there is, and what is left in the queue is not made."""
        self._given_up = True
        self._stop()

    def close(self) -> None:
        """What is left in the queue is not made. DeadlineError where an operation does not end: call it again then."""
        self._stop()
        self._buffers.close()
        if self.failure is not None:
            self.failure.__traceback__ = None  # its frames hold what was computed when it was raised

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._buffers.wake()
        until = time.monotonic() + self._deadline_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                raise DeadlineError(f"Waited {self._deadline_s:g} s to close {thread.name}: {self._doing()}.")
        for update in {*self._updates.values(), *self._read}:
            self._release(update)
        self._updates.clear()
        self._read.clear()
        with self._changed:
            self._tell_commit(self.step)

    def _await(self, met: Callable[[], bool], what: str) -> None:
        if not self._changed.wait_for(met, self._deadline_s):
            raise DeadlineError(f"Waited {self._deadline_s:g} s for an update of {what}; {self._doing()}.")

    def _doing(self) -> str:
        operations = self._in_flight()
        return f"{len(self._updates)} chunks wait for theirs, and {len(operations)} operations are in flight: " + (
            "; ".join(operations[:8]) or "none"
        )

    def _raise_failure(self) -> None:
        if self.failure is not None and not self._given_up:
            raise self.failure

    # The two threads -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Once something is to be done: a run that is never trained has no threads."""
        work = ((self._read_all, "fuyou-updates-read"), (self._compute_all, "fuyou-updates"))
        if not self._threads:
            before_exit(self._leave)
        for run, name in work[len(self._threads) :]:
            thread = threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise StateError(
                    f"No thread is to be had for {name} ({error}): raise the limit of `ulimit -u`."
                ) from error
            self._threads.append(thread)

    def _leave(self) -> None:
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(EXIT_S)

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """What is in the tiers is no state to go on from, or to commit: `failure` from now on."""
        with self._changed:
            self.failure = self.failure or error
            self._tell_commit(self.step)
            self._changed.notify_all()
        self._buffers.wake()

    def _read_all(self) -> None:
        """Takes what comes first in the queue, and starts reading it into a buffer."""
        while True:
            with self._changed:
                while not (self._closing or self._first()):
                    self._changed.wait()
                if self._closing or self.failure is not None:
                    return
                step, _, kind, _, _, item = self._queue[0]
                if self._commit is not None and step - 1 in self._steps:
                    self._changed.wait()  # a guess, and updates of the step before are with the kernels
                    continue
                committed, checkpoint = self._committed, self._checkpoint()
            # No buffer is held while a commit is waited for: those whom it waits for may need one.
            with self._timed("commit"):
                committed.wait()
            with self._timed("checkpoint"):
                checkpoint.wait()
            if kind is Kind.THROUGH:
                self._write_through()
                continue
            buffer = None
            if item.needs_buffer:
                with self._timed("nvme_write"):  # a buffer is free again when what it holds is written
                    # The others may all be with updates that are not made any more after a failure, or while closing.
                    buffer = self._buffers.take_unless(lambda: self._closing or self.failure is not None)
                if buffer is None:
                    return
            update = self._take_first(buffer)
            if update is not None:
                self._begin(update, buffer)

    def _begin(self, update: Update, buffer: Lease | None) -> None:
        ranges: list[Range] = [*update.chunk.rewritten]
        if update.gradient is None:
            ranges.append(update.chunk.gradients)
        update.staging = Staging(ranges, buffer, self._buffers.put)
        self._delay()
        try:
            if update.gradient is None:
                update.ready.wait()  # its write is on its way, and the engine puts our read behind it
            update.loaded = load_written(update.staging)
        except BaseException as error:
            update.loaded = Failed(error)
        with self._changed:
            self._read.append(update)
            self._changed.notify_all()

    def _write_through(self) -> None:
        """A chunk on the host that has been updated goes to the drives too."""
        while len(self._through) >= THROUGH_COUNT:
            self._through.popleft().wait()
        with self._changed:
            if not (self._first() and self._queue[0][2] is Kind.THROUGH and self._checkpoint().done()):
                return  # while we waited, or a step was being asked for, an update came that is more urgent
            step, _, _, _, _, each = heapq.heappop(self._queue)
        self._through.append(each.through.write(each.home.address, each.home))
        with self._changed:
            self._steps[step].unwritten -= 1
            self._end_steps()
            self._changed.notify_all()  # somebody may wait for that much of a step which is not over

    def _compute_all(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._read):
                    self._changed.wait()
                if self._closing or self.failure is not None:
                    return
                update = self._read[0]
            try:
                with self._timed("nvme_read"):
                    AllOf((update.loaded, update.ready)).wait()
                with self._changed:
                    self._take_read()
                    if update.rejected:
                        self._release(update)
                        continue
                    update.phase, firm = Phase.COMPUTING, update.firm
                with self._timed("adam"):
                    self._compute(update, firm)
            except Exception as error:
                self._failed(update, error)
            while self._writes and self._writes[0].done():
                self._writes.popleft().wait()  # raises what the drive said

    def _failed(self, update: Update, error: Exception) -> None:
        """Without its update a step is torn. A guess is dropped: what is wrong will be said when the step wants it."""
        with self._changed:
            if update.phase is Phase.READING:
                self._take_read()
            if update.firm:
                self._release(update)
                raise error
            for each in update.chunk.rewritten:
                with contextlib.suppress(StateError):  # it had not come so far
                    each.drop()
            if not update.rejected:
                self._drop(update)
            self._release(update)
            self._changed.notify_all()

    def _compute(self, update: Update, firm: bool) -> None:
        chunk, staging = update.chunk, update.staging
        if staging is None:
            raise StateError(f"An update of {chunk.unit.name} has nothing to work on.")
        weights, state = staging.views[:2]
        if firm:
            chunk.unit.copied.wait()  # it may read the weights where they are on the host
        else:
            weights, state = (_copied(each, view) for each, view in zip(chunk.rewritten, (weights, state), strict=True))
        gradient = update.gradient.views[0] if update.gradient is not None else staging.views[2]
        self._delay()
        name = f"adam {chunk.unit.name}"
        with torch.profiler.record_function(f"fuyou::{name}"), self._recorder.timed("adam", name):
            apply_update(self._kernels, chunk, weights, state, gradient, update.wanted, update.nonfinite)
        # Stored without the lock: who is waiting for it needs none of this. Nobody ends a COMPUTING update but us.
        # What is on the host is there already; _publish has it written through.
        moved = [index for index in (0, 1) if not staging.ranges[index].on_host]
        if moved:
            self._writes.append(staging.store(*moved, ahead=not firm))
        for each in chunk.rewritten:
            each.written = True
        with self._changed:
            self._changed.notify_all()
            if update.rejected:
                for each in chunk.rewritten:
                    each.drop()
                self._release(update)
            elif update.firm:
                if not firm:  # a guess that was accepted meanwhile
                    for each in chunk.rewritten:
                        each.accept()
                self._publish(update)
            else:
                update.phase = Phase.AHEAD
                staging.release()
                if update.gradient is not None:
                    update.gradient.release()
                update.gradient = update.staging = None

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - began

    def _delay(self) -> None:
        if self._races is not None:
            self._races.delay()


def _copied(each: Range, view: torch.Tensor) -> torch.Tensor:
    """The bytes that a guess may change: its own in a buffer already, a copy of those on the host in their spare lease."""
    if each.spare is None or not each.on_host:
        return view
    each.spare.data.copy_(view)
    return each.spare.data
