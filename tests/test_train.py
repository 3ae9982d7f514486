"""Whole jobs of `fuyou train`: equal to a plain PyTorch loop, bit for bit, refused in words, tried dry."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from pathlib import Path

import jobs
import pytest
import sliced
import torch
from jobs import metrics_of
from safetensors.torch import load_file

import fuyou
from fuyou.cli import main
from fuyou.core.errors import BudgetError
from fuyou.core.sizes import format_bytes
from fuyou.train.config import TrainConfig, read_config
from fuyou.train.output import Metrics, opened_output

pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small only make threads wait for one another


# --- a whole job --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return jobs.make_inputs(tmp_path_factory.mktemp("inputs"))


def job(inputs: Path, folder: Path, **settings: object) -> list[str]:
    return ["train", str(jobs.write_job(inputs, folder, **{**jobs.SETTINGS, **settings}))]


@pytest.mark.parametrize(
    ("precision", "max_grad_norm", "loss", "micro_batch"),
    [
        ("fp32", 0.5, "chunked", None),
        ("fp32", 0, "model", 1),
        ("bf16", 0.5, "chunked", None),
        ("bf16", 0.5, "model", None),
    ],
)
def test_a_job_equals_a_plain_loop(inputs, tmp_path, capsys, precision, max_grad_norm, loss, micro_batch):
    import transformers

    settings = {"precision": precision, "max_grad_norm": max_grad_norm, "loss": loss, "micro_batch": micro_batch}
    settings["ram"] = "512KiB"  # so that NVMe is in use
    status = main(job(inputs, tmp_path, **settings))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    plain = jobs.Plain(inputs, precision, max_grad_norm, loss)
    if micro_batch is not None:
        plain.model.config.use_cache = False  # as the job has it: a cache of two rows at once is none for slices
        sliced.slice_blocks(plain.model, micro_batch)
    steps, evaluations = plain.train()

    found_steps, found_evaluations = metrics_of(tmp_path)
    assert [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in found_steps] == steps
    assert [line["eval_loss"] for line in found_evaluations] == evaluations
    assert [line["step"] for line in found_evaluations] == [0, 2, 4, 5]
    assert evaluations[-1] < evaluations[0]
    assert all(line["tokens"] == 192 and line["seconds"] > 0 for line in found_steps)

    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert exported.dtype == plain.dtype
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.encode("def tell:\n") == plain.tokenizer.encode("def tell:\n")

    assert f"{evaluations[0]:.4f} before, {evaluations[-1]:.4f} after 5 steps" in captured.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert 0 < report["tiers"]["host"]["peak_bytes"] <= report["tiers"]["host"]["budget_bytes"] == 512 * 2**10
    assert report["traffic"]["nvme_read_bytes_per_step"] > 0
    assert read_config(tmp_path / "out" / "config.yaml").learning_rate == 3e-3


def test_a_last_step_of_fewer_rows_equals_a_plain_loop(inputs, tmp_path, capsys):
    """1.28 epochs of 7 documents, 4 a step: 9 rows, of which the last step has one, in one backward."""
    import transformers

    texts = [f"Document {number} says {'again ' * number}and ends." for number in range(7)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"data": str(tmp_path / "d.jsonl"), "packing": False, "steps": None, "epochs": 1.28, "loss": "model"}
    settings["warmup_steps"] = 0
    status = main(job(inputs, tmp_path, **settings, eval_share=0, eval_every=None, schedule="constant"))
    assert status == 0, capsys.readouterr().err

    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m", dtype=torch.float32).train()
    groups = [[p for p in model.parameters() if p.ndim >= 2], [p for p in model.parameters() if p.ndim < 2]]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    tokens = [(tokenizer.encode(text) + [tokenizer.eos_token_id])[:48] for text in texts]
    order = [torch.randperm(7, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in range(2)]
    rows = order[0] + order[1][:2]
    expected = []
    for some in ([rows[0:2], rows[2:4]], [rows[4:6], rows[6:8]], [rows[8:9]]):
        losses = []
        for batch in some:
            ids = torch.tensor([tokens[row] + [tokenizer.eos_token_id] * (48 - len(tokens[row])) for row in batch])
            mask = torch.tensor([[1] * len(tokens[row]) + [0] * (48 - len(tokens[row])) for row in batch])
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            (loss / len(some)).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        optimizer.step()
        optimizer.zero_grad()
        count = sum(len(tokens[row]) for batch in some for row in batch)
        expected.append((sum(losses) / len(losses), norm, count))
    assert [(line["loss"], line["grad_norm"], line["tokens"]) for line in metrics_of(tmp_path)[0]] == expected


def test_a_job_without_packing_or_held_out_text(inputs, tmp_path, capsys):
    status = main([*job(inputs, tmp_path, packing=False, eval_share=0), "--set", "eval_every=null", "--set", "steps=1"])
    captured = capsys.readouterr()
    assert status == 2 and "warmup_steps=2" in captured.err
    status = main(["train", str(tmp_path / "c.yaml"), "--set", "steps=2"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    steps, evaluations = metrics_of(tmp_path)
    assert len(steps) == 2 and evaluations == [] and "held-out loss" not in captured.out


def poisoned(inputs: Path, folder: Path) -> tuple[Path, Path, list[int]]:
    """(a model for which the token "~" is infinite, eight documents of which one holds it, their order in two epochs)."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(inputs / "m")
    (token,) = tokenizer.encode("~")
    model.model.embed_tokens.weight.data[token] = math.inf
    model.save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    texts = [f"Document {number} of eight." for number in range(7)] + ["The last ~ one."]
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    order = [torch.randperm(8, generator=torch.Generator().manual_seed(5 + epoch)).tolist() for epoch in range(2)]
    return folder / "m", folder / "d.jsonl", order[0] + order[1]


POISONED = {"packing": False, "steps": None, "epochs": 2, "eval_share": 0, "eval_every": None, "batch_size": 1}


def test_a_loss_that_is_not_finite_stops_with_its_step(inputs, tmp_path, capsys):
    model, data, order = poisoned(inputs, tmp_path)
    step = order.index(7) // 2 + 1
    arguments = job(inputs, tmp_path, **POISONED, model=str(model), data=str(data))
    assert main(arguments) == 1  # a job that was right went wrong: not 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert f"The loss of step {step} is nan: training stopped before its update" in message and "skip" in message
    assert "Traceback" not in captured.err
    assert step > 1 and [line["step"] for line in metrics_of(tmp_path)[0]] == list(range(1, step))
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("max_grad_norm", [0.5, 0])
def test_skipped_updates_equal_a_plain_loop_that_skips(inputs, tmp_path, capsys, max_grad_norm):
    import transformers

    model, data, order = poisoned(inputs, tmp_path)
    settings = {**POISONED, "model": str(model), "data": str(data), "max_grad_norm": max_grad_norm, "weight_decay": 0}
    settings["loss"] = "model"
    assert main(job(inputs, tmp_path, **settings, nonfinite="skip", schedule="linear")) == 0
    captured = capsys.readouterr()
    skipped_steps = [step for step in range(8) if 7 in order[2 * step : 2 * step + 2]]
    assert len(skipped_steps) == 2
    for step in skipped_steps:
        assert f"The loss of step {step + 1} is nan: its update is skipped." in captured.err
    assert "2 of 8 updates" in captured.out

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0, fused=True)
    tokens = [
        tokenizer.encode(json.loads(line)["text"]) + [tokenizer.eos_token_id] for line in data.read_text().splitlines()
    ]
    expected, skipped = [], 0
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 3e-3 * (0.5 if step == 0 else 1 - max(0, step - 2) / 6)
        losses = []
        for row in order[2 * step : 2 * step + 2]:
            ids = torch.tensor([tokens[row] + [tokenizer.eos_token_id] * (48 - len(tokens[row]))])
            mask = torch.tensor([[1] * len(tokens[row]) + [0] * (48 - len(tokens[row]))])
            loss = plain(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            losses.append(loss.item())
            (loss / 2).backward()
        if 7 in order[2 * step : 2 * step + 2]:
            skipped += 1
            expected.append((None, None, skipped))
        else:
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm or math.inf).item()
            optimizer.step()
            expected.append((sum(losses) / 2, norm, skipped))
        optimizer.zero_grad()
    found = [(line["loss"], line["grad_norm"], line["skipped"]) for line in metrics_of(tmp_path)[0]]
    assert found == expected
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for name, parameter in plain.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter), name


def test_a_gradient_that_is_never_finite_ends_a_run_that_skips(inputs, tmp_path, capsys):
    """The same function with its factors far apart: the loss is finite, the gradient's norm is not."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(inputs / "m")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 1e30
        layer.mlp.down_proj.weight.data *= 1e-30
    shutil.copytree(inputs / "m", tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    settings = {"model": str(tmp_path / "m"), "steps": 30, "eval_every": None, "nonfinite": "skip"}
    assert main(job(inputs, tmp_path, **settings)) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "The gradient norm of step 10 is inf, and so were the 9 steps before it" in message
    assert [line["skipped"] for line in metrics_of(tmp_path)[0]] == list(range(1, 10))
    shutil.rmtree(tmp_path / "out")
    assert main(job(inputs, tmp_path, **{**settings, "nonfinite": "stop"})) == 1
    assert "The gradient norm of step 1 is inf: training stopped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_notes_of_a_run_are_said(inputs, tmp_path, capsys):
    """A folder that is on tmpfs, for one: its bytes are RAM."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no tmpfs to write to")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        arguments = job(inputs, tmp_path, nvme=folder, steps=2, eval_every=None)
        assert main([*arguments, "--dry-run"]) == 0
        assert f"{folder} is on a tmpfs" in capsys.readouterr().out
        assert main(arguments) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "tmpfs" in line]
    assert len(said) == 1 and said[0].startswith(f"The nvme folder {folder} is on a tmpfs")


# --- a dry run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj"]}])
def test_a_dry_run_says_what_a_run_would_be_and_leaves_nothing(inputs, tmp_path, capsys, lora):
    arguments = job(inputs, tmp_path, ram="512KiB", gpu="96MiB", lora=lora, report_to="tensorboard")
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert sorted(tmp_path.rglob("*")) == before
    said = dict(line.split(None, 1) for line in captured.out.strip().splitlines())
    base = sum(tensor.numel() for tensor in load_file(inputs / "m" / "model.safetensors").values())
    trained = base if lora is None else 2 * 2 * 4 * 64  # q_proj of two layers: A and B, 4 x 64 each
    count = base + (0 if lora is None else trained)
    assert said["parameters"].startswith(f"{count:,}, of which {trained:,} (")
    assert said["loss"] == "from the last hidden states, logits in tiles"
    assert said["steps"].startswith("5 of 2 x 2 rows") and "nothing was trained" in said["dry"]

    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    extents = sum(report["tiers"]["nvme"]["by_category"].values())
    assert said["nvme"].startswith(format_bytes(extents)) and extents > 0
    assert said["host"].endswith(f"of {format_bytes(report['tiers']['host']['budget_bytes'])}")
    assert report["data"]["training"]["rows"] == int(said["data"].split()[0].replace(",", ""))
    assert set(report["data"]) == {"training", "held_out"}
    for line in captured.err.splitlines():  # what the data came to, before anything else is said
        if line.startswith(("training:", "held-out:")):
            break
    else:
        pytest.fail(captured.err)


@pytest.mark.parametrize(
    "change",
    [
        {"ram": "16KiB"},
        {"gpu": "16KiB"},
        {"ram": "400KiB", "nvme_limit": "1MB"},
        {"nvme": None, "ram": "1MiB"},
        {"nvme": "missing"},
        {"device": "cuda:77"},
        {"data": "missing.txt"},
        {"model": "./missing"},
        {"sequence_length": 65},
        {"warmup_steps": 6, "steps": None, "epochs": 0.01},
        {"lora": {"target_modules": ["nothing_of_it"]}},
    ],
    ids=lambda change: " ".join(change),
)
def test_a_dry_run_refuses_what_a_run_refuses(inputs, tmp_path, capsys, change):
    arguments = job(inputs, tmp_path, **change)
    said = []
    for flags in (["--dry-run"], []):
        assert main([*arguments, *flags]) == 2
        said.append(capsys.readouterr().err.strip().splitlines()[-1])
    # What is free may move between the two; nothing else may.
    assert re.sub(r"[\d.]+", "", said[0]) == re.sub(r"[\d.]+", "", said[1])
    assert not (tmp_path / "out").exists() and list((tmp_path / "nvme").iterdir()) == []


def test_a_dry_run_says_that_a_folder_is_in_use(inputs, tmp_path, capsys):
    arguments = job(inputs, tmp_path)
    model = torch.nn.Linear(4, 4)
    with fuyou.wrap(model, torch.optim.AdamW(model.parameters()), nvme=tmp_path / "nvme", device="cpu"):
        held = sorted((tmp_path / "nvme").rglob("*"))
        assert main([*arguments, "--dry-run"]) == 2
        assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
        assert sorted((tmp_path / "nvme").rglob("*")) == held


def test_an_output_that_holds_a_run_is_refused(inputs, tmp_path, capsys):
    arguments = job(inputs, tmp_path, steps=1, warmup_steps=0, eval_every=None)
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"already holds a run of model {inputs / 'm'} that came to step 1 at 2" in message
    assert "(config.yaml, metrics.jsonl, report.json, model)" in message
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize(
    "budgets", [{"ram": "16KiB"}, {"gpu": "16KiB"}, {"gpu": "400KiB"}, {"ram": "400KiB", "nvme_limit": "1MB"}]
)
def test_a_budget_that_cannot_work_leaves_nothing(inputs, tmp_path, capsys, budgets):
    assert main(job(inputs, tmp_path, **budgets)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("fuyou: ") and "short" in message
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "nvme").iterdir()) == []


def test_an_output_folder_stays_only_with_a_step_in_it(tmp_path):
    config = TrainConfig(model="m", data="d.txt", output="o", nvme=None)
    (tmp_path / "mine").mkdir()
    for name, steps in {"new": 0, "mine": 0, "begun": 1}.items():
        with pytest.raises(BudgetError), opened_output(tmp_path / name, config) as metrics:
            metrics.write_evaluation(step=0, eval_loss=1.0)
            for step in range(steps):
                metrics.write_step(step=step + 1, loss=1.0)
            raise BudgetError("", tier="device", needed_bytes=2, given_bytes=1)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "mine").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "begun").iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_an_interrupt_closes_the_run_and_exports_nothing(inputs, tmp_path, capsys, monkeypatch):
    write = Metrics.write_step

    def interrupted(metrics: Metrics, **values: object) -> None:
        write(metrics, **values)
        if values["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Metrics, "write_step", interrupted)
    assert main(job(inputs, tmp_path)) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("fuyou: interrupted")
    assert len(metrics_of(tmp_path)[0]) == 2
    assert not (tmp_path / "out" / "model").exists()
    assert [path.name for path in (tmp_path / "nvme").iterdir()] == ["fuyou-store"]  # of step 2
