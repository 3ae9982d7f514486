"""Report: its dict by the documented schema, its page, its trace, and `fuyou report`."""

from __future__ import annotations

import contextlib
import html.parser
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import COUNTS, changed, fuzz, spoilt
from hypothesis import strategies as st
from jobs import SETTINGS, make_inputs, write_job
from models import Gpt

import fuyou
from fuyou.core.ledger import CATEGORIES, TIERS
from fuyou.core.recorder import LANES
from fuyou.train.report_job import report_run

VOID = {"meta", "link", "br", "img", "hr", "input"}
NUMBER = (int, float)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> fuyou.Report:
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, 1237, (2, 16))
    folder = tmp_path_factory.mktemp("nvme")
    with fuyou.wrap(model, optimizer, nvme=folder, ram="16MiB", gpu="96MiB", device="cpu") as run:
        for _ in range(4):
            model(tokens, labels=tokens).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        return run.report()


def test_the_dict_is_as_documented(report: fuyou.Report) -> None:
    content = json.loads(json.dumps(report.dict(), allow_nan=False))
    check_schema(content)
    assert content["step_count"] == 4 and len(content["steps"]) == 4
    assert content["parameters"]["count"] == sum(each.numel() for each in Gpt().parameters())
    sizes = [math.prod(each["shape"]) for each in content["largest_tensors"]]
    assert sizes == sorted((each.numel() for each in Gpt().parameters()), reverse=True)[: len(sizes)]


def check_schema(content: dict[str, Any]) -> None:
    """The table in Report.dict's docstring, by hand."""
    documented = {
        line.split("|")[1].strip()
        for line in (fuyou.Report.dict.__doc__ or "").splitlines()
        if line.strip().startswith("|")
    } - {"key", "---"}
    names = {part.split(".")[0].strip() for row in documented for part in row.split(", ")}
    assert set(content) - {"data", "error"} == names
    assert content["version"] == 1
    assert set(content["bound"]) == {"resource", "sentence", "details"} and content["bound"]["sentence"]
    for tier in TIERS:
        each = content["tiers"][tier]
        assert set(each["by_category"]) == set(each["held_by_category"]) == set(CATEGORIES)
        assert all(isinstance(each[key], int) for key in ("budget_bytes", "peak_bytes", "reserve_bytes"))
        assert each["peak_bytes"] >= sum(each["held_by_category"].values()) >= 0
    process = content["process"]
    parts = ("tracked_growth_bytes", "temporaries_bytes", "heap_free_bytes", "untracked_bytes")
    for key in ("baseline_rss_bytes", "peak_rss_bytes", "growth_bytes", *parts):
        assert isinstance(process[key], int) and process[key] >= 0
    assert sum(process[key] for key in parts) >= process["growth_bytes"]
    for name in ("nvme_read", "nvme_write", "host_to_device", "device_to_host"):
        assert isinstance(content["traffic"][f"{name}_bytes_per_step"], int)
        assert set(content["speeds"][name]) == {"achieved_bytes_per_s", "measured_bytes_per_s"}
    for each in content["steps"]:
        assert isinstance(each["seconds"], float) and isinstance(each["stalls"], dict)
    step = content["step"]
    assert set(step["lanes"]) == set(LANES)
    for spans in step["lanes"].values():
        for began, ended, name, nbytes in spans:
            assert began <= ended and isinstance(name, str) and isinstance(nbytes, int)
    for series in step["memory"].values():
        assert all(isinstance(at, NUMBER) and set(held) == set(CATEGORIES) for at, held in series)
    for each in content["model"]["advice"]:
        assert each["times_as_fast"] > 1 and each["change"]


def test_a_run_without_a_step_has_a_report_too(tmp_path: Path, nvme: Path) -> None:
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu") as run:
        report = run.report()
    assert report.dict()["step"] == {} and "No step" in report.table()
    report.save(tmp_path / "report.html")
    report.trace(tmp_path / "trace.json")


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.titles: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)


def test_the_page_is_one_file_that_asks_for_nothing(report: fuyou.Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    page.close()
    assert not page.open
    assert page.links == ["data:,"] and "<script" not in text and "url(http" not in text and "@import" not in text
    assert len(text) < 300_000
    assert report.dict()["bound"]["sentence"] in "".join(page.words)
    for title in (
        "Memory at its peak",
        "Memory through that step",
        "Waits",
        "Predicted and actual",
        "Drives",
        "Largest tensors",
    ):
        assert title in page.titles


def test_what_a_name_holds_is_no_markup(report: fuyou.Report, tmp_path: Path) -> None:
    content = json.loads(json.dumps(report.dict()))
    content["largest_tensors"][0]["name"] = content["notes"] = ["<script>alert(1)</script>"]
    content["largest_tensors"][0]["name"] = "<script>alert(1)</script>"
    fuyou.Report(content).save(tmp_path / "report.html")
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_the_trace_is_of_named_lanes_whose_spans_do_not_overlap(report: fuyou.Report, tmp_path: Path) -> None:
    report.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {
        each["tid"]: each["args"]["name"] for each in events if each["ph"] == "M" and each["name"] == "thread_name"
    }
    spans: dict[int, list[tuple[float, float]]] = {}
    for each in events:
        assert each["ph"] in ("M", "X", "C") and isinstance(each["pid"], int)
        if each["ph"] == "X":
            assert each["ts"] >= 0 and each["dur"] >= 0 and each["tid"] in names
            spans.setdefault(each["tid"], []).append((each["ts"], each["dur"]))
    assert {"compute", "NVMe read", "NVMe write", "Adam", "copies to host", "training waits"} <= set(names.values())
    for its in spans.values():
        its.sort()
        for (began, took), (following, _) in zip(its, its[1:], strict=False):
            assert began + took <= following + 1e-2  # microseconds, rounded
    step = report.dict()["step"]
    total = sum(len(each) for each in step["lanes"].values()) + len(step["phases"])
    assert sum(len(each) for each in spans.values()) == total


def test_other_endings_are_refused(report: fuyou.Report, tmp_path: Path) -> None:
    with pytest.raises(fuyou.ConfigError, match=r"\.json or \.html"):
        report.save(tmp_path / "report.pdf")


def test_the_command_prints_and_compares(
    report: fuyou.Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fuyou.cli import main

    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        report.save(tmp_path / name / "report.json")
    assert main(["report", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert report.dict()["bound"]["sentence"] in said
    assert (tmp_path / "one" / "report.html").exists() and (tmp_path / "one" / "trace.json").exists()
    assert main(["report", str(tmp_path / "one"), "--compare", str(tmp_path / "other")]) == 0
    assert "1.00" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"version": 0}'])
def test_a_folder_without_a_report_is_told(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    from fuyou.cli import main

    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert "report" in capsys.readouterr().err


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_any_content_are_shown_or_told(report: fuyou.Report, place: Path, count: int) -> None:
    """Of a run, of the one that it is compared with, and its metrics."""
    good = json.loads(json.dumps(report.dict()))
    step = good["step"]
    step["lanes"] = {lane: spans[:3] for lane, spans in step["lanes"].items()}
    step["memory"] = {tier: series[:3] for tier, series in step["memory"].items()}
    other = place / "other"
    other.mkdir()
    line = {"step": 1, "loss": 2.5, "tokens": 32, "seconds": 0.5}

    def check(given: tuple[bytes, bytes, bool]) -> None:
        content, metrics, beside = given
        for folder, text in ((place, content), (other, json.dumps(good).encode())):
            (folder / "report.json").write_bytes(text)
        (place / "metrics.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + metrics)
        with contextlib.redirect_stdout(io.StringIO()):
            for run, before in ((place, other if beside else None), (other, place)):
                report_run(run, before, False)

    def encoded(document: Any) -> st.SearchStrategy[bytes]:
        return changed(document).map(lambda value: json.dumps(value).encode()) | spoilt(json.dumps(document).encode())

    fuzz(check, st.tuples(encoded(good), encoded(line), st.booleans()), count)


def test_a_job_writes_its_page_and_says_how_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fuyou.cli import main

    config = write_job(make_inputs(tmp_path), tmp_path, **SETTINGS, device="cpu", ram="2MiB", gpu="128MiB")
    assert main(["train", str(config)]) == 0
    captured = capsys.readouterr()
    lines = [
        line for line in captured.err.splitlines() if line.startswith("step ") and "loss" in line and " of 5" in line
    ]
    assert len(lines) == 5  # standard error is no terminal here
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    for line, loss in zip(lines, losses, strict=True):
        assert f"loss {loss:.3f}" in line and "tokens/s" in line and "device" in line and "full" in line
    assert "busy" in lines[-1]
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert "Training" in page.titles and str(tmp_path / "out" / "report.html") in captured.out
    check_schema(json.loads((tmp_path / "out" / "report.json").read_text()))
