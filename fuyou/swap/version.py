"""What torch checks of a saved tensor, where hooks save it: that nobody changed it since."""

from __future__ import annotations

import torch

from fuyou.core.errors import StateError


class Version:
    """How often a tensor had been changed in place when it was saved; torch looks at this only where no hook saves."""

    __slots__ = ("_counter", "_shape", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._counter = tensor.detach()  # has the same counter, and keeps it without the bytes
        self._counter.data = tensor.new_empty(0)
        self._shape = tuple(tensor.shape)
        self._version = tensor._version

    @property
    def changed(self) -> bool:
        return self._counter._version != self._version

    def check(self) -> None:
        if self.changed:
            raise StateError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
                f"shape {self._shape} is at version {self._counter._version}; expected version {self._version} "
                "instead. Run backward before changing it, or compute the loss again."
            )
