"""Split masters come back bit for bit, and their update is that of the fp32 master: torch is the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from adam_oracle import ADAMW, backends, bit_patterns, kernels_named, same_bits, train_split

from fuyou.swap.adam import AdamKernels, clear_tie_bits, load_kernels, native_problem


@pytest.fixture(params=backends())
def kernels(request: pytest.FixtureRequest) -> AdamKernels:
    return kernels_named(request.param)


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
