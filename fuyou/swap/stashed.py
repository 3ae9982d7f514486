"""One storage that has left the device, or is about to: where its bytes are, who claims it, and its way back.

[Note: claims] Whoever may still ask for the bytes has a claim, and so has the thread that moves them; the last to let go gives
homes and device memory back. Counted under the lock, so that nobody can take hold of one that is being given back: a weak
reference and `__del__` cannot promise that, for an object can be referred to anew while its `__del__` runs.
"""

from __future__ import annotations

import enum
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.ticket import DONE, Ticket
from fuyou.swap.book import Held, TensorBook
from fuyou.tiers.device import Device
from fuyou.tiers.host import Lease
from fuyou.tiers.scratch import Place


class Where(enum.Enum):
    """Where a stashed storage's bytes are, and so what memory it holds."""

    LEAVING = "leaving"  # device and home; a copy home is under way, or waits for its turn
    AWAY = "away"  # home
    COMING = "coming"  # device and home; a copy to the device is under way
    BACK = "back"  # device and home
    GONE = "gone"  # none: nobody claims it, or the run is closed


@dataclass(frozen=True)
class Piece:
    """`nbytes` of a storage from `offset` on, in host memory or on the drives."""

    offset: int
    nbytes: int
    home: Lease | Place


class Mover(Protocol):
    """What a stashed storage needs of the Stash that it is in."""

    device: Device
    book: TensorBook

    def bring(self, stashed: Stashed) -> None:
        """Start copying it to the device memory that it has."""

    def forget(self, stashed: Stashed) -> None:
        """Nobody claims it any more."""

    def stall(self) -> AbstractContextManager[None]: ...

    def busy_text(self) -> str: ...


class Stashed:
    """Made with one claim, its maker's. `get` gives its bytes on the device.

    The training thread alone takes it from AWAY to COMING and from there to BACK; the mover's threads end LEAVING and
    COMING. Not copied on write: `version` of the tensor is the caller's to check.
    """

    __slots__ = (
        "_claims", "_copied", "_ended", "_error", "_held", "_lock", "_mover", "_pid", "_ready", "_storage", "key", "nbytes",
        "pieces", "turn", "used", "what", "where",
    )  # fmt: skip

    def __init__(
        self, mover: Mover, key: tuple[int, int], held: Held, pieces: list[Piece], what: str, turn: int
    ) -> None:
        self.key = key
        self.nbytes = held.tensor.numel()
        self.pieces = pieces
        self.what = what
        self.turn = turn
        self.where = Where.LEAVING
        self.used = False  # somebody has asked for it since it was last away
        self._mover = mover
        self._held: Held | None = held  # (nbytes,) uint8, device
        self._storage = StorageWeakRef(held.tensor.untyped_storage())  # keeps `key` from naming another storage
        self._ready = mover.device.mark()  # behind the kernels that wrote it; coming: that used its memory before
        self._copied: Ticket = (
            DONE  # the last copy to the device that was queued, and the compute stream has not joined
        )
        self._ended = threading.Event()  # of what is under way
        self._error: BaseException | None = None
        self._claims = 1
        self._pid = os.getpid()
        self._lock = threading.RLock()  # held for moments only: never while anything is waited for

    # Claims ----------------------------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """One claim more; False where there was none any more, and it is gone."""
        with self._lock:
            if self._claims == 0:
                return False
            self._claims += 1
            return True

    def unclaim(self) -> None:
        """One claim less. In a forked child nothing happens: what is given back is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._claims -= 1
            last = self._claims == 0
        if last:  # nothing is under way: the thread would have a claim
            self._mover.forget(self)
            self.give_up()

    def give_up(self) -> None:
        """Give everything back, whoever has a claim; no thread moves it. Idempotent.

        CUDA: a copy to the device that was queued may still read a lease of the host. Whoever gets the lease next fills it
        by a copy behind an event of the compute stream, which has joined that copy before this storage was used; and where
        it has not, nobody reads what is copied. Drives: engines order what overlaps in a file.
        """
        with self._lock:
            self._drop_device()
            self.where = Where.GONE
            pieces, self.pieces = self.pieces, []
        for piece in pieces:
            piece.home.release()

    # The training thread ---------------------------------------------------------------------------------------------

    def fetch(self) -> bool:
        """Start bringing it back, where the device has room now; False where it has not. Nothing for one that is gone."""
        if not self.claim():
            return True
        try:
            return self.where is not Where.AWAY or self._revive() or self._come(needed=False)
        finally:
            self.unclaim()

    def get(self) -> torch.Tensor:
        """Its (nbytes,) uint8 bytes on the device, for what is computed from now on. BudgetError where the device has no
        room for them, and the errors of moving them."""
        with self._lock:
            self.used = True  # from here on a copy home that ends leaves the device's bytes where they are
        if self.where is Where.AWAY and not self._revive():
            self._come(needed=True)
        if self.where is Where.COMING:
            self.wait()
            # Copies of one storage are queued on one stream, in order: behind the last one all are there.
            self._mover.device.join(self._copied)
            self._copied = DONE
            self.where = Where.BACK
        held = self._held
        if held is None:
            raise StateError(f"{self.what}, which had left the device, was asked for after the run was closed.")
        return held.tensor

    def wait(self) -> None:
        """For what is under way; raises its error."""
        if not self._ended.is_set():
            with self._mover.stall():
                if not self._ended.wait(self._mover.device.deadline_s):
                    raise DeadlineError(
                        f"Waited {self._mover.device.deadline_s:g} s for {self.what} ({self.nbytes} bytes), which is "
                        f"{self.where.value}; {self._mover.busy_text()}."
                    )
        if self._error is not None:
            raise self._error

    def leave_again(self) -> bool:
        """Its bytes are not needed on the device any more, or not yet; False where none are there that could go."""
        with self._lock:
            if self.where is not Where.BACK and not (self.where is Where.COMING and self._ended.is_set()):
                return False
            self._drop_device()
            self.where, self.used = Where.AWAY, False
            return True

    def _revive(self) -> bool:
        """Somebody else kept the storage alive all the while (a buffer of the model, an output that the user holds)."""
        if self._storage.expired():
            return False
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return False
        held = self._mover.book.held(flat_of(storage, self._mover.device.device), self.what)
        with self._lock:
            self._held, self.where = held, Where.BACK
        return True

    def _come(self, *, needed: bool) -> bool:
        held = self._mover.book.make(self.nbytes, self.what, needed=needed)  # may wait for others that leave
        if held is None:
            return False
        with self._lock:
            self._held, self.where, self._error = held, Where.COMING, None
            self._ready = self._mover.device.mark()
            self._ended.clear()
        try:
            self._mover.bring(self)
        except BaseException:  # no thread is to be had, or the run is closed
            with self._lock:
                self._held, self.where = None, Where.AWAY
            self._ended.set()
            raise
        return True

    def _drop_device(self) -> None:
        held, self._held = self._held, None
        if held is not None and self._copied is not DONE:  # back, and the compute stream has not joined the copy
            self._mover.device.free_behind_copies_in(held.tensor)
        self._copied = DONE

    # The mover's threads, which have a claim -------------------------------------------------------------------------

    def on_device(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """LEAVING: its bytes on the device; COMING: the memory for them. And the event that copies come behind."""
        if self._held is None:
            raise StateError(f"{self.what} was to be moved and is not on the device.")
        return self._held.tensor, self._ready

    def came(self, copied: Ticket) -> None:
        """One more copy to the device is queued, behind those before."""
        self._copied = copied

    def fail(self, error: BaseException) -> None:
        self._error = self._error or error

    def end(self, error: BaseException | None = None) -> None:
        """What was under way has ended: all of it is home, or on its way to the device in the order of a stream."""
        with self._lock:
            self._error = self._error or error
            if self.where is Where.LEAVING and self._error is None:
                if self.used:
                    self.where = Where.BACK
                else:  # the copies have ended, so the memory is free for anybody
                    self.where, self._held = Where.AWAY, None
        self._ended.set()


def flat_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """All of a storage as (nbytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),), (1,))
