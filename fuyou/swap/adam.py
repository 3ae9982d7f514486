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
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from fuyou.core.errors import ConfigError
from fuyou.swap.adam_backends import SLICE_ELEMENTS, AdamHyper, NativeKernels, TorchKernels, torch_tail_width
from fuyou.swap.adam_cores import choose_cores

__all__ = [
    "SLICE_ELEMENTS", "AdamHyper", "AdamKernels", "NativeKernels", "TorchKernels",
    "clear_tie_bits", "load_kernels", "native_problem", "torch_tail_width",
]  # fmt: skip

BUILD_ERROR_FILE = "_native_build_error.txt"  # written by setup.py beside the package's files


class AdamKernels(Protocol):
    """The update of one range in place. All tensors are 1-D, contiguous, of one length, on the CPU; see [Note: ranges].

    `param`, `exp_avg`, `exp_avg_sq`, `master` fp32; `hi` bf16 and `lo` int16; `grad` fp32 (step_fp32) or bf16
    (the others), never changed: each of `scales` multiplies a copy in order, rounding to grad's dtype after each.
    `step` counts from 1 and includes this update. A step returns whether any element of the scaled gradient was inf or
    nan; the update is done all the same, as torch does it. Raises StateError for any other tensor, tail or step.
    """

    @property
    def name(self) -> str:
        """ "native" or "torch"."""
        ...

    @property
    def threads(self) -> int:
        """How many threads a long range is updated on, the caller's among them."""
        ...

    def step_fp32(
        self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        """Update param, exp_avg and exp_avg_sq."""
        ...

    def step_copy(
        self, param: Tensor, copy: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
        """Update param, exp_avg and exp_avg_sq by a bf16 gradient, and write `copy`, param rounded to bf16."""
        ...

    def step_split(
        self, hi: Tensor, lo: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *,
        tail: int, scales: Sequence[float], hyper: AdamHyper, step: int,
    ) -> bool:  # fmt: skip
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

    `threads` of the native kernels: None leaves it to adam_cores.choose_cores.
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
    return NativeKernels(module, choose_cores(threads), path)


@functools.cache
def native_problem() -> str:
    """Why "auto" does not use the native kernels, in one sentence; "" when it does.

    They are used only where a small update gives the bits of the torch that is installed: another build of torch may
    round otherwise.
    """
    module, problem = _import_native()
    if module is None:
        return problem
    if not _same_bits(NativeKernels(module, choose_cores(1), "auto"), TorchKernels()):
        return (
            f"fuyou's native AdamW gives other bits than torch {torch.__version__} on this CPU "
            f"({torch.backends.cpu.get_cpu_capability()}), so torch's own is used."
        )
    return ""


@functools.cache
def _import_native() -> tuple[ModuleType | None, str]:
    """fuyou._native, or None and why not."""
    try:
        module = importlib.import_module("fuyou._native")
    except ImportError as error:
        built = Path(__file__).parent.parent / BUILD_ERROR_FILE
        reason = f"its build failed: {built.read_text().strip()}" if built.is_file() else str(error)
        return None, f"fuyou's native extension cannot be loaded ({reason})."
    if not hasattr(module, "adam_copy"):
        return None, "fuyou's native extension was built from older sources."
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
