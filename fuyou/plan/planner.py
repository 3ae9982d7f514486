"""Where each kind of state lives, and how many bytes each tier needs for it. Numbers in, a frozen Plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fuyou.core.errors import BudgetError
from fuyou.core.sizes import align_up, format_bytes

PAGE_BYTES = 4096
KINDS = ("weights", "gradients", "optimizer")
CHUNK_ELEMENTS = tuple(2**power for power in range(22, 11, -1))  # 4 Mi (64 MiB staged in fp32) down to 4 Ki
LARGE_CHUNK = 2**20  # elements, enough for a drive; larger ones only spare work where memory is plenty
# Of the largest block on the device at once, where there is room: one computes, others are on their way.
SLOT_BLOCKS = 4


@dataclass(frozen=True)
class StagingCounts:
    """How many pieces of host memory, each for one chunk, traffic goes through."""

    inbound: int  # weights on their way to the device; a CPU's are read to where they are used, and take none
    updates: int  # weights, state and gradient of an update: being read, computed or written
    gradients: int  # on their way home, or waiting for their update


# Bytes in flight make a drive fast, and each chunk costs the processor the same, however large it is: so rather large
# chunks than many. The few are for budgets that have no room for more.
MANY = StagingCounts(inbound=4, updates=6, gradients=8)
FEW = StagingCounts(inbound=2, updates=2, gradients=0)
# Room on the device for activations and torch's temporaries that `wrap` insists on; what a batch needs beyond it is
# refused in its first forward or backward. CUDA: context-free workspaces of cuBLAS and the allocator's rounding too.
WORKING_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


# Activations go to the drives in pieces of at most this much, through so many buffers: half of them on their way out, half
# on their way back, wherever a step is.
ACTIVATION_PIECE_BYTES = 4 << 20
ACTIVATION_BUFFERS = 8
SMALLEST_PIECE_BYTES = 64 << 10
LARGEST_ASIDE_BYTES = 256 << 10
SAVING_BUFFERS = 4  # through which a checkpoint is copied beside training
LARGEST_SAVING_BYTES = 4 << 20
AUTO_SWAPS_FROM_BYTES = 256 << 20  # of host memory; a smaller budget has none to spare for what may not be used


@dataclass(frozen=True)
class ActivationMemory:
    """Host memory for activations (bytes): `buffers` of `piece_bytes` that they go to the drives through, and a `pool` for
    those that stay."""

    piece_bytes: int
    buffers: int
    pool_bytes: int = 0

    @property
    def staging_bytes(self) -> int:
        return self.buffers * self.piece_bytes


@dataclass(frozen=True)
class UnitNumbers:
    """What the planner must know of a unit: `owners` are block indices, none for the model's loose parameters."""

    name: str
    elements: int
    itemsize: int
    owners: tuple[int, ...]
    trainable: bool
    optimized: bool
    largest_tensor_elements: int

    @property
    def weight_bytes(self) -> int:
        return self.elements * self.itemsize

    def bytes_of(self, kind: str, elements: int) -> int:
        """Bytes of `kind` for `elements` of this unit, 0 where it has none."""
        if kind == "weights":
            return elements * self.itemsize
        if kind == "gradients":
            return elements * self.itemsize if self.trainable else 0
        return elements * (8 if self.itemsize == 4 else 10) if self.optimized else 0


@dataclass(frozen=True)
class Plan:
    """`on_host` holds (unit index, chunk index) of the chunks whose home is host memory, all kinds together; the rest is on
    NVMe. [Note: cache] Every chunk is used at the same times in every step, so a fixed set, spread evenly over the model,
    finds as much in memory as any other choice could, and the drive has as much to do under one block as under another. A
    chunk with all its kinds there moves nothing over the drive's link, and its update can wait for the next forward.

    `spare`: those of them with a second place for weights and state, so that their updates need not wait for `step()`.
    `staging_bytes` counts the buffers of `activations` too, and those for commits and checkpoints.
    `state_slots`: slots of an NVMe extent that updates rewrite.
    `through`: steps are committed, so weights and state on the host are on NVMe too, in `committed` extents together with
    the others.
    """

    chunk_elements: int
    inbound_buffer_bytes: int
    update_buffer_bytes: int
    staging: StagingCounts
    staging_bytes: int
    resident_bytes: int
    slot_limit_bytes: int
    working_bytes: int
    nvme_bytes: int
    state_slots: int
    through: bool
    committed: int
    on_host: frozenset[tuple[int, int]]
    spare: frozenset[tuple[int, int]]
    activations: ActivationMemory
    aside_bytes: int  # a piece of what commits hold beside the extents, and its buffer; 0 where steps are not committed
    saving_bytes: int  # a piece of a checkpoint that is copied beside training; 0 where steps are not committed
    aside_pieces: int = 0  # of them on the drives, two slots each; known when the parameters' names are

    @property
    def arena_bytes(self) -> int:
        return self.staging_bytes + self.resident_bytes + self.activations.pool_bytes


def chunk_spans(elements: int, chunk_elements: int) -> list[tuple[int, int]]:
    """(start, count) of a unit's chunks."""
    return [(start, min(chunk_elements, elements - start)) for start in range(0, elements, chunk_elements)]


def make_plan(
    units: Sequence[UnitNumbers],
    *,
    ram_bytes: int,
    gpu_bytes: int,
    device_kind: str,
    buffer_bytes: int,
    with_nvme: bool,
    nvme_limit_bytes: int | None = None,
    durable: bool = False,
    update: str = "auto",
    activations: str = "recompute",
) -> Plan:
    """Decide, or raise BudgetError naming the tier that is short, by how much, and of what.

    `buffer_bytes`: the model's registered buffers, on the device for good. `durable`: steps are committed. `update` and
    `activations`: as fuyou.Config's.
    """
    working = WORKING_BYTES[device_kind]
    slot_limit = _plan_device(units, gpu_bytes, working, buffer_bytes)
    memory = _plan_activations(ram_bytes, with_nvme, activations)
    aside = _piece_bytes(LARGEST_ASIDE_BYTES, 1, ram_bytes) if durable else 0
    saving = _piece_bytes(LARGEST_SAVING_BYTES, SAVING_BUFFERS, ram_bytes) if durable else 0
    try:
        beside = memory.staging_bytes + aside + SAVING_BUFFERS * saving
        staged = _plan_staging(units, ram_bytes, with_nvme, device_kind, beside)
    except BudgetError:  # what the smallest staging needs is told with, and is enough with, the smallest piece
        aside, saving = min(aside, PAGE_BYTES), min(saving, PAGE_BYTES)
        beside = memory.staging_bytes + aside + SAVING_BUFFERS * saving
        staged = _plan_staging(units, ram_bytes, with_nvme, device_kind, beside)
    chunk, counts, buffers, staging = staged
    if activations == "host":
        memory = replace(memory, pool_bytes=_pool_bytes(units, ram_bytes - staging, with_nvme))
    guesses = update in ("auto", "speculative")
    # Without a GPU the update of what is in memory takes from compute what it takes, earlier or later.
    spares = update == "speculative" or (guesses and device_kind == "cuda")
    room = ram_bytes - staging - memory.pool_bytes
    place = _Placing(units, chunk, room, with_nvme, durable, spares)
    slots = 2 if durable or guesses else 1
    nvme = place.nvme_bytes(slots)
    if not durable and slots == 2 and nvme_limit_bytes is not None and nvme > nvme_limit_bytes:
        slots, nvme = 1, place.nvme_bytes(1)  # room for one of each: updates wait for `step()`
    return Plan(
        chunk, *buffers, counts, staging, place.resident_bytes, slot_limit, working, nvme, slots, durable, place.committed,
        frozenset(place.on_host), frozenset(place.spare), memory, aside, saving,
    )  # fmt: skip


def _plan_device(units: Sequence[UnitNumbers], gpu_bytes: int, working: int, buffers: int) -> int:
    """Bytes of units that may be on the device at once: some of the largest block, or one where there is no more room."""
    pinned = sum(each.weight_bytes for each in units if not each.owners)
    blocks: dict[int, int] = {}
    for each in units:
        for owner in each.owners:
            blocks[owner] = blocks.get(owner, 0) + each.weight_bytes
    largest = max(blocks.values(), default=0)
    gradient = max((each.largest_tensor_elements * each.itemsize for each in units if each.trainable), default=0)
    needed = pinned + buffers + largest + gradient + working
    if needed > gpu_bytes:
        raise BudgetError(
            f"The device budget gpu={format_bytes(gpu_bytes)} is {format_bytes(needed - gpu_bytes)} "
            f"({needed - gpu_bytes} bytes) short: the largest block's weights {format_bytes(largest)}, the largest "
            f"gradient {format_bytes(gradient)}, parameters and buffers outside of blocks {format_bytes(pinned + buffers)} "
            f"and {format_bytes(working)} to work in need {format_bytes(needed)} ({needed} bytes). Give gpu at least that, "
            "or name smaller blocks (Config(blocks=[...])).",
            tier="device", needed_bytes=needed, given_bytes=gpu_bytes,
        )  # fmt: skip
    return pinned + min(SLOT_BLOCKS * largest, gpu_bytes - needed + largest)


def _plan_activations(ram_bytes: int, with_nvme: bool, activations: str) -> ActivationMemory:
    """At most a sixteenth of the budget as buffers, as long as pieces are no smaller than is worth an operation."""
    piece = ACTIVATION_PIECE_BYTES
    while piece > SMALLEST_PIECE_BYTES and 16 * ACTIVATION_BUFFERS * piece > ram_bytes:
        piece //= 2
    swaps_to_drives = with_nvme and (
        activations in ("host", "nvme") or (activations == "auto" and ram_bytes >= AUTO_SWAPS_FROM_BYTES)
    )
    return ActivationMemory(piece, ACTIVATION_BUFFERS if swaps_to_drives else 0)


def _piece_bytes(largest: int, count: int, ram_bytes: int) -> int:
    """Of `count` buffers, which are together no more than a 64th of the budget, as long as that is a page each."""
    piece = largest
    while piece > PAGE_BYTES and 64 * count * piece > ram_bytes:
        piece //= 2
    return piece


def _pool_bytes(units: Sequence[UnitNumbers], room: int, with_nvme: bool) -> int:
    """Of what staging leaves: all that the state does not need where it must be there, else half. A byte of either saves
    about the same traffic: an activation's 2 a step, the state's about 30 for each 16."""
    if with_nvme:
        return room // 2 // PAGE_BYTES * PAGE_BYTES
    state = sum(each.bytes_of(kind, each.elements) + PAGE_BYTES for each in units for kind in KINDS)
    return max(0, room - state) // PAGE_BYTES * PAGE_BYTES


def _plan_staging(
    units: Sequence[UnitNumbers], ram_bytes: int, with_nvme: bool, device_kind: str, beside: int
) -> tuple[int, StagingCounts, tuple[int, int], int]:
    """(elements a chunk, counts, bytes of an inbound and of an update's buffer, bytes of all staging): at most half of the
    budget where it can be, a quarter where it could hold a third of the state, and an eighth for large chunks. `beside`:
    bytes of other staging, which the last number counts too."""
    if not with_nvme:
        return CHUNK_ELEMENTS[0], FEW, (0, 0), beside
    state = sum(each.bytes_of(kind, each.elements) for each in units for kind in KINDS)
    # Fast traffic matters more than less of it, until there could be much less.
    part = 2 if ram_bytes < state // 3 else 4
    # Frozen units count as if they were trained: they may be, later, and must then pass through the same staging.
    units = [replace(each, trainable=True, optimized=True) for each in units]

    def staging_of(chunk: int, counts: StagingCounts) -> tuple[tuple[int, int], int]:
        weights = max((_aligned(each, "weights", chunk) for each in units), default=PAGE_BYTES)
        inbound = 0 if device_kind == "cpu" else weights
        update = max((sum(_aligned(each, kind, chunk) for kind in KINDS) for each in units), default=PAGE_BYTES)
        # One more update's worth for what a user reads and writes between steps.
        total = counts.inbound * inbound + counts.updates * update + counts.gradients * weights + update + beside
        return (inbound, update), total

    for counts, chunks in ((MANY, CHUNK_ELEMENTS), (FEW, CHUNK_ELEMENTS[-4:])):
        for chunk in chunks:
            buffers, staging = staging_of(chunk, counts)
            if staging <= ram_bytes // (part if chunk <= LARGE_CHUNK else 8):
                return chunk, counts, buffers, staging
    if staging > ram_bytes:
        raise BudgetError(
            f"The host budget ram={format_bytes(ram_bytes)} is {format_bytes(staging - ram_bytes)} "
            f"({staging - ram_bytes} bytes) short: the smallest staging that can stream this model takes "
            f"{format_bytes(staging)} ({staging} bytes). Give ram at least that.",
            tier="host", needed_bytes=staging, given_bytes=ram_bytes,
        )  # fmt: skip
    return chunk, counts, buffers, staging


class _Placing:
    """Which chunks are on the host, and what the others take on the drives."""

    def __init__(
        self, units: Sequence[UnitNumbers], chunk_elements: int, room: int, with_nvme: bool, durable: bool, spares: bool
    ) -> None:
        self._durable = durable
        self.committed = 0
        self.on_host: set[tuple[int, int]] = set()
        self.spare: set[tuple[int, int]] = set()
        self._rewritten = self._once = 0  # bytes on the drives of what updates rewrite, and of the rest
        chunks = [
            (index, number, {kind: align_up(unit.bytes_of(kind, count), PAGE_BYTES) for kind in KINDS})
            for index, unit in enumerate(units)
            for number, (_, count) in enumerate(chunk_spans(unit.elements, chunk_elements))
        ]
        needed = sum(sum(each.values()) for _, _, each in chunks)
        if not with_nvme and needed > room:
            raise BudgetError(
                f"The host budget ram={format_bytes(room)} is {format_bytes(needed - room)} ({needed - room} bytes) short: "
                f"with nvme=None weights, gradients and optimizer state all stay in host memory and need "
                f"{format_bytes(needed)} ({needed} bytes). Give ram at least that, or an nvme folder.",
                tier="host", needed_bytes=needed, given_bytes=room,
            )  # fmt: skip
        share = 1.0 if not with_nvme else min(1.0, room / max(needed, 1))
        due = 0.0  # bytes that the chunks so far should have on the host
        resident = 0
        for index, number, its in chunks:
            nbytes = sum(its.values())
            due += share * nbytes
            if resident + nbytes <= (needed if share == 1.0 else min(room, due + nbytes / 2)):
                self.on_host.add((index, number))
                resident += nbytes
            self._count(units[index], its, (index, number) in self.on_host)
        for index, number, its in chunks:
            nbytes = its["weights"] + its["optimizer"]
            if spares and its["optimizer"] and (index, number) in self.on_host and resident + nbytes <= room:
                self.spare.add((index, number))
                resident += nbytes
        self.resident_bytes = resident

    def nvme_bytes(self, slots: int) -> int:
        return slots * self._rewritten + self._once

    def _count(self, unit: UnitNumbers, its: dict[str, int], on_host: bool) -> None:
        # Where steps are committed frozen weights are too: they may be trained, or written, later.
        rewritten = its["optimizer"] + (its["weights"] if unit.optimized or self._durable else 0)
        if not on_host:
            self._once += sum(its.values()) - rewritten
        if not on_host or self._durable:
            self._rewritten += rewritten
        if self._durable:
            self.committed += 1 + (its["optimizer"] > 0)


def _aligned(unit: UnitNumbers, kind: str, chunk_elements: int) -> int:
    return align_up(unit.bytes_of(kind, min(chunk_elements, unit.elements)), PAGE_BYTES)
