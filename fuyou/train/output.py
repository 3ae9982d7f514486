"""The folder of a run: made when training starts, and gone again when not one step was done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fuyou.core.errors import ConfigError
from fuyou.train.config import TrainConfig, parse_yaml
from fuyou.train.resume import cut_metrics
from fuyou.train.trackers import Trackers

_BEGUN = ("config.yaml", "metrics.jsonl", "tensorboard", "wandb")  # what there is before the first step
_A_RUN = ("config.yaml", "metrics.jsonl", "report.json", "model")


class Metrics:
    """metrics.jsonl: an object a step, and one a held-out evaluation, each in the file as soon as it is known, and then
    with the trackers."""

    def __init__(self, path: Path, trackers: Trackers, going_on: bool = False) -> None:
        self._path = path
        self._file = path.open("a" if going_on else "x", encoding="utf-8")
        self._trackers = trackers
        self.steps = 0

    def write_step(self, **values: Any) -> None:
        """step, loss, lr, grad_norm (null without clipping), tokens (padding not counted), seconds, skipped (updates
        left out so far). A loss or norm that is not finite is null."""
        self.steps += 1
        self._write(values)

    def write_evaluation(self, **values: Any) -> None:
        """step (0: before the first), eval_loss, tokens (that were predicted), seconds."""
        self._write(values)

    def cut_back(self, step: int) -> None:
        """The run goes on from `step`: what came after it is not there any more."""
        self._file.close()
        cut_metrics(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()
        self._trackers.close()

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        self._trackers.log(values["step"], values)


def check_output(output: Path) -> None:
    """ConfigError where `output` holds a run already, or cannot be made."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output={output} is a file: name a folder that does not exist yet.")
    held = [name for name in _A_RUN if (output / name).exists()]
    if held:
        raise ConfigError(
            f"The output folder {output} already holds a run{_which(output)} ({', '.join(held)}): name another, or move "
            "it away."
        )
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"The output folder {output} cannot be made: {above} is not a folder this user can write to.")


def _which(output: Path) -> str:
    """Of what, how far it came and when, as far as its files tell."""
    told = ""
    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        values = parse_yaml((output / "config.yaml").read_text("utf-8"))
        if isinstance(values, dict) and "model" in values:
            told += f" of model {values['model']}"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, IndexError):
        path = output / "metrics.jsonl"
        step = json.loads(path.read_text("utf-8").splitlines()[-1]).get("step")
        when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
        told += f" that came to step {step} at {when}"
    return told


@contextlib.contextmanager
def opened_output(output: Path, config: TrainConfig, going_on: bool = False) -> Iterator[Metrics]:
    """The folder with its config.yaml, open metrics and the trackers of `report_to`. A run that fails before its first
    step is done, such as one whose first backward passes a budget, leaves none of it behind; one that is `going_on`
    leaves all."""
    existed = output.exists()
    output.mkdir(parents=True, exist_ok=True)
    before = set(output.iterdir())
    (output / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    trackers = Trackers(config.report_to, output, config.model_dump(mode="json"), say)
    metrics = Metrics(output / "metrics.jsonl", trackers, going_on)
    try:
        yield metrics
    finally:
        metrics.close()
        if metrics.steps == 0 and not going_on:
            _remove_run(output, before)
            if not existed and not any(output.iterdir()):
                output.rmdir()


def _remove_run(output: Path, before: set[Path]) -> None:
    for path in [output / name for name in _BEGUN]:
        if path in before:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def say(text: str) -> None:
    """A line for the person who watches; standard output is for what the job came to."""
    print(text, file=sys.stderr, flush=True)
