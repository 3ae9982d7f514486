"""`fuyou resume` and `fuyou export`: a job that is broken off in any way ends as one that never was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import torch
from jobs import metrics_of
from safetensors.torch import load_file

from fuyou.cli import main
from fuyou.train.output import Metrics

pytestmark = pytest.mark.usefixtures("one_thread")  # matrices this small only make threads wait for one another


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return jobs.make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def plain(inputs) -> tuple[jobs.Plain, list[tuple], list[float]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = jobs.Plain(inputs, "fp32", 0.5, "chunked")
    steps, evaluations = made.train()
    torch.set_num_threads(threads)
    return made, steps, evaluations


def job(inputs: Path, folder: Path, **settings: object) -> list[str]:
    return ["train", str(jobs.write_job(inputs, folder, **{**jobs.SETTINGS, "ram": "512KiB", **settings}))]


def check(folder: Path, plain) -> None:
    """Metrics and weights are plain PyTorch's, as if nothing had happened."""
    made, expected, losses = plain
    steps, evaluations = metrics_of(folder)
    assert [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in steps] == expected
    assert [(line["step"], line["eval_loss"]) for line in evaluations] == list(zip((0, 2, 4, 5), losses, strict=True))
    assert weights(folder / "out" / "model", made) == []


def weights(folder: Path, made: jobs.Plain) -> list[str]:
    found = load_file(folder / "model.safetensors")
    return [name for name, each in made.model.named_parameters() if not torch.equal(found[name], each)]


def stop_after(monkeypatch, step: int, act) -> None:
    write = Metrics.write_step

    def watched(metrics: Metrics, **values: object) -> None:
        write(metrics, **values)
        if values["step"] == step:
            act()

    monkeypatch.setattr(Metrics, "write_step", watched)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("settings", [{}, {"durability": "checkpoint"}, {"nvme": None, "ram": "64MiB"}],
                         ids=["step", "checkpoint", "memory"])  # fmt: skip
def test_a_signal_finishes_the_step_and_resume_goes_on(
    inputs, tmp_path, capsys, monkeypatch, plain, number, status, settings
):
    stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    assert main(job(inputs, tmp_path, **settings)) == status
    said = capsys.readouterr().err
    assert f"Step 2 is complete: `fuyou resume {tmp_path}/out` goes on from it." in said
    assert said.strip().splitlines()[-1] == f"fuyou: {signal.Signals(number).name}: stopped after step 2."
    assert signal.getsignal(number) is not None and not (tmp_path / "out" / "model").exists()
    monkeypatch.undo()
    changed = ["--set", "ram=64MiB", "--set", "io=threads", "--set", "adam_threads=1"]
    assert main(["resume", str(tmp_path / "out"), *changed]) == 0, capsys.readouterr().err
    check(tmp_path, plain)
    assert main(["resume", str(tmp_path / "out")]) == 2
    assert "is complete" in capsys.readouterr().err


def test_an_error_of_the_users_own_tells_the_step_that_stands(inputs, tmp_path, capsys, monkeypatch, plain):
    def fails() -> None:
        raise LookupError("not mine")

    stop_after(monkeypatch, 3, fails)
    assert main(job(inputs, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "Step 3 is complete" in said and "LookupError: not mine" in said
    monkeypatch.undo()
    assert main(["resume", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    check(tmp_path, plain)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_a_killed_job_goes_on(inputs, tmp_path, capsys, plain, seed):
    """kill -9 once so many lines of metrics are there; what resumes may be killed too."""
    command, lines = job(inputs, tmp_path), 2 + seed % 3
    metrics = tmp_path / "out" / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-m", "fuyou", *command], stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= lines):
            time.sleep(0.002)
        process.kill()
    if (tmp_path / "out" / "report.json").exists():
        pytest.skip("it was through before it could be killed")
    with metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # a line that was torn
    again = main(job(inputs, tmp_path / "other", nvme=str(tmp_path / "nvme")))
    said = capsys.readouterr().err
    resumable = "that did not end in order" in said
    assert again == (2 if resumable else 0)
    if resumable:
        assert main(["resume", str(tmp_path / "out")]) == 0, capsys.readouterr().err
        check(tmp_path, plain)


def test_checkpoints_are_saved_and_the_oldest_go(inputs, tmp_path, capsys, monkeypatch, plain):
    stop_after(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(job(inputs, tmp_path, save_every=1, save_total_limit=2)) == 143, capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-3", "step-4"]
    monkeypatch.undo()
    for path in (tmp_path / "nvme" / "fuyou-store").iterdir():  # the drive is lost
        path.unlink()
    capsys.readouterr()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "nvme").rename(tmp_path / "gone")
    assert main(["resume", str(tmp_path / "out"), "--set", f"nvme={tmp_path}/elsewhere"]) == 0, capsys.readouterr().err
    check(tmp_path, plain)
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step-4", "step-5"]


def test_export_writes_what_training_would_have(inputs, tmp_path, capsys, monkeypatch, plain):
    stop_after(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(job(inputs, tmp_path, save_every=3)) == 130
    monkeypatch.undo()
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "third")]) == 0, capsys.readouterr().err
    assert "weights of step 3" in capsys.readouterr().out
    assert main(["resume", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    check(tmp_path, plain)
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "fifth")]) == 0
    assert weights(tmp_path / "fifth", plain[0]) == [] and weights(tmp_path / "third", plain[0]) != []
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert {path.name for path in (tmp_path / "fifth").iterdir()} == names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resume", "missing"], "missing holds no run"),
        (["export", "missing", "out"], "missing holds no run"),
        (
            ["resume", "out", "--set", "precision=bf16"],
            r"--set precision=bf16: a run goes on with the precision.*\(fp32\)",
        ),
        (["resume", "out", "--set", "seed=7"], r"with the seed that it began with \(5\)"),
        (["resume", "out", "--set", "data=other.txt"], "with the data that it began with"),
        (["resume", "out", "--set", "rma=1GiB"], "did you mean 'ram'"),
        (["resume", "out"], "has no complete step and no checkpoint"),
        (["export", "out", "there"], "has no complete step and no checkpoint"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(inputs, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    path = jobs.write_job(inputs, tmp_path, **jobs.SETTINGS, nvme=None)
    (tmp_path / "out" / "config.yaml").write_text(path.read_text())
    assert main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)


def test_a_second_signal_ends_the_job_at_once(inputs, tmp_path, plain):
    """In a process of its own, whose first step never ends."""
    script = f"""
import os, signal, threading, time
import fuyou.train.loop as loop
from fuyou.cli import main
def never(*arguments):
    print("in a step", flush=True)
    while True:
        time.sleep(0.01)
loop.accumulate = never
main({job(inputs, tmp_path)!r})
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "in a step\n"
        process.send_signal(signal.SIGTERM)
        for line in process.stderr:
            if "finished first" in line:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143


def test_what_was_killed_is_discarded_only_when_asked_to(inputs, tmp_path, capsys, monkeypatch):
    stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main(job(inputs, tmp_path)) == 143
    monkeypatch.undo()
    other = job(inputs, tmp_path / "other", nvme=str(tmp_path / "nvme"))
    capsys.readouterr()
    assert main(other) == 2
    assert re.search("holds step 2 .*did not end in order", capsys.readouterr().err)
    assert main([*other, "--discard"]) == 0
    assert json.loads((tmp_path / "other" / "out" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 5
