"""What the fault tests share: small file systems to break, counts of what may leak, one training with two sides."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_io import MIB, PAGE, Memory, open_or_skip, random_pages
from torch import nn

import fuyou

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("io_uring", "threads", "aiofiles")
# One engine by default, for the suite's sake; the others with -m slow.
FIRST = [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
FREEZE, THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW
THROTTLE = Path("/sys/fs/cgroup/blkio")  # control groups of version 1


class Place:
    """A mounted ext4 in an image file. `folder` is its root."""

    def __init__(self, image: Path, device: str, folder: Path) -> None:
        self.image, self.device, self.folder = image, device, folder
        self._frozen = False

    def freeze(self) -> None:
        """Every write waits from now on: the drive that stopped answering."""
        self._control(FREEZE)
        self._frozen = True

    def thaw(self) -> None:
        if self._frozen:
            self._control(THAW)
            self._frozen = False

    def _control(self, request: int) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, request, 0)
        finally:
            os.close(descriptor)

    def fill(self) -> Path:
        """A file that takes all the room there is."""
        filler = self.folder / "filler"
        with open(filler, "wb", buffering=0) as made:
            for size in (MIB, PAGE):
                with contextlib.suppress(OSError):
                    while made.write(bytes(size)) == size:
                        pass
        return filler


@contextlib.contextmanager
def mounted(folder: Path, nbytes: int, *, options: str = "", make: tuple[str, ...] = ()) -> Iterator[Place]:
    """An ext4 of its own on a loop device, unmounted whatever happens. Skips, saying why, where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("a file system can be mounted and broken by root only")
    for tool in ("mkfs.ext4", "losetup", "mount", "umount"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} here, which this test needs for a file system of its own")
    image, root = folder / "image", folder / "mounted"
    root.mkdir(parents=True)
    with open(image, "wb") as made:
        made.truncate(nbytes)
    call("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0", *make, str(image))
    result = subprocess.run(["losetup", "-f", "--show", str(image)], capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"no loop device to be had here: {result.stderr.strip()}")
    device = result.stdout.strip()
    try:
        result = subprocess.run(
            ["mount", "-t", "ext4", *(["-o", options] if options else []), device, str(root)],
            capture_output=True, text=True,
        )  # fmt: skip
        if result.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {result.stderr.strip()}")
        place = Place(image, device, root)
        try:
            yield place
        finally:
            place.thaw()
            gc.collect()  # engines of a failed test let go of their files
            call("umount", "-l", str(root))
    finally:
        subprocess.run(["losetup", "-d", device], capture_output=True)


def call(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"


@contextlib.contextmanager
def reads_stopped(folder: Path) -> Iterator[Any]:
    """Reads of this process from the drive under `folder` take for ever (a byte a second) until the given call."""
    if not (THROTTLE / "blkio.throttle.read_bps_device").exists() or os.geteuid() != 0:
        pytest.skip("no blkio controller (control groups of version 1) to be written here: reads cannot be stopped")
    number = os.stat(folder).st_dev
    group = THROTTLE / f"fuyou-test-{os.getpid()}"
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":blkio:" in line)
    home = THROTTLE / own.partition(":blkio:")[2].lstrip("/")

    def limit(rate: int) -> None:
        (group / "blkio.throttle.read_bps_device").write_text(f"{os.major(number)}:{os.minor(number)} {rate}")

    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        limit(1)
        yield lambda: limit(0)
    finally:
        limit(0)
        (home / "cgroup.procs").write_text(str(os.getpid()))
        for _ in range(100):  # the kernel's own io_uring workers move when they next run
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.02)


@contextlib.contextmanager
def nothing_leaks() -> Iterator[None]:
    """Threads and descriptors are those of before."""
    _warm_up()
    before = _held()
    yield
    after = _held()
    for turn in range(500):  # kernel workers of a ring, and daemon threads, take a moment to go
        if after[0] <= before[0] and after[1] <= before[1]:
            return
        time.sleep(0.01)
        if turn % 100 == 0:
            gc.collect()
        after = _held()
    names = sorted(Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task"))
    assert after[0] <= before[0] and after[1] <= before[1], f"{before} -> {after} threads and descriptors: {names}"


@functools.cache
def _warm_up() -> None:
    """Whatever is made once in a process: torch's threads, sockets of asyncio."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a folder in memory will do
            with training.wrap(Path(folder)):
                training.step()


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def run_script(
    script: str, *arguments: str, timeout_s: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A Python script in a process of its own, which prints OK at its end."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"} | options.pop("env", {})
    result = subprocess.run(
        [*options.pop("prefix", []), sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s, **options,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.endswith("OK\n"), result.stdout + result.stderr
    return result


def forked(work: Callable[..., None], *arguments: Any) -> int:
    """The pid of a child that does `work(*arguments)`, and leaves with status 0 when it is through."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return pid


# ---- one training, plainly and wrapped


class Training:
    """A small model, its optimizer and batches: every step's loss, and the weights, are comparable bit by bit."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 8),
        )
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2, fused=True)
        self.steps = 0

    def wrap(
        self,
        nvme: Path,
        io: str = "auto",
        deadline_s: float = 60.0,
        ram: str = "1MiB",
        update: str = "auto",
        resume: bool | None = None,
        verify_reads: bool = False,
    ) -> fuyou.Run:
        """Weights and state live on NVMe, but what `ram` holds beside staging."""
        config = fuyou.Config(io=io, deadline_s=deadline_s, update=update, resume=resume, verify_reads=verify_reads)
        run = fuyou.wrap(self.model, self.optimizer, nvme=nvme, ram=ram, gpu="256MiB", device="cpu", config=config)
        self.optimizer = run.optimizer
        return run

    def backward(self) -> float:
        generator = torch.Generator().manual_seed(self.steps)
        loss = self.model(torch.randn(4, 64, generator=generator)).square().mean()
        loss.backward()
        return loss.item()

    def step(self) -> float:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def weights(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


def plain(steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and weights of plain PyTorch."""
    training = Training()
    return [training.step() for _ in range(steps)], training.weights()


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_empty(run: fuyou.Run) -> None:
    """After close: no lease, no byte in any tier's book."""
    torch.ones(1, requires_grad=True).sum().backward()  # torch keeps a graph whose backward failed until the next one
    gc.collect()
    assert run._tiers.lease_count == 0
    held = {tier: {k: v for k, v in run._ledger._held[tier].items() if v} for tier in ("device", "host", "nvme")}
    assert not any(held.values()), f"still charged after close: {held}"


def without_frames(error: BaseException) -> Any:
    """The error alone: the frames of its traceback hold tensors, which are charged as long as they live."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__
    return error


__all__ = ["FIRST", "KINDS", "MIB", "PAGE", "Memory", "Training", "assert_empty", "call", "forked", "mounted", "nothing_leaks",
           "open_or_skip", "plain", "random_pages", "reads_stopped", "run_script", "same", "without_frames"]  # fmt: skip
