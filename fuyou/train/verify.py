"""`fuyou verify`: some steps of a job with fuyou and in plain PyTorch, and what the two came to.

Plain PyTorch comes first, alone in memory; of it stay the parameters. Then fuyou trains, with the job's budgets, in folders
of its own inside the job's nvme folders, which go with it: the run's output and its store are not touched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import tempfile
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch

from fuyou.core.errors import BudgetError, ConfigError, DivergedError, StoppedError
from fuyou.core.sizes import format_bytes, parse_bytes
from fuyou.runtime.measure import free_host_bytes, trim_heap
from fuyou.tiers.device import resolve_device
from fuyou.tiers.folders import check_folders
from fuyou.train.adapters import add_adapters
from fuyou.train.comparing import TOLERANCE, Difference, Verdict, difference, moved_square, verdict, worst_first
from fuyou.train.config import TrainConfig
from fuyou.train.data import Rows
from fuyou.train.job import make_optimizer, read_inputs, seed_everything, wrapped
from fuyou.train.loop import accumulate, clip, row_batches, step_count
from fuyou.train.loss import DeferredHead
from fuyou.train.model import load_model
from fuyou.train.output import say
from fuyou.train.plain import BYTES_PER_PARAMETER, Plain, limited_activations
from fuyou.train.scale_down import cut, elements_of, layers_of, layers_that_fit, plain_model
from fuyou.train.schedule import learning_rate_factor

EXACT, WRONG = 0, 1
STATE_SHARE, ACTIVATION_SHARE = 0.5, 0.3  # of free memory, for plain PyTorch
SHOWN = 5  # parameters that differ
WIDTH, INDENT = 120, 12
_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Trained:
    """What one side came to, or of which the other is compared: by parameter's name, on the CPU."""

    losses: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # fp32 masters, where there are masters
    moved_squares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verified:
    """`gradients`: where wrong, the parameters whose gradient in the first step differs, with its norm on both sides."""

    verdict: Verdict
    steps: int
    layers: int
    layers_of_model: int
    parameters: int
    tensors: int
    plain_losses: list[float]
    fuyou_losses: list[float]
    differences: list[Difference]  # of the parameters that differ, the largest relative one first
    gradients: list[tuple[str, float, float]]


def verify(config: TrainConfig, steps: int, layers: int | None, as_json: bool) -> int:
    """Print what came of it; 1 where fuyou was wrong. ConfigError, DataError or BudgetError for what cannot be compared."""
    with _stopped_by_sigterm():
        found = compare(config, steps, layers)
    print(json.dumps(to_dict(found), indent=2) if as_json else table(found))
    return WRONG if found.verdict == "wrong" else EXACT


def compare(config: TrainConfig, steps: int, layers: int | None = None) -> Verified:
    """`steps` of the job with as many of its layers as fit (`layers`: at most)."""
    check_folders(config.nvme_folders())
    rows = read_inputs(config).training
    steps = min(steps, step_count(config, len(rows)))
    device = resolve_device(config.device)
    job = _Job(config, rows, steps, device, *_scale(config, device, layers))
    plain = _plain_side(job)
    trim_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what plain PyTorch's allocator kept is free for fuyou's
    losses, differences = _fuyou_side(job, plain)
    promised = device.type == "cpu" and config.micro_batch is None and _has_avx2()
    found = verdict(differences, losses == plain.losses, promised)
    gradients = _spoiled_gradients(job) if found == "wrong" else []
    return Verified(
        found, steps, job.layers, job.layers_of_model, sum(each.count for each in differences), len(differences),
        plain.losses, losses, worst_first(differences), gradients,
    )  # fmt: skip


# --- what fits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    config: TrainConfig
    rows: Rows
    steps: int
    device: torch.device
    layers: int
    layers_of_model: int
    share: float  # of the model's elements that are left
    activation_limit_bytes: int

    @property
    def tier(self) -> str:
        return "host" if self.device.type == "cpu" else "device"


def _scale(config: TrainConfig, device: torch.device, most: int | None) -> tuple[int, int, float, int]:
    """(layers that are left, layers of the model, share of its elements, bytes of activations at most)."""
    model, _ = load_model(config.model, config.precision, config.sequence_length)
    total, before = elements_of(model), len(layers_of(model))
    free = free_host_bytes()
    fits = [layers_that_fit(model, BYTES_PER_PARAMETER, int(free * STATE_SHARE), "host")]
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        each = 2 * next(model.parameters()).itemsize  # weight and gradient
        fits.append(layers_that_fit(model, each, int(free * STATE_SHARE), "device"))
    count = min([*fits, *([] if most is None else [most])])
    if count < before:
        why = "as asked" if most is not None and count == most else "which is what plain PyTorch has memory for"
        say(f"The first {count} of {before} layers are compared, {why}.")
        cut(model, count)
    return count, before, elements_of(model) / total, int(free * ACTIVATION_SHARE)


def _has_avx2() -> bool:
    """Or better: torch's update has the bits that fuyou promises there."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT"


# --- the two sides --------------------------------------------------------------------------------------------------


def _plain_side(job: _Job, gradients: dict[str, tuple[int, float]] | None = None) -> Trained:
    """`gradients`, where given, is filled with those of the first step, and no more is done."""
    config = job.config
    seed_everything(config.seed)
    model = plain_model(config.model, _DTYPES[config.precision], job.layers_of_model, job.layers)
    if config.lora is not None:
        model = add_adapters(model, config.lora, config.seed)
    side = Plain(model, config, job.device)
    before = {name: master.detach().clone() for name, master in side.masters.items()}
    with limited_activations(side.model, job.activation_limit_bytes, job.tier):
        losses = _train(side, side.optimizer, job, gradients)
    found = Trained(losses)
    for name, master in side.masters.items():
        found.weights[name] = master.detach()
        found.moved_squares[name] = moved_square(before.pop(name), master.detach())
    side.zero_grad()
    for master in side.masters.values():
        master.grad = None
    return found


def _fuyou_side(
    job: _Job, plain: Trained, gradients: dict[str, tuple[int, float]] | None = None
) -> tuple[list[float], list[Difference]]:
    """(losses, the difference of every parameter)."""
    config = job.config
    with contextlib.ExitStack() as stack:
        folders = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="fuyou-verify-", dir=folder))
            for folder in config.nvme_folders()
        ]
        config = config.model_copy(update={"nvme": folders or None, "ram": _ram(job)})
        seed_everything(config.seed)
        model, _ = load_model(config.model, config.precision, config.sequence_length)
        if job.layers < job.layers_of_model:
            cut(model, job.layers)
        if config.lora is not None:
            model = add_adapters(model, config.lora, config.seed)
        _refuse_other_parameters(model, plain)
        with _wrapped(model, make_optimizer(model, config), config, job) as run:
            run.model.train()
            losses = _train(run, run.optimizer, job, gradients)
            run.settle()
            differences = [
                difference(name, plain.weights[name], _value(run, parameter), plain.moved_squares[name])
                for name, parameter in run.model.named_parameters()
                if name in plain.weights
            ]
    return losses, differences


def _train(side: Any, optimizer: Any, job: _Job, gradients: dict[str, tuple[int, float]] | None = None) -> list[float]:
    """The steps of `fuyou train`, by its own functions: the losses."""
    config = job.config
    of_job = step_count(config, len(job.rows))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, learning_rate_factor(config.schedule, config.warmup_steps, of_job)
    )
    head = DeferredHead(side.model, lambda _: None) if config.loss == "chunked" else None
    losses = []
    seed_everything(config.seed)
    for step, batches in enumerate(itertools.islice(row_batches(config, len(job.rows)), job.steps), start=1):
        loss = accumulate(side, job.rows, batches, step, head)
        if not math.isfinite(loss):
            raise DivergedError(
                f"The loss of step {step} is {loss}: there is nothing to compare. Lower the learning rate."
            )
        losses.append(loss)
        if gradients is not None:
            gradients |= {
                name: _digest(each.grad) for name, each in side.model.named_parameters() if each.requires_grad
            }
            return losses
        clip(side, config)
        (side if isinstance(side, Plain) else optimizer).step()
        scheduler.step()
        (side if isinstance(side, Plain) else optimizer).zero_grad()
    return losses


def _value(run: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The master where fuyou holds one, else the parameter."""
    state = run.optimizer.state[parameter] if parameter in run.optimizer.state else {}
    return (state["master"] if "master" in state else parameter).detach().cpu().clone()


def _ram(job: _Job) -> int | None:
    """The job's budget; of a model that was cut, as much less, so that what was streamed still is."""
    if job.config.ram is None:
        return None
    return max(int(parse_bytes(job.config.ram, "ram") * job.share), 1)


def _wrapped(model: Any, optimizer: Any, config: TrainConfig, job: _Job) -> Any:
    try:
        return wrapped(model, optimizer, config)
    except BudgetError as error:
        if job.share == 1 or error.tier != "host":
            raise
        say(f"Of a smaller model's budget less is needed, but at least {format_bytes(error.needed_bytes)} of ram.")
        return wrapped(model, optimizer, config.model_copy(update={"ram": error.needed_bytes}))


def _refuse_other_parameters(model: Any, plain: Trained) -> None:
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    if names != set(plain.weights):
        strange = sorted(names ^ set(plain.weights))[:3]
        raise ConfigError(
            f"fuyou and plain PyTorch have other parameters of this model ({', '.join(strange)}): it cannot be cut to fewer "
            "layers; verify it whole, on a machine with more memory."
        )


# --- where it went wrong --------------------------------------------------------------------------------------------


def _spoiled_gradients(job: _Job) -> list[tuple[str, float, float]]:
    """(name, norm in plain PyTorch, norm with fuyou) of the first step's gradients that differ. Both sides train that step
    once more: to look at gradients while training would be another training."""
    ours: dict[str, tuple[int, float]] = {}
    theirs: dict[str, tuple[int, float]] = {}
    plain = _plain_side(job, theirs)
    _fuyou_side(job, plain, ours)
    return [(name, theirs[name][1], ours[name][1]) for name in theirs if theirs[name][0] != ours[name][0]]


def _digest(gradient: Any) -> tuple[int, float]:
    """(checksum of its bytes, its norm)."""
    if gradient is None:
        return 0, 0.0
    values = gradient.detach().cpu().contiguous()
    return zlib.crc32(values.view(torch.uint8).numpy()), values.double().norm().item()


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM as an error, as Ctrl-C is: so that folders are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("SIGTERM: stopped, and nothing was compared.", exit_status=128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what is printed ------------------------------------------------------------------------------------------------


def to_dict(found: Verified) -> dict[str, Any]:
    """JSON-able; of parameters that differ all."""
    return {
        **asdict(found),
        "tolerance": TOLERANCE,
        "differences": [
            {**asdict(each), "relative": each.relative if math.isfinite(each.relative) else None}
            for each in found.differences
        ],
        "gradients": [{"name": name, "plain_norm": plain, "fuyou_norm": ours} for name, plain, ours in found.gradients],
    }


def table(found: Verified) -> str:
    rows = [
        ("verify", f"{found.verdict}: {_in_words(found)}"),
        (
            "compared",
            f"{found.steps} steps of {found.layers} of {found.layers_of_model} layers: {found.tensors} parameters, "
            f"{found.parameters:,} elements",
        ),
        ("loss", f"{_losses(found.plain_losses)} in plain PyTorch{_other_losses(found)}"),
    ]
    rows += [("differs", _difference(each)) for each in found.differences[:SHOWN]]
    if len(found.differences) > SHOWN:
        rows.append(("", f"and {len(found.differences) - SHOWN} more parameters by less"))
    rows += [
        ("gradient", f"{name}: of step 1 it has norm {plain:.6g} in plain PyTorch and {ours:.6g} with fuyou")
        for name, plain, ours in found.gradients[:SHOWN]
    ]
    if len(found.gradients) > SHOWN:
        rows.append(("", f"and {len(found.gradients) - SHOWN} more gradients differ"))
    return "\n".join(
        textwrap.fill(value, WIDTH, initial_indent=f"{name:<{INDENT}}", subsequent_indent=" " * INDENT,
                      break_long_words=False, break_on_hyphens=False)
        for name, value in rows
    )  # fmt: skip


def _in_words(found: Verified) -> str:
    if found.verdict == "exact":
        return "losses and parameters have the bits of plain PyTorch"
    if not found.differences:
        return "the losses differ, and the parameters do not"
    first = found.differences[0]
    names = [name for name, _, _ in found.gradients]
    blamed = f"; the gradient of {names[0]} is wrong" if len(names) == 1 else ""
    return f"the largest difference is {first.name}'s, {first.relative:.2%} of how far it has moved{blamed}"


def _difference(its: Difference) -> str:
    return (
        f"{its.name}: by {its.largest:.3g} at most, in {its.differing_count:,} of {its.count:,} elements; "
        f"{its.relative:.2%} of how far it has moved"
    )


def _losses(losses: Sequence[float]) -> str:
    return ", ".join(f"{each:.6g}" for each in losses)


def _other_losses(found: Verified) -> str:
    return ", and the same bits" if found.plain_losses == found.fuyou_losses else f"; {_losses(found.fuyou_losses)}"
