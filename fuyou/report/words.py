"""Sentences of a report: what bounded the step, what was waited for, what would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fuyou.core.sizes import format_bytes
from fuyou.plan.explain import WORDS

BUSY = 0.6  # of a step: from here on a resource is said to have bound it
CAUSES = {
    "weights": "weights that had not arrived",
    "gradients": "gradients leaving the device",
    "activations": "activations on their way out or back",
    "update": "step() itself",
}


def seconds_text(seconds: float) -> str:
    """'2.43 s', '81 ms', '0.3 ms'."""
    if seconds >= 1:
        return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def days_text(days: float) -> str:
    return f"{days / 365:.1f} years" if days >= 730 else f"{days:.0f} days" if days >= 10 else f"{days:.1f} days"


def bound_sentence(content: Mapping[str, Any]) -> dict[str, Any]:
    """{resource: the busiest, or None where nothing was busy for most of the step; sentence; details: what else was busy, and
    what training waited for}."""
    step = content["step"]
    if not step:
        return {"resource": None, "sentence": "No step has been made yet.", "details": ""}
    total, busy = step["seconds"], step["busy_seconds"]
    timed = [name for name in WORDS if content["lane_times"] == "run" or name in ("nvme", "adam")]
    (top, resource), *rest = sorted(((busy[name] / total, name) for name in timed), reverse=True)
    text = f"Step {step['number']} took {seconds_text(total)}"
    if top >= BUSY:
        text += f" and was bound by {WORDS[resource]}: busy {top:.0%} of it."
    elif content["lane_times"] == "run":
        text += f"; nothing was busy for most of it. Busiest: {WORDS[resource]}, {top:.0%}."
    else:
        text += f"; busiest of what is timed: {WORDS[resource]}, {top:.0%}. The device's own work is not."
    others = ", ".join(f"{WORDS[name]} {share:.0%}" for share, name in rest if share >= 0.005)
    details = [f"Beside that, busy: {others}."] if others else []
    details.append(_waited(step["stalled_seconds"], total))
    return {"resource": resource if top >= BUSY else None, "sentence": text, "details": " ".join(details)}


def _waited(stalled: Mapping[str, float], total: float) -> str:
    waited = sum(stalled.values())
    if waited < 0.005 * total:
        return "Training waited for nothing."
    cause = max(stalled, key=lambda each: stalled[each])
    most = "most of it " if sum(each > 0.001 * total for each in stalled.values()) > 1 else ""
    return f"Training waited {seconds_text(waited)} ({waited / total:.0%}), {most}for {CAUSES.get(cause, cause)}."


def advice_lines(content: Mapping[str, Any]) -> list[str]:
    """What would make a step shorter, by the cost model, and by how much."""
    lines = [
        f"With {each['change']}, a step would take {1 - 1 / each['times_as_fast']:.0%} less time for the same rows."
        for each in content["model"].get("advice", [])
    ]
    if not lines and content["model"].get("bound_by"):
        return ["No change of the machine that was tried would make it 3 % faster."]
    return lines


def wear_line(content: Mapping[str, Any]) -> str:
    """Bytes that a day of training writes, and what they mean for a drive."""
    wear = content["wear"]
    days = wear["days_for_600_tb_per_drive"]
    if days is None:
        return "Nothing is written to a drive."
    return (
        f"A step writes {format_bytes(wear['written_bytes_per_step'])} and a day of such steps "
        f"{format_bytes(wear['written_bytes_per_day'])}: drives rated for 600 TB written each last {days_text(days)}."
    )


def prefetch_line(content: Mapping[str, Any]) -> str:
    counts = content["prefetch"]
    total = sum(counts.values())
    if not total:
        return "No block's weights were wanted yet."
    return (
        f"Of {total:,} times that weights were wanted they were there {counts['hit'] / total:.1%}, on their way "
        f"{counts['late'] / total:.1%}, not asked for before {counts['miss'] / total:.1%}."
    )
