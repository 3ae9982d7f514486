"""Checkpoints written beside training, from the slots of a commit.

[Note: lazy checkpoints] The step that `run.save` is asked for is committed anyway, and what a commit names lies on the drives
until the next one is through. So its slots are pinned (fuyou/tiers/pins.py) and copied one after the other while training
goes on. The next step writes the other slots; the one after it comes back to these, and where one has not been copied by
then, it is copied first, and that write waits for it.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Callable

from fuyou.checkpoint.checkpoints import Draft
from fuyou.core.errors import DeadlineError, StateError, StorageIOError
from fuyou.core.ticket import Ticket, wait_for
from fuyou.plan.planner import SAVING_BUFFERS, Plan
from fuyou.runtime.tiers import Tiers
from fuyou.swap.buffers import Buffers
from fuyou.tiers.host import Lease
from fuyou.tiers.io import Engine
from fuyou.tiers.pins import Pin
from fuyou.tiers.saving import SavedWriter
from fuyou.tiers.store import Commit, Extent, Store
from fuyou.tiers.worker import Job, Worker


class Saves:
    """One checkpoint at a time, written by a thread of its own through `buffers` of `piece_bytes`; `saved(folder, step)` is
    called by it when one is there. What fails is told by the next `wait`, once. `store`: None where steps are not committed,
    and then nothing is begun."""

    def __init__(
        self,
        store: Store | None,
        buffers: Buffers,
        piece_bytes: int,
        *,
        saved: Callable[[str, int], None],
        deadline_s: float,
        in_flight: Callable[[], list[str]],
    ) -> None:
        self._store = store
        self._buffers = buffers
        self._piece_bytes = piece_bytes
        self._saved = saved
        self._deadline_s = deadline_s
        self._in_flight = in_flight
        self._worker: Worker | None = None
        self._draft: Draft | None = None  # whose commit has not begun
        self._given = threading.Event()  # nothing was asked for that has not been given to the worker, as `_job`
        self._given.set()
        self._job: Job | None = None
        self._copied_bytes = 0  # of the one under way: whether it is still going on
        self._closing = False

    def begin(self, draft: Draft, at_commit: Callable[[Callable[[Ticket], None]], bool]) -> bool:
        """The draft is written from the commit that `at_commit` calls back with, now or later. False, and it is the caller's
        still, where there is none. StateError where no thread is to be had."""
        if self._store is None:
            return False
        if self._worker is None:
            self._worker = Worker("fuyou-save", deadline_s=self._deadline_s, in_flight=self._in_flight)
        self._draft = draft
        self._given.clear()
        accepted = False
        try:
            # Only the answer tells: the commit's thread may be in `_go` already, or through it.
            accepted = at_commit(self._go)
        finally:
            if not accepted:
                self._draft = None
                self._given.set()
        return accepted

    def wait(self) -> None:
        """The checkpoint that was begun is there, or its error is raised. DeadlineError where nothing was copied for so
        long."""
        if not self._given.wait(self._deadline_s):
            raise DeadlineError(f"Waited {self._deadline_s:g} s for the commit of a checkpoint to begin.")
        job = self._job
        while job is not None:
            copied = self._copied_bytes
            try:
                job.wait(self._deadline_s)
                break
            except DeadlineError:
                if job.done() or copied == self._copied_bytes:
                    raise
            finally:
                if job.done():
                    self._job = None

    def problem(self) -> Exception | None:
        """`wait`, and what it would raise; a DeadlineError is raised."""
        try:
            self.wait()
        except DeadlineError:
            raise
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        """Before anything that a draft looks at goes. What is under way is given up: whoever wants it waits first."""
        self._closing = True
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()
        if self._worker is not None:
            self._worker.close()
        self._buffers.close()

    def _go(self, commit: Ticket) -> None:
        """The commit has begun, and nothing was written after it. By any thread."""
        draft, self._draft = self._draft, None
        if draft is None or self._worker is None or self._store is None:
            return
        pin: Pin | None = None
        try:
            extents = [each.extent for each in draft.ranges.values() if each.extent is not None]
            pin = self._store.pin(commit, extents) if isinstance(commit, Commit) else None
            self._copied_bytes = 0
            self._job = self._worker.submit(
                lambda: self._run(draft, commit, pin), f"the checkpoint of step {draft.step}"
            )
        except BaseException:  # the worker is closed: nobody will let go of what is pinned
            if pin is not None:
                self._store.unpin(pin)
            draft.discard()
            raise
        finally:
            self._given.set()

    # ---- the thread

    def _run(self, draft: Draft, commit: Ticket, pin: Pin | None) -> None:
        engine = self._store.drives[0].engine if self._store is not None else None  # any: a file is all the same to it
        try:
            commit.wait()
            if pin is not None and engine is not None:
                extents = {*pin.extents}
                numbers = draft.number(lambda each: each.extent in extents)
                number_of = {draft.ranges[key].extent: number for key, number in numbers.items()}
                target, cloning = _Target(engine, draft.writer.path), True
                try:
                    while (extent := pin.take()) is not None:
                        if self._closing:
                            raise StateError(
                                f"The run was closed before the checkpoint of step {draft.step} was written."
                            )
                        draft.writer.begin(number_of[extent], extent.nbytes)
                        cloning = cloning and self._clone(extent, draft.writer, pin.commit)
                        if not cloning:
                            self._copy(extent, draft.writer, target, pin.commit)
                        pin.let_go(extent)
                    target.flush()
                finally:
                    target.close()
                draft.finish()
                self._saved(draft.writer.folder, draft.step)
        finally:
            try:
                if pin is not None and self._store is not None:
                    self._store.unpin(pin)
            finally:
                draft.discard()

    def _clone(self, extent: Extent, writer: SavedWriter, commit: Commit) -> bool:
        """By reflink, where the file system has it: nothing is read or written."""
        parts = [(part.drive.path, part.offset, part.nbytes) for part in extent.slots[commit.slot_of(extent.index)]]
        cloned = writer.clone(parts, commit.checksums[extent.index])
        self._copied_bytes += extent.nbytes * cloned
        return cloned

    def _copy(self, extent: Extent, writer: SavedWriter, target: _Target, commit: Commit) -> None:
        """Piece by piece: some are read while others are written. All have been read when this returns."""
        slot, offset = commit.slot_of(extent.index), 0
        reading: deque[tuple[Lease, int, Ticket]] = deque()
        try:
            while offset < extent.nbytes or reading:
                lease = None
                if offset < extent.nbytes:
                    lease = self._buffers.try_take() if reading else self._buffers.take()
                if lease is not None:
                    count = min(self._piece_bytes, extent.nbytes - offset)
                    try:
                        read = extent.read_slot(slot, offset, count, lease.address, lease)
                    except BaseException:
                        self._buffers.put(lease, [])
                        raise
                    reading.append((lease, count, read))
                    offset += count
                else:
                    lease, count, read = reading[0]
                    read.wait()
                    at = writer.passed(lease.data[:count].numpy().data)
                    written = target.write(at, lease, count)
                    reading.popleft()
                    self._buffers.put(lease, [written])
                    self._copied_bytes += count
        finally:
            for lease, _, read in reading:
                self._buffers.put(lease, [read])
        if writer.checksum != commit.checksums[extent.index]:
            raise StorageIOError(
                errno.EIO,
                f"{extent.what} ({extent.nbytes} bytes) came back from the drive with other bytes than step {commit.step} "
                f"committed. Its checkpoint {writer.folder} is not written.",
            )


class _Target:
    """A checkpoint's data, written as a drive's are: directly, several pieces at once."""

    def __init__(self, engine: Engine, path: str) -> None:
        self._engine = engine
        self._file = engine.open(path)
        self._writing: deque[Ticket] = deque()

    def write(self, offset: int, lease: Lease, nbytes: int) -> Ticket:
        """Start it. Raises the error of one that has ended."""
        while self._writing and self._writing[0].done():
            self._writing.popleft().wait()
        self._writing.append(self._engine.write(self._file, offset, lease.address, nbytes, lease))
        return self._writing[-1]

    def flush(self) -> None:
        """All of it is on the drive."""
        wait_for(self._writing)
        self._engine.flush(self._file).wait()

    def close(self) -> None:
        self._engine.close_file(self._file)


def saves_of(tiers: Tiers, plan: Plan, saved: Callable[[str, int], None]) -> Saves:
    """Of a run."""
    return Saves(
        tiers.store if tiers.durable else None, tiers.buffers(plan.saving_bytes, SAVING_BUFFERS), plan.saving_bytes,
        saved=saved, deadline_s=tiers.deadline_s, in_flight=tiers.in_flight,
    )  # fmt: skip
