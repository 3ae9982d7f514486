"""The page of a report: one HTML file with everything in it, for a screen of any width, in light and dark, and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fuyou.core.ledger import CATEGORIES, TIERS
from fuyou.core.sizes import format_bytes
from fuyou.report.charts import curve, definitions, lane_chart, memory_chart
from fuyou.report.intervals import merged, without
from fuyou.report.style import STYLE
from fuyou.report.trace import LANES
from fuyou.report.words import CAUSES, advice_lines, prefetch_line, seconds_text, wear_line

SHOWN = (
    "compute",
    "recompute",
    "stall",
    "host_to_device",
    "device_to_host",
    "nvme_read",
    "nvme_write",
    "adam",
    "commit",
)
NOT_MEASURED = (
    "The drives were not measured alone: a run does that where its store takes a GiB or more of a drive. "
    "<code>fuyou doctor --nvme FOLDER</code> measures at any time."
)


def page(content: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The whole file. `content` is Report.dict's; `metrics` the lines of metrics.jsonl, for the curves."""
    sections = [
        _error(content),
        _section("What would help", _list(advice_lines(content))),
        _section("Memory at its peak", _memory_table(content)),
        _step_sections(content),
        _section("Waits", _waits(content) + f"<p>{escape(prefetch_line(content))}</p>"),
        _section("Predicted and actual", _predicted(content)),
        _section("Bytes moved", _traffic(content)),
        _curves(metrics),
        _section("Drives", f"<p>{escape(wear_line(content))}</p>" + _drives(content)),
        _section("Largest tensors", _tensors(content)),
        _section("Notes", _list(content["notes"])),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>fuyou: report of a run</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{definitions()}<main>'
        f"<h1>{escape(content['bound']['sentence'])}</h1><p>{escape(content['bound']['details'])}</p>{_summary(content)}{''.join(sections)}</main></body></html>\n"
    )


def _summary(content: Mapping[str, Any]) -> str:
    parameters, engine = content["parameters"], content["engine"]
    return (
        f'<p class="summary">{parameters["count"]:,} parameters, {parameters["trained"]:,} trained, on '
        f"{escape(content['device'])}; {content['step_count']:,} steps in this run; I/O by {escape(engine['io'])}, Adam "
        f"{escape(engine['adam'])}.</p>"
    )


def _error(content: Mapping[str, Any]) -> str:
    if "error" not in content:
        return ""
    error = content["error"]
    held = [
        f"{tier}: "
        + (
            ", ".join(
                f"{name} {format_bytes(size)}"
                for name, size in content["tiers"][tier]["held_by_category"].items()
                if size
            )
            or "nothing"
        )
        for tier in TIERS
    ]
    units = [
        f"weights of {each['name']} on the device: {format_bytes(each['bytes'])}"
        + (", in use" if each["used_by"] else "")
        for each in content["resident_units"]
    ]
    text = f"<p><b>{escape(error['type'])}</b> during {escape(error['during'])}: {escape(error['message'])}</p>"
    return _section("Memory ran out", text + "<p>Held at that moment:</p>" + _list(held + units))


def _memory_table(content: Mapping[str, Any]) -> str:
    tiers, process = content["tiers"], content["process"]
    rows = [[name, *(_size(tiers[tier]["by_category"][name]) for tier in TIERS)] for name in CATEGORIES]
    rows.append(["temporaries", *(_size(tiers[tier]["reserve_bytes"]) for tier in TIERS)])
    rows.append(["peak", *(_size(tiers[tier]["peak_bytes"]) for tier in TIERS)])
    rows.append(["budget", *(_size(tiers[tier]["budget_bytes"]) for tier in TIERS)])
    rows.append([
        "used",
        *(
            f"{tiers[tier]['peak_bytes'] / tiers[tier]['budget_bytes']:.0%}" if tiers[tier]["budget_bytes"] else "–"
            for tier in TIERS
        ),
    ])  # fmt: skip
    limit = process["control_group_limit_bytes"]
    text = (
        f"Resident memory of the process was {format_bytes(process['baseline_rss_bytes'])} when training began and grew by "
        f"{format_bytes(process['growth_bytes'])}: {format_bytes(process['tracked_growth_bytes'])} of that is in this table, "
        f"{format_bytes(process['temporaries_bytes'])} are torch's temporaries, "
        f"{format_bytes(process['heap_free_bytes'])} are freed memory that the C library keeps for later, and "
        f"{format_bytes(process['untracked_bytes'])} are untracked."
    )
    if limit:
        used = process["control_group_used_bytes"] or 0
        text += f" The control group grants {format_bytes(limit)}, of which {format_bytes(used)} are in use, caches included."
    return _table(["", *TIERS], rows, {"peak", "budget"}) + f"<p>{escape(text)}</p>"


def _step_sections(content: Mapping[str, Any]) -> str:
    step = content["step"]
    if not step:
        return ""
    seconds, lanes = step["seconds"], step["lanes"]
    computed = merged((each[0], each[1]) for lane in ("model", "compute") for each in lanes[lane])
    stalled = merged((each[0], each[1]) for each in lanes["stall"])
    spans = {**lanes, "compute": [[*each, "", 0] for each in without(computed, stalled)]}  # as busy_seconds counts it
    shown = {lane: (LANES[lane], spans[lane]) for lane in SHOWN if spans[lane]}
    said = (
        "" if content["lane_times"] == "run" else "Compute and copies are shown when they were queued on the device. "
    )
    if not step["complete"]:
        said += "The step was longer than what is recorded: its beginning is missing. "
    charts = "".join(
        memory_chart(tier, series, seconds, content["tiers"][tier]["budget_bytes"], step["phases"])
        for tier, series in step["memory"].items()
        if any(sum(held.values()) for _, held in series)
    )
    lane = lane_chart(shown, seconds, step["phases"])
    note = f"<p>{said}Percent of the step in which each had something to do.</p>"
    return _section(f"Step {step['number']}, {seconds_text(seconds)}", note + lane) + _section(
        "Memory through that step", charts
    )


def _waits(content: Mapping[str, Any]) -> str:
    step = content["step"]
    if not step or not step["stalled_seconds"]:
        return ""
    rows = [
        [CAUSES.get(cause, cause), seconds_text(seconds), f"{seconds / step['seconds']:.1%}"]
        for cause, seconds in sorted(step["stalled_seconds"].items(), key=lambda each: -each[1])
    ]
    return _table(["training waited for", "seconds", "of the step"], rows)


def _predicted(content: Mapping[str, Any]) -> str:
    plan, step, model = content["plan"], content["step"], content["model"]
    rows = []
    if plan["predicted_seconds_per_step"] and step:
        rows.append(["seconds a step", seconds_text(plan["predicted_seconds_per_step"]), seconds_text(step["seconds"])])
    for tier, nbytes in plan["predicted_peak_bytes"].items():
        rows.append([f"peak, {tier}", _size(nbytes), _size(content["tiers"][tier]["peak_bytes"])])
    for way in ("read", "write"):
        if model:
            actual = content["traffic"][f"nvme_{way}_bytes_per_step"]
            rows.append([f"NVMe {way} a step", _size(model[f"nvme_{way}_bytes_per_step"]), _size(actual)])
    each = content["parameters"]
    if each["ideal_nvme_bytes_per_parameter"]:
        ideal, moved = each["ideal_nvme_bytes_per_parameter"], each["nvme_bytes_per_parameter"]
        rows.append(["NVMe bytes a trained parameter", f"{ideal:.1f}", f"{moved:.1f}"])
    words = f"<p>{escape(plan['words'])}</p>" if plan["words"] else ""
    return (_table(["", "predicted", "actual"], rows) if rows else "") + words


def _traffic(content: Mapping[str, Any]) -> str:
    rows = []
    for lane, speed in content["speeds"].items():
        rate, alone = speed["achieved_bytes_per_s"], speed["measured_bytes_per_s"]
        rows.append([
            LANES[lane], _size(content["traffic"][f"{lane}_bytes_per_step"]), _rate(rate),
            f"{_rate(alone)}, both ways together" if alone else "–",
        ])  # fmt: skip
    unmeasured = content["drives"] and not content["speeds"]["nvme_read"]["measured_bytes_per_s"]
    said = f"<p>{NOT_MEASURED}</p>" if unmeasured else ""
    return _table(["", "a step", "achieved", "measured alone"], rows) + said


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = [each for each in metrics if each.get("loss") is not None]
    if len(steps) < 2:
        return ""
    charts = curve("Loss", [(each["step"], each["loss"]) for each in steps], lambda value: f"{value:.4g}")
    speeds = [(each["step"], each["tokens"] / each["seconds"]) for each in steps if each.get("seconds")]
    if len(speeds) > 1:
        charts += curve("Tokens a second", speeds, lambda value: f"{value:,.0f}")
    return _section("Training", charts)


def _drives(content: Mapping[str, Any]) -> str:
    rows = [
        [each["folder"], _size(each["held_bytes"]), _size(each["read_bytes"]), _size(each["write_bytes"])]
        for each in content["drives"]
    ]
    return _table(["folder", "holds", "read", "written"], rows) if rows else ""


def _tensors(content: Mapping[str, Any]) -> str:
    rows = [
        [each["name"], " × ".join(map(str, each["shape"])) or "1", each["dtype"], format_bytes(each["bytes"])]
        for each in content["largest_tensors"]
    ]
    return "<p>Weights, gradient and optimizer state together.</p>" + _table(["name", "shape", "dtype", "bytes"], rows)


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], strong: set[str] | frozenset[str] = frozenset()
) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=strong' if row[0] in strong else ''}>"
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _size(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "–"


def _rate(rate: float | None) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate else "–"
