"""Exporting adapters: alone, in the layout of PEFT, or added to the weights they adapt (LoRA), tensor by tensor."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.export import TensorSource, write_safetensors
from fuyou.checkpoint.partial import PREFIX, sync_folder
from fuyou.core.errors import ConfigError

Source = Callable[[str, torch.Tensor], TensorSource]  # name and tensor → where its bytes come from
Named = list[tuple[str, torch.Tensor]]

STEM = "adapter_model"  # PEFT reads adapter_model.safetensors, and no shards
_ALL_BYTES = 1 << 62
_LEAST_ROWS = 32  # a matrix product of fewer rows takes another path in BLAS, with other bits


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Name → PEFT config of the model's adapters, wrapped by PEFT or added by transformers; empty where it has none."""
    return dict(getattr(model, "peft_config", None) or {})


def adapter_tensors(model: nn.Module, adapter: str, state: Named) -> Named:
    """(name in the file, tensor) of one adapter; `state` is what the model's state_dict would hold.

    PEFT chooses and names: it is given the tensors themselves, whose bytes may be away, and asks for none.
    """
    from peft import get_peft_model_state_dict

    chosen = get_peft_model_state_dict(model, state_dict=dict(state), adapter_name=adapter)
    prefix = "" if hasattr(model, "get_base_model") else "base_model.model."  # transformers' own adapters
    return [(prefix + name, tensor) for name, tensor in chosen.items()]


def export_adapters(folder: Path, model: nn.Module, state: Named, source: Source) -> list[Path]:
    """Write adapter_model.safetensors and adapter_config.json; of an adapter not called "default", into a folder of its
    name, as PEFT does. `PeftModel.from_pretrained` reads them."""
    written: list[Path] = []
    for adapter, config in adapter_configs(model).items():
        target = folder if adapter == "default" else folder / adapter
        sources = [source(name, tensor) for name, tensor in adapter_tensors(model, adapter, state)]
        written += write_safetensors(target, sources, shard_bytes=_ALL_BYTES, stem=STEM)
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=target) as unfinished:
            _save_config(config, model, unfinished)
            for path in sorted(Path(unfinished).iterdir()):
                os.replace(path, target / path.name)
                written.append(target / path.name)
        sync_folder(target)
    return written


def _save_config(config: Any, model: nn.Module, folder: str) -> None:
    """adapter_config.json as PeftModel.save_pretrained writes it: for inference, with the base model's name and class."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    if isinstance(getattr(config, "target_modules", None), set):
        config.target_modules = sorted(config.target_modules)  # a set is written in another order every time
    base = unwrapped(model)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(folder, auto_mapping_dict=mapping)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or the model."""
    wrapper: Any = model
    return wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else model


# --- merging ------------------------------------------------------------------------------------------------------


def merged_state(model: nn.Module, state: Named) -> tuple[Named, dict[int, Any]]:
    """(what the state_dict would hold without adapters, under the names from before they were added;
    id of an adapted weight → its LoRA layer). ConfigError where an adapter is not plain LoRA on a linear layer."""
    from peft.tuners.lora import Linear, LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            layer: Any = module
            plain = isinstance(layer, LoraLayer) and isinstance(layer, Linear)
            if not plain or layer.lora_variant or any(layer.lora_bias.values()) or layer.merged:
                raise ConfigError(
                    f"The adapter of {name} ({type(layer).__name__}) cannot be merged while it is exported, only plain "
                    "LoRA on linear layers can: export the adapters, then merge them with PEFT's merge_and_unload."
                )
            layers[name] = layer
    kept: Named = []
    for name, tensor in state:
        owner = next((layer for layer in layers if name.startswith(layer + ".")), None)
        if owner is None:
            kept.append((name, tensor))
        elif name.startswith(owner + ".base_layer."):
            kept.append((owner + name.removeprefix(owner + ".base_layer"), tensor))
    return kept, {id(layer.get_base_layer().weight): layer for layer in layers.values()}


class MergedTensor:
    """An adapted weight, W + scale · B · A, in the pieces in which W comes: no more than a piece of it is in memory.

    The arithmetic is PEFT's merge: the product in fp32 on a CPU, rounded to the adapter's dtype, then added.
    """

    def __init__(self, base: TensorSource, layer: Any) -> None:
        self.name = base.name
        self.dtype = base.dtype
        self.shape = base.shape
        self._base = base
        self._layer = layer

    def chunks(self) -> Iterator[memoryview]:
        factors = [self._factors(adapter) for adapter in self._layer.active_adapters if adapter in self._layer.lora_A]
        first = 0  # element of the flat weight
        for piece in self._base.chunks():
            weight = torch.frombuffer(piece, dtype=torch.uint8).view(self.dtype)
            for a, b, scale, dtype in factors:
                delta = self._delta(a, b, scale, first, first + weight.numel())
                weight = (weight + delta.to(dtype)).to(self.dtype)
            first += weight.numel()
            yield weight.view(torch.uint8).numpy().data

    def _factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, float, torch.dtype]:
        """(A (r, in) fp32, B (out, r) fp32, scale, the adapter's dtype), on the host."""
        a, b = (each[adapter].weight.detach().cpu() for each in (self._layer.lora_A, self._layer.lora_B))
        return a.float(), b.float(), self._layer.scaling[adapter], b.dtype

    def _delta(self, a: torch.Tensor, b: torch.Tensor, scale: float, first: int, last: int) -> torch.Tensor:
        """Elements [first, last) of the flat scale · B · A, which is stored transposed under a Conv1D."""
        rows, columns = self.shape
        top, bottom = first // columns, -(-last // columns)
        start = max(0, min(top, rows - _LEAST_ROWS))
        end = min(rows, max(bottom, start + _LEAST_ROWS))
        product = (b @ a[:, start:end]).T if self._layer.fan_in_fan_out else b[start:end] @ a
        flat = (product * scale).reshape(-1)
        return flat[first - start * columns : last - start * columns]
