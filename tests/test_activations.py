"""Activations that leave the device: what comes back is what was saved, and no tier holds more than it may.

The oracle is plain PyTorch on the same seeds (tests/models.py). The models are small, so the size from which a storage is
worth moving is set to one byte: everything moves that can.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import fuyou
from fuyou.swap import activations, stash
from fuyou.swap.activations import Placement

GPU = "1GiB"
MODES = {
    "host": Placement("host"),
    "nvme": Placement("nvme"),
    "recompute, inputs on the host": Placement("recompute", "host"),
    "recompute, inputs on NVMe": Placement("recompute", "nvme"),
    "recompute, some results kept": Placement("recompute", results=((0, "device"), (3, "device"))),
    "recompute, inputs and results on three tiers": Placement(
        "recompute", "host", ((0, "nvme"), (1, "host"), (3, "nvme"), (4, "device"))
    ),
}


@pytest.fixture(autouse=True)
def _everything_moves(monkeypatch):
    monkeypatch.setattr(stash, "SMALLEST_BYTES", 1)


@contextlib.contextmanager
def placed(placement: Placement, monkeypatch) -> Any:
    """A config whose blocks all have this placement, whether the public names have it or not."""
    name = "nvme" if "nvme" in (placement.saved, placement.inputs) else "host"  # the tiers that are planned for
    monkeypatch.setitem(activations.PLACEMENTS, name, placement)
    yield name


def oracle(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    seen = models.train(model, optimizer, models.schedule_of(optimizer), case, clip=True)
    return seen, models.values_of(model)


def check_equal(
    name: str, mode: str, nvme: Path | None, monkeypatch, ram: str = "4MiB", **options: Any
) -> fuyou.Report:
    seen, expected = oracle(name)
    case = models.CASES[name]
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    with placed(MODES[mode], monkeypatch) as public:
        config = fuyou.Config(activations=public, **options)
        with fuyou.wrap(model, optimizer, nvme, ram=ram, gpu=GPU, device="cpu", config=config) as run:
            assert models.train(model, run.optimizer, scheduler, case, clip=True) == seen
            report = run.report()
            assert models.differing(model, expected) == []
            assert run._ledger.held("device", "activations") == 0
            assert run._ledger.held("host", "activations") == 0
    return report


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in models.CASES if name != "wide"])
def test_equal_to_plain_pytorch(name, mode, nvme, monkeypatch):
    report = check_equal(name, mode, nvme, monkeypatch).dict()
    tiers = {MODES[mode].saved, MODES[mode].inputs, *(tier for _, tier in MODES[mode].results)} & {"host", "nvme"}
    for tier in tiers:
        assert report["tiers"][tier]["by_category"]["activations"] > 0


@pytest.mark.parametrize("mode", ["host", "recompute, inputs on the host"])
@pytest.mark.parametrize("name", ["gpt", "t5"])
def test_equal_without_a_drive(name, mode, monkeypatch):
    report = check_equal(name, mode, None, monkeypatch, ram="64MiB").dict()
    assert report["tiers"]["host"]["by_category"]["activations"] > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", MODES)
def test_equal_under_random_delays(mode, seed, nvme, monkeypatch):
    check_equal("gpt", mode, nvme, monkeypatch, debug_races=seed)
