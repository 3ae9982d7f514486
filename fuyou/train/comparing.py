"""What two trainings came to, parameter by parameter: exact, within tolerance, or wrong. Numbers in, a verdict out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Verdict = Literal["exact", "within tolerance", "wrong"]

# Of how far a parameter has moved: where bits are not promised, sums are in another order, and Adam makes much of the little
# that is left of gradients that nearly cancel. A gradient that is wrong moves its parameter another way altogether.
TOLERANCE = 0.05
PIECE_ELEMENTS = 1 << 22  # compared at a time: fp64 copies of them are all that it takes


@dataclass(frozen=True)
class Difference:
    """Of one parameter after the last step. `largest`: of any element, absolute; `differing_count` of `count` elements do.
    `relative`: root of the mean square of the difference, over that of how far plain PyTorch moved it (0 / 0 is 0)."""

    name: str
    count: int
    differing_count: int
    largest: float
    relative: float


def difference(name: str, plain: torch.Tensor, other: torch.Tensor, moved_square: float) -> Difference:
    """`plain` and `other`, of one shape, on the CPU; `moved_square`: sum of squares of how far `plain` has come. nan equals
    nan."""
    differing, largest, square = 0, 0.0, 0.0
    flat, its = plain.reshape(-1), other.reshape(-1)
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        a, b = (each[start : start + PIECE_ELEMENTS].double() for each in (flat, its))
        unequal = ~((a == b) | (a.isnan() & b.isnan()))
        count = int(unequal.sum())
        if not count:
            continue
        gap = (a - b).abs()[unequal].nan_to_num(nan=float("inf"))
        differing += count
        largest = max(largest, gap.max().item())
        square += gap.square().sum().item()
    relative = 0.0 if not square else float("inf") if not moved_square else (square / moved_square) ** 0.5
    return Difference(name, flat.numel(), differing, largest, relative)


def moved_square(before: torch.Tensor, after: torch.Tensor) -> float:
    """Sum of squares of how far a parameter has come; both fp32 or bf16, on the CPU."""
    total = 0.0
    flat, its = before.reshape(-1), after.reshape(-1)
    for start in range(0, flat.numel(), PIECE_ELEMENTS):
        a, b = (each[start : start + PIECE_ELEMENTS].double() for each in (flat, its))
        total += (a - b).square().sum().item()
    return total


def verdict(differences: Sequence[Difference], losses_equal: bool, bits_promised: bool) -> Verdict:
    """`bits_promised`: fuyou promises plain PyTorch's bits there; else rounding may differ."""
    if losses_equal and not any(each.differing_count for each in differences):
        return "exact"
    within = all(each.relative <= TOLERANCE for each in differences)
    return "within tolerance" if within and not bits_promised else "wrong"


def worst_first(differences: Sequence[Difference]) -> list[Difference]:
    """Those that differ."""
    return sorted((each for each in differences if each.differing_count), key=lambda each: -each.relative)
