"""Exporting a model in the Hugging Face layout: which names its tensors have in the file, and the files beside them."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fuyou.checkpoint.adapters import (
    MergedTensor,
    Named,
    Source,
    adapter_configs,
    export_adapters,
    merged_state,
    unwrapped,
)
from fuyou.checkpoint.export import SHARD_BYTES, MemoryTensor, TensorSource, write_safetensors
from fuyou.checkpoint.partial import PREFIX, sync_folder
from fuyou.core.errors import ConfigError

# What transformers' tokenizers and processors are saved as.
_INPUT_FILES = frozenset(
    """tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json
    vocab.json vocab.txt merges.txt spiece.model sentencepiece.bpe.model tokenizer.model source.spm target.spm
    tekken.json preprocessor_config.json processor_config.json video_preprocessor_config.json""".split()
)


def names_to_export(model: nn.Module, state: Named | None = None) -> Named:
    """(name in the file, tensor) of every parameter and persistent buffer, each distinct tensor once.

    The names are those that `model.save_pretrained` of transformers writes: of a tied weight the one that loading
    expects, and the checkpoint's own names where transformers has renamed modules since (ViT, GPT-NeoX). Where it also
    splits tensors on saving (a mixture's experts), the names of the model in memory are kept: transformers loads both.
    A tensor is told by its identity, not by its bytes, which may be away. `state`: instead of the model's own.
    """
    aliases: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in _state(model) if state is None else state:
        aliases.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    duplicates = _tied_names(model)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = [(_kept_name(names, duplicates), tensors[key]) for key, names in aliases.items()]
    kept = [(name, tensor) for name, tensor in kept if name not in ignored]
    renamed = _checkpoint_names(model, kept)
    return [(renamed.get(name, name), tensor) for name, tensor in kept]


def export_pretrained(
    folder: str | os.PathLike[str],
    model: nn.Module,
    source: Source = MemoryTensor,
    *,
    shard_bytes: int = SHARD_BYTES,
    merge_adapters: bool = False,
) -> list[Path]:
    """Write the model's weights, with its config.json and generation_config.json where it has them; of a model with PEFT
    adapters these alone, in PEFT's layout, or with `merge_adapters` the whole model with them added (LoRA).

    `source` gives a tensor's bytes by name and tensor. Nothing holds more than a few MiB. Returns the files written.
    Raises what `write_safetensors` raises, and ConfigError for adapters that cannot be merged.
    """
    folder = Path(folder)
    layers: dict[int, Any] = {}
    state = None
    if adapter_configs(model):
        if not merge_adapters:
            return export_adapters(folder, model, _state(model), source)
        model = unwrapped(model)
        state, layers = merged_state(model, _state(model))
    elif merge_adapters:
        raise ConfigError("The model has no adapters to merge: export it without merging.")
    sources: list[TensorSource] = []
    for name, tensor in names_to_export(model, state):
        layer = layers.get(id(tensor))
        sources.append(source(name, tensor) if layer is None else MergedTensor(source(name, tensor), layer))
    weights = write_safetensors(folder, sources, shard_bytes=shard_bytes)
    return weights + _write_configs(folder, model, sources)


def copy_tokenizer(origin: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """The files of the tokenizer, and of what else makes inputs, that lie beside the weights in `origin`, copied as they
    are. Returns those of `folder`."""
    target = Path(folder)
    found = [path for path in sorted(Path(origin).iterdir()) if path.name in _INPUT_FILES and path.is_file()]
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=target) as unfinished:
        for path in found:
            shutil.copyfile(path, Path(unfinished) / path.name)
            os.replace(Path(unfinished) / path.name, target / path.name)
    sync_folder(target)
    return [target / path.name for path in found]


# --- names --------------------------------------------------------------------------------------------------------


def _state(model: nn.Module) -> Named:
    """What state_dict() would hold, under all its names, without asking for any bytes."""
    found: list[tuple[str, torch.Tensor]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        members = [*module._parameters.items()]
        members += [(name, buffer) for name, buffer in module._buffers.items() if name not in transient]
        found += [(f"{prefix}.{name}" if prefix else name, tensor) for name, tensor in members if tensor is not None]
    return found


def _tied_names(model: nn.Module) -> list[str]:
    """The names that loading fills by tying (transformers: a mapping, or before version 5 a list of them)."""
    found: list[str] = []
    for prefix, module in model.named_modules():
        names = getattr(module, "_tied_weights_keys", None) or ()
        found += [f"{prefix}.{name}" if prefix else name for name in names]
    return found


def _kept_name(names: Sequence[str], tied: Sequence[str]) -> str:
    """Of the names of one tensor, the one to write: the first that loading does not fill by tying.

    Where all are such, the last in alphabetical order is kept, as transformers does.
    """
    if len(names) == 1:
        return names[0]
    free = [name for name in names if not any(_matches(pattern, name) for pattern in tied)]
    return free[0] if free else max(names)


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return pattern == name


def _checkpoint_names(model: nn.Module, kept: Sequence[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Name in memory → name in the checkpoint, for a model whose modules transformers has renamed; else empty.

    transformers converts a whole state dict at once. It is given stand-ins without bytes, and its answer is used when
    it only moved them to other names.
    """
    if not hasattr(model, "save_pretrained"):
        return {}
    try:
        from transformers.core_model_loading import revert_weight_conversion  # transformers 5
    except ImportError:
        return {}
    stand_ins = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in kept}
    converted = revert_weight_conversion(cast(Any, model), dict(stand_ins))
    names = {id(tensor): name for name, tensor in converted.items()}
    if len(converted) != len(stand_ins) or any(id(tensor) not in names for tensor in stand_ins.values()):
        return {}
    return {name: names[id(tensor)] for name, tensor in stand_ins.items()}


# --- files beside the weights -------------------------------------------------------------------------------------


def _write_configs(folder: Path, model: nn.Module, sources: Sequence[TensorSource]) -> list[Path]:
    config = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        return []
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder) as unfinished:
        _exported_config(config, model, sources).save_pretrained(unfinished)
        _save_generation_config(model, unfinished)
        written: list[Path] = []
        for path in sorted(Path(unfinished).iterdir()):
            os.replace(path, folder / path.name)
            written.append(folder / path.name)
        sync_folder(folder)
    return written


def _exported_config(config: Any, model: nn.Module, sources: Sequence[TensorSource]) -> Any:
    """A copy of the model's config that names its class and the dtype of the exported weights."""
    config = copy.deepcopy(config)
    config.architectures = [type(model).__name__]
    dtype = next((source.dtype for source in sources if source.dtype.is_floating_point), None)
    if dtype is not None:
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(dtype).removeprefix("torch."))
    return config


def _save_generation_config(model: nn.Module, folder: str) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is None or not getattr(model, "can_generate", lambda: False)():
        return
    try:
        generation.save_pretrained(folder)
    except ValueError as error:  # transformers refuses a contradictory one; the weights are worth more than it
        warnings.warn(f"generation_config.json was left out of the export: {error}", stacklevel=2)
