"""What a forward finds around it beside its inputs, and a recomputation must find again: random generators and autocast."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy
import torch


class RandomState:
    """Python's, numpy's and torch's generators as they are now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._python = random.getstate()
        self._numpy = numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self.device)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.restore()


class Autocast:
    """The autocast settings of the CPU and of CUDA as they are now."""

    def __init__(self) -> None:
        self._settings = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
        ]
        self._cache = torch.is_autocast_cache_enabled()

    @property
    def enabled(self) -> bool:
        return any(enabled for _, enabled, _ in self._settings)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self._settings:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self._cache))
            yield
