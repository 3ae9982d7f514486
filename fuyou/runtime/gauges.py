"""Torch's temporaries on the device, which nobody charges: their most becomes the device tier's reserve."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

from fuyou.core.ledger import TIERS, Ledger
from fuyou.core.recorder import Recorder
from fuyou.runtime.measure import heap_free_bytes, rss_bytes, trim_heap


class Gauge(ABC):
    """Sampled at every block's edge and at every gradient. It also notes resident memory for the report."""

    EARLY_STEPS = (
        2  # in which every sample is a look; later ones are INTERVAL_S apart, for looking costs more than it tells
    )
    INTERVAL_S = 0.05
    LOOK_S = 0.1  # how often resident memory is noted, at most

    def __init__(self, ledger: Ledger, *, committed: Callable[[], int], recorder: Recorder | None = None) -> None:
        """`committed()`: bytes of host memory that the run has taken by now, some of it perhaps after `start`."""
        self.looked: Callable[[], None] = lambda: None  # called whenever resident memory is noted
        self._recorder = recorder or Recorder(1)
        self._ledger = ledger
        self._committed = committed
        self._baseline = 0
        self._highest = 0
        self._steps = 0
        self._next_s = self._next_look_s = 0.0

    @abstractmethod
    def start(self) -> None:
        """From here on what is neither committed nor charged is temporary: the device tier is nearly empty."""

    def sample(self, leaving_bytes: int = 0) -> None:
        """`leaving_bytes`: what the caller knows of that is about to be charged."""
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + self.LOOK_S
            self._look()
        if self._early or now >= self._next_s:
            self._next_s = now + self.INTERVAL_S
            self._measure(leaving_bytes)

    def end_step(self) -> None:
        self._steps += 1

    @property
    def _early(self) -> bool:
        return self._steps < self.EARLY_STEPS

    @abstractmethod
    def _measure(self, leaving_bytes: int) -> None: ...

    def _look(self) -> None:
        """Note resident memory, and at its highest what is held."""
        self.looked()
        if self._recorder.resident(rss_bytes()):
            held = {tier: self._ledger.held(tier) for tier in TIERS}
            self._recorder.held_then = held | {"committed": self._committed(), "heap_free": heap_free_bytes()}


class ResidentGauge(Gauge):
    """Of a CPU device, where no allocator reports: the resident memory that nobody charged.

    Freed heap pages that glibc keeps are no temporaries (it keeps as much as it likes: an aligned block does not fit where one
    of its size was freed), so they are given back to the system before a higher one is believed. In the first steps a total
    over the budget is refused; later growth is the process's own (its data, its caches), and counts only near the budget.
    """

    TRIM_SHARE = (
        0.9  # of the budget: from here on growth counts after the first steps too, and the heap is trimmed for it
    )
    TRIM_BYTES = 8 * 2**20  # growth since the last time that makes another worth its while

    _trimmed_at = 0

    def start(self) -> None:
        trim_heap()
        self._baseline = rss_bytes() - self._ledger.held("device") - self._committed()

    def _measure(self, leaving_bytes: int) -> None:
        held = self._ledger.held("device") + leaving_bytes
        baseline = self._baseline + self._committed()
        uncharged = rss_bytes() - baseline - held
        near = held + uncharged > self.TRIM_SHARE * self._ledger.budgets["device"]
        if uncharged <= self._highest or not (self._early or near):
            return
        if uncharged > self._trimmed_at + self.TRIM_BYTES:
            trim_heap()
            uncharged = self._trimmed_at = rss_bytes() - baseline - held
        if uncharged > self._highest:
            self._highest = uncharged
            self._ledger.set_reserve("device", uncharged, refuse=self._early)


class AllocatorGauge(Gauge):
    """Of CUDA: the bytes of torch's allocator that nobody charged, from its own peak, which no stream is waited for. Torch's
    peak is begun anew when the run starts. The allocator itself refuses what passes the budget; that the reserve is known
    keeps a plan from filling what temporaries need.

    The peak may have been at any time since the last sample, so the most that was held since then is taken from it.
    """

    def __init__(
        self, device: torch.device, ledger: Ledger, *, committed: Callable[[], int], recorder: Recorder | None = None
    ) -> None:
        super().__init__(ledger, committed=committed, recorder=recorder)
        self._device = device
        self._held = ledger.watermark("device")
        self._peak = 0

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._baseline = torch.cuda.memory_allocated(self._device) - self._ledger.held("device")

    def _measure(self, leaving_bytes: int) -> None:
        held, peak = self._held.take() + leaving_bytes, torch.cuda.max_memory_allocated(self._device)
        if peak <= self._peak:
            return
        self._peak = peak
        uncharged = peak - self._baseline - held
        if uncharged > self._highest:
            self._highest = uncharged
            self._ledger.set_reserve("device", uncharged, refuse=False)
