"""One chunk's update of one step, and how far it has come."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fuyou.core.ticket import DONE, Ticket
from fuyou.swap.adam import AdamHyper
from fuyou.swap.ranges import Staging
from fuyou.swap.unit import Chunk, Member


@dataclass(frozen=True)
class MemberUpdate:
    """What one step does to one parameter: torch's step count after it, and the gradient's scales in order."""

    hyper: AdamHyper
    step: int
    scales: tuple[float, ...]


class Phase(enum.Enum):
    """How far an update has come, and what it holds.

    QUEUED: nothing but, where it is still in staging, its chunk's gradient.
    READING: a buffer that its chunk's bytes are being read into.
    COMPUTING: the same; the kernels run.
    AHEAD: a guess that is made: nothing on the host, new bytes beside the old ones.
    ENDED: nothing. What it was for is done, or it was dropped.
    """

    QUEUED = enum.auto()
    READING = enum.auto()
    COMPUTING = enum.auto()
    AHEAD = enum.auto()
    ENDED = enum.auto()


@dataclass(eq=False, repr=False)
class Update:
    """One chunk's update of one step. `wanted`: what is to be done to which of its parameters."""

    chunk: Chunk
    step: int
    wanted: Mapping[Member, MemberUpdate]
    firm: bool
    gradient: Staging | None  # the chunk's gradient where it is still in host memory
    ready: Ticket  # the gradient's bytes are there
    phase: Phase = Phase.QUEUED
    rejected: bool = False  # dropped while a thread has it: that one ends it
    staging: Staging | None = None
    loaded: Ticket = DONE
    nonfinite: set[str] = field(default_factory=set)

    @property
    def needs_buffer(self) -> bool:
        """Some of its bytes have to be read."""
        if self.gradient is None and not self.chunk.gradients.on_host:
            return True
        return not all(each.on_host for each in self.chunk.rewritten)


@dataclass
class StepUpdates:
    """What is left of a step: its updates that are not published yet, and copies on the host to be written through.

    `captured`: what its commit holds beside them is there.
    """

    record: dict[str, Any]
    unpublished: int = 0
    unwritten: int = 0
    captured: bool = True
    nonfinite: set[str] = field(default_factory=set)


class Claims(Protocol):
    """What the queue of updates wants to know of whoever reads or changes a chunk's weights or state."""

    def settle(self, chunk: Chunk | None = None) -> None: ...

    def claim(self, chunk: Chunk) -> None: ...
