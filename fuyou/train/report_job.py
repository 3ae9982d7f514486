"""`fuyou report RUN`: a run's report.json, or what it left when memory ran out, as table, page and trace."""

from __future__ import annotations

import contextlib
import json
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuyou.core.errors import ConfigError, FuyouError
from fuyou.report import Report

NAMES = ("report", "post-mortem")  # .json, in a run's folder
VERSION = 1


def report_run(run: Path, other: Path | None, show: bool) -> None:
    """Print the table, or with `other` the figures of both; write page and trace into `run`; ConfigError for a folder without
    a report."""
    report, name = read_report(run)
    page, trace = run / f"{name}.html", run / "trace.json"
    with told_as_damaged(run / f"{name}.json"):
        if other is not None:
            before, its_name = read_report(other)
            with told_as_damaged(other / f"{its_name}.json"):
                before.table()
            print(report.compared(before, (str(run), str(other))))
        else:
            print(report.table())
        report.save(page)
        report.trace(trace)
    print(f"\npage           {page}\ntrace          {trace} (ui.perfetto.dev opens it)")
    if show:
        webbrowser.open(page.absolute().as_uri())


@contextlib.contextmanager
def told_as_damaged(path: Path) -> Iterator[None]:
    """Whatever a report that is not as fuyou wrote it makes its readers raise is a ConfigError that names the file."""
    try:
        yield
    except FuyouError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}, or metrics.jsonl beside it, is not as fuyou wrote it ({type(error).__name__}: {error}): run the job anew."
        ) from error


def read_report(run: Path) -> tuple[Report, str]:
    """(the report in a run's folder, the name of its file without the ending)."""
    for name in NAMES:
        path = run / f"{name}.json"
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as a report: {error}.") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            raise ConfigError(f"{path} is of version {version} and this fuyou reads {VERSION}: run the job anew.")
        return Report(content, read_metrics(run)), name
    raise ConfigError(
        f"{run} holds no report.json: name the output folder of a `fuyou train` that is complete, or that ran out of memory."
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, what cannot be read left out."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                values = json.loads(line)
                if isinstance(values, dict):
                    lines.append(values)
    return lines
