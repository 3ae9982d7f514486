"""Making a model of a Hugging Face folder whose weights stay in their files.

transformers loads it, as `from_pretrained` does, from tensors that are only promised ([Note: stored]): names, prefixes,
conversions, ties, buffers that are computed and what may be missing are its own business, whichever the architecture.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.stored import Stored, tensors_of, value_of
from fuyou.checkpoint.transformers_folder import (
    check_config_file,
    check_folder,
    import_transformers,
    in_words,
    quiet,
)
from fuyou.checkpoint.weight_files import open_weights
from fuyou.core.errors import ConfigError
from fuyou.runtime.measure import free_host_bytes

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Imported:
    """A model, in evaluation mode, whose parameters are Stored, and the tensors of the files that it has no place for."""

    model: Any
    unused: list[str]


def import_pretrained(
    folder: str | os.PathLike[str],
    model_class: Any = None,
    dtype: torch.dtype | None = None,
    initialize: Sequence[str] = (),
    *,
    name: str | None = None,
) -> Imported:
    """What `model_class.from_pretrained(folder, dtype=dtype)` gives, without its weights in memory.

    model_class: AutoModelForCausalLM where None, or another class of transformers; code that comes with a model is never
    run. dtype: None is what the folder says. initialize: names, or patterns with `*`, of tensors that the files may lack
    and transformers draws at random. name: what the model is to be called in messages and exports, the folder where None.

    Raises ConfigError for a folder, files or an architecture that cannot be read, and for tensors that are missing or
    have another shape, naming all of them.
    """
    path, name = Path(folder), name or str(folder)
    check_folder(path)
    transformers = import_transformers()
    check_config_file(path, transformers)
    if (path / _ADAPTER).exists():
        raise ConfigError(
            f"Model folder {path} holds adapters ({_ADAPTER}) beside a model: load the model they were made for, and add "
            "them with peft."
        )
    tensors = tensors_of(open_weights(path))
    with in_words(name):
        model_class, configuration = _class_of(path, model_class or transformers.AutoModelForCausalLM, transformers)
        if getattr(configuration, "quantization_config", None) is not None:
            raise ConfigError(
                f"The weights of {name} are quantized (quantization_config in its config.json), and fuyou trains float "
                "weights: take the model that it was made from."
            )
        if getattr(configuration, "transformers_weights", None) is not None:
            raise ConfigError(
                f"Model {name} keeps its weights in a file of another name (transformers_weights): rename it."
            )
        _refuse_another_size(name, model_class, configuration, tensors.values())
        with quiet(transformers):
            model, info = model_class.from_pretrained(
                None, config=configuration, state_dict=tensors, dtype=dtype or "auto", output_loading_info=True,
                ignore_mismatched_sizes=True, trust_remote_code=False,
            )  # fmt: skip
        missing = [
            key for key in info["missing_keys"] if not any(fnmatch.fnmatchcase(key, each) for each in initialize)
        ]
        refuse_other_weights(
            name, missing=missing, wrong=sorted(info["mismatched_keys"]), unused=info["unexpected_keys"],
            failed=info.get("conversion_errors") or (),
        )  # fmt: skip
        _read_buffers(model)
        _set_name(model, name)
        _set_generation(model, path, transformers)
    return Imported(model, sorted(info["unexpected_keys"]))


def refuse_other_weights(
    name: str,
    *,
    missing: Collection[str],
    wrong: Collection[tuple[str, Any, Any]],
    unused: Collection[str],
    failed: Collection[str] = (),
    strict: bool = False,
) -> None:
    """ConfigError naming every tensor that the model needs and the files lack or hold in another shape (name, there,
    wanted), and that cannot be converted; beside them those that the model has no place for, which alone are an error where
    `strict`."""
    problems = []
    if wrong:
        shapes: dict[tuple, list[str]] = {}
        for key, there, wanted in wrong:
            shapes.setdefault((tuple(there), tuple(wanted)), []).append(key)
        told = "; ".join(f"{in_short(keys)}: {a} in the file and {b} in the model" for (a, b), keys in shapes.items())
        problems.append(f"do not fit its config.json: {_count(wrong)} {_have(wrong)} another shape ({told})")
    if missing:
        problems.append(
            f"lack {_count(missing)} of the model, which would be trained from random numbers: {in_short(missing)}"
        )
    if failed:
        problems.append(f"hold what transformers cannot convert to {in_short(failed)}")
    if not problems and not strict:
        return
    if unused:
        problems.append(f"hold {_count(unused)} that the model has no place for: {in_short(unused)}")
    if problems:
        raise ConfigError(
            f"The weights in {name} {'. They '.join(problems)}. Take the folder that this model was saved to."
        )


def in_short(names: Iterable[str]) -> str:
    """All names, those that differ in their numbers together: model.layers.{0,1,2}.mlp.up_proj.weight."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_natural):
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    found = []
    for pattern, some in groups.items():
        columns = list(zip(*(re.findall(r"\d+", name) for name in some), strict=True))
        varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
        if len(varying) != 1:
            found += some
            continue
        numbers = [column[0] for column in columns]
        numbers[varying[0]] = "{" + ",".join(columns[varying[0]]) + "}"
        pieces = pattern.split("#")
        found.append("".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True)))
    return ", ".join(found)


def _natural(name: str) -> list[Any]:
    return [(0, int(each), "") if each.isdigit() else (1, 0, each) for each in re.split(r"(\d+)", name)]


def _count(some: Collection[Any]) -> str:
    return f"{len(some)} tensor{'s' * (len(some) != 1)}"


def _have(some: Collection[Any]) -> str:
    return "has" if len(some) == 1 else "have"


# --- through transformers -----------------------------------------------------------------------------------------


def _class_of(path: Path, model_class: Any, transformers: Any) -> tuple[Any, Any]:
    """(the class, its configuration) that an Auto class would choose, or that class itself."""
    configuration = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    if not hasattr(model_class, "from_config"):
        if not isinstance(configuration, model_class.config_class):
            configuration = model_class.config_class.from_pretrained(path)
        return model_class, configuration
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        chosen = model_class.from_config(configuration, trust_remote_code=False)
    if not isinstance(configuration, type(chosen.config)):  # the text model of one for texts and images
        configuration = configuration.get_text_config()
    return type(chosen), configuration


def _refuse_another_size(name: str, model_class: Any, configuration: Any, tensors: Iterable[Stored]) -> None:
    """ConfigError where the files hold so much less than the model that to draw the rest at random, as transformers does
    before it says what was missing, would take more memory than there is."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = model_class(copy.deepcopy(configuration))
    wanted = sum(each.numel() for each in model.parameters())
    there = sum(each.numel() for each in tensors)
    if 4 * (wanted - there) > free_host_bytes():
        raise ConfigError(
            f"The weights in {name} hold {there:,} numbers, and the model in its config.json has {wanted:,}: they are not of "
            "that model, or not all of them are there. Copy or download the model again."
        )


def _read_buffers(model: nn.Module) -> None:
    """Buffers stay on the device: they are read now."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if isinstance(buffer, Stored):
                module._buffers[name] = value_of(buffer)


def _set_name(model: Any, name: str) -> None:
    model.name_or_path = name
    model.config.name_or_path = name


def _set_generation(model: Any, path: Path, transformers: Any) -> None:
    """The generation config, as `from_pretrained` finds it: in its own file, or in the config's."""
    if not model.can_generate():
        return
    read = transformers.GenerationConfig.from_pretrained
    if (path / "generation_config.json").is_file():
        model.generation_config = read(path)
    else:
        model.generation_config = read(path, config_file_name="config.json", _from_model_config=True)
