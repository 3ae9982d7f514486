"""What is written when memory runs out, before the error goes on."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuyou.core.errors import BudgetError
from fuyou.report.report import Report

NAME = "post-mortem"  # .json, .html


class PostMortem:
    """`notice(error)` writes the report of the moment to `folder`, where `error` says that memory ran out; the first to see an
    error writes, and those it passes on its way do not again. It never raises: the error that is on its way is what counts.

    `content()`, a bound method, is the report's dict. Its object is the run, which holds this: it is referred to weakly.
    """

    def __init__(self, folder: Path, content: Callable[[], dict[str, Any]]) -> None:
        self.folder = folder
        self._content = weakref.WeakMethod(content)
        self._seen: tuple[int, str] = (0, "")

    def notice(self, error: BaseException, during: str) -> None:
        if not is_memory_error(error) or self._known(error):
            return
        self._seen = _key(error)
        with contextlib.suppress(Exception):  # there may be no memory, or no room, for this either
            told = {"type": type(error).__name__, "message": str(error), "during": during}
            content = self._content()
            if content is None:
                return
            report = Report({**content(), "error": told})
            report.save(self.folder / f"{NAME}.json")
            report.save(self.folder / f"{NAME}.html")
            warnings.warn(
                f"Memory ran out during {during}: what held what is in {self.folder / NAME}.html and .json.",
                stacklevel=3,
            )

    def _known(self, error: BaseException) -> bool:
        """It, or what it was made of: torch's own out-of-memory error goes on as a BudgetError."""
        chain: BaseException | None = error
        while chain is not None:
            if _key(chain) == self._seen:
                return True
            chain = chain.__cause__ or chain.__context__
        return False


def is_memory_error(error: BaseException) -> bool:
    """Python's, torch's of a device or of the host's allocator, or a budget that would have been passed."""
    if isinstance(error, (MemoryError, BudgetError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _key(error: BaseException) -> tuple[int, str]:
    return id(error), str(error)  # not the error itself, whose frames hold what was computed
