"""Headers and indexes of safetensors: what is whole is read, and of all else nothing but our own errors comes."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fuyou.checkpoint.headers import header_bytes, parse_header, parse_index
from fuyou.checkpoint.weight_files import open_file, open_weights
from fuyou.core.errors import ConfigError, StorageIOError

SLOW = pytest.mark.slow
FEW, MANY = 300, 100_000


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def parsed(content: bytes) -> dict[str, Any]:
    length = header_bytes(content[:8], len(content), "w")
    return parse_header(content[8 : 8 + length], len(content), "w")


def test_a_file_of_safetensors_is_read_as_it_was_written(tmp_path):
    tensors = {
        "a": torch.randn(3, 5), "b.c": torch.randn(4).bfloat16(), "empty": torch.empty(0, 7), "scalar": torch.tensor(2.5),
        "half": torch.randn(2, 2, 2).half(), "double": torch.randn(3).double(), "yes": torch.tensor([True, False]),
        "count": torch.arange(5), "ß": torch.randn(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    found = open_file(tmp_path / "w.safetensors").tensors
    content = (tmp_path / "w.safetensors").read_bytes()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        place = found[name]
        assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape))
        assert content[place.begin : place.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
DAMAGED = {
    "empty": b"",
    "shorter than a length": b"\x08\0\0",
    "length beyond the file": struct.pack("<Q", 9) + b"{}      ",
    "length beyond everything": struct.pack("<Q", 2**64 - 1) + b"{}",
    "no JSON": file_of(b"<html>"),
    "no UTF-8": file_of(b'{"\xff": 1}'),
    "a list": file_of([]),
    "a number": file_of(1),
    "deep": file_of(b"[" * 200_000),
    "deep objects": file_of(b'{"a":' * 100_000),
    "a name twice": file_of(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "a shape twice": file_of(b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', bytes(8)),
    "entry is a list": file_of({"a": []}),
    "no dtype": file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": file_of({"a": entry(dtype="F4")}, bytes(8)),
    "dtype is a list": file_of({"a": {**entry(), "dtype": ["F32"]}}, bytes(8)),
    "negative size": file_of({"a": entry(shape=(-2,))}, bytes(8)),
    "two negative sizes": file_of({"a": entry(shape=(-1, -2))}, bytes(8)),
    "size is a float": file_of({"a": entry(shape=(2.0,))}, bytes(8)),
    "size is true": file_of({"a": entry(shape=(True, 2))}, bytes(8)),
    "size is text": file_of({"a": {**entry(), "shape": "2"}}, bytes(8)),
    "sizes overflow": file_of({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}),
    "sizes overflow to 8 bytes": file_of({"a": entry(shape=(2**62 + 2, 4), offsets=(0, 32))}, bytes(32)),
    "absurd size": file_of({"a": entry(shape=(2**63,))}, bytes(8)),
    "number of 5000 digits": file_of(b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}' % (b"9" * 5000), bytes(8)),
    "65 dimensions": file_of({"a": entry(shape=[1] * 64 + [2])}, bytes(8)),
    "negative offset": file_of({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "end before begin": file_of({"a": entry(shape=(0,), offsets=(8, 0))}, bytes(8)),
    "three offsets": file_of({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
    "too few bytes": file_of({"a": entry(offsets=(0, 4))}, bytes(4)),
    "infinity": file_of(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', bytes(8)),
    "overlap": file_of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "the same bytes": file_of({"a": entry(), "b": entry()}, bytes(8)),
    "hole": file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "hole in front": file_of({"a": entry(offsets=(4, 12))}, bytes(12)),
    "cut short": file_of(TWO, bytes(15)),
    "too long": file_of(TWO, bytes(17)),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_header_is_refused(what, tmp_path):
    assert set(parsed(file_of(TWO, bytes(16)))) == {"a", "b"}
    with pytest.raises(ConfigError, match="Copy or download|cannot read"):
        parsed(DAMAGED[what])
    (tmp_path / "w.safetensors").write_bytes(DAMAGED[what])
    with pytest.raises(ConfigError):
        open_file(tmp_path / "w.safetensors")


INDEX = {
    "no JSON": b"{",
    "a list": b"[]",
    "no map": b"{}",
    "map is a list": b'{"weight_map": []}',
    "map is empty": b'{"weight_map": {}}',
    "a number for a file": b'{"weight_map": {"a": 1}}',
    "folder above": b'{"weight_map": {"a": "../w.safetensors"}}',
    "absolute": b'{"weight_map": {"a": "/w.safetensors"}}',
    "folder below": b'{"weight_map": {"a": "b/w.safetensors"}}',
    "backslash": b'{"weight_map": {"a": "b\\\\w.safetensors"}}',
    "zero byte": b'{"weight_map": {"a": "w\\u0000.safetensors"}}',
    "half a character": b'{"weight_map": {"a": "w\\ud800.safetensors"}}',
    "another kind of file": b'{"weight_map": {"a": "pytorch_model.bin"}}',
    "no name": b'{"weight_map": {"a": ""}}',
    "a name twice": b'{"weight_map": {"a": "w.safetensors", "a": "v.safetensors"}}',
}


@pytest.mark.parametrize("what", INDEX)
def test_a_damaged_index_is_refused(what):
    assert parse_index(b'{"weight_map": {"a": "w.safetensors"}}', "i") == {"a": "w.safetensors"}
    with pytest.raises(ConfigError, match="index i is damaged"):
        parse_index(INDEX[what], "i")


# --- anything at all ----------------------------------------------------------------------------------------------

NUMBERS = st.integers(-2, 20) | st.sampled_from([2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", ""]) | VALUES,
        "shape": st.lists(NUMBERS, max_size=4) | VALUES,
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2) | VALUES,
    },
)
NAMES = st.sampled_from(["a", "b", "c", "__metadata__"]) | st.text(max_size=3)
HEADERS = st.dictionaries(NAMES, ENTRIES | VALUES, max_size=4).map(lambda value: json.dumps(value).encode())
WHOLE = file_of({"__metadata__": {"format": "pt"}, **TWO}, bytes(16))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A whole file with some of its bytes replaced, removed or repeated."""
    content = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        length = draw(st.integers(0, 8))
        content[at : at + length] = draw(
            st.binary(max_size=8) | st.sampled_from([b"{", b"[", b"0", b"-", b'"', b"9" * 30])
        )
    return bytes(content)


CONTENTS = (
    damaged()
    | st.binary(max_size=64)
    | st.tuples(HEADERS, st.binary(max_size=24)).map(lambda parts: file_of(*parts))
    | st.tuples(NUMBERS, HEADERS).map(lambda parts: (parts[0] % 2**64).to_bytes(8, "little") + parts[1])
)


def check_header(content: bytes) -> None:
    """Whatever is accepted is whole: every tensor lies within the file, and together they are its data."""
    try:
        found = parsed(content)
    except ConfigError as error:
        assert str(error)
        return
    covered = sorted((place.begin, place.end) for place in found.values())
    data = 8 + struct.unpack("<Q", content[:8])[0]
    assert sum(end - begin for begin, end in covered) == len(content) - data
    assert all(data <= begin <= end <= len(content) for begin, end in covered)
    for place in found.values():
        tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)[place.begin : place.end].clone()
        tensor.view(place.dtype).reshape(place.shape)


def check_index(text: bytes) -> None:
    try:
        found = parse_index(text, "i")
    except ConfigError as error:
        assert str(error)
        return
    for shard in found.values():
        assert os.path.basename(shard) == shard and os.path.normpath(os.path.join("/folder", shard)).startswith(
            "/folder/"
        )


def fuzz(check: Any, strategy: st.SearchStrategy[bytes], count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    @example(WHOLE)
    def run(content: bytes) -> None:
        check(content)

    run()


INDEXES = st.binary(max_size=64) | st.builds(
    lambda value, inner: json.dumps({"weight_map": inner, "metadata": value}).encode(),
    VALUES,
    VALUES | st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.just("w.safetensors"), max_size=3),
)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[SLOW, pytest.mark.timeout(3000)])])
def test_no_header_raises_anything_else(count):
    fuzz(check_header, CONTENTS, count)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=[SLOW, pytest.mark.timeout(3000)])])
def test_no_index_raises_anything_else(count):
    fuzz(check_index, INDEXES, count)


def test_what_safetensors_refuses_is_refused(tmp_path):
    """Of 1500 files with a byte or two changed, all that the reference implementation does not open, and of the others all
    that it reads with other shapes."""
    draw, path, accepted = random.Random(0), tmp_path / "w.safetensors", 0
    for _ in range(1500):
        content = bytearray(WHOLE)
        for _ in range(draw.randint(1, 2)):
            content[draw.randrange(len(content) - 16)] = draw.choice(b'0123456789{}[]":, FUaz\0\xff')
        path.write_bytes(content)
        try:
            with safe_open(path, "pt") as file:
                expected = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
        except (SafetensorError, OSError):
            expected = None
        try:
            found = {name: list(place.shape) for name, place in parsed(bytes(content)).items()}
        except ConfigError:
            continue
        assert found == expected
        accepted += 1
    assert accepted > 50  # a changed name is a name


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_link_is_followed_as_in_the_hubs_cache(folder, tmp_path_factory):
    blob = tmp_path_factory.mktemp("blobs") / "0123"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert set(open_weights(folder)[0].tensors) == {"a", "b"}


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "unreadable"])
def test_what_is_no_regular_file_is_refused(folder, kind):
    path = folder / "model.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(WHOLE)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
    with pytest.raises(ConfigError, match=r"no regular file|cannot be read|no file named"):
        open_weights(folder)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pytorch_model.bin, a pickle.*save_pretrained\(another_folder\)"):
        open_weights(folder)


def shards(folder: Path, weight_map: dict[str, str], **held: dict[str, torch.Tensor]) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for name, tensors in held.items():
        save_file(tensors, folder / f"{name}.safetensors")


def test_shards_that_do_not_belong_together_are_refused(folder):
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(2)}
    shards(folder, {"a": "x.safetensors", "b": "y.safetensors"}, x=one, y=two)
    assert [set(file.tensors) for file in open_weights(folder)] == [{"a"}, {"b"}]
    shards(folder, {"a": "x.safetensors", "b": "y.safetensors"}, x=one, y={**one, **two})
    with pytest.raises(ConfigError, match="Two shards .* x.safetensors and y.safetensors, hold 'a'"):
        open_weights(folder)
    shards(folder, {"a": "y.safetensors", "b": "y.safetensors"}, y=two)
    with pytest.raises(ConfigError, match="says that 'a' lies in y.safetensors, which does not hold it"):
        open_weights(folder)


def test_a_file_that_becomes_shorter_is_said_with_its_offset(folder):
    file = open_weights(folder)[0]
    place = file.tensors["b"]
    os.truncate(folder / "model.safetensors", place.begin + 5)
    with pytest.raises(StorageIOError, match=rf"shorter while it was read: nothing at offset {place.begin + 5}"):
        file.read(place.begin, memoryview(bytearray(place.end - place.begin)))


def test_what_was_checked_is_what_is_read(folder):
    """Another file under the same name changes nothing."""
    file = open_weights(folder)[0]
    save_file({"a": torch.full((4,), 9.0), "b": torch.zeros(4)}, folder / "new.safetensors")
    os.replace(folder / "new.safetensors", folder / "model.safetensors")
    target = bytearray(16)
    file.read(file.tensors["a"].begin, memoryview(target))
    assert torch.frombuffer(target, dtype=torch.float32).tolist() == [1.0] * 4
