"""The unmodified transformers.Trainer: what it logs, writes and leaves is plain PyTorch's, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import clients
import models
import pytest
import torch
from clients import Side

import fuyou

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "step", "epoch")


class Rows(torch.utils.data.Dataset):
    """Rows of the Llama case's batches; of every other row, a part has no label, so micro-batches weigh differently."""

    def __init__(self, count: int = 32) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {name: value[0] for name, value in models.CASES["llama"].batch(index).items()}
        row["labels"][: 7 * (index % 2)] = -100
        return row


def trainer_of(side: Side, rows: int = 32, callbacks: list[Any] | None = None, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**{
        "output_dir": str(side.folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "seed": 7, **options,
    })  # fmt: skip
    return Trainer(
        model=side.model, args=arguments, train_dataset=Rows(rows), eval_dataset=Rows(6), callbacks=callbacks,
        optimizers=(side.optimizer, side.scheduler),
    )  # fmt: skip


def logs_of(trainer: Any) -> list[dict[str, Any]]:
    history = [each for each in trainer.state.log_history if "loss" in each or "eval_loss" in each]
    return [{key: each[key] for key in LOGGED if key in each} for each in history]


def train(**options: Any) -> clients.Script:
    def script(side: Side) -> Any:
        trainer = trainer_of(side, **options)
        trainer.train()
        return logs_of(trainer)

    return script


def compare(script: clients.Script, tmp_path: Path, nvme: Path) -> Any:
    return clients.compare(script, models.CASES["llama"].model, tmp_path, nvme, ram="320KiB")


# --- what it logs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("place", ["nvme", "ram"])
def test_trainer_logs_the_same_losses(place, activations, nvme, tmp_path):
    script = train(max_steps=6)
    expected, values = clients.plain(script, models.CASES["llama"].model, tmp_path / "plain")
    assert len(expected) == 6 and max(each["grad_norm"] for each in expected) > 1.0  # it does clip
    model, optimizer, scheduler = clients.started(models.CASES["llama"].model)
    budgets = {"nvme": nvme, "ram": "320KiB"} if place == "nvme" else {"nvme": None, "ram": "64MiB"}
    with clients.wrapped(model, optimizer, **budgets, config=fuyou.Config(activations=activations)) as run:
        assert script(Side(model, run.optimizer, scheduler, tmp_path / "wrapped", run)) == expected
        assert bool(run.report().dict()["tiers"]["nvme"]["peak_bytes"]) == (place == "nvme")
        assert models.differing(model, values) == []
    assert models.differing(model, values) == []


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16 autocast": {"bf16": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2},
    "a last step of one micro-batch": {"rows": 14, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "no clipping": {"max_grad_norm": 0},
    "two workers": {"dataloader_num_workers": 2},
    "a worker that stays": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "rows": 8, "max_steps": 6},
    "noisy embeddings": {"neftune_noise_alpha": 5},
    "its own batch size": {"auto_find_batch_size": True},
    "losses by micro-batch": {"average_tokens_across_devices": False, "logging_first_step": True, "logging_steps": 3},
}  # fmt: skip


QUICK = ("checkpointing", "reentrant checkpointing", "bf16 autocast", "evaluation", "two workers")


@pytest.mark.parametrize("option", clients.slow_but((*QUICK, "a last step of one micro-batch"), OPTIONS))
def test_options(option, tmp_path, nvme):
    compare(train(**OPTIONS[option]), tmp_path, nvme)


@pytest.mark.slow
def test_torch_compile_around_the_model(tmp_path, nvme):
    compare(train(torch_compile=True, torch_compile_backend="eager"), tmp_path, nvme)


def test_callbacks_that_read_weights_and_gradients(tmp_path, nvme):
    from transformers import TrainerCallback

    class Reader(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seen += [each.grad.abs().max() for each in model.parameters()]

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.seen += [each.detach().clone() for each in model.parameters()]

    def script(side: Side) -> Any:
        reader = Reader()
        trainer = trainer_of(side, callbacks=[reader])
        trainer.train()
        assert len(reader.seen) == 4 * 2 * len(list(side.model.parameters()))
        return [logs_of(trainer), reader.seen]

    compare(script, tmp_path, nvme)


def test_predict_evaluate_and_train_again(tmp_path, nvme):
    def script(side: Side) -> Any:
        trainer = trainer_of(side)
        trainer.train()
        predicted = trainer.predict(Rows(6))
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        return [torch.tensor(predicted.predictions), predicted.metrics["test_loss"], evaluated, logs_of(trainer)]

    compare(script, tmp_path, nvme)


# --- what it writes -------------------------------------------------------------------------------------------------


def contents(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint of the Trainer says, without what names its folder or its time."""
    from safetensors.torch import load_file

    read = {"files": sorted(os.listdir(checkpoint))}
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors":
            read[path.name] = sorted(load_file(path).items())
        elif path.name in ("optimizer.pt", "rng_state.pth"):
            state = torch.load(path, weights_only=False)
            read[path.name] = repr(state["numpy"]) if path.name == "rng_state.pth" else state
        elif path.name in ("config.json", "generation_config.json"):
            read[path.name] = path.read_text()
    return read


def test_checkpoints_say_what_plain_pytorchs_say(tmp_path, nvme):
    def script(side: Side) -> Any:
        trainer = trainer_of(side, save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model(str(side.folder / "end"))
        return [logs_of(trainer), *(contents(side.folder / name) for name in ("checkpoint-2", "checkpoint-4", "end"))]

    _, checkpoint, *_ = compare(script, tmp_path, nvme)
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(checkpoint["files"])


@pytest.mark.parametrize("writer, reader", [("fuyou", "fuyou"), ("plain", "fuyou"), ("fuyou", "plain")])
def test_resumed_training_is_uninterrupted_training(writer, reader, tmp_path, nvme):
    """A checkpoint of either side goes on, on either side, to the bits of training that was never stopped."""
    build = models.CASES["llama"].model

    def on(kind: str, script: clients.Script, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        if kind == "plain":
            return clients.plain(script, build, folder)
        model, optimizer, scheduler = clients.started(build)
        with clients.wrapped(model, optimizer, nvme, ram="320KiB") as run:
            seen = script(Side(model, run.optimizer, scheduler, folder, run))
        return seen, models.values_of(model)

    def resume(side: Side) -> Any:
        shutil.copytree(tmp_path / "writer" / "checkpoint-2", side.folder / "checkpoint-2")
        trainer = trainer_of(side, max_steps=5)
        trainer.train(resume_from_checkpoint=str(side.folder / "checkpoint-2"))
        return logs_of(trainer)

    expected, values = clients.plain(train(max_steps=5), build, tmp_path / "whole")
    on(writer, train(max_steps=2, save_strategy="steps", save_steps=2), tmp_path / "writer")
    logs, found = on(reader, resume, tmp_path / "reader")
    assert logs == expected
    assert all(torch.equal(found[name], values[name]) for name in values)


def test_the_best_model_is_loaded_at_the_end(tmp_path, nvme):
    def script(side: Side) -> Any:
        trainer = trainer_of(
            side, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, save_total_limit=2,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
        )  # fmt: skip
        trainer.train()
        assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"  # the worst, so not the last
        return [logs_of(trainer), trainer.evaluate()["eval_loss"], sorted(os.listdir(side.folder))]

    compare(script, tmp_path, nvme)


# --- what is refused, and what is tied ------------------------------------------------------------------------------


def test_a_trainer_without_the_runs_optimizer_is_refused(tmp_path, nvme):
    """Without `optimizers=`, the Trainer makes an optimizer of its own over the wrapped model's parameters."""
    model, optimizer, _ = clients.started(models.CASES["llama"].model)
    values = models.values_of(model)
    with clients.wrapped(model, optimizer, nvme, ram="320KiB") as run:
        trainer = trainer_of(Side(model, None, None, tmp_path, run))  # type: ignore[arg-type]
        with pytest.raises(fuyou.StateError, match="run.optimizer"):
            trainer.train()
        assert models.differing(model, values) == []


def test_tied_weights_are_written_once(tmp_path, nvme):
    """As from plain PyTorch: a tied head is the embedding's tensor in state_dict(), so a checkpoint holds it once."""

    def script(side: Side) -> Any:
        trainer_of(side, max_steps=2, save_strategy="steps", save_steps=2).train()
        state = side.model.state_dict()
        shared = state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        return [shared, contents(side.folder / "checkpoint-2")]

    shared, _ = clients.compare(script, lambda: clients.llama(vocab_size=200), tmp_path, nvme)
    assert shared


def test_callbacks_that_read_every_weight_leave_none_held(tmp_path, nvme):
    """Held at most: what a run without the callback holds, and the largest weight, however often all are read."""
    from transformers import TrainerCallback

    class Norms(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            assert all(each.detach().norm() > 0 for each in model.parameters())

    def peak(callbacks: list[Any]) -> tuple[int, int]:
        model, optimizer, scheduler = clients.started(models.CASES["llama"].model)
        with clients.wrapped(model, optimizer, nvme, ram="320KiB") as run:
            trainer_of(Side(model, run.optimizer, scheduler, tmp_path, run), callbacks=callbacks).train()
            largest = max(each.numel() * each.itemsize for each in model.parameters())
            weights = run.report().dict()["tiers"]["device"]
            return weights["peak_bytes"] - weights["reserve_bytes"], largest

    without, largest = peak([])
    with_it, _ = peak([Norms(), Norms()])
    assert with_it <= without + 2 * largest
