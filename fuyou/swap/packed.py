"""What stands in autograd's graph for a tensor that a forward saved."""

from __future__ import annotations

import torch

from fuyou.swap.book import Held, TensorBook
from fuyou.swap.stashed import Stashed
from fuyou.swap.unit import Unit
from fuyou.swap.version import Version


class Kept(Version):
    """A tensor as it was saved."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self._tensor = tensor.detach()

    def value(self) -> torch.Tensor:
        self.check()
        return self._tensor


class SavedHere(Held):
    """A tensor that stays on the device until backward has used it."""

    __slots__ = ("_version",)

    def __init__(self, tensor: torch.Tensor, book: TensorBook, what: str) -> None:
        super().__init__(tensor.detach(), book, what)
        self._version = Version(tensor)

    def value(self) -> torch.Tensor:
        self._version.check()
        return self.tensor


class SavedWeight:
    """A view of a unit's storage, by its place."""

    __slots__ = ("offset", "size", "stride", "unit", "version")

    def __init__(self, unit: Unit, tensor: torch.Tensor) -> None:
        self.unit = unit
        self.size, self.stride, self.offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self.version = Version(tensor)


class SavedAway:
    """A view of a storage that has left the device, or is about to; has the claim on it that it is made with."""

    __slots__ = ("_dtype", "_offset", "_size", "_stride", "_version", "stashed")

    def __init__(self, stashed: Stashed, tensor: torch.Tensor) -> None:
        self.stashed = stashed
        self._dtype = tensor.dtype
        self._size, self._stride, self._offset = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._version = Version(tensor)

    def __del__(self) -> None:
        self.stashed.unclaim()

    def value(self) -> torch.Tensor:
        """`tensor`, if nobody changed it since it was saved, as torch checks."""
        self._version.check()
        return self.tensor()

    def tensor(self) -> torch.Tensor:
        """The view as it was, on the device."""
        flat = self.stashed.get()
        view = torch.empty(0, dtype=self._dtype, device=flat.device)
        return view.set_(flat.untyped_storage(), self._offset, self._size, self._stride)
