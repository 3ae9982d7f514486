"""Lightning's Trainer and Fabric, unmodified: clipping, accumulation and schedules by them, bits by plain PyTorch.

A LightningModule returns `run.optimizer` from configure_optimizers; a scheduler is made from that optimizer, because
Lightning refuses one that belongs to an optimizer it was not given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import clients
import models
import pytest
import torch
from clients import Side, llama, with_adapters

import fuyou

lightning = pytest.importorskip("lightning")


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


class Module(lightning.LightningModule):
    """Logs losses and the gradients as they are before each step."""

    def __init__(self, side: Side) -> None:
        super().__init__()
        self.net = side.model
        self.of_run = [side.optimizer]  # in a list: no attribute of the module that Lightning would look at
        self.seen: list[Any] = []

    def configure_optimizers(self) -> Any:
        scheduler = models.schedule_of(self.of_run[0])
        return {"optimizer": self.of_run[0], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def loss(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        torch.manual_seed(1000 * self.current_epoch + index)  # dropout
        loss = loss_of(self.net, batch)
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        loss = self.loss(batch, index)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.log("validation", self.loss(batch, index))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [each.grad for each in self.parameters() if each.grad is not None]
        self.seen += [(each.norm().item(), each.abs().max().item()) for each in gradients]
        self.seen.append(optimizer.param_groups[0]["lr"])


class Manual(Module):
    """Its own loop: backward, clipping, step and schedule by hand, every other batch."""

    def __init__(self, side: Side) -> None:
        super().__init__(side)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        self.manual_backward(self.loss(batch, index) / 2)
        if index % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        self.untoggle_optimizer(optimizer)


class Closures(Manual):
    """Everything in the closure that `step` calls."""

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        optimizer = self.optimizers()

        def closure() -> torch.Tensor:
            loss = self.loss(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


CLIPPED = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}


def trainer_of(side: Side, **options: Any) -> Any:
    return lightning.Trainer(**{
        "accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(side.folder),
        "num_sanity_val_steps": 0, **options,
    })  # fmt: skip


def fit(kind: Callable[[Side], Module] = Module, **options: Any) -> clients.Script:
    def script(side: Side) -> Any:
        module, trainer = kind(side), trainer_of(side, **options)
        validation = clients.loader(4) if "val_check_interval" in options else None
        trainer.fit(module, clients.loader(), validation)
        return [module.seen, {name: value.item() for name, value in trainer.callback_metrics.items()}]

    return script


WAYS: dict[str, clients.Script] = {
    "clipped and accumulated": fit(**CLIPPED),
    "clipped by value": fit(gradient_clip_val=1e-3, gradient_clip_algorithm="value", accumulate_grad_batches=2),
    "every batch a step": fit(),
    "a last step of one batch": fit(gradient_clip_val=0.5, accumulate_grad_batches=3),
    "validation in the middle": fit(val_check_interval=4, **CLIPPED),
    "with a summary and anomaly detection": fit(enable_model_summary=True, detect_anomaly=True, **CLIPPED),
    "manual optimization": fit(Manual),
    "closures": fit(Closures),
    "bf16 autocast": fit(precision="bf16-mixed", accumulate_grad_batches=2),  # plain refuses to clip with fused=True
}


QUICK = ("clipped and accumulated", "clipped by value", "manual optimization", "closures", "bf16 autocast")


@pytest.mark.parametrize("way", clients.slow_but(QUICK, WAYS))
def test_fit(way, tmp_path, nvme):
    clients.compare(WAYS[way], llama, tmp_path, nvme)


def test_fit_with_adapters(tmp_path, nvme):
    clients.compare(fit(**CLIPPED), with_adapters, tmp_path, nvme, ram="240KiB")


def test_clipping_and_accumulation_are_done(tmp_path):
    """The comparisons above are of runs that differ from each other."""
    runs = [clients.plain(WAYS[way], llama, tmp_path)[1] for way in list(WAYS)[:4]]
    weights = [each["model.embed_tokens.weight"] for each in runs]
    assert not any(torch.equal(a, b) for index, a in enumerate(weights) for b in weights[:index])


def test_checkpoints_are_plain_ones_and_training_goes_on_from_them(tmp_path, nvme):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def script(side: Side) -> Any:
        keep = ModelCheckpoint(dirpath=side.folder, save_top_k=-1, filename="{epoch}")
        first, second = Module(side), Module(side)
        trainer_of(side, enable_checkpointing=True, callbacks=[keep], **CLIPPED).fit(first, clients.loader())
        saved = torch.load(side.folder / "epoch=0.ckpt", weights_only=False)
        ahead = [each.detach().clone() for each in side.model.parameters()]
        trainer_of(side, **CLIPPED).fit(second, clients.loader(), ckpt_path=str(side.folder / "epoch=0.ckpt"))
        assert second.seen == first.seen[len(first.seen) // 2 :]  # back to the first epoch's end, and on
        assert all(map(torch.equal, ahead, side.model.parameters()))
        return [first.seen, saved["state_dict"], saved["optimizer_states"], second.seen]

    clients.compare(script, llama, tmp_path, nvme)


@pytest.mark.parametrize("whole", [pytest.param(False, marks=pytest.mark.slow), True])
def test_wrapped_in_configure_optimizers(whole, tmp_path, nvme):
    """Where Lightning wants the optimizer made: the network is wrapped there, or the LightningModule itself."""

    class Own(Module):
        run: fuyou.Run | None = None

        def configure_optimizers(self) -> Any:
            optimizer = models.optimizer_of(models.groups_of(self))
            if self.of_run[0] is not None:
                self.run = self.of_run[0](self if whole else self.net, optimizer)
                optimizer = self.run.optimizer
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": models.schedule_of(optimizer), "interval": "step"},
            }

    def on(wrap: Any, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
        model, _, _ = clients.started(llama)
        module = Own(Side(model, wrap, None, folder, None))  # type: ignore[arg-type]
        trainer_of(Side(model, None, None, folder, None), **CLIPPED).fit(module, clients.loader())  # type: ignore[arg-type]
        if module.run is not None:
            module.run.close()
        return module.seen, models.values_of(model)

    expected, values = on(None, tmp_path / "plain")
    seen, found = on(lambda model, optimizer: clients.wrapped(model, optimizer, nvme), tmp_path / "fuyou")
    assert seen == expected
    assert all(torch.equal(found[name], values[name]) for name in values)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_fabric(precision, tmp_path, nvme):
    def script(side: Side) -> Any:
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model, optimizer = fabric.setup(side.model, side.optimizer)
        seen: list[Any] = []
        for index, batch in enumerate(fabric.setup_dataloaders(clients.loader())):
            torch.manual_seed(index)
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                loss = loss_of(model, batch)
                fabric.backward(loss)
            seen.append(loss.item())
            if index % 2:
                seen.append(fabric.clip_gradients(model, optimizer, max_norm=0.5).item())
                optimizer.step()
                side.scheduler.step()
                optimizer.zero_grad()
            if index == 3:
                fabric.save(side.folder / "saved", {"model": model, "optimizer": optimizer})
        fabric.load(side.folder / "saved", {"model": model, "optimizer": optimizer})
        fabric.backward(loss_of(model, batch))
        optimizer.step()
        return [seen, torch.load(side.folder / "saved", weights_only=False)]

    clients.compare(script, llama, tmp_path, nvme)


def test_what_is_refused(tmp_path, nvme):
    """A whole-model cast by Lightning, and an optimizer that Fabric has set up already: both before anything is changed."""
    model, optimizer, scheduler = clients.started(llama)
    values = models.values_of(model)
    with clients.wrapped(model, optimizer, nvme) as run:
        side = Side(model, run.optimizer, scheduler, tmp_path, run)
        with pytest.raises(fuyou.StateError, match="dtypes are fixed"):
            fit(precision="bf16-true")(side)
    assert models.differing(model, values) == []
    _, set_up = lightning.Fabric(accelerator="cpu", devices=1).setup(model, optimizer)
    with pytest.raises(fuyou.ConfigError, match="FabricAdamW"):
        clients.wrapped(model, set_up, nvme)
