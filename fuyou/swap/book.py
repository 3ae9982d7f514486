"""Device tensors in the ledger: charged once a storage, however often they are held."""

from __future__ import annotations

import threading

import torch

from fuyou.core.ledger import Ledger
from fuyou.tiers.device import empty_bytes


class TensorBook:
    """Charges storages as activations of the device. Any thread may drop what it holds."""

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        self._ledger = ledger
        self._device = device
        self._lock = threading.RLock()  # a collection inside may drop
        self._held: dict[int, tuple[int, int]] = {}  # storage → (holders, bytes)

    def held(self, tensor: torch.Tensor, what: str) -> Held:
        """`tensor`, charged from now on if its storage was not; BudgetError where it does not fit."""
        return Held(tensor, self, what)

    def make(self, nbytes: int, what: str, *, needed: bool) -> Held | None:
        """New (nbytes,) uint8 on the device, charged before they are there. Without the room BudgetError, or None for what
        is not `needed`: also where torch's allocator has it in pieces alone, of which none is large enough."""
        if needed:
            self._ledger.charge("device", "activations", nbytes, what)
        elif not self._ledger.try_charge("device", "activations", nbytes):
            return None
        with self._ledger.discharged_on_error("device", "activations", nbytes):
            tensor = self._empty(nbytes, needed)
        if tensor is None:
            self._ledger.discharge("device", "activations", nbytes)
            return None
        with self._lock:
            self._held[tensor.untyped_storage()._cdata] = (0, nbytes)
        return Held(tensor, self, what)

    def _empty(self, nbytes: int, needed: bool) -> torch.Tensor | None:
        while True:
            try:
                return empty_bytes(nbytes, self._device)
            except torch.OutOfMemoryError:
                if not needed:
                    return None
                if not self._ledger.relieve():
                    raise

    def hold(self, tensor: torch.Tensor, what: str) -> int:
        """Charge; returns the key to `drop` with, 0 for a tensor that costs the device nothing."""
        if tensor.device.type != self._device.type:
            return 0
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        with self._lock:
            booked = key in self._held
        if not booked:  # not under the lock: making room may wait for a thread that drops
            self._ledger.charge("device", "activations", nbytes, what)
        with self._lock:
            if not booked and key in self._held:  # two threads held it first
                self._ledger.discharge("device", "activations", nbytes)
            holders, size = self._held.get(key, (0, nbytes))
            self._held[key] = (holders + 1, size)
        return key

    def drop(self, key: int) -> None:
        if key == 0:
            return
        with self._lock:
            holders, booked = self._held[key]
            if holders > 1:
                self._held[key] = (holders - 1, booked)
                return
            del self._held[key]
        self._ledger.discharge("device", "activations", booked)


class Held:
    """A tensor that is kept, charged as long as this object lives."""

    __slots__ = ("_book", "_key", "tensor")

    def __init__(self, tensor: torch.Tensor, book: TensorBook, what: str) -> None:
        self._book = book
        self._key = 0
        self._key = book.hold(tensor, what)
        self.tensor = tensor

    def __del__(self) -> None:
        self._book.drop(self._key)
