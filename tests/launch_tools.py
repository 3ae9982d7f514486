"""`fuyou launch` as tests start it, and what a script prints of what it was given."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest

GIB = 2**30
OWN = [name for name in os.environ if name.startswith(("FUYOU_", "OMP_", "MKL_"))]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OWN}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # scripts run in another folder

SHOWS = """
    import json, os, sys
    shown = {name: value for name, value in os.environ.items() if name.startswith(("FUYOU_", "OMP_", "MKL_"))}
    print(json.dumps({"argv": sys.argv, "environment": shown, "cores": sorted(os.sched_getaffinity(0))}))
"""


@pytest.fixture
def script(tmp_path):
    def write(text: str, name: str = "script.py") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fuyou", "launch", *arguments]


def launched(
    *arguments: str, env: dict[str, str] | None = None, before: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*before, *command(*arguments)], capture_output=True, text=True, timeout=60, env={**ENVIRONMENT, **(env or {})}
    )


def paragraph(done: subprocess.CompletedProcess, begin: str = "fuyou launch: ") -> str:
    """The last line of standard error, which is the launcher's."""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(begin), done.stderr
    return last
