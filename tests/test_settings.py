"""The YAML of `fuyou train`: defaults, overrides, refusals; what its steps, epochs and schedules come to."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from fuyou.core.errors import ConfigError
from fuyou.train.config import LoraSettings, TrainConfig, read_config
from fuyou.train.loop import row_batches, step_count
from fuyou.train.schedule import learning_rate_factor

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


def test_the_keys_of_a_run_reach_it(tmp_path):
    """Every option of fuyou.Config that `fuyou train` has under the same name, at a value that is not its default."""
    given = {"precision": "bf16", "activations": "keep", "durability": "checkpoint", "io": "threads"}
    numbers = {"deadline_s": 7.5, "adam_threads": 3}
    core = read_config(config_file(tmp_path, **given, **numbers)).core()
    assert {name: getattr(core, name) for name in given | numbers} == given | numbers


def test_one_epoch_unless_said_otherwise(tmp_path):
    assert read_config(config_file(tmp_path)).epochs == 1
    assert read_config(config_file(tmp_path), ["steps=3"]).epochs is None


@pytest.mark.parametrize(
    ("epochs", "rows", "batch_size", "accumulation", "sizes"),
    [
        ("1", 10, 2, 2, [[2, 2], [2, 2], [2]]),
        ("1.5", 10, 2, 2, [[2, 2], [2, 2], [2, 2], [2, 1]]),
        ("3", 3, 4, 1, [[4], [4], [1]]),
        ("0.07", 100, 2, 2, [[2, 2], [2, 1]]),  # 7 rows, though 0.07 * 100 is a little more in binary
        ("0.01", 10, 1, 4, [[1]]),
        ("2", 4, 2, 2, [[2, 2], [2, 2]]),
    ],
)
def test_epochs_see_every_row_that_often(tmp_path, epochs, rows, batch_size, accumulation, sizes):
    settings = [f"epochs={epochs}", f"batch_size={batch_size}", f"accumulation={accumulation}"]
    config = read_config(config_file(tmp_path), [*settings, "seed=3"])
    steps = list(row_batches(config, rows))
    assert [[len(batch) for batch in step] for step in steps] == sizes
    assert step_count(config, rows) == len(steps)
    seen = [row for step in steps for batch in step for row in batch]
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))  # whole epochs, one after another
    counts = Counter(seen)
    assert max(counts.values()) - min(counts[row] for row in range(rows)) <= 1
    assert list(row_batches(config, rows)) == steps
    if rows > 5:
        other = read_config(config_file(tmp_path), [*settings, "seed=4"])
        assert list(row_batches(other, rows)) != steps


def test_steps_take_whole_batches_on_and_on(tmp_path):
    config = read_config(config_file(tmp_path), ["steps=5", "batch_size=2", "accumulation=3"])
    steps = list(row_batches(config, 5))
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2, 2]] * 5
    assert Counter(row for step in steps for batch in step for row in batch) == dict.fromkeys(range(5), 6)


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
        ("activations=ssd", "activations='ssd'"),
        ("micro_batch=0", "greater than or equal to 1"),
        ("micro_batch=1.5", "integer"),
        ("verify_reads=7", "verify_reads=7"),
        ("save_every=0", "save_every=0 is refused"),
        ("save_total_limit=0", "save_total_limit=0 is refused"),
        ("report_to=wandbb", "did you mean .wandb"),
        ("lora=5", "give a mapping"),
        ("lora=true", "give a mapping"),
        ("lora.rank=8", "lora: unknown key 'rank'"),
        ("lora={alfa: 8}", "did you mean 'alpha'"),
        ("lora.r=0", "lora.r=0 is refused"),
        ("lora.dropout=1", "lora.dropout=1 is refused"),
        ("lora.target_modules=[]", "lora.target_modules"),
        ("lora.target_modules=7", "a list of names, or all-linear"),
        ("lora.merge=maybe", "lora.merge='maybe'"),
        ("lora.r.x=1", "unknown key 'r.x'"),
        ("steps.x=1", "unknown key 'steps.x'"),
        ("packing=sometimes", "true, false or stream"),
        ("nonfinite=ignore", "'stop' or 'skip'"),
        ("loss=whole", "'chunked' or 'model'"),
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


def test_lora_is_a_mapping_in_a_flat_file(tmp_path):
    path = config_file(tmp_path, lora={"r": 4, "dropout": 0})
    assert read_config(config_file(tmp_path)).lora is None
    path = config_file(tmp_path, lora={"r": 4, "dropout": 0})
    lora = read_config(path, ["lora.alpha=8", "lora.target_modules=q_proj"]).lora
    assert (lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.merge) == (4, 8, 0, ["q_proj"], False)
    lora = read_config(path, ["lora={alpha: 2}", "lora.r=9"]).lora
    assert (lora.r, lora.alpha, lora.dropout) == (9, 2, 0.05)
    assert read_config(path, ["lora=null"]).lora is None
    assert read_config(path, ["lora={}"]).lora == LoraSettings()
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(read_config(path).to_yaml())
    assert read_config(resolved) == read_config(path)


def test_steps_and_epochs_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="steps=10 and epochs=2"):
        read_config(config_file(tmp_path, steps=10, epochs=2))
    for settings in (["steps=10", "epochs=2"], ["epochs=2", "steps=10"]):
        with pytest.raises(ConfigError, match="steps=10 and epochs=2"):
            read_config(config_file(tmp_path), settings)
    config = read_config(config_file(tmp_path, epochs=2), ["steps=10"])  # the command line goes over the file
    assert (config.steps, config.epochs) == (10, None)
    config = read_config(config_file(tmp_path, steps=10), ["epochs=2"])
    assert (config.steps, config.epochs) == (None, 2)
    with pytest.raises(ConfigError, match="steps=10 and epochs=2"):
        read_config(config_file(tmp_path, steps=10, epochs=2), ["steps=null", "epochs=2", "steps=10"])
    with pytest.raises(ConfigError, match="warmup_steps=11 is more than steps=10"):
        read_config(config_file(tmp_path, steps=10, warmup_steps=11))


def test_the_example_holds_every_key_with_its_default(tmp_path):
    example = Path(__file__).parent.parent / "examples" / "config.yaml"
    values = yaml.safe_load(example.read_text())
    assert set(values) == set(TrainConfig.model_fields)
    assert read_config(example) == read_config(config_file(tmp_path, **{key: values[key] for key in REQUIRED}))
    commented = [line[2:] for line in example.read_text().splitlines() if line.startswith(("# lora:", "#   "))]
    lora = yaml.safe_load("\n".join(commented))["lora"]
    assert set(lora) == set(LoraSettings.model_fields) and LoraSettings(**lora) == LoraSettings()


# --- schedules ----------------------------------------------------------------------------------------------------


def test_schedules_by_their_values():
    assert [learning_rate_factor("constant", 4, 10)(k) for k in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [learning_rate_factor("linear", 0, 4)(k) for k in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    cosine = [learning_rate_factor("cosine", 2, 6)(k) for k in range(7)]
    assert cosine[:3] == [0.5, 1, 1] and cosine[4] == pytest.approx(0.5) and cosine[6] == pytest.approx(0)
    assert cosine[3] == pytest.approx((1 + math.sqrt(0.5)) / 2)
