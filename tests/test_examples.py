"""The examples, run as a user runs them, under `fuyou launch` and by themselves: plain PyTorch's losses and weights.

The oracle of each is the same loop without fuyou, written out here.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the examples train its models")
pytest.importorskip("tokenizers", reason="the test trains a tokenizer")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
STEPS, LENGTH, SEED = 8, 64, 3
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("FUYOU_", "OMP_", "MKL_"))},
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUDA_VISIBLE_DEVICES": "",
}
OPTIONS = {
    "finetune": ["--batch-size", "2", "--accumulation", "2", "--lr", "1e-2", "--warmup", "2"],
    "trainer": ["--batch-size", "2", "--accumulation", "2", "--lr", "1e-2", "--warmup", "2"],
    "lora": ["--batch-size", "4", "--rank", "4", "--lr", "1e-2"],
}


pytestmark = pytest.mark.usefixtures("one_thread")  # as the examples are given: a sum over two threads has other bits


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """model/: a Llama of 2 layers with a byte-level tokenizer; text.txt: docstrings of the standard library."""
    import tokenizers
    import transformers

    folder = tmp_path_factory.mktemp("made")
    text = "\n\n".join(
        inspect.getdoc(each) or "" for module in (argparse, tarfile) for _, each in inspect.getmembers(module)
    )
    (folder / "text.txt").write_text(text, encoding="utf-8")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text], tokenizers.trainers.BpeTrainer(vocab_size=384, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(folder / "model")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


# --- the same, in plain PyTorch ------------------------------------------------------------------------------------


def tokens_of(made: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and the text as rows of 64 tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(SEED)
    tokens = AutoTokenizer.from_pretrained(made / "model")((made / "text.txt").read_text(encoding="utf-8"))["input_ids"]
    rows = torch.tensor([tokens[at : at + LENGTH] for at in range(0, len(tokens) - LENGTH + 1, LENGTH)])
    return AutoModelForCausalLM.from_pretrained(made / "model"), rows


def plain_finetune(made: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, rows = tokens_of(made)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    assert len(rows) >= STEPS * 4  # one pass over the rows is enough here
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 2)
        total = 0.0
        for part in order[step * 4 : step * 4 + 4].split(2):
            loss = model(input_ids=rows[part], labels=rows[part]).loss / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return model.state_dict(), losses


def plain_trainer(made: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    model, rows = tokens_of(made)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01, fused=True)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    arguments = TrainingArguments(
        output_dir=str(made / "plain"), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, save_strategy="no", report_to=[], seed=SEED, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in rows]
    trainer = Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
    with contextlib.redirect_stdout(None):
        trainer.train()
    return model.state_dict(), [each["loss"] for each in trainer.state.log_history if "loss" in each]


def plain_lora(made: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    peft = pytest.importorskip("peft", reason="the example trains its adapters")
    model, rows = tokens_of(made)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=True)
    losses = []
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (4,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return peft.get_peft_model_state_dict(model), losses


PLAIN = {"finetune": plain_finetune, "trainer": plain_trainer, "lora": plain_lora}


@pytest.fixture(scope="module")
def plain(made):
    """name → (weights, losses) of the plain loop, each run once."""
    known: dict[str, tuple[dict[str, torch.Tensor], list[float]]] = {}

    def run(name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
        if name not in known:
            known[name] = PLAIN[name](made)
        return known[name]

    return run


# --- the examples --------------------------------------------------------------------------------------------------


def losses_in(said: str) -> list[float]:
    return [float(each) for each in re.findall(r"(?:step \d+ loss |'loss': '?)([\d.]+)", said)]


def loaded(name: str, made: Path, output: Path) -> dict[str, torch.Tensor]:
    """The exported folder, through the library that will read it: the whole model's tensors, or the adapter's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoTokenizer.from_pretrained(output).eos_token == "<end>"
    if name != "lora":
        return AutoModelForCausalLM.from_pretrained(output).state_dict()
    import peft

    written = load_file(output / "adapter_model.safetensors")
    assert written and all("lora_" in key for key in written)  # nothing of the base
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "model"), output)
    return peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("trainer", "launched"),
        ("finetune", "direct"),
        pytest.param("finetune", "launched", marks=pytest.mark.slow),
        pytest.param("lora", "launched", marks=pytest.mark.slow),
        pytest.param("trainer", "direct", marks=pytest.mark.slow),
        pytest.param("lora", "direct", marks=pytest.mark.slow),
    ],
)
def test_an_example_trains_as_plain_pytorch(name, how, made, plain, nvme, tmp_path):
    weights, losses = plain(name)
    assert sum(losses[-3:]) < sum(losses[:3])
    command = [str(EXAMPLES / f"{name}.py"), str(made / "model"), str(made / "text.txt"), str(tmp_path / "out")]
    command += ["--steps", str(STEPS), "--length", str(LENGTH), "--seed", str(SEED), *OPTIONS[name]]
    if how == "launched":
        budgets = ["--nvme", str(nvme), "--ram", "1MiB", "--gpu", "1GiB", "--device", "cpu"]
        command = ["-m", "fuyou", "launch", *budgets, *command]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert losses_in(done.stdout) == pytest.approx(losses, abs=1e-3)  # printed with 4 digits
    on_drive = re.search(r"^ *nvme (.*)$", done.stdout, re.MULTILINE)[1]
    assert bool(re.search(r"[1-9]", on_drive)) == (how == "launched"), on_drive
    assert done.stdout.strip().endswith(f"is in {tmp_path / 'out'}.")
    exported = loaded(name, made, tmp_path / "out")
    assert exported.keys() == weights.keys()
    assert [key for key in weights if not torch.equal(exported[key], weights[key])] == []


@pytest.mark.slow
def test_the_trainers_example_goes_on_from_its_newest_whole_checkpoint(made, plain, tmp_path, nvme):
    weights, _ = plain("trainer")
    out = tmp_path / "out"
    budgets = ["--nvme", str(nvme), "--ram", "1MiB", "--gpu", "1GiB", "--device", "cpu"]
    command = [str(EXAMPLES / "trainer.py"), str(made / "model"), str(made / "text.txt"), str(out), "--save-steps", "3"]
    command += ["--steps", str(STEPS), "--length", str(LENGTH), "--seed", str(SEED), *OPTIONS["trainer"]]
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "fuyou", "launch", *budgets, *command],
            capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(losses_in(done.stdout)) == (STEPS, STEPS - 6)[number]
        exported = loaded("trainer", made, out)
        assert [key for key in weights if not torch.equal(exported[key], weights[key])] == []
        os.unlink(out / f"checkpoint-{STEPS}" / "trainer_state.json")  # as a kill in the last one leaves it


def run_here(name: str, monkeypatch, capsys, *arguments: str) -> SimpleNamespace:
    """The script in this process, up to where it gives up."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return SimpleNamespace(status=ended.value.code, said=capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_an_example_without_data_says_what_it_needs(name, made, tmp_path, monkeypatch, capsys):
    if name == "lora":
        pytest.importorskip("peft", reason="the example trains its adapters")
    ended = run_here(name, monkeypatch, capsys)
    assert ended.status == 2 and "the following arguments are required: model, text, output" in ended.said
    ended = run_here(name, monkeypatch, capsys, str(made / "model"), "nowhere.txt", str(tmp_path / "out"))
    assert ended.status == 2 and "nowhere.txt is not a file" in ended.said
    (tmp_path / "short.txt").write_text("too little")
    ended = run_here(name, monkeypatch, capsys, str(made / "model"), str(tmp_path / "short.txt"), str(tmp_path / "out"))
    assert re.search(r"short.txt has \d+ tokens, less than one row of 512", str(ended.status))
    assert not (tmp_path / "out").exists()


def test_the_configurations_name_known_keys(tmp_path):
    from fuyou.train.config import TrainConfig, read_config

    for path in EXAMPLES.glob("*.yaml"):
        read_config(path)
    assert set(yaml.safe_load((EXAMPLES / "config.yaml").read_text())) == set(TrainConfig.model_fields)
