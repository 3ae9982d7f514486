"""The model and tokenizer of `fuyou train`, through transformers: what cannot be trained is refused in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.export import INDEX, WEIGHTS
from fuyou.checkpoint.headers import parse_index
from fuyou.checkpoint.imports import import_pretrained, in_short
from fuyou.checkpoint.transformers_folder import check_config_file, import_transformers, in_words
from fuyou.core.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HUB_TIMEOUT_S = 10.0
_POSITIONS = re.compile(r"(^|_)(wpe|pos|position|positions)(_|$)")  # modules that learn a vector for each position


def load_configuration(name: str, *, local_only: bool = False) -> Any:
    """The configuration of a local folder or a hub id; ConfigError where it is no causal language model of transformers'
    own. `local_only`: an id is looked up in the hub's cache on this machine, and nobody is asked."""
    transformers = import_transformers()
    _require_folder_or_id(name)
    options = {"trust_remote_code": False, "local_files_only": True} if local_only else _access(name)
    if Path(name).is_dir():
        check_config_file(Path(name), transformers)
    with in_words(name):
        configuration = transformers.AutoConfig.from_pretrained(name, **options)
    if type(configuration) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"Model {name} is a {configuration.model_type}, which is not a causal language model.")
    return configuration


def load_tokenizer(name: str, sequence_length: int, configuration: Any = None) -> Any:
    """The tokenizer of a local folder or a hub id, checked against the model's vocabulary and positions."""
    transformers = import_transformers()
    configuration = load_configuration(name) if configuration is None else configuration
    with in_words(name, "The tokenizer of model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **_access(name))
    text = configuration.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(_too_long(name, sequence_length, positions))
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(
            f"The tokenizer in {name} has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: "
            "they do not belong together; enlarge the model's embedding, or take its own tokenizer."
        )
    return tokenizer


def load_model(name: str, precision: str | None, sequence_length: int = 0) -> tuple[Any, list[str]]:
    """(the causal language model in `precision`, or in the dtype that its weights are stored in; what a person should know
    of it). Its weights stay in their files until `wrap` takes them home ([Note: stored]). ConfigError for weights that are
    missing, damaged, or of another model, and for a `sequence_length` beyond the positions that it has learnt."""
    dtype = None if precision is None else _DTYPES[precision]
    imported = import_pretrained(folder_of(name), dtype=dtype, name=name)
    model = imported.model
    stored = {parameter.dtype for parameter in model.parameters()}
    if precision is None and torch.float16 in stored:
        raise ConfigError(
            f"Model {name} is stored in fp16, which is not trained in: set precision to fp32, which keeps every bit, "
            "or to bf16, which takes half the memory and rounds to 8 bits of mantissa."
        )
    learnt = learnt_positions(model)
    if learnt is not None and sequence_length > learnt:
        raise ConfigError(_too_long(name, sequence_length, learnt))
    notes = []
    if imported.unused:
        notes.append(
            f"The weights in {name} hold {len(imported.unused)} tensors that {type(model).__name__} has no place for "
            f"({in_short(imported.unused)}): they are not trained and not exported."
        )
    return model, notes


def learnt_positions(model: nn.Module) -> int | None:
    """Tokens a row that the model has learnt a position vector for; None where positions are computed.

    Some tables begin with rows that stand for no position: OPT's and BART's `offset`, and in RoBERTa's family those up
    to the padding token.
    """
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and _POSITIONS.search(last) and "rel" not in last:
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - int(getattr(module, "offset", 0)) - padding)
    return min(found, default=None)


def _too_long(name: str, sequence_length: int, positions: int) -> str:
    return (
        f"sequence_length={sequence_length} is more than the {positions} positions that {name} was made for: set at most "
        f"{positions}."
    )


# --- where it is --------------------------------------------------------------------------------------------------


def _access(name: str) -> dict[str, Any]:
    """Options for `from_pretrained`; ConfigError where `name` is neither a model folder nor an id that can be had.

    Code that comes with a model is never run (and never asked about on the terminal). A hub that does not answer is
    asked once: transformers would try for half a minute before it looks into its cache.
    """
    _require_folder_or_id(name)
    options: dict[str, Any] = {"trust_remote_code": False}
    if Path(name).is_dir():
        return options
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"Model {name} is no folder here, and the hub has no such model, or shows it to others only: check the name, "
            "or log in (hf auth login)."
        ) from None
    except errors.HFValidationError as error:
        raise ConfigError(f"Model {name} is no folder here, and no id of the hub: {error}") from None
    except Exception as error:  # whatever the HTTP client of this version raises
        if getattr(error, "response", None) is None:  # no answer at all, as opposed to one that says no
            options["local_files_only"] = True
    return options


def folder_of(name: str) -> Path:
    """The folder, or that of the hub's cache once the model's files are there."""
    options = _access(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import errors, hf_hub_download

    def get(file: str) -> Path:
        return Path(hf_hub_download(name, file, local_files_only=options.get("local_files_only", False)))

    with in_words(name):
        folder = get("config.json").parent
        try:
            get("generation_config.json")
        except errors.EntryNotFoundError:
            pass  # not every model has one
        try:
            get(WEIGHTS)
        except errors.EntryNotFoundError:
            index = get(INDEX)
            for shard in sorted(set(parse_index(index.read_bytes(), str(index)).values())):
                get(shard)
    return folder


def _require_folder_or_id(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"Model folder {name} has no config.json: it is not a Hugging Face model folder.")
    elif path.exists():
        raise ConfigError(f"Model {name} is a file: give the Hugging Face folder that holds config.json.")
    elif path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise ConfigError(f"Model folder {name} does not exist, and a hub id would read `name` or `owner/name`.")
