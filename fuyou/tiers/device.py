"""The device tier: the streams of one device and the copies over its link. A CPU stands in for a GPU without one."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from fuyou.core.errors import BudgetError, ConfigError, DeadlineError
from fuyou.core.races import Races
from fuyou.core.recorder import Recorder
from fuyou.core.sizes import format_bytes
from fuyou.core.ticket import DEADLINE_S, DONE, Ticket
from fuyou.tiers.pages import Pages
from fuyou.tiers.worker import Worker

ALIGNMENT_BYTES = 64  # of torch's own tensors on a CPU
THREAD_COPY_BYTES = 128 << 10  # from here on memcpy takes longer than handing it to a thread

SPIN_CYCLES_PER_S = 1e9  # of torch.cuda._sleep; devices run at 1 to 2 GHz, and a delay need not be exact


class EventTicket:
    """A copy queued on a CUDA stream: done when the event recorded behind it is.

    It keeps the host end mapped. The device end is ordered by streams: its memory may be freed, and is reused only
    behind the copy. Who leased the host bytes gives them back behind this ticket.
    """

    __slots__ = ("_deadline_s", "_host", "_what", "event")

    def __init__(self, event: torch.cuda.Event, host: torch.Tensor, what: str, deadline_s: float) -> None:
        self.event = event
        self._what = what
        self._deadline_s = deadline_s
        self._host: torch.Tensor | None = host

    def done(self) -> bool:
        return self.event.query()

    def wait(self, timeout_s: float | None = None) -> None:
        """Only worker threads and step() come here; the compute stream uses Device.join."""
        timeout_s = self._deadline_s if timeout_s is None else timeout_s
        started = time.monotonic()
        while not self.event.query():  # event.synchronize() knows no deadline, and burns a core
            waited = time.monotonic() - started
            if waited >= timeout_s:
                raise DeadlineError(
                    f"Waited {timeout_s:g} s for {self._what}, which has not ended: the device, or a kernel queued before "
                    "the copy, does not answer. See the driver's messages in the system log."
                )
            time.sleep(min(max(waited / 16, 2e-5), 1e-3))  # late by a sixteenth of the wait at most, and by 1 ms
        self._host = None


class DeviceMemory:
    """`nbytes` on the device at one storage for life: `take` gives it bytes, `give_back` returns them to the system.

    `tensor` is a (nbytes,) uint8 view whose storage never changes, so views that autograd saved stay valid names; they are
    to be cut before `start`, for torch refuses to cut one that reaches beyond an emptied storage. CUDA: the storage is
    resized; the caching allocator orders its memory by the compute stream. CPU: an address range of its own whose pages
    are dropped, or handed on to another one; torch's allocator would keep them in the heap, beyond every budget.

    With `races` the bytes are NaN from `take` until something is copied there, and after `give_back`. On a CPU the pages
    then stay: dropped ones would read as zeros, which look like weights.
    """

    def __init__(self, nbytes: int, device: torch.device, races: Races | None = None) -> None:
        self._nbytes = nbytes
        self._races = races
        self._pages = Pages(nbytes) if self._has_pages(device) else None
        self.tensor = self._pages.bytes if self._pages else torch.empty(nbytes, dtype=torch.uint8, device=device)

    @staticmethod
    def _has_pages(device: torch.device) -> bool:
        return device.type != "cuda"

    def start(self) -> None:
        """All views of `tensor` are cut: until `take` it holds no bytes."""
        self.give_back()

    @property
    def address(self) -> int:
        """Of its first byte, on a CPU; its last page is its own to the end."""
        return self.tensor.data_ptr()

    def take(self) -> None:
        if self._pages is None:
            self.tensor.untyped_storage().resize_(self._nbytes)
            if self._races is not None:  # on the compute stream, so before the `ready` that copies in wait for
                self._races.fill(self.tensor)
        elif self._races is not None:
            self._races.check(self.tensor, f"a slot of {self._nbytes} bytes on the device")

    def take_over(self, other: DeviceMemory) -> bool:
        """Instead of `take`, and of `give_back` of `other`, whose bytes nobody uses any more: its pages move here, so that
        they need not be cleared. False where that cannot be: both calls are still to be made."""
        if self._pages is None or other._pages is None or self._races is not None:
            return False
        if not self._pages.take_over(other._pages):
            return False
        other._pages.drop()  # where it is the larger one
        return True

    def give_back(self) -> None:
        """Nothing queued later may read the bytes. CUDA: earlier kernels of the compute stream still may."""
        if self._races is not None and self.tensor.untyped_storage().nbytes():
            # CUDA: queued on the compute stream, so behind its kernels that may still read, and ahead of the work of
            # whoever gets this memory next: the allocator hands it out in that stream's order. The storage is there
            # until resize_, which only returns the block to the allocator: the queued fill stays valid. A copy on a side
            # stream that nothing orders ahead of this meets NaN.
            self._races.fill(self.tensor)
        if self._pages is None:
            self.tensor.untyped_storage().resize_(0)
        elif self._races is None:
            self._pages.drop()


@dataclass
class _Limit:
    """Of torch's allocator on one device: the share that was its limit before any run, what others held, and the runs' budgets."""

    before: float
    others_bytes: int
    budgets: dict[Device, int] = field(default_factory=dict)

    def set(self, device: torch.device) -> None:
        total = torch.cuda.get_device_properties(device).total_memory
        share = (sum(self.budgets.values()) + self.others_bytes) / total if self.budgets else 1.0
        torch.cuda.set_per_process_memory_fraction(min(self.before, share), device)


_limits: dict[torch.device, _Limit] = {}


class Device:
    """Copies host ↔ device, counted in bytes, and what orders them against compute.

    CUDA: two side streams. A copy in waits for `ready`, an event of the compute stream recorded when its target was
    allocated (the caching allocator hands out memory in compute-stream order, so earlier kernels may still be using
    it). A copy out waits for everything queued on the compute stream so far. The compute stream waits for a copy in by
    `join`; nothing here blocks the host.

    CPU: the same calls are memcpy. A copy in is complete on return (the loader's thread makes it); a copy out is made by a
    thread, so that backward goes on meanwhile as it does on CUDA, unless it is too small to be worth it.

    With `races` each copy is late: on CUDA on its stream, behind what it waits for.
    """

    def __init__(
        self,
        device: torch.device,
        budget_bytes: int,
        *,
        deadline_s: float = DEADLINE_S,
        races: Races | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.device = device
        self.recorder = recorder or Recorder(1)
        # Told of errors of whatever is computed `within_budget`, with its name, before they go on.
        self.failed: Callable[[BaseException, str], None] = lambda error, what: None
        self.deadline_s = deadline_s
        self.races = races
        self._budget_bytes = budget_bytes
        self.is_cuda = device.type == "cuda"
        self.host_to_device_bytes = 0
        self.device_to_host_bytes = 0
        self._counting = threading.Lock()
        self._copier: Worker | None = None  # CPU
        if self.is_cuda:
            self.h2d_stream = torch.cuda.Stream(device)
            self.d2h_stream = torch.cuda.Stream(device)

    def limit(self, own_bytes: int) -> None:
        """Hold torch's allocator to the budget: activations and workspaces are not ours to charge before they are made. Its limit
        is one for the process: it leaves other runs their budgets, and others what they held when the first run came."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            limit = _limits.get(self.device)
            if limit is None:
                others = max(0, torch.cuda.memory_reserved(self.device) - own_bytes)
                asked = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # since torch 2.8
                limit = _limits[self.device] = _Limit(asked(self.device) if asked is not None else 1.0, others)
            limit.budgets[self] = self._budget_bytes
            limit.set(self.device)

    def lift(self) -> None:
        """The allocator is no more held to this run's budget. Idempotent."""
        limit = _limits.get(self.device)
        if limit is not None and limit.budgets.pop(self, None) is not None:
            limit.set(self.device)
            if not limit.budgets:
                del _limits[self.device]

    def close(self) -> None:
        if self._copier is not None:
            self._copier.close()
        self.lift()

    @contextlib.contextmanager
    def within_budget(self, what: str) -> Iterator[None]:
        """Torch's own out-of-memory error, raised at the budget, in the numbers of the budget."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.failed(error, what)
            if not self.is_cuda:
                raise
            used = torch.cuda.memory_allocated(self.device)
            raise BudgetError(
                f"The device budget gpu={format_bytes(self._budget_bytes)} cannot hold what {what} computes: "
                f"{format_bytes(used)} are in use and torch asked for more ({error}). Give gpu more, or take a smaller batch "
                "or shorter sequences.".replace("\n", " "),
                tier="device", needed_bytes=self._budget_bytes + 1, given_bytes=self._budget_bytes,
            ) from error  # fmt: skip
        except BaseException as error:
            self.failed(error, what)
            raise

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that the compute stream holds so far (None on a CPU)."""
        return torch.cuda.current_stream(self.device).record_event() if self.is_cuda else None

    def copy_in(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        ready: torch.cuda.Event | None = None,
        after: Sequence[Ticket] = (),
    ) -> Ticket:
        """host → device, behind `ready` and the copies `after`. `target` and `source`: contiguous, equal bytes."""
        nbytes = source.numel() * source.itemsize
        self.count_in(nbytes)
        if not self.is_cuda:
            self._late()
            self._copy("host_to_device", target, source, nbytes)
            return DONE
        self._queued("host_to_device", nbytes)
        with torch.cuda.stream(self.h2d_stream):
            if ready is not None:
                self.h2d_stream.wait_event(ready)
            for ticket in after:
                if isinstance(ticket, EventTicket):
                    self.h2d_stream.wait_event(ticket.event)
            self._late()
            target.copy_(source, non_blocking=True)
            what = f"a copy of {nbytes} bytes from the host to {self.device}"
            return EventTicket(self.h2d_stream.record_event(), source, what, self.deadline_s)

    def free_behind_copies_in(self, tensor: torch.Tensor) -> None:
        """`tensor` is freed though the compute stream never joined the copies to it: its memory is reused behind them."""
        if self.is_cuda:
            tensor.record_stream(self.h2d_stream)

    def count_in(self, nbytes: int) -> None:
        """Bytes that came to the device, here or by a drive that read them into a CPU's memory."""
        with self._counting:
            self.host_to_device_bytes += nbytes

    def copy_out(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        ready: torch.cuda.Event | None = None,
        *,
        here: bool = False,
    ) -> Ticket:
        """device → host, behind `ready`, or without one after all that the compute stream holds so far. Contiguous, equal
        bytes; the source must not be changed until the ticket is done. Copies to one target end in their order: those of
        one size go the same way. `here`: the caller is a thread of its own, and a CPU's copy is made in it."""
        nbytes = source.numel() * source.itemsize
        with self._counting:
            self.device_to_host_bytes += nbytes
        if not self.is_cuda:
            if here or nbytes < THREAD_COPY_BYTES:
                if here:
                    self._late()
                self._copy("device_to_host", target, source, nbytes)
                return DONE
            if self._copier is None:
                self._copier = Worker("fuyou-copies-out", deadline_s=self.deadline_s, races=self.races)
            return self._copier.submit(  # the job holds both ends
                lambda: self._copy("device_to_host", target, source, nbytes),
                f"a copy of {nbytes} bytes to the host",
            )
        self._queued("device_to_host", nbytes)
        if ready is None:
            ready = torch.cuda.current_stream(self.device).record_event()
        with torch.cuda.stream(self.d2h_stream):
            self.d2h_stream.wait_event(ready)
            self._late()
            target.copy_(source, non_blocking=True)
            # The source's memory may be freed by autograd at once: the allocator must not hand it out before this copy.
            source.record_stream(self.d2h_stream)
            what = f"a copy of {nbytes} bytes from {self.device} to the host"
            return EventTicket(self.d2h_stream.record_event(), target, what, self.deadline_s)

    def after_copies_out(self, told: Callable[[], None]) -> None:
        """CPU: `told` is called, by the thread that copies, when all copies out that it has been given have ended. CUDA: it is
        not, for nobody waits for a stream."""
        if self._copier is not None:
            self._copier.submit(told, "telling that copies have ended")

    def _copy(self, lane: str, target: torch.Tensor, source: torch.Tensor, nbytes: int) -> None:
        with self.recorder.timed(lane, lane, nbytes):
            copy_bytes(target.data_ptr(), source.data_ptr(), nbytes)

    def _queued(self, lane: str, nbytes: int) -> None:
        """CUDA: when it was queued is all that is known without waiting for it."""
        now = time.perf_counter()
        self.recorder.span(lane, now, now, lane, nbytes)

    def _late(self) -> None:
        """With `races`: the copy that comes next is late, on CUDA by a kernel that spins ahead of it on the current stream."""
        if self.races is None:
            return
        if not self.is_cuda:
            self.races.delay()
        elif cycles := int(self.races.late_s() * SPIN_CYCLES_PER_S):
            torch.cuda._sleep(cycles)

    def join(self, ticket: Ticket) -> None:
        """What is computed from now on comes behind a copy. CUDA: the compute stream waits, the host does not."""
        if isinstance(ticket, EventTicket):
            torch.cuda.current_stream(self.device).wait_event(ticket.event)
        else:
            ticket.wait()

    def guard(self) -> contextlib.AbstractContextManager[Any]:
        """Makes this the current CUDA device in a worker thread."""
        return torch.cuda.device(self.device) if self.is_cuda else contextlib.nullcontext()


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to train on: as named, else cuda when there is one. ConfigError for what torch does not have."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is no device that torch knows: use 'cuda', 'cuda:1' or 'cpu'.") from error
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda":
        raise ConfigError(f"device={device!r} is not supported: use 'cuda', 'cuda:1' or 'cpu'.")
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (resolved.index or 0) >= count:
        raise ConfigError(
            f"device={device!r} was asked for and torch sees {count} CUDA devices: use device='cpu' or mend the driver."
        )
    return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)


def empty_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """(nbytes,) uint8 on the device, of whatever content.

    CPU: numpy's memory, not torch's. A freed range is found again for one of the same size and its pages are huge; torch asks
    with posix_memalign, which before glibc 2.38 passes by what fits exactly, so that every page is new, and cleared first.
    """
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    memory = numpy.empty(nbytes + ALIGNMENT_BYTES, numpy.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(memory[start : start + nbytes])


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """memcpy between addresses; releases the GIL, and unlike torch's copy_ starts no second team of threads."""
    ctypes.memmove(target, source, nbytes)
