"""What else goes on around a training loop: skipped steps, two runs at once, other threads, forked DataLoader workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import models
import psutil
import pytest
import torch
from sides import SIDES, Side, started
from torch import nn
from torch.nn import functional

import fuyou

MIB = 2**20


def test_steps_are_skipped_and_gradients_dropped(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = []
        for number in range(6):
            seen += side.backwards()
            if number % 3 == 0:
                seen += side.finish()
            elif number % 3 == 1:
                side.model.zero_grad() if number == 1 else side.optimizer.zero_grad(set_to_none=False)
                side.scheduler.step()
            # else: neither a step nor a zero_grad: it goes on accumulating
        return seen + side.finish()

    compare(script)


def test_a_first_step_that_an_inf_skips_begins_the_state(compare):
    """As torch's fused kernel: zeros at step 0."""

    def script(side: Side) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        seen: list[Any] = []
        for step in range(2):
            scaler.scale(models.loss_of(side.model, side.case.batch(step))).backward()
            if step == 0:
                next(side.model.parameters()).grad.view(-1)[0] = float("inf")
            scaler.step(side.optimizer)
            scaler.update()
            side.optimizer.zero_grad()
            state = [side.optimizer.state[each] for _, each in side.named()]
            seen += [[each[kind].clone() for kind in ("step", "exp_avg", "exp_avg_sq")] for each in state]
        return seen

    compare(script)


def test_two_steps_on_one_gradient(compare):
    def script(side: Side) -> Any:
        seen: list[Any] = side.backwards()
        side.optimizer.step()
        side.optimizer.step()
        return seen + side.finish() + side.steps(1)

    compare(script)


def adversaries() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)),
        nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
    )


def play(made: nn.Module, judge: nn.Module, maker: Any, judging: Any) -> list[float]:
    """A generative adversarial network: one run's backward goes on through the other run's model."""
    seen = []
    for step in range(4):
        torch.manual_seed(step)
        real, noise = torch.randn(12, 16), torch.randn(12, 8)
        judging.zero_grad()
        fake = made(noise)
        loss = functional.softplus(-judge(real)).mean() + functional.softplus(judge(fake.detach())).mean()
        loss.backward()
        judging.step()
        maker.zero_grad()
        fooled = functional.softplus(-judge(fake)).mean()
        fooled.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 0.1)
        maker.step()
        seen += [loss.item(), fooled.item()]
    return seen


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_two_wrapped_models_at_once(tmp_path, activations):
    made, judge = adversaries()
    expected = play(made, judge, models.optimizer_of([{"params": made.parameters()}]),
                    models.optimizer_of([{"params": judge.parameters()}]))  # fmt: skip
    models_ = adversaries()
    optimizers = [models.optimizer_of([{"params": each.parameters()}]) for each in models_]
    options = {"ram": "320KiB", "gpu": "256MiB", "device": "cpu", "config": fuyou.Config(activations=activations)}
    folders = [tmp_path / "made", tmp_path / "judge"]
    for each in folders:
        each.mkdir()
    with (
        fuyou.wrap(models_[0], optimizers[0], folders[0], **options) as first,
        fuyou.wrap(models_[1], optimizers[1], folders[1], **options) as second,
    ):
        assert play(*models_, first.optimizer, second.optimizer) == expected
    for plain, ours in zip((made, judge), models_, strict=True):
        assert models.differing(ours, models.values_of(plain)) == []


@pytest.mark.parametrize("place", SIDES)
def test_training_from_another_thread(place, nvme):
    case, oracle, optimizer, scheduler = started("gpt")
    expected = Side(case, oracle, optimizer, scheduler).steps(4)
    case, model, optimizer, scheduler = started("gpt")
    options: dict[str, Any] = {"nvme": nvme, **SIDES[place]}
    config = fuyou.Config(activations=options.pop("activations"))
    seen: list[float] = []
    with fuyou.wrap(model, optimizer, **options, gpu="1GiB", device="cpu", config=config) as run:
        side = Side(case, model, run.optimizer, scheduler)
        seen += side.steps(1)  # one step here, two there, the last here again

        def work() -> None:
            seen.extend(side.steps(2))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        seen += side.steps(1)
    assert seen == expected
    assert models.differing(model, models.values_of(oracle)) == []


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(256, generator=torch.Generator().manual_seed(index))


def proportional_bytes(process: psutil.Process) -> int:
    """PSS: memory shared with other processes is counted in parts, so that a sum over processes counts it once."""
    return process.memory_full_info().pss


def growth(step: Callable[[torch.Tensor], Any]) -> tuple[int, int]:
    """(bytes by which this process and two forked workers grow while `step` runs on batches; processes seen at least).

    The first batch is not counted: what a step takes for itself is there then, and the workers' own start.
    """
    parent = psutil.Process()
    loader = torch.utils.data.DataLoader(Rows(), batch_size=16, num_workers=2, persistent_workers=True)
    alone, highest, fewest = proportional_bytes(parent), 0, 99
    for _ in range(4):
        for batch in loader:
            step(batch)
        family = [parent, *parent.children()]
        highest, fewest = max(highest, sum(map(proportional_bytes, family))), min(fewest, len(family))
    return highest - alone, fewest


def test_forked_dataloader_workers_do_not_hold_the_budgets_again(tmp_path):
    """Peak memory over all processes: a worker holds its own heap, and no copy of arena, slots or state."""
    workers, count = growth(torch.sum)  # the interpreter's pages that they write to; no training
    assert count >= 3
    torch.manual_seed(0)
    weights = [nn.Linear(256, 256) for _ in range(64)]
    model = nn.Sequential(*weights, nn.Linear(256, 1))  # 17 MB of weights, 34 MB of state
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with fuyou.wrap(model, optimizer, None, ram="96MiB", gpu="160MiB", device="cpu") as run:

        def step(batch: torch.Tensor) -> None:
            run.model(batch).square().mean().backward()
            run.optimizer.step()  # every page of weights and state is written again while the workers live
            run.optimizer.zero_grad()

        for _ in range(
            6
        ):  # the heap is trimmed in the first ones, and activations are placed: not while workers share it
            step(torch.zeros(16, 256))
        grown, count = growth(step)
        assert count >= 3 and run.report().dict()["tiers"]["host"]["peak_bytes"] > 64 * MIB
        # One worker's copy of the arena alone, as it was before the steps, would be 64 MiB more. What there is, up to 52 on a busy
        # machine, is pages of the heap that the steps write to while the workers share them.
        assert grown - workers < 60 * MIB
