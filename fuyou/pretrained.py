"""load_pretrained: a Hugging Face folder as a run, without the model ever being in memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.api import Run, wrap
from fuyou.checkpoint.imports import import_pretrained, in_short
from fuyou.core.config import Config
from fuyou.core.environment import LEFT_OUT, LeftOut
from fuyou.core.errors import ConfigError


def load_pretrained(
    folder: str | os.PathLike[str],
    optimizer: Mapping[str, Any] | Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    nvme: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | LeftOut | None = LEFT_OUT,
    nvme_limit: int | str | None = None,
    ram: int | str | None = None,
    gpu: int | str | None = None,
    device: str | torch.device | None = None,
    config: Config | None = None,
    *,
    model_class: Any = None,
    dtype: torch.dtype | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    initialize: Sequence[str] = (),
) -> Run:
    """Train the model in `folder`, whose safetensors files are streamed to where the budgets have room: it may be larger
    than host and device memory together. Every bit is as if `from_pretrained` had loaded it and `wrap` had wrapped it.

    optimizer: options of torch.optim.AdamW over all parameters, such as {"lr": 2e-5}, or what makes an optimizer from the
    model. nvme … config: as of `wrap`. model_class: AutoModelForCausalLM, or another class of transformers; code that comes
    with a model is never run. dtype: torch.float32 or torch.bfloat16, to which every weight is rounded; None: that of the
    folder. prepare: is given the model before the optimizer is made, and returns the one to train (frozen parts, PEFT's
    adapters); a weight whose values it uses is read into memory. initialize: names, or patterns with `*`, of tensors that
    the folder may lack, such as a new head's "score.*": transformers draws them at random.

    The model is in evaluation mode, as from `from_pretrained`: `run.model.train()` turns dropout on. Raises what `wrap`
    raises, and ConfigError for a folder that cannot be read and for weights that are missing or of another shape, all named.
    Tensors that the model has no place for are named in a warning.
    """
    if not (optimizer is None or callable(optimizer) or isinstance(optimizer, Mapping)):
        raise ConfigError(
            f"optimizer={optimizer!r} must be options of AdamW, such as {{'lr': 2e-5}}, or a function that makes an "
            "optimizer from the model: its parameters are made here."
        )
    imported = import_pretrained(folder, model_class, dtype, initialize)
    model = imported.model if prepare is None else prepare(imported.model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"prepare must return the model to train, and returned a {type(model).__name__}.")
    if callable(optimizer):
        made = optimizer(model)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made = torch.optim.AdamW(trained, **{"fused": True, **(optimizer or {})})
    run = wrap(model, made, nvme, nvme_limit, ram, gpu, device, config)
    run.origin = Path(folder)
    if imported.unused:
        warnings.warn(
            f"The weights in {folder} hold {len(imported.unused)} tensors that {type(imported.model).__name__} has no place "
            f"for ({in_short(imported.unused)}): they are not trained and not exported.",
            stacklevel=2,
        )
    return run
