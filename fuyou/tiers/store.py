"""The NVMe tier: extents striped over one preallocated file per drive."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fuyou.core.errors import DeadlineError, FuyouError, StateError
from fuyou.core.ledger import Ledger
from fuyou.core.sizes import align_up
from fuyou.core.ticket import DONE, Ticket, wait_for
from fuyou.tiers.drives import Drive
from fuyou.tiers.folders import refuse_without_room, rooms_of
from fuyou.tiers.io import Engine
from fuyou.tiers.shares import UNIT_BYTES, Shares


class Transfer:
    """A read or write of an extent: engine tickets behind the ticket of the extent's last writer.

    The engine orders overlapping ranges of a file itself; this carries the writer's error to whoever reads after it.
    """

    __slots__ = ("_after", "_own")

    def __init__(self, own: Ticket, after: Ticket) -> None:
        self._own = own
        self._after = after

    def done(self) -> bool:
        return self._own.done() and self._after.done()

    def wait(self, timeout_s: float | None = None) -> None:
        wait_for((self._after, self._own), timeout_s)


class Parts:
    """A transfer's tickets, one a drive. `wait` returns when no drive uses the memory any more, and raises the error of
    the part that comes first in it; past the deadline it does not wait for the rest."""

    __slots__ = ("_tickets",)

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tuple(tickets)

    def done(self) -> bool:
        return all(ticket.done() for ticket in self._tickets)

    def wait(self, timeout_s: float | None = None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        first: FuyouError | None = None
        for ticket in self._tickets:
            try:
                ticket.wait(None if end is None else max(0.0, end - time.monotonic()))
            except DeadlineError as error:
                first, end = first or error, 0.0
            except FuyouError as error:
                first = first or error
        if first is not None:
            raise first


class Part(NamedTuple):
    """Some bytes of a slot of an extent, in one piece on one drive."""

    drive: Drive
    offset: int
    nbytes: int


Slot = tuple[Part, ...]  # in the order of the extent's bytes


class Extent:
    """`nbytes` on the drives, in one or two slots; where they lie is decided when the store opens.

    `read` takes the current slot. `write` goes to the other one, which is current from then on: an update never
    overwrites the bytes that it was made from, and a read that is under way keeps its slot. An extent that was never
    written has no bytes (`written` is False) and must not be read.
    """

    __slots__ = ("_ahead", "_current", "_slots", "_store", "_writer", "category", "nbytes", "written")

    def __init__(self, store: Store, nbytes: int, category: str) -> None:
        self._store = store
        self._slots: tuple[Slot, ...] = ()
        self._current = 0
        self._writer: Ticket = DONE
        self._ahead: Ticket | None = None
        self.nbytes = nbytes
        self.category = category
        self.written = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def take_slots(self, slots: Sequence[Slot]) -> None:
        """Called by Store only."""
        self._slots += tuple(slots)

    def read(self, address: int, keep: object) -> Ticket:
        """Start reading the extent to `address`; `keep` lives until that has ended."""
        if not self.written:
            raise StateError(f"An extent of {self.category} ({self.nbytes} bytes) was read before it was written.")
        return Transfer(self._store.transfer("read", self._slots[self._current], address, keep), self._writer)

    @property
    def can_write_ahead(self) -> bool:
        return len(self._slots) > 1 and self.written

    def free_after(self) -> Ticket:
        return DONE

    def accept(self) -> None:
        if self._ahead is None:
            raise StateError("nothing ahead")
        self._current, self._writer, self._ahead = 1 - self._current, self._ahead, None

    def drop(self) -> None:
        if self._ahead is None:
            raise StateError("nothing ahead")
        self._ahead = None

    def write(self, address: int, keep: object, *, ahead: bool = False) -> Ticket:
        """Start writing the extent from `address`; reads from now on see these bytes."""
        if ahead:
            if self._ahead is not None:
                raise StateError("second ahead")
            self._ahead = self._store.transfer("write", self._slots[1 - self._current], address, keep)
            return self._ahead
        self._ahead = None
        if not self._slots:
            raise StateError(
                f"An extent of {self.category} ({self.nbytes} bytes) was written before its store was open."
            )
        number = (self._current + 1) % len(self._slots) if self.written else self._current
        ticket = self._store.transfer("write", self._slots[number], address, keep)
        self._current, self._writer, self.written = number, ticket, True
        return ticket


class Store:
    """Takes note of extents (`place`), lays them out and makes the files (`open`), then moves bytes.

    Every extent is striped over all drives in proportion to their speed, so that one transfer has all of them at work;
    a small one goes whole to the drive that is most behind its share. A drive without the room for its share takes what
    it can, and the others take the rest.
    """

    def __init__(self, folders: Sequence[str], ledger: Ledger, durable: bool = False) -> None:
        self._ledger = ledger
        self._counting = threading.Lock()
        self._drives = tuple(Drive(folder) for folder in folders)
        self._wanted: list[tuple[Extent, int]] = []  # placed before `open`, with their slots
        self._charged: list[tuple[str, int]] = []

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
        for drive in self._drives:
            drive.claim()
        for drive in self._drives:
            drive.engine, drive.bytes_per_s = open_drive(drive.folder)

    def register(self, address: int, nbytes: int) -> list[Drive]:
        """Register host memory with every drive's engine until it closes; returns the drives where that was refused."""
        return [drive for drive in self._drives if drive.engine and not drive.engine.register(address, nbytes)]

    def place(self, nbytes: int, category: str, slots: int, committed: bool = False) -> Extent:
        """An extent of `nbytes` (rounded up to 4096) in `slots` slots."""
        extent = Extent(self, align_up(nbytes, UNIT_BYTES), category)
        self._wanted.append((extent, slots))
        return extent

    def open(self) -> None:
        """Charge the extents, divide them among the drives, preallocate. All or nothing. BudgetError where the drives
        have no room for them, StoreError where one refuses what it had room for."""
        try:
            for extent, slots in self._wanted:
                self._charge(extent, slots, "its extents on the drives")
            shares = self._shares(sum(slots * extent.nbytes for extent, slots in self._wanted))
            for extent, slots in self._wanted:
                extent.take_slots(self._lay(shares, extent.nbytes, slots))
            for drive in self._drives:
                drive.open()
        except BaseException:
            self.close()
            raise
        self._wanted = []

    def add(self, nbytes: int, category: str, slots: int, committed: bool = False) -> Extent:
        """An extent placed after `open`: the files grow by it. BudgetError or StoreError where there is no room, and
        nothing has changed."""
        extent = Extent(self, align_up(nbytes, UNIT_BYTES), category)
        self._grow(extent, slots)
        return extent

    def add_slot(self, extent: Extent) -> None:
        """A second slot for an extent that updates will rewrite from now on; otherwise as `add`."""
        if len(extent.slots) == 1:
            self._grow(extent, 1)

    def transfer(self, kind: str, slot: Slot, address: int, keep: object) -> Ticket:
        """Called by Extent only."""
        tickets: list[Ticket] = []
        try:
            for drive, offset, nbytes in slot:
                tickets.append(drive.transfer(kind, offset, address, nbytes, keep))
                address += nbytes
                with self._counting:
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
        """Waits for what is under way, then removes the files. Every drive is closed even where one fails.

        Raises the DeadlineError of a drive that does not answer, which the next call tries again, else the first failure.
        """
        failures: list[FuyouError] = []
        for drive in self._drives:
            try:
                drive.close()
            except FuyouError as error:
                failures.append(error)
        for category, nbytes in self._charged:
            self._ledger.discharge("nvme", category, nbytes)
        self._charged, self._wanted = [], []
        if failures:
            raise next((each for each in failures if isinstance(each, DeadlineError)), failures[0])

    def in_flight(self) -> list[str]:
        """One line for each operation that has not ended on any drive."""
        return [line for drive in self._drives if drive.engine is not None for line in drive.engine.in_flight()]

    def _charge(self, extent: Extent, slots: int, what: str) -> None:
        self._ledger.charge("nvme", extent.category, slots * extent.nbytes, what)
        self._charged.append((extent.category, slots * extent.nbytes))

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
        self._charge(extent, slots, "extents for what is trained from now on")
        before = [drive.nbytes for drive in self._drives]
        try:
            places = self._lay(self._shares(slots * extent.nbytes), extent.nbytes, slots)
            for drive, start in zip(self._drives, before, strict=True):
                drive.preallocate(start, drive.nbytes - start)
        except BaseException:
            for drive, start in zip(self._drives, before, strict=True):
                if drive.nbytes != start:
                    drive.shrink(start)
            self._ledger.discharge("nvme", *self._charged.pop())
            raise
        extent.take_slots(places)
