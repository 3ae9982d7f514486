"""The two makers of an AdamW or Adam update: fuyou._native, and torch's fused kernel slice by slice.

What they promise stands in adam.py, at AdamKernels, [Note: ranges] and [Note: split master].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fuyou.core.errors import StateError
from fuyou.swap.adam_cores import AdamCores

RANGE_ELEMENTS = 16  # ranges start at multiples of this from their tensor's start
SLICE_ELEMENTS = 1 << 18  # TorchKernels' temporaries: a few tensors of 1 MiB


@dataclass(frozen=True)
class AdamHyper:
    """One param group's hyperparameters; `decoupled` is AdamW, otherwise Adam with weight decay as L2."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


@functools.cache
def torch_tail_width() -> int:
    """W where torch's fused kernel treats a tensor's last `numel % W` elements by its scalar formula; 8 on x86.

    Found by experiment: 31 equal elements are updated, and those at the end that come out differently are counted.
    Where no trial shows a difference the two formulas are one, and 1 (no tail) is as good as the truth.
    """
    for trial in range(64):  # about every third shows it
        state = [torch.full((31,), value, dtype=torch.float32) for value in (1.0, 0.01, 1e-3 + trial * 1e-5, 0.3)]
        param, exp_avg, exp_avg_sq, grad = state
        _fused(param, exp_avg, exp_avg_sq, grad, AdamHyper(1e-3, 0.9, 0.999, 1e-8, 0.0, True), 3)
        longest = max(int((tensor != tensor[0]).sum()) for tensor in (param, exp_avg, exp_avg_sq))
        if longest:
            return longest + 1
    return 1


class NativeKernels:
    """The kernels of fuyou._native: one pass over memory, the GIL released."""

    name = "native"

    def __init__(self, module: ModuleType, cores: AdamCores, path: str) -> None:
        self._native = module
        self._cores = cores
        self._path = path

    @property
    def threads(self) -> int:
        return self._cores.threads

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), exp_avg=(exp_avg, torch.float32), exp_avg_sq=(exp_avg_sq, torch.float32),
            grad=(grad, torch.float32),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        return self._native.adam_fp32(
            param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), grad.numel(), tail, scales,
            hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled, step,
            self._cores.threads, self._cores.cpus, self._path,
        )  # fmt: skip

    def step_copy(
        self, param: Tensor, copy: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), copy=(copy, torch.bfloat16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        return self._native.adam_copy(
            param.data_ptr(), copy.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), grad.numel(),
            tail, scales, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled, step,
            self._cores.threads, self._cores.cpus, self._path,
        )  # fmt: skip

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            hi=(hi, torch.bfloat16), lo=(lo, torch.int16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        return self._native.adam_split(
            hi.data_ptr(), lo.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), grad.numel(),
            tail, scales, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled, step,
            self._cores.threads, self._cores.cpus, self._path,
        )  # fmt: skip

    def split(self, master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        self._native.split_master(
            master.data_ptr(), hi.data_ptr(), lo.data_ptr(), exp_avg_sq.data_ptr(), hi.numel(),
            self._cores.threads, self._cores.cpus, self._path,
        )  # fmt: skip

    def merge(self, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor, master: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        self._native.merge_master(
            hi.data_ptr(), lo.data_ptr(), exp_avg_sq.data_ptr(), master.data_ptr(), hi.numel(),
            self._cores.threads, self._cores.cpus, self._path,
        )  # fmt: skip


class TorchKernels:
    """The same through torch's fused kernel, slice by slice, where the extension is not there or not exact."""

    name = "torch"

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), exp_avg=(exp_avg, torch.float32), exp_avg_sq=(exp_avg_sq, torch.float32),
            grad=(grad, torch.float32),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        finite = True
        for at in _slices(grad.numel()):
            scaled = _scaled(grad[at], scales)
            finite &= _finite(scaled)
            _fused(param[at], exp_avg[at], exp_avg_sq[at], scaled, hyper, step)
        return not finite

    def step_copy(
        self, param: Tensor, copy: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), copy=(copy, torch.bfloat16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        finite = True
        for at in _slices(grad.numel()):
            scaled = _scaled(grad[at], scales).float()
            finite &= _finite(scaled)
            _fused(param[at], exp_avg[at], exp_avg_sq[at], scaled, hyper, step)
            copy[at].copy_(param[at])
        return not finite

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        _check_tensors(
            hi=(hi, torch.bfloat16), lo=(lo, torch.int16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        finite = True
        for at in _slices(grad.numel()):
            scaled = _scaled(grad[at], scales).float()
            finite &= _finite(scaled)
            master = torch.empty_like(exp_avg[at])
            _merge_slice(hi[at], lo[at], exp_avg_sq[at], master)
            exp_avg_sq[at].abs_()
            _fused(master, exp_avg[at], exp_avg_sq[at], scaled, hyper, step)
            _split_slice(master, hi[at], lo[at], exp_avg_sq[at])
        return not finite

    def split(self, master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        for at in _slices(master.numel()):
            _split_slice(master[at], hi[at], lo[at], exp_avg_sq[at])

    def merge(self, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor, master: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        for at in _slices(master.numel()):
            _merge_slice(hi[at], lo[at], exp_avg_sq[at], master[at])


def _fused(param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, hyper: AdamHyper, step: int) -> None:
    """torch.optim.AdamW/Adam(fused=True) on one tensor: the function that their step() calls."""
    if not grad.numel():
        return
    update = torch._fused_adamw_ if hyper.decoupled else torch._fused_adam_
    steps = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    update(
        [param], [grad], [exp_avg], [exp_avg_sq], [], [steps], amsgrad=False, maximize=False, lr=hyper.lr,
        beta1=hyper.beta1, beta2=hyper.beta2, weight_decay=hyper.weight_decay, eps=hyper.eps,
    )  # fmt: skip


def _scaled(grad: Tensor, scales: Sequence[float]) -> Tensor:
    """A copy of grad times each of `scales`; grad itself where there are none."""
    if scales:
        grad = grad.clone()
    for scale in scales:
        grad.mul_(scale)
    return grad


def _finite(values: Tensor) -> bool:
    """Whether there is no inf or nan: the largest magnitude is finite. One reading pass, and no temporary."""
    return math.isfinite(torch.linalg.vector_norm(values, math.inf).item()) if values.numel() else True


def _split_slice(master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
    """[Note: split master] in torch's integer operations; as the native kernel, a NaN becomes quiet with lo = 0."""
    bits = master.view(torch.int32)
    odd = (bits >> 16) & 1
    upper = (bits + 0x7FFF).add_(odd).bitwise_right_shift_(16)
    nan = master.isnan()
    torch.where(nan, (bits >> 16) | 0x40, upper, out=upper)
    hi.view(torch.int16).copy_(upper)
    lo.copy_(bits.masked_fill(nan, 0))  # the conversion to int16 keeps the low bits
    tie = ((bits & 0x1FFFF) == 0x18000).to(torch.int32) << 31
    exp_avg_sq.view(torch.int32).bitwise_and_(0x7FFFFFFF).bitwise_or_(tie)


def _merge_slice(hi: Tensor, lo: Tensor, exp_avg_sq: Tensor, master: Tensor) -> None:
    """The inverse of _split_slice."""
    low = lo.to(torch.int32).bitwise_and_(0xFFFF)
    tie = (exp_avg_sq.view(torch.int32) >> 31).bitwise_and_(1)
    rounded_up = tie.add_(low).add_(0x7FFF).bitwise_right_shift_(16)
    upper = hi.view(torch.int16).to(torch.int32).sub_(rounded_up).bitwise_left_shift_(16)
    torch.bitwise_or(upper, low, out=master.view(torch.int32))


def _slices(count: int) -> Iterator[slice]:
    """[0, count) in multiples of 16 elements, so that only the last slice can hold a tail."""
    for start in range(0, count, SLICE_ELEMENTS):
        yield slice(start, min(start + SLICE_ELEMENTS, count))


def _check_tensors(**tensors: tuple[Tensor, torch.dtype]) -> None:
    """Each `name=(tensor, dtype)` is what the kernels may be given, and all are of one length."""
    counts = {name: tensor.numel() for name, (tensor, _) in tensors.items()}
    if len(set(counts.values())) > 1:
        lengths = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise StateError(f"The Adam kernels were given ranges of different lengths, in elements: {lengths}.")
    for name, (tensor, dtype) in tensors.items():
        if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "strided"
            raise StateError(
                f"The Adam kernels need {name} as a contiguous 1-D {dtype} tensor on the CPU and were given a {layout} "
                f"{tensor.dim()}-D {tensor.dtype} tensor of {tensor.numel()} elements on {tensor.device}."
            )


def _check_split(master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
    _check_tensors(
        master=(master, torch.float32), hi=(hi, torch.bfloat16), lo=(lo, torch.int16),
        exp_avg_sq=(exp_avg_sq, torch.float32),
    )  # fmt: skip


def _check_step(count: int, tail: int, step: int) -> None:
    """See [Note: ranges]; a range cut elsewhere would be rounded as no tensor is."""
    if step < 1:
        raise StateError(f"The Adam kernels were given step {step}; the first update is step 1.")
    if not 0 <= tail < RANGE_ELEMENTS or tail > count or (count - tail) % torch_tail_width():
        raise StateError(
            f"The Adam kernels were given a range of {count} elements, the last {tail} its tensor's tail; all but the "
            f"tail must be a multiple of {torch_tail_width()} elements, and the tail less than {RANGE_ELEMENTS}. Cut "
            f"tensors at multiples of {RANGE_ELEMENTS} elements."
        )
