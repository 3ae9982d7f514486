"""Plans for activations that a run has settled on, kept beside its store for the next run of the same model and budgets."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from fuyou.core.beside import read_beside, write_beside
from fuyou.runtime.placing import Decided, Plan
from fuyou.swap.placement import Placement

FILE = "fuyou-plan.json"  # in the first nvme folder
VERSION = 1
MOST_PLANS = 8  # of one model: one for each size of batch
_SAVED, _TIERS = ("keep", "recompute", "host", "nvme"), ("device", "host", "nvme")


class Remembered:
    """`key`: all that a plan depends on beside the size of the batch; a file of another key is replaced. With no folder
    nothing is remembered."""

    def __init__(self, folder: str | None, key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._key = dict(key)

    def recall(self, size: int) -> Decided | None:
        """What was settled on for batches of `size`, checked field by field; None where nothing was."""
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return _decided(self._plans()[str(size)])
        return None

    def remember(self, size: int, decided: Decided) -> None:
        if self._folder is None:
            return
        plans = {name: its for name, its in self._plans().items() if name != str(size)}
        newest = dict(list(plans.items())[-MOST_PLANS + 1 :]) | {str(size): _values(decided)}
        write_beside(self._folder, FILE, {"version": VERSION, "key": self._key, "plans": newest})

    def _plans(self) -> dict[str, Any]:
        content = read_beside(self._folder, FILE) if self._folder is not None else None
        if isinstance(content, dict) and content.get("version") == VERSION and content.get("key") == self._key:
            plans = content.get("plans")
            return plans if isinstance(plans, dict) else {}
        return {}


def _values(decided: Decided) -> dict[str, Any]:
    plan = decided.plan
    return {
        "name": plan.name,
        "seconds": plan.seconds,
        "words": plan.words,
        "peak_bytes": dict(plan.peak_bytes),
        "placements": {str(index): [its.saved, its.inputs, its.results] for index, its in plan.placements.items()},
        "saved_bytes": {str(index): nbytes for index, nbytes in decided.saved_bytes.items()},
    }


def _decided(values: Any) -> Decided:
    """ValueError, KeyError, TypeError, AttributeError or OverflowError for what cannot be one."""
    placements = {}
    for index, (saved, inputs, results) in values["placements"].items():
        pairs = tuple((ordinal, tier) for ordinal, tier in results)
        if saved not in _SAVED or inputs not in _TIERS:
            raise ValueError(f"not a placement: {saved}, {inputs}")
        if not all(type(ordinal) is int and ordinal >= 0 and tier in _TIERS for ordinal, tier in pairs):
            raise ValueError(f"not results: {results}")
        placements[int(index)] = Placement(saved, inputs, pairs)
    saved_bytes = {int(index): nbytes for index, nbytes in values["saved_bytes"].items()}
    peak_bytes = {tier: values["peak_bytes"][tier] for tier in values["peak_bytes"] if tier in _TIERS}
    counts = (*saved_bytes.values(), *peak_bytes.values(), *saved_bytes, *placements)
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("not bytes, or not blocks")
    seconds = float(values["seconds"])
    if not 0.0 <= seconds < 1e9:  # false for NaN
        raise ValueError(f"not seconds: {seconds}")
    return Decided(Plan(str(values["name"]), placements, seconds, str(values["words"]), peak_bytes), saved_bytes)
