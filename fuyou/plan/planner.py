"""Where each kind of state lives, and how many bytes each tier needs for it. Numbers in, a frozen Plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fuyou.core.errors import BudgetError
from fuyou.core.sizes import align_up, format_bytes

PAGE_BYTES = 4096
KINDS = ("weights", "gradients", "optimizer")  # host memory goes to what crosses the link most often a byte, in order
CHUNK_ELEMENTS = tuple(2**power for power in range(22, 11, -1))  # 4 Mi (64 MiB staged in fp32) down to 4 Ki
STAGED_UPDATES = 3  # one chunk read, one updated, one written
INBOUND_BUFFERS = 2
# Room on the device for activations and torch's temporaries that `wrap` insists on; what a batch needs beyond it is
# refused in its first forward or backward. CUDA: context-free workspaces of cuBLAS and the allocator's rounding too.
WORKING_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


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
    """`on_host` holds (unit index, chunk index, kind) of the chunks whose home is host memory; the rest is on NVMe."""

    chunk_elements: int
    inbound_buffer_bytes: int
    arena_bytes: int
    slot_limit_bytes: int
    working_bytes: int
    nvme_bytes: int
    on_host: frozenset[tuple[int, int, str]]


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
    state_slots: int,
    with_nvme: bool,
) -> Plan:
    """Decide, or raise BudgetError naming the tier that is short, by how much, and of what.

    `buffer_bytes`: the model's registered buffers, on the device for good. `state_slots`: slots of an NVMe extent that
    updates rewrite (gradients have one).
    """
    working = WORKING_BYTES[device_kind]
    slot_limit = _plan_device(units, gpu_bytes, working, buffer_bytes)
    chunk, buffer, staging = _plan_staging(units, ram_bytes, with_nvme)
    on_host, resident, nvme = _place(units, chunk, ram_bytes - staging, state_slots, with_nvme)
    return Plan(chunk, buffer, staging + resident, slot_limit, working, nvme, on_host)


def _plan_device(units: Sequence[UnitNumbers], gpu_bytes: int, working: int, buffers: int) -> int:
    """Bytes of units that may be on the device at once: two of the largest block, or one where there is no more room."""
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
    return pinned + min(2 * largest, gpu_bytes - needed + largest)


def _plan_staging(units: Sequence[UnitNumbers], ram_bytes: int, with_nvme: bool) -> tuple[int, int, int]:
    """(elements a chunk, bytes of an inbound buffer, bytes of all staging): at most half of the budget where it can be."""
    if not with_nvme:
        return CHUNK_ELEMENTS[0], 0, 0
    # Frozen units count as if they were trained: they may be, later, and must then pass through the same staging.
    units = [replace(each, trainable=True, optimized=True) for each in units]
    for chunk in CHUNK_ELEMENTS:
        buffer = max((_aligned(each, "weights", chunk) for each in units), default=PAGE_BYTES)
        update = max((sum(_aligned(each, kind, chunk) for kind in KINDS) for each in units), default=PAGE_BYTES)
        staging = INBOUND_BUFFERS * buffer + STAGED_UPDATES * update
        if staging <= ram_bytes // 2:
            return chunk, buffer, staging
    if staging > ram_bytes:
        raise BudgetError(
            f"The host budget ram={format_bytes(ram_bytes)} is {format_bytes(staging - ram_bytes)} "
            f"({staging - ram_bytes} bytes) short: the smallest staging that can stream this model takes "
            f"{format_bytes(staging)} ({staging} bytes). Give ram at least that.",
            tier="host", needed_bytes=staging, given_bytes=ram_bytes,
        )  # fmt: skip
    return chunk, buffer, staging


def _place(
    units: Sequence[UnitNumbers], chunk_elements: int, room: int, state_slots: int, with_nvme: bool
) -> tuple[frozenset[tuple[int, int, str]], int, int]:
    """(what is at home on the host, its bytes, bytes of the NVMe extents)."""
    on_host: set[tuple[int, int, str]] = set()
    resident = nvme = needed = 0
    for kind in KINDS:
        for index, unit in enumerate(units):
            for number, (_, count) in enumerate(chunk_spans(unit.elements, chunk_elements)):
                nbytes = align_up(unit.bytes_of(kind, count), PAGE_BYTES)
                needed += nbytes
                if nbytes == 0:
                    continue
                if not with_nvme or resident + nbytes <= room:
                    on_host.add((index, number, kind))
                    resident += nbytes
                else:
                    rewritten = kind == "optimizer" or (kind == "weights" and unit.optimized)
                    nvme += nbytes * (state_slots if rewritten else 1)
    if not with_nvme and needed > room:
        raise BudgetError(
            f"The host budget ram={format_bytes(room)} is {format_bytes(needed - room)} ({needed - room} bytes) short: "
            f"with nvme=None weights, gradients and optimizer state all stay in host memory and need "
            f"{format_bytes(needed)} ({needed} bytes). Give ram at least that, or an nvme folder.",
            tier="host", needed_bytes=needed, given_bytes=room,
        )  # fmt: skip
    return frozenset(on_host), resident, nvme


def _aligned(unit: UnitNumbers, kind: str, chunk_elements: int) -> int:
    return align_up(unit.bytes_of(kind, min(chunk_elements, unit.elements)), PAGE_BYTES)
