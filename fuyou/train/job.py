"""One `fuyou train` job, from its configuration to the exported model. Whatever can be refused is refused before the
output folder is made."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuyou.api import Run, wrap
from fuyou.core.errors import ConfigError, FuyouError
from fuyou.report import Report
from fuyou.tiers.folders import check_folders
from fuyou.train.adapters import add_adapters
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows, make_rows
from fuyou.train.documents import read_documents, split
from fuyou.train.loop import end_checkpoints, epoch_count, save_checkpoint, step_count, train
from fuyou.train.model import load_configuration, load_model, load_tokenizer
from fuyou.train.output import check_output, opened_output, say
from fuyou.train.packing import allows_packing
from fuyou.train.preview import preview
from fuyou.train.report_job import read_metrics
from fuyou.train.resume import checkpoints
from fuyou.train.signals import Stop


@dataclass(frozen=True)
class Inputs:
    tokenizer: Any
    training: Rows
    held_out: Rows | None

    def statistics(self) -> dict[str, Any]:
        """What the data came to, by set."""
        sets = {"training": self.training, "held_out": self.held_out}
        return {name: rows.statistics.to_dict() for name, rows in sets.items() if rows is not None}


def run_job(config: TrainConfig, dry_run: bool = False, resume: bool | str | None = None) -> None:
    """Train as `config` says and fill its output folder: config.yaml, metrics.jsonl, report.json, report.html, model/.

    dry_run: resolve everything, refuse what would be refused, print what would run, and leave nothing behind. resume: what
    the run goes on from, as Config's; then the folder is its own. False: steps that the nvme folders hold are discarded.
    """
    output = Path(config.output)
    if not resume:
        check_output(output)
    check_folders(config.nvme_folders())
    inputs = read_inputs(config)
    seed_everything(config.seed)
    model, notes = load_model(config.model, config.precision, config.sequence_length)
    for note in notes:
        say(note)
    if config.lora is not None:
        model = add_adapters(model, config.lora, config.seed)
    optimizer = make_optimizer(model, config)
    if dry_run:
        print(preview(model, optimizer, config, inputs.training))
        return

    with wrapped(model, optimizer, config, resume) as run:
        with opened_output(output, config, going_on=bool(resume)) as metrics, Stop() as stop:
            if not run.user_state:
                seed_everything(config.seed)  # again: what loading and wrapping drew must not matter
            run.post_mortem.folder = output
            try:
                result = train(run, config, inputs.training, inputs.held_out, metrics, stop)
            except BaseException as error:
                run.post_mortem.notice(error, "training")
                say_how_to_go_on(run, config)
                raise
        run.save_pretrained(output / "model", merge_adapters=config.lora is not None and config.lora.merge)
        inputs.tokenizer.save_pretrained(output / "model")
        report = Report({**run.report().dict(), "data": inputs.statistics()}, read_metrics(output))
        report.save(output / "report.html")
        report.save(output / "report.json")  # last: a run that has one is complete
        print(report.table())
    print(summary(output, result))


def say_how_to_go_on(run: Run, config: TrainConfig) -> None:
    """The job is broken off: which step is complete, and what goes on from it. Where no step is committed, one is saved."""
    with contextlib.suppress(FuyouError):  # of a drive, say, that failed: its last step stands
        end_checkpoints(run, config)
        if config.nvme is None or config.durability == "checkpoint":
            save_checkpoint(run, config, run.user_state.get("step", 0))
    saved = [path.name.removeprefix("step-") for path in checkpoints(Path(config.output))[-1:]]
    step = run.committed_step or (saved[0] if saved else 0)
    if step:
        say(f"Step {step} is complete: `fuyou resume {config.output}` goes on from it.")


def wrapped(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, resume: bool | str | None = None
) -> Run:
    """The run, with what it warns of and notes said a sentence a line."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run = wrap(
            model,
            optimizer,
            nvme=config.nvme,
            nvme_limit=config.nvme_limit,
            ram=config.ram,
            gpu=config.gpu,
            device=config.device,
            config=config.core(resume),
        )
    for line in dict.fromkeys([*run.report().dict()["notes"], *(str(each.message) for each in warned)]):
        say(line)
    return run


def read_inputs(config: TrainConfig) -> Inputs:
    """Tokenizer and rows; ConfigError or DataError for what cannot be trained on. Says what the data came to."""
    documents = read_documents(config.data)
    configuration = load_configuration(config.model)
    tokenizer = load_tokenizer(config.model, config.sequence_length, configuration)
    learnt, kept_back = split(documents, config.eval_share, config.seed)
    isolation = allows_packing(configuration)
    training = make_rows(learnt, tokenizer, config.sequence_length, config.packing, "training", isolation, config.seed)
    held_out = None
    if kept_back:
        held_out = make_rows(kept_back, tokenizer, config.sequence_length, config.packing, "held-out", isolation)
    steps = step_count(config, len(training))
    if config.warmup_steps > steps:
        raise ConfigError(
            f"warmup_steps={config.warmup_steps} is more than the {steps} steps of this data: warm up for fewer."
        )
    for rows in (training, held_out):
        for line in (*rows.statistics.lines(), *rows.notes) if rows is not None else ():
            say(line)
    say(f"{steps:,} steps: {epoch_count(config, len(training)):.4g} epochs of the training rows.")
    return Inputs(tokenizer, training, held_out)


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is not frozen, in two groups: matrices decay, biases and norms (one dimension) do not."""
    return adamw([parameter for parameter in model.parameters() if parameter.requires_grad], config)


def adamw(trained: Sequence[torch.Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """`make_optimizer`, of tensors."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def summary(output: Path, result: dict[str, Any]) -> str:
    """What a person wants to see last: the losses, and where everything is."""
    rows: list[Sequence[str]] = []
    if result["skipped"]:
        rows.append(("skipped", f"{result['skipped']} of {result['steps']} updates: loss or gradient was not finite"))
    if result["eval_loss_after"] is not None:
        before, after = result["eval_loss_before"], result["eval_loss_after"]
        rows.append(("held-out loss", f"{before:.4f} before, {after:.4f} after {result['steps']} steps"))
    rows += [
        ("model", str(output / "model")),
        ("metrics", str(output / "metrics.jsonl")),
        ("report", f"{output / 'report.html'} (and report.json)"),
        ("configuration", str(output / "config.yaml")),
    ]
    return "\n" + "\n".join(f"{name:<15}{value}" for name, value in rows)
