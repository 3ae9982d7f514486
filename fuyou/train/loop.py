"""The training loop: what a user of `fuyou.wrap` would write, with held-out loss, metrics and a progress bar."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from fuyou.core.errors import DivergedError
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows
from fuyou.train.output import Metrics
from fuyou.train.schedule import learning_rate_factor


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


def train(run: Any, config: TrainConfig, training: Rows, held_out: Rows | None, metrics: Metrics) -> dict[str, Any]:
    """Train `run.model` for all its steps; return {"steps", "eval_loss_before", "eval_loss_after"}.

    The loss of a step is the plain mean of its backwards' losses, each a mean over that batch's own labels: backward is
    called on loss / accumulation, as in a plain PyTorch loop. Raises DivergedError before the update of the step whose
    loss or gradient norm is not finite.
    """
    steps = step_count(config, len(training))
    scheduler = LambdaLR(run.optimizer, learning_rate_factor(config.schedule, config.warmup_steps, steps))
    losses: dict[int, float] = {}

    def evaluate(step: int) -> None:
        if held_out is not None and step not in losses:
            started = time.perf_counter()
            losses[step], tokens = held_out_loss(run, held_out, config.batch_size)
            seconds = time.perf_counter() - started
            metrics.write_evaluation(step=step, eval_loss=losses[step], tokens=tokens, seconds=round(seconds, 4))
            bar.write(f"step {step}: held-out loss {losses[step]:.4f}", file=sys.stderr)

    with _progress(steps) as bar:
        evaluate(0)
        run.model.train()
        for step, batches in enumerate(row_batches(config, len(training)), start=1):
            started = time.perf_counter()
            learning_rate = scheduler.get_last_lr()[0]

            loss = _accumulate(run, training, batches, step)
            norm = _clip(run, config.max_grad_norm, step)
            run.optimizer.step()
            scheduler.step()
            run.optimizer.zero_grad()

            seconds = time.perf_counter() - started
            tokens = sum(training.token_count(rows) for rows in batches)
            metrics.write_step(
                step=step, loss=loss, lr=learning_rate, grad_norm=norm, tokens=tokens, seconds=round(seconds, 4)
            )
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
            if config.eval_every is not None and step % config.eval_every == 0:
                evaluate(step)
        evaluate(steps)
    return {"steps": steps, "eval_loss_before": losses.get(0), "eval_loss_after": losses.get(steps)}


def held_out_loss(run: Any, rows: Rows, batch_size: int) -> tuple[float, int]:
    """(mean loss a predicted token, how many were predicted), whatever the batch size; the mode is put back after."""
    was_training = run.model.training
    run.model.eval()
    total, count = 0.0, 0
    try:
        with torch.no_grad():
            for start in range(0, len(rows), batch_size):
                some = range(start, min(start + batch_size, len(rows)))
                predicted = rows.predicted(some)
                total += _loss(run, rows.batch(some, run.device)).item() * predicted
                count += predicted
    finally:
        run.model.train(was_training)
    return total / count, count


def _accumulate(run: Any, rows: Rows, batches: list[list[int]], step: int) -> float:
    """Backward over every batch; the mean of their losses."""
    total = 0.0
    for some in batches:
        loss = _loss(run, rows.batch(some, run.device))
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                f"The loss of step {step} is {value}: training stopped before its update. Lower the learning rate, "
                "warm up for longer, or clip (max_grad_norm)."
            )
        (loss / len(batches)).backward()
        total += value
    return total / len(batches)


def _clip(run: Any, max_grad_norm: float, step: int) -> float | None:
    if max_grad_norm == 0:
        return None
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_grad_norm).item()
    if not math.isfinite(norm):
        raise DivergedError(f"The gradient norm of step {step} is {norm}: training stopped before its update.")
    return norm


def _loss(run: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "use_cache" in inspect.signature(run.model.forward).parameters:  # keys and values are of no use to a loss
        return run.model(**batch, use_cache=False).loss
    return run.model(**batch).loss


def _progress(steps: int) -> tqdm:
    """A bar on a terminal; where standard error is a file, a line every 10 s at most."""
    return tqdm(total=steps, desc="training", unit="step", mininterval=0.5 if sys.stderr.isatty() else 10, ncols=100)
