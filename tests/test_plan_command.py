"""`fuyou plan`: its JSON, its table, its exit status, and this machine measured."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fuyou.cli import main
from fuyou.runtime import this_machine
from fuyou.tiers.io.tuning import Tuning

SMALL = [
    "--layers",
    "24",
    "--heads",
    "16",
    "--hidden",
    "2048",
    "--vocab",
    "50257",
    "--batch",
    "4",
    "--sequence",
    "1024",
]
DESK = ["--hardware", "rtx4090-2xgen4"]
PARAMETERS = 24 * (12 * 2048**2 + 13 * 2048) + 50257 * 2048


def answer(capsys, *arguments: str, status: int = 0) -> dict:
    assert main(["plan", *arguments, "--json"]) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def shown(capsys, *arguments: str, status: int = 0) -> str:
    assert main(["plan", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.err == "" and all(len(line) <= 120 for line in captured.out.splitlines())
    return captured.out


def test_json_of_a_plan_that_fits(capsys):
    found = answer(capsys, *SMALL, *DESK)
    assert found["fits"] is True and found["parameters"] == PARAMETERS
    assert found["tokens_per_step"] == 4 * 1024
    assert found["tokens_per_second"] == pytest.approx(4096 / found["seconds_per_step"])
    assert found["tflops_8n"] == pytest.approx(8 * PARAMETERS * found["tokens_per_second"] / 1e12)
    assert found["tflops_6n"] == pytest.approx(6 * PARAMETERS * found["tokens_per_second"] / 1e12)
    assert found["bound_by"] in ("compute", "host_to_device", "device_to_host", "nvme", "adam")
    assert set(found["tiers"]) == {"device", "host", "nvme"}
    for tier in found["tiers"].values():
        assert sum(tier["by_category"].values()) == tier["needed_bytes"] <= tier["budget_bytes"]
        assert set(tier["by_category"]) == {"weights", "gradients", "optimizer", "activations", "staging"}
    # 80 % of what the hardware file says, half a GiB of which a CUDA context takes
    assert found["tiers"]["device"]["budget_bytes"] == int(0.8 * (24 * 2**30 - 2**29))
    assert found["tiers"]["host"]["budget_bytes"] == int(0.8 * 128 * 2**30)


def test_budgets_decide_how_much_the_drives_move(capsys):
    rich, poor = (answer(capsys, *SMALL, *DESK, "--ram", ram) for ram in ("100GiB", "4GiB"))
    assert rich["nvme_read_bytes_per_step"] == rich["nvme_write_bytes_per_step"] == 0
    # All but what 4 GiB hold, of 16 and 14 bytes a parameter; the tied head's weights are read once more each way.
    most_read, most_written = 16 * PARAMETERS + 4 * 50257 * 2048, 14 * PARAMETERS
    assert 0.75 * most_read < poor["nvme_read_bytes_per_step"] <= most_read
    assert 0.75 * most_written < poor["nvme_write_bytes_per_step"] <= most_written
    assert poor["seconds_per_step"] > rich["seconds_per_step"] and poor["bound_by"] == "nvme"
    assert rich["drive_life_days"] is None and poor["drive_life_days"] > 0
    assert poor["drive_life_steps"] == pytest.approx(2 * 1200e12 / poor["nvme_write_bytes_per_step"])


def test_more_drives_and_gpus(capsys):
    arguments = [*SMALL, *DESK, "--ram", "4GiB"]
    one, four = (answer(capsys, *arguments, "--drives", count) for count in ("1", "4"))
    assert four["seconds_per_step"] < one["seconds_per_step"]
    assert four["tiers"]["nvme"]["budget_bytes"] == pytest.approx(4 * one["tiers"]["nvme"]["budget_bytes"])
    two = answer(capsys, *arguments, "--gpu-count", "2", "--accumulation", "3")
    assert two["tokens_per_step"] == 2 * 3 * 4096 and two["gpu_count"] == 2
    assert any("prediction only" in note for note in two["notes"])
    assert "prediction only" in shown(capsys, *arguments, "--gpu-count", "2")
    none = answer(capsys, *SMALL, *DESK, "--drives", "0")
    assert none["fits"] and none["tiers"]["nvme"]["budget_bytes"] == 0


def test_what_does_not_fit_says_the_smallest_change_and_it_is_right(capsys):
    arguments = [*SMALL, *DESK, "--batch", "64", "--gpu", "4GiB"]
    found = answer(capsys, *arguments, status=1)
    assert found["fits"] is False
    for key in ("seconds_per_step", "tokens_per_second", "tflops_6n", "tflops_8n", "bound_by"):
        assert found[key] is None
    needed = found["tiers"]["device"]["needed_bytes"]
    assert needed > 4 * 2**30
    text = shown(capsys, *arguments, status=1)
    assert re.search(r"fits +no", text) and "short" in text
    batch = re.search(r"--batch (\d+) in place of 64", " ".join(text.split()))
    enough = re.search(r"--gpu [\d.]+ \w+ \((\d+) bytes\)", found["change"])
    assert batch is not None and enough is not None and "micro_batch=" in found["change"]
    assert needed <= int(enough[1]) <= needed + 2**20
    assert answer(capsys, *SMALL, *DESK, "--gpu", "4GiB", "--batch", batch[1])["fits"]
    more = str(int(batch[1]) + 1)
    assert not answer(capsys, *SMALL, *DESK, "--gpu", "4GiB", "--batch", more, status=1)["fits"]
    assert answer(capsys, *SMALL, *DESK, "--batch", "64", "--gpu", enough[1])["fits"]


def test_published_rows_by_the_command(capsys):
    """As README says: within 15 % of the paper's TFLOPS read as 8N; 175B at batch 32 does not fit."""
    paper = ["--sequence", "1024", "--hardware", "rtx4090-12xp5510", "--system", "paper"]
    b13 = ["--layers", "40", "--heads", "40", "--hidden", "5120", *paper]
    for batch, drives, published in ((8, 12, 42.8), (32, 1, 37.5), (32, 3, 81.1), (64, 12, 155.8)):
        found = answer(capsys, *b13, "--batch", str(batch), "--drives", str(drives))
        assert found["tflops_8n"] == pytest.approx(published, rel=0.15)
        assert found["system"] == "the Fuyou paper's system"
    b175 = ["--layers", "96", "--heads", "96", "--hidden", "12288", *paper]
    assert answer(capsys, *b175, "--batch", "16")["tflops_8n"] == pytest.approx(86.9, rel=0.15)
    assert answer(capsys, *b175, "--batch", "32", status=1)["fits"] is False


def test_the_nvme_size_is_a_limit(capsys):
    big = ["--layers", "40", "--heads", "40", "--hidden", "5120", "--batch", "1", "--sequence", "512", "--ram", "16GiB"]
    found = answer(capsys, *big, *DESK, "--nvme", "20GB", status=1)
    assert found["tiers"]["nvme"]["budget_bytes"] == 20 * 10**9 < found["tiers"]["nvme"]["needed_bytes"]
    assert "--nvme" in found["change"]
    # 13B of 12 bytes twice, so that updates may be guessed, and of gradients once; or once each
    parameters = 40 * (12 * 5120**2 + 13 * 5120)
    assert answer(capsys, *big, *DESK)["tiers"]["nvme"]["needed_bytes"] > 0.8 * 26 * parameters
    one_slot = answer(capsys, *big, *DESK, "--nvme", str(16 * parameters))
    assert one_slot["tiers"]["nvme"]["needed_bytes"] < 14.1 * parameters


def test_the_table_says_it_in_words(capsys):
    text = shown(capsys, *SMALL, *DESK, "--ram", "4GiB")
    for part in (
        "1.312e9 parameters, bf16",
        "rtx4090-2xgen4",
        "1 x 4 rows of 1024 tokens: 4,096 tokens",
        "tokens/s",
        "counted as 6N",
        "as 8N",
        "bound by   the drives",
        "What would help: ",
        "times as fast",
        "days without a pause",
    ):
        assert part in " ".join(text.split()) or part in text, part  # fmt: skip
    flat = " ".join(text.split())
    assert re.search(r"device .* of 18\.80 GiB: weights", flat) and re.search(r"host .* of 4\.00 GiB: ", flat)
    whatif = shown(capsys, *SMALL, *DESK, "--ram", "512GiB")
    assert "more than the machine's 128.00 GiB" in " ".join(whatif.split())
    assert "without embedding and head" in shown(
        capsys, "--layers", "2", "--heads", "2", "--hidden", "64", "--batch", "1", "--sequence", "8", *DESK
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--batch", "1", "--sequence", "8"], "Give --model, or all of --layers, --heads and --hidden"),
        (["--layers", "2", "--heads", "2", "--batch", "1", "--sequence", "8"], "--hidden left out"),
        (
            ["--model", "m", "--vocab", "3", "--batch", "1", "--sequence", "8"],
            "--model and --vocab say what the model is",
        ),
        ([*SMALL[:-2]], "Missing option '--sequence'"),
        ([*SMALL, "--batch", "0"], "should be greater than or equal to 1|not in the range"),
        ([*SMALL, *DESK, "--gpu-count", "0"], "should be greater than or equal to 1|not in the range"),
        ([*SMALL, *DESK, "--drives", "-1"], "should be greater than or equal to 0|not in the range"),
        ([*SMALL, "--heads", "3", *DESK], "no multiple of --heads 3"),
        ([*SMALL, *DESK, "--ram", "much"], "--ram='much' is not a size"),
        ([*SMALL, *DESK, "--gpu", "0"], "--gpu='0' must be more than 0"),
        ([*SMALL, *DESK, "--nvme", "/mnt"], r"--nvme \(with --hardware, a size\)='/mnt' is not a size"),
        ([*SMALL, *DESK, "--nvme", "1TB", "--nvme", "2TB"], "With --hardware, --nvme is one size"),
        ([*SMALL, *DESK, "--precision", "fp16"], "--precision fp16 is neither bf16 nor fp32"),
        ([*SMALL, *DESK, "--system", "mine"], "--system mine is none of fuyou, paper"),
        ([*SMALL, "--system", "paper"], "--system paper is the published system, for --hardware"),
        ([*SMALL, "--hardware", "rtx4090"], "cannot be read .*did you mean 'rtx"),
        ([*SMALL, "--hardware", "wrong.json"], "wrong.json lacks flops_per_s"),
        ([*SMALL, "--nvme", "2TB"], "--nvme 2TB is no folder here: without --hardware"),
        ([*SMALL, "--nvme", "missing"], "missing does not exist or is not a folder"),
    ],
)
def test_refused_in_one_paragraph(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    Path("wrong.json").write_text("{}")
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert re.search(reason, captured.err), captured.err


def test_as_a_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "fuyou", "plan", *SMALL, *DESK, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and json.loads(done.stdout)["fits"]
    assert list(tmp_path.iterdir()) == []
    short = subprocess.run([*command, "--batch", "4096"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert short.returncode == 1 and not json.loads(short.stdout)["fits"]


# --- models from a folder -------------------------------------------------------------------------------------------

TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 1000}
FOLDERS = {
    "llama": {**TINY, "model_type": "llama", "intermediate_size": 96, "num_key_value_heads": 2},
    "tied": {**TINY, "model_type": "llama", "intermediate_size": 96, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 1000},
    "mixtral": {
        **TINY, "model_type": "mixtral", "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2
    },
}  # fmt: skip


@pytest.fixture(params=FOLDERS)
def folder(request, tmp_path) -> Path:
    pytest.importorskip("transformers")
    path = tmp_path / request.param
    path.mkdir()
    (path / "config.json").write_text(json.dumps(FOLDERS[request.param]))
    return path


def test_a_models_parameters_are_those_of_transformers(folder, capsys):
    """Counted on a real model; and the operations are torch's own count of its forward."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    from fuyou.train.model_shape import load_shape

    configuration = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation="eager")
    arguments = ("--model", str(folder), "--batch", "2", "--sequence", "32", *DESK)
    assert answer(capsys, *arguments)["parameters"] == sum(each.numel() for each in model.parameters())
    shape, notes = load_shape(str(folder))
    assert len([block for block in shape.blocks if block.is_layer]) == 3
    assert bool(notes) == (folder.name == "mixtral")
    if folder.name == "mixtral":
        # 6 of 8 experts of 3 products of 64 x 96 are not met by a token
        assert shape.elements - shape.active_elements == 3 * 6 * 3 * 64 * 96
        return
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(2, 32, dtype=torch.long), use_cache=False)
    attention = sum(4 * 32 * block.attention_width for block in shape.blocks)
    operations = 64 * sum(block.flops_per_token for block in shape.blocks) + 64 * attention
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_model_that_cannot_be_read_is_refused(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/config.json").write_text(json.dumps({**FOLDERS["llama"], "num_attention_heads": 0}))
    for name, reason in (("no-such-model", "no folder here"), ("./missing", "does not exist"), ("broken", "broken")):
        assert main(["plan", "--model", name, "--batch", "1", "--sequence", "8", *DESK]) == 2
        assert reason in capsys.readouterr().err


# --- this machine ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A measurement of some tenths of a second, and a drive whose speeds are known."""
    monkeypatch.setattr(this_machine, "MEASURE_S", 0.01)
    monkeypatch.setattr(this_machine, "WIDTHS", {"cpu": (32, 128), "cuda": (32, 128)})
    monkeypatch.setattr(this_machine, "ADAM_ELEMENTS", 2**16)
    tuning = Tuning(1 << 20, 8, 0, read_bytes_per_s=3e9, write_bytes_per_s=1.5e9, mixed_bytes_per_s=1e9)
    monkeypatch.setattr(this_machine, "measure", lambda *_: tuning)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_this_machine_is_measured(quick, tmp_path, capsys, precision):
    arguments = ["--layers", "2", "--heads", "2", "--hidden", "64", "--batch", "1", "--sequence", "8"]
    found = answer(capsys, *arguments, "--nvme", str(tmp_path), "--precision", precision)
    assert found["fits"] and found["machine"] == "this machine"
    assert any(note.startswith(str(tmp_path)) for note in found["notes"])
    assert list(tmp_path.iterdir()) == []
    budgets = [found["tiers"][tier]["budget_bytes"] for tier in ("device", "host")]
    if not torch.cuda.is_available():
        assert budgets[0] == pytest.approx(budgets[1], abs=1)


def test_a_drives_speeds_are_those_of_reading_and_writing_at_once(quick, tmp_path):
    read, write = this_machine.drive_rates(str(tmp_path))
    # Half a byte of each takes 1 ns at the mixed speed of 1 GB/s; reads are twice as fast as writes.
    assert 0.5 / read + 0.5 / write == pytest.approx(1e-9)
    assert read == pytest.approx(2 * write)


def test_rates_are_positive_and_leave_the_random_state(quick):
    device = torch.device("cpu")
    before = torch.get_rng_state()
    for precision in ("fp32", "bf16"):
        assert 0 < this_machine.device_rate(device, precision) < math.inf
        assert 0 < this_machine.adam_rate(precision) < math.inf
    assert min(this_machine.copy_rates(device)) > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_this_machine_really(tmp_path, capsys):
    arguments = ["--layers", "4", "--heads", "4", "--hidden", "256", "--batch", "1", "--sequence", "128"]
    found = answer(capsys, *arguments, "--nvme", str(tmp_path))
    assert found["fits"] and 0 < found["seconds_per_step"] < 60
