"""What a job would be: `fuyou train --dry-run`. Everything is resolved and checked as a run would, nothing is trained."""

from __future__ import annotations

import os

import torch
from torch import nn

from fuyou.checkpoint.adapters import unwrapped
from fuyou.checkpoint.stored import converted_bytes
from fuyou.core.sizes import format_bytes
from fuyou.runtime.planned import Planned, plan_run
from fuyou.tiers.folders import FOLDER, memory_folders
from fuyou.tiers.io import open_engine
from fuyou.tiers.io.tuning import remembered
from fuyou.tiers.lock import FolderLock
from fuyou.tiers.shares import Shares
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows
from fuyou.train.loop import epoch_count, step_count
from fuyou.train.loss import why_not


def preview(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, training: Rows) -> str:
    """A table of what would run. Raises what `fuyou.wrap` raises for the same model, folders and budgets: the plan is
    made by the same functions; only that a batch's activations fit is known when it runs."""
    planned = _planned(model, optimizer, config)
    plan = planned.plan
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
        ("loss", _loss(model, config)),
        (
            "device",
            f"{planned.device}: {format_bytes(plan.slot_limit_bytes)} for weights, of {format_bytes(planned.gpu_bytes)}",
        ),
        ("host", f"{format_bytes(plan.arena_bytes)} of {format_bytes(planned.ram_bytes)}"),
        (
            "nvme",
            f"{format_bytes(plan.nvme_bytes)} of {format_bytes(planned.nvme_limit_bytes)}" if config.nvme else "none",
        ),
        *(("drive", text) for text in _drives(planned, config.io)),
        ("output", config.output),
        *(("note", f"{folder} is on a {kind}: its bytes are RAM") for folder, kind in in_memory.items()),
        *(("note", f"{', '.join(each)} share a file system, its room and its speed") for each in planned.rooms.shared),
    ]
    return "\n".join([*(f"{name:<15}{value}" for name, value in rows), "dry run: nothing was trained or written."])


def _loss(model: nn.Module, config: TrainConfig) -> str:
    reason = "as asked" if config.loss == "model" else why_not(model)
    return f"over all logits of a batch at once: {reason}" if reason else "from the last hidden states, logits in tiles"


def _drives(planned: Planned, io: str) -> list[str]:
    """Of several drives, what each can hold, how fast it was when it was last measured, and its share of the bytes."""
    rooms = planned.rooms
    if len(rooms.folders) < 2:
        return []
    with open_engine(io) as engine:
        found = [remembered(folder, engine.name) for folder in rooms.folders]
    speeds = [each.mixed_bytes_per_s if each is not None else 0.0 for each in found]
    shares = Shares(speeds, rooms.pools, rooms.room_bytes, [0] * len(speeds), planned.plan.nvme_bytes).weights
    return [
        f"{folder}: room for {format_bytes(rooms.room_bytes[pool])}, "
        f"{f'{format_bytes(speed)}/s' if speed else 'not measured yet'}, takes {share:.0%}"
        for folder, pool, speed, share in zip(rooms.folders, rooms.pools, speeds, shares, strict=True)
    ]


def _planned(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> Planned:
    """What `wrap` decides, and what it finds out when it opens the tiers."""
    core = config.core()
    planned = plan_run(
        model, optimizer, config.nvme, config.nvme_limit, config.ram, config.gpu, config.device, core,
        import_bytes=converted_bytes(model),
    )  # fmt: skip
    if planned.folders:
        open_engine(core.io, deadline_s=core.deadline_s).close()
        for folder in planned.folders:
            _refuse_in_use(folder)
    return planned


def _refuse_in_use(folder: str) -> None:
    """StoreError where another run holds the folder. One that was killed has left its lock file: it goes."""
    store = os.path.join(folder, FOLDER)
    if os.path.exists(os.path.join(store, "lock")):
        FolderLock(store).release()
