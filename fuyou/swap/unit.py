"""Units: parameters that move together, their chunks, and where each chunk's bytes live."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from fuyou.core.layout import Entry, Layout
from fuyou.core.races import Races
from fuyou.core.ticket import DONE, Ticket
from fuyou.swap.ranges import Range
from fuyou.tiers.device import DeviceMemory


class Residency(enum.Enum):
    """Where a unit's weights are on the device.

    ABSENT: no device memory. Its parameters are away: NaN placeholders of the same shape.
    LOADING: memory is charged and allocated, and a copy into it is under way. Parameters are away.
    READY: the weights are there and nobody uses them; may be evicted for others. Parameters are away.
    IN_USE: the weights are there, the parameters are views of them, and `Unit.users` blocks need them.
    """

    ABSENT = enum.auto()
    LOADING = enum.auto()
    READY = enum.auto()
    IN_USE = enum.auto()


@dataclass(eq=False)
class Member:
    """One parameter of a unit, under its first name in the model."""

    name: str
    parameter: nn.Parameter
    original_class: type
    original_device: torch.device
    entry: Entry
    unit: Unit
    optimized: bool  # its optimizer state has a home; False: it was frozen, or in no optimizer, so far
    watched: bool = False  # hooks send its gradients home
    step: int = 0  # optimizer steps taken, as torch counts them: by parameter


@dataclass(eq=False)
class Chunk:
    """`count` elements of a unit from element `start`: the granule of NVMe traffic and of the update.

    weights: the compute copy, fp32 or bf16 (bf16: the high half of the master).
    state: exp_avg | exp_avg_sq in fp32, then in bf16 the master's low half (int16); None while nothing is optimized.
    gradient: in the parameters' dtype; None while all its weights are frozen.
    """

    unit: Unit
    start: int
    count: int
    weights: Range
    state: Range | None
    gradient: Range | None
    parts: list[tuple[Member, int, int]] = field(default_factory=list)  # (member, first, past-the-last) in the unit

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def rewritten(self) -> tuple[Range, Range]:
        """What an update rewrites: weights and state."""
        if self.state is None:
            raise ValueError(f"Unit {self.unit.name} has no optimizer state.")
        return self.weights, self.state

    @property
    def gradients(self) -> Range:
        if self.gradient is None:
            raise ValueError(f"Unit {self.unit.name} is frozen and has no gradient.")
        return self.gradient

    @property
    def place(self) -> tuple[int, int]:
        """Sorts chunks by when the next forward needs them."""
        return self.unit.place, self.start


class Unit:
    """Parameters of one dtype with the same owners: one storage on the device for life, never replaced.

    Views of that storage which autograd saved stay valid names for the bytes: after a release and another fetch they
    show the weights again. `owners` are the indices of the blocks that need it; none: it belongs to the model's own
    forward. `pinned`: its device memory stays, once it has some. `trainable` and `optimized` say what it was planned with;
    its members know what has been added since.
    """

    def __init__(self, name: str, owners: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.name = name
        self.owners = owners
        self.dtype = dtype
        self.device = device
        self.trainable = False
        self.optimized = False
        self.members: list[Member] = []
        self.chunks: list[Chunk] = []
        self.residency = Residency.ABSENT
        self.users = 0
        self.place = 0  # in the order of the last forward
        self.writes = 0  # times that its weights have been changed, by updates and by the user
        self.pinned = not owners
        self.arrival: Ticket = DONE  # the job that reads and queues the copies
        self.copied: Ticket = DONE  # the last of those copies

    def pack(self, named: Sequence[tuple[str, nn.Parameter]], races: Races | None = None) -> None:
        """Lay out the parameters and make the (still empty) device storage."""
        self.layout = Layout(self.dtype, [(name, parameter.shape) for name, parameter in named])
        self.members = [
            Member(name, parameter, type(parameter), parameter.device, entry, self, self.optimized)
            for (name, parameter), entry in zip(named, self.layout.entries, strict=True)
        ]
        self.memory = DeviceMemory(self.layout.nbytes, self.device, races)
        self.flat = self.memory.tensor.view(self.dtype)
        self.views = self.layout.views(self.flat)
        self.memory.start()
        self.placeholder = torch.full((), float("nan"), dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def split(self) -> bool:
        """The master is fp32 and split: `weights` holds its high half."""
        return self.dtype is torch.bfloat16

    @property
    def state_bytes_per_element(self) -> int:
        return 10 if self.split else 8

    def state_views(self, state: torch.Tensor, count: int) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """(low half or None, exp_avg, exp_avg_sq) of a chunk's state bytes: moments first, so that all are aligned."""
        exp_avg = state[: 4 * count].view(torch.float32)
        exp_avg_sq = state[4 * count : 8 * count].view(torch.float32)
        low = state[8 * count : 10 * count].view(torch.int16) if self.split else None
        return low, exp_avg, exp_avg_sq


def chunks_of(member: Member) -> list[Chunk]:
    entry = member.entry
    return [each for each in member.unit.chunks if each.start < entry.stop and each.stop > entry.start]


def overlap(member: Member, chunk: Chunk) -> tuple[int, int, int]:
    """(first, past-the-last element within the unit, first's place within the chunk) of a parameter in a chunk."""
    first, last = max(member.entry.start, chunk.start), min(member.entry.stop, chunk.stop)
    return first, last, first - chunk.start


def text_of(names: Sequence[str], kind: str) -> str:
    """The bytes of one kind of these parameters, for a message; of many names the first."""
    what = {"optimizer": "the optimizer state"}.get(kind, f"the {kind}")
    return f"{what} of {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
