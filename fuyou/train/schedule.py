"""Learning rates over a run: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_factor(schedule: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """What step k (counted from 0) multiplies the learning rate with; for `torch.optim.lr_scheduler.LambdaLR`.

    Warm-up is (k + 1) / warmup_steps, so that the first step moves. The decays start at 1 in the first step after it
    and would reach 0 in the step after the last: "linear" in a straight line, "cosine" along half a cosine
    (Loshchilov & Hutter, arXiv 1608.03983, without restarts).
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
