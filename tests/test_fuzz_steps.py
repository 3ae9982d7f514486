"""What a step is read from, by whoever wrote it: records, layouts, payloads, manifests, values, marks. Errors of our own only."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commit_tools import home
from fuzzing import COUNTS, DEEP, JSON, changed, fuzz, little_memory, spoilt
from hypothesis import strategies as st
from test_records import Made
from torch import nn

from fuyou.core.errors import StateError, StoreError
from fuyou.core.plain import Decoder, Encoder
from fuyou.runtime import recovery
from fuyou.runtime.committing import Committing
from fuyou.runtime.manifest import KINDS, Manifest, SavedTensors, SavedUnit, decode_manifest
from fuyou.runtime.rest import generators
from fuyou.tiers.records import Record, read_newest
from fuyou.tiers.saved import Saved, open_saved

NAMES = ("commit-0-a", "commit-0-b", "commit-1-a", "commit-1-b")


@pytest.fixture
def made(place: Path) -> Made:
    made = Made(place)
    for folder in made.folders[1:]:
        (home(folder) / "home").write_text(made.folders[0])
    return made


def look(folders: list[str]) -> None:
    """All of it: the record, what it says of blobs, the bytes of its extents."""
    record = read_newest(folders)
    assert 0 <= record.number < 2**64 and record.checksum in ("crc32c", "crc32")
    saved = open_saved(folders)
    if saved is None:
        return
    try:
        for extent in record.entries["extent"][:4]:
            buffer = bytearray(min(saved.nbytes(int(extent)), 1 << 16))
            saved.read(int(extent), 0, memoryview(buffer))
        for name in ("manifest", "buffers"):
            saved.blob(name)
    finally:
        saved.close()


@pytest.mark.parametrize("count", COUNTS)
def test_records_of_any_bytes(made, count):
    made.put("commit-1-a", "commit-1-b")
    whole = made.record()

    def check(value: tuple[bytes, str]) -> None:
        for name in NAMES:
            (home(made.folders[0]) / name).write_bytes(value[0] if name == value[1] else b"")
        look(made.folders)

    fuzz(check, st.tuples(spoilt(whole), st.sampled_from(NAMES)), count)


U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ENTRIES = st.lists(
    st.tuples(st.sampled_from([0, 4096, 3 * 4096]) | U64, st.integers(0, 3) | U32, U32, st.integers(0, 2) | U32),
    max_size=5,
)
PAGES = st.integers(0, 8).map(lambda pages: pages * 4096)
PARTS = st.lists(
    st.tuples(
        st.integers(0, 3) | U32, st.integers(0, 2) | st.integers(0, 65535), st.integers(0, 2) | st.integers(0, 65535),
        PAGES | U64, PAGES | U64,
    ),
    max_size=6,
)  # fmt: skip
PAYLOAD = {"step": 1, "folders": ["", ""], "blobs": {"manifest": [9, [0]], "buffers": [4096, [2]]}, "rng": [1, 2]}


@pytest.mark.parametrize("count", COUNTS)
def test_records_and_layouts_that_have_their_checksums(made, count):
    """Each field is anything; the payload too, as JSON or as bytes."""
    right = made.entries, made.parts
    payloads = (changed(PAYLOAD) | JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)

    def check(value: tuple[Any, ...]) -> None:
        made.entries, made.parts, made.payload, made.number, made.step, made.name, made.drives = value
        made.put("commit-0-a", "commit-0-b")
        look(made.folders)

    fuzz(
        check,
        st.tuples(
            st.just(right[0]) | ENTRIES, st.just(right[1]) | PARTS, payloads, U64, U64,
            st.just(b"crc32") | st.binary(max_size=16), st.just(2) | U32,
        ),
        count,
    )  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_layouts_of_any_bytes(made, count):
    made.put("commit-1-a", "commit-1-b")

    def check(data: bytes) -> None:
        made.layout = lambda: data  # type: ignore[method-assign]
        for copy in "ab":
            (home(made.folders[0]) / f"commit-1-{copy}").write_bytes(made.record())
            (home(made.folders[0]) / f"layout-{copy}").write_bytes(data)
        look(made.folders)

    fuzz(check, spoilt(made.layout()), count)


MANIFEST = Manifest(
    100,
    (
        SavedUnit("float32", 300, {"a": ((10, 20), 0), "b": ((64,), 200)}, {"weights": {0: 5, 1: 6, 2: 9}, "optimizer": {}}),
        SavedUnit("bfloat16", 64, {"c": ((), 0)}, {"weights": {0: 1}, "optimizer": {0: 2}}),
    ),
    {"tied": "a"},
    (("a", "b"), ("c",)),
)  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_manifests(made, count):
    made.put("commit-0-a", "commit-0-b")
    saved = open_saved(made.folders)
    whole = MANIFEST.encode()

    def check(text: bytes) -> None:
        manifest = decode_manifest(text)
        tensors = SavedTensors(saved, manifest)
        for unit in manifest.units:
            assert unit.dtype in ("float32", "bfloat16") and unit.extents.keys() == set(KINDS)
            for name, (shape, start) in unit.members.items():
                assert math.prod(shape) + start <= unit.elements
                assert isinstance(tensors.has_state(name), bool)
                if 0 < math.prod(shape) < 1000:
                    tensors.read(name, "weights", 0, 1, memoryview(bytearray(4)))

    structured = changed(json.loads(whole)).map(lambda value: json.dumps(value).encode())
    fuzz(check, structured | spoilt(whole) | st.sampled_from(DEEP).map(str.encode), count)
    saved.close()


def test_a_manifest_cannot_ask_for_more_memory_than_it_takes():
    document = json.loads(MANIFEST.encode())
    document["units"][0]["weights"] = [[number << 24, 0, 1 << 24] for number in range(1 << 12)]
    with little_memory(), pytest.raises(StoreError, match="was not written by fuyou"):
        decode_manifest(json.dumps(document).encode())


VALUES = {
    "tensor": torch.arange(12).view(3, 4), "tuple": (1, (2,)), "dict": {1: "x", (1, 2): 3.5}, "bytes": b"123",
    "numpy": np.arange(3.0), "infinite": math.inf,
}  # fmt: skip
SPECIAL = st.sampled_from("$tensor $numpy $float $bytes $tuple $dict $counter $pickle $".split())
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 2**31, 2**62, 2**63, 2**70, -1]), max_size=4)
DTYPES, PLACES = st.sampled_from(["float32", "bool", "bfloat16", "object"]), st.sampled_from([0, 64, "", "AAAA"])
TENSORS = st.builds(
    lambda kind, *value: {kind: list(value)}, st.sampled_from(["$tensor", "$numpy"]), DTYPES, SHAPES, PLACES
)
SPECIALS = TENSORS | st.builds(lambda key, value: {key: value}, SPECIAL, JSON)


@pytest.mark.parametrize("count", COUNTS)
def test_values(count):
    whole = json.loads(json.dumps(Encoder().encode(VALUES, "x")))

    def check(value: Any) -> None:
        def beside(offset: int, nbytes: int) -> bytes:
            if not 0 <= nbytes <= 1 << 20:
                raise StoreError("as the reader of blobs says")
            return bytes(nbytes)

        Decoder(beside).decode(value)

    fuzz(check, changed(whole, SPECIALS | JSON) | SPECIALS | JSON | st.sampled_from(DEEP[2:]).map(json.loads), count)


@pytest.mark.parametrize(
    "value",
    [
        *DEEP[2:],
        {"$tensor": ["float32", [0, 1 << 62, 1 << 62], ""]},
        {"$tensor": ["float32", [1 << 70, 0], ""]},
        {"$numpy": ["float32", [0, 1 << 62, 1 << 62], ""]},
        {"$tensor": [[], [1], ""]},
        {"$dict": [[[], 1]]},
        {"$tuple": 5},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_value_is_refused_in_words(value):
    with pytest.raises(StoreError, match="was not written by fuyou"):
        value = {"$tuple": [json.loads(value)]} if isinstance(value, str) else value
        for _ in range(300 if value.keys() == {"$tuple"} else 0):
            value = {"$tuple": [value]}
        Decoder(lambda offset, nbytes: bytes(nbytes)).decode(value)


def test_a_member_of_more_elements_than_there_are_numbers_is_refused():
    document = json.loads(MANIFEST.encode())
    document["units"][0]["members"][0][1] = [1 << 32, 1 << 32]  # 0 in 64 bits
    with pytest.raises(StoreError, match="the place of 'a'"):
        decode_manifest(json.dumps(document).encode())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize("count", COUNTS)
def test_payloads_of_a_run(made, count):
    """Beside weights and optimizer state."""
    made.put("commit-0-a", "commit-0-b")
    record = read_newest(made.folders)
    model, cpu = Normed(), torch.device("cpu")
    names = ("norm.weight", "norm.bias")
    unit = SavedUnit(
        "float32", 128, {name: ((3,), 64 * at) for at, name in enumerate(names)}, {kind: {} for kind in KINDS}
    )
    manifest = Manifest(128, (unit,), {}, ())
    committing = Committing(model, cpu, [], list, lambda: manifest, None, None)
    encoder = Encoder()
    whole = {
        "rng": encoder.encode(generators(cpu), "x"), "user_state": {"read": 1}, "steps": [[1, 2]], "groups": [],
        "registered": {"rows": encoder.encode({"order": torch.arange(3)}, "x")},
        "buffers": {name: encoder.encode(each, "x") for name, each in model.named_buffers()}, "blobs": {},
    }  # fmt: skip

    def read(payload: Any) -> None:
        saved = Saved(made.folders, Record(**{**vars(record), "payload": payload}))
        try:
            committing.read(saved, manifest)
        finally:
            saved.close()

    whole = json.loads(json.dumps(whole))
    read(whole)  # as it is, it is taken
    for name, state in (("python", []), ("python", {"$tuple": [3, {"$tuple": [2**70] * 625}, None]}), ("numpy", [[]]),
                        ("torch", encoder.encode(torch.zeros(5056, dtype=torch.uint8)[:5055], "x"))):  # fmt: skip
        with pytest.raises(StoreError, match="was not written by fuyou"):
            read(whole | {"rng": whole["rng"] | {name: state}})
    payloads = changed(whole, SPECIALS | JSON).filter(lambda value: isinstance(value, dict))
    fuzz(read, payloads, count)


@pytest.mark.parametrize("count", COUNTS)
def test_marks_and_what_is_noted_beside_a_store(place, count):
    folder = place / "drive"
    home(folder).mkdir(parents=True)
    (home(folder) / "dirty").touch()
    texts = JSON.map(json.dumps) | st.text(max_size=40) | st.sampled_from(DEEP)
    notes = changed({"folder": "/saved", "step": 3}).map(json.dumps)

    def check(value: tuple[bytes, bytes]) -> None:
        (home(folder) / "home").write_bytes(value[0])
        (folder / recovery.SAVED).write_bytes(value[1])
        assert open_saved([str(folder)]) is None
        with pytest.raises(StateError):
            recovery._refuse_of_no_step(str(folder))

    data = texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)
    paths = st.text(st.characters(codec="utf-8"), max_size=5000).map(lambda text: b"/" + text.encode())
    fuzz(check, st.tuples(data | paths, data | notes.map(str.encode)), count)


@pytest.mark.parametrize("name", ["fuyou-store/home", recovery.SAVED])
def test_what_is_no_file_is_not_waited_for(place, name):
    """A named pipe that nobody writes to, a device, a link to oneself."""
    home(place).mkdir(parents=True)
    (home(place) / "dirty").touch()
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to(path), os.mkdir):
        make(place / name)
        assert open_saved([str(place)]) is None
        with pytest.raises(StateError, match="it saved no checkpoint"):
            recovery._refuse_of_no_step(str(place))
        (os.rmdir if (place / name).is_dir() and not (place / name).is_symlink() else os.unlink)(place / name)
