"""The command line: exit status, one paragraph an error, nothing written where an input is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
        (["train"], "Missing argument"),
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
        ("no-such-model", "no folder here, and the hub did not give it"),
        ("m", "Model m cannot be loaded"),
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
