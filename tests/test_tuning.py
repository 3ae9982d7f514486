"""How an engine is tuned for its drive: measured once on a real file, remembered beside the store, never believed blindly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drive_tools import file_size_limit

from fuyou.core.errors import ConfigError
from fuyou.core.ledger import Ledger
from fuyou.tiers.host import Arena
from fuyou.tiers.io import choose, measure, open_for_drive
from fuyou.tiers.io.tuning import FILE, MIB, Tuning, default_tuning, remember, remembered
from fuyou.tiers.pages import HUGE_BYTES, PAGE_BYTES

GIB = 1 << 30
TUNING = Tuning(16 * MIB, 8, 0, 2.5e9, 1.5e9, 1.75e9)


def ledger() -> Ledger:
    return Ledger({"host": GIB, "device": 0, "nvme": 0})


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(measure.LEAST_MEMORY_BYTES, ledger())
    yield arena
    arena.close()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same measurement, over before a test is slow. Its figures mean nothing, and no test looks at them."""
    monkeypatch.setattr(measure, "PROBE_S", 0.005)
    monkeypatch.setattr(measure, "SCRATCH_BYTES", 8 * measure.OPERATION_BYTES)


class TestRemembering:
    def test_what_was_measured_comes_back_for_its_own_engine(self, tmp_path: Path) -> None:
        other = replace(TUNING, queue_depth=3)
        assert remembered(str(tmp_path), "io_uring") is None
        remember(str(tmp_path), "io_uring", TUNING)
        remember(str(tmp_path), "threads", other)
        assert remembered(str(tmp_path), "io_uring") == TUNING
        assert remembered(str(tmp_path), "threads") == other
        assert os.listdir(tmp_path) == [FILE]

    @pytest.mark.parametrize("key", ["file_system", "kernel"])
    def test_it_is_forgotten_on_another_machine(self, tmp_path: Path, key: str) -> None:
        remember(str(tmp_path), "io_uring", TUNING)
        content = json.loads((tmp_path / FILE).read_text())
        content["machine"][key] = "another"
        (tmp_path / FILE).write_text(json.dumps(content))
        assert remembered(str(tmp_path), "io_uring") is None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("piece_bytes", 0), ("piece_bytes", 5000), ("piece_bytes", 2 * GIB), ("piece_bytes", "4096"), ("piece_bytes", 4096.0),
            ("queue_depth", 0), ("queue_depth", -1), ("queue_depth", 100_000), ("queue_depth", True), ("queue_depth", None),
            ("burst_bytes", -1), ("burst_bytes", 1 << 62), ("read_bytes_per_s", -1.0), ("mixed_bytes_per_s", float("nan")),
            ("write_bytes_per_s", float("inf")), ("write_bytes_per_s", "fast"),
        ],
    )  # fmt: skip
    def test_impossible_values_count_as_nothing(self, tmp_path: Path, field: str, value: object) -> None:
        remember(str(tmp_path), "io_uring", TUNING)
        content = json.loads((tmp_path / FILE).read_text())
        content["tunings"]["io_uring"][field] = value
        (tmp_path / FILE).write_text(json.dumps(content))
        assert remembered(str(tmp_path), "io_uring") is None

    @pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"version": 1}', "\x00" * 100, "[" * 100_000])
    def test_a_file_of_anything_counts_as_nothing_and_is_replaced(self, tmp_path: Path, text: str) -> None:
        (tmp_path / FILE).write_text(text)
        assert remembered(str(tmp_path), "io_uring") is None
        remember(str(tmp_path), "io_uring", TUNING)
        assert remembered(str(tmp_path), "io_uring") == TUNING


@pytest.fixture(params=["io_uring", "threads"])
def kind(request: pytest.FixtureRequest) -> str:
    """A native engine that this machine has."""
    try:
        choose.open_engine(request.param).close()
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)


class TestMeasuring:
    def test_a_drive_is_measured_once(
        self, kind: str, tmp_path: Path, arena: Arena, short: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open_for_drive(kind, str(tmp_path), GIB, arena.address, arena.nbytes) as engine:
            measured = engine.tuning
        assert measured is not None and measured == remembered(str(tmp_path), kind)
        pairs = measure.THREAD_CANDIDATES if kind == "threads" else measure.CANDIDATES
        assert (measured.piece_bytes, measured.queue_depth) in pairs and measured.burst_bytes in measure.BURSTS
        assert min(measured.read_bytes_per_s, measured.write_bytes_per_s, measured.mixed_bytes_per_s) > 0
        assert os.listdir(tmp_path) == [FILE]  # and nothing of the scratch file

        monkeypatch.setattr(choose, "measure", lambda *_: pytest.fail("measured again"))
        with open_for_drive(kind, str(tmp_path), 4096, arena.address, arena.nbytes) as engine:
            assert engine.tuning == measured

    def test_what_is_too_small_to_be_worth_it_gets_the_default(self, kind: str, tmp_path: Path, arena: Arena) -> None:
        for store_bytes, memory_bytes in ((GIB - 1, arena.nbytes), (GIB, arena.nbytes - PAGE_BYTES)):
            with open_for_drive(kind, str(tmp_path), store_bytes, arena.address, memory_bytes) as engine:
                assert engine.tuning == default_tuning(kind)
        assert os.listdir(tmp_path) == []

    def test_a_drive_without_room_for_it_gets_the_default(
        self, kind: str, tmp_path: Path, arena: Arena, short: None
    ) -> None:
        with file_size_limit(measure.SCRATCH_BYTES - 1):
            with open_for_drive(kind, str(tmp_path), GIB, arena.address, arena.nbytes) as engine:
                assert engine.tuning == default_tuning(kind)
        assert os.listdir(tmp_path) == []

    def test_bytes_are_right_whatever_the_tuning(self, kind: str, tmp_path: Path, arena: Arena) -> None:
        content = os.urandom(3 * MIB + 5 * PAGE_BYTES)
        arena.bytes[: len(content)].copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        for number, tuning in enumerate((Tuning(4096, 1, 0), Tuning(GIB, 256, GIB), Tuning(MIB, 2, 1), TUNING)):
            with choose.open_engine(kind, tuning=tuning) as engine:
                assert engine.tuning == tuning
                file = engine.open(tmp_path / str(number))
                engine.write(file, 0, arena.address, len(content)).wait()
                back = arena.bytes[MIB * 8 : MIB * 8 + len(content)].zero_()
                engine.read(file, 0, arena.address + MIB * 8, len(content)).wait()
                assert bytes(back.numpy()) == content
            assert (tmp_path / str(number)).read_bytes() == content


def test_the_better_candidate_is_chosen() -> None:
    candidates = [Tuning(MIB, 64, 0), Tuning(4 * MIB, 16, 0), Tuning(4 * MIB, 32, 0), Tuning(16 * MIB, 8, 0)]
    same = {"read": 2.0, "write": 1.0}
    assert measure._choose(candidates, [same] * 4) == 3  # all alike: the fewest requests
    assert (
        measure._choose(candidates, [same] * 3 + [{"read": 1.5, "write": 1.0}]) == 1
    )  # then the fewest bytes under way
    assert measure._choose(candidates, [{"read": 2.0, "write": 2.0}] + [same] * 3) == 0  # fast both ways beats all else


def test_the_arena_is_on_huge_pages_and_holds_not_a_byte_more() -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("the kernel gives no transparent huge pages")
    nbytes = 17 * HUGE_BYTES - PAGE_BYTES  # the last huge page would be a page too large
    arena = Arena(nbytes, ledger())
    before = resident(arena)
    arena.bytes.fill_(1)
    after = resident(arena)
    assert arena.address % HUGE_BYTES == 0
    assert after["Rss"] - before["Rss"] == nbytes
    if after["AnonHugePages"] == 0:
        pytest.skip("the kernel has no huge page left to give: fragmented memory")
    assert after["AnonHugePages"] <= 16 * HUGE_BYTES
    arena.close()


def resident(arena: Arena) -> dict[str, int]:
    """Bytes that /proc/self/smaps counts in the mappings at both ends of the arena."""
    counts = {"Rss": 0, "AnonHugePages": 0}
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(end, 16) for end in name.split("-"))
            within = first <= arena.address < last or first < arena.address + arena.nbytes <= last
        elif within and name[:-1] in counts:
            counts[name[:-1]] += int(rest[0]) * 1024
    return counts
