"""`fuyou verify`: exact where fuyou is, wrong with the parameter's name where a gradient is spoiled, and no file left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import SETTINGS, Plain, make_inputs, write_job

from fuyou.cli import main
from fuyou.core.errors import BudgetError
from fuyou.train import verify
from fuyou.train.comparing import difference, moved_square, verdict, worst_first
from fuyou.train.plain import limited_activations

SPOILED = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def job(inputs, tmp_path) -> Path:
    """A job whose nvme folder holds a file of a run's, and whose output folder is filled."""
    path = write_job(inputs, tmp_path, ram="2MiB", gpu="96MiB", device="cpu", **SETTINGS)
    (tmp_path / "nvme" / "fuyou-store").mkdir()
    (tmp_path / "nvme" / "fuyou-store" / "data").write_text("a run's")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("a run's")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def answer(capsys, *arguments: str, status: int = 0) -> dict:
    capsys.readouterr()
    assert main(["verify", *arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_exact_and_nothing_is_left(job, inputs, tmp_path, capsys, precision) -> None:
    """And the plain side is plain: its losses are those of a loop that knows nothing of it."""
    before = contents(tmp_path)
    found = answer(capsys, str(job), "--steps", "9", "--set", f"precision={precision}")
    assert found["verdict"] == "exact" and found["differences"] == [] and found["gradients"] == []
    assert contents(tmp_path) == before
    assert (found["steps"], found["layers"], found["layers_of_model"]) == (5, 2, 2)  # the job has no more
    losses = [loss for _, loss, _, _ in Plain(inputs, precision, 0.5, "chunked").train()[0]]
    assert found["plain_losses"] == found["fuyou_losses"] == losses


def test_by_model_and_data_with_a_table(inputs, tmp_path, capsys) -> None:
    arguments = ["--model", str(inputs / "m"), "--data", str(inputs / "d.txt"), "--steps", "1"]
    options = ["sequence_length=32", "device=cpu", "ram=64MiB", "gpu=256MiB", "lora={r: 2, dropout: 0.1}"]
    if not has_peft():
        options.pop()
    assert main(["verify", *arguments, *(word for each in options for word in ("--set", each))]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("verify      exact: ") and all(len(line) <= 120 for line in shown.splitlines())


def has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_spoiled_gradient_is_wrong_and_named(job, tmp_path, capsys, monkeypatch) -> None:
    """Twice a gradient is nearly the same step for Adam: bits tell, and the gradient itself."""
    real = verify.wrapped

    def spoiling(*arguments):
        run = real(*arguments)
        run.model.get_parameter(SPOILED).register_hook(lambda gradient: 2 * gradient)
        return run

    monkeypatch.setattr(verify, "wrapped", spoiling)
    before = contents(tmp_path)
    found = answer(capsys, str(job), "--steps", "2", status=1)
    assert found["verdict"] == "wrong" and SPOILED in [each["name"] for each in found["differences"]]
    (gradient,) = found["gradients"]
    assert gradient["name"] == SPOILED
    assert gradient["fuyou_norm"] == pytest.approx(2 * gradient["plain_norm"])
    assert contents(tmp_path) == before
    assert main(["verify", str(job), "--steps", "1"]) == 1
    shown = capsys.readouterr().out
    assert "wrong" in shown.splitlines()[0] and f"the gradient of {SPOILED} is wrong" in " ".join(shown.split())


def test_fewer_layers_where_plain_pytorch_has_no_room_for_all(job, capsys, monkeypatch) -> None:
    parameters = 2 * 400 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    one_less = parameters - (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)
    monkeypatch.setattr(verify, "ACTIVATION_SHARE", 1000.0)
    real = verify.free_host_bytes
    monkeypatch.setattr(verify, "free_host_bytes", lambda: 24 * (parameters - 1) / verify.STATE_SHARE)
    found = answer(capsys, str(job), "--steps", "2")
    assert (found["verdict"], found["layers"], found["layers_of_model"]) == ("exact", 1, 2)
    assert found["parameters"] == one_less
    monkeypatch.setattr(verify, "free_host_bytes", lambda: 24 * (one_less - 1) / verify.STATE_SHARE)
    assert main(["verify", str(job)]) == 2
    assert "cannot train even one of the 2 layers" in capsys.readouterr().err
    monkeypatch.setattr(verify, "free_host_bytes", real)
    assert answer(capsys, str(job), "--steps", "1", "--layers", "1")["layers"] == 1


def test_slices_of_a_batch_are_within_tolerance(job, capsys) -> None:
    found = answer(capsys, str(job), "--steps", "3", "--set", "micro_batch=1")
    assert found["verdict"] in ("exact", "within tolerance")
    assert all(each["relative"] <= found["tolerance"] for each in found["differences"])


def test_activations_beyond_the_limit_are_refused_in_words(job, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(verify, "ACTIVATION_SHARE", 0.0)
    before = contents(tmp_path)
    assert main(["verify", str(job)]) == 2
    assert "--set batch_size=1" in capsys.readouterr().err and contents(tmp_path) == before


def test_saved_activations_are_counted_once_and_let_go() -> None:
    """Of x.exp().exp() backward needs both results, 4 MB each; views of one share it, weights are not counted."""
    layer = torch.nn.Linear(8, 8)
    x = torch.zeros(1000, 1000, requires_grad=True)
    with limited_activations(layer, 9 * 10**6, "host"):
        for _ in range(5):  # each graph is gone before the next
            y = x.exp()
            (y.t() * y).sum().backward()
            layer(torch.zeros(1, 8)).sum().backward()
    with pytest.raises(BudgetError, match="activations") as refused, limited_activations(layer, 9 * 10**6, "host"):
        x.exp().exp().exp().sum()
    assert refused.value.needed_bytes == 12 * 10**6


# --- the comparison, against numpy ------------------------------------------------------------------------------------


def test_a_difference_is_numpys() -> None:
    random = np.random.default_rng(0)
    start, plain = random.normal(size=(2, 5, 7)).astype(np.float32)
    other = plain.copy()
    other[2, 3] += 0.5
    other[4, 6] -= 0.25
    found = difference(
        "w", torch.tensor(plain), torch.tensor(other), moved_square(torch.tensor(start), torch.tensor(plain))
    )
    gap = other.astype(np.float64) - plain
    assert (found.count, found.differing_count) == (35, 2) and found.largest == np.abs(gap).max()
    moved = plain.astype(np.float64) - start
    assert found.relative == pytest.approx(np.sqrt((gap**2).sum() / (moved**2).sum()))
    assert worst_first([difference("v", torch.tensor(plain), torch.tensor(plain), 1.0), found]) == [found]


def test_nan_and_what_has_not_moved() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert difference("w", nan, nan.clone(), 1.0).differing_count == 0
    assert difference("w", nan, one, 1.0).relative == float("inf") == difference("w", one, nan, 1.0).largest
    assert difference("w", one, one + 1, 0.0).relative == float("inf")


def test_the_verdict() -> None:
    one = torch.ones(4)
    same, near, far = (difference("w", one, one + gap, 1.0) for gap in (0.0, 1e-3, 1.0))
    assert verdict([same], True, True) == verdict([same], True, False) == "exact"
    assert verdict([same], False, True) == "wrong" and verdict([same], False, False) == "within tolerance"
    assert verdict([same, near], True, True) == "wrong" and verdict([same, near], True, False) == "within tolerance"
    assert verdict([same, far], True, False) == "wrong"
