"""What `wrap` decides about a model and budgets before anything is touched; `fuyou train --dry-run` stops here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuyou.core.blocks import Block, find_blocks
from fuyou.core.config import Config
from fuyou.core.errors import ConfigError
from fuyou.core.sizes import parse_bytes
from fuyou.plan.planner import Plan, UnitNumbers, make_plan
from fuyou.runtime.build import make_units, name_optimizer_strangers, numbers_of, refuse_compiled_around
from fuyou.runtime.measure import free_host_bytes
from fuyou.runtime.optimizer import check_optimizer
from fuyou.runtime.tiers import nvme_limit_bytes
from fuyou.swap.unit import Unit
from fuyou.tiers.device import resolve_device
from fuyou.tiers.folders import Rooms, check_folders, refuse_without_room, rooms_of
from fuyou.tiers.records import overhead_bytes

FREE_SHARE = 0.8  # of what is free, for a budget that is not given


@dataclass(frozen=True)
class Planned:
    """Blocks, units with their named parameters, and the plan of their bytes within the budgets (all in bytes)."""

    device: torch.device
    folders: list[str]
    rooms: Rooms  # of the folders, before anything was placed
    blocks: Sequence[Block]
    packed: list[tuple[Unit, list[tuple[str, nn.Parameter]]]]
    numbers: list[UnitNumbers]
    plan: Plan
    ram_bytes: int
    gpu_bytes: int
    nvme_limit_bytes: int
    buffer_bytes: int  # of the model's buffers, which stay on the device
    import_bytes: int  # of host memory, while weights are taken home


def plan_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    nvme: Any,
    nvme_limit: int | str | None,
    ram: int | str | None,
    gpu: int | str | None,
    device: str | torch.device | None,
    config: Config,
    import_bytes: int = 0,
) -> Planned:
    """Raises all that `wrap` raises before it opens the tiers; changes nothing. `import_bytes`: of `ram`, what importing the
    weights takes beside the arenas."""
    check_optimizer(optimizer)
    name_optimizer_strangers(model, optimizer)
    target = resolve_device(device)
    ram_bytes, gpu_bytes = _budgets(ram, gpu, target)
    folders = _folders(nvme)
    blocks = find_blocks(model, config.blocks)
    refuse_compiled_around(model, blocks)
    packed = make_units(model, optimizer, blocks, config.precision, target)
    numbers = [numbers_of(unit, named) for unit, named in packed]
    buffers = sum(buffer.numel() * buffer.itemsize for buffer in model.buffers())
    durable = config.durability == "step" or (config.durability is None and bool(folders))
    if durable and not folders:
        raise ConfigError("durability='step' commits steps to a drive: give an nvme folder, or leave durability out.")
    if config.activations == "nvme" and not folders:
        raise ConfigError("activations='nvme' swaps to a drive: give an nvme folder, or use 'host' or 'recompute'.")
    rooms = rooms_of(folders, reuse=True)
    limit = nvme_limit_bytes(rooms, nvme_limit)
    plan = make_plan(
        numbers, ram_bytes=max(ram_bytes - import_bytes, 1), gpu_bytes=gpu_bytes, device_kind=target.type, buffer_bytes=buffers,
        with_nvme=bool(folders), nvme_limit_bytes=limit, durable=durable, update=config.update,
        activations=config.activations,
    )  # fmt: skip
    if durable:
        # What records are too small for: about 200 bytes of JSON a parameter, and the buffers.
        aside = 200 * sum(len(named) for _, named in packed) + 64 * plan.committed + buffers + 2 * plan.aside_bytes
        pieces = aside // plan.aside_bytes
        extents = plan.committed + pieces
        records = overhead_bytes(extents, extents * plan.state_slots * len(folders))
        nvme_bytes = plan.nvme_bytes + records + plan.state_slots * pieces * plan.aside_bytes
        plan = replace(plan, nvme_bytes=nvme_bytes, aside_pieces=pieces)
    refuse_without_room(plan.nvme_bytes, limit, rooms)
    return Planned(
        target, folders, rooms, blocks, packed, numbers, plan, ram_bytes, gpu_bytes, limit, buffers, import_bytes
    )


def _folders(nvme: Any) -> list[str]:
    if nvme is None:
        return []
    folders = [nvme] if isinstance(nvme, (str, os.PathLike)) else list(nvme)
    if not folders:
        raise ConfigError("nvme=[] names no folder: give at least one, or None to keep everything in host memory.")
    return check_folders([os.fspath(each) for each in folders])


def _budgets(ram: int | str | None, gpu: int | str | None, device: torch.device) -> tuple[int, int]:
    """(ram, gpu) in bytes: as given, else 80 % of what is free; on a CPU the two share it."""
    ram_bytes = parse_bytes(ram, "ram") if ram is not None else None
    gpu_bytes = parse_bytes(gpu, "gpu") if gpu is not None else None
    if device.type == "cuda" and gpu_bytes is None:
        gpu_bytes = int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    free = int(free_host_bytes() * FREE_SHARE)
    if ram_bytes is None and gpu_bytes is None:
        return free // 2, free - free // 2
    if ram_bytes is None:
        ram_bytes = free if device.type == "cuda" else max(free - (gpu_bytes or 0), 1)
    if gpu_bytes is None:
        gpu_bytes = max(free - ram_bytes, 1)
    return ram_bytes, gpu_bytes
