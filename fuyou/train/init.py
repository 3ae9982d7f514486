"""`fuyou init`: a commented configuration to fill in. Its text is config.yaml beside this file; examples/ has a copy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from fuyou.core.errors import ConfigError

_COMMENT_COLUMN = 32  # where the template's comments begin


def write_config(
    path: str | os.PathLike[str], values: Mapping[str, str | Sequence[str] | None], force: bool
) -> list[str]:
    """Write the template to `path` with `values` in place of its own; returns those of the first four keys that are
    still the template's. ConfigError where `path` exists (but `force`) or cannot be written."""
    text = template()
    for key, value in values.items():
        text = _replaced(text, key, value)
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: give the path of the file to write, as in {target / 'fuyou.yaml'}.")
    try:
        with target.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{target} exists: give another path, or --force to overwrite it.") from None
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror}. Give a path in a folder that exists."
        ) from None
    return [key for key in ("model", "data", "output", "nvme") if key not in values]


def template() -> str:
    """Every key of a configuration with its default and a comment."""
    return files("fuyou.train").joinpath("config.yaml").read_text("utf-8")


def _replaced(text: str, key: str, value: str | Sequence[str] | None) -> str:
    """The line of `key` with this value, its comment where it stood, or behind a longer value."""
    written = value if value is None or isinstance(value, str) else list(value)
    dumped = yaml.safe_dump(written, default_flow_style=True, allow_unicode=True, width=2**31)
    line = f"{key}: {dumped.removesuffix('...' + chr(10)).strip()}"
    found = re.search(rf"^{key}: .*?(#.*)?$", text, re.MULTILINE)
    if found is None:
        raise ConfigError(f"The template of the configuration has no key {key!r}.")
    comment = found[1] or ""
    line = f"{line:<{_COMMENT_COLUMN - 1}} {comment}".rstrip()
    return text[: found.start()] + line + text[found.end() :]
