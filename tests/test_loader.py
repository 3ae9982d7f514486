"""How weights come to the device: pages that are handed on, and reads that are under way when somebody gives up."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import struct
import threading
import time

import pytest
import torch
from torch import nn

import fuyou
from fuyou.core.races import Races
from fuyou.core.ticket import await_ended
from fuyou.swap.unit import Residency
from fuyou.tiers import pages
from fuyou.tiers.device import DeviceMemory
from fuyou.tiers.pages import HUGE_BYTES, PAGE_BYTES, Pages
from fuyou.tiers.store import Store

CPU = torch.device("cpu")


def present_bytes(memory: Pages) -> int:
    """Of this range, in whole pages, as the kernel's page table has them (Documentation/admin-guide/mm/pagemap.rst)."""
    first, count = memory.address // PAGE_BYTES, -(-memory.nbytes // PAGE_BYTES)
    with open("/proc/self/pagemap", "rb") as table:
        table.seek(8 * first)
        entries = struct.unpack(f"{count}Q", table.read(8 * count))
    return PAGE_BYTES * sum(entry >> 63 for entry in entries)


class TestPages:
    @pytest.mark.parametrize("nbytes", [PAGE_BYTES, 5 * PAGE_BYTES + 7, HUGE_BYTES, 3 * HUGE_BYTES + 9 * PAGE_BYTES])
    def test_another_ones_pages_come_with_what_is_in_them_and_it_has_none_left(self, nbytes):
        first, second = Pages(nbytes), Pages(nbytes)
        whole = nbytes // PAGE_BYTES * PAGE_BYTES
        value = torch.randint(0, 256, (whole,), dtype=torch.uint8)
        first.bytes[:whole].copy_(value)
        for giver, taker in ((first, second), (second, first), (first, second)):
            view = taker.bytes[: whole // 2]
            assert taker.take_over(giver)
            assert torch.equal(taker.bytes[:whole], value) and torch.equal(view, value[: whole // 2])
            assert present_bytes(giver) == 0
            assert not bool(giver.bytes[:whole].any())  # reading gives it pages anew
            giver.drop()

    def test_a_forked_child_inherits_neither_afterwards(self):
        first, second = Pages(3 * PAGE_BYTES), Pages(3 * PAGE_BYTES)
        first.bytes.fill_(7)
        assert second.take_over(first)
        for memory in (first, second):
            child = os.fork()
            if child == 0:
                faulthandler.disable()
                ctypes.string_at(memory.address, 1)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV

    def test_where_one_is_larger_the_rest_stays(self):
        small, large = Pages(2 * PAGE_BYTES), Pages(5 * PAGE_BYTES)
        large.bytes.fill_(7)
        assert small.take_over(large)
        assert bool((small.bytes == 7).all())
        assert not bool(large.bytes[: 2 * PAGE_BYTES].any()) and bool((large.bytes[2 * PAGE_BYTES :] == 7).all())

    def test_what_is_less_than_a_page_is_not_moved(self):
        first, second = Pages(100), Pages(100)
        first.bytes.fill_(7)
        assert not second.take_over(first)
        assert bool((first.bytes == 7).all()) and not bool(second.bytes.any())

    def test_a_kernel_that_fails_half_way_leaves_memory_that_can_be_used(self, monkeypatch):
        first, second = Pages(4 * PAGE_BYTES), Pages(4 * PAGE_BYTES)
        first.bytes.fill_(7)
        unmap = ctypes.CDLL(None).munmap
        unmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

        def mremap(old, _old_bytes, nbytes, _flags, new):
            assert unmap(new, nbytes) == 0  # mremap(2) does this first
            return -1

        monkeypatch.setattr(pages, "_mremap", mremap)
        assert not second.take_over(first)
        assert bool((first.bytes == 7).all()) and not bool(second.bytes.any())
        second.bytes.fill_(8)

    def test_only_whole_huge_pages_are_huge(self):
        memory = Pages(HUGE_BYTES + 3 * PAGE_BYTES)
        memory.bytes.fill_(1)
        assert present_bytes(memory) == memory.nbytes
        memory.drop()
        assert present_bytes(memory) == 0

    def test_a_slot_with_races_keeps_its_own_pages(self):
        first, second = DeviceMemory(4 * PAGE_BYTES, CPU, Races(0)), DeviceMemory(4 * PAGE_BYTES, CPU, Races(0))
        for each in (first, second):
            each.start()
        first.take()
        assert not second.take_over(first)
        first.give_back()


class Silence:
    """Reads of weights that do not end until `answer`; the drive has done them long before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answered = threading.Event()
        self.answered.set()
        original = Store.transfer

        def transfer(store, kind, slot, address, keep):
            ticket = original(store, kind, slot, address, keep)
            late = kind == "read" and isinstance(keep, DeviceMemory) and not self.answered.is_set()
            return _Held(ticket, self.answered, store) if late else ticket

        monkeypatch.setattr(Store, "transfer", transfer)


class _Held:
    def __init__(self, ticket, answered, store):
        self.ticket, self.answered, self.store = ticket, answered, store

    def done(self):
        return self.answered.is_set() and self.ticket.done()

    def wait(self, timeout_s=None):
        if not self.answered.wait(0.2 if timeout_s is None else timeout_s):
            raise fuyou.DeadlineError("made up silence")
        self.ticket.wait(timeout_s)


def make(tmp_path, blocks=6, deadline_s=0.2):
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(128, 128) for _ in range(blocks))
    whole = nn.Sequential(*model)
    expected = {name: value.clone() for name, value in whole.state_dict().items()}
    run = fuyou.wrap(
        whole, torch.optim.AdamW(whole.parameters(), fused=True), nvme=tmp_path, ram="1MiB", gpu="65MiB", device="cpu",
        config=fuyou.Config(deadline_s=deadline_s, blocks=["0", "1", "2", "3", "4", "5"][:blocks]),
    )  # fmt: skip
    return run, expected


def output(values: dict[str, torch.Tensor], x: torch.Tensor, blocks: int = 6) -> torch.Tensor:
    for index in range(blocks):
        x = nn.functional.linear(x, values[f"{index}.weight"], values[f"{index}.bias"])
    return x


class TestASilentDrive:
    def test_has_the_memory_until_it_answers_and_then_all_goes_on(self, tmp_path, monkeypatch):
        silence = Silence(monkeypatch)
        run, expected = make(tmp_path)
        x = torch.randn(3, 128)
        with torch.no_grad():
            assert torch.equal(run.model(x), output(expected, x))
            for unit in run._units:
                run._movers.swapper.invalidate(unit)
            silence.answered.clear()
            for _ in range(2):  # the second one meets what the first one left
                with pytest.raises(fuyou.DeadlineError, match="made up silence|weights of"):
                    run.model(x)
            held = [unit for unit in run._units if unit.residency is Residency.LOADING]
            began = time.monotonic()
            assert not run._movers.swapper.fetch(
                next(unit for unit in held if run._movers.swapper._loads[unit].cancelled)
            )
            assert time.monotonic() - began < 0.1  # a hint waits for nobody
            assert held and run._ledger.held("device", "weights") >= sum(unit.nbytes for unit in held)
            silence.answered.set()
            assert torch.equal(run.model(x), output(expected, x))
        run.close()
        assert all(run._ledger.held(tier) == 0 for tier in ("device", "host", "nvme"))

    def test_close_is_late_and_may_be_repeated(self, tmp_path, monkeypatch):
        silence = Silence(monkeypatch)
        run, expected = make(tmp_path)
        silence.answered.clear()
        with torch.no_grad(), pytest.raises(fuyou.DeadlineError):
            run.model(torch.randn(3, 128))
        with pytest.raises(fuyou.DeadlineError):
            run.close()
        silence.answered.set()
        run.close()
        assert all(torch.equal(value, expected[name]) for name, value in run.model.state_dict().items())
        assert all(run._ledger.held(tier) == 0 for tier in ("device", "host", "nvme"))

    def test_a_wrong_hint_is_waited_for_before_its_memory_is_anothers(self, tmp_path, monkeypatch):
        silence = Silence(monkeypatch)
        run, _ = make(tmp_path, deadline_s=30)
        unit = run._units[0]
        silence.answered.clear()
        assert run._movers.swapper.fetch(unit)
        while not run._movers.swapper._loads[unit].moves:
            time.sleep(1e-3)
        dropping = threading.Thread(target=run._movers.swapper.invalidate, args=(unit,))
        dropping.start()
        time.sleep(0.1)
        assert dropping.is_alive() and unit.residency is Residency.LOADING
        silence.answered.set()
        dropping.join(10)
        assert unit.residency is Residency.ABSENT and run._movers.swapper._loads[unit].cancel()
        run.close()


def test_await_ended_waits_through_errors_and_tells_a_deadline():
    class Twice:
        def __init__(self):
            self.asked = 0

        def done(self):
            self.asked += 1
            return self.asked > 3

        def wait(self, timeout_s=None):
            raise fuyou.StorageIOError(5, "of the writer before")

    await_ended([Twice()], time.monotonic() + 10)

    class Never(Twice):
        def done(self):
            return False

    with pytest.raises(fuyou.DeadlineError, match="still under way after an error: .*of the writer before"):
        await_ended([Never()], time.monotonic() + 0.02)


def test_in_the_middle_of_training_evicted_blocks_hand_their_pages_on(tmp_path, monkeypatch):
    if not Pages(PAGE_BYTES).take_over(Pages(PAGE_BYTES)):
        pytest.skip("this kernel has no MREMAP_DONTUNMAP")
    taken = []
    original = DeviceMemory.take_over
    monkeypatch.setattr(DeviceMemory, "take_over", lambda self, other: taken.append(original(self, other)) or taken[-1])
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
    plain = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8)))
    plain.load_state_dict(whole.state_dict())
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
    run = fuyou.wrap(
        whole, torch.optim.AdamW(whole.parameters(), lr=1e-2, fused=True), nvme=tmp_path, ram="1MiB", gpu="65MiB",
        device="cpu", config=fuyou.Config(blocks=[str(index) for index in range(8)]),
    )  # fmt: skip
    with run:
        for _ in range(3):
            x = torch.randn(4, 128)
            for model, optimizer in ((plain, theirs), (run.model, run.optimizer)):
                model(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.parameters(), strict=True))
        gc.collect()
    assert sum(taken) >= 12 and all(taken)
