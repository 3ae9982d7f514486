"""What becomes of what blocks save for backward: values, made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """What becomes of what a block's forward saves for its backward.

    `saved`: "keep" on the device, "recompute" from the inputs, or swap to "host" or "nvme". `inputs`, of a block that
    recomputes: they stay on the "device", or go to "host" or "nvme". `results`: (ordinal of a costly operation, tier); a
    block that recomputes saves their results too, and skips these operations then; any other one saves them on that tier.
    """

    saved: str
    inputs: str = "device"
    results: tuple[tuple[int, str], ...] = ()

    def __str__(self) -> str:
        text = {"keep": "kept", "recompute": "recomputed", "host": "on the host", "nvme": "on NVMe"}[self.saved]
        if self.saved == "recompute" and self.inputs != "device":
            text += f", inputs on {self.inputs}"
        return text + (f", {len(self.results)} results apart" if self.results else "")


KEEP = Placement("keep")
# By the names of fuyou.Config; "auto" is "recompute" until the planner decides.
PLACEMENTS = {
    "auto": Placement("recompute"),
    "keep": KEEP,
    "recompute": Placement("recompute"),
    "host": Placement("host"),
    "nvme": Placement("nvme"),
}
