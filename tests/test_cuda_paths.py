"""What a machine without a GPU can show of the paths that only a CUDA device takes: storages that are resized, an allocator that
is full in pieces, budgets that others share. Calls of the CUDA runtime are stood for where there is none to make; test_gpu.py runs
the whole on a device."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Gpt
from torch import nn

import fuyou
from fuyou.core.ledger import Ledger
from fuyou.runtime.gauges import AllocatorGauge
from fuyou.runtime.handing_back import HandingBack
from fuyou.runtime.profile import StepTime, Stopwatch
from fuyou.swap import book, stash
from fuyou.swap.book import TensorBook
from fuyou.swap.unit import Unit
from fuyou.swap.weights import Swapper
from fuyou.tiers import host
from fuyou.tiers.device import Device, DeviceMemory
from fuyou.tiers.free import FreeRanges
from fuyou.tiers.host import Arena

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MIB, GIB = 1 << 20, 1 << 30


def ledger(device: int = GIB) -> Ledger:
    return Ledger({"device": device, "host": GIB, "nvme": 0})


def train(model: nn.Module, optimizer: Any, steps: int = 4) -> list[float]:
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 1237, (2, 16))
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- storages that are resized ----------------------------------------------------------------------------------------


def test_views_of_an_emptied_storage_are_those_that_were_cut_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA a unit's storage holds nothing until it is fetched, and torch refuses to cut a part of it then."""
    monkeypatch.setattr(DeviceMemory, "_has_pages", staticmethod(lambda device: False))
    unit = Unit("a block", (0,), torch.float32, CPU)
    unit.pack([("weight", nn.Parameter(torch.zeros(7, 9))), ("bias", nn.Parameter(torch.zeros(5)))])
    storage = unit.memory.tensor.untyped_storage()
    assert storage.nbytes() == 0
    with pytest.raises(RuntimeError, match="out of bounds"):
        unit.flat[:4]
    for value in (1.0, 2.0):
        unit.memory.take()
        assert storage.nbytes() == unit.nbytes
        unit.flat.fill_(value)
        assert [view.shape for view in unit.views] == [(7, 9), (5,)]
        assert all(bool((view == value).all()) for view in unit.views)
        unit.memory.give_back()
        assert storage.nbytes() == 0


# --- an allocator that is full in pieces ------------------------------------------------------------------------------


def test_units_that_find_no_piece_are_not_fetched_ahead_or_take_the_place_of_others(
    nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hints are given up, a needed unit drops an idle one: the bits are plain PyTorch's."""
    torch.manual_seed(0)
    plain = Gpt()
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True))
    refused = {True: 0, False: 0}
    asking: list[tuple[Swapper, bool]] = []
    take, take_bytes = DeviceMemory.take, Swapper._take_bytes

    def noted(self: Swapper, unit: Unit, needed: bool) -> bool:
        asking.append((self, needed))
        return take_bytes(self, unit, needed)

    def in_pieces(self: DeviceMemory) -> None:
        swapper, needed = asking[-1]
        if not needed or swapper._victim(True) is not None:
            refused[needed] += 1
            raise torch.OutOfMemoryError("in pieces")
        take(self)

    monkeypatch.setattr(Swapper, "_take_bytes", noted)
    monkeypatch.setattr(DeviceMemory, "take", in_pieces)
    monkeypatch.setattr(DeviceMemory, "take_over", lambda self, other: False)
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu") as run:
        assert train(run.model, run.optimizer) == expected
        run.settle()
        held = run._ledger.held("device", "weights")
        assert held == sum(unit.nbytes for unit in run._movers.swapper.resident) + run._buffer_bytes
    assert min(refused.values()) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))


def test_a_needed_unit_without_a_piece_is_the_allocators_error_and_leaves_no_charge(
    nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: DeviceMemory) -> None:
        raise torch.OutOfMemoryError("in pieces")

    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu") as run:
        before = run._ledger.held("device")
        monkeypatch.setattr(DeviceMemory, "take", never)
        monkeypatch.setattr(DeviceMemory, "take_over", lambda self, other: False)
        with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning, match="post-mortem"):
            train(model, run.optimizer, 1)
        monkeypatch.undo()
        assert run._ledger.held("device") <= before
        assert len(train(model, run.optimizer, 1)) == 1


@pytest.mark.parametrize("needed", [False, True])
def test_what_comes_back_finds_no_piece(needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, tries = ledger(), []

    def in_pieces(nbytes: int, device: torch.device) -> torch.Tensor:
        tries.append(nbytes)
        if len(tries) < 3:
            raise torch.OutOfMemoryError("in pieces")
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr(book, "empty_bytes", in_pieces)
    ours.relievers.append(lambda: True)
    found = TensorBook(ours, CPU).make(MIB, "a tensor", needed=needed)
    assert (found is not None) is needed and len(tries) == (3 if needed else 1)
    assert ours.held("device", "activations") == (MIB if needed else 0)
    del found
    assert ours.held("device") == 0


# --- budgets that others share ----------------------------------------------------------------------------------------


def cuda_stood_for(monkeypatch: pytest.MonkeyPatch, **calls: Callable[..., Any]) -> None:
    for name, call in calls.items():
        monkeypatch.setattr(torch.cuda, name, call, raising=False)


def test_the_allocators_limit_leaves_others_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = []
    cuda_stood_for(
        monkeypatch, empty_cache=lambda: None, memory_reserved=lambda _: 11 * GIB,
        get_device_properties=lambda _: SimpleNamespace(total_memory=24 * GIB),
        get_per_process_memory_fraction=lambda _: 0.9, set_per_process_memory_fraction=lambda share, _: fractions.append(share),
    )  # fmt: skip
    first, second = Device(CPU, 8 * GIB), Device(CPU, 2 * GIB)
    first.is_cuda = second.is_cuda = True
    first.limit(own_bytes=1 * GIB)
    second.limit(own_bytes=0)
    first.lift()
    first.lift()
    second.lift()
    assert fractions == [(8 + 10) / 24, (8 + 2 + 10) / 24, (2 + 10) / 24, 0.9]


def test_what_the_allocator_held_beside_all_charges_is_the_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peak between two samples, at which a block's activations were held that are gone by the next one."""
    peaks = iter([100, 700, 700, 760])
    cuda_stood_for(
        monkeypatch, reset_peak_memory_stats=lambda _: None, memory_allocated=lambda _: 90,
        max_memory_allocated=lambda _: next(peaks) * MIB,
    )  # fmt: skip
    ours = ledger()
    gauge = AllocatorGauge(CUDA, ours, committed=lambda: 0)
    gauge.start()
    gauge._baseline = 90 * MIB  # others' 90 MiB
    gauge.sample()
    assert ours.summary()["device"]["reserve_bytes"] == 10 * MIB
    ours.charge("device", "activations", 500 * MIB)
    ours.discharge("device", "activations", 450 * MIB)
    gauge.sample()
    assert ours.summary()["device"]["reserve_bytes"] == (700 - 90 - 500) * MIB
    gauge.sample()
    gauge.sample(leaving_bytes=10 * MIB)  # 50 MiB are held
    assert ours.summary()["device"]["reserve_bytes"] == (760 - 90 - 60) * MIB


def test_host_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's error is taken from the thread, or the next kernel that it launches would seem to have failed."""
    taken, entered = [], []
    runtime = SimpleNamespace(cudaHostRegister=lambda address, nbytes, flags: 2)
    cuda_stood_for(
        monkeypatch, cudart=lambda: runtime, device=lambda each: entered.append(each) or contextlib.nullcontext()
    )
    monkeypatch.setattr(host, "_take_last_error", taken.append)
    arena = Arena(MIB, ledger(), pin=torch.device("cuda", 1))
    assert arena.pinned is None and "error 2" in arena.note
    assert taken == entered == [torch.device("cuda", 1)]
    arena.close()


def test_what_a_full_device_cannot_take_back_stays_in_host_memory() -> None:
    class Full(torch.Tensor):
        def to(self, *_: object, **__: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("full")

    handing = HandingBack([], None, None, None)  # type: ignore[arg-type]
    value = torch.ones(3).as_subclass(Full)
    with pytest.warns(UserWarning, match="cuda:0 has no room for all") as warned:
        assert handing._at(value, CUDA) is value and handing._at(value, CUDA) is value
    assert len(warned) == 1


def test_a_step_is_as_long_as_the_device_is_at_it() -> None:
    watch = Stopwatch(CPU)
    assert StepTime(0.2, 1.0, 4.0).seconds(watch) == 3.0 and StepTime(5.0, 1.0, 4.0).seconds(watch) == 5.0


# --- threads and collections ------------------------------------------------------------------------------------------


def test_two_threads_that_are_the_first_to_want_a_worker_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Slow:
        def __init__(self, *_: object, **__: object) -> None:
            time.sleep(0.05)
            made.append(self)

    monkeypatch.setattr(stash, "Worker", Slow)
    its = stash.Stash.__new__(stash.Stash)
    its._closed, its._workers, its._lock = False, {}, threading.RLock()
    its.device, its._in_flight, its._races = Device(CPU, MIB), list, None  # type: ignore[assignment]
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(its._worker("landing"))) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(made) == 1 and set(map(id, found)) == {id(made[0])}


def test_ranges_that_come_back_while_one_is_taken() -> None:
    """As a garbage collection within `take` gives them: a comparison there lets one happen."""
    free = FreeRanges(64)
    first = free.take(16)

    class Collecting(int):
        def __le__(self, other: int) -> bool:  # `free >= nbytes`, reflected
            nonlocal first
            if first is not None:
                free.give(first, 16)
                first = None
            return int(self) <= other

    assert free.take(Collecting(48)) == 16
    assert free.take(16) == 0 and free.take(1) is None
    free.give(16, 48)
    free.give(0, 16)
    assert free.take(64) == 0
