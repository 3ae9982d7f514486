"""A Hugging Face model folder as transformers meets it: what it cannot read is said in words."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuyou.core.errors import ConfigError, FuyouError


def import_transformers() -> Any:
    """transformers with its own progress bars off; ConfigError naming the extra where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"fuyou reads Hugging Face models through transformers, which cannot be imported ({error}): "
            "pip install 'fuyou[hf]'."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def check_folder(path: Path) -> None:
    """ConfigError where `path` is no Hugging Face model folder."""
    if not path.is_dir():
        what = "is a file: give the Hugging Face folder that holds config.json" if path.exists() else "does not exist"
        raise ConfigError(f"Model folder {path} {what}.")
    if not (path / "config.json").is_file():
        raise ConfigError(f"Model folder {path} has no config.json: it is not a Hugging Face model folder.")


def check_config_file(folder: Path, transformers: Any) -> None:
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
            f"{transformers.__version__}: fuyou runs no code from a model. Load it in a script of your own and use fuyou.wrap."
        )
    near = difflib.get_close_matches(kind, list(transformers.CONFIG_MAPPING), n=1, cutoff=0.6)
    raise ConfigError(
        f"Model {folder} is a {kind!r} (model_type in its config.json), an architecture that transformers "
        f"{transformers.__version__} does not know{f': did you mean {near[0]!r}?' if near else '.'} A model newer than "
        "this transformers needs pip install -U transformers."
    )


@contextlib.contextmanager
def in_words(name: str, what: str = "Model") -> Iterator[None]:
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
def quiet(transformers: Any) -> Iterator[None]:
    """Its table of tensors that do not fit is ours to say."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
