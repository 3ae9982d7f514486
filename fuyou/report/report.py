"""The report of a run: a plain dict, a terminal table, files of JSON, HTML and a trace."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fuyou.core.errors import ConfigError
from fuyou.core.ledger import CATEGORIES, TIERS
from fuyou.core.sizes import format_bytes
from fuyou.report.page import page
from fuyou.report.trace import trace_events
from fuyou.report.words import advice_lines, prefetch_line, seconds_text


class Report:
    """A frozen picture of a run, taken by `run.report()`."""

    def __init__(self, content: dict[str, Any], metrics: Sequence[Mapping[str, Any]] = ()) -> None:
        """`metrics`: the lines of a run's metrics.jsonl, for the curves of its page."""
        self._content = content
        self._metrics = metrics

    def dict(self) -> dict[str, Any]:
        """[Note: report.json] What JSON can carry; every time in seconds, every size in bytes. All of `version` 1:

        | key | what |
        |---|---|
        | version | of this schema |
        | bound | resource ("compute", "host_to_device", "device_to_host", "nvme", "adam", or null), sentence, details |
        | tiers.{device,host,nvme} | budget_bytes, peak_bytes, reserve_bytes (torch's temporaries), by_category (at the peak), held_by_category (now) |
        | process | baseline_rss_bytes (when wrap was done), peak_rss_bytes (of the process), rss_bytes (now), committed_host_bytes (arenas, leased or not); of the growth since wrap, at the highest that was noted: growth_bytes, tracked_growth_bytes, temporaries_bytes, heap_free_bytes (freed, and kept by the C library for later), untracked_bytes; control_group_limit_bytes, control_group_used_bytes (or null); on CUDA cuda_allocator |
        | traffic | {nvme_read,nvme_write,host_to_device,device_to_host}_bytes_per_step |
        | steps | of the last 1000: seconds, stalls {cause: seconds}, traffic, nonfinite_gradients |
        | step_count | of this run |
        | step | one step of median length among the last: number, seconds, complete (nothing of it was overwritten), busy_seconds {lane or resource: seconds}, stalled_seconds {cause: seconds}, phases [[name, began, ended]], lanes {lane: [[began, ended, name, bytes]]}, memory {tier: [[at, {category: bytes}]]}, resident [[at, bytes]]; times from its beginning. Empty before the first step |
        | lane_times | "run", or "queued" on CUDA: there compute and copies are noted when they are queued |
        | updates | chunks: guessed, accepted, dropped, deferred |
        | update_seconds | of the threads beside training: commit, nvme_write, nvme_read (waits), adam |
        | prefetch | times that weights were wanted: hit, late, miss |
        | plan | of activations: name, settled, predicted_seconds_per_step, predicted_peak_bytes, words, blocks, considered, tried |
        | model | the cost model held to that step: bound_by (null on CUDA, and then no advice: `plan` has it), busy_seconds, nvme_{read,write}_bytes_per_step, words, advice [{change, times_as_fast}]. Empty before the first step |
        | speeds.{lane} | achieved_bytes_per_s while it moved any, measured_bytes_per_s alone; null where not known |
        | parameters | count, trained, nvme_bytes_per_parameter and ideal_nvme_bytes_per_parameter a step |
        | wear | written_bytes_per_step, written_bytes_per_day, days_for_600_tb_per_drive (or null) |
        | largest_tensors | name, shape, dtype, bytes (weights, gradient and optimizer state) |
        | resident_units | on the device now: name, bytes, used_by (calls) |
        | device, engine, drives, notes | where it ran: of each drive folder, io, held_bytes, read_bytes, write_bytes, bytes_per_s |

        `fuyou train` adds `data`; a post-mortem adds `error` (type, message, during)."""  # noqa: E501
        return self._content

    def table(self) -> str:
        """What bounded the step, peak memory by tier and category against the budgets, the bytes moved a step, advice."""
        header = ["tier", *CATEGORIES, "temporaries", "peak", "budget", "used"]
        rows = [header]
        for tier in TIERS:
            each = self._content["tiers"][tier]
            budget, peak = each["budget_bytes"], each["peak_bytes"]
            rows.append([
                tier,
                *(_cell(each["by_category"][category]) for category in CATEGORIES),
                _cell(each["reserve_bytes"]),
                format_bytes(peak),
                format_bytes(budget) if budget else "none",
                f"{peak / budget:.0%}" if budget else "",
            ])  # fmt: skip
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(0, f"{self._content['bound']['sentence']} {self._content['bound']['details']}".rstrip())
        if "error" in self._content:
            error = self._content["error"]
            lines.insert(0, f"{error['type']} during {error['during']}: {error['message']}")
        traffic = self._content["traffic"]
        lines.append(
            f"A step moves: NVMe read {format_bytes(traffic['nvme_read_bytes_per_step'])}, "
            f"NVMe write {format_bytes(traffic['nvme_write_bytes_per_step'])}, "
            f"host to device {format_bytes(traffic['host_to_device_bytes_per_step'])}, "
            f"device to host {format_bytes(traffic['device_to_host_bytes_per_step'])}."
        )
        if len(self._content["drives"]) > 1:
            lines += [
                f"{each['folder']} holds {format_bytes(each['held_bytes'])}; so far read {format_bytes(each['read_bytes'])}, "
                f"written {format_bytes(each['write_bytes'])}."
                for each in self._content["drives"]
            ]
        lines.append(prefetch_line(self._content))
        plan = self._content["plan"]
        if plan["blocks"]:
            how = "; ".join(f"{count} blocks {text}" for text, count in plan["blocks"].items())
            lines.append(f"Activations: {how}{'' if plan['settled'] else ' (being tried)'}. {plan['words']}".rstrip())
        process = self._content["process"]
        lines.append(
            f"Process: {format_bytes(process['baseline_rss_bytes'])} resident after wrap, "
            f"{format_bytes(process['peak_rss_bytes'])} at its peak since the process began (loading the model included); "
            f"{format_bytes(process['untracked_bytes'])} of its growth in training is untracked."
        )
        return "\n".join([*lines, *advice_lines(self._content)])

    def compared(self, other: Report, names: tuple[str, str]) -> str:
        """The figures of this report beside those of `other`, as a table."""
        mine, theirs = _figures(self._content), _figures(other._content)
        rows = [["", *names, "ratio"]]
        for label, (value, text) in mine.items():
            before, told = theirs[label]
            rows.append([label, text, told, f"{value / before:.2f}" if before else ""])
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the dict to `path` as .json, or the page that shows it as .html: one file, with all that it needs in it.
        ConfigError for another ending."""
        target = Path(path)
        if target.suffix == ".json":
            _write(target, json.dumps(self._content, indent=1) + "\n")
        elif target.suffix == ".html":
            _write(target, page(self._content, self._metrics))
        else:
            raise ConfigError(f"A report is saved as .json or .html and was asked for as {target.name}: give it one.")

    def trace(self, path: str | os.PathLike[str]) -> None:
        """Write the report's step to `path` as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open."""
        _write(Path(path), json.dumps(trace_events(self._content)) + "\n")


def _figures(content: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """What two runs are compared by: {label: (value, its text)}."""
    seconds = content["step"].get("seconds", 0.0)
    stalled = sum(content["step"].get("stalled_seconds", {}).values())
    found = {
        "seconds a step": (seconds, seconds_text(seconds)),
        "of these waited": (stalled, seconds_text(stalled)),
    }
    for name, nbytes in content["traffic"].items():
        found[name.removesuffix("_bytes_per_step").replace("_", " ")] = (nbytes, format_bytes(nbytes))
    for tier in TIERS:
        peak = content["tiers"][tier]["peak_bytes"]
        found[f"peak {tier}"] = (peak, format_bytes(peak))
    peak = content["process"]["peak_rss_bytes"]
    return {**found, "peak resident": (peak, format_bytes(peak))}


def _write(target: Path, text: str) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(target)


def _cell(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "-"
