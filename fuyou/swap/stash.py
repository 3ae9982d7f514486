"""Tensors that leave the device between forward and backward: write-behind on the way out, read ahead on the way back.

A storage moves, not a tensor: whatever views of it are saved, it goes once, and they are cut out of it again. It goes in
pieces, each to a lease of host memory or to scratch on the drives, where its caller says and there is room. All of it
runs on threads of its own; the training thread waits where it needs something that is not back, where device memory is
short, and where it is two blocks ahead of what leaves.
"""

from __future__ import annotations

import contextlib
import enum
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fuyou.core.errors import BudgetError, DeadlineError, StateError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.core.races import Races
from fuyou.core.ticket import DONE, Ticket, wait_for
from fuyou.swap.book import Held, TensorBook
from fuyou.swap.buffers import Buffers
from fuyou.tiers.device import Device
from fuyou.tiers.host import Arena, Lease
from fuyou.tiers.scratch import Place, Scratch
from fuyou.tiers.worker import Worker

MEASURED_PIECES = 16
SMALLEST_BYTES = 64 << 10  # a smaller storage stays: moving it costs more than it holds


class Where(enum.Enum):
    """Where a stashed storage's bytes are, and so what memory it holds."""

    LEAVING = "leaving"  # device and home; a copy home is under way, or waits for its turn
    AWAY = "away"  # home
    COMING = "coming"  # device and home; a copy to the device is under way
    BACK = "back"  # device and home


@dataclass(frozen=True)
class Rates:
    """Bytes a second off the device and back, and of the drives through the stash's buffers; 0.0 for what it has not."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    nvme_write_bytes_per_s: float = 0.0
    nvme_read_bytes_per_s: float = 0.0


@dataclass(frozen=True)
class Piece:
    offset: int
    nbytes: int
    home: Lease | Place


class Stashed:
    """One storage in the stash. `get` gives its bytes on the device; its homes are given back when nobody refers to it."""

    __slots__ = (
        "__weakref__", "_copied", "_dead", "_ended", "_error", "_held", "_lock", "_moving", "_pieces", "_ready", "_stash",
        "_storage", "nbytes", "turn", "used", "what", "where",
    )  # fmt: skip

    def __init__(self, stash: Stash, held: Held, pieces: list[Piece], what: str, turn: int) -> None:
        self.nbytes = held.tensor.numel()
        self.what = what
        self.turn = turn
        self.where = Where.LEAVING
        self.used = False  # somebody has asked for it since it was last away
        self._stash = stash
        self._held: Held | None = held  # (nbytes,) uint8, device
        self._storage = StorageWeakRef(held.tensor.untyped_storage())
        self._pieces = pieces
        self._ready = stash.device.mark()  # behind the kernels that wrote it, or (coming) that used its memory before
        self._copied: Ticket = DONE  # the last copy to the device that was queued
        self._ended = threading.Event()  # of what is under way
        self._error: BaseException | None = None
        self._lock = threading.RLock()  # a collection may end a life while this is held
        self._moving = self._dead = False  # a thread moves it; nobody can ask for it any more

    # The training thread ---------------------------------------------------------------------------------------------

    def fetch(self) -> bool:
        """Start bringing it back, where the device has room now; False where it has not."""
        with self._lock:
            return self.where is not Where.AWAY or self._revive() or self._come(needed=False)

    def get(self) -> torch.Tensor:
        """Its (nbytes,) uint8 bytes on the device, for what is computed from now on. BudgetError where the device has no
        room for them, and the errors of moving them."""
        with self._lock:
            self.used = True
            if self.where is Where.AWAY and not self._revive():
                self._come(needed=True)
            held = self._held
        if held is None:
            raise StateError(f"{self.what}, which had left the device, was asked for after the run was closed.")
        if self.where is Where.COMING:
            self.wait()
            self._stash.device.join(self._copied)
            self._copied = DONE
            self.where = Where.BACK
        return held.tensor

    def wait(self) -> None:
        """For what is under way; raises its error."""
        if not self._ended.is_set():
            with self._stash.stall():
                if not self._ended.wait(self._stash.device.deadline_s):
                    raise DeadlineError(
                        f"Waited {self._stash.device.deadline_s:g} s for {self.what} ({self.nbytes} bytes) to be "
                        f"{self.where.value}; {self._stash.busy_text()}."
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

    def release(self) -> None:
        """Give everything back; nothing is under way any more."""
        self._drop_device()
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            piece.home.release()

    def __del__(self) -> None:
        self._stash.forget(self)
        with self._lock:
            self._dead = True
            moving = self._moving  # a thread took hold of it while this began, and releases it when it is through
        if not moving:
            self.release()

    def _revive(self) -> bool:
        """Somebody else kept the storage alive all the while (a buffer of the model, an output the user holds)."""
        if self._storage.expired():
            return False
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return False
        self._held = self._stash.book.held(flat_of(storage, self._stash.device.device), self.what)
        self.where = Where.BACK
        return True

    def _come(self, *, needed: bool) -> bool:
        held = self._stash.book.make(self.nbytes, self.what, needed=needed)
        if held is None:
            return False
        self._held = held
        self._ready = self._stash.device.mark()
        self._ended.clear()
        self.where = Where.COMING
        self._stash.bring(self)
        return True

    def _drop_device(self) -> None:
        held, self._held = self._held, None
        if held is not None and self._copied is not DONE:  # back, and nobody has waited for it
            self._stash.device.free_behind_copies_in(held.tensor)
        self._copied = DONE

    # The stash's threads ---------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """A thread is about to move it; False where nobody wants that any more."""
        with self._lock:
            self._moving = not self._dead
            return self._moving

    @property
    def pieces(self) -> list[Piece]:
        return self._pieces

    def source(self) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """While it is leaving: its bytes on the device, and what their copies come behind."""
        if self._held is None:
            raise StateError(f"{self.what} was to leave the device and is not there.")
        return self._held.tensor, self._ready

    target = source  # while it is coming

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
                if self.used:  # it is used from where it is
                    self.where = Where.BACK
                else:
                    self.where = Where.AWAY
                    self._held = None
            self._moving = False
            dead = self._dead
        self._ended.set()
        if dead:
            self.release()


class Stash:
    """Takes storages off the device and brings them back, `piece_bytes` at a time.

    `pool`: host memory for what stays there. `scratch`: room on the drives, through `buffers` of `piece_bytes`. What has
    neither stays on the device. `stall`: entered while the training thread waits.
    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        book: TensorBook,
        *,
        piece_bytes: int,
        pool: Arena | None,
        scratch: Scratch | None,
        buffers: Buffers | None,
        stall: Callable[[], AbstractContextManager[None]],
        in_flight: Callable[[], list[str]],
        races: Races | None = None,
    ) -> None:
        self.device = device
        self.book = book
        self.stall = stall
        self._piece_bytes = piece_bytes
        self._pool = pool
        self._scratch = scratch
        self._buffers = buffers
        self._in_flight = in_flight
        self._races = races
        self._workers: dict[str, Worker] = {}
        self._closed = False
        self._rates: Rates | None = None
        self._turn = 0
        self._lock = threading.RLock()
        self._stashed: dict[tuple[int, int], weakref.ref[Stashed]] = {}  # (storage, version)
        self._keys: dict[int, tuple[int, int]] = {}  # id of a Stashed → its key
        self._leaving: deque[weakref.ref[Stashed]] = deque()
        self._coming: deque[weakref.ref[Stashed]] = deque()  # asked for ahead of their use, in that order
        ledger.relievers.insert(0, self._await_oldest)
        ledger.relievers.append(self._drop_latest)

    def put(self, tensor: torch.Tensor, tier: str, what: str) -> Stashed | None:
        """The stash of a device tensor's storage as it is now, on its way to `tier` ("host" | "nvme"), what the host has no
        room for to the drives. None for what stays: too small, of no plain layout, or with nowhere to go."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST_BYTES or not _is_plain(tensor) or tensor.device.type != self.device.device.type:
            return None
        key = (storage._cdata, tensor._version)
        with self._lock:
            reference = self._stashed.get(key)
            known = reference() if reference is not None else None
        # The weak reference keeps the storage's address from being another one's.
        if known is not None:
            return known
        pieces = self._homes(storage.nbytes(), tier)
        if pieces is None:
            return None
        held = self.book.held(flat_of(storage, self.device.device), what)
        stashed = Stashed(self, held, pieces, what, self._turn)
        reference = weakref.ref(stashed)
        with self._lock:
            self._stashed[key] = reference
            self._keys[id(stashed)] = key
        self._leaving.append(reference)
        self._worker("out").submit(lambda: self._send(reference), f"taking {what} off the device")
        return stashed

    def use_pool(self, pool: Arena | None) -> None:
        """Host memory for what stays there, where there was none so far."""
        self._pool = self._pool or pool

    def rates(self) -> Rates:
        """How fast it moves bytes now, measured with its own pieces and buffers; a few hundredths of a second, once."""
        if self._rates is None:
            out_s, in_s = self._copy_seconds()
            self._rates = Rates(self._piece_bytes / out_s, self._piece_bytes / in_s)
            if self._scratch is not None and self._buffers is not None:
                total = MEASURED_PIECES * self._piece_bytes
                with contextlib.suppress(BudgetError, StoreError):  # drives that are full hold no activations
                    write_s, read_s = self._drive_seconds(self._scratch, self._buffers)
                    self._rates = replace(
                        self._rates, nvme_write_bytes_per_s=total / write_s, nvme_read_bytes_per_s=total / read_s
                    )
        return self._rates

    def turn(self) -> None:
        """Another block begins: what left before the last one is gone by now, or is waited for. Raises its errors. So the
        device holds what two blocks save, however fast it computes and however slow the drives are."""
        self._turn += 1
        while self._leaving:
            stashed = self._leaving[0]()
            if stashed is not None:
                if stashed.turn >= self._turn - 1:
                    return
                stashed.wait()
            self._leaving.popleft()

    def rest(self) -> None:
        """A backward is over: what it brought back, and a graph that was retained still refers to, is only at home."""
        self._coming.clear()
        with self._lock:
            known = [reference() for reference in self._stashed.values()]
        for stashed in known:
            if stashed is not None:
                stashed.leave_again()

    def bring(self, stashed: Stashed) -> None:
        """Called by Stashed only."""
        reference = weakref.ref(stashed)
        self._coming.append(reference)
        self._worker("in").submit(lambda: self._bring(reference), f"bringing {stashed.what} back")

    def forget(self, stashed: Stashed) -> None:
        """Called by Stashed only."""
        with self._lock:
            key = self._keys.pop(id(stashed), None)
            if key is not None:
                self._stashed.pop(key, None)

    def busy_text(self) -> str:
        return "; ".join(worker.busy_text() for worker in self._workers.values())

    def close(self) -> None:
        """What is under way ends; what graphs still refer to is given up. DeadlineError: it may be called again."""
        self._closed = True
        for name in ("out", "in", "landing"):
            if name in self._workers:
                self._workers[name].close()
        with self._lock:
            known = [reference() for reference in self._stashed.values()]
        for stashed in known:
            if stashed is not None:
                stashed.where = Where.AWAY
                stashed.release()
        if self._buffers is not None:
            self._buffers.close()

    def _copy_seconds(self) -> tuple[float, float]:
        """Of one piece, off the device and back: the least of three."""
        on_device = torch.zeros(self._piece_bytes, dtype=torch.uint8, device=self.device.device)
        lease = self._buffers.take() if self._buffers is not None else None
        pooled = (
            self._pool.try_lease(self._piece_bytes, "staging") if lease is None and self._pool is not None else None
        )
        host = lease or pooled
        data = host.data if host is not None else torch.zeros(self._piece_bytes, dtype=torch.uint8)
        try:
            out_s, in_s = [], []
            for _ in range(3):
                began = time.perf_counter()
                self.device.copy_out(data, on_device).wait()
                out = time.perf_counter()
                self.device.copy_in(on_device, data).wait()
                out_s.append(out - began)
                in_s.append(time.perf_counter() - out)
        finally:
            if lease is not None:
                self._put(lease, [])
            if pooled is not None:
                pooled.release()
        return min(out_s), min(in_s)

    def _drive_seconds(self, scratch: Scratch, buffers: Buffers) -> tuple[float, float]:
        """Of writing MEASURED_PIECES, and of reading them; a file system is slower at what it writes for the first time."""
        places: list[Place] = []
        seconds = []
        try:
            places += (scratch.take(self._piece_bytes) for _ in range(MEASURED_PIECES))
            for kind in ("write", "write", "read"):
                began = time.perf_counter()
                tickets = []
                for place in places:
                    buffer = buffers.take()
                    move = place.write if kind == "write" else place.read
                    tickets.append(move(buffer.address, buffer))
                    buffers.put(buffer, [tickets[-1]])
                wait_for(tickets)
                seconds.append(time.perf_counter() - began)
        finally:
            for place in places:
                place.release()
        return seconds[1], seconds[2]

    def _homes(self, nbytes: int, tier: str) -> list[Piece] | None:
        pieces: list[Piece] = []
        with contextlib.ExitStack() as undo:
            for offset in range(0, nbytes, self._piece_bytes):
                size = min(self._piece_bytes, nbytes - offset)
                home: Lease | Place | None = None
                if tier == "host" and self._pool is not None:
                    home = self._pool.try_lease(size, "activations")
                if home is None and self._scratch is not None:
                    home = self._scratch.take(size)
                if home is None:
                    return None
                undo.callback(home.release)
                pieces.append(Piece(offset, size, home))
            undo.pop_all()
        return pieces

    def _worker(self, name: str) -> Worker:
        if self._closed and name != "landing":
            raise StateError("What left the device was asked for after the run was closed.")
        if name not in self._workers:
            self._workers[name] = Worker(
                f"fuyou-activations-{name}",
                deadline_s=self.device.deadline_s,
                in_flight=self._in_flight,
                races=self._races,
            )
        return self._workers[name]

    # Making room on the device ---------------------------------------------------------------------------------------

    def _await_oldest(self) -> bool:
        """What is on its way out will be gone: cheaper than dropping what must be read again."""
        while self._leaving:
            stashed = self._leaving.popleft()()
            if stashed is not None and stashed.where is Where.LEAVING:
                stashed.wait()
                return True
        return False

    def _drop_latest(self) -> bool:
        """What was brought ahead and is needed last goes home again."""
        while self._coming:
            stashed = self._coming.pop()()
            if stashed is not None and not stashed.used and stashed.where is Where.COMING:
                stashed.wait()
                if stashed.leave_again():
                    return True
        return False

    # The threads -----------------------------------------------------------------------------------------------------

    def _send(self, reference: weakref.ref[Stashed]) -> None:
        """Thread "out"."""
        stashed = reference()
        if stashed is None or not stashed.begin():
            return
        copies: deque[tuple[Piece, Lease | None, Ticket]] = deque()
        try:
            with self.device.guard():
                source, ready = stashed.source()
                for piece in stashed.pieces:
                    part = source[piece.offset : piece.offset + piece.nbytes]
                    buffer = None if isinstance(piece.home, Lease) else self._take()
                    target = piece.home.data if buffer is None else buffer.data[: piece.nbytes]  # type: ignore[union-attr]
                    copies.append((piece, buffer, self.device.copy_out(target, part, ready, here=True)))
                    if len(copies) > 1:  # one copies while the one before is being handed to the drive
                        self._write(*copies.popleft())
                while copies:
                    self._write(*copies.popleft())
            stashed.end()
        except BaseException as error:
            for _, buffer, copy in copies:
                if buffer is not None and self._buffers is not None:
                    self._buffers.put(buffer, [copy])
            stashed.end(error)

    def _write(self, piece: Piece, buffer: Lease | None, copy: Ticket) -> None:
        moves: list[Ticket] = [copy]
        try:
            copy.wait()
            if buffer is not None and isinstance(piece.home, Place):
                moves = [piece.home.write(buffer.address, buffer)]  # its error is told by the read, or never asked for
        finally:
            if buffer is not None and self._buffers is not None:
                self._buffers.put(buffer, moves)

    def _bring(self, reference: weakref.ref[Stashed]) -> None:
        """Thread "in": starts reads, as many as there are buffers; thread "landing" takes them to the device in order."""
        stashed = reference()
        if stashed is None or not stashed.begin():
            return
        landing = self._worker("landing")
        try:
            for piece in stashed.pieces:
                buffer: Lease | None = None
                read: Ticket = DONE
                if isinstance(piece.home, Place):
                    buffer = self._take()
                    try:
                        read = piece.home.read(buffer.address, buffer)
                    except BaseException:
                        self._put(buffer, [])
                        raise
                landing.submit(self._landing(stashed, piece, buffer, read), f"a piece of {stashed.what}")
        except BaseException as error:
            stashed.fail(error)
        landing.submit(stashed.end, f"the last piece of {stashed.what}")

    def _landing(self, stashed: Stashed, piece: Piece, buffer: Lease | None, read: Ticket) -> Callable[[], None]:
        def land() -> None:
            moves: list[Ticket] = [read]
            try:
                read.wait()
                source = piece.home.data if buffer is None else buffer.data[: piece.nbytes]  # type: ignore[union-attr]
                target, ready = stashed.target()
                with self.device.guard():
                    part = target[piece.offset : piece.offset + piece.nbytes]
                    moves = [self.device.copy_in(part, source, ready)]
                stashed.came(moves[0])
            except BaseException as error:
                stashed.fail(error)
            finally:
                if buffer is not None:
                    self._put(buffer, moves)

        return land

    def _take(self) -> Lease:
        if self._buffers is None:
            raise StateError("Activations were to go to the drives, and no staging was planned for them.")
        return self._buffers.take()

    def _put(self, buffer: Lease, moves: list[Ticket]) -> None:
        if self._buffers is not None:
            self._buffers.put(buffer, moves)


def flat_of(storage: torch.UntypedStorage, device: torch.device) -> torch.Tensor:
    """All of a storage as (nbytes,) uint8."""
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (storage.nbytes(),), (1,))


def _is_plain(tensor: torch.Tensor) -> bool:
    """What a view of its bytes is all there is to."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(tensor) in kinds and tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())
