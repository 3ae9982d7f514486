"""The weights' resident: which units are on the device, and the three verbs that move them."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import torch

from fuyou.core.errors import BudgetError, StateError
from fuyou.core.ledger import Ledger
from fuyou.core.sizes import format_bytes
from fuyou.swap.loader import Loader, Loading
from fuyou.swap.ranges import WriteBehind
from fuyou.swap.unit import Member, Residency, Unit, chunks_of, overlap
from fuyou.swap.update import Claims
from fuyou.tiers.device import Device


class Swapper:
    """At most `limit_bytes` of units on the device: `fetch` starts, `get` waits on the compute stream, `release` frees.

    A released unit stays READY until its room is wanted: least recently used goes first. The caller's thread changes
    states and allocates; the loader's reads NVMe and queues copies, in the order of the fetches. The lock makes the
    autograd thread and a second training thread safe; the loader never takes it.

    `bind` and `unbind` are told when a unit's parameters become views of its storage, and placeholders again.
    """

    def __init__(
        self,
        *,
        device: Device,
        ledger: Ledger,
        loader: Loader,
        writes: WriteBehind,
        claims: Claims,
        limit_bytes: int,
        bind: Callable[[Unit], None],
        unbind: Callable[[Unit], None],
    ) -> None:
        self._device = device
        self._ledger = ledger
        self._loader = loader
        self._writes = writes
        self._claims = claims
        self._limit_bytes = limit_bytes
        self._bind = bind
        self._unbind = unbind
        self._closed = False
        # Of the times that a block's weights were wanted: they were there, or on their way, or nobody had asked for them.
        self.prefetches = dict.fromkeys(("hit", "late", "miss"), 0)
        self._lock = threading.RLock()
        self._resident: OrderedDict[Unit, None] = OrderedDict()  # least recently used first
        self._resident_bytes = 0
        self._by_storage: dict[int, Unit] = {}
        self._own_references: dict[Unit, int] = {}  # to a unit's storage, while its parameters are away
        self._loads: dict[Unit, Loading] = {}

    def adopt(self, unit: Unit) -> None:
        """Take charge of a packed unit."""
        storage = unit.flat.untyped_storage()._cdata
        self._by_storage[storage] = unit
        self._own_references[unit] = torch._C._storage_Use_Count(storage)

    def unit_of(self, tensor: torch.Tensor) -> Unit | None:
        """The unit whose storage `tensor` is a view of."""
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    # The three verbs -------------------------------------------------------------------------------------------------

    def fetch(self, unit: Unit, *, needed: bool = False) -> bool:
        """Start bringing a unit in; True when it is on its way or there. A hint (not `needed`) gives up for want of room."""
        with self._lock:
            if unit.residency is Residency.LOADING and self._loads[unit].cancelled:
                if not (needed or self._loads[unit].cancel()):
                    return False  # a drive that did not answer has its memory still, and a hint waits for nobody
                self._drop(unit)
            if unit.residency is not Residency.ABSENT:
                self._resident.move_to_end(unit)
                return True
            if self._closed:
                raise StateError(
                    f"The weights of {unit.name} are needed, and the run is closed: run backward before that."
                )
            # A pinned unit whose weights went stale keeps its memory.
            if unit not in self._resident and not self._take_memory(unit, needed):
                return False
            unit.residency = Residency.LOADING
            # The copies wait for the kernels that used this memory before.
            unit.arrival = self._loads[unit] = self._loader.load(unit, self._device.mark())
            return True

    def get(self, unit: Unit) -> None:
        """Weights usable by what is queued on the compute stream from now on; parameters are bound to them."""
        with self._lock:
            self.prefetches[self._found(unit)] += 1
            self.fetch(unit, needed=True)
            unit.users += 1
            if unit.residency is Residency.IN_USE:
                return
            try:
                unit.arrival.wait()
            except BaseException:
                unit.users -= 1
                if self._loads[unit].cancel():
                    self._drop(unit)
                raise  # otherwise a drive that does not answer has the memory still: the next fetch looks again
            self._device.join(unit.copied)
            unit.residency = Residency.IN_USE
            self._bind(unit)

    def release(self, unit: Unit) -> None:
        """One user less. The memory is reused only by work queued after this (compute-stream order on CUDA)."""
        with self._lock:
            if unit.residency is not Residency.IN_USE or unit.users < 1:
                raise StateError(
                    f"Unit {unit.name} was released in state {unit.residency.name} with {unit.users} users."
                )
            unit.users -= 1
            if unit.users == 0:
                self._unbind(unit)
                unit.residency = Residency.READY

    # Around the verbs ------------------------------------------------------------------------------------------------

    def invalidate(self, unit: Unit) -> None:
        """The bytes at home change: what is on the device is stale and goes. A copy that was reading them on the host is
        over when `unit.copied` is done."""
        with self._lock:
            if unit.residency is Residency.IN_USE:
                raise StateError(f"The weights of {unit.name} were changed while {unit.users} blocks use them.")
            if unit.residency is not Residency.ABSENT:
                self._drop(unit)

    def pin(self, unit: Unit) -> None:
        """Keep a unit's device memory from now on: it is read outside of its blocks, and autograd may hold raw views."""
        with self._lock:
            if not unit.pinned:
                self.fetch(unit, needed=True)
                unit.pinned = True
                self._limit_bytes += unit.nbytes

    def drop_idle(self) -> bool:
        """Give back the device memory of one unit that nobody uses, for something other than weights; False: none can go."""
        with self._lock:
            victim = self._victim(needed=True)
            if victim is not None:
                self._drop(victim)
            return victim is not None

    @property
    def resident(self) -> list[Unit]:
        """Units that have device memory now, least recently used first."""
        with self._lock:
            return list(self._resident)

    def drop_all(self) -> None:
        """Give back all device memory of units (closing)."""
        with self._lock:
            for unit in list(self._resident):
                unit.users, unit.pinned = 0, False
                self._drop(unit)

    def close(self) -> None:
        self._closed = True
        self.drop_all()
        self._loader.close()
        self._by_storage.clear()
        self._own_references.clear()
        self._loads.clear()

    # Reading and writing single parameters --------------------------------------------------------------------------

    def read_member(self, member: Member, target: torch.Tensor) -> None:
        """Copy a parameter's current value to `target` ((numel,), its dtype, host or device); complete on return."""
        ready = self._device.mark()  # `target` may be memory that queued kernels still use
        for chunk in chunks_of(member):
            self._claims.settle(chunk)
            staging = self._writes.stage([chunk.weights], f"reading {member.name}")
            if staging is None:
                raise StateError(f"No host memory came free for reading {member.name}.")
            try:
                staging.load().wait()
                first, last, at = overlap(member, chunk)
                source = staging.views[0].view(member.unit.dtype)[at : at + last - first]
                part = target[first - member.entry.start : last - member.entry.start]
                if target.is_cuda:
                    self._device.copy_in(part, source, ready).wait()
                else:
                    part.copy_(source)
            finally:
                staging.release()

    def write_member(self, member: Member, source: torch.Tensor) -> None:
        """Make `source` ((numel,), the parameter's dtype, any device) the parameter's value at home."""
        self.invalidate(member.unit)
        source = source.cpu()  # behind the kernels that make it
        for chunk in chunks_of(member):
            self._claims.claim(chunk)
            staging = self._writes.stage([chunk.weights], f"writing {member.name}")
            if staging is None:
                raise StateError(f"No host memory came free for writing {member.name}.")
            try:
                staging.load().wait()
                first, last, at = overlap(member, chunk)
                target = staging.views[0].view(member.unit.dtype)[at : at + last - first]
                target.copy_(source[first - member.entry.start : last - member.entry.start])
                staging.store().wait()
            finally:
                staging.release()

    # Within ----------------------------------------------------------------------------------------------------------

    def _found(self, unit: Unit) -> str:
        if unit.residency is Residency.LOADING:
            return "hit" if unit.arrival.done() else "late"
        return "miss" if unit.residency is Residency.ABSENT else "hit"

    def _take_memory(self, unit: Unit, needed: bool) -> bool:
        """Charge the unit and give it memory: an evicted one's where that can be, which spares clearing it."""
        vacated: list[Unit] = []
        try:
            if not self._make_room(unit, needed, vacated):
                return False
            with self._ledger.discharged_on_error("device", "weights", unit.nbytes):
                while vacated:
                    if unit.memory.take_over(vacated[-1].memory):
                        vacated.pop()
                        break
                    vacated.pop().memory.give_back()
                else:
                    with self._device.within_budget(unit.name) if needed else contextlib.nullcontext():
                        taken = self._take_bytes(unit, needed)
                    if not taken:
                        self._ledger.discharge("device", "weights", unit.nbytes)
                        return False
        finally:
            for each in vacated:
                each.memory.give_back()
        self._resident[unit] = None
        self._resident_bytes += unit.nbytes
        return True

    def _take_bytes(self, unit: Unit, needed: bool) -> bool:
        """Memory for what is charged. What the budget has room for, torch's allocator may have in pieces alone, of which none is
        large enough: what is not needed is then done without, False; else units that nobody uses go, and its error is raised
        where there is none."""
        while True:
            try:
                unit.memory.take()
                return True
            except torch.OutOfMemoryError:
                victim = self._victim(needed) if needed else None
                if victim is None:
                    if needed:
                        raise
                    return False
                self._drop(victim)

    def _make_room(self, unit: Unit, needed: bool, vacated: list[Unit]) -> bool:
        """Charge the unit, after evicting what nobody uses: those go to `vacated` with their memory. On True it is charged."""
        while True:
            fits = self._resident_bytes + unit.nbytes <= self._limit_bytes
            if fits and self._ledger.try_charge("device", "weights", unit.nbytes):
                return True
            victim = self._victim(needed)
            if victim is not None:
                self._drop(victim, vacated)
                continue
            if not needed:
                return False
            try:  # nothing left to evict: beyond the slots' share, but within the budget or not at all
                self._ledger.charge("device", "weights", unit.nbytes, unit.name)
                return True
            except BudgetError as error:
                in_use = ", ".join(each.name for each in self._resident)
                raise BudgetError(
                    f"{error} On the device at once: {in_use or 'no other block'}, and {unit.name} "
                    f"({format_bytes(unit.nbytes)}).",
                    tier="device", needed_bytes=error.needed_bytes, given_bytes=error.given_bytes,
                ) from None  # fmt: skip

    def _victim(self, needed: bool) -> Unit | None:
        idle = [unit for unit in self._resident if not unit.pinned and unit.users == 0 and not self._viewed(unit)]
        ready = [unit for unit in idle if unit.residency is Residency.READY]
        loading = [unit for unit in idle if unit.residency is Residency.LOADING]  # a hint that was wrong
        return next(iter(ready or (loading if needed else [])), None)

    def _viewed(self, unit: Unit) -> bool:
        """Somebody holds a view of the weights that we do not know of: torch's checkpoint inside of a block keeps what its
        own recompute saved until backward has used it, and the turns of two blocks may alternate meanwhile."""
        if unit.residency is not Residency.READY:
            return False
        return torch._C._storage_Use_Count(unit.flat.untyped_storage()._cdata) > self._own_references[unit]

    def _drop(self, unit: Unit, vacated: list[Unit] | None = None) -> None:
        """→ ABSENT. The memory goes too, to `vacated` where there is one; a pinned unit keeps it. DeadlineError, and nothing
        has changed, where a drive goes on reading into it."""
        if unit.residency is Residency.LOADING:  # its error belongs to a get, and there will be none
            self._loads[unit].end_moves()
        if unit.residency is Residency.IN_USE:
            self._unbind(unit)
        self._device.join(unit.copied)  # the memory is freed in compute-stream order, so behind the copies
        unit.residency = Residency.ABSENT
        if unit.pinned:
            return
        if vacated is None:
            unit.memory.give_back()
        else:
            vacated.append(unit)
        self._resident.pop(unit)
        self._resident_bytes -= unit.nbytes
        self._ledger.discharge("device", "weights", unit.nbytes)
