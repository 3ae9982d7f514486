"""The queue under both native engines: order, pieces, short transfers, retries, completion, bursts (tests/native/queue.cpp)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def test_short_transfers_retries_and_order_with_results_made_up(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    program = tmp_path / "queue"
    source = REPOSITORY / "csrc"
    subprocess.run(
        [compiler, "-std=c++17", "-g", "-fsanitize=address,undefined", f"-I{source}", "-pthread",
         str(REPOSITORY / "tests/native/queue.cpp"), str(source / "io_queue.cpp"), "-o", str(program)],
        check=True,
    )  # fmt: skip
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "OK\n", result.stdout + result.stderr
