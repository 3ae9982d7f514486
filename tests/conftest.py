"""Shared by all tests: compute threads, no network, and a folder on a real disk."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of tiny operations sleep while they wait: on a busy machine, spinning takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sides
import torch
from drive_tools import run as run  # a fixture

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def nvme(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk: a tmpfs takes O_DIRECT without enforcing it, and would prove nothing."""
    if _file_system(tmp_path) not in ("tmpfs", "ramfs"):
        folder = tmp_path / "nvme"
        folder.mkdir()
        yield folder
        return
    folder = Path(tempfile.mkdtemp(prefix="fuyou-test-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where there is some: for tests in which nothing is to be learnt of a drive, and much is
    written."""
    if not Path("/dev/shm").is_dir() or shutil.disk_usage("/dev/shm").free < 1 << 30:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="fuyou-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sides.SIDES)
def compare(request: pytest.FixtureRequest, nvme: Path) -> Callable[..., Any]:
    """compare(script, name, prepare): both sides of a training loop, see sides.py."""
    return functools.partial(sides.compare_on, sides.SIDES[request.param], nvme)


def _file_system(path: Path) -> str:
    mounts = [each for each in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else ""


@pytest.fixture
def lent() -> Iterator[Path]:
    """A folder on a disk, whatever /tmp is, that an ordinary user may write to."""
    folder = Path(f"/var/tmp/fuyou-test-{os.getpid()}")
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
