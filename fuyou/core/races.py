"""The debug switch `Config(debug_races=SEED)`: wrong schedules give NaN or an error now, not other bits one day."""

from __future__ import annotations

import random
import threading
import time

import torch

from fuyou.core.errors import StateError

POISON = 0xFF  # of every byte: NaN in fp32 and bf16, -1 in integers
# (share of the operations, at most this many seconds late): enough of them are not late at all for a step to end soon, and
# some are later than several others together, so that what usually comes first comes last.
LATENESS = ((0.70, 0.0), (0.25, 2e-3), (0.05, 10e-3))


class Races:
    """Delays and poison, drawn from one seed; where the switch is off there is no such object, only None.

    `delay` is called where an asynchronous operation begins or ends, in the thread that it runs in, and `fill` on memory
    whose content nobody may read any more, or yet. Any thread may call them. Which operation gets which draw depends on
    which thread comes first: a seed varies the schedule, it does not replay one.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._draws = random.Random(seed)
        self._lock = threading.Lock()  # of the draws: one operation, one number

    def late_s(self) -> float:
        """How many seconds late the next operation is; most are not."""
        with self._lock:
            kind, share = self._draws.random(), self._draws.random()
        for portion, most_s in LATENESS:
            if kind < portion:
                return share * most_s
            kind -= portion
        return 0.0

    def delay(self) -> None:
        """Let the calling thread be late."""
        late_s = self.late_s()
        if late_s > 0.0:
            time.sleep(late_s)

    def fill(self, memory: torch.Tensor) -> None:
        """Poison `memory` ((n,) uint8, any device; on CUDA queued on the current stream): whoever reads it sees NaN.

        Autograd does not count it as a change: a view of a slot that it saved is valid again after the next fetch.
        """
        memory.data.fill_(POISON)

    def check(self, memory: torch.Tensor, what: str) -> None:
        """StateError where `memory` ((n,) uint8 host bytes, poisoned when they were given back) has been written since."""
        whole = memory.numel() & ~7
        words, rest = memory[:whole].view(torch.int64), memory[whole:]
        if bool((words == -1).all()) and bool((rest == POISON).all()):
            return
        written = torch.nonzero(memory != POISON)
        raise StateError(
            f"debug_races={self.seed}: {what} was written after it had been given back: {written.numel()} of its "
            f"{memory.numel()} bytes, the first at {int(written[0])}. Something writes there without holding it: an operation "
            "that nobody waited for, or a stale view."
        )
