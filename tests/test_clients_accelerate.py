"""Accelerate, unmodified: prepare moves nothing, and accumulation, clipping, saving and loading are plain PyTorch's."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import clients
import models
import psutil
import pytest
import torch
from clients import Side, llama, with_adapters
from safetensors.torch import load_file

import fuyou

accelerate = pytest.importorskip("accelerate")

Between = Callable[[Any, tuple, Side, int], Any]


@pytest.fixture(autouse=True)
def no_state_of_other_tests() -> Iterator[None]:
    """Accelerate keeps its mixed precision in the process."""
    forget()
    yield
    forget()


def forget() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def accelerator_of(precision: str = "no", **options: Any) -> Any:
    forget()
    return accelerate.Accelerator(cpu=True, mixed_precision=precision, **options)


def loop(
    *,
    precision: str = "no",
    accumulation: int = 2,
    clip: str = "norm",
    rows: int = 16,
    between: Between | None = None,
    **options: Any,
) -> clients.Script:
    """The loop of Accelerate's documentation, two epochs of it; `between` runs after each."""

    def script(side: Side) -> Any:
        accelerator = accelerator_of(precision, gradient_accumulation_steps=accumulation, **options)
        prepared = accelerator.prepare(side.model, side.optimizer, clients.loader(rows), side.scheduler)
        model, optimizer, batches, scheduler = prepared
        seen: list[Any] = []
        for epoch in range(2):
            for index, batch in enumerate(batches):
                torch.manual_seed(100 * epoch + index)
                with accelerator.accumulate(model):
                    loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and clip == "norm":
                        seen.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
                    elif accelerator.sync_gradients and clip == "value":
                        accelerator.clip_grad_value_(model.parameters(), 1e-3)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                seen += [loss.item(), optimizer.step_was_skipped, optimizer.param_groups[0]["lr"]]
            if between is not None:
                seen.append(between(accelerator, prepared, side, epoch))
        return seen

    return script


WAYS: dict[str, dict[str, Any]] = {
    "accumulated and clipped": {},
    "every batch a step": {"accumulation": 1},
    "a last step of one batch": {"accumulation": 3, "rows": 14},
    "clipped by value": {"clip": "value"},
    "not clipped": {"clip": "none"},
    "bf16 autocast": {"precision": "bf16"},
    "a scheduler that steps by itself": {"step_scheduler_with_optimizer": False},
}


@pytest.mark.parametrize(
    "way",
    clients.slow_but(
        ("accumulated and clipped", "a last step of one batch", "clipped by value", "bf16 autocast"), WAYS
    ),
)
def test_the_documented_loop(way, tmp_path, nvme):
    clients.compare(loop(**WAYS[way]), llama, tmp_path, nvme)


def test_the_documented_loop_with_adapters(tmp_path, nvme):
    clients.compare(loop(), with_adapters, tmp_path, nvme, ram="240KiB")


def test_no_sync_by_hand(tmp_path, nvme):
    def script(side: Side) -> Any:
        accelerator = accelerator_of()
        model, optimizer, batches = accelerator.prepare(side.model, side.optimizer, clients.loader())
        seen = []
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            with accelerator.no_sync(model):
                loss = model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
                accelerator.backward(loss)
            seen.append(loss.item())
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        return seen

    clients.compare(script, llama, tmp_path, nvme)


def test_state_is_saved_and_loaded(tmp_path, nvme):
    """The second epoch ends with the state of the first one: both sides go back to it."""

    def between(accelerator: Any, prepared: tuple, side: Side, epoch: int) -> Any:
        if epoch == 0:
            accelerator.save_state(str(side.folder))
            return [sorted(os.listdir(side.folder)), torch.load(side.folder / "optimizer.bin", weights_only=False),
                    sorted(load_file(side.folder / "model.safetensors").items())]  # fmt: skip
        accelerator.load_state(str(side.folder))
        return [each.detach().clone() for each in prepared[0].parameters()]

    def script(side: Side) -> Any:
        return [loop(between=between)(side), loop()(side)]  # and training goes on from there

    clients.compare(script, lambda: llama(tie_word_embeddings=False), tmp_path, nvme)


def test_unwrapped_and_exported(tmp_path, nvme):
    def between(accelerator: Any, prepared: tuple, side: Side, epoch: int) -> Any:
        whole = accelerator.unwrap_model(prepared[0])
        assert whole is side.model
        state = accelerator.get_state_dict(prepared[0])
        whole.save_pretrained(side.folder, state_dict=state, save_function=accelerator.save)
        return sorted(load_file(side.folder / "model.safetensors").items())

    clients.compare(loop(between=between), lambda: llama(tie_word_embeddings=False), tmp_path, nvme)


# --- prepare moves nothing ------------------------------------------------------------------------------------------


def wide() -> torch.nn.Module:
    """36 MiB of weights."""
    return llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=2)


@pytest.mark.parametrize("place", ["nvme", "ram"])
def test_prepare_moves_nothing(place, nvme):
    model, optimizer, scheduler = clients.started(wide)
    weights = sum(each.numel() * 4 for each in model.parameters())
    folder, budget = (nvme, {"ram": "24MiB"}) if place == "nvme" else (None, {"ram": "256MiB"})
    with clients.wrapped(model, optimizer, folder, **budget) as run:
        accelerator = accelerator_of("bf16")
        parameters, classes = list(model.parameters()), [type(each) for each in model.modules()]
        before, io_before = run.report().dict()["tiers"], psutil.Process().io_counters()
        gc.collect()
        resident = psutil.Process().memory_info().rss
        prepared, stepping, _ = accelerator.prepare(model, run.optimizer, scheduler)
        grown = psutil.Process().memory_info().rss - resident
        assert prepared is model and stepping.optimizer is run.optimizer
        assert [id(each) for each in prepared.parameters()] == [id(each) for each in parameters]
        assert [type(each) for each in prepared.modules()] == classes
        assert run.report().dict()["tiers"] == before
        assert grown < weights / 4, f"prepare took {grown} bytes for {weights} bytes of weights"
        io = psutil.Process().io_counters()
        assert io.read_bytes - io_before.read_bytes < weights / 4
        assert io.write_bytes - io_before.write_bytes < weights / 4


def test_what_was_prepared_first_is_refused(nvme):
    """Accelerate's optimizer is none of torch's: wrap first, then prepare."""
    model, optimizer, _ = clients.started(llama)
    values = models.values_of(model)
    model, optimizer = accelerator_of().prepare(model, optimizer)
    with pytest.raises(fuyou.ConfigError, match="AcceleratedOptimizer"):
        clients.wrapped(model, optimizer, nvme)
    assert models.differing(model, values) == []
