"""What is left when memory runs out: a report of the moment, and the error as it was."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from control_groups import control_group
from models import Gpt
from torch import nn

import fuyou

LIMITED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
sys.path.insert(0, sys.argv[2])
import fuyou

class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(64, 64)
    def forward(self, x):
        y = self.line(x)
        if greedy:
            torch.empty(1 << 36, dtype=torch.uint8)
        return y

greedy = False
model = nn.Sequential(Greedy(), Greedy())
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
run = fuyou.wrap(model, optimizer, nvme=sys.argv[1], ram="16MiB", gpu="96MiB", device="cpu")
model(torch.randn(2, 64)).sum().backward()
run.optimizer.step()
run.optimizer.zero_grad()
run.settle()
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), resource.RLIM_INFINITY))
greedy = True
try:
    model(torch.randn(2, 64))
except RuntimeError as error:
    print(type(error).__name__, "DefaultCPUAllocator" in str(error))
"""


def content_in(folder: Path) -> dict:
    assert (folder / "post-mortem.html").stat().st_size > 1000
    return json.loads((folder / "post-mortem.json").read_text())


def test_an_address_space_that_ends_leaves_a_post_mortem(nvme: Path) -> None:
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(nvme), tests], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RuntimeError", "True"]
    content = content_in(nvme)
    assert content["error"]["type"] == "RuntimeError" and "DefaultCPUAllocator" in content["error"]["message"]
    assert content["error"]["during"] == "0"  # the block
    assert content["tiers"]["host"]["held_by_category"]["weights"] > 0
    assert content["resident_units"] and "post-mortem.html" in done.stderr


def test_a_budget_that_was_lied_about(nvme: Path) -> None:
    """The batch grows after the first step far beyond what the device's budget was given for."""
    torch.manual_seed(0)
    model = Gpt(width=64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(activations="keep")
    with pytest.warns(UserWarning, match="Memory ran out"), pytest.raises(fuyou.BudgetError) as caught:
        with fuyou.wrap(model, optimizer, nvme=nvme, ram="32MiB", gpu="96MiB", device="cpu", config=config) as run:
            for rows in (1, 512):
                tokens = torch.randint(0, 1237, (rows, 64))
                model(tokens, labels=tokens).backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
    content = content_in(nvme)
    assert content["error"]["type"] == "BudgetError" and content["error"]["message"] == str(caught.value)
    held = content["tiers"]["device"]["held_by_category"]
    assert held["activations"] > 1 << 20  # as it was when it was raised, not after it had been unwound
    assert content["step_count"] == 1 and content["step"]["number"] == 1


KILLED = """
import os, sys
from pathlib import Path
Path(sys.argv[3], "cgroup.procs").write_text(str(os.getpid()))
import torch
sys.path.insert(0, sys.argv[2])
from models import Gpt
import fuyou
model = Gpt()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
run = fuyou.wrap(model, optimizer, nvme=sys.argv[1], ram="16MiB", gpu="2GiB", device="cpu")
run.post_mortem.folder = Path(sys.argv[1]).parent
kept = []
while True:
    tokens = torch.randint(0, 1237, (2, 64))
    model(tokens, labels=tokens).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    kept.append(torch.ones(1 << 19))  # 2 MiB a step
    print(len(kept), flush=True)
"""


def test_a_control_group_that_is_nearly_full_is_told_before_the_kernel_kills(nvme: Path, tmp_path: Path) -> None:
    (nvme / "store").mkdir()
    with control_group("memory", {"memory.max": str(1 << 30)}) as group:  # torch takes half of it
        arguments = [str(nvme / "store"), str(Path(__file__).parent), str(group)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=110)
    assert done.returncode == -signal.SIGKILL, done.stderr
    content = content_in(nvme)
    assert content["error"]["type"] == "MemoryPressure" and str(group) in content["error"]["message"]
    steps = len(done.stdout.split())
    assert steps - 40 < content["step_count"] < steps  # near the limit, not long before
    assert f"The control group {group}" in done.stderr and "post-mortem.html" in done.stderr


class Stumbling(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8)
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Raising.apply(self.line(x), self.error)


class Raising(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


@pytest.mark.parametrize("error", [MemoryError("no more"), torch.OutOfMemoryError("no more"), ValueError("other")])
def test_errors_of_backward_go_on_as_they_are(nvme: Path, error: Exception) -> None:
    model = nn.Sequential(Stumbling(error), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with warnings.catch_warnings(), pytest.raises(type(error)) as caught:
        warnings.simplefilter("ignore")
        with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu") as run:
            run.model(torch.randn(2, 8)).sum().backward()
    assert caught.value is error and "no more" in str(error) or isinstance(error, ValueError)
    assert (nvme / "post-mortem.json").exists() is not isinstance(error, ValueError)
    if not isinstance(error, ValueError):
        assert content_in(nvme)["error"]["during"] == "training"


def test_a_folder_that_takes_nothing_hides_no_error(nvme: Path, tmp_path: Path) -> None:
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu") as run:
        run.post_mortem.folder = tmp_path / "missing"
        error = MemoryError("no more")
        run.post_mortem.notice(error, "a test")
    assert not (tmp_path / "missing").exists() and error.args == ("no more",)
