"""AdamW and Adam over ranges of host memory, with the bits of torch's fused CPU optimizer, native or through torch.

[Note: ranges] A tensor may be updated in pieces. Each piece starts at a multiple of 16 elements from its tensor's
start, and only the piece that ends a tensor may have another length than a multiple of 16: torch rounds a tensor's
last `numel % torch_tail_width()` elements (8 on x86) by another formula than the rest. `tail` says how many of a
range's last elements those are: 0 for a range that does not end its tensor.

[Note: split master] In bf16 mode the fp32 master is kept as `hi`, its bf16 copy rounded to nearest even, and `lo`, its
16 low bits. On an exact tie (`lo` is 0x8000) the sign bit of `exp_avg_sq`, which is never negative, is set if `hi` was
rounded up. Every finite master and infinity comes back exactly, a NaN as a NaN. The formulas are in
csrc/adam_kernels.hpp.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from fuyou.core.errors import ConfigError, StateError

RANGE_ELEMENTS = 16  # ranges start at multiples of this from their tensor's start
SLICE_ELEMENTS = 1 << 18  # TorchKernels' temporaries: a few tensors of 1 MiB
BUILD_ERROR_FILE = "_native_build_error.txt"  # written by setup.py beside the package's files


@dataclass(frozen=True)
class AdamHyper:
    """One param group's hyperparameters; `decoupled` is AdamW, otherwise Adam with weight decay as L2."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool


class AdamKernels(Protocol):
    """The update of one range in place. All tensors are 1-D, contiguous, of one length, on the CPU; see [Note: ranges].

    `param`, `exp_avg`, `exp_avg_sq`, `master` fp32; `hi` bf16 and `lo` int16; `grad` fp32 (step_fp32) or bf16
    (step_split), never changed: each of `scales` multiplies a copy in order, rounding to grad's dtype after each.
    `step` counts from 1 and includes this update. Raises StateError for any other tensor, tail or step.
    """

    @property
    def name(self) -> str:
        """ "native" or "torch"."""
        ...

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        """Update param, exp_avg and exp_avg_sq."""
        ...

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        """Update hi, lo, exp_avg and exp_avg_sq; see [Note: split master]."""
        ...

    def split(self, master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
        """Write hi and lo from master, and exp_avg_sq's sign bit; what that bit was does not matter."""
        ...

    def merge(self, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor, master: Tensor) -> None:
        """Write master from hi, lo and exp_avg_sq's sign bit."""
        ...


def clear_tie_bits(exp_avg_sq: Tensor) -> None:
    """Make a split master's exp_avg_sq the plain second moment, in place: for a copy on its way out."""
    exp_avg_sq.abs_()


def load_kernels(prefer: str = "auto", *, threads: int | None = None, path: str = "auto") -> AdamKernels:
    """The kernels to use: "auto" takes the native ones unless `native_problem()`; "native" and "torch" force one.

    `threads` of the native kernels: None is what torch uses, no more than the CPUs this process may run on.
    `path` forces one of the native vector paths ("avx512", "avx2", "scalar"): all give the same bits.
    Raises ConfigError for an unknown name or count, and for "native" where it cannot be loaded.
    """
    if prefer not in ("auto", "native", "torch"):
        raise ConfigError(f'Adam kernels "{prefer}" do not exist; choose "auto", "native" or "torch".')
    if threads is not None and threads < 1:
        raise ConfigError(f"Adam kernels were asked for with {threads} threads; at least 1 is needed.")
    if prefer == "torch" or (prefer == "auto" and native_problem()):
        return TorchKernels()
    module, problem = _import_native()
    if module is None:
        raise ConfigError(f'The native Adam kernels cannot be used: {problem} Choose "torch", or reinstall fuyou.')
    if path != "auto" and path not in module.adam_paths():
        paths = ", ".join(module.adam_paths())
        raise ConfigError(f'Native Adam path "{path}" does not run here; this CPU has {paths}.')
    return NativeKernels(module, threads or _default_threads(), path)


@functools.cache
def native_problem() -> str:
    """Why "auto" does not use the native kernels, in one sentence; "" when it does.

    They are used only where a small update gives the bits of the torch that is installed: another build of torch may
    round otherwise.
    """
    module, problem = _import_native()
    if module is None:
        return problem
    if not _same_bits(NativeKernels(module, 1, "auto"), TorchKernels()):
        return (
            f"fuyou's native AdamW gives other bits than torch {torch.__version__} on this CPU "
            f"({torch.backends.cpu.get_cpu_capability()}), so torch's own is used."
        )
    return ""


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

    def __init__(self, module: ModuleType, threads: int, path: str) -> None:
        self._native = module
        self.threads = threads
        self._path = path

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), exp_avg=(exp_avg, torch.float32), exp_avg_sq=(exp_avg_sq, torch.float32),
            grad=(grad, torch.float32),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        self._native.adam_fp32(
            param.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), grad.numel(), tail, scales,
            hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled, step,
            self.threads, self._path,
        )  # fmt: skip

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        _check_tensors(
            hi=(hi, torch.bfloat16), lo=(lo, torch.int16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        self._native.adam_split(
            hi.data_ptr(), lo.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), grad.data_ptr(), grad.numel(),
            tail, scales, hyper.lr, hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay, hyper.decoupled, step,
            self.threads, self._path,
        )  # fmt: skip

    def split(self, master: Tensor, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        self._native.split_master(
            master.data_ptr(), hi.data_ptr(), lo.data_ptr(), exp_avg_sq.data_ptr(), hi.numel(), self.threads, self._path
        )

    def merge(self, hi: Tensor, lo: Tensor, exp_avg_sq: Tensor, master: Tensor) -> None:
        _check_split(master, hi, lo, exp_avg_sq)
        self._native.merge_master(
            hi.data_ptr(), lo.data_ptr(), exp_avg_sq.data_ptr(), master.data_ptr(), hi.numel(), self.threads, self._path
        )


class TorchKernels:
    """The same through torch's fused kernel, slice by slice, where the extension is not there or not exact."""

    name = "torch"

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        _check_tensors(
            param=(param, torch.float32), exp_avg=(exp_avg, torch.float32), exp_avg_sq=(exp_avg_sq, torch.float32),
            grad=(grad, torch.float32),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        if not scales:
            _fused(param, exp_avg, exp_avg_sq, grad, hyper, step)
            return
        for at in _slices(grad.numel()):
            _fused(param[at], exp_avg[at], exp_avg_sq[at], _scaled(grad[at], scales), hyper, step)

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> None:  # fmt: skip
        _check_tensors(
            hi=(hi, torch.bfloat16), lo=(lo, torch.int16), exp_avg=(exp_avg, torch.float32),
            exp_avg_sq=(exp_avg_sq, torch.float32), grad=(grad, torch.bfloat16),
        )  # fmt: skip
        _check_step(grad.numel(), tail, step)
        for at in _slices(grad.numel()):
            master = torch.empty_like(exp_avg[at])
            _merge_slice(hi[at], lo[at], exp_avg_sq[at], master)
            exp_avg_sq[at].abs_()
            _fused(master, exp_avg[at], exp_avg_sq[at], _scaled(grad[at], scales).float(), hyper, step)
            _split_slice(master, hi[at], lo[at], exp_avg_sq[at])

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


def _default_threads() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, os.cpu_count() or 1, torch.get_num_threads()))


@functools.cache
def _import_native() -> tuple[ModuleType | None, str]:
    """fuyou._native, or None and why not."""
    try:
        module = importlib.import_module("fuyou._native")
    except ImportError as error:
        built = Path(__file__).parent.parent / BUILD_ERROR_FILE
        reason = f"its build failed: {built.read_text().strip()}" if built.is_file() else str(error)
        return None, f"fuyou's native extension cannot be loaded ({reason})."
    if not hasattr(module, "adam_fp32"):
        return None, "fuyou's native extension was built before it had AdamW kernels."
    return module, ""


def _same_bits(kernels: AdamKernels, oracle: AdamKernels) -> bool:
    """Whether two kernels agree on long and short ranges, in every branch of the formula; some milliseconds."""
    random = torch.Generator(device="cpu").manual_seed(0)  # never the global generator: a run must not disturb it
    width = torch_tail_width()
    for decoupled, beta1, weight_decay in ((True, 0.9, 0.01), (True, 0.3, 0.0), (False, 0.9, 0.01), (False, 0.3, 0.0)):
        hyper = AdamHyper(1.37e-3, beta1, 0.999, 1e-8, weight_decay, decoupled)
        for count in [2048 + 15] + [15] * 32:  # 15: one cache line, for which torch starts no threads
            state = torch.randn(4, count, generator=random, dtype=torch.float32, device="cpu")
            state[2].abs_()
            other = state.clone()
            for subject, tensors in ((kernels, state), (oracle, other)):
                param, exp_avg, exp_avg_sq, grad = tensors
                subject.step_fp32(
                    param, exp_avg, exp_avg_sq, grad, tail=count % width, scales=[0.37], hyper=hyper, step=3
                )
            if not torch.equal(state.view(torch.int32), other.view(torch.int32)):
                return False
    return True
