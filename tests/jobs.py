"""Inputs of `fuyou train` for tests: a small Llama with a tokenizer, text at hand, and a job's files."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import math
import subprocess
import tarfile
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from fuyou.train.documents import read_documents, split
from fuyou.train.loss import DeferredHead


def make_inputs(folder: Path) -> Path:
    """m/: a Llama of 2 layers and a byte-level tokenizer; d.txt and d.jsonl: docstrings of the standard library."""
    transformers = pytest.importorskip("transformers", reason="fuyou train reads models through transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="the test trains a tokenizer")
    rows = []
    for owner in (argparse.ArgumentParser, subprocess, subprocess.Popen, tarfile.TarFile, textwrap.TextWrapper, Path):
        for name, member in inspect.getmembers(owner, inspect.isroutine):
            if member.__doc__ and not name.startswith("_"):
                rows.append({"prompt": f"def {name}:\n", "completion": inspect.cleandoc(member.__doc__)})
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "d.txt").write_text(inspect.cleandoc(textwrap.TextWrapper.__doc__) + "\n\n" + tarfile.__doc__)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["completion"] for row in rows], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder / "m")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "m")
    return folder


def write_job(inputs: Path, folder: Path, **settings: object) -> Path:
    """folder/c.yaml, of a job whose output is folder/out."""
    (folder / "nvme").mkdir(parents=True, exist_ok=True)
    values = {
        "model": str(inputs / "m"),
        "data": [str(inputs / "d.jsonl"), str(inputs / "d.txt")],
        "output": str(folder / "out"),
        "nvme": str(folder / "nvme"),
        **settings,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    return folder / "c.yaml"


def metrics_of(folder: Path) -> tuple[list[dict], list[dict]]:
    """(steps, evaluations) of folder/out/metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


SETTINGS = {
    "precision": "fp32",
    "steps": 5,
    "batch_size": 2,
    "accumulation": 2,
    "sequence_length": 48,
    "packing": "stream",
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "warmup_steps": 2,
    "schedule": "cosine",
    "max_grad_norm": 0.5,
    "eval_share": 0.1,
    "eval_every": 2,
    "seed": 5,
}  # five steps, all rows of which a plain loop can count off by hand


class Plain:
    """The same job in plain PyTorch, with its own tokenising, labels, rows and loop.

    loss: "model", the model's own, or "chunked", by fuyou's function (test_loss.py compares the two).
    """

    def __init__(self, inputs: Path, precision: str, max_grad_norm: float, loss: str) -> None:
        import transformers

        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.max_grad_norm = max_grad_norm
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "m")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=self.dtype).train()
        self.head = DeferredHead(self.model, pytest.fail) if loss == "chunked" else None
        documents = read_documents([str(inputs / "d.jsonl"), str(inputs / "d.txt")])
        training, held_out = split(documents, 0.1, 5)
        self.training, self.held_out = self.rows(training), self.rows(held_out)

    def rows(self, documents) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = [], []
        for document in documents:
            prompt = self.tokenizer.encode(document.prompt)
            text = self.tokenizer.encode(document.text) + [self.tokenizer.eos_token_id] * document.ends
            tokens += prompt + text
            labels += [-100] * len(prompt) + text
        tail = -len(tokens) % 48
        tokens = torch.tensor(tokens + [self.tokenizer.eos_token_id] * tail).view(-1, 48)
        labels = torch.tensor(labels + [-100] * tail).view(-1, 48)
        learns = (labels[:, 1:] != -100).any(dim=1)
        return tokens[learns], labels[learns]

    def loss(self, rows, some) -> torch.Tensor:
        with self.head.deferring() if self.head is not None else contextlib.nullcontext():
            return self.model(input_ids=rows[0][some], labels=rows[1][some]).loss

    def evaluate(self) -> float:
        self.model.eval()
        total = count = 0
        for start in range(0, len(self.held_out[0]), 2):
            some = slice(start, start + 2)
            predicted = (self.held_out[1][some, 1:] != -100).sum().item()
            with torch.no_grad():
                total += self.loss(self.held_out, some).item() * predicted
            count += predicted
        self.model.train()
        return total / count

    def train(self) -> tuple[list[tuple], list[float]]:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        masters = parameters if self.dtype == torch.float32 else [p.detach().float() for p in parameters]
        groups = [[p for p in masters if p.ndim >= 2], [p for p in masters if p.ndim < 2]]
        optimizer = torch.optim.AdamW(
            [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
            lr=3e-3,
            betas=(0.9, 0.95),
            fused=True,
        )
        order = torch.randperm(len(self.training[0]), generator=torch.Generator().manual_seed(5)).tolist()
        steps, evaluations = [], [self.evaluate()]
        for step in range(5):
            factor = (0.5, 1.0)[step] if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 3))
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * factor
            losses = []
            for backward in range(2):
                start = 4 * step + 2 * backward
                loss = self.loss(self.training, order[start : start + 2])
                (loss / 2).backward()
                losses.append(loss.item())
            norm = None
            if self.max_grad_norm:
                norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm).item()
            if masters is not parameters:
                for master, parameter in zip(masters, parameters, strict=True):
                    master.grad = parameter.grad.float()
            optimizer.step()
            if masters is not parameters:
                with torch.no_grad():
                    for master, parameter in zip(masters, parameters, strict=True):
                        parameter.copy_(master)
            self.model.zero_grad()
            steps.append((step + 1, sum(losses) / 2, 3e-3 * factor, norm))
            if step in (1, 3, 4):
                evaluations.append(self.evaluate())
        return steps, evaluations
