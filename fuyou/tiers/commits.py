"""Steps that are complete on the drives: what their records name, and the thread that makes them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from fuyou.core.errors import StateError
from fuyou.core.recorder import Recorder
from fuyou.core.ticket import DONE, Ticket, wait_for
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.drives import Drive
from fuyou.tiers.extents import Extent, Slot
from fuyou.tiers.lock import ProcessLock
from fuyou.tiers.pins import Pin
from fuyou.tiers.record_files import PLACES, RecordFiles, Reserved
from fuyou.tiers.records import ENTRY, Record, encode_record
from fuyou.tiers.worker import Job, Worker


class State(NamedTuple):
    """What is to be committed, as it was when that was asked for. The arrays are by extent."""

    step: int
    payload: bytes  # JSON
    slots: array[int]  # int8: the current one, -1 where there are no bytes
    checksums: array[int]  # uint32
    nbytes: array[int]  # uint64
    writers: Sequence[Ticket]  # of the bytes that were written since the last commit
    part_count: int  # of the layout
    layout_crc: int


class Commit:
    """The ticket of one commit: done when the step is complete on the drives, or has failed.

    `slots[index]` is the slot that it names of an extent, -1 of one that had no bytes; `checksums` are of their bytes.
    """

    def __init__(self, commits: Commits, state: State) -> None:
        self._commits = commits
        self.step = state.step
        self.slots = state.slots
        self.checksums = state.checksums
        self.on_drive = False  # its record may be there: nobody knows after a failure
        self.job: Job | None = None

    def slot_of(self, index: int) -> int:
        return self.slots[index] if 0 <= index < len(self.slots) else -1

    def names(self, index: int, slot: int) -> bool:
        return self.slot_of(index) == slot

    def done(self) -> bool:
        return self.job is not None and self.job.done()

    def wait(self, timeout_s: float | None = None) -> None:
        if self.job is not None:
            try:
                self.job.wait(timeout_s)
            except BaseException:
                self._commits.told = self._commits.told or self.job.done()
                raise

    def __str__(self) -> str:
        return f"the commit of step {self.step}"


class Commits:
    """The current slot and checksum of every committed extent, and the commits made of them, in their order.

    `lock`, the store's, guards everything; methods marked so are called under it.

    A failed commit is the last one: every later one fails with its error, until the store is closed. After a failed
    flush the kernel holds what it could not write for written, so a second flush that succeeds proves nothing. The
    newest durable record stays what it was, and so do the bytes that it names. A failed commit whose record may have
    reached the drive goes on naming its slots, for a reader may find it.
    """

    def __init__(self, drives: Sequence[Drive], home: str, lock: ProcessLock, in_flight: Callable[[], list[str]]):
        self._drives = drives
        self._lock = lock
        self._operations = in_flight
        self._worker: Worker | None = None
        self._files = RecordFiles(home, len(drives))
        self._slots = array("b")  # as in State
        self._checksums = array("I")
        self._nbytes = array("Q")
        self._unflushed: dict[int, Ticket] = {}  # by extent: the last writer since the last commit
        self._durable: Commit | None = None  # what the newest durable record names
        self._in_flight: list[Commit] = []
        self._pins: list[Pin] = []
        self._last_step = 0
        self._number = 0
        self._failure: BaseException | None = None
        self.told = False  # somebody has been told of the failure
        self.recorder = Recorder(1)

    @property
    def committed_step(self) -> int:
        return self._durable.step if self._durable is not None else 0

    @property
    def holds_a_step(self) -> bool:
        """A record may be on the drive: what it names is kept when the store closes."""
        return self._durable is not None or any(commit.on_drive for commit in self._in_flight)

    def open(self) -> None:
        self._files.open()
        self._worker = Worker("fuyou-commits", deadline_s=self._lock.deadline_s, in_flight=self._operations)

    def restore(self, record: Record, extents: int, adopted: Collection[int]) -> None:
        """Go on behind a record of an earlier run, after `open`: it is the newest durable one, and `extents` numbers are
        taken, of which `adopted` are used still. Its damaged copies are made whole. StorageIOError."""
        self._files.restore(record, extents)
        self._slots, self._checksums, self._nbytes = array("b"), array("I"), array("Q")
        for index in range(extents):
            entry = record.entry(index) if index in adopted else None
            self._slots.append(-1 if entry is None else int(entry["slot"]))
            self._checksums.append(0 if entry is None else int(entry["checksum"]))
            self._nbytes.append(int(record.parts_of(index, 0)["nbytes"].sum()))
        self._number, self._last_step = record.number, record.step
        state = State(record.step, b"", self._slots[:], array("I"), array("Q"), (), 0, 0)
        self._durable = Commit(self, state)  # of what is not used any more it need not be true

    def rewind(self, step: int) -> None:
        """The next commit may be of any step from `step` on: an older one was loaded."""
        with self._lock:
            self._last_step = step

    def checksum(self, index: int) -> int:
        """Of the extent's bytes of now."""
        return self._checksums[index]

    @property
    def extent_count(self) -> int:
        return len(self._slots)

    @property
    def changed(self) -> bool:
        """Something is current that no commit was asked for."""
        with self._lock:
            return bool(self._unflushed)

    @property
    def reserved(self) -> Reserved:
        """What there is room for records of."""
        return self._files.reserved

    def reserve(self, wanted: Reserved) -> None:
        """Room for more. StoreError where the drive has none."""
        self._files.reserve(wanted)

    def shrink(self, reserved: Reserved) -> None:
        self._files.shrink(reserved)

    # ---- under the lock

    def place(self, laid: Sequence[tuple[Extent, Sequence[Slot]]]) -> None:
        """Put new slots into the layout; an extent that is new gets its number, and has no bytes yet."""
        rows: list[tuple[int, int, int, int, int]] = []
        new: list[Extent] = []
        for extent, slots in laid:
            index = extent.index if extent.index >= 0 else len(self._slots) + len(new)
            if extent.index < 0:
                new.append(extent)
            for slot, parts in enumerate(slots, start=len(extent.slots)):
                rows += [(index, slot, self._drives.index(part.drive), part.offset, part.nbytes) for part in parts]
        self._files.append(rows)
        for extent in new:
            extent.index = len(self._slots)
            self._slots.append(-1)
            self._checksums.append(0)
            self._nbytes.append(extent.nbytes)

    def note(self, index: int, slot: int, checksum: int, writer: Ticket) -> None:
        """These bytes are current from now on."""
        self._slots[index], self._checksums[index] = slot, checksum
        self._unflushed[index] = writer

    def names(self, index: int, slot: int) -> bool:
        """Whether the newest durable record, a commit in flight or a pin names that slot."""
        if self._durable is not None and self._durable.names(index, slot):
            return True
        return any(each.names(index, slot) for each in self._in_flight) or any(
            pin.names(index, slot) for pin in self._pins
        )

    def frees(self, index: int, slot_count: int) -> Ticket | None:
        """What must come first before a slot of the extent is nobody's: the first commit in flight that, once durable,
        leaves one, else a pin (and then perhaps a commit); None: there is no such thing."""
        pinned = {pin.commit.slots[index] for pin in self._pins if pin.holds(index)}
        for place, commit in enumerate(self._in_flight):
            left = pinned | {later.slot_of(index) for later in self._in_flight[place:]}
            if len(left - {-1}) < slot_count:
                return commit
        return next((pin.ticket(index) for pin in self._pins if pin.holds(index)), None)

    def pin(self, pin: Pin) -> None:
        """Of a commit that is the newest, in flight or durable."""
        self._pins.append(pin)

    def unpin(self, pin: Pin) -> None:
        if pin in self._pins:
            self._pins.remove(pin)

    def pinned(self, index: int, slot: int) -> Ticket:
        """What a write of that slot waits for beside commits."""
        return next((pin.ticket(index) for pin in self._pins if pin.names(index, slot)), DONE)

    def begin(self, step: int, payload: bytes) -> Commit:
        """See Store.commit."""
        if self._worker is None:
            raise StateError(f"Step {step} cannot be committed: the store is not open.")
        if not max(self._last_step, 0) <= step < 1 << 63:
            raise StateError(f"Step {step} cannot be committed after step {self._last_step}: steps go up.")
        state = State(
            step, payload, self._slots[:], self._checksums[:], self._nbytes[:], list(self._unflushed.values()),
            self._files.part_count, self._files.layout_crc,
        )  # fmt: skip
        commit = Commit(self, state)
        commit.job = self._worker.submit(lambda: self._run(commit, state), str(commit))
        self._last_step, self._unflushed = step, {}
        self._in_flight.append(commit)
        return commit

    # ---- on the commit thread

    def _run(self, commit: Commit, state: State) -> None:
        try:
            with self._lock:  # and so not before `begin` is through
                if self._failure is not None:
                    raise self._failure
            with self.recorder.timed("commit", str(commit)):
                self._make(commit, state)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
                if not commit.on_drive:
                    self._in_flight.remove(commit)
            raise

    def _make(self, commit: Commit, state: State) -> None:
        """In this order: everything that the record will name is on the drives before a byte of it is."""
        wait_for(state.writers)
        wait_for([drive.flush() for drive in self._drives])
        self._files.flush_layout(state.part_count)
        number = self._number + 1
        record = encode_record(
            number=number, step=state.step, checksum=best_checksum().name, entries=_entries(state),
            payload=state.payload, parts=state.part_count, layout_crc=state.layout_crc,
        )  # fmt: skip
        commit.on_drive = True
        self._files.write(number % PLACES, record)  # the other place holds the newest durable record
        with self._lock:
            self._number, self._durable = number, commit
            self._in_flight.remove(commit)

    # ---- at the end

    def close(self) -> None:
        """Waits for the commits in flight; raises the failure that nobody was told of. After a DeadlineError the next call
        goes on."""
        if self._worker is not None:
            self._worker.close()
        self._files.close()
        failure = self._failure
        if failure is not None and not self.told:
            self.told = True
            raise failure


def _entries(state: State) -> np.ndarray:
    slots = np.frombuffer(state.slots, np.int8)
    written = np.flatnonzero(slots >= 0)
    entries = np.empty(len(written), ENTRY)
    entries["extent"], entries["slot"] = written, slots[written]
    entries["nbytes"] = np.frombuffer(state.nbytes, np.uint64)[written]
    entries["checksum"] = np.frombuffer(state.checksums, np.uint32)[written]
    return entries
