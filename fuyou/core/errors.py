"""Every error that fuyou raises for something a user, a disk or a driver caused.

A message is one paragraph: what happened, the numbers asked and available with units, what to do.
"""

from __future__ import annotations


class FuyouError(Exception):
    """Root of the family; the CLI prints it as one paragraph and exits with `exit_status`.

    2: an argument, a configuration, an input or a budget is to be changed. 1: a job that was right went wrong.
    """

    exit_status = 2


class ConfigError(FuyouError, ValueError):
    """A bad argument, configuration key, model or optimizer."""


class BudgetError(FuyouError, MemoryError):
    """A tier's budget cannot hold what is needed. Nothing was trained wrongly: no update had started.

    `tier` is "device", "host" or "nvme"; `needed_bytes - given_bytes == shortfall_bytes`.
    """

    def __init__(self, message: str, *, tier: str, needed_bytes: int, given_bytes: int) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.given_bytes = given_bytes

    @property
    def shortfall_bytes(self) -> int:
        return self.needed_bytes - self.given_bytes


class StoreError(FuyouError):
    """An NVMe folder that is missing, not writable, in use, or without room."""


class StorageIOError(FuyouError, OSError):
    """A read or write failed: the message holds the errno's text, file, offset and sizes."""


class DeadlineError(FuyouError, TimeoutError):
    """A wait passed its deadline; the message names the operations in flight."""


class StateError(FuyouError, RuntimeError):
    """Something was used in a state that does not allow it (closed run, forked child, illegal transition)."""


class DataError(FuyouError, ValueError):
    """Training data that is missing, empty or malformed; file and line are named."""


class DivergedError(FuyouError, ArithmeticError):
    """The loss or the gradient is not finite; the update that it belongs to was not made."""

    exit_status = 1


class StoppedError(FuyouError):
    """A signal asked the job to stop, and it has, after a step; `exit_status` is 128 + the signal's number."""

    def __init__(self, message: str, *, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
