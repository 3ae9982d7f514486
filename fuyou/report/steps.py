"""One step of a run, and what its resources were busy with, from what the recorder still has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fuyou.core.ledger import CATEGORIES
from fuyou.core.recorder import LANES, Change, Recorder, Span
from fuyou.report.intervals import Interval, clipped, length, merged, without

RECENT_STEPS = 9
SAMPLES = 160  # of memory, over a step
RESOURCES = ("compute", "host_to_device", "device_to_host", "nvme", "adam")  # what a step may be bound by
Steps = list[tuple[int, float, float]]


def timed_resources(device: str) -> tuple[str, ...]:
    """Those whose lanes say when they ran: on CUDA compute and copies are noted when they are queued."""
    return RESOURCES if device == "cpu" else ("nvme", "adam")


def recent_steps(recorder: Recorder) -> Steps:
    """The last steps of which everything is still there, but the first one of the run, which also finds its way."""
    steps, whole = recorder.steps(), recorder.whole_since()
    kept = [each for each in steps if each[1] >= whole and each[0] > 1] or steps[-1:]
    return kept[-RECENT_STEPS:]


def middle_step(steps: Steps) -> tuple[int, float, float] | None:
    """The one of median length."""
    return sorted(steps, key=lambda each: each[2] - each[1])[len(steps) // 2] if steps else None


def step_content(recorder: Recorder, held: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """`step` of a report's dict: see Report.dict. `held`: bytes by tier and category now."""
    step = middle_step(recent_steps(recorder))
    if step is None:
        return {}
    number, first, last = step
    spans = {lane: _within(recorder.spans(lane), first, last) for lane in LANES}
    return {
        "number": number,
        "seconds": last - first,
        "complete": first >= recorder.whole_since(),
        "busy_seconds": busy_seconds(spans, first, last),
        "stalled_seconds": stalled_seconds(spans["stall"]),
        "phases": phases(spans, first),
        "lanes": {
            lane: [[round(a - first, 7), round(b - first, 7), name, nbytes] for a, b, name, nbytes in its]
            for lane, its in spans.items()
        },
        "memory": {
            tier: memory_series(recorder.changes(tier), held[tier], first, last) for tier in held if tier != "nvme"
        },
        "resident": [[round(at - first, 7), nbytes] for at, nbytes in recorder.residents() if first <= at <= last],
    }


def busy_seconds(spans: Mapping[str, list[Span]], first: float, last: float) -> dict[str, float]:
    """Of each lane, and of each of RESOURCES: seconds in which it had anything to do. Compute is what the training thread did
    within the model's forward and backward while it did not wait."""
    stalls = _times(spans["stall"], first, last)
    busy = {lane: length(_times(its, first, last)) for lane, its in spans.items()}
    busy["compute"] = length(without(_times([*spans["model"], *spans["compute"]], first, last), stalls))
    busy["nvme"] = length(_times([*spans["nvme_read"], *spans["nvme_write"]], first, last))
    return busy


def stalled_seconds(stalls: Iterable[Span]) -> dict[str, float]:
    found: dict[str, float] = {}
    for each in stalls:
        found[each.name] = found.get(each.name, 0.0) + each.ended - each.began
    return found


def block_seconds(recorder: Recorder, names: Mapping[str, int]) -> dict[int, tuple[float, float]]:
    """(forward, backward) seconds a step that each block computed, by index; stalls left out, of the middle step."""
    step = middle_step(recent_steps(recorder))
    if step is None:
        return {}
    _, first, last = step
    stalls = _times(_within(recorder.spans("stall"), first, last), first, last)
    found = {index: [0.0, 0.0] for index in names.values()}
    for span in _within(recorder.spans("compute"), first, last):
        kind, _, name = span.name.partition(" ")
        if name in names:
            found[names[name]][kind == "backward"] += length(without([(span.began, span.ended)], stalls))
    return {index: (forward, backward) for index, (forward, backward) in found.items()}


def backward_count(recorder: Recorder) -> int:
    """Backwards a step, of the middle one."""
    step = middle_step(recent_steps(recorder))
    if step is None:
        return 1
    its = {"compute": _within(recorder.spans("compute"), step[1], step[2]), "model": [], "stall": []}
    return max(1, sum(name == "backward" for name, _, _ in phases(its, step[1])))


def achieved(recorder: Recorder) -> dict[str, float | None]:
    """Bytes a second of each lane that moves bytes, while it moved any, over the recent steps; None where nothing did, or no
    time is known (copies on CUDA)."""
    steps = recent_steps(recorder)
    found: dict[str, float | None] = {}
    for lane in ("nvme_read", "nvme_write", "host_to_device", "device_to_host"):
        spans = _within(recorder.spans(lane), steps[0][1], steps[-1][2]) if steps else []
        seconds = length(merged((each.began, each.ended) for each in spans))
        found[lane] = sum(each.nbytes for each in spans) / seconds if seconds > 0 else None
    return found


def phases(spans: Mapping[str, list[Span]], first: float) -> list[list[Any]]:
    """[name, began, ended] of forward, backward and update, in their order, from the step's beginning."""
    found: list[list[Any]] = []
    events = [(each.began, each.ended, each.name.partition(" ")[0]) for each in spans["compute"]]
    events += [(each.began, each.ended, "update") for each in spans["stall"] if each.name == "update"]
    for began, ended, name in sorted(events):
        if found and found[-1][0] == name:
            found[-1][2] = max(found[-1][2], ended - first)
        else:
            found.append([name, began - first, ended - first])
    return found


def memory_series(changes: list[Change], held: Mapping[str, int], first: float, last: float) -> list[list[Any]]:
    """[seconds from the step's beginning, {category: bytes}]: of each of SAMPLES parts of the step the moment at which most
    was held."""
    now = {category: held.get(category, 0) for category in CATEGORIES}
    for category in CATEGORIES:
        mine = [each for each in changes if each.category == category]
        later = [each for each in mine if each.at >= first]
        if later:
            now[category] = later[0].held - later[0].nbytes
        elif mine:
            now[category] = mine[-1].held
    width = (last - first) / SAMPLES or 1.0
    series: list[list[Any]] = [[0.0, dict(now)]]
    part, most = 0, dict(now)
    for each in changes:
        if not first <= each.at <= last:
            continue
        while (each.at - first) / width >= part + 1:
            series.append([(part + 0.5) * width, most])
            part, most = part + 1, dict(now)
        now[each.category] = each.held
        if sum(now.values()) >= sum(most.values()):
            most = dict(now)
    series.append([(part + 0.5) * width, most])
    series.append([last - first, dict(now)])
    return [[round(at, 7), values] for at, values in series]


def _within(spans: list[Span], first: float, last: float) -> list[Span]:
    return [each for each in spans if each.ended >= first and each.began <= last]


def _times(spans: Iterable[Span], first: float, last: float) -> list[Interval]:
    return merged(clipped(((each.began, each.ended) for each in spans), first, last))


def busiest(recorder: Recorder, timed: Iterable[str]) -> tuple[str, float]:
    """(the one of `timed` resources that was busy for most of the last step, its share); ("", 0.0) before the first step."""
    steps = recorder.steps()
    if not steps:
        return "", 0.0
    _, first, last = steps[-1]
    spans = {lane: _within(recorder.spans(lane), first, last) for lane in LANES}
    busy = busy_seconds(spans, first, last)
    name = max(timed, key=lambda each: busy[each])
    return name, busy[name] / (last - first)
