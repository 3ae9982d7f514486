"""The model and tokenizer of `fuyou train`, through transformers: what cannot be trained is refused in words."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint.headers import check_weights
from fuyou.core.errors import ConfigError, FuyouError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HUB_TIMEOUT_S = 10.0
_POSITIONS = re.compile(r"(^|_)(wpe|pos|position|positions)(_|$)")  # modules that learn a vector for each position


def import_transformers() -> Any:
    """transformers with its own progress bars off; ConfigError naming the extra where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"`fuyou train` reads models through transformers, which cannot be imported ({error}): "
            "pip install 'fuyou[hf]'."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_configuration(name: str, *, local_only: bool = False) -> Any:
    """The configuration of a local folder or a hub id; ConfigError where it is no causal language model of transformers'
    own. `local_only`: an id is looked up in the hub's cache on this machine, and nobody is asked."""
    transformers = import_transformers()
    _require_folder_or_id(name)
    options = {"trust_remote_code": False, "local_files_only": True} if local_only else _access(name)
    if Path(name).is_dir():
        _check_config_file(Path(name), transformers)
    with _in_words(name):
        configuration = transformers.AutoConfig.from_pretrained(name, **options)
    if type(configuration) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"Model {name} is a {configuration.model_type}, which is not a causal language model.")
    return configuration


def load_tokenizer(name: str, sequence_length: int, configuration: Any = None) -> Any:
    """The tokenizer of a local folder or a hub id, checked against the model's vocabulary and positions."""
    transformers = import_transformers()
    configuration = load_configuration(name) if configuration is None else configuration
    with _in_words(name, "The tokenizer of model"):
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
    """(the causal language model in host memory, in `precision` or in the dtype that its weights are stored in; what a
    person should know of it). ConfigError for weights that are missing, damaged, or of another model, and for a
    `sequence_length` beyond the positions that it has learnt."""
    transformers = import_transformers()
    dtype = "auto" if precision is None else _DTYPES[precision]
    if Path(name).is_dir():
        check_weights(name)
    with _in_words(name), _quiet(transformers):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **_access(name)
        )
    _refuse_other_weights(name, info)
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
    if info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        notes.append(
            f"The weights in {name} hold {len(unused)} tensors that {type(model).__name__} has no place for, such as "
            f"{unused[0]}: they are not trained and not exported."
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


def _refuse_other_weights(name: str, info: dict[str, Any]) -> None:
    if info["mismatched_keys"]:
        tensor, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise ConfigError(
            f"The weights in {name} do not fit its config.json: {len(info['mismatched_keys'])} tensors have another "
            f"shape, such as {tensor}, which is {tuple(stored)} in the file and {tuple(wanted)} in the model."
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"The weights in {name} lack {len(missing)} tensors of the model, such as {missing[0]}: "
            "they would be trained from random numbers; check the folder."
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


def _require_folder_or_id(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"Model folder {name} has no config.json: it is not a Hugging Face model folder.")
    elif path.exists():
        raise ConfigError(f"Model {name} is a file: give the Hugging Face folder that holds config.json.")
    elif path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise ConfigError(f"Model folder {name} does not exist, and a hub id would read `name` or `owner/name`.")


def _check_config_file(folder: Path, transformers: Any) -> None:
    """An architecture that this transformers has; its own words for the others differ from version to version."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy or download it again.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str) or not kind:
        raise ConfigError(
            f"{path} has no model_type, which says which architecture this is: take the config.json that the model was "
            "saved with."
        )
    if kind in transformers.CONFIG_MAPPING:
        return
    if "auto_map" in values:
        raise ConfigError(
            f"Model {folder} is a {kind!r}, whose code comes with the model and is not part of transformers "
            f"{transformers.__version__}: fuyou train runs no code from a model. Load it in a script of your own and use "
            "fuyou.wrap."
        )
    near = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=1, cutoff=0.6)
    raise ConfigError(
        f"Model {folder} is a {kind!r} (model_type in its config.json), an architecture that transformers "
        f"{transformers.__version__} does not know{f': did you mean {near[0]!r}?' if near else '.'} A model newer than "
        "this transformers needs pip install -U transformers."
    )


# --- errors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_words(name: str, what: str = "Model") -> Iterator[None]:
    """Whatever transformers and what it reads with raise, as one sentence; theirs is a paragraph of alternatives."""
    try:
        yield
    except FuyouError:
        raise
    except Exception as error:
        first = " ".join(str(error).split()).split(". ")[0].rstrip(".:")
        if not Path(name).is_dir():
            raise ConfigError(
                f"Model {name} is no folder here, and neither the hub nor its cache on this machine gave it: "
                f"{type(error).__name__}: {first}."
            ) from error
        if "backend tokenizer" in first:
            raise ConfigError(
                f"Model folder {name} has no tokenizer that can be read (tokenizer.json, or the files of an older one): "
                "copy those of the model it was made from."
            ) from error
        raise ConfigError(f"{what} {name} cannot be loaded: {type(error).__name__}: {first}.") from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Its table of tensors that do not fit is ours to say."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
