"""The command line: exit status, one paragraph an error, nothing written where an input is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fuyou.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory with data, a model folder without weights, and a configuration that names them."""
    monkeypatch.chdir(tmp_path)
    for name in ("nvme", "m", "empty_folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 16}))
    (tmp_path / "d.txt").write_text("one paragraph\n\nand another\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "file").write_text("")
    (tmp_path / "c.yaml").write_text("model: m\ndata: d.txt\noutput: out\nnvme: nvme\n")
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """Standard error of a command that exits 2 in one paragraph and makes no output folder."""
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == "" and lines[-1].startswith("fuyou: ")
    assert "Traceback" not in captured.err
    assert sorted(Path().rglob("*")) == before
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Missing command"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument .*Try `fuyou train --help`"),
        (["plan", "--what"], "No such option: --what.*Try `fuyou plan --help`"),
        (["verify", "c.yaml", "--what"], "No such option: --what.*Try `fuyou verify --help`"),
        (["resume", "out"], "out holds no run"),
        (["export", "out", "there"], "out holds no run"),
        (["verify"], "Give the configuration of a job, or --model"),
        (["verify", "c.yaml", "--data", "d.txt"], "--data and --nvme go with --model"),
        (["verify", "--model", "m"], "--model needs --data"),
        (["verify", "missing.yaml"], "missing.yaml is not a file"),
        (["verify", "c.yaml", "--set", "nvme=missing"], "missing does not exist"),
        (["report", "out"], "out holds no report.json"),
        (["doctor", "--nvme", "nvme", "--nvme", "nvme"], "given twice"),
        (["exprot"], "No such command 'exprot'"),
        (["init", "c.yaml"], "c.yaml exists: give another path, or --force"),
        (["init", "empty_folder"], "empty_folder is a folder"),
        (["init", "missing/c.yaml"], "missing/c.yaml cannot be written: No such file"),
        (["init", "new.yaml", "--modle", "m"], "No such option: --modle"),
        (["train", "c.yaml", "--dry-run", "--set", "data=missing.txt"], "missing.txt does not exist"),
        (["train", "c.yaml", "--sett", "a=b"], "No such option: --sett"),
        (["train", "missing.yaml"], "missing.yaml is not a file"),
        (["train", "empty_folder"], "empty_folder is not a file"),
        (["train", "c.yaml", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["train", "c.yaml", "--set", "steps"], "not key=value"),
        (["train", "c.yaml", "--set", "data=missing.txt"], "missing.txt does not exist"),
        (["train", "c.yaml", "--set", "data=[d.txt, bad.jsonl]"], "bad.jsonl line 2 is not JSON"),
        (["train", "c.yaml", "--set", "nvme=missing"], "missing does not exist"),
        (["train", "c.yaml", "--set", "nvme=file"], "file does not exist or is not a folder"),
        (["train", "c.yaml", "--set", "output=file"], "output=file is a file"),
        (["train", "c.yaml", "--set", "output=file/out"], "cannot be made: file is not a folder|is not a folder"),
    ],
)
def test_refused_before_any_model_is_read(folder, capsys, arguments, reason):
    assert re.search(reason, refused(capsys, *arguments))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("./missing", "missing does not exist"),
        ("a/b/c", "does not exist, and a hub id would read"),
        ("file", "is a file"),
        ("empty_folder", "no config.json"),
        ("no-such-model", "no folder here, and neither the hub nor its cache"),
        ("m", "Model folder m has no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(folder, capsys, monkeypatch, model, reason):
    pytest.importorskip("transformers", reason="fuyou train reads models through transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert re.search(reason, refused(capsys, "train", "c.yaml", "--set", f"model={model}"))


def test_a_model_that_is_no_causal_language_model_is_refused(folder, capsys):
    pytest.importorskip("transformers", reason="fuyou train reads models through transformers")
    (folder / "m" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    assert "vit, which is not a causal language model" in refused(capsys, "train", "c.yaml")


def test_transformers_missing_names_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'fuyou[hf]'" in refused(capsys, "train", "c.yaml")


def test_debug_shows_the_traceback(folder, capsys):
    assert main(["train", "missing.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_failures_and_an_interrupt_have_their_own_status(folder, capsys, monkeypatch):
    for error, status in ((ZeroDivisionError("of\nsomething"), 1), (KeyboardInterrupt(), 130)):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("fuyou.train.config.read_config", fail)
        assert main(["train", "c.yaml"]) == status
        captured = capsys.readouterr()
        assert len(captured.err.strip().splitlines()) == 1 and captured.err.startswith("fuyou: ")


def test_a_launched_scripts_debug_is_its_own(folder, capsys):
    """--debug behind SCRIPT is not ours: no traceback of fuyou's where the launch is refused."""
    for arguments, ours in ((["--ram", "x", "file", "--debug"], False), (["--debug", "--ram", "x", "file"], True)):
        assert main(["launch", *arguments]) == 2
        assert ("Traceback" in capsys.readouterr().err) == ours


def test_help_lists_what_is_built(capsys):
    for name in ("", "train", "launch", "init", "plan", "doctor", "verify"):
        assert main([name, "--help"] if name else ["--help"]) == 0
    shown = capsys.readouterr().out
    commands = shown[shown.index("Commands:") : shown.index("Usage: fuyou train")]
    assert set(re.findall(r"^  (\w+)", commands, re.MULTILINE)) == {
        "train",
        "resume",
        "export",
        "launch",
        "init",
        "plan",
        "doctor",
        "verify",
        "report",
    }
    for option in ("--set", "--dry-run", "--nvme-limit", "--threads", "--cores", "--no-bind", "--quiet", "--force"):
        assert option in shown
    for name in ("FUYOU_NVME", "FUYOU_NVME_LIMIT", "FUYOU_RAM", "FUYOU_GPU", "FUYOU_DEVICE"):
        assert name in shown


# --- init -----------------------------------------------------------------------------------------------------------


def test_init_writes_every_key_with_its_default(folder, capsys):
    from fuyou.train.config import TrainConfig, read_config

    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert "Wrote fuyou.yaml: fill in model, data, output, nvme" in said and "--dry-run" in said
    values = yaml.safe_load(Path("fuyou.yaml").read_text())
    assert list(values) == list(TrainConfig.model_fields)  # every key, in the documented order
    four = {"model": "m", "data": ["d.txt"], "output": "out", "nvme": "nvme"}
    Path("four.yaml").write_text(yaml.safe_dump(four))
    written = read_config("fuyou.yaml", [f"{key}={json.dumps(value)}" for key, value in four.items()])
    assert written == read_config("four.yaml")  # the written values are the defaults
    lines = Path("fuyou.yaml").read_text().splitlines()
    bare = [line for line in lines if re.match(r"\w+:", line) and "#" not in line]
    assert len(bare) < len(values) / 3  # it is commented


def test_init_fills_in_what_it_is_given(folder, capsys):
    from fuyou.train.config import read_config

    odd = "a folder: with #, 'quotes' and ünï"
    arguments = [
        "--model",
        odd,
        "--data",
        "d.txt",
        "--data",
        "1e3",
        "--output",
        "null",
        "--nvme",
        "n 1",
        "--nvme",
        "n2",
    ]
    assert main(["init", "new.yaml", *arguments]) == 0
    assert "Wrote new.yaml: try `fuyou train new.yaml --dry-run`" in capsys.readouterr().out
    config = read_config("new.yaml")
    assert (config.model, config.data, config.output, config.nvme) == (odd, ["d.txt", "1e3"], "null", ["n 1", "n2"])
    text = Path("new.yaml").read_text()
    assert "# a Hugging Face folder" in text and "# tokens a row" in text  # the comments stay

    assert main(["init", "new.yaml", "--nvme", "null", "--data", "d.txt", "--force"]) == 0
    assert "fill in model, output," in capsys.readouterr().out
    values = yaml.safe_load(Path("new.yaml").read_text())
    assert values["nvme"] is None and values["data"] == "d.txt"


def test_the_example_is_what_init_writes(folder):
    assert main(["init"]) == 0
    example = Path(__file__).parent.parent / "examples" / "config.yaml"
    assert example.read_text() == Path("fuyou.yaml").read_text(), (
        "fuyou/train/config.yaml and examples/config.yaml differ"
    )


def test_the_environments_budgets_are_those_of_null_keys(folder, monkeypatch):
    """And the job is given them, so that its folder shows what it ran with."""
    given = []
    monkeypatch.setattr(
        "fuyou.train.job.run_job", lambda settings, dry_run=False, resume=None: given.append((settings, dry_run))
    )
    monkeypatch.setenv("FUYOU_RAM", "3MiB")
    monkeypatch.setenv("FUYOU_GPU", "1GiB")
    monkeypatch.setenv("FUYOU_DEVICE", "cpu")
    monkeypatch.setenv("FUYOU_NVME", "/nowhere")  # `nvme` is never left out: this is not looked at
    assert main(["train", "c.yaml", "--set", "gpu=2GiB", "--dry-run"]) == 0
    assert main(["train", "c.yaml"]) == 0
    (settings, dry), (_, wet) = given
    assert (settings.ram, settings.gpu, settings.device, settings.nvme) == (3 * 2**20, "2GiB", "cpu", "nvme")
    assert (dry, wet) == (True, False)
    assert yaml.safe_load(settings.to_yaml())["device"] == "cpu"


def test_the_module_is_the_command(folder):
    paths = [path for path in sys.path if path]  # the working directory is not the repository's
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", "fuyou", "train", "missing.yaml"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fuyou: ") and len(done.stderr.strip().splitlines()) == 1
    shown = subprocess.run([sys.executable, "-m", "fuyou", "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "train" in shown.stdout
