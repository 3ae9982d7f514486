"""What a person sees while a job trains: a bar on a terminal, and elsewhere a line every so many steps."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINES = 50  # of a whole run, where standard error is no terminal
LOOK_S = 1.0  # how often the run is asked what bounds it, at most


class Live:
    """A context manager. `run` is a fuyou.Run; `first` steps of `steps` have been made before."""

    def __init__(self, run: Any, steps: int, first: int = 0) -> None:
        self._run = run
        self._steps = steps
        self._done = first
        self._every = max(1, steps // LINES)
        self._status = ""
        self._next_look_s = 0.0
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, initial=first, desc="training", unit="step", mininterval=0.5, disable=not self._terminal,
            dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def step(self, loss: float, tokens: int, seconds: float) -> None:
        """One more is made."""
        self._done += 1
        figures = f"loss {loss:.3f}, {tokens / seconds:,.0f} tokens/s"
        if self._terminal:
            self._bar.set_postfix_str(f"{figures}{self._looked()}", refresh=False)
            self._bar.update()
        elif self._done % self._every == 0 or self._done in (1, self._steps):
            self.write(f"step {self._done:,} of {self._steps:,}: {figures}{self._looked()}")

    def write(self, text: str) -> None:
        """A line above the bar."""
        if self._terminal:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _looked(self) -> str:
        now = time.monotonic()
        if now >= self._next_look_s:
            self._next_look_s = now + LOOK_S
            self._status = status_text(self._run.status())
        return self._status


def status_text(status: dict[str, Any]) -> str:
    """', drives 93%, device 57%, host 99%, nvme 12%': what was busiest in the last step, and how full tiers are."""
    parts = [f"{status['busiest'].replace('_', ' ')} {status['busy']:.0%} busy"] if status["busiest"] else []
    parts += [f"{tier} {share:.0%} full" for tier, share in status["full"].items()]
    return "".join(f", {part}" for part in parts)
