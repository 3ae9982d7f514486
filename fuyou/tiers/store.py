"""The NVMe tier: extents striped over one preallocated file per drive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from fuyou.core.errors import DeadlineError, FuyouError, StateError, StorageIOError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.core.recorder import Recorder
from fuyou.core.sizes import align_up
from fuyou.core.ticket import DONE, Ticket
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.commits import Commit, Commits
from fuyou.tiers.drives import Drive
from fuyou.tiers.extents import Extent, Part, Parts, Slot
from fuyou.tiers.folders import DIRTY, HOME, OPEN, refuse_without_room, rooms_of
from fuyou.tiers.io import Engine
from fuyou.tiers.lock import ProcessLock
from fuyou.tiers.pins import Pin
from fuyou.tiers.records import Record, encode_payload
from fuyou.tiers.shares import UNIT_BYTES, Shares

__all__ = ["Commit", "Extent", "Part", "Slot", "Store"]


class Store:
    """Takes note of extents (`place`), lays them out and makes the files (`open`), then moves bytes.

    Every extent is striped over all drives in proportion to their speed, so that one transfer has all of them at work;
    a small one goes whole to the drive that is most behind its share. A drive without the room for its share takes what
    it can, and the others take the rest.

    `durable`: steps can be committed, and a kill or a loss of power at any moment leaves the newest one that was
    (`durability="step"`); see [Note: slots of records]. Without, the live store is of use to its own run only, and says
    so by a mark once an extent has been written a second time.

    `adopt`: the newest step in these very folders, which the store goes on from: its extents stay where they are, and
    `place(adopt=…)` gives them to whoever knows their numbers. The others keep their room and are of no step any more.

    `verify`: all that is written has a checksum, and every read is compared with it (fuyou/tiers/verified.py).

    `close` leaves the files of a store that has a step, and beside them the mark OPEN unless `seal` was called before.
    """

    def __init__(
        self,
        folders: Sequence[str],
        ledger: Ledger,
        durable: bool = False,
        adopt: Record | None = None,
        verify: bool = False,
    ) -> None:
        self.verify = verify
        self._ledger = ledger
        self.lock = ProcessLock("the store")  # guards the extents' slots and the commits
        self._placing = ProcessLock("making room in the store")  # one `open`, `add` or `add_slot` at a time
        self._drives = tuple(Drive(folder) for folder in folders)
        self._home = os.path.dirname(self._drives[0].path)
        self._commits = Commits(self._drives, self._home, self.lock, self.in_flight) if durable else None
        self._adopted = adopt
        self._adopted_numbers: set[int] = set()
        self._sealed = False
        self._marked_dirty = False
        self._wanted: list[tuple[Extent, int]] = []  # placed before `open`, with their slots
        self._charged: list[tuple[str, int]] = []

    def record(self, recorder: Recorder) -> None:
        """Commits are noted there from now on."""
        if self._commits is not None:
            self._commits.recorder = recorder

    @property
    def drives(self) -> tuple[Drive, ...]:
        return self._drives

    @property
    def read_bytes(self) -> int:
        return sum(drive.read_bytes for drive in self._drives)

    @property
    def write_bytes(self) -> int:
        return sum(drive.write_bytes for drive in self._drives)

    def start(self, open_drive: Callable[[str], tuple[Engine, float]]) -> None:
        """Claim every folder, then give each drive its engine and speed (bytes a second, 0.0: not known).

        In this order: a folder that another run uses is told before anything is opened or measured. After a failure,
        `close` gives back what there is.
        """
        for drive, kept_bytes in zip(self._drives, self._kept_bytes(), strict=True):
            drive.claim(kept_bytes)
        for drive in self._drives:
            drive.engine, drive.bytes_per_s = open_drive(drive.folder)
            self.lock.deadline_s = self._placing.deadline_s = drive.engine.deadline_s

    def register(self, address: int, nbytes: int) -> list[Drive]:
        """Register host memory with every drive's engine until it closes; returns the drives where that was refused."""
        return [drive for drive in self._drives if drive.engine and not drive.engine.register(address, nbytes)]

    def place(
        self, nbytes: int, category: str, slots: int, committed: bool = False, adopt: int | None = None
    ) -> Extent:
        """An extent of `nbytes` (rounded up to 4096) in `slots` slots; `committed`: its bytes belong to a step. `adopt`: the
        number of one that the adopted step has, with so many bytes and slots (`Record.parts_of`)."""
        extent = Extent(self, align_up(nbytes, UNIT_BYTES), category, committed)
        if adopt is None:
            self._wanted.append((extent, slots))
        else:
            self._adopt(extent, adopt, slots)
        return extent

    def open(self) -> None:
        """Charge the extents, divide them among the drives, preallocate. All or nothing. BudgetError where the drives
        have no room for them, StoreError where one refuses what it had room for."""
        undo = contextlib.ExitStack()  # never called: `close` gives back what there is
        try:
            with self._placing:
                # What is committed first: the rest is cut off by a run that goes on from here.
                self._wanted.sort(key=lambda each: not each[0].committed)
                for extent, slots in self._wanted:
                    self._charge(extent.category, slots * extent.nbytes, "its extents on the drives")
                if self._commits is not None:
                    self._commits.open()
                    if self._adopted is not None:
                        self._commits.restore(self._adopted, _count_of(self._adopted), self._adopted_numbers)
                        self._charge("staging", self._commits.reserved.nbytes, "the records of its commits")
                    self._reserve(self._wanted, undo)  # first: what it takes is no room for extents
                shares = self._shares(sum(slots * extent.nbytes for extent, slots in self._wanted))
                laid = [self._lay(shares, extent.nbytes, slots) for extent, slots in self._wanted]
                for drive in self._drives:
                    drive.open()
                self._give([(extent, slots) for (extent, _), slots in zip(self._wanted, laid, strict=True)])
                if self._commits is not None:
                    self._mark(OPEN, b"A run has this store open, or ended without closing it.\n")
                    for drive in self._drives[1:]:
                        self._mark(HOME, self._drives[0].folder.encode(), os.path.dirname(drive.path))
                    for drive in self._drives:
                        drive.sync_names()
        except BaseException:
            self.close()
            raise
        self._wanted = []

    def add(self, nbytes: int, category: str, slots: int, committed: bool = False) -> Extent:
        """An extent placed after `open`: the files grow by it. BudgetError or StoreError where there is no room, and
        nothing has changed."""
        extent = Extent(self, align_up(nbytes, UNIT_BYTES), category, committed)
        self._grow(extent, slots)
        return extent

    def add_slot(self, extent: Extent) -> None:
        """A second slot for an extent that updates will rewrite from now on; otherwise as `add`."""
        if len(extent.slots) == 1:
            self._grow(extent, 1)

    def commit(self, step: int, payload: dict[str, Any] | bytes) -> Commit:
        """Begin to make `step` complete: the bytes that every committed extent has now, and `payload` (JSON, at most
        1 MiB; bytes are `encode_payload`'s) with them. Returns at once; the ticket is done when a record of it is on the
        drive, or raises why not.

        StateError for a step below the last one and a store that is not durable, ConfigError for a payload. After a
        failed commit every later one fails with the same error.
        """
        if self._commits is None:
            raise StateError(
                f"Step {step} cannot be committed: the store was not made for it (durability is not 'step')."
            )
        text = payload if isinstance(payload, bytes) else encode_payload(payload)
        with self.lock:
            return self._commits.begin(step, text)

    def pin(self, commit: Commit, extents: Sequence[Extent]) -> Pin:
        """Nothing of `extents` that `commit`, the newest, names is written until the pin lets go of it; `unpin` it then.
        Called before anybody can write after the commit has begun."""
        if self._commits is None:
            raise StateError("Slots are pinned where steps are committed.")
        with self.lock:
            pin = Pin(commit, extents, self.lock.deadline_s)
            self._commits.pin(pin)
            return pin

    def unpin(self, pin: Pin) -> None:
        pin.release()
        if self._commits is not None:
            with self.lock:
                self._commits.unpin(pin)

    @property
    def changed(self) -> bool:
        """Committed extents have bytes that no commit was asked for."""
        return self._commits is not None and self._commits.changed

    @property
    def extent_count(self) -> int:
        """Numbers of extents that records may name."""
        return self._commits.extent_count if self._commits is not None else 0

    def rewind(self, step: int) -> None:
        """Commits may go back to `step`, which was loaded from elsewhere; the next is the newest all the same."""
        if self._commits is not None:
            self._commits.rewind(step)

    def checksum(self, extent: Extent) -> int:
        """Of a committed extent's bytes of now, by the algorithm of `adopted.checksum` until it is written again."""
        if self._commits is None:
            raise StateError("Extents have checksums where steps are committed.")
        return self._commits.checksum(extent.index)

    def seal(self) -> None:
        """The run ends in order: all that it did is committed, and `close` takes the mark away that says otherwise."""
        self._sealed = True

    @property
    def room_bytes(self) -> int:
        """What extents may still be added within the budget; the drives themselves may have less."""
        return self._ledger.room("nvme")

    @property
    def committed_step(self) -> int:
        """The newest step that is complete on the drives, 0 before any is."""
        return self._commits.committed_step if self._commits is not None else 0

    # ---- called by Extent only, all but the first under the lock

    def checksum_of(self, address: int, nbytes: int) -> int:
        return best_checksum().of(address, nbytes)

    def note(self, index: int, slot: int, checksum: int, writer: Ticket) -> None:
        """The extent's current bytes are these from now on."""
        if self._commits is not None and index >= 0:
            self._commits.note(index, slot, checksum, writer)

    def names(self, index: int, slot: int) -> bool:
        """Whether the newest durable record, a commit in flight or a pin names that slot."""
        return self._commits is not None and index >= 0 and self._commits.names(index, slot)

    def frees(self, index: int, slot_count: int) -> Ticket | None:
        """What must come first before a slot of the extent is nobody's; None: there is no such thing."""
        return self._commits.frees(index, slot_count) if self._commits is not None else None

    def pinned(self, index: int, slot: int) -> Ticket:
        """What a write of the slot waits for beside commits."""
        return self._commits.pinned(index, slot) if self._commits is not None and index >= 0 else DONE

    def mark_dirty(self) -> None:
        """Before the first write over what belongs together, a store without commits says on the drive that it has no
        step: what a killed run leaves is not mistaken for one."""
        if self._commits is not None or self._marked_dirty:
            return
        self._mark(DIRTY, b"The data beside this was being updated in place, and is of no single step.\n")
        self._drives[0].sync_names()
        self._marked_dirty = True

    def _mark(self, name: str, text: bytes, home: str | None = None) -> None:
        path = os.path.join(home or self._home, name)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.write(descriptor, text)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StorageIOError(error.errno or 0, f"cannot mark the store by {path}: {error.strerror}") from error

    def transfer(self, kind: str, slot: Slot, address: int, keep: object) -> Ticket:
        tickets: list[Ticket] = []
        try:
            for drive, offset, nbytes in slot:
                tickets.append(drive.transfer(kind, offset, address, nbytes, keep))
                address += nbytes
                if kind == "read":
                    drive.read_bytes += nbytes
                else:
                    drive.write_bytes += nbytes
        except BaseException:  # nobody would wait for those that have begun, and the caller's memory is its own again
            with contextlib.suppress(FuyouError):
                Parts(tickets).wait()
            raise
        return tickets[0] if len(tickets) == 1 else Parts(tickets)

    def summary(self) -> list[dict[str, Any]]:
        """Of each drive: its folder, the bytes that it holds and that it has moved, its speed (0.0: not measured)."""
        return [
            {
                "folder": drive.folder,
                "io": drive.engine.name if drive.engine is not None else "none",
                "held_bytes": drive.nbytes,
                "read_bytes": drive.read_bytes,
                "write_bytes": drive.write_bytes,
                "bytes_per_s": drive.bytes_per_s,
            }
            for drive in self._drives
        ]

    def close(self) -> None:
        """Waits for what is under way, then removes the files of a store without a step. Every drive is closed even where
        one fails.

        Raises the DeadlineError of a drive that does not answer, which the next call tries again, else the first failure:
        that of a commit that nobody waited for before those of closing.
        """
        failures: list[Exception] = []
        closing: list[Callable[[], None]] = [] if self._commits is None else [self._commits.close]
        closing += [self._unmark]
        closing += [lambda drive=drive: drive.close(self._has_step) for drive in self._drives]  # type: ignore[misc]
        for close in closing:
            try:
                close()
            except Exception as error:
                failures.append(error)
        for category, nbytes in self._charged:
            self._ledger.discharge("nvme", category, nbytes)
        self._charged, self._wanted = [], []
        if failures:
            raise next((each for each in failures if isinstance(each, DeadlineError)), failures[0])

    @property
    def _has_step(self) -> bool:
        return self._adopted is not None or (self._commits is not None and self._commits.holds_a_step)

    def _unmark(self) -> None:
        if self._sealed and self._has_step:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self._home, OPEN))
                self._drives[0].sync_names()

    def in_flight(self) -> list[str]:
        """One line for each operation that has not ended on any drive."""
        return [line for drive in self._drives if drive.engine is not None for line in drive.engine.in_flight()]

    def _kept_bytes(self) -> list[int | None]:
        """Of each drive's file, what the adopted step's layout reaches to."""
        if self._adopted is None:
            return [None] * len(self._drives)
        kept: list[int | None] = []
        for index in range(len(self._drives)):
            its = self._adopted.layout[self._adopted.layout["drive"] == index]
            kept.append(int((its["offset"] + its["nbytes"]).max(initial=0)))
        return kept

    def _adopt(self, extent: Extent, index: int, slots: int) -> None:
        record = self._adopted
        if record is None:
            raise StateError("An extent of an earlier step was asked for, and the store begins anew.")
        laid = [
            tuple(Part(self._drives[int(part["drive"])], int(part["offset"]), int(part["nbytes"])) for part in parts)
            for parts in (record.parts_of(index, slot) for slot in range(slots))
        ]
        if any(sum(part.nbytes for part in each) != extent.nbytes for each in laid):
            raise StoreError(
                f"Extent {index} of the store in {self._home} is not one of {slots} slots of {extent.nbytes} bytes."
            )
        self._charge(extent.category, slots * extent.nbytes, "its extents on the drives")
        entry = record.entry(index)
        self._adopted_numbers.add(index)
        extent.adopt(index, laid, None if entry is None else int(entry["slot"]))

    def _charge(self, category: str, nbytes: int, what: str) -> None:
        self._ledger.charge("nvme", category, nbytes, what)
        self._charged.append((category, nbytes))

    def _uncharge(self) -> None:
        """What was charged last."""
        self._ledger.discharge("nvme", *self._charged.pop())

    def _reserve(self, wanted: Sequence[tuple[Extent, int]], undo: contextlib.ExitStack) -> None:
        """Charge and preallocate what records of these extents' slots need beside what they have; `undo` gives it back."""
        if self._commits is None:
            return
        committed = [(extent, slots) for extent, slots in wanted if extent.committed]
        before = self._commits.reserved
        after = before.plus(
            extents=sum(not extent.slots for extent, _ in committed),
            parts=sum(slots for _, slots in committed) * len(self._drives),  # at most: one on every drive
        )
        self._charge("staging", after.nbytes - before.nbytes, "the records of its commits")
        undo.callback(self._uncharge)
        undo.callback(self._commits.shrink, before)
        self._commits.reserve(after)

    def _give(self, laid: Sequence[tuple[Extent, list[Slot]]]) -> None:
        """The extents have these slots from now on; those that records will name are in the layout before."""
        with self.lock:
            if self._commits is not None:
                self._commits.place([(extent, slots) for extent, slots in laid if extent.committed])
            for extent, slots in laid:
                extent.take_slots(slots)

    def _shares(self, nbytes: int) -> Shares:
        """How to divide `nbytes` more. BudgetError without the room."""
        rooms = rooms_of([drive.folder for drive in self._drives], reuse=False)
        refuse_without_room(nbytes, rooms.total_bytes, rooms)
        speeds, placed = zip(*((drive.bytes_per_s, drive.nbytes) for drive in self._drives), strict=True)
        return Shares(speeds, rooms.pools, rooms.room_bytes, placed, nbytes)

    def _lay(self, shares: Shares, nbytes: int, slots: int) -> list[Slot]:
        """Slots at the ends of the drives."""
        laid = []
        for pieces in shares.divide(nbytes, slots):
            parts = []
            for index, size in pieces:
                drive = self._drives[index]
                parts.append(Part(drive, drive.nbytes, size))
                drive.nbytes += size
            laid.append(tuple(parts))
        return laid

    def _grow(self, extent: Extent, slots: int) -> None:
        """`slots` more slots for `extent`, on open drives: all of them, or nothing has changed."""
        with self._placing, contextlib.ExitStack() as undo:
            self._charge(extent.category, slots * extent.nbytes, "extents for what is trained from now on")
            undo.callback(self._uncharge)
            self._reserve([(extent, slots)], undo)
            before = [drive.nbytes for drive in self._drives]
            undo.callback(self._shrink, before)
            places = self._lay(self._shares(slots * extent.nbytes), extent.nbytes, slots)
            for drive, start in zip(self._drives, before, strict=True):
                drive.preallocate(start, drive.nbytes - start)
            self._give([(extent, places)])
            undo.pop_all()

    def _shrink(self, sizes: Sequence[int]) -> None:
        for drive, nbytes in zip(self._drives, sizes, strict=True):
            if drive.nbytes != nbytes:
                drive.shrink(nbytes)


def _count_of(record: Record) -> int:
    """Numbers of extents that a record's layout has taken."""
    return int(record.layout["extent"].max()) + 1 if len(record.layout) else 0
