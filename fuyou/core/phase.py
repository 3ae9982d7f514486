"""Names in a profiler's trace."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_UNSEEN = contextlib.nullcontext()


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """`torch.profiler.record_function(name)` while a profiler looks on; else nothing, which costs nothing."""
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _UNSEEN
