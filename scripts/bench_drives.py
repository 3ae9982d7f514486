"""Whether a store on several drives is as fast as its drives together, on drives of known speed.

    python scripts/bench_drives.py [--folder DIR] [--rates 50 100] [--json FILE]        (as root)

Makes one ext4 on a loop device for each rate (MB/s), limits the device to that rate each way with the block I/O
controller of control groups v1, and measures each drive through its engine. Then passes over the same extents read and
write them through fuyou's store: on each drive alone, on all of them with equal shares, and on all of them in proportion
to the measured speed. The rounds are interleaved, medians are compared. Predicted: the sum of the drives alone in
proportion, the slowest times their number with equal shares.

The limits are far below what the disk under the loop devices does, so it is the striping that is measured: that each drive
has its own queue, its part of every extent, and does not wait for the others. It proves nothing about real drives that
share a bus, a controller or a core.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fuyou.core.ledger import Ledger
from fuyou.tiers.host import Arena
from fuyou.tiers.io import Engine, open_engine
from fuyou.tiers.io.measure import throughput
from fuyou.tiers.store import Extent, Store

MB, MIB = 10**6, 1 << 20
EXTENT_BYTES, EXTENTS = 16 * MIB, 4
MEMORY_BYTES = EXTENT_BYTES * EXTENTS  # all extents are under way at a time
BLKIO = Path("/sys/fs/cgroup/blkio")
ROUNDS = 3


# --- drives of known speed ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, name: str) -> Iterator[Path]:
    image, place = folder / f"{name}.image", folder / name
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MEMORY_BYTES)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@contextlib.contextmanager
def limited(rates: dict[Path, int]) -> Iterator[None]:
    """This process gets no more than `rates` bytes a second, each way, from the devices under those mounts."""
    group = BLKIO / f"fuyou-bench-{os.getpid()}"
    group.mkdir()
    try:
        for place, rate in rates.items():
            device = os.stat(place).st_dev
            for way in ("read", "write"):
                line = f"{os.major(device)}:{os.minor(device)} {rate}"
                (group / f"blkio.throttle.{way}_bps_device").write_text(line)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


# --- what is measured ---------------------------------------------------------------------------------------------


class Case:
    """A store on some of the drives, with extents that were all written before."""

    def __init__(
        self, name: str, folders: Sequence[Path], speeds: Sequence[float], arena: Arena, ledger: Ledger
    ) -> None:
        self.name = name
        self._address = arena.address
        self._store = Store([str(folder) for folder in folders], ledger)
        speed_of = dict(zip(map(str, folders), speeds, strict=True))

        def open_drive(folder: str) -> tuple[Engine, float]:
            return open_engine(), speed_of[folder]

        self._store.start(open_drive)
        self._store.register(arena.address, arena.nbytes)
        self._extents = [self._store.place(EXTENT_BYTES, "optimizer", 1) for _ in range(EXTENTS)]
        self._store.open()
        self.shares = [drive.nbytes / (EXTENT_BYTES * EXTENTS) for drive in self._store.drives]
        self.speeds: dict[str, list[float]] = {"write": [], "read": []}
        self._pass("write")

    def _pass(self, kind: str) -> float:
        """Bytes a second of all extents, under way together."""
        began = time.perf_counter()
        start = Extent.write if kind == "write" else Extent.read
        tickets = [start(each, self._address + i * EXTENT_BYTES, None) for i, each in enumerate(self._extents)]
        for ticket in tickets:
            ticket.wait()
        return EXTENTS * EXTENT_BYTES / (time.perf_counter() - began)

    def round(self) -> None:
        for kind, speeds in self.speeds.items():
            speeds.append(self._pass(kind))

    def median(self, kind: str) -> float:
        return statistics.median(self.speeds[kind])

    def close(self) -> None:
        self._store.close()


def measured(place: Path, arena: Arena) -> float:
    """Bytes a second of reads and writes mixed, through an engine: what `fuyou.wrap` divides the extents by."""
    with open_engine() as engine:
        engine.register(arena.address, arena.nbytes)
        file = engine.open(place / "scratch")
        os.posix_fallocate(file.fd, 0, MEMORY_BYTES)
        speed = throughput(engine, file, "mixed", arena.address, MEMORY_BYTES, 2.0)
        engine.close_file(file)
    (place / "scratch").unlink()
    return speed


def bench(folder: Path, rates: Sequence[int]) -> dict[str, object]:
    ledger = Ledger({"device": 0, "host": MEMORY_BYTES, "nvme": 1 << 40})
    arena = Arena(MEMORY_BYTES, ledger)
    arena.bytes.fill_(7)
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(mounted(folder, f"drive-{index}")) for index in range(len(rates))]
        stack.callback(arena.close)
        stack.enter_context(limited({place: rate * MB for place, rate in zip(places, rates, strict=True)}))
        speeds = [measured(place, arena) for place in places]
        subfolders = {name: [place / name for place in places] for name in ("alone", "equal", "striped")}
        for each in subfolders.values():
            for subfolder in each:
                subfolder.mkdir()
        alone = [
            Case(f"drive {index} alone", [subfolders["alone"][index]], [1.0], arena, ledger)
            for index in range(len(rates))
        ]
        equal = Case("all, equal shares", subfolders["equal"], [0.0] * len(rates), arena, ledger)
        striped = Case("all, by measured speed", subfolders["striped"], speeds, arena, ledger)
        cases = [*alone, equal, striped]
        for case in cases:
            stack.callback(case.close)
        for _ in range(ROUNDS):
            for case in cases:
                case.round()
        results: dict[str, object] = {
            "machine": f"{os.cpu_count()} cores, Linux {platform.release()}",
            "rates_mb_per_s": list(rates),
            "measured_mixed_mb_per_s": [round(speed / MB, 1) for speed in speeds],
            "shares": [round(share, 4) for share in striped.shares],
            "mb_per_s": {case.name: {kind: round(case.median(kind) / MB, 1) for kind in case.speeds} for case in cases},
        }
        for kind in ("read", "write"):
            each = [case.median(kind) for case in alone]
            results[f"{kind}_together_over_sum_alone"] = round(striped.median(kind) / sum(each), 3)
            results[f"{kind}_equal_over_slowest_times_drives"] = round(equal.median(kind) / (min(each) * len(each)), 3)
        return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="/var/tmp", help="on a disk that is faster than the rates together")
    parser.add_argument("--rates", type=int, nargs="+", default=[50, 100], help="MB/s, one a drive")
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    missing = [] if os.geteuid() == 0 else ["root (it mounts file systems)"]
    if not (BLKIO / "blkio.throttle.read_bps_device").exists():
        missing.append(f"the blkio controller of control groups v1 in {BLKIO}")
    if missing:
        print(f"bench_drives.py needs {' and '.join(missing)}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="fuyou-drives-", dir=arguments.folder) as folder:
        results = bench(Path(folder), arguments.rates)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
