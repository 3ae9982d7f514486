"""A short measurement of a drive through an engine: which requests it likes, and how fast it is with them."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fuyou.core.errors import StorageIOError
from fuyou.core.ticket import Ticket
from fuyou.tiers.io.engine import Engine
from fuyou.tiers.io.files import File
from fuyou.tiers.io.tuning import MIB, Tuning, default_tuning

Mode = Literal["read", "write", "mixed"]

OPERATION_BYTES = 16 * MIB  # about a chunk of the optimizer stream
MEMORY_BYTES = 256 * MIB  # at most: twice the most that any candidate has under way
LEAST_MEMORY_BYTES = 4 * OPERATION_BYTES
SCRATCH_BYTES = 512 * MIB
PROBE_S = 0.2
BRIEF_S = 1.0  # of reads, and of reads and writes together, in a brief measurement
BRIEF_MIXED_BYTES = 768 * MIB  # of which half are written: with the scratch files less than a GiB
FIRST_BYTES = 4 * MIB  # written to learn how slow a drive is
SLOWEST_BYTES_PER_S = 6e6  # below this a measurement takes longer than anybody waits
ROUNDS = 2  # each candidate's turns are apart in time: a slow moment of the machine does not hit one alone
GOOD_SHARE = 0.95  # of the best: within this, what costs less CPU and less memory in flight wins

CANDIDATES = tuple((piece * MIB, depth) for piece, depth in ((1, 32), (1, 64), (4, 16), (4, 32), (16, 8)))
THREAD_CANDIDATES = tuple((piece * MIB, depth) for piece, depth in ((1, 4), (1, 8), (1, 16), (4, 8), (16, 4)))
BURSTS = (0, 64 * MIB, 256 * MIB)


def measure(open_engine: Callable[[Tuning], Engine], backend: str, folder: str, address: int, nbytes: int) -> Tuning:
    """The Tuning that does best for engines of `open_engine` in `folder`, with its speeds; some seconds.

    Reads and writes a scratch file, which has no name while it is used, in [address, address + nbytes): memory of the
    kind that the run will use, at least LEAST_MEMORY_BYTES of it, whose content is lost. StorageIOError where the drive
    fails or has no room for the scratch file.
    """
    nbytes = min(nbytes, MEMORY_BYTES)
    burst = default_tuning(backend).burst_bytes
    pairs = THREAD_CANDIDATES if backend == "threads" else CANDIDATES
    candidates = [Tuning(piece, depth, burst) for piece, depth in pairs]
    with _scratch(folder) as path:

        def speeds(tunings: Sequence[Tuning], modes: Sequence[Mode]) -> list[dict[Mode, float]]:
            """The best that each of `tunings` reached in each of `modes`, in bytes a second."""
            best: list[dict[Mode, float]] = [dict.fromkeys(modes, 0.0) for _ in tunings]
            for turn in range(ROUNDS * len(tunings)):
                index = turn % len(tunings)
                with open_engine(tunings[index]) as engine:
                    engine.register(address, nbytes)
                    file = engine.open(path)
                    for mode in modes:
                        speed = throughput(engine, file, mode, address, nbytes, PROBE_S)
                        best[index][mode] = max(best[index][mode], speed)
            return best

        with open_engine(candidates[0]) as engine:  # every block is written before any is measured
            throughput(engine, engine.open(path), "write", address, nbytes, 0.0, least_bytes=SCRATCH_BYTES)
        found = speeds(candidates, ("write", "read"))
        chosen = _choose(candidates, found)
        bursts = [replace(candidates[chosen], burst_bytes=each) for each in BURSTS]
        mixed = [each["mixed"] for each in speeds(bursts, ("mixed",))]
    best = mixed.index(max(mixed))
    return replace(
        bursts[best],
        read_bytes_per_s=found[chosen]["read"],
        write_bytes_per_s=found[chosen]["write"],
        mixed_bytes_per_s=mixed[best],
    )


def _choose(candidates: Sequence[Tuning], found: Sequence[dict[Mode, float]]) -> int:
    """The largest pieces, then the fewest bytes under way, of those nearly as fast as the fastest both ways."""
    speeds = [1 / (1 / each["read"] + 1 / each["write"]) for each in found]  # of reading a byte and writing one
    good = [index for index, speed in enumerate(speeds) if speed >= GOOD_SHARE * max(speeds)]
    return max(good, key=lambda index: (candidates[index].piece_bytes, -candidates[index].queue_depth))


@dataclass(frozen=True)
class Speeds:
    """Of one drive, in bytes a second; `mixed` is reads and writes together, half of each. `written_bytes`: to learn them."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_bytes_per_s: float
    written_bytes: int

    def taking_turns(self) -> tuple[float, float]:
        """See `taking_turns`."""
        return taking_turns(self.read_bytes_per_s, self.write_bytes_per_s, self.mixed_bytes_per_s)


def taking_turns(read: float, write: float, mixed: float) -> tuple[float, float]:
    """Bytes a second of reads, and of writes, such that x bytes read and y written at once take x / reads + y / writes."""
    share = mixed * (1 / read + 1 / write) / 2  # of half a byte of each, one after the other
    return read * share, write * share


def measure_briefly(engine: Engine, folder: str, address: int, nbytes: int, room_bytes: int) -> Speeds:
    """How fast the drive of `folder` is with the requests of `engine`, as it is tuned; three or four seconds.

    Writes less than 1 GiB, and on a slow drive what it takes in two seconds, to scratch files without a name of at most
    `room_bytes`, from [address, address + nbytes), whose content is lost. StorageIOError where the drive fails or has no
    room for 64 MiB, or writes less than 6 MB/s, DeadlineError where it does not answer.
    """
    with _scratch(folder, OPERATION_BYTES) as path:
        first = _in_file(engine, path, "write", address, FIRST_BYTES, 0.0, FIRST_BYTES, FIRST_BYTES)
    if first < SLOWEST_BYTES_PER_S:
        raise StorageIOError(
            errno.ETIMEDOUT, f"the drive of {folder} takes {first / 1e6:.2g} MB/s, too little to measure"
        )
    in_a_second = max(OPERATION_BYTES, int(first) // OPERATION_BYTES * OPERATION_BYTES)
    scratch_bytes = min(max(2 * in_a_second, LEAST_MEMORY_BYTES), SCRATCH_BYTES)
    scratch_bytes = min(scratch_bytes, max(room_bytes, LEAST_MEMORY_BYTES) // OPERATION_BYTES * OPERATION_BYTES)
    nbytes = min(nbytes, in_a_second, scratch_bytes)  # under way at most: what a second moves
    with _scratch(folder, scratch_bytes) as path:  # all of it is written before any is read
        write = _in_file(engine, path, "write", address, nbytes, 0.0, scratch_bytes)
        read = _in_file(engine, path, "read", address, nbytes, BRIEF_S)
        most = BRIEF_MIXED_BYTES
        mixed = _in_file(engine, path, "mixed", address, nbytes, BRIEF_S, most_bytes=most)
    return Speeds(read, write, mixed, OPERATION_BYTES + scratch_bytes + most // 2)


def _in_file(
    engine: Engine, path: str, mode: Mode, address: int, nbytes: int, seconds: float, least_bytes: int = 0,
    operation_bytes: int = OPERATION_BYTES, most_bytes: int | None = None,
) -> float:  # fmt: skip
    """`throughput`, in a file that is opened for it."""
    file = engine.open(path)
    try:
        return throughput(
            engine, file, mode, address, nbytes, seconds,
            operation_bytes=operation_bytes, least_bytes=least_bytes, most_bytes=most_bytes,
        )  # fmt: skip
    finally:
        engine.close_file(file)


@contextlib.contextmanager
def _scratch(folder: str, nbytes: int = SCRATCH_BYTES) -> Iterator[str]:
    """A path to `nbytes` of file in `folder`, which have no name there: whatever becomes of us, they go."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, nbytes)
            yield f"/proc/self/fd/{file.fileno()}"
    except StorageIOError:
        raise
    except OSError as error:
        code = error.errno or errno.EIO
        raise StorageIOError(code, f"cannot measure the drive of {folder}: {os.strerror(code)}") from error


def throughput(
    engine: Engine,
    file: File,
    mode: Mode,
    address: int,
    nbytes: int,
    seconds: float,
    *,
    operation_bytes: int = OPERATION_BYTES,
    least_bytes: int = 0,
    most_bytes: int | None = None,
) -> float:
    """Bytes a second of `mode` over `file`, with as many operations under way as [address, address + nbytes) holds.

    Starts operations for `seconds`, and until `least_bytes` have been started, and none beyond `most_bytes`; what is under
    way then is waited for and counted. Reads run through the file from its start, writes from its middle, round and round.
    """
    places = file.size_bytes // operation_bytes
    position = {"read": 0, "write": places // 2}
    free = [address + index * operation_bytes for index in range(nbytes // operation_bytes)]
    under_way: dict[str, deque[tuple[int, Ticket]]] = {"read": deque(), "write": deque()}  # each ends in its order
    started = 0
    began = time.perf_counter()
    while True:
        while (
            free
            and (time.perf_counter() - began < seconds or started * operation_bytes < least_bytes)
            and (most_bytes is None or (started + 1) * operation_bytes <= most_bytes)
        ):
            kind = ("read", "write")[started % 2] if mode == "mixed" else mode
            start = engine.read if kind == "read" else engine.write
            memory = free.pop()
            ticket = start(file, position[kind] % places * operation_bytes, memory, operation_bytes)
            under_way[kind].append((memory, ticket))
            position[kind] += 1
            started += 1
        waiting = [line for line in under_way.values() if line]
        if not waiting:
            return started * operation_bytes / (time.perf_counter() - began)
        max(waiting, key=len)[0][1].wait()  # the longer line's: the other's turn may be over already
        for line in waiting:
            while line and line[0][1].done():
                memory, ticket = line.popleft()
                ticket.wait()  # raises what went wrong
                free.append(memory)
