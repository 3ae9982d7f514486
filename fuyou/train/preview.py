"""What a job would be: `fuyou train --dry-run`. Everything is resolved and checked as a run would, nothing is trained."""

from __future__ import annotations

import os

import torch
from torch import nn

from fuyou.api import _budgets
from fuyou.checkpoint.adapters import unwrapped
from fuyou.core.blocks import find_blocks
from fuyou.core.sizes import format_bytes
from fuyou.plan.planner import Plan, make_plan
from fuyou.runtime.build import STATE_SLOTS, make_units, numbers_of
from fuyou.runtime.optimizer import check_optimizer
from fuyou.runtime.tiers import nvme_limit_bytes
from fuyou.tiers.device import resolve_device
from fuyou.tiers.io import open_engine
from fuyou.tiers.lock import FolderLock
from fuyou.tiers.store import FOLDER, check_folders, memory_folders
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows
from fuyou.train.loop import epoch_count, step_count


def preview(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, training: Rows) -> str:
    """A table of what would run. Raises what `fuyou.wrap` raises for the same model, folders and budgets: the plan is
    made by the same functions; only that a batch's activations fit is known when it runs."""
    plan, limits, device = _plan(model, optimizer, config)
    in_memory = memory_folders(config.nvme_folders())
    steps = step_count(config, len(training))
    tokens = int(training.lengths.sum())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    dtypes = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()}))
    rows = [
        ("model", f"{config.model}: {type(unwrapped(model)).__name__}, {dtypes}"),
        ("parameters", f"{parameters:,}, of which {trained:,} ({trained / parameters:.2%}) are trained"),
        ("data", f"{len(training):,} rows of {config.sequence_length} tokens, {tokens:,} tokens without padding"),
        (
            "steps",
            f"{steps:,} of {config.accumulation} x {config.batch_size} rows: {epoch_count(config, len(training)):.4g} epochs",
        ),
        ("device", f"{device}: {format_bytes(plan.slot_limit_bytes)} for weights, of {format_bytes(limits['gpu'])}"),
        ("host", f"{format_bytes(plan.arena_bytes)} of {format_bytes(limits['ram'])}"),
        ("nvme", f"{format_bytes(plan.nvme_bytes)} of {format_bytes(limits['nvme'])}" if config.nvme else "none"),
        ("output", config.output),
        *(("note", f"{folder} is on a {kind}: its bytes are RAM") for folder, kind in in_memory.items()),
    ]
    return "\n".join([*(f"{name:<15}{value}" for name, value in rows), "dry run: nothing was trained or written."])


def _plan(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[Plan, dict[str, int], torch.device]:
    """(plan, bytes of each budget, device), as `Run` makes them."""
    core = config.core()
    check_optimizer(optimizer)
    device = resolve_device(config.device)
    ram_bytes, gpu_bytes = _budgets(config.ram, config.gpu, device)
    folders = check_folders(config.nvme_folders())
    if folders:
        open_engine(core.io).close()
        for folder in folders:
            _refuse_in_use(folder)
    packed = make_units(model, optimizer, find_blocks(model, core.blocks), core.precision, device)
    plan = make_plan(
        [numbers_of(unit, named) for unit, named in packed],
        ram_bytes=ram_bytes,
        gpu_bytes=gpu_bytes,
        device_kind=device.type,
        buffer_bytes=sum(buffer.numel() * buffer.itemsize for buffer in model.buffers()),
        state_slots=STATE_SLOTS,
        with_nvme=bool(folders),
    )
    limit = nvme_limit_bytes(folders, config.nvme_limit, plan)
    return plan, {"ram": ram_bytes, "gpu": gpu_bytes, "nvme": limit}, device


def _refuse_in_use(folder: str) -> None:
    """StoreError where another run holds the folder. One that was killed has left its lock file: it goes."""
    store = os.path.join(folder, FOLDER)
    if os.path.exists(os.path.join(store, "lock")):
        FolderLock(store).release()
