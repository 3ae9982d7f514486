"""The Adam kernels give the bits of AdamW/Adam(fused=True), however a tensor is cut: torch is the oracle."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuyou.core.errors import ConfigError, StateError
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


def _backends() -> list[str]:
    if native_problem():
        return ["torch"]
    return ["torch", "native-1", "native-2", *(f"native-3-{path}" for path in adam._import_native()[0].adam_paths())]


@pytest.fixture(params=_backends())
def kernels(request: pytest.FixtureRequest) -> AdamKernels:
    name, *rest = request.param.split("-")
    if name == "torch":
        return load_kernels("torch")
    return load_kernels("native", threads=int(rest[0]), path=rest[1] if len(rest) > 1 else "auto")


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For many short tensors: starting torch's threads for each takes most of the time on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


# --- the oracle: plain PyTorch --------------------------------------------------------------------------------------


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


# --- the update -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.usefixtures("one_torch_thread")
def test_every_short_tensor(kernels: AdamKernels, hyper: AdamHyper) -> None:
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 65):
        start = torch.randn(count, generator=generator)
        grads = [torch.randn(count, generator=generator) for _ in range(5)]
        train_fp32(kernels, hyper, start, grads, SCALES["one"] if count % 3 == 0 else [], cut=count % 2)
        halves = [grad.bfloat16() for grad in grads]
        train_split(kernels, hyper, start, halves, SCALES["two"] if count % 3 == 0 else [], cut=count % 2)


@pytest.mark.parametrize("count", [1237, 4096, 100_003, 1_000_003])
@pytest.mark.parametrize("hyper", [HYPERS["adamw"], HYPERS["adam-half"]], ids=["adamw", "adam-half"])
def test_long_tensors_in_pieces(kernels: AdamKernels, hyper: AdamHyper, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=generator) * 0.02
    grads = [torch.randn(count, generator=generator) * 10.0**-k for k in range(5)]
    train_fp32(kernels, hyper, start, grads, [], cut=count)
    train_split(kernels, hyper, start, [grad.bfloat16() for grad in grads], [], cut=count)


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.usefixtures("one_torch_thread")
def test_odd_gradients_and_scales(kernels: AdamKernels, hyper: AdamHyper, scales: list[float]) -> None:
    """Zero, denormal, huge, infinite and NaN gradients; scales rounded one after another."""
    generator = torch.Generator().manual_seed(3)
    count = 4096 + 13
    start = torch.randn(count, generator=generator)
    grads = [odd_numbers(count, generator)[torch.randperm(count, generator=generator)] for _ in range(4)]
    train_fp32(kernels, hyper, start, grads, scales, cut=5)
    train_split(kernels, hyper, start, [grad.bfloat16() for grad in grads], scales, cut=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_what_a_tensor_scale_gives(kernels: AdamKernels, dtype: torch.dtype) -> None:
    """clip_grad_norm_ multiplies by a 0-dim tensor, not by a Python float; also one of the gradient's own dtype."""
    generator = torch.Generator().manual_seed(4)
    start, grad = torch.randn(1237, generator=generator), torch.randn(1237, generator=generator).to(dtype)
    for factor in (torch.tensor(1 / 3), torch.tensor(0.37, dtype=dtype), torch.tensor(1e-3, dtype=torch.float64)):
        expected = grad.clone().mul_(factor).float()
        oracle = Oracle(start, ADAMW)
        oracle.step(expected, ADAMW.lr)
        param, exp_avg, exp_avg_sq = start.clone(), torch.zeros(1237), torch.zeros(1237)
        keywords = {"tail": 1237 % torch_tail_width(), "scales": [factor.item()], "hyper": ADAMW, "step": 1}
        if dtype == torch.float32:
            kernels.step_fp32(param, exp_avg, exp_avg_sq, grad, **keywords)
        else:
            hi, lo = torch.empty(1237, dtype=dtype), torch.empty(1237, dtype=torch.int16)
            kernels.split(param, hi, lo, exp_avg_sq)
            kernels.step_split(hi, lo, exp_avg, exp_avg_sq, grad, **keywords)
            kernels.merge(hi, lo, exp_avg_sq, param)
        assert same_bits(param, oracle.param.detach())


def test_bias_correction_far_into_training(kernels: AdamKernels) -> None:
    """Late steps: torch's powers are in double, and its step count is a float."""
    generator = torch.Generator().manual_seed(5)
    count = 1237
    for step in (1000, 54_321, 16_777_215):
        param, exp_avg, grad = (torch.randn(count, generator=generator) for _ in range(3))
        exp_avg_sq = torch.rand(count, generator=generator)
        oracle = Oracle(param, ADAMW)
        oracle.optimizer.state[oracle.param] = {
            "step": torch.tensor(float(step - 1)), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()
        }  # fmt: skip
        oracle.step(grad.clone(), ADAMW.lr)
        kernels.step_fp32(
            param, exp_avg, exp_avg_sq, grad, tail=count % torch_tail_width(), scales=[], hyper=ADAMW, step=step
        )
        for got, expected in zip((param, exp_avg, exp_avg_sq), oracle.state().values(), strict=True):
            assert same_bits(got, expected), step


def test_decay_factor_of_contrived_hyperparameters(kernels: AdamKernels) -> None:
    """1 - lr * weight_decay, where rounding the product first gives another float than rounding once."""
    hyper = replace(ADAMW, lr=2.0**-12 * (1 + 2.0**-29 - 2.0**-40), weight_decay=2.0**-13 * (1 + 2.0**-40))
    train_fp32(kernels, hyper, torch.ones(23), [torch.zeros(23)], [], cut=0)
    # with lr's schedule the first step's factor is another one: so once more, with this lr exactly
    oracle = Oracle(torch.ones(23), hyper)
    oracle.step(torch.zeros(23), hyper.lr)
    param = torch.ones(23)
    kernels.step_fp32(
        param, torch.zeros(23), torch.zeros(23), torch.zeros(23),
        tail=23 % torch_tail_width(), scales=[], hyper=hyper, step=1,
    )  # fmt: skip
    assert same_bits(param, oracle.param.detach())


def test_empty_range(kernels: AdamKernels) -> None:
    nothing = torch.empty(0)
    kernels.step_fp32(
        nothing, nothing.clone(), nothing.clone(), nothing.clone(), tail=0, scales=[0.5], hyper=ADAMW, step=1
    )


WITHOUT_THREADS = """
import resource, torch
from fuyou.swap.adam import AdamHyper, load_kernels
states = [[torch.full((200_000,), value) for value in (1.0, 0.1, 0.01, 0.3)] for _ in range(2)]
hyper = AdamHyper(1e-3, 0.9, 0.999, 1e-8, 0.01, True)
alone, many = load_kernels("native", threads=1), load_kernels("native", threads=4)
alone.step_fp32(*states[0], tail=0, scales=[], hyper=hyper, step=1)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), resource.RLIM_INFINITY))  # no room for a thread's stack
many.step_fp32(*states[1], tail=0, scales=[], hyper=hyper, step=1)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(torch.equal(one, other) for one, other in zip(*states))
"""


@pytest.mark.skipif(bool(native_problem()), reason=native_problem() or "native kernels are here")
def test_no_thread_to_be_had() -> None:
    """Where the system gives no more threads the calling one does all."""
    subprocess.run([sys.executable, "-c", WITHOUT_THREADS], check=True)


# --- the split master -----------------------------------------------------------------------------------------------


def bit_patterns() -> Tensor:
    """fp32 by their bits: 4 million at random, and every upper half with the lower halves that decide rounding."""
    generator = torch.Generator().manual_seed(6)
    chance = torch.randint(-(2**31), 2**31, (4_000_003,), generator=generator)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    edges = (torch.arange(-(2**15), 2**15)[:, None] * 65536 + lower).flatten()
    return torch.cat([chance, edges]).to(torch.int32).view(torch.float32)


def test_split_and_merge_are_inverse(kernels: AdamKernels) -> None:
    master = bit_patterns()
    count = master.numel()
    second = torch.rand(count, generator=torch.Generator().manual_seed(7))
    marked = torch.where(torch.arange(count) % 2 == 0, second, -second)  # as an earlier split may have left it
    hi, lo = torch.empty(count, dtype=torch.bfloat16), torch.empty(count, dtype=torch.int16)
    back = torch.empty(count)
    kernels.split(master, hi, lo, marked)
    kernels.merge(hi, lo, marked, back)

    nan = master.isnan()
    assert torch.equal(master.view(torch.int32)[~nan], back.view(torch.int32)[~nan])
    assert back[nan].isnan().all() and hi[nan].isnan().all()
    assert same_bits(hi, master.bfloat16())
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert not torch.signbit(marked[~tie]).any(), "the sign is for ties only"
    clear_tie_bits(marked)
    assert torch.equal(marked, second)


def test_update_of_every_kind_of_master(kernels: AdamKernels) -> None:
    """Masters of any bits, ties and infinities too, under gradients of any bits."""
    start = bit_patterns()[3_000_000:]
    generator = torch.Generator().manual_seed(8)
    any_bits = torch.randint(-(2**15), 2**15, (2, start.numel()), generator=generator).to(torch.int16)
    train_split(kernels, ADAMW, start, list(any_bits.view(torch.bfloat16)), [], cut=11)


def test_ties_that_stay_ties(kernels: AdamKernels) -> None:
    """lr 0 leaves the master where it is: on a tie the sign bit must survive the new second moment."""
    upper = torch.arange(-(2**15), 2**15) * 65536 + 0x8000
    start = upper.to(torch.int32).view(torch.float32)
    grads = [torch.randn(start.numel(), generator=torch.Generator().manual_seed(9)).bfloat16() for _ in range(3)]
    train_split(kernels, replace(ADAMW, lr=0.0), start, grads, [], cut=0)


@pytest.mark.skipif(bool(native_problem()), reason=native_problem() or "native kernels are here")
def test_backends_store_the_same_split(kernels: AdamKernels) -> None:
    """A run may go on with the other backend: also the bytes of NaNs are the same."""
    master = bit_patterns()
    results = []
    for backend in (load_kernels("native", path="scalar"), kernels):
        hi, lo = torch.empty(master.numel(), dtype=torch.bfloat16), torch.empty(master.numel(), dtype=torch.int16)
        second = torch.ones(master.numel())
        backend.split(master, hi, lo, second)
        results.append((hi.view(torch.int16), lo, second.view(torch.int32)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


# --- what surrounds the kernels -------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """Notes the largest new tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in {
            arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)
        }:
            self.elements = max(self.elements, result.numel())
        return result


def test_temporaries_are_a_slice_long(kernels: AdamKernels) -> None:
    count = 3 * adam.SLICE_ELEMENTS + 5
    hi, lo, grad = (torch.zeros(count, dtype=kind) for kind in (torch.bfloat16, torch.int16, torch.bfloat16))
    exp_avg, exp_avg_sq, master, fp32_grad = (torch.zeros(count) for _ in range(4))
    keywords = {"tail": count % torch_tail_width(), "scales": [0.37, 0.5], "hyper": ADAMW, "step": 1}
    with LargestResult() as largest:
        kernels.step_split(hi, lo, exp_avg, exp_avg_sq, grad, **keywords)
        kernels.split(master, hi, lo, exp_avg_sq)
        kernels.merge(hi, lo, exp_avg_sq, master)
        kernels.step_fp32(master, exp_avg, exp_avg_sq, fp32_grad, **keywords)
    assert largest.elements <= adam.SLICE_ELEMENTS


def test_wrong_tensors_are_refused_by_name(kernels: AdamKernels) -> None:
    def step(count: int = 32, tail: int = 0, number: int = 1, **changed: Tensor) -> None:
        tensors = {name: torch.ones(count) for name in ("param", "exp_avg", "exp_avg_sq", "grad")} | changed
        kernels.step_fp32(**tensors, tail=tail, scales=[], hyper=ADAMW, step=number)

    step()
    with pytest.raises(StateError, match="exp_avg .*float32.*float64"):
        step(exp_avg=torch.ones(32, dtype=torch.float64))
    with pytest.raises(StateError, match="param .*strided"):
        step(param=torch.ones(64)[::2])
    with pytest.raises(StateError, match="grad .*2-D"):
        step(grad=torch.ones(4, 8))
    with pytest.raises(StateError, match="exp_avg_sq .*meta"):
        step(exp_avg_sq=torch.ones(32, device="meta"))
    with pytest.raises(StateError, match="different lengths.*grad 31"):
        step(grad=torch.ones(31))
    with pytest.raises(StateError, match="range of 37 elements"):
        step(count=37, tail=0)  # cut at no multiple of 16, or its tail forgotten
    with pytest.raises(StateError, match="last 40 its"):
        step(tail=40)
    with pytest.raises(StateError, match="step 0"):
        step(number=0)
    with pytest.raises(StateError, match="lo .*int16.*int32"):
        kernels.split(
            torch.ones(16), torch.ones(16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.int32), torch.ones(16)
        )


def test_kernels_are_chosen_by_name() -> None:
    assert load_kernels("torch").name == "torch"
    assert load_kernels().name == ("torch" if native_problem() else "native")
    with pytest.raises(ConfigError, match='"cuda"'):
        load_kernels("cuda")
    with pytest.raises(ConfigError, match="0 threads"):
        load_kernels(threads=0)
    if not native_problem():
        with pytest.raises(ConfigError, match="mmx.*scalar"):
            load_kernels("native", path="mmx")


def test_kernels_with_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe behind "auto": an update that is off by one ulp in one branch is seen, and said."""

    class NearlyTorch(adam.TorchKernels):
        def step_fp32(self, param, exp_avg, exp_avg_sq, grad, *, tail, scales, hyper, step):  # type: ignore[no-untyped-def]
            super().step_fp32(param, exp_avg, exp_avg_sq, grad, tail=tail, scales=scales, hyper=hyper, step=step)
            if tail and not hyper.decoupled:
                exp_avg_sq[-1:] = torch.nextafter(exp_avg_sq[-1:], torch.tensor(1e9))

    state = torch.get_rng_state()
    assert adam._same_bits(load_kernels("torch"), adam.TorchKernels())
    assert not adam._same_bits(NearlyTorch(), adam.TorchKernels())
    assert torch.equal(state, torch.get_rng_state()), "the probe must not disturb a run's random numbers"


@pytest.mark.usefixtures("one_torch_thread")
def test_tail_width_is_torchs() -> None:
    """By another experiment than the probe's: a tensor updated whole and without its last elements differ there."""
    width = torch_tail_width()
    assert width in (1, 2, 4, 8, 16)
    generator = torch.Generator().manual_seed(10)
    differs = torch.zeros(width, dtype=torch.bool)
    for _ in range(50):
        start, grad = torch.randn(32 + width - 1, generator=generator), torch.randn(32 + width - 1, generator=generator)
        longer = Oracle(torch.cat([start, torch.ones(1)]), ADAMW)  # the tail completed to a vector
        tensor = Oracle(start, ADAMW)
        for _ in range(3):
            longer.step(torch.cat([grad, torch.ones(1)]), 1e-3)
            tensor.step(grad.clone(), 1e-3)
        unlike = tensor.state()["exp_avg_sq"] != longer.state()["exp_avg_sq"][:-1]
        assert not unlike[:32].any()
        differs[:-1] |= unlike[32:]
    assert differs[: width - 1].all()
