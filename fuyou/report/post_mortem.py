"""What is written when memory runs out, before the error goes on; or before the kernel kills, which tells nobody."""

from __future__ import annotations

import contextlib
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fuyou.core.errors import BudgetError
from fuyou.core.limits import MemoryGroup, memory_group, read_memory
from fuyou.core.sizes import format_bytes
from fuyou.report.report import Report
from fuyou.runtime.measure import trim_heap

NAME = "post-mortem"  # .json, .html
NEAR = 0.05  # of a control group's limit: with less left it is near
LOOK_S = 0.25  # how often that is looked at, at most


class PostMortem:
    """`notice(error)` writes the report of the moment to `folder`, where `error` says that memory ran out; the first to see an
    error writes, and those it passes on its way do not again. It never raises: the error that is on its way is what counts.

    `content()`, a bound method, is the report's dict. Its object is the run, which holds this: it is referred to weakly.
    """

    def __init__(self, folder: Path, content: Callable[[], dict[str, Any]]) -> None:
        self.folder = folder
        self._content = weakref.WeakMethod(content)
        self._seen: tuple[int, str] = (0, "")
        self._groups = [Path(each.folder) for each in read_memory().groups if each.limit_bytes is not None]
        self._next_look_s = 0.0

    def notice(self, error: BaseException, during: str) -> None:
        if not is_memory_error(error) or self._known(error):
            return
        self._seen = _key(error)
        self._write(type(error).__name__, str(error), during, f"Memory ran out during {during}")

    def look(self) -> None:
        """To be called often: as `notice`, once, when a control group comes near its limit, where the kernel would kill."""
        now = time.monotonic()
        if not self._groups or now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_S
        if not any(_is_near(memory_group(each)) for each in self._groups):
            return
        trim_heap()  # freed memory that the C library keeps counts there too
        for group in filter(_is_near, map(memory_group, self._groups)):
            self._groups = []
            said = (
                f"The control group {group.folder} has {format_bytes(group.free_bytes or 0)} of its "
                f"{format_bytes(group.limit_bytes or 0)} of memory left, and at its limit the kernel kills"
            )
            self._write("MemoryPressure", f"{said}.", "training", said)
            return

    def _write(self, kind: str, message: str, during: str, said: str) -> None:
        with contextlib.suppress(Exception):  # there may be no memory, or no room, for this either
            content = self._content()
            if content is None:
                return
            report = Report({**content(), "error": {"type": kind, "message": message, "during": during}})
            report.save(self.folder / f"{NAME}.json")
            report.save(self.folder / f"{NAME}.html")
            warnings.warn(f"{said}: what held what is in {self.folder / NAME}.html and .json.", stacklevel=4)

    def _known(self, error: BaseException) -> bool:
        """It, or what it was made of: torch's own out-of-memory error goes on as a BudgetError."""
        chain: BaseException | None = error
        while chain is not None:
            if _key(chain) == self._seen:
                return True
            chain = chain.__cause__ or chain.__context__
        return False


def _is_near(group: MemoryGroup) -> bool:
    """Its limit is near."""
    return group.free_bytes is not None and group.free_bytes < NEAR * (group.limit_bytes or 0)


def is_memory_error(error: BaseException) -> bool:
    """Python's, torch's of a device or of the host's allocator, or a budget that would have been passed."""
    if isinstance(error, (MemoryError, BudgetError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _key(error: BaseException) -> tuple[int, str]:
    return id(error), str(error)  # not the error itself, whose frames hold what was computed
