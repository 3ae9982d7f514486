"""A run, and whatever it is made of, belongs to the process that made it."""

from __future__ import annotations

import os

from fuyou.core.errors import StateError


def refuse_forked(pid: int, what: str) -> None:
    """StateError in a child that was forked from process `pid`: there are no threads there that others wait for, and no memory
    of the arenas."""
    if os.getpid() != pid:
        raise StateError(
            f"{what} belongs to process {pid} and was used in its forked child {os.getpid()}: train in the parent, and pass "
            "data, not the model, to workers."
        )
