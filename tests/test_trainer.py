"""The unmodified transformers.Trainer logs the same losses with fuyou as without."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch

import fuyou

pytest.importorskip("accelerate", reason="transformers.Trainer needs it")


class Rows(torch.utils.data.Dataset):
    """Rows of the Llama case's batches."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in models.CASES["llama"].batch(index).items()}


def logs_of(model, optimizer, scheduler, folder: Path, steps: int = 6) -> list[dict]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=7,
    )  # fmt: skip
    assert arguments.max_grad_norm == 1.0
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, scheduler))
    trainer.train()
    kept = ("loss", "grad_norm", "learning_rate", "step", "epoch")
    return [{key: each[key] for key in kept} for each in trainer.state.log_history if "loss" in each]


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("place", ["nvme", "ram"])
def test_trainer_logs_the_same_losses(place, activations, nvme, tmp_path):
    oracle = models.CASES["llama"].model()
    optimizer = models.optimizer_of(models.groups_of(oracle))
    expected = logs_of(oracle, optimizer, models.schedule_of(optimizer), tmp_path / "plain")
    assert len(expected) == 6 and max(each["grad_norm"] for each in expected) > 1.0  # it does clip

    model = models.CASES["llama"].model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    budgets = {"nvme": nvme, "ram": "320KiB"} if place == "nvme" else {"ram": "64MiB"}
    with fuyou.wrap(
        model, optimizer, **budgets, gpu="1GiB", device="cpu", config=fuyou.Config(activations=activations)
    ) as run:
        assert logs_of(model, run.optimizer, scheduler, tmp_path / "wrapped") == expected
        assert bool(run.report().dict()["tiers"]["nvme"]["peak_bytes"]) == (place == "nvme")
        assert models.differing(model, models.values_of(oracle)) == []
    assert models.differing(model, models.values_of(oracle)) == []
