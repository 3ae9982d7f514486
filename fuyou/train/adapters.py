"""LoRA adapters on a model, from the `lora` key of a job, through PEFT."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fuyou.core.config import nearest
from fuyou.core.errors import ConfigError
from fuyou.train.config import LoraSettings


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"`lora` needs peft, which cannot be imported ({error}): pip install 'fuyou[lora]'."
        ) from None
    return peft


def add_adapters(model: nn.Module, settings: LoraSettings, seed: int) -> nn.Module:
    """`model` inside PEFT's wrapper: its own parameters frozen, adapters drawn from `seed`.

    A run has one precision, so the adapters have the dtype of the weights beside them (PEFT would make fp32 adapters on
    bf16 weights). In bf16 nothing is lost by it between steps: the optimizer holds an fp32 master of each.
    ConfigError for target modules that the model lacks or that cannot have adapters.
    """
    peft = import_peft()
    targets = settings.target_modules
    if isinstance(targets, list):
        _refuse_unknown_targets(model, targets)
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    configuration = peft.LoraConfig(
        r=settings.r,
        lora_alpha=alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=_stores_transposed(model),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads names that transformers is giving up
            return peft.get_peft_model(model, configuration, autocast_adapter_dtype=False)
    except ValueError as error:
        if targets is None and "target_modules" in str(error):
            raise ConfigError(
                f"peft has no default target_modules for the architecture {_architecture(model)}: set "
                f"lora.target_modules to all-linear, or to some of {', '.join(_linear_names(model))}."
            ) from None
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"peft cannot add adapters to {targets}: {reason}.") from None


def _refuse_unknown_targets(model: nn.Module, targets: list[str]) -> None:
    """PEFT skips a name that matches nothing as long as another one matches."""
    names = [name for name, _ in model.named_modules() if name]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ConfigError(
                f"lora.target_modules names {target!r}, and no module of this {_architecture(model)} is called so"
                f"{nearest(target, _linear_names(model))}"
            )


def _linear_names(model: nn.Module) -> list[str]:
    """Last names of the layers that adapters are for, in order; the output embedding is left out, as PEFT does."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = [name.rpartition(".")[2] for name, each in model.named_modules() if _is_linear(each) and each is not head]
    return list(dict.fromkeys(found))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, which stores its transpose


def _stores_transposed(model: nn.Module) -> bool:
    """PEFT would find out by itself, layer by layer, with a warning for each."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = [each for each in model.modules() if _is_linear(each) and each is not head]
    return bool(linear) and not any(isinstance(each, nn.Linear) for each in linear)


def _architecture(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
