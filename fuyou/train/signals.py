"""SIGINT and SIGTERM of a job: the step is finished first. In the command line only; the library leaves signals alone."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from fuyou.core.errors import StoppedError
from fuyou.train.output import say

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """In a `with`: the first of the signals is noted (`asked`), a second one ends the process at once, which is as safe as a
    kill. `check` raises StoppedError once one has come."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        for each in _SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:  # nohup's stay ignored
                self._before[each] = signal.signal(each, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler if handler is not None else signal.SIG_DFL)

    def check(self, step: int) -> None:
        if self.asked is not None:
            raise StoppedError(f"{self.asked.name}: stopped after step {step}.", exit_status=128 + self.asked)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = signal.Signals(number)
        say(f"{self.asked.name}: the step under way is finished first; a second signal ends the job at once.")
