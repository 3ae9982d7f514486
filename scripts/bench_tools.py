"""What the benches share: the machine's description, memory, timed turns of steps, and what the drive can do."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

MIB = 1 << 20
GAUGE_ARENA_BYTES = 256 * MIB
GAUGE_FILE_BYTES = 2048 * MIB
OPERATION_BYTES = 16 * MIB  # a chunk's moments, weights or gradient are 4 to 32 MiB
GAUGE_S = 1.5
BURST_OPERATIONS = 4  # of a drive that is kept busy, between two looks at the clock


# --- the machine ------------------------------------------------------------------------------------------------------


def machine(folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """What a reader needs to judge the numbers; names of hardware and versions only. `folder`: whose drive is described."""
    import psutil

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    found: dict[str, Any] = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": None,
    }
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge_pages.exists():
        found["transparent_huge_pages"] = huge_pages.read_text().strip()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda}
        found["driver"] = _nvidia_driver()
    if folder is not None:
        found |= _mount(os.path.realpath(folder))
    return found


def _mount(folder: str) -> dict[str, str]:
    """The file system and device of the longest mount point above `folder`; later mounts cover earlier ones."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [each for each in mounts if os.path.commonpath((each[1], folder)) == each[1]]
    device, _, kind, *_ = max(reversed(above), key=lambda each: len(each[1]))
    return {"file_system": kind, "device": os.path.basename(device)}


def _nvidia_driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def write_json(path: str | None, described: dict[str, Any], options: Any, **results: Any) -> None:
    """Write machine, options and results to `path`, where there is one."""
    if path:
        left_out = {"json", "folder", "nvme", "machine", "deepspeed_python"}
        chosen = {key: value for key, value in vars(options).items() if key not in left_out}
        content = {"machine": described, "options": chosen, **results}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


# --- memory -----------------------------------------------------------------------------------------------------------


def rss_bytes() -> int:
    return _status_bytes("VmRSS")


def peak_rss_bytes() -> int:
    """The highest resident memory since the process began, or since `reset_peak_rss`."""
    return _status_bytes("VmHWM")


def reset_peak_rss() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """`steps` steps in a row: their seconds together, the bytes that the drives moved meanwhile, and each one's loss."""

    steps: int
    seconds: float
    read_bytes: int = 0
    write_bytes: int = 0
    losses: tuple[float, ...] = ()

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


def drive_bytes(run: Any) -> tuple[int, int]:
    """(read, written) since the run began."""
    drives = run.report().dict()["drives"]
    return sum(each["read_bytes"] for each in drives), sum(each["write_bytes"] for each in drives)


def timed_turn(step: Callable[[], float], steps: int, run: Any = None, warmup: int = 1) -> Turn:
    """`warmup` steps, then `steps` timed ones, from the end of a step to the end of a step.

    What a step leaves under way (its updates, under the next forward) is under way at both ends of the time measured, so
    this is what a step costs in the middle of a training run. It is waited for after the clock has stopped.
    """
    losses = [step() for _ in range(warmup)]
    moved = drive_bytes(run) if run is not None else (0, 0)
    began = time.perf_counter()
    losses += [step() for _ in range(steps)]
    seconds = time.perf_counter() - began
    now = drive_bytes(run) if run is not None else (0, 0)
    if run is not None:
        run.settle()
    return Turn(steps, seconds, now[0] - moved[0], now[1] - moved[1], tuple(losses))


def weights_hash(model: nn.Module) -> str:
    """Of all parameters' values in order, read one at a time."""
    digest = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            digest.update(parameter.detach().clone().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- the drive --------------------------------------------------------------------------------------------------------


class DriveGauge:
    """fuyou's engine on a file of its own in `folder`, tuned as a run there would be, in memory that a run would have.

    It says what the drive does now for a mix of reads and writes: as many operations under way as 256 MiB hold, in the
    mix's proportion, and nothing else to do.
    """

    def __init__(self, folder: str | os.PathLike[str], file_bytes: int = GAUGE_FILE_BYTES) -> None:
        from fuyou.core.ledger import Ledger
        from fuyou.tiers.host import Arena
        from fuyou.tiers.io import open_for_drive

        self._folder = os.fspath(folder)
        self._arena = Arena(GAUGE_ARENA_BYTES, Ledger({"host": GAUGE_ARENA_BYTES, "device": 0, "nvme": 0}))
        self._arena.bytes.copy_(torch.randint(0, 256, (GAUGE_ARENA_BYTES,), dtype=torch.uint8))
        memory = self._arena.address, self._arena.nbytes
        self._engine = open_for_drive("auto", self._folder, GAUGE_FILE_BYTES, *memory)
        self._engine.register(*memory)
        self.tuning = self._engine.tuning
        self._scratch = tempfile.TemporaryFile(
            dir=folder, buffering=0
        )  # it has no name: whatever becomes of us, it goes
        os.posix_fallocate(self._scratch.fileno(), 0, file_bytes)
        self._file = self._engine.open(f"/proc/self/fd/{self._scratch.fileno()}")
        self._places = file_bytes // OPERATION_BYTES
        self._positions = {True: 0, False: self._places // 2}
        self._move(0.0, 0.0, least_operations=self._places)  # every block is written before any is measured

    def share_tuning(self, folder: str | os.PathLike[str]) -> None:
        """A run in `folder` (on the same drive) takes this tuning and measures nothing."""
        from fuyou.tiers.io.tuning import remember

        if self.tuning is not None:
            remember(os.fspath(folder), self._engine.name, self.tuning)

    def bytes_per_s(self, read_share: float, seconds: float = GAUGE_S) -> float:
        """Of a mix in which `read_share` of the bytes are read."""
        return self._move(read_share, seconds)

    def _move(self, read_share: float, seconds: float, least_operations: int = 0) -> float:
        """Starts for `seconds`, and until `least_operations` have been started; what is under way then is counted too."""
        free = [self._arena.address + at for at in range(0, self._arena.nbytes, OPERATION_BYTES)]
        under_way: dict[bool, deque[tuple[int, Any]]] = {True: deque(), False: deque()}  # reads, writes: end in order
        started, owed, began = 0, 0.0, time.perf_counter()
        while True:
            while free and (time.perf_counter() - began < seconds or started < least_operations):
                owed += read_share
                is_read = owed >= 1.0
                owed -= is_read
                start = self._engine.read if is_read else self._engine.write
                place = self._positions[is_read] % self._places
                self._positions[is_read] += 1
                memory = free.pop()
                ticket = start(self._file, place * OPERATION_BYTES, memory, OPERATION_BYTES)
                under_way[is_read].append((memory, ticket))
                started += 1
            waiting = [line for line in under_way.values() if line]
            if not waiting:
                return started * OPERATION_BYTES / (time.perf_counter() - began)
            max(waiting, key=len)[0][1].wait()  # the longer line's: the other kind's turn may be over already
            for line in waiting:
                while line and line[0][1].done():
                    memory, ticket = line.popleft()
                    ticket.wait()  # raises what went wrong
                    free.append(memory)

    def move(self, read_share: float, operations: int) -> int:
        """Bytes moved by so many operations, at full speed."""
        self._move(read_share, 0.0, least_operations=operations)
        return operations * OPERATION_BYTES

    def close(self) -> None:
        self._engine.close()
        self._arena.close()
        self._scratch.close()


class BusyDrive:
    """A process of its own that moves bytes at a given pace, with next to no processor time: what a drive's own work costs
    whoever computes beside it. That is memory bandwidth, and on a virtual drive the host's processors.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_move_at_pace, args=(os.fspath(folder), theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def start(self, read_share: float, bytes_per_s: float) -> None:
        self._pipe.send((read_share, bytes_per_s))

    def stop(self) -> float:
        """Bytes a second since `start`."""
        self._pipe.send(None)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def _move_at_pace(folder: str, pipe: Connection) -> None:
    gauge = DriveGauge(folder)
    try:
        pipe.send("ready")
        while True:
            read_share, bytes_per_s = pipe.recv()
            began, moved, pause_s = time.perf_counter(), 0, 0.0
            while not pipe.poll(pause_s):
                moved += gauge.move(read_share, BURST_OPERATIONS)
                pause_s = max(0.0, moved / bytes_per_s - (time.perf_counter() - began))
            pipe.recv()
            pipe.send(moved / (time.perf_counter() - began))
    except EOFError:
        gauge.close()
