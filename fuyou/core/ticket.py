"""One asynchronous operation, one Ticket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

DEADLINE_S = 300.0  # generous: a wait longer than this is a fault to be told, not patience to be had


@runtime_checkable
class Ticket(Protocol):
    """Handle of an operation that has been started.

    It keeps the operation's buffers alive until the operation has ended. `wait` returns, or raises that operation's
    own error, any number of times; past `timeout_s` it raises DeadlineError saying what it waited for.
    """

    def done(self) -> bool: ...

    def wait(self, timeout_s: float = DEADLINE_S) -> None: ...


class Done:
    """A ticket of something that is already complete."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        return None


DONE = Done()


class AllOf:
    """A ticket that is done when every one of `tickets` is; its wait raises the first error in their order."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tuple(tickets)

    def done(self) -> bool:
        return all(ticket.done() for ticket in self._tickets)

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        for ticket in self._tickets:
            ticket.wait(timeout_s)
