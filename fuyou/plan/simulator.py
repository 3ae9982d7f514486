"""A model on a machine: does it fit, and how long does a step take? Numbers in, a frozen answer out.

The same cost model as the run-time planner's (fuyou/plan/cost.py); what differs is only that block times come from
operations and the device's rate (fuyou/plan/shapes.py), not from a profile.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

from fuyou.core.sizes import format_bytes
from fuyou.plan.activations import INPUT_ORDERS, Activations, NoRoom, Room, choose_activations, place_inputs
from fuyou.plan.cost import TIERS, BlockNumbers, Choice, Place, Prediction, peak_bytes, predict
from fuyou.plan.machine import Machine
from fuyou.plan.phases import Update
from fuyou.plan.shapes import ModelShape, Work, block_numbers
from fuyou.plan.systems import System

HOST_SHARES = (
    1.0,
    0.75,
    0.5,
    0.25,
    0.0,
)  # of the host memory that is left, for weights and state; the rest for activations
OPTIONS = {"device": "--gpu", "host": "--ram", "nvme": "--nvme"}
DAY_S = 86400.0
UNLIMITED = 2**60  # bytes
GRAIN = 2**20  # bytes, to which the least budget that would do is found


@dataclass(frozen=True)
class Budgets:
    """Bytes a tier; the device's is of each GPU."""

    device: int
    host: int
    nvme: int

    def of(self, tier: str) -> int:
        return {"device": self.device, "host": self.host, "nvme": self.nvme}[tier]


@dataclass(frozen=True)
class Request:
    model: ModelShape
    machine: Machine
    system: System
    work: Work
    accumulation: int
    budgets: Budgets
    slices: int = 1  # parts of the batch that a block runs at a time: Config(micro_batch=batch / slices)


@dataclass(frozen=True)
class Needs:
    """A budget that is too small, and the least that would do, to a MiB."""

    tier: str
    needed_bytes: int
    given_bytes: int


@dataclass(frozen=True)
class Simulation:
    """`prediction` is of the fastest plan that fits. Where none does it is of the smallest plan there is, and the rest says
    what would make it fit, each enough alone: all budgets of one of `ways`; a smaller batch; the same batch with as many rows
    a block at a time."""

    request: Request
    fits: bool
    prediction: Prediction
    activations: Activations | None = None
    ways: tuple[tuple[Needs, ...], ...] = ()
    batch_that_fits: int | None = None
    micro_batch_that_fits: int | None = None

    @property
    def tokens_per_step(self) -> int:
        return self.request.work.tokens * self.request.accumulation * self.request.machine.gpu_count

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.tokens_per_step / self.prediction.seconds_per_step

    def tflops(self, times: int) -> float:
        """`times` x N x tokens a second: 6 counts forward and backward, 8 a recomputed forward too, made or not."""
        return times * self.request.model.active_elements * self.tokens_per_second / 1e12

    @property
    def drive_life_steps(self) -> float:
        written = self.prediction.nvme_write_bytes
        return self.request.machine.endurance_bytes / written if written else math.inf

    @property
    def drive_life_days(self) -> float:
        """Of training without a pause, until the first drive has written what its vendor grants."""
        return self.drive_life_steps * self.prediction.seconds_per_step / DAY_S


def default_budgets(machine: Machine, system: System) -> Budgets:
    """What the system takes when it is given no budget: of memory its share, of the drives all but 5 %."""
    share = system.budget_share
    return Budgets(
        int(share * (machine.device_bytes - system.context_bytes)),
        int(share * machine.host_bytes),
        int(0.95 * machine.nvme_bytes),
    )


def simulate(request: Request) -> Simulation:
    """The fastest plan of the system that fits, or the smallest changes that would do."""
    found = _best(request)
    if found is not None:
        return Simulation(request, True, found.prediction, found)
    return Simulation(
        request,
        False,
        _smallest(request),
        None,
        _ways(request),
        _batch_that_fits(request),
        _micro_batch_that_fits(request),
    )


def change_that_fits(simulation: Simulation) -> str:
    """The smallest changes that would make it fit, each enough alone: first those that this machine can make."""
    its, machine = simulation, simulation.request.machine
    has = {"device": machine.device_bytes, "host": machine.host_bytes, "nvme": machine.nvme_bytes}
    changes = []
    if its.micro_batch_that_fits is not None:
        changes.append((True, f"Config(micro_batch={its.micro_batch_that_fits}) with the same batch"))
    if its.batch_that_fits is not None:
        changes.append((True, f"--batch {its.batch_that_fits} in place of {its.request.work.batch}"))
    for way in its.ways:
        budgets = [
            f"{OPTIONS[each.tier]} {format_bytes(each.needed_bytes)} ({each.needed_bytes} bytes) in place of "
            f"{format_bytes(each.given_bytes)}"
            for each in way
        ]
        possible = all(each.needed_bytes <= has[each.tier] for each in way)
        changes.append((possible, " and ".join(budgets)))
    return ", or ".join(text for _, text in sorted(changes, key=lambda each: not each[0]))


# --- the search -----------------------------------------------------------------------------------------------------


def _numbers(request: Request) -> tuple[BlockNumbers, ...]:
    system = request.system
    return block_numbers(
        request.model.blocks, request.work, flops_per_s=request.machine.flops_per_s, itemsize=system.itemsize,
        temporaries=system.temporaries, tile_bytes=system.tile_bytes,
    )  # fmt: skip


def _best(request: Request) -> Activations | None:
    """The fastest plan that fits, of equals the one with the most slots on the device. One slot, where nothing can come while
    a block computes, and one slot of NVMe's extents, where no update can be guessed, only where nothing else fits."""
    system, machine = request.system, request.machine
    blocks = _numbers(request)
    wide = tuple(slots for slots in system.device_slots if slots > 1)
    narrow = tuple(slots for slots in system.device_slots if slots == 1)
    for tried in (wide, narrow):
        for update, state_slots in zip(system.updates, range(system.state_slots, 0, -1), strict=False):
            found = [
                chosen
                for slots in tried
                for share in _host_shares(request, blocks)
                for chosen in _with_activations(
                    request, blocks, _choice(request, slots, update, state_slots if machine.drives else 1, share)
                )
            ]
            if found:
                return min(found, key=lambda each: round(each.prediction.seconds_per_step, 6))
    return None


def _host_shares(request: Request, blocks: tuple[BlockNumbers, ...]) -> list[float]:
    """Of weights, gradients and state, what may live in host memory; all, where there is no drive."""
    if not request.machine.drives:
        return [1.0]
    if not request.system.uses_host:
        return [0.0]
    room = request.budgets.host - _staging(request)
    room -= len(TIERS) * 2  # kinds are rounded to whole bytes one by one
    most = min(1.0, room / max(1, _bytes_of_all(blocks, request)))
    return sorted({most * share for share in HOST_SHARES}, reverse=True)


def _staging(request: Request) -> int:
    return request.system.staging_bytes(request.budgets.host, bool(request.machine.drives))


def _choice(request: Request, slots: int, update: Update, state_slots: int, share: float) -> Choice:
    system = request.system
    return Choice(
        update=update,
        host_weights=share,
        host_gradients=share if system.traffic.gradients_wait else 1.0,
        host_state=share,
        state_slots=state_slots,
        device_slots=slots,
        gradient_slots=system.gradient_slots,
        in_flight=system.in_flight,
        slices=request.slices,
        accumulation=request.accumulation,
        device_working_bytes=system.working_bytes,
        staging_bytes=_staging(request),
    )


def _bytes_of_all(blocks: tuple[BlockNumbers, ...], request: Request) -> int:
    """Weights, gradients and state, all in host memory."""
    home = replace(_choice(request, 1, request.system.updates[0], 1, 1.0), staging_bytes=0)
    return sum(peak_bytes(request.machine, blocks, home, request.system.traffic)["host"].values())


def _with_activations(request: Request, blocks: tuple[BlockNumbers, ...], choice: Choice) -> list[Activations]:
    """The plan with activations that fit, chosen for some ways of dividing what is left of the device."""
    system, machine, budgets = request.system, request.machine, request.budgets
    left = _left(request, blocks, choice)
    if min(left.values()) < 0:
        return []
    found: list[Activations] = []
    # For tensors that stay, and for swapped ones on their way.
    for part in (0.0, 0.5, 1.0) if system.in_flight and system.keeps_on_device else (1.0,):
        try:
            chosen = choose_activations(machine, blocks, choice, _room(request, left, part), system.traffic)
        except NoRoom:
            continue
        if all(chosen.prediction.tier_bytes(tier) <= budgets.of(tier) for tier in TIERS):
            found.append(chosen)
    return found


def _left(request: Request, blocks: tuple[BlockNumbers, ...], choice: Choice) -> dict[str, int]:
    """Bytes of each tier that the plan leaves for activations: everything recomputed, inputs off the device."""
    away = replace(choice, inputs=tuple("host" for _ in blocks))
    base = peak_bytes(request.machine, blocks, away, request.system.traffic)
    left = {tier: request.budgets.of(tier) - sum(base[tier].values()) for tier in TIERS}
    left["host"] += base["host"]["activations"]
    return left


def _room(request: Request, left: dict[str, int], part: float) -> Room:
    """Of what is left in each tier, for the activations of one GPU; `part` of the device's for what is on its way."""
    system, gpus = request.system, request.machine.gpu_count
    return Room(
        int(left["device"] * (1 - part)),
        left["host"] // gpus if system.swaps_to_host else 0,
        left["nvme"] // gpus,
        int(left["device"] * part / system.in_flight) if system.in_flight else None,
    )


# --- what is missing ------------------------------------------------------------------------------------------------


def _smallest(request: Request) -> Prediction:
    """The plan that needs least of the device and of host memory."""
    blocks, machine = _numbers(request), request.machine
    place: Place = "nvme" if machine.drives else "host"
    inputs: tuple[Place, ...] = tuple(place for _ in blocks)
    choice = replace(_smallest_choice(request, 0.0 if machine.drives else 1.0), inputs=inputs)
    return predict(machine, blocks, choice, request.system.traffic)


def _smallest_choice(request: Request, share: float) -> Choice:
    return _choice(request, request.system.device_slots[-1], request.system.updates[-1], 1, share)


def _feasible(request: Request) -> bool:
    """Whether any plan fits: the smallest, with all recomputed, and inputs anywhere."""
    blocks = _numbers(request)
    for share in _host_shares(request, blocks):
        left = _left(request, blocks, _smallest_choice(request, share))
        for places in INPUT_ORDERS if min(left.values()) >= 0 else ():
            part = 0.0 if request.system.keeps_on_device else 1.0
            with contextlib.suppress(NoRoom):
                place_inputs(blocks, _room(request, left, part), places)
                return True
    return False


def _ways(request: Request) -> tuple[tuple[Needs, ...], ...]:
    """Each a set of budgets that would do: one of them raised, where one is enough, else the device's and another."""
    tiers = [tier for tier in TIERS if tier != "nvme" or request.machine.drives]
    single = [(need,) for tier in tiers if (need := _least(request, tier)) is not None]
    if single:
        return tuple(single)
    rich = replace(request, budgets=Budgets(request.budgets.device, UNLIMITED, UNLIMITED))
    device = _least(rich, "device")
    if device is None:
        return ()
    raised = replace(request, budgets=replace(request.budgets, device=device.needed_bytes))
    return tuple((device, need) for tier in tiers[1:] if (need := _least(raised, tier)) is not None)


def _least(request: Request, tier: str) -> Needs | None:
    """The least budget of `tier` that would do, with the others as they are; None where none would."""

    def fits(nbytes: int) -> bool:
        return _feasible(replace(request, budgets=replace(request.budgets, **{tier: nbytes})))

    given = request.budgets.of(tier)
    if not fits(UNLIMITED):
        return None
    low, high = given, max(2 * given, GRAIN)
    while not fits(high):
        low, high = high, 2 * high
    while high - low > GRAIN:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return Needs(tier, high, given)


def _batch_that_fits(request: Request) -> int | None:
    """The largest smaller batch that fits; None where not even one row does."""

    def fits(batch: int) -> bool:
        return _feasible(replace(request, work=replace(request.work, batch=batch)))

    if request.work.batch == 1 or not fits(1):
        return None
    low, high = 1, request.work.batch  # fits, does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _micro_batch_that_fits(request: Request) -> int | None:
    """The most rows a block at a time, halved from the batch on, with which the batch fits; None for a system that cannot
    cut its batch, or where it does not help."""
    rows = request.work.batch
    while request.system.slices_batches and rows > 1:
        rows = -(-rows // 2)
        if _feasible(replace(request, slices=request.work.batch // rows)):
            return rows
    return None
