"""Plain PyTorch beside the Adam kernels: torch's own fused optimizer, and both sides trained and compared bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fuyou.swap import adam
from fuyou.swap.adam import AdamHyper, AdamKernels, clear_tie_bits, load_kernels, native_problem, torch_tail_width

ADAMW = AdamHyper(lr=1.37e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0123, decoupled=True)
HYPERS = {
    "adamw": ADAMW,
    "adamw-no-decay": replace(ADAMW, weight_decay=0.0),
    "adam": replace(ADAMW, decoupled=False),
    "adam-no-decay": replace(ADAMW, decoupled=False, weight_decay=0.0),
    "adamw-low-betas": replace(ADAMW, beta1=0.3, beta2=0.7, eps=1e-3, lr=0.1 + 0.2),
    "adam-half": replace(ADAMW, beta1=0.5, beta2=0.95, eps=1e-15, lr=1 / 3, decoupled=False),
    "adam-zero-betas": replace(ADAMW, beta1=0.0, beta2=0.0, eps=1e-6, lr=7e-5, decoupled=False),
    "adamw-no-eps": replace(ADAMW, eps=0.0, lr=1e-30, weight_decay=1e3),
}
SCALES: dict[str, list[float]] = {"none": [], "one": [0.37], "two": [0.37, 1 / 3], "tiny": [1e-30, 1e-12]}


def backends() -> list[str]:
    if native_problem():
        return ["torch"]
    return ["torch", "native-1", "native-2", *(f"native-3-{path}" for path in adam._import_native()[0].adam_paths())]


def kernels_named(name: str) -> AdamKernels:
    """One of `backends()`."""
    backend, *rest = name.split("-")
    if backend == "torch":
        return load_kernels("torch")
    return load_kernels("native", threads=int(rest[0]), path=rest[1] if len(rest) > 1 else "auto")


def bit_patterns() -> Tensor:
    """fp32 by their bits: 4 million at random, and every upper half with the lower halves that decide rounding."""
    generator = torch.Generator().manual_seed(6)
    chance = torch.randint(-(2**31), 2**31, (4_000_003,), generator=generator)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    edges = (torch.arange(-(2**15), 2**15)[:, None] * 65536 + lower).flatten()
    return torch.cat([chance, edges]).to(torch.int32).view(torch.float32)


class Oracle:
    """A tensor trained by torch's own fused optimizer."""

    def __init__(self, start: Tensor, hyper: AdamHyper) -> None:
        self.param = torch.nn.Parameter(start.clone())
        kind = torch.optim.AdamW if hyper.decoupled else torch.optim.Adam
        self.optimizer = kind(
            [self.param], lr=hyper.lr, betas=(hyper.beta1, hyper.beta2), eps=hyper.eps,
            weight_decay=hyper.weight_decay, fused=True,
        )  # fmt: skip

    def step(self, grad: Tensor, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr
        self.param.grad = grad
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        state = self.optimizer.state[self.param]
        return {"param": self.param.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit; any NaN is as good as another, its payload is the CPU's choice."""
    as_int = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(got.dtype, got.dtype)
    same = got.contiguous().view(as_int) == expected.contiguous().view(as_int)
    return bool((same | (got.isnan() & expected.isnan())).all())


def scaled(grad: Tensor, scales: list[float]) -> Tensor:
    """What clipping and loss scaling do in PyTorch: in-place multiplications in the gradient's dtype."""
    grad = grad.clone()
    for scale in scales:
        grad.mul_(scale)
    return grad


def odd_numbers(count: int, generator: torch.Generator) -> Tensor:
    """fp32 of every size, and zeros of both signs, denormals, inf and nan among them."""
    values = torch.randn(count, generator=generator)
    special = [0.0, -0.0, 1e-40, -1e-45, 1e-30, 1e30, -3e38, float("inf"), -float("inf"), float("nan"), 2.0**-126]
    for place, value in enumerate(special):
        values[place::29] = value
    return values


def pieces(count: int, seed: int) -> Iterator[tuple[slice, int]]:
    """Cuts at random multiples of 16, in random order, each with its tail."""
    rng = random.Random(seed)
    edges = sorted({0, count, *(16 * rng.randrange(count // 16 + 1) for _ in range(rng.randrange(6)))})
    ranges = list(zip(edges[:-1], edges[1:], strict=True))
    rng.shuffle(ranges)
    for start, stop in ranges:
        yield slice(start, stop), count % torch_tail_width() if stop == count else 0


def train_fp32(
    kernels: AdamKernels, hyper: AdamHyper, start: Tensor, grads: list[Tensor], scales: list[float], cut: int
) -> None:
    """Train `start` both ways and compare every bit after every step; `cut` seeds the cuts, 0 is one range."""
    count = start.numel()
    oracle = Oracle(start, hyper)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(count), torch.zeros(count)
    for step, grad in enumerate(grads, 1):
        lr = hyper.lr * (1 + step / 7)  # a schedule
        oracle.step(scaled(grad, scales), lr)
        before = grad.clone()
        for at, tail in pieces(count, cut + step) if cut else [(slice(0, count), count % torch_tail_width())]:
            kernels.step_fp32(
                param[at], exp_avg[at], exp_avg_sq[at], grad[at],
                tail=tail, scales=scales, hyper=replace(hyper, lr=lr), step=step,
            )  # fmt: skip
        assert torch.equal(grad.view(torch.int32), before.view(torch.int32)), "the gradient was changed"
        for name, expected in oracle.state().items():
            got = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}[name]
            assert same_bits(got, expected), f"{name} of {count} elements at step {step}"


def train_copy(
    kernels: AdamKernels, hyper: AdamHyper, start: Tensor, grads: list[Tensor], scales: list[float], cut: int
) -> None:
    """fp32 state under bf16 gradients, with the compute copy that a plain loop makes by param.bfloat16()."""
    count = start.numel()
    oracle = Oracle(start, hyper)
    param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(count), torch.zeros(count)
    copy = torch.full((count,), float("nan"), dtype=torch.bfloat16)
    for step, grad in enumerate(grads, 1):
        oracle.step(scaled(grad, scales).float(), hyper.lr)
        before = grad.clone()
        for at, tail in pieces(count, cut + step) if cut else [(slice(0, count), count % torch_tail_width())]:
            kernels.step_copy(
                param[at], copy[at], exp_avg[at], exp_avg_sq[at], grad[at],
                tail=tail, scales=scales, hyper=hyper, step=step,
            )  # fmt: skip
        assert torch.equal(grad.view(torch.int16), before.view(torch.int16)), "the gradient was changed"
        for name, expected in oracle.state().items():
            got = {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}[name]
            assert same_bits(got, expected), f"{name} of {count} elements at step {step}"
        assert same_bits(copy, oracle.param.detach().bfloat16()), f"copy of {count} elements at step {step}"


def train_split(
    kernels: AdamKernels, hyper: AdamHyper, start: Tensor, grads: list[Tensor], scales: list[float], cut: int
) -> None:
    """The same for a split master and bf16 gradients: oracle fp32 master, copy master.bfloat16(), grad.float()."""
    count = start.numel()
    oracle = Oracle(start, hyper)
    hi, lo = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.int16)
    exp_avg, exp_avg_sq, master = torch.zeros(count), torch.zeros(count), torch.empty(count)
    kernels.split(start, hi, lo, exp_avg_sq)
    for step, grad in enumerate(grads, 1):
        oracle.step(scaled(grad, scales).float(), hyper.lr)
        before = grad.clone()
        for at, tail in pieces(count, cut + step) if cut else [(slice(0, count), count % torch_tail_width())]:
            kernels.step_split(
                hi[at], lo[at], exp_avg[at], exp_avg_sq[at], grad[at],
                tail=tail, scales=scales, hyper=hyper, step=step,
            )  # fmt: skip
        assert torch.equal(grad.view(torch.int16), before.view(torch.int16)), "the gradient was changed"
        expected = oracle.state()
        kernels.merge(hi, lo, exp_avg_sq, master)
        second = exp_avg_sq.clone()
        clear_tie_bits(second)
        assert same_bits(master, expected["param"]), f"master of {count} elements at step {step}"
        assert same_bits(hi, expected["param"].bfloat16()), f"hi of {count} elements at step {step}"
        assert same_bits(exp_avg, expected["exp_avg"]), f"exp_avg of {count} elements at step {step}"
        assert same_bits(second, expected["exp_avg_sq"]), f"exp_avg_sq of {count} elements at step {step}"
