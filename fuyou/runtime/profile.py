"""What blocks cost, measured in the steps of a run: seconds of their forwards and backwards, bytes of what they save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fuyou.swap.results import Counting, Results

TIMED_STEPS = 2
Mark = float | torch.cuda.Event


class Stopwatch:
    """Times of the device: on CUDA events of the compute stream, which are asked only when a profile is read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, first: Mark, last: Mark) -> float:
        """Between two marks; on CUDA it waits for the second."""
        if isinstance(first, float) or isinstance(last, float):
            return last - first  # type: ignore[operator]
        last.synchronize()
        return first.elapsed_time(last) / 1e3


@dataclass(frozen=True)
class StepTime:
    """A step by the host's clock, and by marks of the device, which on CUDA may still be at it when `step()` has returned."""

    host_s: float
    first: Mark
    last: Mark

    def seconds(self, stopwatch: Stopwatch) -> float:
        """The longer of the two."""
        return max(self.host_s, stopwatch.seconds(self.first, self.last))


@dataclass
class ProfiledOperation:
    """A costly operation by its ordinal in the block's forward: seconds, bytes of its results, whether they can stand for
    it, and whether autograd saves them too."""

    name: str
    seconds: float = 0.0
    result_bytes: int = 0
    replaceable: bool = True
    saved: bool = False


@dataclass
class BlockProfile:
    """One block over one step, all its calls and slices together. Seconds of the device; `backward_s` with recomputation.
    `saved_bytes`: distinct storages that its forward saved, inputs not counted."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    recompute_s: float = 0.0
    saved_bytes: int = 0
    input_bytes: int = 0
    operations: dict[int, ProfiledOperation] = field(default_factory=dict)


@dataclass(frozen=True)
class StepProfile:
    """A step in which all was recomputed: its blocks, how often backward ran, its seconds, and the most bytes that the device
    held, torch's temporaries left out, until a block's backward began, and from there on."""

    blocks: Mapping[int, BlockProfile]
    backwards: int
    seconds: float
    forward_bytes: int
    backward_bytes: int


class FrameWatch:
    """Watches one call of a block for its profile. Storages are told apart by weak references, which keep their names from
    being used again."""

    def __init__(self, profiler: Profiler, block: int) -> None:
        self._profiler = profiler
        self._profile = profiler.of(block)
        self._seen: dict[int, StorageWeakRef] = {}
        self._results = Results()

    def inputs(self, tensors: list[torch.Tensor]) -> None:
        nbytes = sum(self._new_bytes(tensor) for tensor in tensors)
        if self._profiler.counting:
            self._profile.input_bytes += nbytes

    def saved(self, tensor: torch.Tensor) -> None:
        if not self._profiler.counting:
            return
        nbytes = self._new_bytes(tensor)
        self._profile.saved_bytes += nbytes
        ordinal = self._results.of(tensor)
        if nbytes and ordinal is not None:
            self._profile.operations.setdefault(ordinal, ProfiledOperation("")).saved = True

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around the block's forward."""
        if not self._profiler.counting:
            first = self._profiler.stopwatch.mark()
            yield
            self._profiler.forwards.append((self._profile, first, self._profiler.stopwatch.mark()))
            return
        counting = Counting(self._profiler.stopwatch.mark, self._results)
        with counting:
            yield
        for ordinal, operation in enumerate(counting.operations()):
            known = self._profile.operations.setdefault(ordinal, ProfiledOperation(operation.name))
            known.name = known.name or operation.name
            known.result_bytes += operation.result_bytes
            known.replaceable &= operation.replaceable and known.name == operation.name
            self._profiler.operations.append((known, operation.began, operation.ended))

    @contextlib.contextmanager
    def recomputation(self) -> Iterator[None]:
        first = self._profiler.stopwatch.mark()
        yield
        if not self._profiler.counting:
            self._profiler.recomputations.append((self._profile, first, self._profiler.stopwatch.mark()))

    def _new_bytes(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return 0
        self._seen[storage._cdata] = StorageWeakRef(storage)
        return storage.nbytes()


class Profiler:
    """Collects marks during some steps and adds them up when it is asked: TIMED_STEPS in which blocks are timed, and then, with
    `counting`, one in which what they save is counted and their operations are timed, which makes them slower.

    `stalled()`: seconds that the training thread has waited so far, which are nobody's compute. `most_held()`: the most bytes
    that the device held since it was asked last.
    """

    def __init__(self, device: torch.device, stalled: Callable[[], float], most_held: Callable[[], int]) -> None:
        self._stalled = stalled
        self._most_held = most_held
        self._most_held()
        self.stopwatch = Stopwatch(device)
        self.counting = False
        self.blocks: dict[int, BlockProfile] = {}
        self.forwards: list[tuple[BlockProfile, Mark, Mark]] = []
        self.recomputations: list[tuple[BlockProfile, Mark, Mark]] = []
        self.operations: list[tuple[ProfiledOperation, Mark, Mark]] = []
        self._backwards: list[tuple[BlockProfile, Mark, Mark, float]] = []
        self._backward: tuple[BlockProfile, Mark, float] | None = None
        self._in_backward = False
        self._backward_count = 0
        self._step_times: list[StepTime] = []
        self._forward_bytes = self._backward_bytes = 0

    def of(self, block: int) -> BlockProfile:
        return self.blocks.setdefault(block, BlockProfile())

    def backward_begins(self, block: int) -> None:
        """Its weights are there, or queued to come; the block's before it is through."""
        if not self._in_backward and not self.counting:
            self._forward_bytes = max(self._forward_bytes, self._most_held())
        self._in_backward = True
        self.block_ends()
        self._backward = self.of(block), self.stopwatch.mark(), self._stalled()

    def backward_ends(self) -> None:
        self.block_ends()
        self._in_backward = False
        if not self.counting:
            self._backward_count += 1
            self._backward_bytes = max(self._backward_bytes, self._most_held())

    def step_ends(self, took: StepTime) -> bool:
        """Whether that was the last one to watch."""
        if self.counting:
            return True
        self._step_times.append(took)
        self.counting = len(self._step_times) >= TIMED_STEPS
        return False

    def block_ends(self) -> None:
        """The backward of the block that runs, if one does, is queued to its end; what comes next may be a wait on the device."""
        if self._backward is not None and not self.counting:
            profile, first, stalled_s = self._backward
            self._backwards.append((profile, first, self.stopwatch.mark(), self._stalled() - stalled_s))
        self._backward = None

    def read(self) -> StepProfile | None:
        """Everything added up, once; None where no backward ran. The quickest step says how long one takes: what else the
        machine does only adds to it."""
        steps = len(self._step_times)
        if not self._backward_count:
            return None
        seconds = self.stopwatch.seconds
        for profile, first, last in self.forwards:
            profile.forward_s += seconds(first, last) / steps
        for profile, first, last in self.recomputations:
            profile.recompute_s += seconds(first, last) / steps
        for profile, first, last, stalled_s in self._backwards:
            profile.backward_s += max(0.0, seconds(first, last) - stalled_s) / steps
        for operation, first, last in self.operations:
            operation.seconds += seconds(first, last)
        backwards = max(1, round(self._backward_count / steps))
        quickest = min(each.seconds(self.stopwatch) for each in self._step_times)
        return StepProfile(self.blocks, backwards, quickest, self._forward_bytes, self._backward_bytes)
