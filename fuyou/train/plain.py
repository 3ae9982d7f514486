"""The plain side of `fuyou verify`: PyTorch's own forward, backward and AdamW, everything in memory.

The update is `torch.optim.AdamW(fused=True)` on the CPU. In fp32 on a CPU it runs on the parameters; otherwise on fp32
masters in host memory, to which gradients are cast, and of which the parameters are copies in their dtype on their device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import BudgetError
from fuyou.core.sizes import format_bytes
from fuyou.train.config import TrainConfig
from fuyou.train.job import adamw

BYTES_PER_PARAMETER = (
    24  # of host memory: weights, gradient, master and its gradient, two moments, a copy from the start
)


class Plain:
    """A model in training, as the loop takes it: `model`, `optimizer`, `device`."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.device = device
        self.trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.masters = {
            name: each if device.type == "cpu" and each.dtype == torch.float32 else each.detach().float().cpu()
            for name, each in self.trained.items()
        }
        self.optimizer = adamw(list(self.masters.values()), config)

    def step(self) -> None:
        for name, master in self.masters.items():
            parameter = self.trained[name]
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float().cpu()
        self.optimizer.step()
        with torch.no_grad():
            for name, master in self.masters.items():
                parameter = self.trained[name]
                if master is not parameter:
                    parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


class _Saved:
    """What the graph holds in a tensor's place. Without a `__del__`: a signal's error would be lost in it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # a saved output that knew its graph would keep it alive


@contextlib.contextmanager
def limited_activations(model: nn.Module, limit_bytes: int, tier: str) -> Iterator[None]:
    """BudgetError, before memory is full, in a forward that saves more than `limit_bytes` for its backward."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    found: list[
        tuple[weakref.ref[_Saved], int, int]
    ] = []  # storage and its bytes; what the graph has let go of goes later
    sizes: dict[int, int] = {}
    most_found = [1024]  # after the last sweep

    def sweep() -> None:
        found[:] = [each for each in found if each[0]() is not None]
        sizes.clear()
        sizes.update((key, nbytes) for _, key, nbytes in found)

    def pack(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in weights:
            return tensor.detach()
        saved = _Saved(tensor)
        storage = tensor.untyped_storage()
        found.append((weakref.ref(saved), storage.data_ptr(), storage.nbytes()))
        sizes[storage.data_ptr()] = storage.nbytes()
        if len(found) > 2 * most_found[0] or sum(sizes.values()) > limit_bytes:
            sweep()
            most_found[0] = max(len(found), 1024)
        needed = sum(sizes.values())
        if needed > limit_bytes:
            raise BudgetError(
                f"Plain PyTorch cannot be compared with: its forward saves more than {format_bytes(limit_bytes)} of "
                f"activations, which is what {tier} memory has left beside the model. Verify with fewer rows or tokens "
                "(--set batch_size=1, --set sequence_length=…), or fewer layers (--layers).",
                tier=tier, needed_bytes=needed, given_bytes=limit_bytes,
            )  # fmt: skip
        return saved

    def unpack(saved: Any) -> torch.Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
