"""A report's sums are true: what is tracked explains what the kernel says the process holds, files, and bytes of the drives."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

JOB = Path(__file__).with_name("sums_job.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fuyou-test-", dir="/var/tmp") as folder:
        done = subprocess.run([sys.executable, str(JOB), folder], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tracked_bytes_explain_the_growth_of_resident_memory(told: dict[str, Any]) -> None:
    rows = 4 * 256
    assert told["activations"] > 6 * 10 * rows * 512 * 4  # of each layer ten tensors as wide as its input, at least
    assert told["tracked"] >= 0.97 * told["growth"], told
    assert told["growth"] >= 0.97 * told["tracked"], told  # and nothing is counted that is not there


def test_the_report_says_what_its_own_growth_is(told: dict[str, Any]) -> None:
    """Over whole steps, where the heap keeps what was freed; memory that somebody else holds is not explained by that."""
    process, others = told["process"], told["process_with_others"]
    assert process["growth_bytes"] > 100e6 and process["heap_free_bytes"] > 0
    assert process["untracked_bytes"] <= 0.03 * process["growth_bytes"], process
    assert others["untracked_bytes"] >= process["untracked_bytes"] + 0.9 * told["others"], others


def test_file_sizes_are_what_the_ledger_holds(told: dict[str, Any]) -> None:
    assert told["data_file"] == told["held_by_drive"]
    assert told["files"] == pytest.approx(told["held_on_nvme"], rel=0.01)


def test_bytes_of_the_drives_are_the_kernels_own(told: dict[str, Any]) -> None:
    if told["system_io"] == [0, 0]:
        pytest.skip("the kernel does not count this process's I/O")
    for mine, system in zip(told["report_io"], told["system_io"], strict=True):
        assert mine == pytest.approx(system, rel=0.03)
