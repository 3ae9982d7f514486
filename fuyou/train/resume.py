"""`fuyou resume RUN`: what may change, where the run goes on from, and its folder as it was at that step."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from fuyou.checkpoint.partial import PartialFile, sync_folder
from fuyou.core.errors import ConfigError
from fuyou.tiers.saved import open_saved
from fuyou.tiers.saving import sweep_drafts
from fuyou.train.config import TrainConfig, read_config

CHECKPOINTS = "checkpoints"  # in the run's folder: step-N
_MAY_CHANGE = frozenset(
    """nvme nvme_limit ram gpu activations durability io verify_reads deadline_s adam_threads save_every save_total_limit
    report_to""".split()
)
_STEP = re.compile(r"step-(\d+)")


def read_run(run: Path, overrides: Sequence[str]) -> tuple[TrainConfig, str | bool]:
    """The configuration of a run with `key=value` strings over it, and what it goes on from (Config(resume)).

    ConfigError for a folder that holds no run, one that is complete, and a key that may not change.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} holds no run: name the output folder of `fuyou train`, with its config.yaml.")
    if (run / "report.json").exists():
        raise ConfigError(f"The run in {run} is complete: its model is in {run / 'model'}.")
    before, config = read_config(path), read_config(path, overrides)
    for key in TrainConfig.model_fields:
        if getattr(before, key) != getattr(config, key) and key not in _MAY_CHANGE:
            raise ConfigError(
                f"--set {key}={getattr(config, key)}: a run goes on with the {key} that it began with "
                f"({getattr(before, key)}); what may change is {', '.join(sorted(_MAY_CHANGE))}."
            )
    return config.model_copy(update={"output": str(run)}), _source(run, before, config)


def _source(run: Path, before: TrainConfig, config: TrainConfig) -> str | bool:
    """A store that is where the new one will be (True), or elsewhere; else the newest checkpoint."""
    if before.nvme is not None and before.durability != "checkpoint":
        old = [folder for folder in map(os.path.realpath, before.nvme_folders()) if os.path.isdir(folder)]
        new = [*map(os.path.realpath, config.nvme_folders())]
        if set(old) & set(new):
            return True
        saved = open_saved(old)
        if saved is not None:
            saved.close()
            return old[0]
    found = checkpoints(run)
    if not found:
        raise ConfigError(f"The run in {run} has no complete step and no checkpoint: begin anew with `fuyou train`.")
    return str(found[-1])


def checkpoints(run: Path) -> list[Path]:
    """Those in a run's folder, oldest first."""
    found = {}
    folder = run / CHECKPOINTS
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def prune(run: Path, limit: int | None) -> None:
    """Only the newest `limit` checkpoints stay; None: all. What a killed job left half-written of one, or half-removed, goes."""
    if (run / CHECKPOINTS).is_dir():
        sweep_drafts(str(run / CHECKPOINTS), ".step-")
    for path in checkpoints(run)[: -limit if limit else None] if limit else []:
        gone = path.with_name(f".{path.name}")  # a removal that is broken off leaves no half under its name
        path.rename(gone)
        shutil.rmtree(gone)


def cut_metrics(path: Path, step: int) -> None:
    """Back to what stood there when `step` was committed: the steps up to it, and the evaluations before it. A last line that
    was torn goes. Whole or as it was."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            values = json.loads(line)
            if line.endswith(b"\n") and values["step"] <= step - ("eval_loss" in values):
                kept.append(line)
    file = PartialFile(path)
    try:
        file.write(memoryview(b"".join(kept)))
        file.finish()
        file.publish()
    finally:
        file.discard()
    sync_folder(path.parent)
