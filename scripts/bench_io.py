"""GB/s and CPU seconds a GB of fuyou's I/O engine beside fio and DeepSpeed's aio, on one file in one run.

    python scripts/bench_io.py FOLDER [--size 4GiB] [--rounds 5] [--seconds 2] [--json FILE]

The file's blocks are all written before anything is measured. fuyou runs as in training: tuned by its own measurement of
the folder, the arena's memory, operations of 32 MiB (the optimizer state of a chunk). The peers run through a grid (its
cells are printed) for a second each; the best two cells of each peer and mode go on to the rounds, in which all take
turns, so that a slow minute of the machine hits every one of them. Medians of the rounds are compared, against the best
peer. CPU seconds are those of the measuring process and its threads, user and system; fio's are its own count.

fio's buffers are once ordinary memory and, where the system has huge pages to give (vm.nr_hugepages), once huge pages
too: fuyou's arena is on transparent huge pages, which fio has no option for.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_tools import machine

from fuyou.core.ledger import Ledger
from fuyou.core.sizes import parse_bytes
from fuyou.tiers.host import Arena
from fuyou.tiers.io import measure, open_for_drive

MIB = 1 << 20
MODES = ("read", "write", "mixed")
PIECES_MIB = {1: (8, 32, 64), 4: (8, 16, 32), 16: (4, 8, 16)}  # size of a request -> numbers of them under way
OPERATION_BYTES = 32 * MIB
ARENA_BYTES = 256 * MIB
KEPT_CELLS = 2


@dataclass(frozen=True)
class Speed:
    gb_per_s: float
    cpu_s_per_gb: float


@dataclass(frozen=True)
class Cell:
    """One setting of a peer. `engine`: fio's, or "deepspeed"."""

    peer: str
    engine: str
    piece_mib: int
    depth: int
    memory: str = "small pages"

    def __str__(self) -> str:
        return f"{self.peer} {self.engine} {self.piece_mib} MiB x {self.depth}, {self.memory}"


# --- fuyou ------------------------------------------------------------------------------------------------------------


class Fuyou:
    """The engine that a run would open for the folder, in memory that a run would have."""

    def __init__(self, path: str) -> None:
        self._arena = Arena(ARENA_BYTES, Ledger({"host": ARENA_BYTES, "device": 0, "nvme": 0}))
        self._arena.bytes.copy_(torch.randint(0, 256, (ARENA_BYTES,), dtype=torch.uint8))
        memory = self._arena.address, self._arena.nbytes
        self._engine = open_for_drive("auto", os.path.dirname(path), os.path.getsize(path), *memory)
        self.registered = self._engine.register(*memory)
        self._file = self._engine.open(path)
        self.name = f"fuyou {self._engine.name}"
        self.tuning = self._engine.tuning

    def run(self, mode: str, seconds: float) -> Speed:
        return timed(
            lambda: measure.throughput(
                self._engine,
                self._file,
                mode,
                self._arena.address,
                self._arena.nbytes,
                seconds,  # type: ignore[arg-type]
                operation_bytes=OPERATION_BYTES,
            )  # fmt: skip
        )


def timed(action: Callable[[], float]) -> Speed:
    """`action` returns bytes a second of what it moved for as long as it took."""
    began, cpu = time.perf_counter(), cpu_s()
    rate = action()
    moved_gb = rate * (time.perf_counter() - began) / 1e9
    return Speed(rate / 1e9, (cpu_s() - cpu) / moved_gb)


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- the peers --------------------------------------------------------------------------------------------------------


class Fio:
    def __init__(self, path: str) -> None:
        self._path = path
        self.program = shutil.which("fio") or ""
        self.problem = "" if self.program else "fio is not installed (package fio): no comparison with it"
        memories = ["small pages"]
        most_mib = max(piece * depth for piece, depths in PIECES_MIB.items() for depth in depths)
        if free_huge_mib() >= most_mib + 8:
            memories.append("huge pages")
        else:
            self.problem = self.problem or (
                f"fio runs on small pages only: its huge ones need sysctl vm.nr_hugepages={(most_mib + 8) // 2}, and "
                f"{free_huge_mib()} MiB of them are free"
            )
        self.cells = [
            Cell("fio", engine, piece, depth, memory)
            for engine, (piece, depths), memory in itertools.product(
                ("io_uring", "libaio"), PIECES_MIB.items(), memories
            )
            for depth in depths
            if self.program
        ]

    def run(self, cell: Cell, mode: str, seconds: float) -> Speed:
        command = [
            self.program, "--name=bench", f"--filename={self._path}", "--direct=1", f"--ioengine={cell.engine}",
            f"--rw={'rw' if mode == 'mixed' else mode}", f"--bs={cell.piece_mib}m", f"--iodepth={cell.depth}",
            f"--runtime={seconds}", "--time_based", "--scramble_buffers=0", "--output-format=json",
        ]  # fmt: skip
        if cell.engine == "io_uring":
            command += ["--fixedbufs=1", "--registerfiles=1"]
        if cell.memory == "huge pages":
            command += ["--iomem=mmaphuge"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
        moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
        took_s = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
        used_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
        return Speed(moved / took_s / 1e9, used_s / (moved / 1e9))


class DeepSpeed:
    """Its aio_handle with two threads, overlapped events; a call moves 256 MiB of page-locked memory."""

    BUFFER_BYTES = 256 * MIB

    def __init__(self, path: str) -> None:
        self._path = path
        self.cells: list[Cell] = []
        self.problem = ""
        if importlib.util.find_spec("deepspeed") is None:
            self.problem = "DeepSpeed is not installed: no comparison with its aio"
            return
        try:
            from deepspeed.ops.op_builder import AsyncIOBuilder

            self._aio = AsyncIOBuilder().load(verbose=False)
        except Exception as error:
            self.problem = f"DeepSpeed's aio cannot be had: {error}"
            return
        self.cells = [
            Cell("DeepSpeed", "aio", piece, depth, "page-locked")
            for piece, depths in PIECES_MIB.items()
            for depth in depths[1:]
        ]
        keeper = self._aio.aio_handle(MIB, 8, False, True, 1)
        example = torch.empty(0, dtype=torch.uint8)
        self._buffers = [keeper.new_cpu_locked_tensor(self.BUFFER_BYTES, example) for _ in range(2)]
        for buffer in self._buffers:
            buffer.copy_(torch.randint(0, 256, (self.BUFFER_BYTES,), dtype=torch.uint8))
        self._keeper = keeper

    def run(self, cell: Cell, mode: str, seconds: float) -> Speed:
        handles = [self._aio.aio_handle(cell.piece_mib * MIB, cell.depth, False, True, 2) for _ in range(2)]
        places = os.path.getsize(self._path) // self.BUFFER_BYTES

        def move() -> float:
            began, turn = time.perf_counter(), 0
            moved = 0
            while time.perf_counter() - began < seconds:
                at = turn % places * self.BUFFER_BYTES
                across = (turn + places // 2) % places * self.BUFFER_BYTES
                if mode != "write":
                    handles[0].pread(self._buffers[0], self._path, False, True, at)
                    moved += self.BUFFER_BYTES
                if mode != "read":
                    handles[1].pwrite(self._buffers[1], self._path, False, True, across)
                    moved += self.BUFFER_BYTES
                for index in (0, 1):
                    if mode in ("mixed", ("read", "write")[index]):
                        handles[index].wait()
                turn += 1
            return moved / (time.perf_counter() - began)

        return timed(move)


def free_huge_mib() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    size_kib = int(fields.get("Hugepagesize", "0 kB").split()[0])
    return int(fields.get("HugePages_Free", "0")) * size_kib // 1024


# --- the run ----------------------------------------------------------------------------------------------------------


def write_file(path: str, nbytes: int) -> None:
    """Every block written, with bytes that nothing can compress or fold together."""
    block = torch.randint(0, 256, (64 * MIB,), dtype=torch.uint8).numpy()
    with open(path, "wb") as file:
        for number in range(nbytes // len(block)):
            block[::4096] = number % 256  # no two blocks alike
            file.write(memoryview(block))
        os.fsync(file.fileno())


def best_cells(peers: list[Any], mode: str, seconds: float) -> list[tuple[Any, Cell]]:
    """The fastest KEPT_CELLS of each peer and kind of memory."""
    kept: list[tuple[Any, Cell]] = []
    for peer in peers:
        found: dict[str, list[tuple[float, Cell]]] = {}
        for cell in peer.cells:
            found.setdefault(cell.memory, []).append((peer.run(cell, mode, seconds).gb_per_s, cell))
        for speeds in found.values():
            speeds.sort(key=lambda each: -each[0])
            kept += [(peer, cell) for _, cell in speeds[:KEPT_CELLS]]
    return kept


def compare(fuyou: Fuyou, peers: list[Any], mode: str, options: argparse.Namespace) -> dict[str, Any]:
    contenders: list[tuple[str, Callable[[], Speed]]] = [(fuyou.name, lambda: fuyou.run(mode, options.seconds))]
    for peer, cell in best_cells(peers, mode, options.grid_seconds):
        contenders.append((str(cell), lambda peer=peer, cell=cell: peer.run(cell, mode, options.seconds)))
    speeds: dict[str, list[Speed]] = {name: [] for name, _ in contenders}
    for turn in range(options.rounds):
        for name, run in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            speeds[name].append(run())
    medians = {
        name: Speed(
            statistics.median(each.gb_per_s for each in found), statistics.median(each.cpu_s_per_gb for each in found)
        )
        for name, found in speeds.items()
    }
    print(f"\n{mode}")
    for name, median in sorted(medians.items(), key=lambda each: -each[1].gb_per_s):
        turns = " ".join(f"{each.gb_per_s:.2f}" for each in speeds[name])
        print(f"  {name:52s} {median.gb_per_s:6.2f} GB/s {median.cpu_s_per_gb:7.4f} CPU s/GB   ({turns})")
    ours = medians.pop(fuyou.name)
    row: dict[str, Any] = {
        "mode": mode,
        "fuyou": asdict(ours),
        "peers": {name: asdict(each) for name, each in medians.items()},
        "rounds": {name: [asdict(each) for each in found] for name, found in speeds.items()},
    }
    for label, wanted in (("any peer", ""), ("fio, small pages", "small pages"), ("fio, huge pages", "huge pages")):
        among = {name: each for name, each in medians.items() if name.endswith(wanted)}
        if not among:
            continue
        name = max(among, key=lambda each: among[each].gb_per_s)
        ratio, cpu = ours.gb_per_s / among[name].gb_per_s, ours.cpu_s_per_gb / among[name].cpu_s_per_gb
        row[f"against {label}"] = {"best": name, "speed_ratio": ratio, "cpu_ratio": cpu}
        print(f"  against {label} at its best: {ratio:.2f}x its speed, {cpu:.2f}x its CPU")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="on the drive to be measured; its file is removed afterwards")
    parser.add_argument("--size", default="4GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each turn")
    parser.add_argument("--grid-seconds", type=float, default=1, help="of each cell of the peers' grid")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args()
    path = os.path.join(os.path.realpath(options.folder), "fuyou-bench-io")
    try:
        write_file(path, parse_bytes(options.size, "--size"))
        fuyou = Fuyou(path)
        print(f"{fuyou.name}: {fuyou.tuning}, buffers {'' if fuyou.registered else 'not '}registered")
        peers = [Fio(path), DeepSpeed(path)]
        for peer in peers:
            if peer.problem:
                print(peer.problem)
            if peer.cells:
                print(f"the grid of {peer.cells[0].peer}: {'; '.join(str(cell) for cell in peer.cells)}")
        rows = [compare(fuyou, peers, mode, options) for mode in MODES]
    finally:
        if os.path.exists(path):
            os.unlink(path)
    if options.json:
        described = machine(options.folder) | {"fuyou": {"engine": fuyou.name, **asdict(fuyou.tuning)}}
        Path(options.json).write_text(json.dumps({"machine": described, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
