"""One asynchronous operation, one Ticket."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from fuyou.core.errors import DeadlineError

# The default of Config.deadline_s, and of whatever is made without one. Generous: a wait longer than this is a fault to be
# told, not patience to be had.
DEADLINE_S = 300.0


@runtime_checkable
class Ticket(Protocol):
    """Handle of an operation that has been started.

    It keeps the operation's buffers alive until the operation has ended. `wait` returns, or raises that operation's
    own error, any number of times; past `timeout_s` (None: the deadline of whatever made it) it raises DeadlineError saying
    what it waited for.
    """

    def done(self) -> bool: ...

    def wait(self, timeout_s: float | None = None) -> None: ...


class Done:
    """A ticket of something that is already complete."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        return None


DONE = Done()


class Failed:
    """A ticket of something that could not be started."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        raise self._error


class AllOf:
    """A ticket that is done when every one of `tickets` is; its wait raises the first error in their order."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tuple(tickets)

    def done(self) -> bool:
        return all(ticket.done() for ticket in self._tickets)

    def wait(self, timeout_s: float | None = None) -> None:
        wait_for(self._tickets, timeout_s)


def list_text(names: Sequence[str], shown: int = 8) -> str:
    """The first of `names`, and how many more there are: part of a DeadlineError's message."""
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return "; ".join(names[:shown]) + more


def wait_for(tickets: Sequence[Ticket], timeout_s: float | None = None) -> None:
    """Wait for each of `tickets`, in their order: `timeout_s` for all of them together, or None for each its own deadline."""
    if timeout_s is None:
        for ticket in tickets:
            ticket.wait()
        return
    deadline = time.monotonic() + timeout_s
    for ticket in tickets:
        ticket.wait(max(0.0, deadline - time.monotonic()))


def await_ended(tickets: Sequence[Ticket], until: float) -> None:
    """Every one of `tickets` has ended, well or not: nothing moves its memory any more. DeadlineError where one has not at
    `until`, a time of time.monotonic()."""
    for ticket in tickets:
        while not ticket.done():
            try:
                ticket.wait(max(0.0, until - time.monotonic()))
            except DeadlineError:
                raise
            except Exception as error:  # of the writer before a read, which itself may not have ended
                if time.monotonic() > until:
                    raise DeadlineError(f"An operation is still under way after an error: {error}") from error
                time.sleep(1e-3)
