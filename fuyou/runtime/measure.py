"""What the process holds, what is free, and where the time of a step goes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

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
