"""run.save and run.load: whole or not there, bit for bit, under any budgets, and nothing is trusted that is read."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from drive_tools import file_size_limit
from resuming import Loop, differences, uninterrupted
from test_resume import bf16, resumed

import fuyou
from fuyou.core.errors import ConfigError, StateError, StoreError
from fuyou.core.plain import Decoder, Encoder
from fuyou.tiers.folders import DATA, FOLDER
from fuyou.tiers.records import read_newest

STEPS = 6
PLACES = {
    "on the drive": {"ram": "1MiB"},
    "in memory": {"ram": "64MiB"},
    "without commits": {"ram": "1MiB", "durability": "checkpoint"},
    "without drives": {"ram": "64MiB", "durability": "checkpoint", "nvme": None},
}


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], dict[str, torch.Tensor]]:
    return uninterrupted(STEPS)


def options(place: str, nvme: Path) -> dict:
    return {"nvme": nvme, **PLACES[place]}


@pytest.mark.parametrize("writer", PLACES)
@pytest.mark.parametrize("reader", PLACES)
def test_what_was_saved_is_loaded_and_trained_on_bit_for_bit(nvme, tmp_path, plain, writer, reader):
    loop = Loop()
    with loop.wrapped(**options(writer, nvme)) as run:
        losses = loop.steps(3)
        run.save(tmp_path / "saved")
        saved = loop.state()
        assert loop.steps(1) == plain[0][3:4]  # saving changes nothing
    other = Loop()
    other.model.layers[0][0].weight.data.fill_(7)
    with other.wrapped(**options(reader, nvme), resume=False) as run:
        other.steps(1)  # in between, too: of another step than the saved one
        run.load(tmp_path / "saved")
        assert run.user_state == {"read": 6}
        assert run.committed_step == (3 if run.config.durability != "checkpoint" else 0)
        assert differences(other.state(), saved) == []
        assert losses + other.steps(STEPS - 3) == plain[0]
        assert differences(other.state(), plain[1]) == []


def test_wrap_goes_on_from_a_checkpoint(nvme, tmp_path, plain):
    loop = Loop()
    with loop.wrapped(nvme, ram="64MiB") as run:
        losses = loop.steps(3)
        run.save(tmp_path / "saved")
    more, state = resumed(nvme, STEPS - 3, 3, resume=str(tmp_path / "saved"))
    assert losses + more == plain[0] and differences(state, plain[1]) == []


def test_a_live_store_that_is_of_no_step_is_refused_and_the_newest_checkpoint_is_named(nvme, tmp_path, plain):
    loop = Loop()
    with loop.wrapped(nvme, durability="checkpoint") as run:
        losses = loop.steps(2)
        run.settle()
        shutil.copytree(nvme, tmp_path / "bare")
        run.save(tmp_path / "saved")
        loop.steps(2)
        run.settle()
        shutil.copytree(nvme, tmp_path / "left")  # what a kill leaves
    with pytest.raises(StateError, match="updated in place.*saved no checkpoint.*resume=False"):
        resumed(tmp_path / "bare", 1, 2)
    with pytest.raises(StateError, match=rf"of no single step: Config\(resume='{tmp_path}/saved'\).* of step 2"):
        resumed(tmp_path / "left", 1, 2)
    more, _ = resumed(tmp_path / "left", 2, 2, resume=str(tmp_path / "saved"), durability="checkpoint")
    assert losses + more == plain[0][:4]


def test_a_run_whose_state_is_all_in_memory_has_its_checkpoint_named_too(nvme, tmp_path):
    loop = Loop()
    with loop.wrapped(nvme, ram="64MiB", durability="checkpoint") as run:
        loop.steps(1)
        run.save(tmp_path / "saved")
        shutil.copytree(nvme, tmp_path / "left")  # what a kill leaves: no store is marked, for none was updated
    with pytest.raises(
        StateError, match=rf"committed none.*Config\(resume='{tmp_path}/saved'\).* of step 1.*resume=False"
    ):
        resumed(tmp_path / "left", 1, 2, ram="64MiB", durability="checkpoint")
    for resume in (False, True):  # once it is begun anew there is nothing to go on from
        with Loop().wrapped(tmp_path / "left", resume=resume, ram="64MiB", durability="checkpoint") as run:
            assert run.user_state == {}


def test_a_checkpoint_that_was_saved_is_newer_than_a_step_that_was_moved(nvme, tmp_path, plain):
    """A run that commits nothing goes on from a store that had another layout, and saves, and is killed."""
    loop = Loop()
    with loop.wrapped(nvme):
        losses = loop.steps(2)
    again = Loop()
    with again.wrapped(nvme, resume=True, ram="600KiB", durability="checkpoint") as run:
        losses += again.steps(1)
        run.save(tmp_path / "saved")
        losses += again.steps(1)
        run.settle()
        shutil.copytree(nvme, tmp_path / "left")
    with pytest.raises(StateError, match=rf"Config\(resume='{tmp_path}/saved'\).* of step 3"):
        resumed(tmp_path / "left", 1, 2, durability="checkpoint")
    more, _ = resumed(tmp_path / "left", 2, 3, resume=str(tmp_path / "saved"), durability="checkpoint")
    assert losses[:3] + more == plain[0][:5]


def test_a_checkpoint_is_there_whole_or_not_at_all(nvme, tmp_path):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(1)
        run.settle()  # so that nothing else is written
        for nbytes in (100_000, 300_000):
            with file_size_limit(nbytes), pytest.raises(fuyou.FuyouError, match="File too large"):
                run.save(tmp_path / "saved")
            assert not (tmp_path / "saved").exists() and not list(tmp_path.glob(".saved*"))
        run.save(tmp_path / "saved")
        run.settle()
        before = {path.name: path.read_bytes() for path in (tmp_path / "saved" / FOLDER).iterdir()}
        with pytest.raises(ConfigError, match="exists already"):
            run.save(tmp_path / "saved")
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "saved" / FOLDER).iterdir()}
        record = read_newest([str(tmp_path / "saved")])
        assert record.step == 1 and record.problems == ()
        assert record.entries["nbytes"].sum() == len(before[DATA])
        loop.steps(1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 30))])
def test_a_damaged_checkpoint_changes_nothing(nvme, tmp_path, seed):
    """Bytes changed and files cut: told by the file's name, and the run is what it was."""
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(2)
        run.save(tmp_path / "saved")
        loop.steps(1)
        run.settle()
        before, draw, refused = loop.state(), random.Random(seed), 0
        for _ in range(25):
            shutil.rmtree(tmp_path / "again", ignore_errors=True)
            shutil.copytree(tmp_path / "saved", tmp_path / "again")
            path = draw.choice(
                sorted((tmp_path / "again" / FOLDER).iterdir()) + [tmp_path / "again" / FOLDER / DATA] * 4
            )
            size = path.stat().st_size
            if size and draw.random() < 0.8:
                place = draw.randrange(size)
                content = bytearray(path.read_bytes())
                content[place] ^= 1 << draw.randrange(8)
                path.write_bytes(content)
            else:
                os.truncate(path, draw.randrange(size + 1))
            try:
                run.load(tmp_path / "again")
            except StoreError:
                refused += 1
                assert differences(loop.state(), before) == []
            else:
                assert path.name != DATA or not size
                run.load(tmp_path / "saved")
                loop.steps(1)
                before = loop.state()
        assert refused > 5


def test_another_model_is_refused_and_changes_nothing(nvme, tmp_path):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(1)
        run.save(tmp_path / "saved")
    other = Loop()
    bf16(other)
    with other.wrapped(nvme, resume=False) as run:
        with pytest.raises(ConfigError, match="in float32, and this run has bfloat16"):
            run.load(tmp_path / "saved")
        with pytest.raises(StoreError, match="no checkpoint in"):
            run.load(tmp_path)
        other.steps(1)


def rewritten(saved: Path, change) -> None:
    """The record with another payload, and right checksums: what somebody may have written on purpose."""
    for copy in "ab":
        path = saved / FOLDER / f"commit-0-{copy}"
        data = path.read_bytes()
        fields = list(struct.unpack_from("<8sIIQQ16sIIQI", data))
        start, end = 72 + 20 * fields[2], 72 + 20 * fields[2] + fields[6]
        payload = json.loads(data[start:end])
        change(payload)
        body = data[72:start] + json.dumps(payload).encode()
        fields[6], fields[9] = len(body) - 20 * fields[2], zlib.crc32(body)
        head = struct.pack("<8sIIQQ16sIIQI", *fields)
        path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + body)


FORGED = {
    "no blobs": lambda payload: payload.pop("blobs"),
    "blob beyond": lambda payload: payload["blobs"]["manifest"].__setitem__(0, 1 << 40),
    "blob of others": lambda payload: payload["blobs"].__setitem__("manifest", [10, [0]]),
    "blob of none": lambda payload: payload["blobs"]["manifest"].__setitem__(1, [999]),
    "blob twice": lambda payload: payload["blobs"]["manifest"].__setitem__(1, payload["blobs"]["manifest"][1] * 2),
    "no steps": lambda payload: payload.pop("steps"),
    "few steps": lambda payload: payload.__setitem__("steps", [[1, 2]]),
    "tensor of another size": lambda payload: payload["rng"].__setitem__("torch", {"$tensor": ["uint8", [9], ""]}),
    "tensor far away": lambda payload: payload["buffers"].__setitem__("seen", {"$tensor": ["int64", [5000], 1 << 50]}),
    "tensor before": lambda payload: payload["buffers"].__setitem__("seen", {"$tensor": ["int64", [5000], -64]}),
    "tensor without end": lambda payload: payload["buffers"].__setitem__("seen", {"$tensor": ["int64", [1 << 60], 0]}),
    "unknown": lambda payload: payload["rng"].__setitem__("torch", {"$pickle": "gASV"}),
    "user state": lambda payload: payload.__setitem__("user_state", [1]),
}


@pytest.mark.parametrize("what", FORGED)
def test_what_has_its_checksums_and_is_impossible_is_refused_in_words(nvme, tmp_path, what):
    loop = Loop()
    with loop.wrapped(nvme) as run:
        loop.steps(1)
        run.save(tmp_path / "saved")
        run.settle()
        rewritten(tmp_path / "saved", FORGED[what])
        with pytest.raises(StoreError, match="was not written by fuyou|does not say|have no|are not those"):
            run.load(tmp_path / "saved")


def test_values_come_back_from_json_as_they_were():
    from collections import Counter

    import numpy as np

    value = {
        "plain": [1, -2.5, "ü", None, True, 1e-300, 2**70],
        "float": [float("inf"), float("-inf")],
        "tuple": (1, (2, [3])),
        "keys": {1: "a", (2, 3): "b", "$x": "c"},
        "counter": Counter({4: 2, 1: 1}),
        "bytes": b"\0\xff",
        "numpy": np.arange(6, dtype=np.uint32).reshape(2, 3),
        "scalar": np.int64(5),
    }
    tensors = [
        torch.randn(3, 4),
        torch.arange(5000),
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.randn(70, 70).bfloat16().T,
    ]
    encoder = Encoder()
    text = json.dumps(encoder.encode({"value": value, "tensors": tensors}, "x"), allow_nan=False)
    beside = bytearray(encoder.nbytes)
    for offset, flat in encoder.beside:
        beside[offset : offset + flat.numel()] = flat.numpy().tobytes()
    assert len(encoder.beside) == 2
    found = Decoder(lambda offset, nbytes: bytes(beside[offset : offset + nbytes])).decode(json.loads(text))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["tensors"], tensors, strict=True))
    got, numpy = found["value"], found["value"].pop("numpy")
    assert np.array_equal(numpy, value["numpy"]) and numpy.dtype == np.uint32
    del value["numpy"]
    assert got == value and type(got["counter"]) is Counter and type(got["tuple"]) is tuple
