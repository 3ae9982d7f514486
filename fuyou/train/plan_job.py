"""`fuyou plan`: a model on a machine, asked of the simulator; a table or JSON."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fuyou.core.errors import ConfigError
from fuyou.core.sizes import format_bytes, parse_bytes
from fuyou.plan.cost import TIERS
from fuyou.plan.explain import WORDS, explain
from fuyou.plan.machine import Machine, load_machine
from fuyou.plan.shapes import ModelShape, Work, gpt
from fuyou.plan.simulator import Budgets, Request, Simulation, change_that_fits, default_budgets, simulate
from fuyou.plan.systems import PAPER_SYSTEM, System, fuyou_system

FITS, DOES_NOT_FIT = 0, 1
SYSTEMS = ("fuyou", "paper")
WIDTH, INDENT = 120, 11  # of the table, and of its first column


@dataclass(frozen=True)
class PlanArguments:
    """The command line. `nvme`: with `hardware`, a size; without, folders of this machine whose drives are measured."""

    model: str | None
    layers: int | None
    heads: int | None
    hidden: int | None
    vocab: int | None
    hardware: str | None
    batch: int
    sequence: int
    accumulation: int
    gpu_count: int
    drives: int | None
    gpu: str | None
    ram: str | None
    nvme: Sequence[str]
    precision: str | None
    system: str = "fuyou"


def plan(arguments: PlanArguments, as_json: bool) -> int:
    """Print the answer; 0 where it fits, 1 where it does not. ConfigError for arguments that do not go together."""
    _check(arguments)
    shape, notes = _shape(arguments)
    machine, system, more = _machine(arguments)
    request = Request(
        shape, machine, system, Work(arguments.batch, arguments.sequence), arguments.accumulation,
        _budgets(arguments, machine, system),
    )  # fmt: skip
    found = simulate(request)
    notes = [*notes, *more, *_notes(request)]
    print(json.dumps(to_dict(found, notes), indent=2) if as_json else table(found, notes))
    return FITS if found.fits else DOES_NOT_FIT


# --- from arguments to a request ------------------------------------------------------------------------------------


def _check(its: PlanArguments) -> None:
    numbers = {"--layers": its.layers, "--heads": its.heads, "--hidden": its.hidden}
    given = [name for name, value in numbers.items() if value is not None]
    if its.model is not None and (given or its.vocab is not None):
        raise ConfigError(f"--model and {(given or ['--vocab'])[0]} say what the model is twice: give one of the two.")
    if its.model is None and len(given) < len(numbers):
        missing = [name for name in numbers if name not in given]
        raise ConfigError(f"Give --model, or all of --layers, --heads and --hidden: {', '.join(missing)} left out.")
    if its.hardware is not None and len(its.nvme) > 1:
        raise ConfigError(
            "With --hardware, --nvme is one size, what the drives may hold; folders are for this machine."
        )
    if its.system not in SYSTEMS:
        raise ConfigError(f"--system {its.system} is none of {', '.join(SYSTEMS)}.")
    if its.system == "paper" and (its.hardware is None or its.precision not in (None, "bf16")):
        raise ConfigError("--system paper is the published system, for --hardware and 16-bit weights only.")
    if its.precision not in (None, "bf16", "fp32"):
        raise ConfigError(f"--precision {its.precision} is neither bf16 nor fp32.")


def _shape(its: PlanArguments) -> tuple[ModelShape, list[str]]:
    if its.model is not None:
        from fuyou.train.model_shape import load_shape

        return load_shape(its.model)
    shape = gpt(its.layers or 0, its.heads or 0, its.hidden or 0, its.vocab)
    return shape, [] if its.vocab else ["no --vocab: without embedding and head"]


def _machine(its: PlanArguments) -> tuple[Machine, System, list[str]]:
    notes: list[str] = []
    if its.hardware is not None:
        machine = load_machine(its.hardware)
        precision = its.precision or ("fp32" if machine.shared_compute else "bf16")
        kind = "cpu" if machine.shared_compute else "cuda"
        system = PAPER_SYSTEM if its.system == "paper" else fuyou_system(precision, kind)
        notes.append(f"{machine.name}: {machine.description}" if machine.description else machine.name)
    else:
        import torch  # here alone: a machine on paper need not wait for it

        from fuyou.runtime.this_machine import measure_machine

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for each in its.nvme:
            _refuse_size(each)
        precision = its.precision or ("bf16" if device.type == "cuda" else "fp32")
        machine, measured = measure_machine(its.nvme or ["."], precision, device)
        system = fuyou_system(precision, device.type)
        notes += measured
    if its.drives is not None:
        machine = machine.with_drives(its.drives)
    return replace(machine, gpu_count=its.gpu_count), system, notes


def _refuse_size(folder: str) -> None:
    if not os.path.isdir(folder) and folder[:1].isdigit():
        raise ConfigError(
            f"--nvme {folder} is no folder here: without --hardware it names a folder on the drive to measure; a size goes "
            "with --hardware."
        )


def _budgets(its: PlanArguments, machine: Machine, system: System) -> Budgets:
    """As given; else what `wrap` takes: 80 % of memory, which device and host share where there is no GPU."""
    found = default_budgets(machine, system)
    gpu = parse_bytes(its.gpu, "--gpu") if its.gpu is not None else None
    ram = parse_bytes(its.ram, "--ram") if its.ram is not None else None
    if machine.shared_compute:
        host, device = _shared(ram, gpu, found.host)
    else:
        host, device = ram or found.host, gpu or found.device
    size = its.nvme[0] if its.hardware is not None and its.nvme else None
    nvme = parse_bytes(size, "--nvme (with --hardware, a size)") if size is not None else found.nvme
    return Budgets(device, host, nvme if machine.drives else 0)


def _shared(ram: int | None, gpu: int | None, free: int) -> tuple[int, int]:
    """(host, device) of one memory, as fuyou/runtime/planned.py divides it."""
    if ram is None and gpu is None:
        return free // 2, free - free // 2
    return (ram or max(free - (gpu or 0), 1)), (gpu or max(free - (ram or 0), 1))


def _notes(request: Request) -> list[str]:
    machine, budgets = request.machine, request.budgets
    has = {"device": machine.device_bytes, "host": machine.host_bytes, "nvme": machine.nvme_bytes}
    notes = [
        f"the {tier} budget of {format_bytes(budgets.of(tier))} is more than the machine's {format_bytes(has[tier])}"
        for tier in TIERS
        if budgets.of(tier) > has[tier]
    ]
    if machine.gpu_count > 1:
        notes.append(
            f"{machine.gpu_count} GPUs are a prediction only: fuyou trains on one. Each has a link and its own rows; drives, "
            "host memory and the update are shared; tokens a second and TFLOPS are of all."
        )
    return notes


# --- what is printed ------------------------------------------------------------------------------------------------


def to_dict(found: Simulation, notes: Sequence[str] = ()) -> dict[str, Any]:
    """JSON-able. Times and speeds are null where it does not fit: no step would be made."""
    prediction, request = found.prediction, found.request

    def only(value: float) -> float | None:
        return value if found.fits and math.isfinite(value) else None

    return {
        "fits": found.fits,
        "seconds_per_step": only(prediction.seconds_per_step),
        "forward_seconds": only(prediction.forward_s),
        "backward_seconds": only(prediction.backward_s),
        "tokens_per_step": found.tokens_per_step,
        "tokens_per_second": only(found.tokens_per_second),
        "tflops_6n": only(found.tflops(6)),
        "tflops_8n": only(found.tflops(8)),
        "bound_by": prediction.bound_by if found.fits else None,
        "busy_seconds": dict(prediction.busy_s) if found.fits else None,
        "tiers": {
            tier: {
                "budget_bytes": request.budgets.of(tier),
                "needed_bytes": prediction.tier_bytes(tier),
                "by_category": dict(prediction.peak_bytes[tier]),
            }
            for tier in TIERS
        },
        "nvme_read_bytes_per_step": prediction.nvme_read_bytes,
        "nvme_write_bytes_per_step": prediction.nvme_write_bytes,
        "host_to_device_bytes_per_step": prediction.host_to_device_bytes,
        "device_to_host_bytes_per_step": prediction.device_to_host_bytes,
        "drive_life_steps": only(found.drive_life_steps),
        "drive_life_days": only(found.drive_life_days),
        "parameters": request.model.elements,
        "active_parameters": round(request.model.active_elements),
        "gpu_count": request.machine.gpu_count,
        "machine": request.machine.name,
        "system": request.system.name,
        "change": None if found.fits else change_that_fits(found) or None,
        "advice": explain(prediction) if found.fits else None,
        "notes": list(notes),
    }


def table(found: Simulation, notes: Sequence[str]) -> str:
    rows = [*_question(found), ("fits", "yes" if found.fits else "no")]
    if found.fits:
        rows += _answer(found)
    rows += [(tier, _tier(found, tier)) for tier in TIERS if found.request.machine.drives or tier != "nvme"]
    if found.fits:
        rows += [*_drives(found), ("plan", _plan(found)), ("why", explain(found.prediction))]
    else:
        change = change_that_fits(found)
        rows.append(("change", f"the smallest that would fit: {change}." if change else "no batch or budget would do."))
    rows += [("note", each) for each in notes]
    return "\n".join(
        textwrap.fill(value, WIDTH, initial_indent=f"{name:<{INDENT}}", subsequent_indent=" " * INDENT,
                      break_long_words=False, break_on_hyphens=False)
        for name, value in rows
    )  # fmt: skip


def _question(found: Simulation) -> list[tuple[str, str]]:
    request = found.request
    model, work, gpus = request.model, request.work, request.machine.gpu_count
    active = model.active_elements
    used = f", of which a token meets {active / 1e9:.3g}e9" if active < model.elements else ""
    precision = "bf16" if request.system.itemsize == 2 else "fp32"
    each = f"{gpus} GPUs x " if gpus > 1 else ""
    return [
        ("model", f"{model.name}: {model.elements / 1e9:.4g}e9 parameters{used}, {precision}"),
        ("machine", f"{request.machine.name}{'' if request.system.name == 'fuyou' else f', {request.system.name}'}"),
        (
            "step",
            f"{each}{request.accumulation} x {work.batch} rows of {work.sequence} tokens: {found.tokens_per_step:,} tokens",
        ),
    ]


def _answer(found: Simulation) -> list[tuple[str, str]]:
    its, machine = found.prediction, found.request.machine
    total = "; of all GPUs" if machine.gpu_count > 1 else ""
    parts = f"forward {its.forward_s:.3g}, backward {its.backward_s:.3g}"
    parts += f", end {machine.tail_s:.3g}" if machine.tail_s else ""
    return [
        ("seconds", f"{its.seconds_per_step:.3g} a step: {parts}"),
        (
            "speed",
            f"{found.tokens_per_second:,.0f} tokens/s; {found.tflops(6):.3g} TFLOPS counted as 6N, "
            f"{found.tflops(8):.3g} as 8N (N parameters, recomputation counted){total}",
        ),
        ("bound by", WORDS[its.bound_by]),
    ]


def _tier(found: Simulation, tier: str) -> str:
    budget, needed = found.request.budgets.of(tier), found.prediction.tier_bytes(tier)
    parts = [f"{name} {format_bytes(value)}" for name, value in found.prediction.peak_bytes[tier].items() if value]
    short = f", {format_bytes(needed - budget)} short" if needed > budget else ""
    each = " on each GPU" if tier == "device" and found.request.machine.gpu_count > 1 else ""
    return f"{format_bytes(needed)} of {format_bytes(budget)}{each}{short}{': ' if parts else ''}{', '.join(parts)}"


def _drives(found: Simulation) -> list[tuple[str, str]]:
    its = found.prediction
    if not its.nvme_read_bytes + its.nvme_write_bytes:
        return []
    life = ""
    if math.isfinite(found.drive_life_days):
        life = (
            f"; rated for {found.drive_life_steps:,.0f} such steps, {found.drive_life_days:,.1f} days without a pause"
        )
    moved = f"{format_bytes(its.nvme_read_bytes)} read and {format_bytes(its.nvme_write_bytes)} written a step"
    return [("drives", f"{len(found.request.machine.drives)}: {moved}{life}")]


def _plan(found: Simulation) -> str:
    """What was chosen, in words."""
    choice, activations = found.prediction.question.choice, found.activations
    parts = [f"{choice.device_slots} blocks of weights on the device, updates {choice.update}"]
    if found.request.machine.drives:
        parts.append(f"{choice.host_state:.0%} of weights, gradients and state in host memory")
    counts: Counter[str] = Counter()
    for block, actions in zip(found.prediction.question.blocks, choice.actions, strict=True):
        for item, action in zip(block.items, actions, strict=True):
            counts[action] += item.nbytes
    total = sum(counts.values())
    words = {"keep": "kept", "host": "to host", "nvme": "to NVMe", "recompute": "recomputed"}
    if total:
        parts.append(
            "activations " + ", ".join(f"{counts[key] / total:.0%} {words[key]}" for key in words if counts[key])
        )
    places = Counter(
        place for place, block in zip(choice.inputs, found.prediction.question.blocks, strict=True) if block.items
    )
    if activations is not None and places:
        parts.append("inputs of blocks on " + " and ".join(places))
    return "; ".join(parts)
