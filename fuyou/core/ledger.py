"""The only book of memory: every slot, lease and extent is charged and discharged here, by tier and category."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

from fuyou.core.errors import BudgetError, StateError
from fuyou.core.recorder import Recorder
from fuyou.core.sizes import format_bytes

TIERS = ("device", "host", "nvme")
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "staging")
ARGUMENT = {"device": "gpu", "host": "ram", "nvme": "nvme_limit"}  # the argument of `wrap` that sets a tier's budget


class Ledger:
    """Bytes held now and at peak, against one budget a tier. Thread-safe: workers charge staging beside the caller.

    `reserve` is what a tier holds that nobody can charge exactly (torch's temporaries on a CPU device); it counts
    against the budget and into the peak. `allowance[tier]` is kept free of weights and gradients from the start for
    activations and temporaries together: they count against the budget with at least that much.
    """

    def __init__(
        self, budgets: Mapping[str, int], allowance: Mapping[str, int] | None = None, recorder: Recorder | None = None
    ) -> None:
        self._recorder = recorder or Recorder(1)
        self.budgets = {tier: budgets[tier] for tier in TIERS}
        self._allowance = {tier: (allowance or {}).get(tier, 0) for tier in TIERS}
        self._lock = threading.RLock()  # a collection inside a charge may free what discharges here
        self._held = {tier: dict.fromkeys(CATEGORIES, 0) for tier in TIERS}
        self._reserve = dict.fromkeys(TIERS, 0)
        self._peak = dict.fromkeys(TIERS, 0)
        self._at_peak = {tier: dict.fromkeys(CATEGORIES, 0) for tier in TIERS}
        self._watermarks: dict[str, list[Watermark]] = {tier: [] for tier in TIERS}
        # Called in their order before the device's budget refuses, until it fits: discharges something, or returns False.
        self.relievers: list[Callable[[], bool]] = []

    def relieve(self) -> bool:
        return any(reliever() for reliever in self.relievers)

    def charge(self, tier: str, category: str, nbytes: int, what: str = "") -> None:
        """Book `nbytes`, or raise BudgetError with the tier, the bytes needed and given, and who asked."""
        while tier == "device" and not self._fits(tier, category, nbytes) and self.relieve():
            pass
        with self._lock:
            needed = self._total(tier, category, nbytes)
            if needed > self.budgets[tier]:
                raise BudgetError(
                    self._refusal(tier, category, nbytes, what, needed),
                    tier=tier, needed_bytes=needed, given_bytes=self.budgets[tier],
                )  # fmt: skip
            self._book(tier, category, nbytes)

    def try_charge(self, tier: str, category: str, nbytes: int) -> bool:
        """Book `nbytes` where they fit; False, and nothing booked, where they do not."""
        with self._lock:
            if self._total(tier, category, nbytes) > self.budgets[tier]:
                return False
            self._book(tier, category, nbytes)
            return True

    def discharge(self, tier: str, category: str, nbytes: int) -> None:
        with self._lock:
            if self._held[tier][category] < nbytes:
                raise StateError(
                    f"The ledger holds {self._held[tier][category]} bytes of {category} on {tier} and was asked to "
                    f"give back {nbytes}: something was released twice."
                )
            self._held[tier][category] -= nbytes
            self._recorder.change(tier, category, -nbytes, self._held[tier][category])

    @contextlib.contextmanager
    def discharged_on_error(self, tier: str, category: str, nbytes: int) -> Iterator[None]:
        """What was charged for something goes with it where the bytes cannot be had, or taken to their home."""
        try:
            yield
        except BaseException:
            self.discharge(tier, category, nbytes)
            raise

    def set_reserve(self, tier: str, nbytes: int, *, refuse: bool) -> None:
        """With `refuse`, BudgetError where the tier's total passes its budget with it."""
        with self._lock:
            self._reserve[tier] = nbytes
        while refuse and not self._fits(tier, "activations", 0) and self.relieve():
            pass
        with self._lock:
            needed = self._total(tier)
            self._note_peak(tier)
            if refuse and needed > self.budgets[tier]:
                raise BudgetError(
                    self._refusal(tier, "activations", 0, "torch's temporaries", needed),
                    tier=tier, needed_bytes=needed, given_bytes=self.budgets[tier],
                )  # fmt: skip

    def held(self, tier: str, category: str | None = None) -> int:
        """Bytes held now; without a category all of the tier's, its reserve left out."""
        with self._lock:
            return self._held[tier][category] if category else sum(self._held[tier].values())

    def watermark(self, tier: str) -> Watermark:
        """One of its own for whoever asks; it is kept as long as the ledger is."""
        mark = Watermark(self, tier)
        with self._lock:
            self._watermarks[tier].append(mark)
        return mark

    def room(self, tier: str) -> int:
        with self._lock:
            return self.budgets[tier] - self._total(tier)

    def most(self, tier: str) -> int:
        """What could ever be held beside torch's temporaries."""
        with self._lock:
            return self.budgets[tier] - max(self._allowance[tier], self._reserve[tier])

    def summary(self) -> dict[str, dict]:
        """{tier: {budget_bytes, peak_bytes, reserve_bytes, by_category (at the tier's peak), held_by_category (now)}}."""
        with self._lock:
            return {
                tier: {
                    "budget_bytes": self.budgets[tier],
                    "peak_bytes": self._peak[tier],
                    "reserve_bytes": self._reserve[tier],
                    "by_category": dict(self._at_peak[tier]),
                    "held_by_category": dict(self._held[tier]),
                }
                for tier in TIERS
            }

    def _fits(self, tier: str, category: str, nbytes: int) -> bool:
        with self._lock:
            return self._total(tier, category, nbytes) <= self.budgets[tier]

    def _total(self, tier: str, category: str = "activations", nbytes: int = 0) -> int:
        """What counts against the budget once `nbytes` more of `category` are held."""
        activations = self._held[tier]["activations"]
        others = sum(self._held[tier].values()) - activations
        if category == "activations":
            activations += nbytes
        else:
            others += nbytes
        return others + max(self._allowance[tier], activations + self._reserve[tier])

    def _book(self, tier: str, category: str, nbytes: int) -> None:
        self._held[tier][category] += nbytes
        self._recorder.change(tier, category, nbytes, self._held[tier][category])
        self._note_peak(tier)

    def _note_peak(self, tier: str) -> None:
        held = sum(self._held[tier].values())
        for mark in self._watermarks[tier]:
            mark.most = max(mark.most, held)
        total = held + self._reserve[tier]
        if total > self._peak[tier]:
            self._peak[tier] = total
            self._at_peak[tier] = dict(self._held[tier])

    def _refusal(self, tier: str, category: str, nbytes: int, what: str, needed: int) -> str:
        held = ", ".join(f"{name} {format_bytes(size)}" for name, size in self._held[tier].items() if size)
        reserve = f", torch's temporaries {format_bytes(self._reserve[tier])}" if self._reserve[tier] else ""
        budget, argument = self.budgets[tier], ARGUMENT[tier]
        return (
            f"The {tier} budget {argument}={format_bytes(budget)} is {format_bytes(needed - budget)} "
            f"({needed - budget} bytes) short: {format_bytes(nbytes)} of {category}{' for ' + what if what else ''} "
            f"on top of {held or 'nothing'}{reserve} need {format_bytes(needed)} ({needed} bytes). No update had begun: "
            f"give {argument} at least {needed} bytes, or take a smaller batch or shorter sequences"
            + (", or run blocks on some rows of it at a time: Config(micro_batch=…)." if tier == "device" else ".")
        )


class Watermark:
    """The most bytes of a tier held at once since it was asked last, the reserve left out."""

    def __init__(self, ledger: Ledger, tier: str) -> None:
        self.most = 0
        self._ledger = ledger
        self._tier = tier

    def take(self) -> int:
        with self._ledger._lock:  # or another thread's charge could be lost between the two
            most, self.most = self.most, self._ledger.held(self._tier)
            return most
