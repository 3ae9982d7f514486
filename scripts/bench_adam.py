"""Nanoseconds a parameter and GB/s of one AdamW step: the native kernels, torch's fused one, and the plain bf16 loop.

    python scripts/bench_adam.py [--elements 50000000] [--repeats 5]

The traffic counted is what must cross the memory bus: fp32 28 bytes a parameter (read p, m, v, g; write p, m, v), split
bf16 26 (read hi, lo, m, v, g: 14; write hi, lo, m, v: 12). "upcast + fused + cast" is what a plain loop with an fp32
master does for the latter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fuyou.swap.adam import AdamHyper, load_kernels, native_problem, torch_tail_width

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True)
FP32_BYTES, SPLIT_BYTES = 28, 26


def best_s(action: Callable[[], None], repeats: int) -> float:
    action()  # touches the pages
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    count: int = options.elements

    param, exp_avg, exp_avg_sq, grad = (torch.full((count,), value) for value in (1.0, 0.0, 0.0, 1e-2))
    hi, lo = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.int16)
    half = grad.bfloat16()
    oracle = torch.nn.Parameter(param)
    optimizer = torch.optim.AdamW([oracle], lr=HYPER.lr, weight_decay=HYPER.weight_decay, fused=True)

    def fused() -> None:
        oracle.grad = grad
        optimizer.step()

    def upcast_fused_cast() -> None:
        oracle.grad = half.float()
        optimizer.step()
        hi.copy_(oracle.detach())

    rows: list[tuple[str, Callable[[], None], int]] = [
        ("torch fused, fp32", fused, FP32_BYTES),
        ("upcast + fused + cast", upcast_fused_cast, SPLIT_BYTES),
    ]
    keywords = {"tail": count % torch_tail_width(), "hyper": HYPER, "step": 1}
    names = [("torch", "auto")]
    if not native_problem():
        names += [
            ("native", path) for path in ("avx512", "avx2") if path in load_kernels("native")._native.adam_paths()
        ]
    for name, path in names:
        kernels = load_kernels(name, path=path)
        for scales in ([], [0.37]):
            label = f"{name} {path if name == 'native' else ''} {'scaled' if scales else ''}".strip()
            fp32 = lambda k=kernels, s=scales: k.step_fp32(param, exp_avg, exp_avg_sq, grad, scales=s, **keywords)  # noqa: E731
            split = lambda k=kernels, s=scales: k.step_split(hi, lo, exp_avg, exp_avg_sq, half, scales=s, **keywords)  # noqa: E731
            rows += [(f"{label}, fp32", fp32, FP32_BYTES), (f"{label}, split", split, SPLIT_BYTES)]
    load_kernels("torch").split(param, hi, lo, exp_avg_sq)

    print(f"{count / 1e6:g}M parameters, torch {torch.__version__} with {torch.get_num_threads()} threads")
    for label, action, traffic in rows:
        seconds = best_s(action, options.repeats)
        print(f"{label:32s} {seconds / count * 1e9:7.3f} ns/parameter {traffic * count / seconds / 1e9:7.1f} GB/s")


if __name__ == "__main__":
    main()
