"""Tensors that leave the device between forward and backward: write-behind on the way out, read ahead on the way back.

A storage moves, not a tensor: whatever views of it are saved, it goes once, and they are cut out of it again. It goes in
pieces, each to a lease of host memory or to scratch on the drives, where its caller says and there is room. All of it
runs on threads of its own; the training thread waits where it needs something that is not back, where device memory is
short, and where it is two blocks ahead of what leaves.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from fuyou.core.errors import FuyouError, StateError
from fuyou.core.ledger import Ledger
from fuyou.core.races import Races
from fuyou.core.ticket import DONE, Ticket
from fuyou.swap.book import TensorBook
from fuyou.swap.buffers import Buffers
from fuyou.swap.rates import Rates, copy_rates, drive_rates
from fuyou.swap.stashed import Piece, Stashed, Where, flat_of
from fuyou.tiers.device import Device
from fuyou.tiers.host import Arena, Lease
from fuyou.tiers.scratch import Place, Scratch
from fuyou.tiers.worker import Worker

SMALLEST_BYTES = 64 << 10  # a smaller storage stays: moving it costs more than it holds


class Stash:
    """Takes storages off the device and brings them back: those that the host has room for whole, else `piece_bytes` at a
    time.

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
        self._stall = stall
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
        self._stashed: dict[tuple[int, int], Stashed] = {}  # by (storage, version), those that somebody claims
        self._leaving: deque[Stashed] = deque()
        self._coming: deque[Stashed] = deque()  # asked for ahead of their use, in that order
        ledger.relievers.insert(0, self._await_oldest)
        ledger.relievers.append(self._drop_latest)

    def put(self, tensor: torch.Tensor, tier: str, what: str) -> Stashed | None:
        """A claim on a device tensor's storage as it is now, on its way to `tier` ("host" | "nvme"), what the host has no
        room for to the drives. None for what stays: too small, of no plain layout, or with nowhere to go. BudgetError and
        StoreError where the drives have no room."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST_BYTES or not _is_plain(tensor) or tensor.device.type != self.device.device.type:
            return None
        key = (storage._cdata, tensor._version)
        with self._lock:
            known = self._stashed.get(key)
        if known is not None and known.claim():
            return known
        pieces = self._homes(storage.nbytes(), tier, what)
        if pieces is None:
            return None
        stashed: Stashed | None = None
        try:
            held = self.book.held(flat_of(storage, self.device.device), what)
            stashed = Stashed(self, key, held, pieces, what, self._turn)
            with self._lock:
                self._stashed[key] = stashed
            self._worker("out").submit(lambda: self._send(stashed), f"taking {what} off the device")
        except BaseException:
            if stashed is not None:
                stashed.unclaim()
            else:
                for piece in pieces:
                    piece.home.release()
            raise
        self._leaving.append(stashed)
        return stashed

    def stall(self) -> AbstractContextManager[None]:
        return self._stall()

    def use_pool(self, pool: Arena | None) -> None:
        """Host memory for what stays there, where there was none so far."""
        self._pool = self._pool or pool

    def rates(self) -> Rates:
        """How fast it moves bytes, measured with its own pieces and buffers: some hundredths of a second, once. Drives that
        are full or fail have none: whoever needs them is told by them."""
        if self._rates is None:
            buffer = self._buffers.take() if self._buffers is not None else None
            memory = (
                buffer.data
                if buffer is not None
                else torch.zeros(self._piece_bytes, dtype=torch.uint8, pin_memory=self.device.is_cuda)
            )
            try:
                self._rates = copy_rates(self.device, memory)
            finally:
                if buffer is not None:
                    self._put(buffer, [])
            if self._scratch is not None and self._buffers is not None:
                with contextlib.suppress(FuyouError):
                    written, read = drive_rates(self._scratch, self._buffers, self._piece_bytes)
                    self._rates = replace(self._rates, nvme_write_bytes_per_s=written, nvme_read_bytes_per_s=read)
        return self._rates

    def turn(self) -> None:
        """Another block begins: what left before the last one is gone by now, or is waited for. Raises its error, once. So the
        device holds what two blocks save, however fast it computes and however slow the drives are."""
        self._turn += 1
        while self._leaving and self._leaving[0].turn < self._turn - 1:
            stashed = self._leaving.popleft()
            if stashed.where is Where.LEAVING:
                stashed.wait()

    def rest(self) -> None:
        """A backward is over: what it brought back, and a graph that was retained still refers to, is only at home."""
        with self._lock:
            known = list(self._stashed.values())
        for stashed in known:
            stashed.leave_again()
        self._coming = deque(each for each in self._coming if each.where is Where.COMING)

    def bring(self, stashed: Stashed) -> None:
        if any(isinstance(piece.home, Place) for piece in stashed.pieces):
            self._worker("in").submit(lambda: self._bring(stashed), f"bringing {stashed.what} back")
        else:
            self._bring(stashed)  # nothing to read: it goes to the landing thread at once
        self._coming.append(stashed)

    def forget(self, stashed: Stashed) -> None:
        with self._lock:
            if self._stashed.get(stashed.key) is stashed:
                del self._stashed[stashed.key]

    def busy_text(self) -> str:
        return "; ".join(worker.busy_text() for worker in self._workers.values())

    def close(self) -> None:
        """What is under way ends; what graphs still refer to is given up. DeadlineError: it may be called again."""
        self._closed = True
        for name in ("out", "in", "landing"):
            if name in self._workers:
                self._workers[name].close()
        with self._lock:
            known = list(self._stashed.values())
        for stashed in known:
            stashed.give_up()
        self._leaving.clear()
        self._coming.clear()
        if self._buffers is not None:
            self._buffers.close()

    def _homes(self, nbytes: int, tier: str, what: str) -> list[Piece] | None:
        if tier == "host" and self._pool is not None:
            whole = self._pool.try_lease(nbytes, "activations")
            if whole is not None:
                return [Piece(0, nbytes, whole)]
        pieces: list[Piece] = []
        with contextlib.ExitStack() as undo:
            for offset in range(0, nbytes, self._piece_bytes):
                size = min(self._piece_bytes, nbytes - offset)
                home: Lease | Place | None = None
                if tier == "host" and self._pool is not None:
                    home = self._pool.try_lease(size, "activations")
                if home is None and self._scratch is not None:
                    home = self._scratch.take(size, what)
                if home is None:
                    return None
                undo.callback(home.release)
                pieces.append(Piece(offset, size, home))
            undo.pop_all()
        return pieces

    def _worker(self, name: str) -> Worker:
        if self._closed and name != "landing":
            raise StateError("What left the device was asked for after the run was closed.")
        with self._lock:  # the training thread and thread "in" may both be the first to want "landing"
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
            stashed = self._leaving.popleft()
            if stashed.where is Where.LEAVING:
                stashed.wait()
                return True
        return False

    def _drop_latest(self) -> bool:
        """What was brought ahead and is needed last goes home again."""
        while self._coming:
            stashed = self._coming.pop()
            if stashed.where is Where.COMING and not stashed.used:
                stashed.wait()
                if stashed.leave_again():
                    return True
        return False

    # The threads -----------------------------------------------------------------------------------------------------

    def _send(self, stashed: Stashed) -> None:
        """Thread "out"."""
        if not stashed.claim():
            return
        copies: deque[tuple[Piece, Lease | None, Ticket]] = deque()
        try:
            with self.device.guard():
                source, ready = stashed.on_device()
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
        finally:
            stashed.unclaim()

    def _write(self, piece: Piece, buffer: Lease | None, copy: Ticket) -> None:
        moves: list[Ticket] = [copy]
        try:
            copy.wait()
            if buffer is not None and isinstance(piece.home, Place):
                moves = [piece.home.write(buffer.address, buffer)]  # its error is told by the read, or never asked for
        finally:
            if buffer is not None and self._buffers is not None:
                self._buffers.put(buffer, moves)

    def _bring(self, stashed: Stashed) -> None:
        """Thread "in", or the training thread where nothing is on the drives: starts reads, as many as there are buffers; thread
        "landing" takes them to the device in order."""
        if not stashed.claim():
            return
        try:
            landing = self._worker("landing")
        except BaseException as error:  # no thread is to be had
            stashed.fail(error)
            self._landed(stashed)
            return
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
        landing.submit(lambda: self._landed(stashed), f"the last piece of {stashed.what}")

    def _landed(self, stashed: Stashed) -> None:
        stashed.end()
        stashed.unclaim()

    def _landing(self, stashed: Stashed, piece: Piece, buffer: Lease | None, read: Ticket) -> Callable[[], None]:
        def land() -> None:
            moves: list[Ticket] = [read]
            try:
                read.wait()
                source = piece.home.data if buffer is None else buffer.data[: piece.nbytes]  # type: ignore[union-attr]
                target, ready = stashed.on_device()
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


def _is_plain(tensor: torch.Tensor) -> bool:
    """What a view of its bytes is all there is to."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return type(tensor) in kinds and tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())
