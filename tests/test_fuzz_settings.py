"""What people and earlier runs wrote: configurations, hardware files, metrics, what is remembered beside a store. Errors of our
own only; what is merely remembered is found out again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import COUNTS, DEEP, JSON, changed, fuzz, little_memory, spoilt
from hypothesis import strategies as st

from fuyou.core.errors import ConfigError
from fuyou.core.sizes import parse_bytes
from fuyou.plan.machine import FOLDER, load_machine, shipped
from fuyou.runtime.placing import Decided, Plan
from fuyou.runtime.remembered import FILE, Remembered
from fuyou.swap.placement import Placement
from fuyou.tiers.io import tuning
from fuyou.train.config import read_config
from fuyou.train.resume import cut_metrics

HARDWARE = json.loads((FOLDER / f"{shipped()[0]}.json").read_text())


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return texts.map(lambda text: text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("count", COUNTS)
def test_hardware_files(place, count):
    path = place / "machine.json"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        machine = load_machine(str(path))
        assert 0 < machine.flops_per_s < math.inf and machine.device_bytes > 0 and machine.cores >= 1
        assert all(each.capacity_bytes > 0 for each in machine.drives)

    texts = changed(HARDWARE).map(json.dumps) | JSON.map(json.dumps) | st.sampled_from(DEEP)
    fuzz(check, encoded(texts) | spoilt(json.dumps(HARDWARE).encode()), count)


@pytest.mark.parametrize(
    ("key", "value"), [("flops_per_s", 10**400), ("host_bytes", "9" * 5000), ("host_bytes", f"{'9' * 400}.5TiB")]
)
def test_numbers_beyond_all_machines_are_refused(place, key, value):
    (place / "machine.json").write_text(json.dumps(HARDWARE | {key: value}))
    with pytest.raises(ConfigError, match=key):
        load_machine(str(place / "machine.json"))


def test_a_machine_of_a_thousand_million_drives_is_refused(place):
    drive = {"count": 10**9, "read_bytes_per_s": 1, "write_bytes_per_s": 1, "capacity_bytes": 1}
    (place / "machine.json").write_text(json.dumps(HARDWARE | {"drives": [drive]}))
    with little_memory(), pytest.raises(ConfigError, match="count"):
        load_machine(str(place / "machine.json"))


@pytest.mark.parametrize("count", COUNTS)
def test_sizes(count):
    digits = st.from_regex(r"\s*[0-9]{0,30}\.?[0-9]{0,9}\s*[kmgtKMGT]?i?[bB]?\s*", fullmatch=True)
    fuzz(
        lambda value: parse_bytes(value, "x"), digits | JSON | st.sampled_from(["9" * 5000, "9" * 400 + ".1TB"]), count
    )


CONFIG = {
    "model": "m", "data": ["a.jsonl"], "output": "out", "nvme": ["/a", "/b"], "ram": "1GiB", "steps": 3, "learning_rate": 1e-4,
    "lora": {"r": 8, "target_modules": ["q"]}, "packing": True, "betas": [0.9, 0.99], "report_to": [], "durability": None,
}  # fmt: skip
YAML = (
    "? [a]\n: 1\n", "? {a: 1}\n: 1\n", "a: 2001-99-99\n", "a: !!int x\n", "a: !!int\n", "a: 0x_\n", "a: 1_:9\n", "- &a [*a]\n",
    "a: &a {b: *a}\n", "<<: 1\n", "a: !!python/object:os.system x\n", "a: !!binary x\n", "!!set {a}\n", "\0", "a: .inf\n",
    "a: 1e999\n", "a: !!bool x\n", "model: &a [*a]\ndata: d\noutput: o\nnvme: null\n", "a: !!timestamp x\n", "a: !!omap x\n",
    DEEP[2],
)  # fmt: skip
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("count", COUNTS)
def test_configurations(place, count):
    path = place / "config.yaml"
    whole = yaml.safe_dump(CONFIG).encode()

    def check(value: tuple[bytes, list[str]]) -> None:
        path.write_bytes(value[0])
        config = read_config(path, value[1])
        assert config.model and config.data and config.steps is None or config.steps >= 1

    texts = st.sampled_from(YAML) | changed(CONFIG).map(json.dumps) | st.text(max_size=30)
    overrides = st.lists(
        st.sampled_from(["steps=3", "lora.r=2", "lora=[", "x", "=", "steps=", *(f"ram={each}" for each in YAML)]),
        max_size=2,
    )
    fuzz(check, st.tuples(encoded(texts) | spoilt(whole), overrides), count)


@pytest.mark.parametrize("where", ["model", "nvme", "ram", "lora", "unknown"])
def test_a_message_about_a_configuration_is_short(place, where):
    """Of nine levels of lists of nine of the level below, which are all one in memory."""
    keys = {"data": "x", "output": "y", "nvme": "null", "model": "m"}
    keys.pop(where, None)
    lists = LAUGHS.replace("a: ", f"{where}:\n- ", 1)
    for name in "bcdefghi":
        lists = lists.replace(f"\n{name}: ", "\n- ")
    (place / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()) + lists)
    with little_memory(), pytest.raises(ConfigError, match=where) as told:
        read_config(place / "config.yaml")
    assert len(str(told.value)) < 3000


@pytest.mark.parametrize("text", YAML)
def test_what_is_no_configuration_is_refused_in_words(place, text):
    (place / "config.yaml").write_text(text)
    with pytest.raises(ConfigError):
        read_config(place / "config.yaml")
    with pytest.raises(ConfigError):
        read_config(place / "config.yaml", [f"ram={text}"])


METRICS = b"".join(
    json.dumps({"step": step, "loss": 1.5, **more}).encode() + b"\n"
    for step, more in [(1, {}), (2, {}), (2, {"eval_loss": 2.0}), (3, {})]
)


@pytest.mark.parametrize("count", COUNTS)
def test_metrics_are_cut_back(place, count):
    path = place / "metrics.jsonl"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        cut_metrics(path, 2)
        kept = path.read_bytes().splitlines(keepends=True)
        assert all(line in data and json.loads(line)["step"] <= 2 for line in kept)
        whole = set(METRICS.splitlines(keepends=True)[:2])
        assert {line for line in data.split(b"\n") if line + b"\n" in whole} <= {
            line[:-1] for line in kept
        } or not data.endswith(b"\n")

    lines = st.lists(encoded(JSON.map(json.dumps) | st.sampled_from(DEEP)), max_size=3).map(b"\n".join)
    fuzz(check, spoilt(METRICS) | lines, count)


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b'{"step": "1"}', b"{}", b"7", b'{"step": 1'])
def test_a_line_that_is_no_metric_goes(place, line):
    path = place / "metrics.jsonl"
    path.write_bytes(METRICS + line + b"\n")
    cut_metrics(path, 2)
    assert path.read_bytes() == b"".join(METRICS.splitlines(keepends=True)[:2])


KEY = {"model": "m", "ram": 5}
DECIDED = Decided(
    Plan(
        "keep",
        {0: Placement("keep", "device", ()), 2: Placement("recompute", "host", ((3, "nvme"),))},
        1.5,
        "words",
        {"host": 7},
    ),
    {0: 5, 2: 0},
)


@pytest.mark.parametrize("count", COUNTS)
def test_remembered_plans(place, count):
    memory = Remembered(str(place), KEY)
    memory.remember(4, DECIDED)
    assert memory.recall(4) == DECIDED
    whole = json.loads((place / FILE).read_text())

    def check(text: bytes) -> None:
        (place / FILE).write_bytes(text)
        found = memory.recall(4)
        if found is not None:
            assert 0 <= found.plan.seconds < 1e9 and all(nbytes >= 0 for nbytes in found.saved_bytes.values())
            assert all(index >= 0 for index in (*found.plan.placements, *found.saved_bytes))
        memory.remember(8, DECIDED)
        assert memory.recall(8) == DECIDED

    plans = changed(whole["plans"]).map(lambda plans: {**whole, "plans": plans}) | changed(whole)
    fuzz(
        check,
        encoded(plans.map(json.dumps) | JSON.map(json.dumps) | st.sampled_from(DEEP))
        | spoilt(json.dumps(whole).encode()),
        count,
    )


@pytest.mark.parametrize("plans", [5, None, [1], {"4": 5}, {"4": {"seconds": 10**400}}])
def test_what_is_no_plan_is_not_remembered(place, plans):
    memory = Remembered(str(place), KEY)
    memory.remember(4, DECIDED)
    whole = json.loads((place / FILE).read_text())
    if isinstance(plans, dict) and isinstance(plans["4"], dict):
        plans["4"] = whole["plans"]["4"] | plans["4"]
    (place / FILE).write_text(json.dumps(whole | {"plans": plans}))
    assert memory.recall(4) is None
    memory.remember(4, DECIDED)
    assert memory.recall(4) == DECIDED


@pytest.mark.parametrize("count", COUNTS)
def test_remembered_tunings(place: Path, count: Any):
    mine = tuning.Tuning(1 << 20, 8, 1 << 26, 1e9, 2e9, 3e9)
    tuning.remember(str(place), "threads", mine)
    whole = json.loads((place / tuning.FILE).read_text())

    def check(text: bytes) -> None:
        (place / tuning.FILE).write_bytes(text)
        found = tuning.remembered(str(place), "threads")
        if found is not None:
            assert (
                found.piece_bytes % 4096 == 0 and 1 <= found.queue_depth <= 256 and 0 <= found.mixed_bytes_per_s < 1e15
            )
        tuning.remember(str(place), "io_uring", mine)
        assert tuning.remembered(str(place), "io_uring") == mine

    texts = changed(whole).map(json.dumps) | JSON.map(json.dumps) | st.sampled_from(DEEP)
    fuzz(check, encoded(texts) | spoilt(json.dumps(whole).encode()), count)
