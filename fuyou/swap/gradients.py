"""The gradients' resident: they leave the device parameter by parameter, to host memory or through it to NVMe."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from fuyou.core.ledger import Ledger
from fuyou.core.ticket import DONE, AllOf, Ticket, wait_for
from fuyou.swap.ranges import Staging, WriteBehind
from fuyou.swap.unit import Chunk, Member, chunks_of, overlap
from fuyou.tiers.device import Device
from fuyou.tiers.lock import ProcessLock
from fuyou.tiers.worker import Worker


class Gradient:
    """One accumulated gradient: the bytes at home, times `scales` in order, or `live` where somebody changed it.

    `live` is a device tensor, charged, that holds the value while it is set; it is written home before it is next
    used. `zero`: the value is zero, whatever the bytes say. `norm` is torch.linalg.vector_norm of the whole, where it
    was computed while the gradient was on the device and nothing has scaled it since. `current`: the bytes at home
    are this gradient's; a newer backward has taken them over otherwise, and `live` keeps the value. `lent`: the user
    has `live` itself, or a view of it, so it must stay; otherwise it goes home when its room is wanted.
    """

    __slots__ = ("__weakref__", "charge", "current", "lent", "live", "member", "norm", "queued", "scales", "zero")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.scales: list[float | torch.Tensor] = []
        self.live: torch.Tensor | None = None
        self.charge: Callable[[], object] | None = None  # discharges `live`, once; on collection too
        self.norm: torch.Tensor | None = None
        self.zero = False
        self.current = True
        self.lent = False
        self.queued = False  # among those that may be sent home


class Queue(Protocol):
    """What the queue of updates wants to know of gradients."""

    def drop(self, chunk: Chunk) -> None:
        """The chunk's bytes are about to change."""

    def let_go(self) -> bool: ...


class _Open:
    """An NVMe chunk whose gradient is being put together in a staging lease."""

    __slots__ = ("changed", "copies", "expected", "loaded", "staging")

    def __init__(self, staging: Staging, loaded: Ticket, expected: set[Member]) -> None:
        self.staging = staging
        self.loaded = loaded  # what was at home already; waited for before anything is read or put beside it
        self.expected = expected  # parameters whose gradient has not come yet in this backward
        self.copies: list[Ticket] = []
        self.changed = False


class Gradients:
    """Takes gradients off the device (`take`), gives them back whole (`materialise`, `borrowed`), and hands chunks to the update.

    A chunk on the host is written in place. A chunk on NVMe is put together in staging and written once when the last
    of its parameters has come, so a small tensor costs no read-modify-write; where staging runs out, the oldest open
    chunk is written as it is and read again when it goes on. Accumulation adds in the gradient's dtype, old + new.
    Copies off the device end later, in their order; whoever reads the bytes waits for them. Called by one thread at a
    time: the autograd thread during backward, the training thread otherwise.

    `complete(chunk)` is told when all gradients that a backward brings for a chunk are home, or on their way.
    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        writes: WriteBehind,
        drop_idle: Callable[[], bool],
        complete: Callable[[Chunk], None],
    ) -> None:
        self._device = device
        self._complete = complete
        ledger.relievers.insert(0, self._await_leaving)
        self._drop_idle = drop_idle  # weights that nobody uses make room for a gradient
        self._ledger = ledger
        self._writes = writes
        self._open: OrderedDict[Chunk, _Open] = OrderedDict()
        # Whose bytes are at home. Weak: handles hold their gradient, and cleared ones have no bytes worth reading.
        self._present: weakref.WeakValueDictionary[Member, Gradient] = weakref.WeakValueDictionary()
        self._closing: dict[Chunk, tuple[Ticket, Staging, list[Ticket]]] = {}  # writes that wait for copies, and these
        self._copies: dict[Chunk, list[Ticket]] = {}  # copies straight into host homes, or from them
        self._changed: deque[weakref.ref[Gradient]] = deque()  # those with `live` that is not lent, oldest first
        self._leaving: deque[tuple[Ticket, int]] = deque()  # copies off the device, and the bytes charged for each
        self._left = threading.Lock()  # for `_leaving`: on a CPU the thread that copies discharges too
        self._outbound: Worker | None = None
        self._norms_wanted = True
        self._norms_asked = False
        self._lock = ProcessLock("This run", device.deadline_s)
        writes.reclaim = self._close_oldest

    def start(self, queue: Queue) -> None:
        self._queue = queue
        self._writes.let_go = queue.let_go

    def take(self, member: Member, new: torch.Tensor, old: Gradient | None) -> Gradient:
        """`new` (the parameter's shape and dtype, device), added to `old` where there is one, becomes the gradient.

        Changes `new` in place when it adds. It is charged until it has left; with no room for it, the oldest that is
        leaving is waited for.
        """
        with self._lock:
            nbytes = new.numel() * new.itemsize
            self._charge_leaving(nbytes, member)
            gradient = old if old is not None and old.current and old.member is member else Gradient(member)
            new = new.detach().contiguous()
            with self._ledger.discharged_on_error("device", "gradients", nbytes):
                if old is not None:
                    self._add(new, old)
                gradient.scales.clear()
                gradient.zero = False
                gradient.norm = torch.linalg.vector_norm(new, 2.0) if self._norms_wanted else None
                copied = self._write(member, new)
            with self._left:
                self._leaving.append((copied, nbytes))
            self._present[member] = gradient
            self.discharge_left()
            if not copied.done():
                self._device.after_copies_out(self.discharge_left)
            return gradient

    def discharge_left(self) -> None:
        """What has left the device by now is charged no longer. Whoever begins a block asks: on CUDA nobody is told when a copy
        ends, and a step's last gradients should not count into the next forward."""
        with self._left:
            while self._leaving and self._leaving[0][0].done():
                self._ledger.discharge("device", "gradients", self._leaving.popleft()[1])

    def leaving(self) -> bool:
        """Some are still on the device, on their way out."""
        self.discharge_left()
        return bool(self._leaving)

    def fetch(self, chunk: Chunk) -> None:
        """A hint: backward is about to bring gradients for this chunk. What is to be added to comes from the drive while it
        computes, where there is staging left for it."""
        with self._lock:
            if chunk.gradient is None or chunk.gradient.on_host or chunk in self._open or not chunk.gradient.written:
                return
            if not any(member in self._present for member, _, _ in chunk.parts):
                return
            staging = self._writes.try_stage([chunk.gradient])
            if staging is not None:
                if (closing := self._closing.pop(chunk, None)) is not None:
                    closing[0].wait()
                self._open_in(chunk, staging)

    def end_backward(self) -> None:
        """Write the chunks whose other parameters got no gradient in this backward."""
        with self._lock:
            for chunk in list(self._open):
                self._close(chunk)

    def end_step(self) -> None:
        """Norms are computed on the way out only while somebody asks for them."""
        self._norms_wanted, self._norms_asked = self._norms_asked, False

    def handover(self, chunk: Chunk) -> tuple[Staging | None, Ticket]:
        """For an update: the staging that the chunk's gradient is still in, with a hold on it, and the ticket of its bytes.

        None: it is at home. The ticket is then that of its copies there; of a home on the drives that of starting the
        write, behind which the engine puts a read.
        """
        with self._lock:
            if chunk.gradients.on_host:
                copies = self._copies.get(chunk, [])
                return None, AllOf(copies)
            closing = self._closing.get(chunk)
            if closing is None:
                return None, DONE
            stored, staging, copies = closing
            if staging.hold():
                return staging, AllOf(copies)
            del self._closing[chunk]
            return None, stored

    def norm_of(self, gradient: Gradient) -> torch.Tensor | None:
        """vector_norm of the whole, when it is known: the bits that plain PyTorch computes."""
        self._norms_asked = True
        return gradient.norm if gradient.live is None and not gradient.scales and not gradient.zero else None

    def materialise(self, gradient: Gradient, *, lent: bool) -> torch.Tensor:
        """The value as a device tensor of the parameter's shape, charged; changes to it count from now on.

        `lent`: it is given to the user, and stays until the gradient is used up. Otherwise only until its room is wanted.
        """
        with self._lock:
            gradient.lent = gradient.lent or lent
            if gradient.live is None:
                gradient.live = value = self._charged_value(gradient)
                gradient.charge = weakref.finalize(
                    gradient, self._ledger.discharge, "device", "gradients", value.numel() * value.itemsize
                )
                gradient.zero, gradient.norm = False, None
                gradient.scales.clear()
                if not gradient.queued:
                    gradient.queued = True
                    self._changed.append(weakref.ref(gradient))
            return gradient.live

    def send_home(self) -> None:
        """Changed values that the user has no hold of go home, so that their room is there for weights."""
        with self._lock:
            while self._send_oldest_home():
                pass

    @contextlib.contextmanager
    def borrowed(self, gradient: Gradient) -> Iterator[torch.Tensor]:
        """The value as a device tensor for the length of a `with`; it must not be changed."""
        with self._lock:
            if gradient.live is not None:
                yield gradient.live
                return
            value = self._charged_value(gradient)
            try:
                yield value
            finally:
                self._ledger.discharge("device", "gradients", value.numel() * value.itemsize)

    def make_zero(self, gradient: Gradient) -> None:
        with self._lock:
            self._drop_live(gradient)
            gradient.zero, gradient.norm = True, None
            gradient.scales.clear()

    def flush(self, gradient: Gradient) -> None:
        """Bring the bytes at home up to date with `live` or `zero`, and drop `live`. Scales stay a list."""
        with self._lock:
            if gradient.zero:
                self.materialise(gradient, lent=False)
            if gradient.live is None:
                return
            if not gradient.current and gradient.member in self._present:
                self.save(self._present[gradient.member])
            self._device.join(self._write(gradient.member, gradient.live))  # the user may change it once more
            gradient.current = True
            self._present[gradient.member] = gradient
            self._drop_live(gradient)

    def adopt(self, gradient: Gradient, value: torch.Tensor) -> None:
        """`value` ((the parameter's shape and dtype), device) was set as `p.grad` by hand. The caller holds `gradient`."""
        with self._lock:
            if (present := self._present.get(gradient.member)) is not None:
                self.save(present)
            self._device.join(self._write(gradient.member, value.detach().contiguous()))
            self._present[gradient.member] = gradient

    def save(self, gradient: Gradient) -> None:
        """The bytes at home are about to be another gradient's: keep this one's value on the device."""
        if gradient.current:
            self.materialise(gradient, lent=True)
            gradient.current = False
            self._present.pop(gradient.member, None)

    def close(self) -> None:
        with self._left:
            for _, nbytes in self._leaving:
                self._ledger.discharge("device", "gradients", nbytes)
            self._leaving.clear()
        for opened in self._open.values():
            opened.staging.release()
        self._open.clear()
        self._closing.clear()
        self._copies.clear()
        self._present.clear()
        if self._outbound is not None:
            self._outbound.close()
            self._outbound = None

    # Within ----------------------------------------------------------------------------------------------------------

    def _charged_value(self, gradient: Gradient) -> torch.Tensor:
        member = gradient.member
        nbytes = member.entry.count * member.unit.dtype.itemsize
        while not self._ledger.try_charge("device", "gradients", nbytes):
            if not (self._send_oldest_home() or self._drop_idle()):
                self._ledger.charge("device", "gradients", nbytes, f"the gradient of {member.name}")
                break
        with self._ledger.discharged_on_error("device", "gradients", nbytes):
            value = torch.zeros(member.entry.shape, dtype=member.unit.dtype, device=member.unit.device)
            if not gradient.zero:
                flat = value.view(-1)
                for chunk in chunks_of(member):
                    first, last, _ = overlap(member, chunk)
                    flat[first - member.entry.start : last - member.entry.start].copy_(self._part(member, chunk))
                for scale in gradient.scales:
                    value.mul_(scale)
            return value

    def _add(self, new: torch.Tensor, old: Gradient) -> None:
        """new += old: the same bits as old + new."""
        if old.live is not None:
            new.add_(old.live)
            self._drop_live(old)
            return
        if old.zero:
            new.add_(torch.zeros((), dtype=new.dtype, device=new.device))  # 0 + -0.0 is 0.0
            return
        member, flat = old.member, new.view(-1)
        for chunk in chunks_of(member):
            first, last, _ = overlap(member, chunk)
            value = self._part(member, chunk)
            if old.scales:
                value = value if self._device.is_cuda else value.clone()
                for scale in old.scales:
                    value.mul_(scale)
            flat[first - member.entry.start : last - member.entry.start].add_(value)

    def _part(self, member: Member, chunk: Chunk) -> torch.Tensor:
        """A parameter's part of a chunk's gradient, to be read on the compute stream.

        CPU: the host bytes themselves, valid until another chunk is opened. CUDA: a device copy that waits for the copies
        which brought the bytes here; it stands among them, so the bytes are not given back or written home under it.
        """
        first, last, at = overlap(member, chunk)
        gradient = chunk.gradients
        if gradient.on_host:
            data, copies = gradient.home.data, self._copies.setdefault(chunk, [])  # type: ignore[union-attr]
        else:
            opened = self._opened(chunk)
            data, copies = opened.staging.views[0], opened.copies
        part = data.view(member.unit.dtype)[at : at + last - first]
        if not self._device.is_cuda:
            _wait_all(copies)
            return part
        value = torch.empty_like(part, device=member.unit.device)
        copied = self._device.copy_in(value, part, self._device.mark(), after=copies)
        self._device.join(copied)
        copies.append(copied)
        return value

    def _charge_leaving(self, nbytes: int, member: Member) -> None:
        self.discharge_left()
        while not self._ledger.try_charge("device", "gradients", nbytes):
            if self._await_leaving() or self._send_oldest_home() or self._drop_idle():
                continue
            self._ledger.charge("device", "gradients", nbytes, f"the gradient of {member.name}")
            return

    def _await_leaving(self) -> bool:
        """A gradient that is on its way out will be gone."""
        with self._left:
            oldest = self._leaving[0][0] if self._leaving else None
        if oldest is None:
            return False
        oldest.wait()
        self.discharge_left()
        return True

    def _write(self, member: Member, value: torch.Tensor) -> Ticket:
        """Start the copies of a whole gradient to its chunks' bytes; returns the last one's ticket (they end in order)."""
        flat = value.view(-1)
        copied: Ticket = DONE
        for chunk in chunks_of(member):
            first, last, at = overlap(member, chunk)
            source = flat[first - member.entry.start : last - member.entry.start]
            gradient = chunk.gradients
            self._queue.drop(chunk)  # an update that reads these bytes is done, or will not be
            if gradient.on_host:
                target = gradient.home.data.view(member.unit.dtype)  # type: ignore[union-attr]
                ticket = self._device.copy_out(target[at : at + last - first], source)
                copied = copied if ticket is DONE else ticket
                self._copies[chunk] = [each for each in (*self._copies.get(chunk, ()), ticket) if not each.done()]
                gradient.written = True
                self._complete(chunk)
                continue
            opened = self._opened(chunk)
            target = opened.staging.views[0].view(member.unit.dtype)
            ticket = self._device.copy_out(target[at : at + last - first], source)
            copied = copied if ticket is DONE else ticket
            opened.copies.append(ticket)
            opened.changed = True
            opened.expected.discard(member)
            if not opened.expected:
                self._close(chunk)
        return copied

    def _opened(self, chunk: Chunk) -> _Open:
        """The chunk's gradient in staging, with what is at home already loaded."""
        opened = self._open.get(chunk)
        if opened is None:
            if (closing := self._closing.pop(chunk, None)) is not None:
                closing[0].wait()  # started, so that the engine puts a read behind it
            what = f"gradients of {chunk.unit.name}"
            staging = self._writes.stage([chunk.gradients], what)
            if staging is None:
                raise MemoryError(f"no staging for {what}")  # stage(wait=True) waits or raises
            opened = self._open_in(chunk, staging)
        try:
            opened.loaded.wait()
        except BaseException:
            del self._open[chunk]
            opened.staging.release()
            raise
        return opened

    def _open_in(self, chunk: Chunk, staging: Staging) -> _Open:
        """What is at home is on its way into `staging`."""
        members = {member for member, _, _ in chunk.parts}
        present = chunk.gradients.written and any(member in self._present for member in members)
        try:
            opened = self._open[chunk] = _Open(staging, staging.load() if present else DONE, members)
        except BaseException:
            staging.release()
            raise
        return opened

    def _close_oldest(self) -> bool:
        """A chunk that is open (for its other gradients, or because it was read) makes room for whoever needs it."""
        with self._lock:
            if self._open:
                self._close(next(iter(self._open)))
                return True
            return False

    def _close(self, chunk: Chunk) -> None:
        """Start writing an open chunk home; its staging is given back when that is done."""
        opened = self._open.pop(chunk)
        if not opened.changed:
            _wait_all(opened.copies)  # release waits for a read that is under way
            opened.staging.release()
            return
        if self._outbound is None:
            self._outbound = Worker("fuyou-gradients-out", deadline_s=self._device.deadline_s, races=self._device.races)
        started: list[Ticket] = []

        def run() -> None:
            for ticket in opened.copies:
                ticket.wait()
            started.append(opened.staging.store())

        stored = self._outbound.submit(run, f"gradients of {chunk.unit.name}")
        self._closing[chunk] = (stored, opened.staging, opened.copies)
        self._writes.put(_Stored(stored, started), opened.staging)
        self._complete(chunk)

    def _send_oldest_home(self) -> bool:
        """False where no changed value can go."""
        for _ in range(len(self._changed)):
            reference = self._changed.popleft()
            gradient = reference()
            if gradient is None:
                continue
            gradient.queued = gradient.live is not None and (gradient.lent or not gradient.current)
            if gradient.queued:
                self._changed.append(reference)
            elif gradient.live is not None:
                self.flush(gradient)
                return True
        return False

    def _drop_live(self, gradient: Gradient) -> None:
        if gradient.charge is not None:
            gradient.charge()
            gradient.live = gradient.charge = None
            gradient.lent = False


class _Stored:
    """A write that a job starts: done when the job and the write are."""

    __slots__ = ("_job", "_started")

    def __init__(self, job: Ticket, started: list[Ticket]) -> None:
        self._job = job
        self._started = started

    def done(self) -> bool:
        return self._job.done() and all(ticket.done() for ticket in self._started)

    def wait(self, timeout_s: float | None = None) -> None:
        self._job.wait(timeout_s)
        wait_for(self._started, timeout_s)


def _wait_all(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.wait()
    tickets.clear()
