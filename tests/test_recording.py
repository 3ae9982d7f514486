"""The recorder: rings that stay as large as they are, times of operations, and what is read out of them."""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from models import Gpt

import fuyou
from fuyou.core.ledger import Ledger
from fuyou.core.recorder import LANES, Change, Recorder
from fuyou.report.intervals import clipped, length, merged, without
from fuyou.report.steps import memory_series
from fuyou.runtime.measure import StepClock
from fuyou.tiers.io import open_engine
from fuyou.tiers.pages import Pages

SIZE = 1 << 20


def test_ten_thousand_steps_leave_memory_flat() -> None:
    kept = 500
    recorder = Recorder(kept)
    ledger = Ledger({"device": 1 << 40, "host": 1 << 40, "nvme": 1 << 40}, recorder=recorder)
    clock = StepClock(recorder)

    def steps(count: int) -> None:
        for _ in range(count):
            clock.begin()
            for lane in LANES:
                recorder.span(lane, time.perf_counter(), time.perf_counter(), "an operation", 4096)
            for _ in range(4):
                ledger.charge("device", "activations", 4096)
                ledger.discharge("device", "activations", 4096)
            with clock.stall("weights"):
                recorder.resident(1 << 30)
            clock.end({"nvme_read_bytes": 1 << 30}, {})

    tracemalloc.start()
    steps(1500)  # every ring is full
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    steps(10_000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64 << 10
    for lane in LANES:
        assert len(recorder.spans(lane)) == kept
    assert len(recorder.changes("device")) == kept and clock.count == 11_500


def test_a_recorder_that_is_off_notes_nothing() -> None:
    recorder = Recorder()
    recorder.on = False
    recorder.span("adam", 0.0, 1.0, "adam")
    recorder.step(1, 0.0, 1.0)
    recorder.change("device", "weights", 4096, 4096)
    assert not recorder.resident(1)
    assert recorder.spans("adam") == [] and recorder.steps() == [] and recorder.changes("device") == []


@pytest.mark.parametrize("kind", ["io_uring", "threads", "aiofiles"])
def test_an_operation_is_noted_with_the_time_it_was_at_the_drive(nvme: Path, kind: str) -> None:
    try:
        engine = open_engine(kind)
    except fuyou.ConfigError as error:
        pytest.skip(str(error))
    pages = Pages(SIZE)
    with engine:
        engine.recorder = Recorder()
        file = engine.open(nvme / "file")
        first = time.perf_counter()
        engine.write(file, 0, pages.address, SIZE).wait()
        between = time.perf_counter()
        time.sleep(0.05)  # an operation that ends while nobody looks is not as long as the look is late
        read = engine.read(file, 0, pages.address, SIZE // 2)
        while not read.done():
            pass
        last = time.perf_counter()
        time.sleep(0.05)
        read.wait()
        engine.flush(file).wait()
        (written,), (got,) = engine.recorder.spans("nvme_write"), engine.recorder.spans("nvme_read")
    assert first <= written.began <= written.ended <= between
    assert between <= got.began <= got.ended <= last
    assert (written.nbytes, got.nbytes) == (SIZE, SIZE // 2)


def test_a_run_notes_what_its_steps_do(nvme: Path) -> None:
    torch.manual_seed(0)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, 1237, (2, 16))
    config = fuyou.Config(activations="recompute")
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu", config=config) as run:
        moved = [run.report().dict()["drives"][0][f"{way}_bytes"] for way in ("read", "write")]
        noted = [len(run._tiers.recorder.spans(f"nvme_{way}")) for way in ("read", "write")]
        for _ in range(3):
            model(tokens, labels=tokens).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.settle()
        report, recorder = run.report().dict(), run._tiers.recorder
        run._tiers.engine.flush(run._tiers.store.drives[0].file).wait()  # the engine has settled all before it
        for way, before, skipped in zip(("read", "write"), moved, noted, strict=True):
            spans = recorder.spans(f"nvme_{way}")[skipped:]
            assert sum(each.nbytes for each in spans) == report["drives"][0][f"{way}_bytes"] - before
    step = report["step"]
    assert (
        step["complete"] and 0 < step["seconds"] and [each[0] for each in step["phases"]][:2] == ["forward", "backward"]
    )
    names = [name for _, _, name, _ in step["lanes"]["compute"]]
    for layer in ("layers.0", "layers.1"):
        assert names.count(f"forward {layer}") == 1 and f"backward {layer}" in names
        assert f"recompute {layer}" in [name for _, _, name, _ in step["lanes"]["recompute"]]
    assert step["busy_seconds"]["compute"] <= step["seconds"]
    stalled = [sum(each["stalls"].values()) for each in report["steps"]]
    assert sum(step["stalled_seconds"].values()) == pytest.approx(stalled[step["number"] - 1], abs=1e-6)
    assert sum(report["prefetch"].values()) > 0


def test_intervals_are_what_a_count_of_ticks_says() -> None:
    random.seed(0)
    for _ in range(300):
        sides = [
            [(began, began + random.randint(0, 6)) for began in random.sample(range(30), random.randint(0, 6))]
            for _ in range(2)
        ]
        ticks = [{tick for began, ended in side for tick in range(began, ended)} for side in sides]
        one, other = merged(sides[0]), merged(sides[1])
        assert length(one) == len(ticks[0])
        assert length(without(one, other)) == len(ticks[0] - ticks[1])
        assert length(clipped(one, 5, 20)) == len(ticks[0] & set(range(5, 20)))


def test_memory_through_a_step_is_put_together_from_its_changes() -> None:
    changes = [
        Change(1.0, "weights", 100, 100),
        Change(5.0, "activations", 40, 40),  # the step begins at 4
        Change(5.001, "activations", -40, 0),
        Change(7.0, "weights", -60, 40),
        Change(9.0, "weights", 500, 540),  # after its end at 8
    ]
    series = memory_series(changes, {"weights": 540, "staging": 7}, 4.0, 8.0)
    totals = [sum(held.values()) for _, held in series]
    assert series[0][1]["weights"] == 100 and series[0][1]["staging"] == 7
    assert max(totals) == 147 and totals[-1] == 47
    peak = series[totals.index(147)]
    assert peak[0] == pytest.approx(1.0, abs=4.0 / 160) and peak[1]["activations"] == 40
