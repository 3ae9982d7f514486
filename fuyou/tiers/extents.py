"""Ranges of bytes on the drives, in one or two slots: what is current, what a write takes, what a guess may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from fuyou.core.errors import DeadlineError, FuyouError, StateError
from fuyou.core.ticket import DONE, Ticket, wait_for
from fuyou.tiers.drives import Drive
from fuyou.tiers.verified import Verified

if TYPE_CHECKING:
    from fuyou.tiers.store import Store


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


class Unstarted:
    """The writer's ticket of bytes that a write was to go over and has not begun as a whole: nobody knows what they are."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        raise StateError(f"A write over {self._text} could not be started as a whole: its bytes are lost.")


class Part(NamedTuple):
    """Some bytes of a slot of an extent, in one piece on one drive."""

    drive: Drive
    offset: int
    nbytes: int


Slot = tuple[Part, ...]  # in the order of the extent's bytes


def slice_of(slot: Slot, offset: int, nbytes: int) -> Slot:
    """The parts of `slot` that hold its bytes from `offset` on, `nbytes` of them."""
    parts = []
    for drive, start, size in slot:
        first, last = max(offset, 0), min(offset + nbytes, size)
        if first < last:
            parts.append(Part(drive, start + first, last - first))
        offset -= size
    return tuple(parts)


class Ahead(NamedTuple):
    """A write into the slot that is not current, which `accept` makes current and `drop` forgets."""

    slot: int
    checksum: int | None
    ticket: Ticket


class Extent:
    """`nbytes` on the drives, in one or two slots; where they lie is decided when the store opens.

    `read` takes the current slot, which is what the last `write` or `accept` made current; a read that is under way keeps
    its slot. An extent that was never written has no bytes (`written` is False) and must not be read. `index`: its number
    in commit records, -1 where none names it. `what` its bytes are, for messages. Any thread may call any method.

    What records name has a checksum, everything has one in a store that verifies (Config(verify_reads=True)), and a read
    has that of the slot that it reads: whatever is written meanwhile, a read in place goes before it.

    [Note: slots of records] Without commits two slots alternate and one is written in place. With them, a slot that the
    newest durable record or a commit in flight names is never written: a crash leaves what it names. Neither is one that
    a checkpoint has still to copy (a pin). So a write takes the other slot where nothing names it, else the current one
    in place where nothing names that (a second write within a step), else it must wait (`free_after`): a commit in flight
    or a pin names one slot and the record before it the other.
    """

    __slots__ = (
        "_ahead",
        "_checksum",
        "_current",
        "_slots",
        "_store",
        "_writer",
        "category",
        "committed",
        "index",
        "nbytes",
        "what",
        "written",
    )

    def __init__(self, store: Store, nbytes: int, category: str, committed: bool) -> None:
        self._store = store
        self._slots: tuple[Slot, ...] = ()
        self._current = 0
        self._writer: Ticket = DONE
        self._ahead: Ahead | None = None
        self._checksum: int | None = None  # of the current slot's bytes; None: not known
        self.nbytes = nbytes
        self.category = category
        self.committed = committed
        self.index = -1
        self.what = f"an extent of {category}"
        self.written = False

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def take_slots(self, slots: Sequence[Slot]) -> None:
        """Called by Store only."""
        self._slots += tuple(slots)

    def adopt(self, index: int, slots: Sequence[Slot], current: int | None) -> None:
        """Called by Store only: an extent of an earlier run, with its number; `current`: the slot with its bytes, if any.
        Reads are not checked until `trust`: whoever adopts looks at the bytes first."""
        self.index, self._slots = index, tuple(slots)
        self._current, self.written = current or 0, current is not None

    def trust(self, checksum: int) -> None:
        """The bytes that were adopted have this one."""
        with self._store.lock:
            self._checksum = checksum

    def read(self, address: int, keep: object, *, check: bool = False) -> Ticket:
        """Start reading the extent to `address`; `keep` lives until that has ended. In a store that verifies, and with `check`
        where a checksum is known, the ticket raises StorageIOError for other bytes than were written."""
        with self._store.lock:  # until it has begun: the slot must not become a guess's in between
            if not self.written:
                raise StateError(f"{self._text(capital=True)} was read before it was written.")
            slot, known = self._slots[self._current], self._checksum
            read = Transfer(self._store.transfer("read", slot, address, keep), self._writer)
            if known is None or not (check or self._store.verify):
                return read
            return Verified(read, address, known, slot, self._text(), keep)

    def write(self, address: int, keep: object, *, ahead: bool = False) -> Ticket:
        """Start writing the extent from `address`; reads from now on see these bytes, and a pending guess is dropped.

        With `ahead` it is a guess: it goes to the slot that is not current, and reads see what they saw until `accept`.
        StateError where a commit has to become durable first (`free_after`), and for a guess that `can_write_ahead` rules
        out or that follows another one.
        """
        # The memory is the operation's until its ticket is done, so nobody changes it after this; before the lock, for
        # it takes a millisecond for each 10 MB.
        checksum = self._store.checksum_of(address, self.nbytes) if self.index >= 0 or self._store.verify else None
        with self._store.lock:
            if not self._slots:
                raise StateError(f"{self._text(capital=True)} was written before its store was open.")
            if ahead:
                slot = self._slot_ahead()
            else:
                self._ahead = None
                free = self._next_slot()
                slot = self._refuse() if free is None else free
            if self.written and self.committed:
                self._store.mark_dirty()
            if self.written and slot == self._current:  # until all of it has begun, whatever comes in between
                self._become(slot, None, Unstarted(self._text()))
            ticket = self._store.transfer("write", self._slots[slot], address, keep)
            if ahead:
                self._ahead = Ahead(slot, checksum, ticket)
            else:
                self._become(slot, checksum, ticket)
            return ticket

    def accept(self) -> None:
        """The guess is right: its bytes are current, and its ticket is the writer's."""
        with self._store.lock:
            self._become(*self._take_ahead("accepted"))

    def drop(self) -> None:
        """The guess is wrong. Its slot may be written again at once: engines order writes that overlap."""
        with self._store.lock:
            self._take_ahead("dropped")

    def read_slot(self, slot: int, offset: int, nbytes: int, address: int, keep: object) -> Ticket:
        """Start reading some bytes of a slot whose writer has ended and that is not written meanwhile: a pinned one."""
        with self._store.lock:
            return self._store.transfer("read", slice_of(self._slots[slot], offset, nbytes), address, keep)

    @property
    def can_write_ahead(self) -> bool:
        """Whether there is a slot beside the current one that no record, no commit in flight and no pin names."""
        with self._store.lock:
            return self.written and len(self._slots) == 2 and not self._store.names(self.index, 1 - self._current)

    def free_after(self) -> Ticket:
        """What must be done before the next `write`, at least: DONE, or the ticket of a commit in flight or of a pin.

        A commit that begins between this and the `write` can name the slot again: whoever writes and whoever commits
        agree on an order, or ask again (`await_free`). StateError where no commit will free a slot: an extent of one
        slot that a record names (`Store.add_slot`).
        """
        with self._store.lock:
            if not self.written or self._next_slot() is not None:
                return DONE
            return self._blocker()

    def await_free(self) -> None:
        """A slot is free for the next `write`."""
        while (ticket := self.free_after()) is not DONE:
            ticket.wait()

    def pinned(self) -> Ticket:
        """What a write beside the current slot waits for, when no commit stands in its way any more: a checkpoint."""
        with self._store.lock:
            return self._store.pinned(self.index, 1 - self._current)

    # ---- under the store's lock

    def _next_slot(self) -> int | None:
        """The slot of a write, see [Note: slots of records]; None where it must wait."""
        if not self.written:
            return self._current
        other = (self._current + 1) % len(self._slots)
        if not self._store.names(self.index, other):
            return other
        return None if self._store.names(self.index, self._current) else self._current

    def _slot_ahead(self) -> int:
        if self._ahead is not None:
            raise StateError(f"A guess for {self._text()} was written while another was neither accepted nor dropped.")
        if not self.can_write_ahead:
            why = "it was never written" if not self.written else "its other slot belongs to a commit"
            raise StateError(
                f"A guess for {self._text()} has no slot to go to: {why if len(self._slots) == 2 else 'it has only one'}."
            )
        return 1 - self._current

    def _take_ahead(self, verb: str) -> Ahead:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            raise StateError(f"A guess for {self._text()} was {verb}, and there is none.")
        return ahead

    def _become(self, slot: int, checksum: int | None, ticket: Ticket) -> None:
        self._current, self._checksum, self._writer, self.written = slot, checksum, ticket, True
        self._store.note(self.index, slot, checksum or 0, ticket)

    def _blocker(self) -> Ticket:
        ticket = self._store.frees(self.index, len(self._slots))
        if ticket is None:
            raise StateError(
                f"{self._text(capital=True)} has one slot, which a commit record names: give it a second one "
                "(Store.add_slot) before it is written again."
            )
        return ticket

    def _refuse(self) -> NoReturn:
        ticket = self._blocker()
        if ticket.done():
            ticket.wait()  # it has failed, and says so: what it names will never be free
        raise StateError(
            f"{self._text(capital=True)} was written while {ticket} is under way: it and a record name both slots. Wait "
            "for free_after() first."
        )

    def _text(self, *, capital: bool = False) -> str:
        text = f"{self.what} ({self.nbytes} bytes)"
        return text[0].upper() + text[1:] if capital else text
