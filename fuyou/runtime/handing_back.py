"""What a run that closes gives back to its model and to the optimizer that it was given."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from fuyou.core.sizes import format_bytes
from fuyou.runtime.handle import GradientHandle
from fuyou.runtime.measure import free_host_bytes
from fuyou.runtime.movers import Movers
from fuyou.runtime.optimizer import Optimizer
from fuyou.swap.unit import Member

MOST_OF_FREE = 0.95  # of free host memory


class HandingBack:
    """Weights, gradients and optimizer state as ordinary tensors, as far as free memory goes. `give` may be called again after
    an error: it goes on where it was."""

    def __init__(
        self, members: Iterable[Member], movers: Movers, optimizer: Optimizer, passed: torch.optim.Optimizer
    ) -> None:
        self._left = list(members)
        self._movers = movers
        self._optimizer = optimizer
        self._passed = passed
        self._warned = False

    @property
    def weight_bytes(self) -> int:
        """Of what is not given back yet."""
        return sum(member.entry.count * member.unit.dtype.itemsize for member in self._left)

    def give(self) -> bool:
        """False where weights and gradients do not fit into free memory, and nothing was given."""
        gradients = sum(
            member.entry.count * member.unit.dtype.itemsize
            for member in self._left
            if isinstance(member.parameter.grad, GradientHandle)
        )
        state = sum(8 * member.entry.count for member in self._left if member.step)
        free = free_host_bytes() * MOST_OF_FREE
        if self.weight_bytes + gradients > free:
            return False
        with_state = self.weight_bytes + gradients + state <= free
        if not with_state:
            warnings.warn(
                f"The optimizer's state ({format_bytes(state)}) does not fit into free memory beside the weights and is "
                "dropped: torch.save(run.optimizer.state_dict(), file) before closing where it is wanted.",
                stacklevel=4,
            )
        self._movers.swapper.drop_all()
        while self._left:
            self._give(self._left[0], with_state)
            del self._left[0]
        return True

    def _give(self, member: Member, with_state: bool) -> None:
        parameter, dtype = member.parameter, member.parameter.dtype
        device = member.original_device
        grad = parameter.grad
        if isinstance(grad, GradientHandle):
            with self._movers.gradients.borrowed(grad.gradient) as value:
                grad = self._at(value, device)
                grad = grad.clone() if grad is value else grad
        if with_state and parameter in self._optimizer.state:
            state = self._optimizer.state.leave(member)
            state.pop("master", None)
            self._passed.state[parameter] = {
                kind: value if kind == "step" else self._at(value.to(dtype), device) for kind, value in state.items()
            }
        value = torch.empty(member.entry.count, dtype=member.unit.dtype, device="cpu")
        self._movers.swapper.read_member(member, value)
        parameter.grad = None
        self._movers.away.give_back(member, self._at(value.view(member.entry.shape), device))
        parameter.grad = grad.to(parameter.device) if grad is not None else None

    def _at(self, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """There, or as it is where the device has no room for it: weights that stay in host memory are not lost."""
        try:
            return value.to(device)
        except torch.OutOfMemoryError:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{device} has no room for all that the run gives back: some of it stays in host memory. Free what is there, "
                    f"then model.to({str(device)!r}).",
                    stacklevel=6,
                )
            return value
