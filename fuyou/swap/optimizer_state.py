"""The optimizer state's resident: the update of a chunk, and reading and writing single parameters' state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from fuyou.core.ticket import Ticket
from fuyou.swap.adam import AdamKernels, torch_tail_width
from fuyou.swap.ranges import Staging, WriteBehind
from fuyou.swap.unit import Chunk, Member, Unit, chunks_of, overlap
from fuyou.swap.update import Claims, MemberUpdate


def apply_update(
    kernels: AdamKernels,
    chunk: Chunk,
    weights: torch.Tensor,
    state: torch.Tensor,
    gradient: torch.Tensor,
    wanted: Mapping[Member, MemberUpdate],
    nonfinite: set[str],
) -> None:
    """One step of a chunk's parameters, in place in `weights` and `state` (their bytes, uint8, as the gradient's).

    `nonfinite` gets the names of the parameters whose gradient, after its scales, had an inf or a nan: they are updated
    all the same, as torch does it.
    """
    dtype = chunk.unit.dtype
    weights, gradient = weights.view(dtype), gradient.view(dtype)
    low, exp_avg, exp_avg_sq = chunk.unit.state_views(state, chunk.count)
    for member, first, last in chunk.parts:
        update = wanted.get(member)
        if update is None:
            continue
        at = slice(first - chunk.start, last - chunk.start)
        tail = member.entry.count % torch_tail_width() if last == member.entry.stop else 0
        if low is None:
            found = kernels.step_fp32(
                weights[at], exp_avg[at], exp_avg_sq[at], gradient[at],
                tail=tail, scales=update.scales, hyper=update.hyper, step=update.step,
            )  # fmt: skip
        else:
            found = kernels.step_split(
                weights[at], low[at], exp_avg[at], exp_avg_sq[at], gradient[at],
                tail=tail, scales=update.scales, hyper=update.hyper, step=update.step,
            )  # fmt: skip
        if found:
            nonfinite.add(member.name)


class StateAccess:
    """A parameter's master weights and moments, read and written whole or by parts.

    What is read is what it is after every step that was asked for; what is written counts for those that follow.
    """

    def __init__(self, kernels: AdamKernels, writes: WriteBehind, claims: Claims) -> None:
        self._kernels = kernels
        self._writes = writes
        self._claims = claims

    def read(self, member: Member, kind: str) -> torch.Tensor:
        """`kind` "exp_avg" | "exp_avg_sq" | "master": a new fp32 host tensor of the parameter's shape.

        exp_avg_sq comes without the tie bit that the split master keeps in its sign.
        """
        result = torch.empty(member.entry.count, dtype=torch.float32)
        for target, part in zip(_parts_of(result, member), self.read_parts(member, kind), strict=True):
            target.copy_(part)
        return result.view(member.entry.shape)

    def read_parts(self, member: Member, kind: str) -> Iterator[torch.Tensor]:
        """The same, a chunk's part at a time; each is valid until the next is asked for."""
        for chunk in chunks_of(member):
            self._claims.settle(chunk)
            with _Loaded(self._writes, chunk) as (weights, low, exp_avg, exp_avg_sq):
                first, last, at = overlap(member, chunk)
                part = slice(at, at + last - first)
                if kind == "exp_avg":
                    yield exp_avg[part]
                elif kind == "exp_avg_sq":
                    yield exp_avg_sq[part].abs()
                elif low is None:
                    yield weights[part].float()
                else:
                    master = torch.empty(last - first, dtype=torch.float32)
                    self._kernels.merge(weights[part], low[part], exp_avg_sq[part], master)
                    yield master

    def write_copy(self, member: Member, copy: torch.Tensor) -> None:
        """`copy` ((numel,) bf16, any device) was written to a split member: it is the compute copy from now on.

        Where it differs from what was there the master is `copy` itself; elsewhere the master keeps its low bits.
        """
        for chunk in chunks_of(member):
            self._claims.claim(chunk)
            loaded = _Loaded(self._writes, chunk)
            with loaded as (weights, low, _, exp_avg_sq):
                first, last, at = overlap(member, chunk)
                part = slice(at, at + last - first)
                new = copy[first - member.entry.start : last - member.entry.start].cpu()
                changed = new.view(torch.int16) != weights[part].view(torch.int16)
                if low is None or not bool(changed.any()):
                    continue
                master = torch.empty(last - first, dtype=torch.float32)
                self._kernels.merge(weights[part], low[part], exp_avg_sq[part], master)
                torch.where(changed, new.float(), master, out=master)
                self._kernels.split(master, weights[part], low[part], exp_avg_sq[part])
                loaded.store()

    def write(self, member: Member, values: dict[str, torch.Tensor]) -> None:
        """Replace any of exp_avg, exp_avg_sq, master by host or device tensors of the parameter's shape."""
        flat = {kind: value.detach().reshape(-1) for kind, value in values.items()}
        for chunk in chunks_of(member):
            self._claims.claim(chunk)
            loaded = _Loaded(self._writes, chunk)
            with loaded as (weights, low, exp_avg, exp_avg_sq):
                first, last, at = overlap(member, chunk)
                part = slice(at, at + last - first)
                source = slice(first - member.entry.start, last - member.entry.start)
                master = flat["master"][source].to("cpu", torch.float32).contiguous() if "master" in flat else None
                if low is not None and master is None and "exp_avg_sq" in flat:  # the tie bit lives in exp_avg_sq
                    master = torch.empty(last - first, dtype=torch.float32)
                    self._kernels.merge(weights[part], low[part], exp_avg_sq[part], master)
                if "exp_avg" in flat:
                    exp_avg[part].copy_(flat["exp_avg"][source])
                if "exp_avg_sq" in flat:
                    exp_avg_sq[part].copy_(flat["exp_avg_sq"][source])
                if master is not None and low is not None:
                    self._kernels.split(master, weights[part], low[part], exp_avg_sq[part])
                elif master is not None:
                    weights[part].copy_(master)
                loaded.store()


Values = Callable[
    [torch.Tensor, int, int], Iterator[torch.Tensor]
]  # a parameter's elements [first, last), in flat parts


def fill(
    unit: Unit,
    kernels: AdamKernels,
    writes: WriteBehind,
    states: dict[Member, dict[str, torch.Tensor]],
    values: Values,
) -> None:
    """Write a unit's parameters, as they are now, and what state there is already, to their homes.

    State that is zero is not written at all: a chunk without written state starts from zeros.
    """
    for chunk in unit.chunks:
        members = [member for member, _, _ in chunk.parts]
        with_state = chunk.state is not None and (
            any(member in states for member in members)
            or (unit.split and any(member.parameter.dtype is not torch.bfloat16 for member in members))
        )
        ranges = [chunk.weights, chunk.state] if with_state and chunk.state is not None else [chunk.weights]
        staging = writes.stage(ranges, f"the weights of {unit.name}")
        if staging is None:
            raise MemoryError(f"no staging for {unit.name}")  # stage(wait=True) waits or raises
        try:
            _fill_chunk(chunk, staging, kernels, states, values)
        except BaseException:
            staging.release()
            raise
        writes.put(staging.store(), staging)


def _fill_chunk(
    chunk: Chunk,
    staging: Staging,
    kernels: AdamKernels,
    states: dict[Member, dict[str, torch.Tensor]],
    values: Values,
) -> None:
    """All of the chunk's bytes into the views of `staging`: weights, and state where that is staged; zeros between them."""
    for view in staging.views[1:]:
        view.zero_()
    weights, end = staging.views[0].view(chunk.unit.dtype), 0
    for _, first, last in chunk.parts:
        weights[end : first - chunk.start].zero_()
        end = last - chunk.start
    weights[end:].zero_()
    for member, first, last in chunk.parts:
        at = slice(first - chunk.start, last - chunk.start)
        source = slice(first - member.entry.start, last - member.entry.start)
        if len(staging.views) == 1:
            _copy(values(member.parameter, source.start, source.stop), weights[at])
            continue
        low, exp_avg, exp_avg_sq = chunk.unit.state_views(staging.views[1], chunk.count)
        state = states.get(member, {})
        if "exp_avg" in state:
            exp_avg[at].copy_(state["exp_avg"].reshape(-1)[source])
            exp_avg_sq[at].copy_(state["exp_avg_sq"].reshape(-1)[source])
        if low is None:
            _copy(values(member.parameter, source.start, source.stop), weights[at])
            continue
        start, master = at.start, state.get("master")
        parts = values(member.parameter, source.start, source.stop) if master is None else [master.reshape(-1)[source]]
        for part in parts:
            some = slice(start, start + part.numel())
            kernels.split(part.to("cpu", torch.float32).contiguous(), weights[some], low[some], exp_avg_sq[some])
            start = some.stop


def _copy(parts: Iterator[torch.Tensor], target: torch.Tensor) -> None:
    start = 0
    for part in parts:
        target[start : start + part.numel()].copy_(part)
        start += part.numel()


class _Loaded:
    """A chunk's weights and state in host memory for the length of a `with`: (weights, low, exp_avg, exp_avg_sq)."""

    def __init__(self, writes: WriteBehind, chunk: Chunk) -> None:
        self._writes = writes
        self._chunk = chunk
        self._written: Ticket | None = None

    def __enter__(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        staging = self._writes.stage(self._chunk.rewritten, f"the state of {self._chunk.unit.name}")
        if staging is None:
            raise MemoryError("no staging")  # stage(wait=True) waits or raises
        self._staging = staging
        loaded = load_written(staging)
        try:
            loaded.wait()
        except BaseException:
            staging.release()
            raise
        return (
            staging.views[0].view(self._chunk.unit.dtype),
            *self._chunk.unit.state_views(staging.views[1], self._chunk.count),
        )

    def store(self) -> None:
        self._written = self._staging.store()

    def __exit__(self, *_: object) -> None:
        try:
            if self._written is not None:
                self._written.wait()
        finally:
            self._staging.release()


def load_written(staging: Staging) -> Ticket:
    """Start reading what was ever written; state that was not starts from zeros."""
    unwritten = [index for index, each in enumerate(staging.ranges) if not each.written]
    for index in unwritten:
        staging.views[index].zero_()
    return staging.load(
        *(index for index in range(len(staging.ranges)) if index not in unwritten)
    )  # weights always are


def _parts_of(whole: torch.Tensor, member: Member) -> Iterator[torch.Tensor]:
    for chunk in chunks_of(member):
        first, last, _ = overlap(member, chunk)
        yield whole[first - member.entry.start : last - member.entry.start]
