"""TRL's trainers, unmodified: losses, entropies, token accuracies and parameters are plain PyTorch's, bit for bit."""

from __future__ import annotations

from typing import Any

import clients
import pytest
import torch
from clients import Side, chats, completions, llama, preferences, texts, tokenizer, with_adapters

import fuyou

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

ADAPTERS = "240KiB"  # of host memory: less than the frozen weights
CLIP = 0.1
UNTIMED = ("runtime", "per_second")


def logs_of(trainer: Any) -> list[dict[str, Any]]:
    """Everything that it logged, but for how long it took."""
    return [
        {key: value for key, value in sorted(each.items()) if not any(word in key for word in UNTIMED)}
        for each in trainer.state.log_history
    ]


def options_of(side: Side, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(side.folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "seed": 7, "max_length": 64, "max_grad_norm": CLIP, **options,
    }  # fmt: skip


def sft(side: Side, rows: list[dict[str, Any]], peft_config: Any = None, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    data = datasets.Dataset.from_list(rows)
    return SFTTrainer(
        model=side.model, args=SFTConfig(**options_of(side, options)), train_dataset=data,
        eval_dataset=data.select(range(4)), processing_class=tokenizer(), optimizers=(side.optimizer, side.scheduler),
        peft_config=peft_config,
    )  # fmt: skip


def fine_tune(rows: list[dict[str, Any]], **options: Any) -> clients.Script:
    def script(side: Side) -> Any:
        trainer = sft(side, rows, **options)
        assert trainer.args.gradient_checkpointing == options.get("gradient_checkpointing", True)  # TRL's default
        trainer.train()
        return logs_of(trainer)

    return script


KINDS = {
    "text": (texts, {}),
    "text, no checkpointing": (texts, {"gradient_checkpointing": False}),
    "text, packed": (texts, {"packing": True}),
    "text, bf16 autocast": (texts, {"bf16": True}),
    "text, evaluated": (texts, {"eval_strategy": "steps", "eval_steps": 1}),
    "conversation, assistant only": (chats, {"assistant_only_loss": True}),
    "completion only": (completions, {"completion_only_loss": True}),
}
MORE_KINDS = {
    "text, packed and cut": (texts, {"packing": True, "packing_strategy": "wrapped"}),
    "text, reentrant": (texts, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "text, selective checkpointing": (texts, {"gradient_checkpointing_kwargs": {"selective": True}}),
    "text, dynamic fine-tuning": (texts, {"loss_type": "dft", "max_grad_norm": 1e-3}),
    "conversation": (chats, {}),
}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_KINDS)])
def test_sft(kind, tmp_path, nvme):
    rows, options = {**KINDS, **MORE_KINDS}[kind]
    seen = clients.compare(fine_tune(rows(), **options), llama, tmp_path, nvme)
    assert {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate"} <= set(seen[0])
    steps = [each for each in seen if "loss" in each]
    assert len(steps) == 3 and all(
        each["grad_norm"] > options.get("max_grad_norm", CLIP) for each in steps
    )  # it does clip


def test_masks_reach_the_loss(tmp_path):
    """What the comparisons above compare differs: assistant-only is another loss than the whole conversation's."""
    whole, _ = clients.plain(fine_tune(chats(), max_steps=1), llama, tmp_path)
    assistant, _ = clients.plain(fine_tune(chats(), max_steps=1, assistant_only_loss=True), llama, tmp_path)
    assert whole[0]["loss"] != assistant[0]["loss"] and whole[0]["num_tokens"] == assistant[0]["num_tokens"]


def test_a_head_of_its_own(tmp_path, nvme):
    """TRL reads `lm_head.weight` and never calls lm_head: in neither pass is that block's forward run."""
    clients.compare(fine_tune(texts()), lambda: llama(tie_word_embeddings=False), tmp_path, nvme)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [texts, chats])
def test_sft_with_adapters(rows, reentrant, tmp_path, nvme):
    options = {"assistant_only_loss": rows is chats, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    clients.compare(fine_tune(rows(), **options), with_adapters, tmp_path, nvme, ram=ADAPTERS)


def test_generate_save_and_train_on(tmp_path, nvme):
    def script(side: Side) -> Any:
        from safetensors.torch import load_file

        trainer = sft(side, texts(), save_strategy="steps", save_steps=2)
        trainer.train()
        side.model.eval()
        told = side.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False)
        saved = sorted(load_file(side.folder / "checkpoint-2" / "model.safetensors").items())
        again = sft(side, chats(), max_steps=5)
        again.train(resume_from_checkpoint=str(side.folder / "checkpoint-2"))
        return [logs_of(trainer), told, saved, logs_of(again)]

    clients.compare(script, lambda: llama(tie_word_embeddings=False), tmp_path, nvme)


def direct_preferences(**options: Any) -> clients.Script:
    def script(side: Side) -> Any:
        from trl import DPOConfig, DPOTrainer

        trainer = DPOTrainer(
            model=side.model, args=DPOConfig(**options_of(side, options)), processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_list(preferences()), optimizers=(side.optimizer, side.scheduler),
        )  # fmt: skip
        trainer.train()
        return logs_of(trainer)

    return script


def test_dpo_with_adapters(tmp_path, nvme):
    """The reference is the same model without its adapters: two forwards of one model in one graph's making."""
    seen = clients.compare(direct_preferences(), with_adapters, tmp_path, nvme, ram=ADAPTERS)
    assert {"rewards/chosen", "rewards/margins"} <= set(seen[0])


@pytest.mark.slow
def test_dpo_in_full_with_the_reference_computed_first(tmp_path, nvme):
    clients.compare(direct_preferences(precompute_ref_log_probs=True), llama, tmp_path, nvme)


def test_the_trainer_goes_on_after_close(nvme, tmp_path):
    """TRL replaces the wrapped model's forward; closing the run takes fuyou's off and leaves TRL's."""
    model, optimizer, scheduler = clients.started(llama)
    with clients.wrapped(model, optimizer, nvme) as run:
        trainer = sft(Side(model, run.optimizer, scheduler, tmp_path, run), texts(), eval_on_start=True)
        trainer.train()
        inside = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == inside


def test_adapters_that_the_trainer_makes_are_refused(nvme, tmp_path):
    """`peft_config=` puts adapters into a model that is wrapped already: its optimizer would train nothing."""
    model, optimizer, scheduler = clients.started(llama)
    with clients.wrapped(model, optimizer, nvme) as run:
        side = Side(model, run.optimizer, scheduler, tmp_path, run)
        with pytest.raises(fuyou.StateError, match="added to the model after fuyou.wrap"):
            sft(side, texts(), peft_config=clients.lora()).train()
