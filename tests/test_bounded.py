"""One budget a tier: never exceeded, refused with its shortfall where it cannot work, everything back after close."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bounded_job import Model, train

import fuyou
from fuyou.tiers.io.tuning import FILE

JOB = Path(__file__).with_name("bounded_job.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((8192, 768, 12), id="deep"),
        pytest.param((32000, 640, 12), id="wide vocabulary", marks=pytest.mark.slow),
    ],
)
def test_100m_parameters_stay_within_the_budgets(tmp_path, shape):
    job = subprocess.run(
        [sys.executable, str(JOB), str(tmp_path), *map(str, shape), "5"], capture_output=True, text=True, timeout=580
    )
    assert job.returncode == 0, job.stderr
    seen = json.loads(job.stdout.splitlines()[-1])
    assert seen["parameters"] > 95e6
    assert seen["peak_bytes"] <= seen["limit_bytes"], {
        "over base": seen["peak_bytes"] - seen["baseline_bytes"],
        "allowed": seen["limit_bytes"] - seen["baseline_bytes"],
    }
    assert len(set(seen["losses"])) == 10  # it did train: no two losses of different weights and data are equal
    for tier in ("device", "host", "nvme"):
        assert 0 < seen["tiers"][tier]["peak_bytes"] <= seen["tiers"][tier]["budget_bytes"]
    assert set(seen["held_after_close"].values()) == {0}
    assert seen["leases_after_close"] == 0
    assert seen["files"][0] == seen["files"][1]
    assert seen["threads"][0] == seen["threads"][1]
    assert sorted(seen["left_in_nvme"]) == [FILE, "fuyou-store"]  # what was measured of the drive; the last step


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(512, 128, 3, 4)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def attempt(nvme, ram: int, gpu: int) -> fuyou.BudgetError | None:
    """One step with accumulation and clipping under these budgets: None when it works."""
    model, optimizer = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        run = fuyou.wrap(model, optimizer, nvme=nvme, ram=ram, gpu=gpu, device="cpu")
    except fuyou.BudgetError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        return error
    with run:
        try:
            train(model, run.optimizer, 512, 1)
        except fuyou.BudgetError as error:
            return error
    return None


@pytest.mark.parametrize("tier", ["host", "device"])
def test_half_of_the_smallest_budget_is_refused_and_its_shortfall_cures_it(tmp_path, tier):
    ample = 512 * 2**20

    def works(budget: int) -> fuyou.BudgetError | None:
        return attempt(tmp_path, budget, ample) if tier == "host" else attempt(tmp_path, ample, budget)

    low, high = 0, ample  # `high` works, `low` does not
    while high - low > max(high // 64, 4096):
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) is None else (middle, high)
    half = high // 2
    refusal = works(half)
    assert refusal is not None
    assert refusal.tier == tier
    assert refusal.shortfall_bytes == refusal.needed_bytes - half > 0
    assert str(refusal.shortfall_bytes) in str(refusal)
    assert works(half + refusal.shortfall_bytes) is None


def test_what_the_batch_needs_is_refused_before_any_update(tmp_path):
    model, optimizer = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with fuyou.wrap(model, optimizer, nvme=tmp_path, ram="64MiB", gpu="80MiB", device="cpu") as run:
        with pytest.raises(fuyou.BudgetError, match="gpu=80.00 MiB is .* short") as refusal:
            model(torch.randint(0, 512, (64, 512))).backward()
        assert refusal.value.tier == "device"
        assert run._movers.clock.count == 0
        losses = train(model, run.optimizer, 512, 1)  # a batch that fits goes on in the same run
        assert len(losses) == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_everything_in_host_memory_is_refused_with_its_shortfall():
    model, optimizer = small()
    with pytest.raises(fuyou.BudgetError) as refusal:
        fuyou.wrap(model, optimizer, ram="1MiB", gpu="512MiB", device="cpu")
    needed = refusal.value.needed_bytes
    with fuyou.wrap(model, optimizer, ram=needed, gpu="512MiB", device="cpu") as run:
        train(model, run.optimizer, 512, 1)


def test_nvme_without_room_is_refused_before_training(tmp_path):
    model, optimizer = small()
    with pytest.raises(fuyou.BudgetError) as refusal:
        fuyou.wrap(model, optimizer, nvme=tmp_path, nvme_limit="1MiB", ram="8MiB", gpu="512MiB", device="cpu")
    assert refusal.value.tier == "nvme"
    assert list(tmp_path.iterdir()) == []
    limit = refusal.value.needed_bytes
    with fuyou.wrap(model, optimizer, nvme=tmp_path, nvme_limit=limit, ram="8MiB", gpu="512MiB", device="cpu") as run:
        train(model, run.optimizer, 512, 1)
