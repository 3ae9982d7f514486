"""Every step tells whether its scaled gradient held an inf or a nan, wherever it is: torch.isfinite is the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adam_oracle import ADAMW, backends, kernels_named, scaled
from torch import Tensor

from fuyou.swap.adam import AdamKernels, torch_tail_width

STEPS = ("fp32", "copy", "split")
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=backends())
def kernels(request: pytest.FixtureRequest) -> AdamKernels:
    return kernels_named(request.param)


def stepper(kernels: AdamKernels, kind: str, count: int) -> tuple[torch.dtype, Callable[[Tensor, list[float]], bool]]:
    """(the gradient's dtype, a step of `count` elements on fresh state that returns what the kernel says)."""
    fp32, half = (lambda: torch.zeros(count)), (lambda: torch.zeros(count, dtype=torch.bfloat16))

    def run(grad: Tensor, scales: list[float]) -> bool:
        rest = {"tail": count % torch_tail_width(), "scales": scales, "hyper": ADAMW, "step": 1}
        if kind == "fp32":
            return kernels.step_fp32(fp32(), fp32(), fp32(), grad, **rest)
        if kind == "copy":
            return kernels.step_copy(fp32(), half(), fp32(), fp32(), grad, **rest)
        return kernels.step_split(half(), torch.zeros(count, dtype=torch.int16), fp32(), fp32(), grad, **rest)

    return (torch.float32 if kind == "fp32" else torch.bfloat16), run


@pytest.mark.parametrize("kind", STEPS)
def test_one_element_anywhere(kernels: AdamKernels, kind: str) -> None:
    """Every lane of a vector, what is left of one, and the tail; with everything else as large as can be."""
    count = 2 * 16 + 8 + 5
    dtype, step = stepper(kernels, kind, count)
    clean = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
    clean[::2] *= -1
    assert step(clean, []) is False
    for place in range(count):
        for value in (INF, -INF, NAN):
            grad = clean.clone()
            grad[place] = value
            assert step(grad, []) is True, (place, value)


@pytest.mark.parametrize("kind", STEPS)
def test_scales_decide(kernels: AdamKernels, kind: str) -> None:
    """What counts is the gradient after each scale, rounded to its dtype."""
    dtype, step = stepper(kernels, kind, 37)
    largest = torch.finfo(dtype).max
    cases = [(1.0, [3e38]), (largest, [1.001]), (largest, [1.01]), (largest, [2.0, 0.25]), (largest, [0.25, 2.0]),
             (INF, [0.0]), (NAN, [0.0]), (0.0, [INF]), (1.0, [NAN]), (INF, [0.5]), (1e-30, [1e-30])]  # fmt: skip
    seen = set()
    for place in (0, 20, 36):
        for value, scales in cases:
            grad = torch.zeros(37, dtype=dtype)
            grad[place] = value
            expected = not bool(torch.isfinite(scaled(grad, scales)).all())
            assert step(grad, scales) is expected, (place, value, scales)
            seen.add(expected)
    assert seen == {True, False}


@pytest.mark.parametrize("kind", STEPS)
def test_long_ranges(kernels: AdamKernels, kind: str) -> None:
    """Whichever thread meets it, the answer is the range's; and clean again when it is gone."""
    count = 400_003
    dtype, step = stepper(kernels, kind, count)
    grad = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    for place in (0, 65_535, 65_536, 131_071, 300_000, count - 4, count - 1):
        kept = grad[place].clone()
        grad[place] = NAN
        assert step(grad, [0.37]) is True, place
        grad[place] = kept
    assert step(grad, [0.37]) is False
    assert step(grad, []) is False


def test_empty_range_is_finite(kernels: AdamKernels) -> None:
    for kind in STEPS:
        dtype, step = stepper(kernels, kind, 0)
        assert step(torch.empty(0, dtype=dtype), [INF]) is False


def test_step_statistics_count_parameters(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A run applies inf and nan as plain PyTorch does, and its step's statistics say how many parameters had them."""
    import fuyou

    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(40, 40), torch.nn.Linear(40, 40))
    plain = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(3)))
    plain.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
    with fuyou.wrap(
        model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        nvme=None, ram="256MiB", gpu="256MiB", device="cpu",
    ) as run:  # fmt: skip
        for damage in (0.0, INF, None):
            for net in (model, plain):
                net(torch.ones(2, 40)).sum().backward()
            for net in (model, plain):
                if damage is None:  # by now every weight is nan; the last bias' gradient alone is not
                    for parameter in list(net.parameters())[:-1]:
                        parameter.grad = None
                    continue
                gradient = net[1].weight.grad
                gradient[3, 4] += damage
                net[2].bias.grad[0] += damage
            run.optimizer.step()
            run.optimizer.zero_grad()
            theirs.step()
            theirs.zero_grad()
        run.settle()
        counts = [each["nonfinite_gradients"] for each in run.report().dict()["steps"]]
        assert counts == [0, 2, 0]
        for (name, ours), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.detach().view(-1).nan_to_num(7), expected.detach().view(-1).nan_to_num(7)), name
