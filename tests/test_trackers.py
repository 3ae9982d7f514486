"""Trackers, each with its real library and offline: what they wrote is read back and is what metrics.jsonl holds."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import jobs
import pytest

from fuyou.cli import main
from fuyou.core.errors import BudgetError, ConfigError
from fuyou.train import trackers
from fuyou.train.config import read_config
from fuyou.train.output import opened_output
from fuyou.train.trackers import Trackers

NAMES = ("tensorboard", "trackio", "wandb")
VALUES = ("loss", "lr", "grad_norm", "tokens", "seconds", "skipped", "eval_loss")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """A job's folder, trained with all three; trackio reads its folder when it is imported, so in a process of its own."""
    for name in NAMES:
        pytest.importorskip(name, reason=f"the tracker {name} is tested with its library")
    folder = tmp_path_factory.mktemp("tracked")
    inputs = jobs.make_inputs(tmp_path_factory.mktemp("inputs"))
    path = jobs.write_job(inputs, folder, **{**jobs.SETTINGS, "steps": 3, "report_to": list(NAMES)})
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder), "NETRC": str(folder / "no-netrc")}
    result = subprocess.run(
        [sys.executable, "-m", "fuyou", "train", str(path)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


def expected(folder: Path) -> dict[tuple[str, int], float]:
    """(name, step) → value, of metrics.jsonl; a later line of a step goes over an earlier one, as in the trackers."""
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for line in lines:
        found |= {(name, line["step"]): float(value) for name, value in line.items() if name != "step"}
    assert {name for name, _ in found} == set(VALUES)
    return found


def test_tensorboard_holds_the_metrics(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked / "out" / "tensorboard"))
    events.Reload()
    found = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    single = {key: struct.unpack("f", struct.pack("f", value))[0] for key, value in expected(tracked).items()}
    assert found == single


def test_trackio_holds_the_metrics(tracked):
    database = next((tracked / "trackio").glob("fuyou*.db"))
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics order by id").fetchall()
        config = json.loads(connection.execute("select config from configs").fetchone()[0])
    assert {name for name, _, _ in rows} == {str(tracked / "out")}
    found = {}
    for _, step, metrics in rows:
        found |= {(name, step): value for name, value in json.loads(metrics).items()}
    assert found == expected(tracked)
    assert config["learning_rate"] == 3e-3 and config["seed"] == 5
    assert "rackio" not in (tracked / "stdout").read_text()  # standard output is the job's own


def test_wandb_holds_the_metrics_offline(tracked):
    from wandb.proto import wandb_internal_pb2

    run = next((tracked / "out" / "wandb").glob("offline-run-*"))
    found: dict[tuple[str, int], float] = {}
    project, config = None, {}
    for data in wandb_records(next(run.glob("run-*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            project = record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found |= {(name, items["_step"]): value for name, value in items.items() if not name.startswith("_")}
    assert found == expected(tracked)
    assert project == "fuyou" and config["learning_rate"] == 3e-3


def wandb_records(path: Path) -> list[bytes]:
    """Records of a .wandb file: after 7 bytes, LevelDB's log format, in blocks of 32 KiB."""
    data, records, partial = path.read_bytes(), [], b""
    at = 7
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        piece = data[at + 7 : at + 7 + length]
        at += 7 + length
        partial = piece if kind in (1, 2) else partial + piece  # 1: whole, 2: first, 3: middle, 4: last
        if kind in (1, 4):
            records.append(partial)
    return records


def test_wandb_goes_online_only_when_told_or_logged_in(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not trackers._logged_in_to_wandb()
    (tmp_path / "netrc").write_text("machine elsewhere.example login a password b\n")
    assert not trackers._logged_in_to_wandb()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password b\n")
    assert trackers._logged_in_to_wandb()
    (tmp_path / "netrc").write_text("machine\n")
    assert not trackers._logged_in_to_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "a")
    assert trackers._logged_in_to_wandb()


# --- failing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_tracker_that_fails_is_said_once_and_training_goes_on(tmp_path, capsys, monkeypatch, moment):
    inputs = jobs.make_inputs(tmp_path)
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="the tracker that is broken here")

    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left\non the device")

    name = {"open": "__init__", "log": "add_scalar", "close": "close"}[moment]
    monkeypatch.setattr(tensorboard.SummaryWriter, name, broken)
    settings = {**jobs.SETTINGS, "steps": 3, "report_to": "tensorboard"}
    assert main(["train", str(jobs.write_job(inputs, tmp_path, **settings))]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "tracker tensorboard failed" in line]
    assert len(said) == 1 and "OSError: no space left on the device" in said[0]
    assert len(jobs.metrics_of(tmp_path)[0]) == 3


def test_one_failing_tracker_does_not_silence_another(tmp_path):
    class Counting:
        def __init__(self, output: Path, settings: object) -> None:
            self.seen: list[int] = []

        def log(self, step: int, values: object) -> None:
            self.seen.append(step)
            if step == 2 and self is kept[0]:
                raise RuntimeError("gone")

        def close(self) -> None:
            self.seen.append(-1)

    said: list[str] = []
    both = Trackers([], tmp_path, {}, said.append)
    kept = [Counting(tmp_path, {}), Counting(tmp_path, {})]
    both._open = {"a": kept[0], "b": kept[1]}
    for step in (1, 2, 3):
        both.log(step, {"loss": 1.0})
    both.close()
    both.close()
    assert kept[0].seen == [1, 2] and kept[1].seen == [1, 2, 3, -1] and len(said) == 1


def test_a_run_without_a_step_leaves_no_tracker_files(tmp_path):
    pytest.importorskip("tensorboard", reason="a tracker that writes at once")
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\ndata: d.txt\noutput: {tmp_path / 'out'}\nnvme: null\nreport_to: tensorboard\n")
    config = read_config(path)
    with pytest.raises(BudgetError), opened_output(tmp_path / "out", config):
        assert (tmp_path / "out" / "tensorboard").is_dir()
        raise BudgetError("", tier="device", needed_bytes=2, given_bytes=1)
    assert not (tmp_path / "out").exists()


# --- refused in words ---------------------------------------------------------------------------------------------


def test_names_are_checked_with_the_configuration(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d.txt\noutput: o\nnvme: null\n")
    for setting, reason in (
        ("report_to=tensorbord", "did you mean 'tensorboard'"),
        ("report_to=[wandb, wandb]", "'wandb' twice"),
        ("report_to=7", "report_to=7 is refused"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_config(path, [setting])
    monkeypatch.setattr(sys, "path", [])  # an environment where nothing is installed
    monkeypatch.setattr(sys, "path_importer_cache", {})
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ConfigError, match=rf"pip install 'fuyou\[{name}\]'"):
            read_config(path, [f"report_to={name}"])
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'fuyou\[lora\]'"):
        read_config(path, ["lora={}"])
