"""The tiers of one run, opened together and closed together."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch

from fuyou.core.config import Config
from fuyou.core.errors import BudgetError, DeadlineError
from fuyou.core.ledger import Ledger
from fuyou.core.races import Races
from fuyou.core.recorder import KEPT, Recorder
from fuyou.core.sizes import align_up, format_bytes, parse_bytes
from fuyou.plan.planner import Plan
from fuyou.runtime.measure import trim_heap
from fuyou.swap.adam import load_kernels, native_problem
from fuyou.swap.buffers import Buffers
from fuyou.swap.ranges import WriteBehind
from fuyou.swap.unit import text_of
from fuyou.tiers.device import Device
from fuyou.tiers.folders import Rooms, memory_folders, rooms_of
from fuyou.tiers.host import PAGE_BYTES, Arena, Lease
from fuyou.tiers.io import Engine, LateEngine, open_for_drive
from fuyou.tiers.records import Record
from fuyou.tiers.store import Extent, Store

SMALLEST_POOL_BYTES = 1 << 20


class Tiers:
    """Ledger, store with an I/O engine a drive, host arenas, device link and Adam kernels of one run.

    `notes` says in words where something runs in its second-best way. `open_store` comes after the extents are placed.
    `adopt`: the step in the folders that the store goes on from. `races`: what delays and poisons all of them,
    None unless Config(debug_races) asks for it.
    """

    def __init__(
        self,
        plan: Plan,
        folders: list[str],
        nvme_limit: int,
        ram_bytes: int,
        gpu_bytes: int,
        device: torch.device,
        config: Config,
        adopt: Record | None = None,
    ) -> None:
        self.notes: list[str] = []
        self.recorder = Recorder(_entries(plan))
        self.races = None if config.debug_races is None else Races(config.debug_races)
        if self.races is not None:
            self.note(f"debug_races={self.races.seed}: operations are late on purpose, and freed memory is poisoned")
        self._ram_bytes = ram_bytes
        self._pin = device if device.type == "cuda" else None
        self.deadline_s = config.deadline_s
        self.durable = plan.through
        self.state_slots = plan.state_slots
        self.ledger = Ledger(
            {"device": gpu_bytes, "host": ram_bytes, "nvme": nvme_limit},
            allowance={"device": plan.working_bytes},
            recorder=self.recorder,
        )
        self.kernels = load_kernels(threads=config.adam_threads)
        if self.kernels.name == "torch":
            self.note(f"Adam runs through torch: {native_problem()}")
        self.store: Store | None = None
        self._arenas: list[Arena] = []
        self._closers: list[Callable[[], None]] = []  # what `close` calls, last first
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._closers.append(self._close_arenas)  # last of all: memory must outlive the I/O in it
            for text in _folder_notes(folders):
                self.note(text)
                warnings.warn(text, stacklevel=4)  # at the call of wrap
            self._committed_bytes = 0
            # Two, so that what stays never stands in the way of a piece of staging in one piece.
            self.arena = self._open_arena(plan.staging_bytes)
            self.resident = self._open_arena(plan.resident_bytes)
            self.pool = self._open_arena(plan.activations.pool_bytes) if plan.activations.pool_bytes else None
            if folders:
                self.store = Store(folders, self.ledger, durable=self.durable, adopt=adopt, verify=config.verify_reads)
                self.store.record(self.recorder)
                self._closers.append(self.store.close)
                self._start_store(self.store, config, plan.nvme_bytes // len(folders))
            self.writes = WriteBehind(self.arena)
            self.link = Device(
                device, gpu_bytes, deadline_s=config.deadline_s, races=self.races, recorder=self.recorder
            )
            self._closers.append(self.link.close)
            undo.pop_all()

    @property
    def engine(self) -> Engine | None:
        """The first drive's; None without drives."""
        return self.store.drives[0].engine if self.store is not None else None

    def _start_store(self, store: Store, config: Config, share_bytes: int) -> None:
        """Claim the drives, open an engine for each and register the arena with it."""

        def open_drive(folder: str) -> tuple[Engine, float]:
            engine = open_for_drive(
                config.io, folder, share_bytes, self.arena.address, self.arena.nbytes, deadline_s=config.deadline_s
            )
            self.note(engine.note)
            engine.recorder = self.recorder
            if self.races is not None:
                self.races.fill(self.arena.bytes)  # the drive may have been measured in it
                engine = LateEngine(engine, self.races)
            return engine, engine.tuning.mixed_bytes_per_s if engine.tuning else 0.0

        store.start(open_drive)
        refused = store.register(self.arena.address, self.arena.nbytes)
        if self.durable:
            refused += store.register(self.resident.address, self.resident.nbytes)
        if refused and refused[0].engine is not None and refused[0].engine.name == "io_uring":
            self.note(
                f"buffers are not registered with {', '.join(drive.folder for drive in refused)}: "
                f"{refused[0].engine.registration_note}"
            )

    def open_store(self) -> None:
        """Lock the folders and preallocate the extents that have been placed."""
        if self.store is not None:
            self.store.open()

    def home(self, nbytes: int, category: str, slots: int, what: str) -> Lease | Extent:
        """A home for bytes that the plan did not foresee: in host memory that the budget still has, else on the drives.

        BudgetError, saying for `what`, where there is room on neither; StoreError for a full drive.
        """
        size = align_up(nbytes, PAGE_BYTES)
        room = self._ram_bytes - self._committed_bytes
        if size <= room and not (self.durable and category != "gradients"):  # what is committed is on the drives
            return self._open_arena(size).lease(nbytes, category, what)
        if self.store is not None:
            extent = self.store.add(nbytes, category, slots, committed=category != "gradients")
            extent.what = text_of([what], category)
            return extent
        raise BudgetError(
            f"The host budget ram={format_bytes(self._ram_bytes)} is {format_bytes(size - room)} ({size - room} bytes) "
            f"short: the {category} of {what} need {format_bytes(size)}, and there is no nvme folder. No update had begun: "
            "give ram that much more, or an nvme folder.",
            tier="host", needed_bytes=self._committed_bytes + size, given_bytes=self._ram_bytes,
        )  # fmt: skip

    def _open_arena(self, nbytes: int) -> Arena:
        arena = Arena(nbytes, self.ledger, pin=self._pin, deadline_s=self.deadline_s, races=self.races)
        self._arenas.append(arena)
        self.note(arena.note)
        if self.races is None:
            arena.bytes.zero_()  # committed now: memory that is not there is told here, not in the middle of a step
        self._committed_bytes += arena.nbytes
        return arena

    @property
    def committed_bytes(self) -> int:
        """Of host memory, used or not."""
        return self._committed_bytes

    @property
    def lease_count(self) -> int:
        """Of host memory that is not given back yet."""
        return sum(arena.lease_count for arena in self._arenas)

    def buffers(self, nbytes: int, count: int) -> Buffers:
        """Staging of one thread's own."""
        return Buffers(self.arena, nbytes, count, deadline_s=self.deadline_s, races=self.races)

    @property
    def pool_room_bytes(self) -> int:
        """Host memory for activations that there is, or could be beyond the plan's: most of what the budget still has, where
        that is worth anything. The rest is for what is trained later and was frozen so far."""
        if self.pool is not None:
            return self.pool.nbytes
        room = (self._ram_bytes - self._committed_bytes) * 3 // 4 // PAGE_BYTES * PAGE_BYTES
        return room if room >= SMALLEST_POOL_BYTES else 0

    def open_pool(self) -> Arena | None:
        """That memory, committed now."""
        if self.pool is None and self.pool_room_bytes:
            self.pool = self._open_arena(self.pool_room_bytes)
        return self.pool

    def in_flight(self) -> list[str]:
        """One line for each operation of the drives that has not ended."""
        return self.store.in_flight() if self.store is not None else []

    def traffic(self) -> dict[str, int]:
        """Bytes moved since the run began."""
        return {
            "nvme_read_bytes": self.store.read_bytes if self.store else 0,
            "nvme_write_bytes": self.store.write_bytes if self.store else 0,
            "host_to_device_bytes": self.link.host_to_device_bytes,
            "device_to_host_bytes": self.link.device_to_host_bytes,
        }

    def close(self) -> None:
        """Give everything back, whatever of it fails; the first failure is raised. Idempotent, and what was past its
        deadline is tried again by the next call."""
        if not self._closers:
            return
        late: list[Callable[[], None]] = []
        first: BaseException | None = None
        while self._closers:
            close = self._closers.pop()
            try:
                close()
            except BaseException as error:
                first = first or error
                if isinstance(error, DeadlineError):
                    late.append(close)
        self._closers = late[::-1]
        if late and self._close_arenas not in late:
            self._closers.insert(0, self._close_arenas)
        trim_heap()
        if first is not None:
            raise first

    def _close_arenas(self) -> None:
        if self.store is not None and self.store.in_flight():
            return  # its close has said so: memory that a drive may still read or write stays mapped
        while self._arenas:
            self._arenas.pop().close()

    def note(self, text: str) -> None:
        """Say it once, in `notes`."""
        if text and text not in self.notes:  # said once, however many drives have it
            self.notes.append(text)


def _entries(plan: Plan) -> int:
    """Of the recorder's rings: enough for a step. A chunk is 16 bytes an element on the drives at least (4 each of weights,
    gradient and moments), and is read and written 8 times a step at most without accumulation."""
    return max(KEPT, 8 * (plan.nvme_bytes // (16 * plan.chunk_elements)))


def _folder_notes(folders: list[str]) -> list[str]:
    """What is wrong with the folders, though they work."""
    in_memory = [
        f"The nvme folder {folder} is on a {kind}: it holds its bytes in RAM, beside the ram budget and not counted in it. "
        "Give a folder on a drive, or nvme=None and more ram."
        for folder, kind in memory_folders(folders).items()
    ]
    shared = [
        f"The nvme folders {', '.join(together)} are on one file system: they share its room and its speed. Give one folder "
        "of each drive."
        for together in rooms_of(folders, reuse=True).shared
    ]
    return in_memory + shared


def nvme_limit_bytes(rooms: Rooms, nvme_limit: int | str | None) -> int:
    """The NVMe budget: what was given, no more than what is free less 5 %."""
    limit = rooms.total_bytes
    if rooms.folders and nvme_limit is not None:
        limit = min(parse_bytes(nvme_limit, "nvme_limit"), limit)
    return limit
