"""What the process holds, what is free, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from fuyou.core.ledger import TIERS, Ledger
from fuyou.core.limits import read_memory
from fuyou.core.recorder import Recorder

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
KEPT_STEPS = 1000


def rss_bytes() -> int:
    """Resident memory of this process now; its peak where no descriptor is left to ask for that."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * PAGE_BYTES
    except OSError:
        return _peak_without_descriptor()


def peak_rss_bytes() -> int:
    """The kernel's high-water mark of this process's resident memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return rss_bytes()


def _peak_without_descriptor() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_host_bytes() -> int:
    """Memory that can be had: the system's, or the rest of a control group's limit where that is less."""
    try:
        free = int(psutil.virtual_memory().available)
    except OSError:  # no descriptor left: less than there is, since caches are not counted as free
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES
    for group in read_memory().groups:  # its own and those above it, as containers and systemd set them
        free = min(free, free if group.free_bytes is None else group.free_bytes)
    return free


class StepClock:
    """Seconds of each step, and of those the seconds that the training thread waited, by cause.

    Causes: "weights" (a block's weights were not there yet: their read, or the update that they wait for), "gradients"
    (taking them off the device), "activations" (what left the device is not gone yet, or not back yet), "update" (step()
    itself; with update="step" all of the update). The rest of a step is forward, backward and the user's own code.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.steps: deque[dict] = deque(maxlen=KEPT_STEPS)
        self.count = 0
        self._stalls: dict[str, float] = {}
        self._stalling = False
        self._started: float | None = None

    def stalled_s(self) -> float:
        """Of this step, so far, whatever for."""
        return sum(self._stalls.values())

    @contextlib.contextmanager
    def stall(self, cause: str) -> Iterator[None]:
        if self._stalling:  # making room for weights may wait for activations: the time is counted once
            yield
            return
        self._stalling, began = True, time.perf_counter()
        try:
            yield
        finally:
            self._stalling = False
            ended = time.perf_counter()
            self._stalls[cause] = self._stalls.get(cause, 0.0) + ended - began
            self._recorder.span("stall", began, ended, cause)

    def begin(self) -> None:
        """The first forward of a step; later ones of the same step change nothing."""
        if self._started is None:
            self._started = time.perf_counter()

    def end(self, traffic: dict[str, int], record: dict[str, Any]) -> None:
        """A step is over; `traffic` is what was moved since the last one ended. `record` is kept: what else is said of the
        step may be put into it later."""
        self.count += 1
        if self._started is not None:
            now = time.perf_counter()
            record |= {"seconds": now - self._started, "stalls": self._stalls, "traffic": traffic}
            self.steps.append(record)
            self._recorder.step(self.count, self._started, now)
        self._stalls, self._started = {}, None


class TemporariesGauge:
    """Torch's temporaries on a CPU device, which no allocator reports: the resident memory that nobody charged.

    Sampled at every block's edge and at every gradient; the highest is the device tier's reserve. Freed heap pages that
    glibc keeps are no temporaries (it keeps as much as it likes: an aligned block does not fit where one of its size was
    freed), so they are given back to the system before a higher one is believed. In the first steps a total over the
    budget is refused; later growth is the process's own (its data, its caches), and counts only near the budget. On CUDA
    the allocator itself is limited, and this does nothing.
    """

    REFUSING_STEPS = 2
    TRIM_SHARE = (
        0.9  # of the budget: from here on growth counts after the first steps too, and the heap is trimmed for it
    )
    TRIM_BYTES = 8 * 2**20  # growth since the last time that makes another worth its while
    INTERVAL_S = 0.05  # once nothing is refused any more: looking costs more than it tells

    LOOK_S = 0.1  # how often resident memory is noted for the report, at most

    def __init__(
        self, ledger: Ledger, *, active: bool, committed: Callable[[], int], recorder: Recorder | None = None
    ) -> None:
        """`committed()`: bytes of host memory that the run has taken by now, some of it perhaps after `start`."""
        self.looked: Callable[[], None] = lambda: None  # called whenever resident memory is noted
        self._recorder = recorder or Recorder(1)
        self._next_look_s = 0.0
        self._ledger = ledger
        self._committed = committed
        self._active = active
        self._baseline = 0
        self._highest = 0
        self._trimmed_at = 0
        self._steps = 0
        self._next_s = 0.0

    def start(self) -> None:
        """From here on what is neither committed nor charged is temporary: the device tier is nearly empty."""
        trim_heap()
        self._baseline = rss_bytes() - self._ledger.held("device") - self._committed()

    def sample(self, leaving_bytes: int = 0) -> None:
        """`leaving_bytes`: what the caller knows of that is about to be charged."""
        self._look()
        if not self._active or (self._steps >= self.REFUSING_STEPS and time.monotonic() < self._next_s):
            return
        self._next_s = time.monotonic() + self.INTERVAL_S
        held = self._ledger.held("device") + leaving_bytes
        baseline = self._baseline + self._committed()
        uncharged = rss_bytes() - baseline - held
        early = self._steps < self.REFUSING_STEPS
        if uncharged <= self._highest or not (
            early or held + uncharged > self.TRIM_SHARE * self._ledger.budgets["device"]
        ):
            return
        if uncharged > self._trimmed_at + self.TRIM_BYTES:
            trim_heap()
            uncharged = self._trimmed_at = rss_bytes() - baseline - held
        if uncharged > self._highest:
            self._highest = uncharged
            self._ledger.set_reserve("device", uncharged, refuse=early)

    def end_step(self) -> None:
        self._steps += 1

    def _look(self) -> None:
        """Note resident memory, and at its highest what is held."""
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + self.LOOK_S
        self.looked()
        if self._recorder.resident(rss_bytes()):
            held = {tier: self._ledger.held(tier) for tier in TIERS}
            self._recorder.held_then = held | {"committed": self._committed(), "heap_free": heap_free_bytes()}


def trim_heap() -> None:
    """Return the heap's free pages to the system (glibc; elsewhere nothing happens)."""
    with contextlib.suppress(OSError, AttributeError):
        _libc().malloc_trim(0)


def heap_free_bytes() -> int:
    """Freed memory that the heap holds for the next request, `trim_heap`'s pages counted too (glibc 2.33; elsewhere 0)."""
    with contextlib.suppress(OSError, AttributeError):
        ask = _libc().mallinfo2
        ask.restype = _MallInfo
        return int(ask().fordblks)
    return 0


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
