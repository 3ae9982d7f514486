"""The Adam kernels give the bits of AdamW/Adam(fused=True), however a tensor is cut: torch is the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from adam_oracle import (
    ADAMW,
    HYPERS,
    SCALES,
    Oracle,
    backends,
    kernels_named,
    odd_numbers,
    same_bits,
    train_copy,
    train_fp32,
    train_split,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuyou.core.errors import ConfigError, StateError
from fuyou.swap import adam
from fuyou.swap.adam import AdamHyper, AdamKernels, load_kernels, native_problem, torch_tail_width


@pytest.fixture(params=backends())
def kernels(request: pytest.FixtureRequest) -> AdamKernels:
    return kernels_named(request.param)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For many short tensors: starting torch's threads for each takes most of the time on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.usefixtures("one_torch_thread")
def test_every_short_tensor(kernels: AdamKernels, hyper: AdamHyper) -> None:
    generator = torch.Generator().manual_seed(1)
    for count in range(1, 65):
        start = torch.randn(count, generator=generator)
        grads = [torch.randn(count, generator=generator) for _ in range(5)]
        train_fp32(kernels, hyper, start, grads, SCALES["one"] if count % 3 == 0 else [], cut=count % 2)
        halves = [grad.bfloat16() for grad in grads]
        for train in (train_split, train_copy):
            train(kernels, hyper, start, halves, SCALES["two"] if count % 3 == 0 else [], cut=count % 2)


@pytest.mark.parametrize("count", [1237, 4096, 100_003, 1_000_003])
@pytest.mark.parametrize("hyper", [HYPERS["adamw"], HYPERS["adam-half"]], ids=["adamw", "adam-half"])
def test_long_tensors_in_pieces(kernels: AdamKernels, hyper: AdamHyper, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    start = torch.randn(count, generator=generator) * 0.02
    grads = [torch.randn(count, generator=generator) * 10.0**-k for k in range(5)]
    train_fp32(kernels, hyper, start, grads, [], cut=count)
    for train in (train_split, train_copy):
        train(kernels, hyper, start, [grad.bfloat16() for grad in grads], [], cut=count)


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
    for train in (train_split, train_copy):
        train(kernels, hyper, start, [grad.bfloat16() for grad in grads], scales, cut=5)


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
