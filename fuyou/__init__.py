"""fuyou: full fine-tuning of models that are larger than the machine's memory, streamed over device, RAM and NVMe."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fuyou.core.config import Config
from fuyou.core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DeadlineError,
    DivergedError,
    FuyouError,
    StateError,
    StorageIOError,
    StoreError,
)
from fuyou.report import Report

if TYPE_CHECKING:
    from fuyou.api import Run, wrap
    from fuyou.pretrained import load_pretrained

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Config",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "DivergedError",
    "FuyouError",
    "Report",
    "Run",
    "StateError",
    "StorageIOError",
    "StoreError",
    "load_pretrained",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """`wrap`, `Run` and `load_pretrained` bring torch, 200 MB and seconds: `fuyou launch`, which waits beside a training
    script for its whole life, and a command that is refused do without."""
    if name in ("api", "pretrained"):
        return importlib.import_module(f"fuyou.{name}")
    if name in ("Run", "wrap", "load_pretrained"):
        return getattr(importlib.import_module("fuyou.pretrained" if name == "load_pretrained" else "fuyou.api"), name)
    raise AttributeError(f"module 'fuyou' has no attribute {name!r}")
