"""The training loop: what a user of `fuyou.wrap` would write, with held-out loss, metrics and a progress bar."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from fuyou.core.errors import ConfigError, DivergedError
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows
from fuyou.train.live import Live
from fuyou.train.loss import DeferredHead
from fuyou.train.output import Metrics, say
from fuyou.train.resume import CHECKPOINTS, prune
from fuyou.train.schedule import learning_rate_factor
from fuyou.train.signals import Stop

SKIPS_IN_A_ROW = 10  # updates left out one after another, under `nonfinite: skip`, before a run is given up


def row_count(config: TrainConfig, rows: int) -> int:
    """Rows that the run sees. `epochs` sees every row that often, so its last step may be smaller than the others."""
    if config.steps is not None:
        return config.steps * config.batch_size * config.accumulation
    return math.ceil(Fraction(repr(config.epochs or 1.0)) * rows)  # as it is written: 0.1 of 30 rows is 3, not 4


def step_count(config: TrainConfig, rows: int) -> int:
    """Steps of the run: `accumulation` backwards of `batch_size` rows each, but for what is left over at the end."""
    return -(-row_count(config, rows) // (config.batch_size * config.accumulation))


def epoch_count(config: TrainConfig, rows: int) -> float:
    return row_count(config, rows) / rows


def row_order(rows: int, seed: int) -> Iterator[int]:
    """Row numbers without end: one permutation an epoch, drawn from seed + epoch."""
    epoch = 0
    while True:
        yield from torch.randperm(rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        epoch += 1


def row_batches(config: TrainConfig, rows: int) -> Iterator[list[list[int]]]:
    """The row numbers of every backward of every step."""
    order = itertools.islice(row_order(rows, config.seed), row_count(config, rows))
    while step := list(itertools.islice(order, config.batch_size * config.accumulation)):
        yield [step[start : start + config.batch_size] for start in range(0, len(step), config.batch_size)]


def train(
    run: Any, config: TrainConfig, training: Rows, held_out: Rows | None, metrics: Metrics, stop: Stop
) -> dict[str, Any]:
    """Train `run.model` for all its steps; return {"steps", "skipped", "eval_loss_before", "eval_loss_after"}.

    The loss of a step is the plain mean of its backwards' losses, each a mean over that batch's own labels: backward is
    called on loss / backwards, as in a plain PyTorch loop. Where the loss or the gradient norm of a step is not finite,
    its update is not made: DivergedError, or with `nonfinite: skip` training goes on with the next rows, until
    `SKIPS_IN_A_ROW` steps in a row came to nothing.

    `run.user_state` says how far the loop has come; where the run goes on from a step, so does the loop. A checkpoint is
    saved every `save_every` steps. StoppedError when `stop` was asked for, after a step.
    """
    steps = step_count(config, len(training))
    scheduler = LambdaLR(run.optimizer, learning_rate_factor(config.schedule, config.warmup_steps, steps))
    head = DeferredHead(run.model, say) if config.loss == "chunked" else None
    run.register("schedule", scheduler)
    first = run.user_state.get("step", 0)
    losses = {int(step): loss for step, loss in run.user_state.get("losses", {}).items()}
    skipped, in_a_row = run.user_state.get("skipped", 0), run.user_state.get("in_a_row", 0)
    metrics.cut_back(first)

    def evaluate(step: int) -> None:
        if held_out is not None and step not in losses:
            started = time.perf_counter()
            losses[step], tokens = held_out_loss(run, held_out, config.batch_size, head)
            seconds = time.perf_counter() - started
            metrics.write_evaluation(
                step=step, eval_loss=_number(losses[step]), tokens=tokens, seconds=round(seconds, 4)
            )
            live.write(f"step {step}: held-out loss {losses[step]:.4f}")

    with Live(run, steps, first) as live:
        if first and config.save_every is not None and first % config.save_every == 0:
            save_checkpoint(run, config, first)  # which may have been under way when the run was broken off
        if first == 0 or (config.eval_every is not None and first % config.eval_every == 0):
            evaluate(first)
        run.model.train()
        for step, batches in itertools.islice(enumerate(row_batches(config, len(training)), start=1), first, None):
            stop.check(step - 1)
            started = time.perf_counter()
            learning_rate = scheduler.get_last_lr()[0]

            loss = accumulate(run, training, batches, step, head)
            norm = clip(run, config) if math.isfinite(loss) else None
            problem = _not_finite(step, loss, norm)
            if not problem:
                told = {str(at): value for at, value in losses.items()}
                run.user_state.update(step=step, skipped=skipped, in_a_row=0, losses=told)
                run.optimizer.step()
            _advance(scheduler, stepped=not problem)
            run.optimizer.zero_grad()

            in_a_row = in_a_row + 1 if problem else 0
            skipped += bool(problem)
            if problem:
                _go_on_or_stop(problem, config.nonfinite, in_a_row, live)
            seconds = time.perf_counter() - started
            tokens = sum(training.token_count(rows) for rows in batches)
            metrics.write_step(
                step=step, loss=_number(loss), lr=learning_rate, grad_norm=_number(norm), tokens=tokens,
                seconds=round(seconds, 4), skipped=skipped,
            )  # fmt: skip
            live.step(loss, tokens, seconds)
            if config.save_every is not None and step % config.save_every == 0:
                save_checkpoint(run, config, step)
            if stop.asked is None and config.eval_every is not None and step % config.eval_every == 0:
                evaluate(step)
        stop.check(steps)
        evaluate(steps)
        end_checkpoints(run, config)
    return {
        "steps": steps, "skipped": skipped, "eval_loss_before": losses.get(0), "eval_loss_after": losses.get(steps),
    }  # fmt: skip


def save_checkpoint(run: Any, config: TrainConfig, step: int) -> None:
    """Begin output/checkpoints/step-N, unless the run saved it before it was broken off; the oldest of too many go."""
    folder = Path(config.output) / CHECKPOINTS / f"step-{step}"
    if not folder.exists():
        run.save(folder)
    prune(Path(config.output), config.save_total_limit)


def end_checkpoints(run: Any, config: TrainConfig) -> None:
    """The last one is there, and no more than there may be."""
    run.settle()
    prune(Path(config.output), config.save_total_limit)


def held_out_loss(run: Any, rows: Rows, batch_size: int, head: DeferredHead | None) -> tuple[float, int]:
    """(mean loss a predicted token, how many were predicted), whatever the batch size; the mode is put back after."""
    was_training = run.model.training
    run.model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                some = range(start, min(start + batch_size, len(rows)))
                predicted = rows.predicted(some)
                total += _loss(run, rows.batch(some, run.device), head).item() * predicted
                count += predicted
    finally:
        run.model.train(was_training)
    return total / count, count


def accumulate(run: Any, rows: Rows, batches: list[list[int]], step: int, head: DeferredHead | None) -> float:
    """Backward over every batch; the mean of their losses. It stops at the first loss that is not finite."""
    total = 0.0
    for some in batches:
        loss = _loss(run, rows.batch(some, run.device), head)
        value = loss.item()
        if not math.isfinite(value):
            return value
        if not loss.requires_grad:
            raise ConfigError(
                f"The loss of step {step} depends on no parameter that is trained: unfreeze parameters, or add adapters "
                "(lora)."
            )
        (loss / len(batches)).backward()
        total += value
    return total / len(batches)


def clip(run: Any, config: TrainConfig) -> float | None:
    """The gradient's norm, clipped to max_grad_norm. Not computed where it is neither clipped nor looked at."""
    if config.max_grad_norm:
        return torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.max_grad_norm).item()
    if config.nonfinite == "stop":
        return None  # the next loss tells
    gradients = [each.grad for each in run.model.parameters() if each.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def _advance(scheduler: LambdaLR, stepped: bool) -> None:
    """The schedule follows the step's number. torch warns where the optimizer has not stepped before, as is meant here."""
    with warnings.catch_warnings():
        if not stepped:
            warnings.simplefilter("ignore", UserWarning)
        scheduler.step()


def _not_finite(step: int, loss: float, norm: float | None) -> str:
    """What is wrong with the step, or nothing."""
    if not math.isfinite(loss):
        return f"The loss of step {step} is {loss}"
    return "" if norm is None or math.isfinite(norm) else f"The gradient norm of step {step} is {norm}"


def _go_on_or_stop(problem: str, nonfinite: str, in_a_row: int, live: Live) -> None:
    advice = "lower the learning rate, warm up for longer, or clip (max_grad_norm)"
    if nonfinite == "stop":
        raise DivergedError(
            f"{problem}: training stopped before its update. {advice.capitalize()}; `nonfinite: skip` leaves out such "
            "updates."
        )
    if in_a_row == SKIPS_IN_A_ROW:
        raise DivergedError(
            f"{problem}, and so were the {in_a_row - 1} steps before it: the model does not recover. {advice.capitalize()}."
        )
    live.write(f"{problem}: its update is skipped.")


def _loss(run: Any, batch: dict[str, torch.Tensor], head: DeferredHead | None) -> torch.Tensor:
    """The model's own loss on a batch, its logits deferred where there is a `head`. ConfigError where it returns none."""
    options = {"use_cache": False} if takes(run.model, "use_cache") else {}  # keys and values are of no use to a loss
    with head.deferring() if head is not None else contextlib.nullcontext():
        output = run.model(**batch, **options)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shown = "none" if loss is None else f"one of shape {tuple(getattr(loss, 'shape', ()))}"
        raise ConfigError(
            f"The model {type(run.model).__name__} was given labels and returned {shown} as loss: fuyou train needs one "
            "that computes a mean loss from `labels`, as transformers' causal language models do; train others with "
            "fuyou.wrap and your own loop."
        )
    return loss


def takes(model: Any, argument: str) -> bool:
    """Whether the model's forward has `argument`; PEFT's wrapper passes on what the model inside takes."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return argument in inspect.signature(inside.forward).parameters


def _number(value: float | None) -> float | None:
    """JSON has no inf and no nan."""
    return value if value is not None and math.isfinite(value) else None
