"""The configuration of `fuyou train`: one YAML file, flat but for `lora`; only the first four keys have no default."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fuyou.core.config import Config, nearest
from fuyou.core.errors import ConfigError
from fuyou.core.sizes import parse_bytes, shown
from fuyou.core.ticket import DEADLINE_S
from fuyou.train.trackers import check_trackers

_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")  # YAML 1.1 reads 1e-4 as a string


def _number(value: Any) -> Any:
    """`1e-4` and `1e3` become numbers; a boolean is not one."""
    if isinstance(value, bool):
        raise ValueError("true and false are not numbers")
    if isinstance(value, str) and _EXPONENT.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    return value


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _targets(value: Any) -> Any:
    """`all-linear`, or names; one name is a list of one (PEFT would read a string as a pattern)."""
    if value is None or value == "all-linear":
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError("give a list of names, or all-linear")
    return names


def _packing(value: Any) -> Any:
    if not isinstance(value, bool) and value != "stream":
        raise ValueError("it is true, false or stream")
    return value


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Share = Annotated[Number, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class LoraSettings(BaseModel):
    """`lora`: low-rank adapters (arXiv 2106.09685) on frozen weights. The defaults are TRL's, the most widely copied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: Annotated[Integer, Field(ge=1)] = 16  # rank
    alpha: Annotated[Number, Field(gt=0)] = 32.0  # the adapter's output is scaled by alpha / r
    dropout: Share = 0.05  # on the adapter's input
    target_modules: Annotated[str | list[str] | None, BeforeValidator(_targets)] = None  # null: peft's own choice
    merge: bool = False  # export the whole model with the adapters added to its weights


class TrainConfig(BaseModel):
    """Every key of the YAML, in its order. Sizes are ints in bytes or strings such as '48GiB'."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Text  # a Hugging Face folder, or an id on the hub
    data: Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)]  # .txt, .md or .jsonl
    output: Text
    nvme: (
        Text | Annotated[list[Text], Field(min_length=1)] | None
    )  # one folder a drive; null: host RAM holds everything

    nvme_limit: int | str | None = None
    ram: int | str | None = None
    gpu: int | str | None = None
    device: str | None = None
    precision: str | None = None
    activations: str = "auto"
    durability: str | None = None
    micro_batch: Annotated[Integer, Field(ge=1)] | None = None  # rows that a block runs at a time; null: all
    io: str = "auto"
    verify_reads: bool = False
    deadline_s: Annotated[Number, Field(gt=0)] = DEADLINE_S
    adam_threads: Annotated[Integer, Field(ge=1)] | None = None  # null: a share of the cores

    steps: Annotated[Integer, Field(ge=1)] | None = None
    epochs: Annotated[Number, Field(gt=0)] | None = None  # 1 when `steps` is not given either
    batch_size: Annotated[Integer, Field(ge=1)] = 1  # rows a backward
    accumulation: Annotated[Integer, Field(ge=1)] = 1  # backwards a step
    sequence_length: Annotated[Integer, Field(ge=2)] = 512
    packing: Annotated[bool | Literal["stream"], BeforeValidator(_packing)] = True
    loss: Literal["chunked", "model"] = "chunked"  # from the last hidden states in tiles; over all logits at once
    lora: LoraSettings | None = None  # null: all parameters are trained

    learning_rate: Annotated[Number, Field(gt=0)] = 2e-5
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[Number, Field(ge=0)] = 1e-8
    warmup_steps: Annotated[Integer, Field(ge=0)] = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0  # 0: no clipping, and no norm is computed
    nonfinite: Literal["stop", "skip"] = "stop"  # a step whose loss or gradient is inf or nan

    eval_share: Share = 0.05  # of the distinct documents; 0: no held-out loss
    eval_every: Annotated[Integer, Field(ge=1)] | None = None  # null: before the first step and after the last
    save_every: Annotated[Integer, Field(ge=1)] | None = None  # steps between checkpoints; null: none
    save_total_limit: Annotated[Integer, Field(ge=1)] | None = None  # the newest that are kept; null: all
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 0
    report_to: Annotated[list[str], BeforeValidator(_as_list)] = []

    def core(self, resume: bool | str | None = None) -> Config:
        """The part that `fuyou.wrap` takes as its `config`; ConfigError for what it refuses."""
        return Config(
            resume=resume,
            precision=self.precision,
            activations=self.activations,
            durability=self.durability,
            micro_batch=self.micro_batch,
            io=self.io,
            verify_reads=self.verify_reads,
            deadline_s=self.deadline_s,
            adam_threads=self.adam_threads,
        )

    def nvme_folders(self) -> list[str]:
        return _as_list(self.nvme)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


_INSTEAD = {"steps": "epochs", "epochs": "steps"}


def read_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> TrainConfig:
    """Defaults, overridden by the file, overridden by `key=value` strings. ConfigError names the key and the place."""
    return make_config(_parse_file(Path(path)), overrides, str(path))


def make_config(values: dict[str, Any], overrides: Iterable[str] = (), path: str = "the command line") -> TrainConfig:
    """`read_config`, of the values that a file at `path` would hold."""
    places = dict.fromkeys(values, path)
    for override in overrides:
        key, value = _parse_override(override)
        outer, dot, inner = key.partition(".")
        if dot and outer == "lora":  # lora.r=8 changes one key of what the file has
            held = values.get(outer)
            value = {**(held if isinstance(held, dict) else {}), inner: value}
            key = outer
        values[key], places[key] = value, "--set"
        other = _INSTEAD.get(key)
        if other is not None and value is not None and places.get(other) != "--set":
            values.pop(other, None)  # one of two ways to say how long: the command line's, not the file's
    _refuse_unknown(values, TrainConfig, lambda key: places[key])
    if isinstance(values.get("lora"), dict):
        _refuse_unknown(values["lora"], LoraSettings, lambda key: f"{places['lora']}: lora")
    try:
        config = TrainConfig(**values)
    except ValidationError as error:
        raise ConfigError(_first_error(error, values, places, path)) from None
    return _resolved(config)


def config_to_verify(
    path: Path | None, model: str | None, data: Sequence[str], nvme: Sequence[str], overrides: Iterable[str]
) -> TrainConfig:
    """The job of `fuyou verify`: a file's, or one of `model` and `data` with the defaults of all else."""
    if (path is None) == (model is None):
        raise ConfigError(
            "Give the configuration of a job, or --model with --data: one of the two says what is verified."
        )
    if path is not None:
        if data or nvme:
            raise ConfigError("--data and --nvme go with --model; of a configuration's, --set data=… and --set nvme=….")
        return read_config(path, overrides)
    if not data:
        raise ConfigError("--model needs --data: the files that it would be trained on.")
    values = {"model": model, "data": list(data), "output": "unused", "nvme": list(nvme) or None}
    return make_config(values, overrides)


def _refuse_unknown(values: dict[Any, Any], model: type[BaseModel], place: Callable[[Any], str]) -> None:
    for key in values:
        if key not in model.model_fields:
            raise ConfigError(f"{place(key)}: unknown key {key!r}{nearest(str(key), list(model.model_fields))}")


def _parse_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"The configuration {path} is not a file: give the path of a YAML file with {_required()}.")
    try:
        values = parse_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not keys and values: it needs {_required()}.")
    return values


def parse_yaml(text: str) -> Any:
    """What a YAML document says; a key that stands twice is refused. YAMLError for all that is none: its constructors of
    numbers and dates raise whatever their conversions do."""
    try:
        return yaml.load(text, _UniqueKeys)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


class _UniqueKeys(yaml.SafeLoader):
    """SafeLoader keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.YAMLError(f"the key {key.value!r} stands twice, again in line {key.start_mark.line + 1}")
            seen |= {key.value} if isinstance(key.value, str) else set()
        return super().construct_mapping(node, deep)


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {text!r} is not key=value, as in --set learning_rate=1e-4.")
    try:
        return key, parse_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text!r}: the value does not parse as YAML ({' '.join(str(error).split())}); quote it."
        ) from None


def _required() -> str:
    names = [name for name, field in TrainConfig.model_fields.items() if field.is_required()]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _first_error(error: ValidationError, values: dict[str, Any], places: dict[str, str], path: str) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return f"{path}: the key {key!r} is missing; {_required()} have no default."
    reason = first["msg"].removeprefix("Value error, ")
    value, name = values[key], key
    if key == "lora" and isinstance(value, dict):
        inner = str(first["loc"][1])
        name, value = f"lora.{inner}", value[inner]
    elif key == "lora":
        reason = "give a mapping such as {r: 16, alpha: 32}, {} for its defaults, or null to train all parameters"
    return f"{places[key]}: {name}={shown(value)} is refused: {reason[:1].lower()}{reason[1:]}."


def _resolved(config: TrainConfig) -> TrainConfig:
    """Checks that need several keys or the core, and the choices that defaults leave open."""
    config.core()
    for name in ("nvme_limit", "ram", "gpu"):
        if getattr(config, name) is not None:
            parse_bytes(getattr(config, name), name)
    check_trackers(config.report_to)
    if config.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("lora needs the package peft, which is not installed: pip install 'fuyou[lora]'.")
    if config.steps is not None and config.epochs is not None:
        raise ConfigError(
            f"steps={config.steps} and epochs={config.epochs:g} are both given: keep one, and set the other to null."
        )
    if config.steps is None and config.epochs is None:
        config = config.model_copy(update={"epochs": 1.0})
    if config.steps is not None and config.warmup_steps > config.steps:
        raise ConfigError(f"warmup_steps={config.warmup_steps} is more than steps={config.steps}: warm up for fewer.")
    home = {name: os.path.expanduser(getattr(config, name)) for name in ("model", "output")}
    home["data"] = [os.path.expanduser(item) for item in config.data]
    if config.nvme is not None:
        folders = [os.path.expanduser(item) for item in config.nvme_folders()]
        home["nvme"] = folders[0] if isinstance(config.nvme, str) else folders
    return config.model_copy(update=home)
