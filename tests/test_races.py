"""The debug switch Config(debug_races=SEED): training keeps its bits, freed memory shows NaN, operations are really late.

Lateness is never judged by a clock: a `Gate` stands for the seeded delays, and opens when the test says so.
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
import random
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from fault_tools import Memory, open_or_skip
from torch import nn

import fuyou
from fuyou.core.errors import BudgetError, ConfigError, DeadlineError, StateError, StorageIOError
from fuyou.core.ledger import Ledger
from fuyou.core.races import LATENESS, Races
from fuyou.core.ticket import Ticket
from fuyou.tiers.device import Device, DeviceMemory
from fuyou.tiers.host import Arena
from fuyou.tiers.io import Engine, File, LateEngine
from fuyou.tiers.worker import Worker

PAGE, MIB = 4096, 1 << 20
LONG_S = 60.0  # for what comes at once: a test that waits this long has failed
STEPS = range(2)
CPU = torch.device("cpu")


class Gate(Races):
    """Delays that end when the test lets them: one for each permit, in no order, or all once it is open."""

    def __init__(self) -> None:
        super().__init__(0)
        self._permits = threading.Semaphore(0)
        self._begun = threading.Semaphore(0)
        self._open = False

    def delay(self) -> None:
        self._begun.release()
        if not self._open and not self._permits.acquire(timeout=LONG_S):
            raise TimeoutError("The gate was never opened.")

    def wait_for_delays(self, count: int = 1) -> None:
        """Until `count` more delays have begun."""
        for _ in range(count):
            assert self._begun.acquire(timeout=LONG_S)

    def let(self, count: int = 1) -> None:
        self._permits.release(count)

    def open(self) -> None:
        self._open = True
        self._permits.release(1000)


def is_nan(memory: torch.Tensor) -> bool:
    """Every value of it, in every dtype that training uses; -1 in integers."""
    floats = all(bool(memory.view(dtype).isnan().all()) for dtype in (torch.float32, torch.bfloat16))
    return floats and bool((memory.view(torch.int16) == -1).all())


def book() -> Ledger:
    return Ledger({"device": 64 * MIB, "host": 64 * MIB, "nvme": 64 * MIB})


# --- the option, and the draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, True, "on", 1.0])
def test_what_is_no_seed_is_refused(value):
    with pytest.raises(ConfigError, match="debug_races=.* must be a seed, a whole number from 0 on, or None"):
        fuyou.Config(debug_races=value)


def test_it_is_off_unless_asked_for():
    assert fuyou.Config().debug_races is None
    assert fuyou.Config(debug_races=0).debug_races == 0 and fuyou.Config(debug_races=0) != fuyou.Config()


def test_delays_follow_the_seed_and_the_stated_shares():
    races, same, other = Races(7), Races(7), Races(8)
    draws = [races.late_s() for _ in range(4000)]
    assert draws == [same.late_s() for _ in draws] != [other.late_s() for _ in draws]
    most_s = max(limit for _, limit in LATENESS)
    assert all(0.0 <= each <= most_s for each in draws)
    at_once = sum(each == 0.0 for each in draws) / len(draws)
    longest = sum(each > 2e-3 for each in draws) / len(draws)
    assert at_once == pytest.approx(0.70, abs=0.05)  # most are not late: 4 standard deviations are 0.03
    assert longest == pytest.approx(0.05 * 0.8, abs=0.02)  # those of the longest kind beyond the middle one's most
    assert sum(draws) / len(draws) < 1e-3  # 200 seeds stay affordable


def test_a_delay_sleeps_for_what_is_drawn(monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("fuyou.core.races.time.sleep", slept.append)
    races, same = Races(9), Races(9)
    for _ in range(200):
        races.delay()
    assert slept == [late_s for late_s in (same.late_s() for _ in range(200)) if late_s]


def test_threads_draw_each_number_once():
    races, drawn = Races(3), [[] for _ in range(4)]

    def draw(mine: list[float]) -> None:
        mine += [races.late_s() for _ in range(2000)]

    threads = [threading.Thread(target=draw, args=(mine,)) for mine in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = Races(3)
    assert Counter(value for mine in drawn for value in mine) == Counter(alone.late_s() for _ in range(8000))


# --- training -----------------------------------------------------------------------------------------------------


@functools.cache
def plain(precision: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    case = models.CASES["gpt"]
    model = case.model()
    if precision == "bf16":
        loop = models.PlainBf16(model)
        return models.train(model, loop, None, case, clip=True, steps=STEPS), models.values_of(model)
    optimizer = models.optimizer_of(models.groups_of(model))
    return models.train(model, optimizer, None, case, clip=True, steps=STEPS), models.values_of(model)


def wrapped(model: nn.Module, folder: Path | None, **options: object) -> fuyou.Run:
    """With a folder: in as little host memory as works, so that nearly everything is on the drive."""
    optimizer = models.optimizer_of(models.groups_of(model))
    config = fuyou.Config(**options)
    if folder is None:
        return fuyou.wrap(model, optimizer, ram="256MiB", gpu="1GiB", device="cpu", config=config)
    with pytest.raises(BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme=folder, ram=1, gpu="1GiB", device="cpu", config=config)
    ram = refused.value.needed_bytes
    return fuyou.wrap(model, optimizer, nvme=folder, ram=ram, gpu="1GiB", device="cpu", config=config)


PLACES = ("io_uring", "threads", "ram")  # all on NVMe, through that engine; or nothing there
WAYS = [*itertools.product(PLACES, ("keep", "recompute"), ("fp32", "bf16"))]
SHORT = [way for way in WAYS if way[2] == "fp32"] + [("io_uring", "recompute", "bf16"), ("ram", "keep", "bf16")]


@pytest.mark.parametrize(
    ("place", "activations", "precision", "seed"),
    [(*way, seed) for seed, way in enumerate(SHORT)]
    + [pytest.param(*WAYS[seed % len(WAYS)], seed, marks=pytest.mark.slow) for seed in range(len(SHORT), 200)],
)
def test_training_keeps_its_bits(place, activations, precision, seed, nvme):
    seen, expected = plain(precision)
    case = models.CASES["gpt"]
    model = case.model()
    options = {"activations": activations, "precision": precision, "debug_races": seed}
    if place != "ram":
        open_or_skip(place).close()
        options["io"] = place
    with wrapped(model, None if place == "ram" else nvme, **options) as run:
        assert models.train(model, run.optimizer, None, case, clip=True, steps=STEPS) == seen
        assert any(f"debug_races={seed}" in note for note in run.report().dict()["notes"])
        if place != "ram":
            assert run.report().dict()["engine"]["io"] == place
        assert models.differing(model, expected) == []
    assert models.differing(model, expected) == []  # given back by close()
    assert not any(thread.name.startswith("fuyou-") for thread in threading.enumerate())


def test_a_run_delays_its_threads_and_poisons_its_memory(nvme, monkeypatch):
    delayed: set[str] = set()
    monkeypatch.setattr(Races, "delay", lambda self: delayed.add(threading.current_thread().name.rstrip("0123456789")))
    case = models.CASES["gpt"]
    model = case.model()
    with wrapped(model, nvme, debug_races=0) as run:
        models.train(model, run.optimizer, None, case, clip=False, steps=range(1))
        assert delayed >= {"fuyou-weights-in", "fuyou-io-late-"}
        tiers = run._tiers
        assert (
            {tiers.races, tiers.link.races, run._movers.swapper._loader._races, run._updates._races}
            == {tiers.races}
            != {None}
        )
        run.settle()
        lease = run._tiers.arena.try_lease(PAGE, "staging")
        assert lease is not None and is_nan(lease.data)  # nobody has put anything there yet
        lease.release()
        unit = run._units[0]
        model(**case.batch(0))
        assert not bool(unit.flat.isnan().any())
        run._movers.swapper.drop_all()
        assert is_nan(unit.memory.tensor)


def test_off_there_is_nothing_to_call(nvme, monkeypatch):
    def called(*_: object) -> None:
        raise AssertionError("The switch is off.")

    for name in ("__init__", "delay", "late_s", "fill", "check"):
        monkeypatch.setattr(Races, name, called)
    seen, expected = plain("fp32")
    case = models.CASES["gpt"]
    model = case.model()
    with wrapped(model, nvme) as run:
        assert models.train(model, run.optimizer, None, case, clip=True, steps=STEPS) == seen
        assert run._tiers.races is None and run._tiers.link.races is None
        assert not isinstance(run._tiers.engine, LateEngine)
    assert models.differing(model, expected) == []


# --- poison -------------------------------------------------------------------------------------------------------


class Pending:
    """A ticket that is done when the test says so."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def done(self) -> bool:
        return self.ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        assert self.ended.wait(LONG_S)


class TestHost:
    def test_a_lease_is_nan_before_it_is_written_and_after_it_is_released(self):
        arena = Arena(MIB, book(), races=Races(0))
        lease, neighbour = arena.lease(3 * PAGE - 100, "staging"), arena.lease(PAGE, "staging")
        assert is_nan(lease.data)
        lease.data.fill_(5)
        neighbour.data.fill_(6)
        stale = lease.data
        lease.release()
        assert is_nan(stale) and bool((neighbour.data == 6).all())
        again = arena.lease(2 * PAGE, "weights")  # the same bytes, to somebody else
        assert again.offset == lease.offset and is_nan(again.data)
        for each in (again, neighbour):
            each.release()
        assert is_nan(arena.bytes)
        arena.close()

    def test_bytes_that_an_operation_still_moves_are_left_alone_until_it_has_ended(self):
        arena, moving = Arena(MIB, book(), races=Races(0)), Pending()
        lease = arena.lease(MIB, "staging")
        stale = lease.data.fill_(5)
        lease.release_after([moving])
        assert arena.try_lease(PAGE, "staging") is None and bool((stale == 5).all())
        moving.ended.set()
        assert arena.lease_count == 0
        assert is_nan(stale)
        arena.close()

    @pytest.mark.parametrize("at", [0, 8191])
    def test_what_is_written_to_released_bytes_is_told_to_the_next_holder(self, at):
        arena = Arena(MIB, book(), races=Races(4))
        lease = arena.lease(2 * PAGE, "staging")
        stale = lease.data
        lease.release()
        stale[at] = 0
        with pytest.raises(
            StateError, match=rf"debug_races=4: host memory for weights .* 1 of its 8192 .*first at {at}\b"
        ):
            arena.lease(2 * PAGE, "weights")
        arena.close()

    def test_an_arena_that_is_closed_is_not_touched_any_more(self):
        arena = Arena(MIB, book(), races=Races(0))
        lease = arena.lease(PAGE, "staging")
        arena.close()
        lease.release()
        assert not bool(lease.data.any())  # its pages went back to the system, and nothing has brought one back

    def test_off_the_bytes_stay_as_they_are(self):
        arena = Arena(MIB, book())
        lease = arena.lease(PAGE, "staging")
        stale = lease.data.fill_(5)
        lease.release()
        assert bool((stale == 5).all()) and bool((arena.lease(PAGE, "staging").data == 5).all())
        arena.close()


class TestDevice:
    def test_a_slot_is_nan_before_the_copy_and_after_it_was_given_back(self):
        memory = DeviceMemory(3 * PAGE, CPU, Races(0))
        memory.start()
        for _ in range(2):
            memory.take()
            assert is_nan(memory.tensor)
            stale = memory.tensor[100:200].fill_(5)
            memory.give_back()
            assert is_nan(stale)

    def test_a_copy_into_a_slot_that_was_given_back_is_told(self):
        memory = DeviceMemory(3 * PAGE, CPU, Races(0))
        memory.start()
        memory.take()
        memory.give_back()
        memory.tensor[PAGE] = 1
        with pytest.raises(StateError, match=rf"a slot of {3 * PAGE} bytes on the device .*the first at {PAGE}\b"):
            memory.take()

    def test_off_the_pages_go_back_to_the_system(self):
        memory = DeviceMemory(3 * PAGE, CPU)
        memory.take()
        memory.tensor.fill_(5)
        memory.give_back()
        assert not bool(memory.tensor.any())

    def test_a_copy_in_is_late(self):
        gate = Gate()
        link = Device(CPU, MIB, races=gate)
        source, target = torch.ones(PAGE, dtype=torch.uint8), torch.zeros(PAGE, dtype=torch.uint8)
        copying = threading.Thread(target=link.copy_in, args=(target, source))
        copying.start()
        gate.wait_for_delays()
        assert not bool(target.any())
        gate.open()
        copying.join()
        assert torch.equal(target, source)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
    def test_on_cuda(self):
        class Late(Races):
            def late_s(self) -> float:
                return 0.5

        device = torch.device("cuda")
        link, memory = Device(device, 256 * MIB, races=Late(0)), DeviceMemory(MIB, device, Races(0))
        source = torch.full((MIB,), 5, dtype=torch.uint8).pin_memory()
        back = torch.zeros(MIB, dtype=torch.uint8).pin_memory()
        for _ in range(2):
            memory.take()
            assert is_nan(memory.tensor)
            copied = link.copy_in(memory.tensor, source, link.mark())
            assert not copied.done()
            link.join(copied)
            copied = link.copy_out(back, memory.tensor)
            assert not copied.done()
            copied.wait()
            assert torch.equal(back, source)
            torch.cuda.current_stream().synchronize()
            memory.give_back()
            assert memory.tensor.untyped_storage().nbytes() == 0


def test_a_workers_job_begins_late_and_the_off_switch_lets_it_go():
    gate, seen = Gate(), []
    late, usual = Worker("late", races=gate), Worker("usual")
    usual.submit(lambda: seen.append("usual"), "a job").wait(LONG_S)
    job = late.submit(lambda: seen.append("late"), "a job")
    gate.wait_for_delays()
    assert not job.done() and seen == ["usual"]
    gate.open()
    job.wait(LONG_S)
    assert seen == ["usual", "late"]
    for worker in (late, usual):
        worker.close()


# --- the engine ---------------------------------------------------------------------------------------------------
# test_io.py runs all of the engines' contract on it, too.


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gated(kind: str, nvme: Path) -> Iterator[tuple[Gate, Engine, File]]:
    gate = Gate()
    engine = LateEngine(open_or_skip(kind), gate)
    yield gate, engine, engine.open(nvme / "data")
    gate.open()
    engine.deadline_s = LONG_S
    engine.close()


def pages(number: int, count: int = 1) -> bytes:
    return bytes([number]) * (count * PAGE)


class TestEngine:
    def test_an_operation_begins_late_and_ends_late(self, gated):
        gate, engine, file = gated
        Path(file.path).write_bytes(pages(1))
        source = Memory(PAGE, pages(2))
        ticket = engine.write(file, 0, source.address, PAGE)
        gate.wait_for_delays()  # it is late in beginning
        assert not ticket.done() and Path(file.path).read_bytes() == pages(1)
        assert engine.in_flight() == [f"write {PAGE} bytes at 0 of {file.path}"]
        gate.let()
        gate.wait_for_delays()  # the drive has written, and now it is late in ending
        assert Path(file.path).read_bytes() == pages(2)
        assert not ticket.done() and len(engine.in_flight()) == 1
        gate.let()
        ticket.wait(LONG_S)
        assert ticket.done() and engine.in_flight() == []

    def test_a_flush_ends_behind_the_writes_before_it(self, gated):
        gate, engine, file = gated
        source = Memory(PAGE, pages(2))
        write = engine.write(file, 0, source.address, PAGE)
        gate.wait_for_delays()
        flush = engine.flush(file)
        gate.wait_for_delays()
        with pytest.raises(DeadlineError):
            flush.wait(0.0)
        gate.let(2)  # both begin
        gate.wait_for_delays(2)
        gate.let(2)  # and both may end: the flush not before the write
        flush.wait(LONG_S)
        assert write.done()

    def test_what_does_not_overlap_may_overtake(self, kind, nvme):
        """Or nothing would be random: the first write never ends here, and the second is read back meanwhile."""

        class FirstOnly(Gate):
            drawn = 0

            def delay(self) -> None:
                self.drawn += 1
                if self.drawn == 1:
                    super().delay()

        gate = FirstOnly()
        with LateEngine(open_or_skip(kind), gate) as engine:
            file = engine.open(nvme / "data")
            first, second, back = Memory(PAGE, pages(1)), Memory(PAGE, pages(2)), Memory(PAGE)
            stuck = engine.write(file, 0, first.address, PAGE)
            gate.wait_for_delays()
            engine.write(file, PAGE, second.address, PAGE).wait(LONG_S)
            engine.read(file, PAGE, back.address, PAGE).wait(LONG_S)
            assert back.bytes() == pages(2) and not stuck.done()
            behind = engine.read(file, 0, back.address, PAGE)  # but nothing overtakes what it overlaps
            engine.write(file, PAGE, second.address, PAGE).wait(LONG_S)  # `behind` has had its turn before this one
            assert not behind.done()
            gate.open()
            behind.wait(LONG_S)
            assert back.bytes() == pages(1) and stuck.done()

    def test_200_random_programs_give_the_bytes_of_running_them_in_order(self, kind, nvme):
        room = 12  # pages a program
        with LateEngine(open_or_skip(kind), Races(11)) as engine:
            file = engine.open(nvme / "data")
            zeros = Memory(room * PAGE, bytes(room * PAGE))
            for program in range(60 if kind == "aiofiles" else 200):
                draw = random.Random(program)
                model = bytearray(room * PAGE)
                tickets: list[Ticket] = [engine.write(file, 0, zeros.address, room * PAGE)]
                kept: list[Memory] = []
                reads: list[tuple[Memory, bytes]] = []
                for turn in range(draw.randint(2, 12)):  # nothing is waited for until all have been submitted
                    first = draw.randrange(room)
                    count = draw.randint(1, room - first)
                    at = slice(first * PAGE, (first + count) * PAGE)
                    what = draw.random()
                    if what < 0.1:
                        tickets.append(engine.flush(file))
                        continue
                    memory = Memory(count * PAGE, pages(turn + 1, count) if what < 0.55 else None)
                    kept.append(memory)
                    if what < 0.55:
                        model[at] = memory.bytes()
                        tickets.append(engine.write(file, at.start, memory.address, count * PAGE))
                    else:
                        tickets.append(engine.read(file, at.start, memory.address, count * PAGE))
                        reads.append((memory, bytes(model[at])))
                draw.shuffle(tickets)
                for ticket in tickets:
                    ticket.wait(LONG_S)
                assert all(memory.bytes() == expected for memory, expected in reads), program
                assert Path(file.path).read_bytes() == model, program

    def test_errors_arrive_as_the_inner_engine_tells_them(self, kind, nvme):
        (nvme / "short").write_bytes(pages(1))
        (nvme / "read-only").write_bytes(pages(1))
        memory = Memory(2 * PAGE)
        told = []
        for engine in (open_or_skip(kind), LateEngine(open_or_skip(kind), Races(0))):
            with engine:
                short = engine.open(nvme / "short")
                read_only = engine.open(nvme / "read-only", writable=False)
                read = engine.read(short, 0, memory.address, 2 * PAGE)
                write = engine.write(read_only, 0, memory.address, PAGE)
                for ticket, code in ((read, errno.ENODATA), (write, errno.EBADF), (read, errno.ENODATA)):
                    with pytest.raises(StorageIOError) as caught:
                        ticket.wait(LONG_S)
                    assert caught.value.errno == code
                    told.append(str(caught.value))
        assert told[:3] == told[3:]
        with pytest.raises(StateError, match="closed"):
            engine.read(short, 0, memory.address, PAGE)

    def test_deadlines_hold_and_what_was_in_vain_can_be_tried_again(self, gated):
        gate, engine, file = gated
        source = Memory(PAGE, pages(3))
        ticket = engine.write(file, 0, source.address, PAGE)
        engine.deadline_s = 0.05
        for wait, what in ((ticket.wait, "for write"), (lambda: engine.close_file(file), "to close .*data")):
            with pytest.raises(
                DeadlineError, match=rf"Waited 0.05 s {what}.*1 operations in flight: write {PAGE} bytes at 0"
            ):
                wait()
        assert not file.closed
        with pytest.raises(DeadlineError, match="to close the I/O engine; 1 operations in flight"):
            engine.close()
        gate.open()
        engine.deadline_s = LONG_S
        engine.close()
        ticket.wait()
        assert (Path(file.path).read_bytes(), file.closed) == (pages(3), True)
        assert not any(thread.name.startswith("fuyou-io-late") for thread in threading.enumerate())

    def test_close_waits_for_all_that_is_late(self, kind, nvme):
        sources = [Memory(PAGE, pages(number)) for number in range(64)]
        engine = LateEngine(open_or_skip(kind), Races(5))
        file = engine.open(nvme / "data")
        for number, source in enumerate(sources):
            engine.write(file, number * PAGE, source.address, PAGE)
        engine.close()
        engine.close()
        assert (nvme / "data").read_bytes() == b"".join(source.bytes() for source in sources)
        assert os.listdir(nvme) == ["data"]

    def test_nobody_waits_and_memory_lives_until_the_late_end(self, gated):
        gate, engine, file = gated
        source = Memory(PAGE, pages(4))
        kept = weakref.ref(source)
        ticket = engine.write(file, 0, source.address, PAGE, keep=source)
        del source
        gate.wait_for_delays()
        gate.let()
        gate.wait_for_delays()  # the drive is done with the memory, the ticket is not
        assert kept() is not None
        gate.let()
        ticket.wait(LONG_S)
        assert kept() is None and Path(file.path).read_bytes() == pages(4)
