"""One AdamW step beside what else there is: fuyou's kernels, torch fused, DeepSpeed's CPUAdam, and the memory itself.

    python scripts/bench_adam.py [--parameters 50M 200M] [--rounds 25] [--json FILE]

Everything runs in one process in interleaved rounds; the figures are medians, and every ratio is the median of the
rounds' own ratios, so that a slow spell of the machine hits both sides. GB/s count what must cross the memory bus:
fp32 28 bytes a parameter (reads p, m, v, g; writes p, m, v), with a bf16 gradient and copy 28 (reads 14, writes 14),
split master 26 (reads hi, lo, m, v, g: 14; writes hi, lo, m, v: 12). The in-place bandwidth is the best of several
in-place torch operations over as many large tensors, each element counted as read and written. All operands lie in
ordinary anonymous memory, asked for in huge pages (as the product's arena is) unless --small-pages. "Level" is 0.97: the
medians of two equal kernels are that far apart on a machine whose memory others use too. Before each turn all rest: the
OpenMP threads of torch and DeepSpeed spin for a while after their work, and would hold a core that the next one needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fuyou.swap.adam import AdamHyper, clear_tie_bits, load_kernels, native_problem, torch_tail_width
from fuyou.swap.adam_cores import choose_cores

HYPER = AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, decoupled=True)
FP32, COPY, SPLIT = 28, 28, 26  # bytes a parameter
REST_S = 0.02  # longer than OpenMP's threads spin
Action = Callable[[], object]


class Operands:
    """The arrays of every contestant, shared: p, m, v, g fp32; hi, lo, half 16 bits; and the user's upcast buffer."""

    def __init__(self, count: int, huge: bool) -> None:
        self.count = count
        self.param, self.exp_avg, self.exp_avg_sq, self.grad = (_memory(count, torch.float32, huge) for _ in range(4))
        self.hi, self.half = (_memory(count, torch.bfloat16, huge) for _ in range(2))
        self.lo = _memory(count, torch.int16, huge)
        self.fill()

    def fill(self) -> None:
        """Ordinary numbers, so that no side meets denormals: a training run's magnitudes."""
        for tensor, low, high in (
            (self.param, -0.1, 0.1), (self.exp_avg, -1e-3, 1e-3), (self.exp_avg_sq, 1e-7, 1e-6), (self.grad, -1e-3, 1e-3)
        ):  # fmt: skip
            some = torch.empty(1_000_003, dtype=torch.float32).uniform_(low, high)
            for part in tensor.split(some.numel()):
                part.copy_(some[: part.numel()])
        self.half.copy_(self.grad)
        load_kernels("torch").split(self.param, self.hi, self.lo, self.exp_avg_sq)


def _memory(count: int, dtype: torch.dtype, huge: bool) -> Tensor:
    nbytes = count * torch.empty(0, dtype=dtype).element_size()
    room = mmap.mmap(-1, nbytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE if huge else 15)  # 15: MADV_NOHUGEPAGE
    whole = torch.frombuffer(room, dtype=torch.uint8)
    skip = -whole.data_ptr() % (2 << 20)
    return whole[skip : skip + nbytes].view(dtype)


# --- contestants: name -> (action, bytes a parameter) -----------------------------------------------------------------


def fuyou_rows(data: Operands, threads: int | None) -> dict[str, tuple[Action, int]]:
    if native_problem():
        print(f"fuyou's native kernels are missing: {native_problem()}")
        return {}
    rest = {"tail": data.count % torch_tail_width(), "hyper": HYPER, "step": 5}
    moments = (data.exp_avg, data.exp_avg_sq)
    rows: dict[str, tuple[Action, int]] = {}
    paths = [path for path in load_kernels("native")._native.adam_paths() if path != "scalar"]  # type: ignore[attr-defined]
    for path in paths:
        kernels = load_kernels("native", threads=threads, path=path)
        for suffix, scales in (("", []), (", one scale", [0.37]))[: 2 if path == paths[0] else 1]:
            rows |= {
                f"fuyou fp32 {path}{suffix}": (
                    lambda k=kernels, s=scales: k.step_fp32(data.param, *moments, data.grad, scales=s, **rest), FP32),
                f"fuyou copy {path}{suffix}": (
                    lambda k=kernels, s=scales: k.step_copy(data.param, data.hi, *moments, data.half, scales=s, **rest), COPY),
                f"fuyou split {path}{suffix}": (
                    lambda k=kernels, s=scales: k.step_split(data.hi, data.lo, *moments, data.half, scales=s, **rest), SPLIT),
            }  # fmt: skip
    return rows


def torch_rows(data: Operands) -> dict[str, tuple[Action, int]]:
    """torch's fused AdamW as its optimizer's step() runs it, and the ways to have a bf16 model with an fp32 master."""
    steps = torch.tensor(5.0)

    def fused(grad: Tensor) -> None:
        torch._fused_adamw_(
            [data.param], [grad], [data.exp_avg], [data.exp_avg_sq], [], [steps], amsgrad=False, maximize=False,
            lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2, weight_decay=HYPER.weight_decay, eps=HYPER.eps,
        )  # fmt: skip

    def new_upcast() -> None:  # what `grad.float()` in a loop does: fresh memory each time
        fused(data.half.float())
        data.hi.copy_(data.param)

    def kept_upcast() -> None:
        data.grad.copy_(data.half)
        fused(data.grad)
        data.hi.copy_(data.param)

    def foreach() -> None:
        torch._foreach_copy_([data.grad], [data.half])
        fused(data.grad)
        torch._foreach_copy_([data.hi], [data.param])

    def sliced(
        elements: int,
    ) -> None:  # as with parameters of this size, one after another: the upcast stays in a cache
        for at in range(0, data.count, elements):
            part = slice(at, at + elements)
            upcast = data.grad[:elements][: data.half[part].numel()]
            upcast.copy_(data.half[part])
            torch._fused_adamw_(
                [data.param[part]], [upcast], [data.exp_avg[part]], [data.exp_avg_sq[part]], [], [steps], amsgrad=False,
                maximize=False, lr=HYPER.lr, beta1=HYPER.beta1, beta2=HYPER.beta2, weight_decay=HYPER.weight_decay,
                eps=HYPER.eps,
            )  # fmt: skip
            data.hi[part].copy_(data.param[part])

    return {
        "torch fused fp32": (lambda: fused(data.grad), FP32),
        "torch user: .float(), fused, copy_": (new_upcast, SPLIT),
        "torch user: copy_ to a kept buffer, fused, copy_": (kept_upcast, SPLIT),
        "torch user: foreach copies": (foreach, SPLIT),
        "torch user: the same by 256 Ki elements": (lambda: sliced(1 << 18), SPLIT),
        "torch user: the same by 2 Mi elements": (lambda: sliced(1 << 21), SPLIT),
    }


def deepspeed_rows(data: Operands) -> dict[str, tuple[Action, int]]:
    """DeepSpeed's CPUAdam in AdamW mode: fp32, and fp32 state under a bf16 gradient where its build takes that."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from deepspeed.ops.op_builder import CPUAdamBuilder

            op = CPUAdamBuilder().load(verbose=False)
            op.create_adam(0, HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay, True, False)
    except Exception as error:  # not installed, or it cannot compile its extension here
        print(f"DeepSpeed's CPUAdam is missing: {type(error).__name__}: {error}"[:200])
        return {}

    def step(grad: Tensor) -> None:  # what DeepSpeedCPUAdam.step() calls for each parameter
        op.adam_update(
            0, 5, HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay, True,
            data.param, grad, data.exp_avg, data.exp_avg_sq,
        )  # fmt: skip

    def bf16() -> None:
        data.grad.copy_(data.half)
        step(data.grad)
        data.hi.copy_(data.param)

    def no_master() -> None:  # bf16 parameters and fp32 moments: rounds the parameters themselves, another result
        op.adam_update(
            0, 5, HYPER.lr, HYPER.beta1, HYPER.beta2, HYPER.eps, HYPER.weight_decay, True,
            data.hi, data.half, data.exp_avg, data.exp_avg_sq,
        )  # fmt: skip

    return {
        "DeepSpeed fp32": (lambda: step(data.grad), FP32),
        "DeepSpeed: upcast, step, copy_": (bf16, SPLIT),
        "(DeepSpeed bf16 parameters without a master)": (no_master, 22),
    }


def memory_rows(data: Operands) -> dict[str, tuple[Action, int]]:
    """In-place forms, on one array and on as many as an update writes; the best is the machine's."""
    arrays = (data.param, data.exp_avg, data.exp_avg_sq)

    def each(operation: Callable[[Tensor], object]) -> Action:
        return lambda: [operation(array) for array in arrays]

    return {
        "in place: mul_ on 3 arrays": (each(lambda x: x.mul_(0.9999999)), 24),
        "in place: int add_ on 3 arrays": (each(lambda x: x.view(torch.int32).add_(1)), 24),
        "in place: foreach mul_ on 3 arrays": (lambda: torch._foreach_mul_(list(arrays), 0.9999999), 24),
        "in place: mul_ on 1 array": (lambda: data.grad.mul_(0.9999999), 8),
    }  # fmt: skip


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(rows: dict[str, tuple[Action, int]], rounds: int, data: Operands) -> dict[str, list[float]]:
    """Seconds of each row in each round. All share the arrays, and what one leaves stays ordinary numbers for the next."""
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        clear_tie_bits(data.exp_avg_sq)  # the split master's, which would be negative moments to the others
        for name, (action, _) in rows.items():
            time.sleep(REST_S)
            began = time.perf_counter()
            action()
            if number:  # the first touches pages and starts threads
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: dict[str, list[float]], rows: dict[str, tuple[Action, int]], ours: str, theirs: list[str]) -> dict:
    """How much faster `ours` is than the best of `theirs` (by median): the median of the rounds' ratios."""
    best = min(theirs, key=lambda name: statistics.median(seconds[name]) / rows[name][1])
    pairs = zip(seconds[best], seconds[ours], strict=True)
    return {"ours": ours, "against": best, "ratio": statistics.median(one / other for one, other in pairs)}


def judge(seconds: dict[str, list[float]], rows: dict[str, tuple[Action, int]]) -> list[dict]:
    """The goals that the project set itself; a PASS or FAIL here is information."""
    fp32s = [name for name in rows if name.startswith("fuyou fp32") and "scale" not in name]
    if not fp32s:
        return []
    ours, split, copy = fp32s[0], fp32s[0].replace("fp32", "split"), fp32s[0].replace("fp32", "copy")
    memory = [name for name in rows if name.startswith("in place")]
    users = [name for name in rows if name.startswith(("torch user", "DeepSpeed:"))]
    results = [
        ratio(seconds, rows, ours, [name for name in rows if name in ("torch fused fp32", "DeepSpeed fp32")])
        | {"goal": "fp32: at least level with the best", "least": 0.97},
        ratio(seconds, rows, ours, memory) | {"goal": "fp32: 90 % of the in-place bandwidth", "least": 0.9},
        ratio(seconds, rows, split, users)
        | {"goal": "split master: 1.25x the best a torch user can do", "least": 1.25},
        ratio(seconds, rows, copy, users) | {"goal": "bf16 copy, for information", "least": 1.25},
    ]
    results[1]["ratio"] *= rows[ours][1] / rows[results[1]["against"]][1]  # of bandwidths, not of times
    for each in results:
        each["passed"] = each["ratio"] >= each["least"]
    return results


def run(count: int, threads: int | None, rounds: int, huge: bool) -> dict:
    """One table: `threads` is 1, or None for all."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    data = Operands(count, huge)
    rows = memory_rows(data) | torch_rows(data) | deepspeed_rows(data) | fuyou_rows(data, threads)
    seconds = measure(rows, rounds, data)
    used = {"torch": torch.get_num_threads(), "fuyou": threads or choose_cores().threads}
    kind = "huge" if huge else "4 KiB"
    print(
        f"\n{count / 1e6:g}M parameters, threads: torch {used['torch']}, fuyou {used['fuyou']}, {kind} pages, {rounds} rounds"
    )
    table = {}
    for name, (_, traffic) in rows.items():
        middle = statistics.median(seconds[name])
        spread = [round(traffic * count / each / 1e9, 1) for each in (max(seconds[name]), min(seconds[name]))]
        table[name] = {
            "ns_per_parameter": round(middle / count * 1e9, 4),
            "gb_per_s": round(traffic * count / middle / 1e9, 2),
        }
        table[name]["gb_per_s_range"] = spread
        values = table[name]
        print(f"  {name:50s} {values['ns_per_parameter']:7.3f} ns/parameter {values['gb_per_s']:6.1f} GB/s  {spread}")
    goals = judge(seconds, rows)
    for each in goals:
        word = "PASS" if each["passed"] else "FAIL"
        print(f"  {word}  {each['goal']}: {each['ratio']:.3f} (>= {each['least']}) against {each['against']!r}")
    return {"parameters": count, "threads": used, "huge_pages": huge, "rounds": rounds, "rows": table, "goals": goals}


def machine() -> dict:
    def field(path: str, start: str) -> str:
        with contextlib.suppress(OSError):
            for line in Path(path).read_text().splitlines():
                if line.startswith(start):
                    return line.partition(":")[2].strip()
        return "unknown"

    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "transparent_huge_pages": huge.read_text().strip() if huge.exists() else "unknown",
        "paths": load_kernels("native")._native.adam_paths() if not native_problem() else [],  # type: ignore[attr-defined]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", nargs="+", default=["50M"], help="such as 50M 200M; 200M takes 5 GB")
    parser.add_argument("--threads", choices=["1", "all", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--small-pages", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    results = []
    for text in options.parameters:
        count = int(float(text.rstrip("mM")) * 1e6) if text[-1] in "mM" else int(float(text))
        for threads in [None, 1] if options.threads == "both" else [1 if options.threads == "1" else None]:
            results.append(run(count, threads, options.rounds, not options.small_pages))
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
