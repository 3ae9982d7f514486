"""`fuyou train`: its configuration, its schedules, and a whole job equal to a plain PyTorch loop, bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jobs
import pytest
import torch
import yaml
from jobs import metrics_of

from fuyou.cli import main
from fuyou.core.errors import BudgetError, ConfigError
from fuyou.train.config import TrainConfig, read_config
from fuyou.train.loop import row_order, step_count
from fuyou.train.output import Metrics, opened_output
from fuyou.train.schedule import learning_rate_factor


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small only make threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REQUIRED = {"model": "m", "data": "d.txt", "output": "o", "nvme": "n"}


def config_file(folder: Path, text: str = "", **values: object) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**REQUIRED, **values}) + text)
    return str(path)


# --- configuration ------------------------------------------------------------------------------------------------


def test_defaults_then_file_then_set(tmp_path):
    path = config_file(tmp_path, "learning_rate: 1e-4\nsteps: 1e3\n", batch_size=4, betas=[0.8, 0.9])
    config = read_config(path, ["batch_size=8", "eps=1E-6", "ram=48GiB", "nvme=[a, b]", "schedule=linear"])
    assert (config.learning_rate, config.steps, config.batch_size, config.eps) == (1e-4, 1000, 8, 1e-6)
    assert (config.accumulation, config.betas, config.ram, config.nvme) == (1, (0.8, 0.9), "48GiB", ["a", "b"])
    assert isinstance(config.steps, int) and config.epochs is None
    assert config.data == ["d.txt"] and config.schedule == "linear"
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert read_config(resolved) == config
    assert list(yaml.safe_load(config.to_yaml())) == list(TrainConfig.model_fields)


def test_one_epoch_unless_said_otherwise(tmp_path):
    assert read_config(config_file(tmp_path)).epochs == 1
    assert read_config(config_file(tmp_path), ["steps=3"]).epochs is None
    config = read_config(config_file(tmp_path), ["epochs=1.5", "batch_size=2", "accumulation=2"])
    assert step_count(config, 10) == 4  # 15 rows, 4 a step
    order = row_order(10, seed=3)
    first, second = [[next(order) for _ in range(10)] for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("learning_rat=1", "did you mean 'learning_rate'"),
        ("learning_rate=fast", "learning_rate='fast'"),
        ("learning_rate=0", "greater than 0"),
        ("learning_rate=.inf", "finite"),
        ("learning_rate=.nan", "finite|greater"),
        ("steps=1.5", "integer"),
        ("steps=yes", "not numbers"),
        ("batch_size=0", "greater than or equal to 1"),
        ("betas=[0.9]", "betas"),
        ("betas=[0.9, 1]", "less than 1"),
        ("schedule=cosin", "'cosine', 'linear' or 'constant'"),
        ("eval_share=1", "less than 1"),
        ("data=[]", "data="),
        ("model=", "model=None"),
        ("ram=12XB", "ram='12XB' is not a size"),
        ("io=posix", "io='posix'"),
        ("precision=fp16", "precision='fp16'"),
        ("activations=host", "not built yet"),
        ("durability=step", "not built yet"),
        ("micro_batch=2", "not built yet"),
        ("verify_reads=true", "not built yet"),
        ("save_every=10", "save_every=10 is not built yet"),
        ("save_total_limit=1", "not built yet"),
        ("report_to=wandbb", "did you mean .wandb"),
        ("steps", "not key=value"),
        ("=3", "not key=value"),
        ("betas=[0.9", "does not parse"),
    ],
)
def test_refused_with_words(tmp_path, setting, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        read_config(config_file(tmp_path), [setting])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'model' is missing"),
        ("- a\n", "holds a list"),
        ("model: [\n", "not YAML"),
        ("model: a\ndata: b\nmodel: c\n", "'model' stands twice, again in line 3"),
        ("model: a\ndata: b\noutput: c\n", "'nvme' is missing"),
        ("1: 2\n", "unknown key 1"),
    ],
)
def test_a_bad_file_is_refused_with_words(tmp_path, text, reason):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_config(tmp_path / "c.yaml")


def test_steps_and_epochs_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="steps=10 and epochs=2"):
        read_config(config_file(tmp_path, steps=10, epochs=2))
    with pytest.raises(ConfigError, match="warmup_steps=11 is more than steps=10"):
        read_config(config_file(tmp_path, steps=10, warmup_steps=11))


def test_the_example_holds_every_key_with_its_default(tmp_path):
    example = Path(__file__).parent.parent / "examples" / "config.yaml"
    values = yaml.safe_load(example.read_text())
    assert set(values) == set(TrainConfig.model_fields)
    assert read_config(example) == read_config(config_file(tmp_path, **{key: values[key] for key in REQUIRED}))


# --- schedules ----------------------------------------------------------------------------------------------------


def test_schedules_by_their_values():
    assert [learning_rate_factor("constant", 4, 10)(k) for k in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate_factor("linear", 0, 4)(k) for k in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    cosine = [learning_rate_factor("cosine", 2, 6)(k) for k in range(7)]
    assert cosine[:3] == [0.5, 1, 1] and cosine[4] == pytest.approx(0.5) and cosine[6] == pytest.approx(0)
    assert cosine[3] == pytest.approx((1 + math.sqrt(0.5)) / 2)


# --- a whole job --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return jobs.make_inputs(tmp_path_factory.mktemp("inputs"))


def job(inputs: Path, folder: Path, **settings: object) -> list[str]:
    return ["train", str(jobs.write_job(inputs, folder, **{**jobs.SETTINGS, **settings}))]


@pytest.mark.parametrize(("precision", "max_grad_norm"), [("fp32", 0.5), ("fp32", 0), ("bf16", 0.5)])
def test_a_job_equals_a_plain_loop(inputs, tmp_path, capsys, precision, max_grad_norm):
    import transformers

    settings = {"precision": precision, "max_grad_norm": max_grad_norm, "ram": "512KiB"}  # so that NVMe is in use
    status = main(job(inputs, tmp_path, **settings))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    plain = jobs.Plain(inputs, precision, max_grad_norm)
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


def test_a_job_without_packing_or_held_out_text(inputs, tmp_path, capsys):
    status = main([*job(inputs, tmp_path, packing=False, eval_share=0), "--set", "eval_every=null", "--set", "steps=1"])
    captured = capsys.readouterr()
    assert status == 2 and "warmup_steps=2" in captured.err
    status = main(["train", str(tmp_path / "c.yaml"), "--set", "steps=2"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    steps, evaluations = metrics_of(tmp_path)
    assert len(steps) == 2 and evaluations == [] and "held-out loss" not in captured.out


def test_a_loss_that_is_not_finite_stops_with_its_step(inputs, tmp_path, capsys):
    status = main(job(inputs, tmp_path, learning_rate=1e20, max_grad_norm=0, warmup_steps=0))
    captured = capsys.readouterr()
    assert status == 1 and "step 2 is nan" in captured.err.replace("inf", "nan")
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out" / "model").exists()


def test_an_output_that_holds_a_run_is_refused(inputs, tmp_path, capsys):
    arguments = job(inputs, tmp_path, steps=1, warmup_steps=0, eval_every=None)
    assert main(arguments) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
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
    config = read_config(config_file(tmp_path))
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
    assert list((tmp_path / "nvme").iterdir()) == []
