"""One step as Chrome's trace-event JSON, which Perfetto and chrome://tracing open.

Format: "Trace Event Format", JSON object form: metadata events ("M") name the lanes, complete events ("X") have `ts` and `dur` in
microseconds, counters ("C") are memory by category.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PID = 1
LANES = {  # in the order in which they are shown
    "phase": "phases",
    "model": "model",
    "compute": "compute",
    "recompute": "recompute",
    "stall": "training waits",
    "host_to_device": "copies to device",
    "device_to_host": "copies to host",
    "nvme_read": "NVMe read",
    "nvme_write": "NVMe write",
    "adam": "Adam",
    "commit": "commit",
}


def trace_events(content: Mapping[str, Any]) -> dict[str, Any]:
    """{"traceEvents": […], "displayTimeUnit": "ms", "otherData": {…}} of the report's step; no events where there is none."""
    step = content["step"]
    events: list[dict[str, Any]] = [_metadata("process_name", 0, "fuyou")]
    lanes = _lanes(step)
    first = min(
        (each[0] for its in lanes.values() for each in its), default=0.0
    )  # what began before the step: no time is < 0
    start = min(first, 0.0)
    rows = {lane: _rows(its) for lane, its in lanes.items()}
    tid = 0
    for lane, title in LANES.items():
        for row, spans in enumerate(rows.get(lane) or [[]]):
            tid += 1
            events.append(_metadata("thread_name", tid, title if row == 0 else f"{title} {row + 1}"))
            events.append(_metadata("thread_sort_index", tid, tid))
            for began, ended, name, nbytes in spans:
                event = {"name": name, "cat": lane, "ph": "X", "pid": PID, "tid": tid}
                times = {"ts": _us(began - start), "dur": _us(ended - began)}
                events.append({**event, **times, "args": {"bytes": nbytes} if nbytes else {}})
    for tier, series in step.get("memory", {}).items():
        for at, held in series:
            events.append(
                {"name": f"{tier} memory", "ph": "C", "pid": PID, "tid": 0, "ts": _us(at - start), "args": dict(held)}
            )
    for at, nbytes in step.get("resident", []):
        events.append(
            {
                "name": "resident memory",
                "ph": "C",
                "pid": PID,
                "tid": 0,
                "ts": _us(at - start),
                "args": {"bytes": nbytes},
            }
        )
    other = {"step": step.get("number", 0), "device": content["device"], "lane_times": content["lane_times"]}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": other}


def _lanes(step: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    if not step:
        return {}
    return {"phase": [[began, ended, name, 0] for name, began, ended in step["phases"]], **step["lanes"]}


def _rows(spans: list[list[Any]]) -> list[list[list[Any]]]:
    """Spans of one row do not overlap: the format wants those of one thread nested."""
    rows: list[list[list[Any]]] = []
    for span in sorted(spans):
        row = next((each for each in rows if each[-1][1] <= span[0]), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def _metadata(name: str, tid: int, value: str | int) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "M",
        "pid": PID,
        "tid": tid,
        "args": {"sort_index" if isinstance(value, int) else "name": value},
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
