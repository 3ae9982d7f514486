"""fuyou: full fine-tuning of models that are larger than the machine's memory, streamed over device, RAM and NVMe."""

from fuyou.api import Run, wrap
from fuyou.core.config import Config
from fuyou.core.errors import (
    BudgetError,
    ConfigError,
    DataError,
    DeadlineError,
    FuyouError,
    StateError,
    StorageIOError,
    StoreError,
)
from fuyou.report import Report

__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "Config",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "FuyouError",
    "Report",
    "Run",
    "StateError",
    "StorageIOError",
    "StoreError",
    "wrap",
]
