"""activations="auto": what the cost model names, what is tried, what stays; the same bits all the while."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fuyou
from fuyou.plan.activations import Room
from fuyou.plan.candidates import Measured, Operation, candidates, numbers_of, worth_trying
from fuyou.plan.cost import FUYOU_FP32, Choice
from fuyou.plan.machine import Drive, Machine
from fuyou.runtime.placing import Auto, Decided, Plan
from fuyou.runtime.profile import BlockProfile, Profiler, StepProfile, Stopwatch
from fuyou.runtime.remembered import Remembered
from fuyou.swap import stash
from fuyou.swap.placement import Placement

MIB = 1 << 20

# --- the cost model's answers, on numbers --------------------------------------------------------------------------------


def machine(drive: float = 2e9, link: float = 20e9) -> Machine:
    return Machine(
        name="made up", flops_per_s=1.0, device_bytes=1 << 34, host_to_device_bytes_per_s=link,
        device_to_host_bytes_per_s=link, host_bytes=1 << 36, dram_bytes_per_s=50e9, cores=8,
        drives=(Drive(drive, drive, 1 << 40),),
    )  # fmt: skip


def blocks(forward_s: float, count: int = 10, operations: tuple[Operation, ...] = ()) -> list[Measured]:
    """100 MB saved and 10 MB of input each; weights too few to matter."""
    return [
        Measured(index, 1000, 4000, forward_s, 2 * forward_s, forward_s, 100_000_000, 10_000_000, operations)
        for index in range(count)
    ]


def named(forward_s: float, room: Room, drive: float = 2e9, **options: Any) -> list[str]:
    found = candidates(machine(drive), blocks(forward_s, **options), Choice(), room, FUYOU_FP32)
    return [each.name for each in found[: worth_trying([(each.name, each.seconds) for each in found])]]


def test_what_has_room_on_the_device_stays_there():
    assert named(0.01, Room(1_100_000_000)) == ["keep"]
    assert "keep" not in named(0.01, Room(1_099_999_999))


def test_a_swap_that_the_device_cannot_hold_is_no_plan():
    """Recomputing holds 10 inputs and what one block saves, 200 MB, with 20 MB of room beside: 220 MB. Swapping holds what
    two blocks save with their inputs, 220 MB."""
    found = [
        [each.name for each in candidates(machine(), blocks(0.1), Choice(), Room(free, 0, 1 << 40), FUYOU_FP32)]
        for free in (100_000_000 + 9_000_000, 100_000_000 + 21_000_000)
    ]
    assert "nvme" not in found[0] and "nvme" in found[1]


def test_slow_blocks_are_worth_a_swap_and_quick_ones_a_recomputation():
    """1.1 GB out and back at 2 GB/s take 1.1 s. Computing takes 3 s and 1 s more where it is repeated, or a hundredth."""
    room = Room(110_000_000, 0, 1 << 40)
    slow, quick = named(0.1, room), named(0.001, room)
    assert slow[0] in ("nvme", "mixed") and "nvme" in slow
    assert quick[0] in ("recompute", "mixed") and "nvme" not in quick


def test_a_slow_drive_is_left_alone():
    room = Room(110_000_000, 0, 1 << 40)
    assert "nvme" in named(0.1, room, drive=2e9)
    assert "nvme" not in named(0.1, room, drive=0.2e9)  # 11 s


def test_half_of_the_room_keeps_half_of_the_blocks():
    found = candidates(machine(), blocks(0.01), Choice(), Room(100_000_000 + 5 * 110_000_000), FUYOU_FP32)
    mixed = next(each for each in found if each.name == "mixed")
    assert mixed.saved.count("keep") == 5 and mixed.saved.count("recompute") == 5
    assert mixed.saved[-5:] == ("keep",) * 5  # they are needed first


def test_what_is_kept_leaves_room_for_what_is_under_way():
    """Room for 5.9 blocks beside a running one: 5 are kept, since the next to be swapped is there beside the running one."""
    inputs = 10 * 10_000_000
    found = candidates(machine(), blocks(0.1), Choice(), Room(inputs + 590_000_000, 0, 1 << 40), FUYOU_FP32)
    mixed = next(each for each in found if each.name == "mixed")
    assert mixed.saved.count("keep") == 5 and mixed.saved.count("nvme") == 5
    assert mixed.prediction.peak_bytes["device"]["activations"] <= inputs + 100_000_000 + 590_000_000


def test_costly_results_are_saved_before_the_rest():
    """10 MB that spare 9 of 10 ms of a block, and 100 MB that spare the last one: the first has room for all blocks."""
    operation = Operation(3, 10_000_000, 0.009, saved=False)
    found = candidates(
        machine(), blocks(0.01, operations=(operation,)), Choice(), Room(130_000_000, 100_000_000, 0), FUYOU_FP32
    )
    assert found[0].name == "mixed"
    assert found[0].saved == ("recompute",) * 10
    assert all(each == {3: "host"} or each == {3: "device"} for each in found[0].results)


def test_no_room_for_the_inputs_is_no_plan():
    assert candidates(machine(), blocks(0.01), Choice(), Room(1000), FUYOU_FP32) == []


def test_times_of_operations_are_never_more_than_the_recomputation_they_are_part_of():
    operations = (Operation(0, 1, 0.03, True), Operation(1, 1, 0.01, False))
    items = numbers_of(blocks(0.02, operations=operations)[0]).items
    assert [each.recompute_s for each in items] == pytest.approx([0.015, 0.005, 0.0])
    assert items[-1].nbytes == 100_000_000 - 1 + 10_000_000  # the rest, with the input that backward reads


# --- trying --------------------------------------------------------------------------------------------------------------


class Watched(Profiler):
    """One block that saves 100 bytes, whatever runs."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), lambda: 0.0, lambda: 0)

    def read(self) -> StepProfile:
        return StepProfile({0: BlockProfile(saved_bytes=100)}, 1, 1.0, 0, 0)


class Told:
    """Stands for Deciding: the same plans whatever was measured."""

    def __init__(self, plans: list[Plan], room: int) -> None:
        self.plans, self.room = plans, room
        self.settled: list[str] = []
        self.prepared: list[str] = []

    def decide(self, step: StepProfile) -> list[Plan]:
        return list(self.plans)

    def prepare(self, plan: Plan) -> None:
        self.prepared.append(plan.name)

    def device_room(self) -> int:
        return self.room

    def recall(self, size: int) -> Decided | None:
        return None

    def remember(self, size: int, decided: Decided) -> None:
        self.settled.append(decided.plan.name)


def simulated(seconds: dict[str, float], sizes: list[int], room: int = 1 << 40) -> tuple[Auto, list[str], list[str]]:
    """Run `Auto` over steps of `sizes`, each as long as its plan's `seconds`: (it, what each step did, what was settled)."""
    plans = [Plan(name, {0: Placement("keep" if name == "keep" else "nvme")}, 1.0) for name in seconds]
    told = Told(plans, room)
    settled = told.settled
    auto = Auto(told, Watched, Stopwatch(torch.device("cpu")))
    did = []
    for size in sizes:
        auto.begin_forward(size)
        placement, watch = auto.of(0)
        did.append("watch" if watch is not None else placement.saved)
        auto.end_backward()
        auto.end_step(size * (seconds[auto.plan.name] if auto.plan else 1.0))
        assert auto.plan is None or auto.plan.name in told.prepared
    return auto, did, settled


def test_the_fastest_of_what_was_tried_stays(monkeypatch):
    auto, did, settled = simulated({"one": 3.0, "two": 1.0, "three": 2.0}, [10] * 20)
    assert did[:7] == ["recompute"] * 3 + ["watch"] * 3 + ["nvme"]
    assert settled == ["two"] and auto.plan.name == "two" and not auto.trying


def test_one_plan_is_not_tried():
    auto, _, settled = simulated({"keep": 1.0}, [10] * 7)
    assert settled == ["keep"]


def test_a_larger_batch_is_recomputed_and_planned_for_anew():
    _, did, settled = simulated({"keep": 1.0}, [10] * 8 + [20] * 6)
    assert did == ["recompute"] * 3 + ["watch"] * 3 + ["keep"] * 2 + ["recompute"] + ["watch"] * 3 + ["keep"] * 2
    assert settled == ["keep", "keep"]


def test_smaller_batches_are_planned_for_after_a_while():
    _, did, _ = simulated({"keep": 1.0}, [10] * 8 + [4] * 26)
    assert did.count("watch") == 6


def test_steps_of_many_sizes_are_compared_by_what_they_take_an_element():
    auto, _, settled = simulated({"one": 1.0, "two": 1.1}, [10] * 7 + [10, 10, 10, 5, 5, 5, 5, 5, 5])
    assert settled == ["one"]


def test_a_device_without_the_room_now_recomputes():
    _, did, _ = simulated({"keep": 1.0}, [10] * 8, room=150)  # 100 bytes to keep and 100 to run a block
    assert "keep" not in did


# --- in a run --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gpt", "t5", *(pytest.param(each, marks=pytest.mark.slow) for each in ("vit", "mixtral"))]
)
@pytest.mark.parametrize("gpu", ["1GiB", "tight"])
def test_the_same_bits_while_it_watches_tries_and_settles(name, gpu, nvme, monkeypatch):
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)
    case, count = models.CASES[name], 26
    plain = case.model()
    optimizer = models.optimizer_of(models.groups_of(plain))
    seen = models.train(plain, optimizer, models.schedule_of(optimizer), case, clip=True, steps=range(count))
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    budget = gpu if gpu != "tight" else _tight(model, optimizer, nvme)
    with fuyou.wrap(model, optimizer, nvme, ram="272MiB", gpu=budget, device="cpu") as run:
        assert models.train(model, run.optimizer, scheduler, case, clip=True, steps=range(count)) == seen
        assert models.differing(model, models.values_of(plain)) == []
        placing = run._schedule._placing
        assert placing.plan is not None and not placing.trying
        for tier in run.report().dict()["tiers"].values():
            assert tier["peak_bytes"] <= tier["budget_bytes"]


def _tight(model: nn.Module, optimizer: Any, nvme: Any) -> int:
    with pytest.raises(fuyou.BudgetError) as refused:
        fuyou.wrap(model, optimizer, nvme, ram="272MiB", gpu=1, device="cpu")
    return refused.value.needed_bytes + 4 * MIB


def test_all_that_fits_is_kept(nvme):
    model = models.CASES["gpt"].model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme, ram="64MiB", gpu="1GiB", device="cpu") as run:
        for step in range(8):
            models.accumulate(model, models.CASES["gpt"], step)
            run.optimizer.step()
            run.optimizer.zero_grad()
        plan = run._schedule._placing.plan
    assert plan.name == "keep"
    assert {each.saved for each in plan.placements.values()} == {"keep"}


class Wide(nn.Module):
    """Most is on the device when the loss is computed, unless a block saves more."""

    def __init__(self, inner: int, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(256, inner), nn.GELU(), nn.Linear(inner, 256)) for _ in range(4)
        )
        self.head = nn.Linear(256, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return F.cross_entropy(self.head(x), torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.parametrize(
    "inner, outputs",
    [pytest.param(512, 8192, id="wide outputs"), pytest.param(1024, 64, id="wide blocks")],
)
@pytest.mark.slow
def test_expected_peaks_are_those_of_a_run_under_each_mode(inner, outputs, nvme, tmp_path):
    """On the device, within 6 %, temporaries included. A run that may still choose has host memory staged for more."""

    def trained(mode: str, folder: Any, steps: int) -> dict[str, Any]:
        model = Wide(inner, outputs)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        config = fuyou.Config(activations=mode)
        with fuyou.wrap(model, optimizer, folder, ram="512MiB", gpu="1GiB", device="cpu", config=config) as run:
            for _ in range(steps):
                model(torch.randn(4096, 256)).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
            return run.report().dict()

    expected = trained("auto", nvme, 7)["plan"]["considered"]
    for mode in (
        "keep",
        "recompute",
    ):  # what is swapped is there for as long as its copies take: at most what is expected
        (tmp_path / mode).mkdir()
        peak = trained(mode, tmp_path / mode, 3)["tiers"]["device"]["peak_bytes"]
        assert expected[mode]["peak_bytes"]["device"] == pytest.approx(peak, rel=0.06), mode


# --- remembering ---------------------------------------------------------------------------------------------------------


def decided() -> Decided:
    placements = {0: Placement("keep"), 1: Placement("recompute", "nvme", ((2, "host"), (5, "device")))}
    return Decided(Plan("mixed", placements, 1.5, "Words.", {"device": 3000, "nvme": 4000}), {0: 1000, 1: 2000})


def test_what_was_settled_on_is_there_for_the_next_run_of_the_same_key(tmp_path):
    Remembered(str(tmp_path), {"a": 1}).remember(64, decided())
    Remembered(str(tmp_path), {"a": 1}).remember(32, decided())
    again = Remembered(str(tmp_path), {"a": 1})
    assert again.recall(64) == again.recall(32) == decided()
    assert again.recall(63) is None
    assert Remembered(str(tmp_path), {"a": 2}).recall(64) is None
    assert Remembered(None, {"a": 1}).recall(64) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: text.replace('"keep"', '"elsewhere"'),
        lambda text: text.replace('"nvme"', '"../../etc"'),
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace("1000", "-1"),
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"placements"', '"places"'),
        lambda text: text.replace("5,", "-5,"),
    ],
)
def test_a_spoilt_file_is_no_file(spoil, tmp_path):
    remembered = Remembered(str(tmp_path), {"a": 1})
    remembered.remember(64, decided())
    file = tmp_path / "fuyou-plan.json"
    text = file.read_text()
    assert spoil(text) != text
    file.write_text(spoil(text))
    assert remembered.recall(64) is None
    remembered.remember(64, decided())
    assert remembered.recall(64) == decided()


def test_a_folder_that_takes_no_file_is_no_error(tmp_path):
    remembered = Remembered(str(tmp_path / "not there"), {"a": 1})
    remembered.remember(64, decided())
    assert remembered.recall(64) is None


def test_a_remembered_plan_has_the_host_memory_that_it_was_made_with(nvme, monkeypatch):
    """Twice on one folder, once with a plan from before: what goes to the host is there, and not on the drives."""
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)
    case = models.CASES["gpt"]

    def activations_on_host(spoil_decide: bool) -> int:
        model = case.model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        with fuyou.wrap(model, optimizer, nvme, ram="272MiB", gpu="1GiB", device="cpu") as run:
            decider = run._schedule._placing._decider
            if spoil_decide:
                on_host = {index: Placement("host") for index in range(len(run._schedule.blocks))}
                decider.decide = lambda step: [Plan("host", on_host, 1.0)]
            else:
                decider.decide = None  # not asked
            for step in range(8):
                models.accumulate(model, case, step)
                run.optimizer.step()
                run.optimizer.zero_grad()
            assert run.report().dict()["plan"]["name"] == "host"
            return run.report().dict()["tiers"]["host"]["by_category"]["activations"]

    assert activations_on_host(True) > 0
    assert activations_on_host(False) > 0


def test_a_remembered_plan_that_has_no_room_now_is_not_taken(nvme):
    model = models.CASES["gpt"].model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme, ram="64MiB", gpu="1GiB", device="cpu") as run:
        decider, budgets = run._schedule._placing._decider, run._ledger.budgets
        for nbytes, taken in ((budgets["nvme"], True), (budgets["nvme"] + 1, False)):
            decider.remember(10, Decided(Plan("nvme", {0: Placement("nvme")}, 1.0, "", {"nvme": nbytes}), {0: 1}))
            assert (decider.recall(10) is not None) is taken


def test_a_second_run_does_not_watch_again(nvme, monkeypatch):
    case = models.CASES["gpt"]

    def plans(count: int) -> list[Any]:
        model = case.model()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        found = []
        with fuyou.wrap(model, optimizer, nvme, ram="64MiB", gpu="1GiB", device="cpu") as run:
            for step in range(count):
                models.accumulate(model, case, step)
                run.optimizer.step()
                run.optimizer.zero_grad()
                found.append(run.report().dict()["plan"]["settled"])
        return found

    assert plans(8) == [False] * 5 + [True] * 3
    assert plans(4) == [False, False, True, True]
