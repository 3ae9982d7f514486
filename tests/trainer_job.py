"""The process that test_trainer_killed.py kills: a fork in which an unmodified transformers.Trainer trains and saves."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import clients
import models
from clients import Side
from resuming import digest
from test_trainer import logs_of, trainer_of

import fuyou

STEPS, SAVE_STEPS = 14, 3


def is_whole(checkpoint: Path) -> bool:
    """The Trainer writes trainer_state.json last: a checkpoint without it was being saved when its process was killed."""
    with contextlib.suppress(OSError, ValueError):
        json.loads((checkpoint / "trainer_state.json").read_text())
        return True
    return False


def train(side: Side) -> list[dict[str, Any]]:
    """To the last step, from the newest checkpoint where there is one; what it has logged since the very first step."""
    checkpoints = [*side.folder.glob("checkpoint-*")]
    for each in checkpoints:
        if not is_whole(each):
            shutil.rmtree(each)
    trainer = trainer_of(
        side, max_steps=STEPS, save_strategy="steps", save_steps=SAVE_STEPS, save_total_limit=2, seed=11
    )
    trainer.train(resume_from_checkpoint=any(each.exists() for each in checkpoints))
    return logs_of(trainer)


def plain(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What is never killed, without fuyou."""
    logs, values = clients.plain(train, models.CASES["llama"].model, folder)
    return logs, digest(values)


def work(folder: Path, options: dict[str, Any]) -> None:
    """Leaves (logs, digest of the weights) in folder/result when it is through."""
    model, optimizer, scheduler = clients.started(models.CASES["llama"].model)
    with clients.wrapped(model, optimizer, folder / "nvme", ram="320KiB", config=fuyou.Config(**options)) as run:
        (folder / "began").touch()
        logs = train(Side(model, run.optimizer, scheduler, folder / "output", run))
        result = [logs, digest(models.values_of(model))]
    (folder / "result").write_text(json.dumps(result))
