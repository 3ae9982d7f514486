"""The model and tokenizer of `fuyou train`, through transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fuyou.core.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def load_tokenizer(name: str, sequence_length: int) -> Any:
    """The tokenizer of a local folder or a hub id, checked against the model's vocabulary and positions."""
    transformers = import_transformers()
    _require_folder_or_id(name)
    with _one_sentence(name):
        configuration = transformers.AutoConfig.from_pretrained(name)
    if type(configuration) not in transformers.AutoModelForCausalLM._model_mapping:
        raise ConfigError(f"Model {name} is a {configuration.model_type}, which is not a causal language model.")
    with _one_sentence(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    text = configuration.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        raise ConfigError(
            f"sequence_length={sequence_length} is more than the {positions} positions that {name} was made for: "
            f"set at most {positions}."
        )
    if len(tokenizer) > text.vocab_size:
        raise ConfigError(
            f"The tokenizer in {name} has {len(tokenizer)} tokens and the model's vocabulary {text.vocab_size}: "
            "they do not belong together; enlarge the model's embedding, or take its own tokenizer."
        )
    return tokenizer


def load_model(name: str, precision: str | None) -> Any:
    """The causal language model in host memory, in `precision`, or in the dtype that its weights are stored in."""
    transformers = import_transformers()
    dtype = "auto" if precision is None else _DTYPES[precision]
    with _one_sentence(name):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"The weights in {name} lack {len(missing)} tensors of the model, such as {missing[0]}: "
            "they would be trained from random numbers; check the folder."
        )
    stored = {parameter.dtype for parameter in model.parameters()}
    if precision is None and torch.float16 in stored:
        raise ConfigError(
            f"Model {name} is stored in fp16, which is not trained in: set precision to fp32, which keeps every bit, "
            "or to bf16, which takes half the memory and rounds to 8 bits of mantissa."
        )
    return model


def _require_folder_or_id(name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"Model folder {name} has no config.json: it is not a Hugging Face model folder.")
    elif path.exists():
        raise ConfigError(f"Model {name} is a file: give the Hugging Face folder that holds config.json.")
    elif path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise ConfigError(f"Model folder {name} does not exist, and a hub id would read `name` or `owner/name`.")


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """transformers explains a missing file in a paragraph of alternatives; keep its first sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        first = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        where = "cannot be loaded" if Path(name).is_dir() else "is no folder here, and the hub did not give it"
        raise ConfigError(f"Model {name} {where}: {type(error).__name__}: {first}.") from error
