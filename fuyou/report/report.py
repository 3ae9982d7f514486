"""The report of a run: a plain dict, a terminal table, a JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fuyou.core.errors import ConfigError
from fuyou.core.ledger import CATEGORIES, TIERS
from fuyou.core.sizes import format_bytes


class Report:
    """A frozen picture of a run, taken by `run.report()`."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def dict(self) -> dict[str, Any]:
        """`tiers.{device,host,nvme}.{budget_bytes,peak_bytes,reserve_bytes,by_category}`, `process`, `traffic`, `steps`,
        `updates` (chunks: guessed, accepted, dropped, deferred), `update_seconds` (of the threads beside training: waiting
        for commits, writes and reads, and computing), `drives` (of each its folder, the bytes that it holds and has moved,
        its measured speed), `plan` (of the activations: name, settled, predicted_seconds_per_step, words, blocks), `engine`,
        `notes`.
        `by_category` is what made up the tier's peak; `reserve_bytes` are torch's temporaries."""
        return self._content

    def table(self) -> str:
        """Peak memory by tier and category against the budgets, and the bytes moved a step."""
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
        plan = self._content["plan"]
        if plan["blocks"]:
            how = "; ".join(f"{count} blocks {text}" for text, count in plan["blocks"].items())
            lines.append(f"Activations: {how}{'' if plan['settled'] else ' (being tried)'}. {plan['words']}".rstrip())
        process = self._content["process"]
        lines.append(
            f"Process: {format_bytes(process['baseline_rss_bytes'])} resident after wrap, "
            f"{format_bytes(process['peak_rss_bytes'])} at its peak since the process began (loading the model included)."
        )
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the dict as JSON to `path`, which ends in .json. ConfigError for another format: none is built yet."""
        target = Path(path)
        if target.suffix != ".json":
            raise ConfigError(
                f"A report is saved as .json and was asked for as {target.name}: other formats are not built yet."
            )
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(self._content, indent=2) + "\n")
        partial.replace(target)

    def trace(self, path: str | os.PathLike[str]) -> None:
        raise ConfigError("A trace is not built yet: use torch.profiler, in which every phase is named fuyou::….")


def _cell(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "-"
