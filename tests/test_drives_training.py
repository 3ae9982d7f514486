"""Training on several drives: the bits of plain PyTorch, within each drive's room, and a drive that fails is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import mounts
import pytest
import sides
import torch
from fault_tools import assert_empty, without_frames
from jobs import SETTINGS, make_inputs, write_job
from sides import Side
from test_loop_freezing import freeze_all_but_the_head, gradual
from torch import nn

import fuyou
from fuyou.cli import main
from fuyou.tiers import shares
from fuyou.tiers.folders import rooms_of
from fuyou.tiers.io.tuning import default_tuning, remember

MIB = 1 << 20


@pytest.fixture
def every_extent_is_cut(monkeypatch):
    """However small the model, its extents are striped as those of a large one are."""
    monkeypatch.setattr(shares, "PART_BYTES", 4096)


def wrapped(folders: list[Path], **options: Any) -> tuple[nn.Module, fuyou.Run]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    config = fuyou.Config(durability="checkpoint")  # so that every byte on the drives is an extent's
    options = {"ram": "300KiB", "gpu": "256MiB", "device": "cpu", "config": config, **options}
    return model, fuyou.wrap(model, optimizer, nvme=folders, **options)


def step(model: nn.Module, run: fuyou.Run) -> None:
    model(torch.ones(2, 64)).sum().backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def nothing_is_left(*folders: Path) -> bool:
    links = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    paths = [os.readlink(link) for link in links if os.path.islink(link)]
    return not any(list(each.iterdir()) or any(path.startswith(f"{each}/") for path in paths) for each in folders)


class TestBits:
    @pytest.mark.parametrize("script", [lambda side: side.steps(3), gradual], ids=["training", "unfreezing"])
    def test_three_drives_of_which_one_is_nearly_full(self, tmp_path, monkeypatch, every_extent_is_cut, script):
        """What is unfrozen on the way gets its homes while the files are open: they grow, each within its room."""
        with mounts.drives(tmp_path, one=8 * MIB, two=24 * MIB, small=8 * MIB) as places:
            mounts.fill(places[2], leave_bytes=200_000)
            seen = []
            summary = fuyou.tiers.store.Store.summary

            def look(side: Side) -> Any:
                result = script(side)
                if isinstance(side.optimizer, fuyou.runtime.optimizer.Optimizer):
                    [run] = [each for each in RUNS if each.model is side.model]
                    seen.append(summary(run._tiers.store))
                return result

            RUNS = spy_on_runs(monkeypatch)
            prepare = freeze_all_but_the_head if script is gradual else None
            options = {"nvme": places, "ram": "640KiB", "activations": "recompute"}
            sides.compare_on(options, places[0], look, prepare=prepare)
            [(one, two, small)] = seen
            assert 0 < small["held_bytes"] <= 200_000 < one["held_bytes"]
            assert one["held_bytes"] == pytest.approx(two["held_bytes"], rel=0.1)
            assert min(each[f"{kind}_bytes"] for each in (one, two, small) for kind in ("read", "write")) > 0

    def test_optimizer_state_in_large_extents(self, tmp_path):
        """State large enough to be cut as it is; weights and gradients are not, and lie whole on one drive or the other."""

        def model() -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))

        def train(module: nn.Module, optimizer: Any) -> list[float]:
            losses = []
            for number in range(3):
                loss = module(torch.full((2, 1024), 0.01 * number)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        oracle = model()
        expected = train(oracle, torch.optim.AdamW(oracle.parameters(), lr=1e-3, fused=True))
        with mounts.drives(tmp_path, one=160 * MIB, two=160 * MIB) as places:
            mine = model()
            optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-3, fused=True)
            config = fuyou.Config(durability="checkpoint")
            with fuyou.wrap(
                mine, optimizer, nvme=places, ram="88MiB", gpu="256MiB", device="cpu", config=config
            ) as run:
                assert train(mine, run.optimizer) == expected
                report = run.report().dict()
                drives = report["drives"]
                assert [each["folder"] for each in drives] == [str(each) for each in places]
                assert drives[0]["held_bytes"] > 8 * MIB
                for name in ("held_bytes", "read_bytes", "write_bytes"):
                    assert drives[0][name] == pytest.approx(drives[1][name], abs=0.1 * drives[0][name])
                assert sum(each["read_bytes"] for each in drives) == run._tiers.traffic()["nvme_read_bytes"]
                table = run.report().table()
                assert all(f"{place} holds" in table for place in places)
                held = sum(each["held_bytes"] for each in drives)
                assert held == sum(report["tiers"]["nvme"]["by_category"].values())
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), oracle.parameters(), strict=True))
            assert nothing_is_left(*places)


def spy_on_runs(monkeypatch: pytest.MonkeyPatch) -> list[fuyou.Run]:
    """The runs that are made from here on."""
    made: list[fuyou.Run] = []
    wrap = fuyou.wrap
    monkeypatch.setattr(fuyou, "wrap", lambda *a, **k: made.append(wrap(*a, **k)) or made[-1])
    return made


class TestRefusals:
    def test_too_little_room_on_all_drives_together(self, tmp_path):
        with mounts.drives(tmp_path, one=2 * MIB, two=2 * MIB) as places:
            [mounts.fill(place, leave_bytes=100_000) for place in places]
            [(place / "blocker").rename(tmp_path / place.name / "kept") for place in places]
            with pytest.raises(fuyou.BudgetError) as refusal:
                wrapped(places)
            room = rooms_of([str(each) for each in places], reuse=True).total_bytes
            assert (refusal.value.tier, refusal.value.given_bytes) == ("nvme", room)
            assert all(f"in {place}" in str(refusal.value) for place in places)
            assert [[each.name for each in place.iterdir()] for place in places] == [["kept"], ["kept"]]
            assert threads() == []

    def test_the_limit_is_for_all_drives_together(self, nvme):
        folders = [nvme / "one", nvme / "two"]
        [folder.mkdir() for folder in folders]
        with pytest.raises(fuyou.BudgetError) as refusal:
            wrapped(folders, nvme_limit="1KiB")
        needed = refusal.value.needed_bytes
        with pytest.raises(fuyou.BudgetError) as refusal:
            wrapped(folders, nvme_limit=needed - 4096)
        assert refusal.value.shortfall_bytes == 4096
        with pytest.warns(UserWarning, match="are on one file system: they share its room and its speed"):
            model, run = wrapped(folders, nvme_limit=needed)
        with run:
            step(model, run)
            assert sum(each["held_bytes"] for each in run.report().dict()["drives"]) == needed
            assert any("are on one file system" in note for note in run.report().dict()["notes"])
        assert nothing_is_left(*folders)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fuyou")]


class TestFaults:
    def test_a_drive_that_goes_away_while_training_is_named_and_the_rest_is_given_back(
        self, tmp_path, every_extent_is_cut
    ):
        with mounts.drives(tmp_path, stays=8 * MIB, goes=8 * MIB) as (stays, goes):
            model, run = wrapped([stays, goes])
            step(model, run)
            run.settle()
            mounts.shut_down(goes)
            with pytest.raises(fuyou.StorageIOError, match=f"{goes}/fuyou-store/data") as told:
                for _ in range(2):
                    step(model, run)
            without_frames(told.value)  # which hold tensors
            del told
            with pytest.raises(fuyou.FuyouError, match=str(goes)):
                run.close()
            assert nothing_is_left(stays) and threads() == []
            assert_empty(run)
            run.close()

    def test_memory_that_only_one_drive_may_lock_is_said_once(self):
        """As an ordinary user: root may lock what it wants. So in a folder that such a user may enter."""
        with (
            tempfile.TemporaryDirectory(prefix="fuyou-test-", dir="/var/tmp") as folder,
            mounts.drives(Path(folder), one=16 * MIB, two=16 * MIB) as places,
        ):
            os.chmod(folder, 0o755)
            script = """
                import os, resource, sys
                import fuyou
                from test_drives_training import step, wrapped
                def notes():
                    model, run = wrapped(sys.argv[1:], ram="8MiB", config=fuyou.Config(io="io_uring", durability="checkpoint"))
                    with run:
                        step(model, run)
                        return [each for each in run.report().dict()["notes"] if "not registered" in each]
                assert notes() == []  # and all is imported that an ordinary user may not read
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (2 << 20, 2 << 20))
                os.setgid(65534), os.setuid(65534)
                [note] = notes()
                print(sys.argv[1] in note, sys.argv[2] in note)
            """
            for place in places:
                os.chmod(place, 0o777)
            result = in_a_process(script, *map(str, places))
            if "io_uring" in result.stderr and "cannot be had" in result.stderr:
                pytest.skip(result.stderr.splitlines()[-1])
            assert result.stdout == "False True\n", result.stderr


def in_a_process(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(os.path.dirname(fuyou.__file__))])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def measured(folder: Path, bytes_per_s: float) -> None:
    """As if an earlier run had measured the drive, for every engine."""
    for name in ("io_uring", "threads"):
        remember(str(folder), name, replace(default_tuning(name), mixed_bytes_per_s=bytes_per_s))


def test_a_run_stripes_by_the_speeds_that_were_measured(tmp_path, every_extent_is_cut):
    with mounts.drives(tmp_path, fast=16 * MIB, slow=16 * MIB) as (fast, slow):
        measured(fast, 3e9)
        measured(slow, 1e9)
        model, run = wrapped([fast, slow])
        with run:
            for _ in range(3):
                step(model, run)
            first, second = run.report().dict()["drives"]
            assert (first["bytes_per_s"], second["bytes_per_s"]) == (3e9, 1e9)
            for name in ("held_bytes", "read_bytes", "write_bytes"):
                assert first[name] / (first[name] + second[name]) == pytest.approx(0.75, abs=0.03)


def test_a_dry_run_says_what_each_drive_is_to_do(tmp_path, capsys: pytest.CaptureFixture[str]):
    with mounts.drives(tmp_path, one=16 * MIB, two=32 * MIB) as (one, two):
        (tmp_path / "in").mkdir()
        job = write_job(make_inputs(tmp_path / "in"), tmp_path, **(SETTINGS | {"nvme": [str(one), str(two)]}))
        for says in (
            (r"not measured yet, takes 50%", r"not measured yet, takes 50%"),
            (r"iB/s, takes 75%", r"iB/s, takes 25%"),
        ):
            assert main(["train", str(job), "--dry-run"]) == 0
            lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("drive ")]
            for place, line, text in zip((one, two), lines, says, strict=True):
                assert re.search(rf"drive +{place}: room for [\d.]+ MiB, .*{text}", line), line
            measured(one, 3e9)
            measured(two, 1e9)
