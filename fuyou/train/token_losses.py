"""Cross-entropy of a linear layer, computed in tiles of its logits: forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

TILE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}  # fp32 logits at a time; on CUDA enough rows to fill the device
_LEAST_COLUMNS = 64  # of a tile: a matrix product needs some

Step = tuple[
    Callable[..., torch.Tensor], tuple[Any, ...]
]  # one elementwise operation on logits: function(logits, *these)


class TokenLosses(torch.autograd.Function):
    """hidden (N, D), weight (V, D), bias (V,) or None, labels (N,) int64 → (N,) losses, fp32 (fp64 for fp64).

    Forward goes over rows, as each loss needs all of its row; backward over columns, so that each row of the weight's
    gradient is one product over all N, accumulated and rounded once as in a whole product; the hidden states' gradient,
    (N, D), is summed in fp32. Backward computes the logits again: between the two only 8 bytes a row are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        ignored: int,
        steps: tuple[Step, ...],
    ) -> torch.Tensor:
        kept = labels != ignored
        places = labels.where(kept, 0)
        precision = torch.promote_types(hidden.dtype, torch.float32)
        losses, tops, sums = (hidden.new_empty(len(labels), dtype=precision) for _ in range(3))
        rows = max(1, _tile_elements(hidden, precision) // len(weight))
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            logits = applied(functional.linear(hidden[part], weight, bias), steps).to(precision)  # (rows, V)
            tops[part] = logits.amax(1)
            logits -= tops[part, None]  # as torch's log_softmax does: a loss near 0 keeps its digits
            picked = logits.gather(1, places[part, None])[:, 0]
            sums[part] = logits.exp_().sum(1).log()
            losses[part] = sums[part] - picked
        ctx.save_for_backward(hidden, weight, bias)
        # Not saved through autograd, whose hooks would run the block again for them: a few bytes a row.
        ctx.rest = (tops, sums, places, kept, steps)
        return losses.where(kept, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        hidden, weight, bias = ctx.saved_tensors
        tops, sums, places, kept, steps = ctx.rest
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        scale = gradient.where(kept, 0)
        precision = gradient.dtype
        hidden_gradient = torch.zeros_like(hidden, dtype=precision) if needs_hidden else None
        weight_gradient = torch.empty_like(weight) if needs_weight else None
        bias_gradient = torch.empty_like(bias) if needs_bias else None
        wide = _multiplied(hidden)
        columns = max(
            _LEAST_COLUMNS, _tile_elements(hidden, precision) // len(scale) // _LEAST_COLUMNS * _LEAST_COLUMNS
        )
        for start in range(0, len(weight), columns):
            part = slice(start, start + columns)
            block = weight[part]
            with torch.enable_grad():  # of the noted steps alone
                product = functional.linear(hidden, block, None if bias is None else bias[part])
                product = product.detach().requires_grad_()  # (N, columns)
                logits = applied(product, steps).to(precision)
            wanted = logits.detach() - tops[:, None]
            wanted.sub_(sums[:, None]).exp_()
            at = places - start
            inside = (at >= 0) & (at < len(block))
            wanted.scatter_add_(1, at.clamp(0, len(block) - 1)[:, None], -inside.to(precision)[:, None])
            wanted *= scale[:, None]
            (wanted,) = torch.autograd.grad(logits, product, wanted)
            if bias_gradient is not None:
                bias_gradient[part] = wanted.sum(0)
            wanted = _multiplied(wanted)
            if weight_gradient is not None:
                weight_gradient[part] = _product(wanted.t(), wide)
            if hidden_gradient is not None:
                hidden_gradient += _product(wanted, _multiplied(block))
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient.to(hidden.dtype)
        return hidden_gradient, weight_gradient, bias_gradient, None, None, None


def _tile_elements(hidden: torch.Tensor, precision: torch.dtype) -> int:
    return TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"]) // precision.itemsize


def applied(logits: torch.Tensor, steps: tuple[Step, ...]) -> torch.Tensor:
    for function, arguments in steps:
        logits = function(logits, *arguments)
    return logits


def _multiplied(matrix: torch.Tensor) -> torch.Tensor:
    """A factor for `_product`: as it is where bf16 can be multiplied with an fp32 result, which is on CUDA.

    (A CPU cannot, and one without bf16 instructions is many times slower at any bf16 product.)
    """
    if matrix.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8
        return matrix
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product, not rounded to bf16 yet."""
    if left.dtype == torch.bfloat16:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
