"""The records of complete steps, as files: read back, refused when anything is wrong. And the checksum in them."""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import random
import struct
import zlib
from pathlib import Path

import pytest
from commit_tools import PAGE, crc32c, home

from fuyou.core.errors import ConfigError, StoreError
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.records import MOST_PAYLOAD_BYTES, encode_payload, read_newest

native = pytest.importorskip("fuyou._native")


# ---- CRC-32C


def address_of(buffer: ctypes.Array, offset: int = 0) -> int:
    return ctypes.addressof(buffer) + offset


@pytest.mark.parametrize("path", ["auto", *native.crc32c_paths()])
def test_crc32c_has_the_numbers_of_rfc_3720_and_of_a_plain_loop(path):
    vectors = [
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogue
        (b"", 0),
    ]
    draw = random.Random(0)
    long = [draw.randbytes(size) for size in (12_287, 12_288, 12_289, 12_295, 3 * 12_288 + 4099)]  # around the streams
    for data, number in vectors + [(data, crc32c(data)) for data in long]:
        buffer = ctypes.create_string_buffer(data, len(data) + 1)
        assert native.crc32c(address_of(buffer), len(data), 0, path) == number == crc32c(data)
        half = len(data) // 2
        first = native.crc32c(address_of(buffer), half, 0, path)
        assert native.crc32c(address_of(buffer, half), len(data) - half, first, path) == number


@pytest.mark.parametrize("path", native.crc32c_paths())
def test_crc32c_at_every_alignment_and_length(path):
    data = random.Random(1).randbytes(320)
    buffer = ctypes.create_string_buffer(data, len(data))
    for offset in range(9):
        for length in range(301):
            assert native.crc32c(address_of(buffer, offset), length, 0, path) == crc32c(data[offset : offset + length])


def test_crc32c_refuses_what_is_no_memory_or_no_path():
    with pytest.raises(ValueError, match="null"):
        native.crc32c(0, 1)
    with pytest.raises(ValueError, match="no checksum path 'fast'.*auto, .*tables"):
        native.crc32c(4096, 0, 0, "fast")


def test_without_the_extension_it_is_zlibs_and_has_another_name(monkeypatch):
    assert best_checksum().name == "crc32c"

    def refuse(name, *rest):
        if name == "fuyou._native":
            raise ImportError(name)
        return plain(name, *rest)

    plain = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    other = best_checksum.__wrapped__()
    data = random.Random(2).randbytes(9000)
    buffer = ctypes.create_string_buffer(data, len(data))
    assert other.name == "crc32" and other.of(address_of(buffer, 1), 8000) == zlib.crc32(data[1:8001])


# ---- records


class Made:
    """Files of a store, written here by hand: extents 0 (two slots), 2 (one slot over two drives)."""

    def __init__(self, place: Path) -> None:
        self.folders = [str(place / "one"), str(place / "two")]
        for folder in self.folders:
            home(folder).mkdir(parents=True)
            (home(folder) / "data").write_bytes(bytes(8 * PAGE))
        self.parts = [(0, 0, 0, 0, PAGE), (0, 1, 0, PAGE, PAGE), (2, 0, 1, PAGE, PAGE), (2, 0, 0, 3 * PAGE, 2 * PAGE)]
        self.entries = [(PAGE, 0, 11, 1), (3 * PAGE, 2, 22, 0)]  # bytes, extent, checksum, slot
        self.payload = json.dumps({"rng": [1, 2], "lr": 0.1}).encode()
        self.version, self.name, self.drives, self.magic, self.layout_magic = 1, b"crc32c", 2, b"FUYOUCMT", b"FUYOULAY"
        self.number, self.step = 5, 40

    def layout(self) -> bytes:
        head = struct.pack("<8sII", self.layout_magic, 1, self.drives)
        return head + b"".join(struct.pack("<IHHQQ", *part) for part in self.parts)

    def record(self) -> bytes:
        body = b"".join(struct.pack("<QIII", *entry) for entry in self.entries) + self.payload
        head = struct.pack(
            "<8sIIQQ16sIIQI", self.magic, self.version, len(self.entries), self.number, self.step, self.name,
            len(self.payload), zlib.crc32(self.layout()), len(self.parts), zlib.crc32(body),
        )  # fmt: skip
        return head + struct.pack("<I", zlib.crc32(head)) + body

    def put(self, *names: str) -> None:
        """The record into the files `names`, and the layout; the other record files are new ones."""
        for name in ("commit-0-a", "commit-0-b", "commit-1-a", "commit-1-b"):
            content = self.record() + b"what a longer one left" if name in names else bytes(3 * PAGE)
            (home(self.folders[0]) / name).write_bytes(content)
        for copy in "ab":
            (home(self.folders[0]) / f"layout-{copy}").write_bytes(self.layout() + bytes(99))


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def test_what_was_written_by_hand_is_read(made):
    made.put("commit-0-a", "commit-0-b")
    record = read_newest(made.folders)
    assert (record.number, record.step, record.checksum) == (5, 40, "crc32c")
    assert record.payload == {"rng": [1, 2], "lr": 0.1} and record.problems == ()
    assert [tuple(map(int, row)) for row in record.entries] == made.entries
    assert [tuple(map(int, part)) for part in record.parts(0)] == [made.parts[1]]
    assert [tuple(map(int, part)) for part in record.parts(1)] == made.parts[2:]  # in the order of the bytes


def test_every_changed_byte_and_every_cut_is_noticed(made):
    made.put("commit-1-b")
    path = home(made.folders[0]) / "commit-1-b"
    whole = made.record()
    for index in range(len(whole)):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :])
        with pytest.raises(StoreError, match="no complete step"):
            read_newest(made.folders)
        path.write_bytes(whole[:index])
        with pytest.raises(StoreError, match="no complete step"):
            read_newest(made.folders)
    path.write_bytes(whole)
    layout = made.layout()
    for index in range(len(layout)):
        for copy in "ab":
            changed = layout[:index] + bytes([layout[index] ^ 1 << index % 8]) + layout[index + 1 :]
            (home(made.folders[0]) / f"layout-{copy}").write_bytes(changed if index % 2 else layout[:index])
        with pytest.raises(StoreError, match="layout"):
            read_newest(made.folders)
    (home(made.folders[0]) / "layout-b").write_bytes(layout)
    assert read_newest(made.folders).step == 40  # by the other copy, and that is told
    assert "layout-a" in read_newest(made.folders).problems[0]


WRONG = {
    "version": (lambda made: setattr(made, "version", 2), "version 2"),
    "no record": (lambda made: setattr(made, "magic", b"FUYOUXXX"), "not a commit record"),
    "checksum": (lambda made: setattr(made, "name", b"md5"), "'md5'"),
    "list as payload": (lambda made: setattr(made, "payload", b"[1]"), "not an object"),
    "no JSON": (lambda made: setattr(made, "payload", b'{"a":'), "not JSON"),
    "huge payload": (lambda made: setattr(made, "payload", b" " * (MOST_PAYLOAD_BYTES + 1)), "cut short"),
    "order": (lambda made: made.entries.reverse(), "out of order"),
    "twice": (lambda made: made.entries.insert(0, made.entries[0]), "out of order"),
    "slot": (lambda made: made.entries.insert(0, (PAGE, 0, 1, 2)) or made.entries.pop(1), "do not exist"),
    "not in layout": (lambda made: made.entries.append((PAGE, 9, 1, 0)), "does not have"),
    "between": (lambda made: made.entries.insert(1, (3 * PAGE, 1, 1, 0)), "does not have"),
    "size": (lambda made: made.entries.insert(1, (2 * PAGE, 2, 1, 0)) or made.entries.pop(2), "other sizes"),
    "drive": (lambda made: made.parts.append((3, 0, 2, 0, PAGE)), "drive or a slot"),
    "layout's slot": (lambda made: made.parts.append((3, 2, 1, 0, PAGE)), "drive or a slot"),
    "overlap": (lambda made: made.parts.append((3, 0, 0, 4 * PAGE, PAGE)), "overlap"),
    "beyond": (lambda made: made.parts.append((3, 0, 0, 7 * PAGE, 2 * PAGE)), "beyond"),
    "far beyond": (lambda made: made.parts.append((3, 0, 0, 2**64 - PAGE, PAGE)), "beyond"),
    "wraps around": (lambda made: made.parts.append((3, 0, 0, 7 * PAGE, 2**64 - PAGE)), "beyond"),
    "part of a page": (lambda made: made.parts.append((3, 0, 0, 7 * PAGE, 100)), "whole pages"),
    "empty part": (lambda made: made.parts.append((3, 0, 0, 7 * PAGE, 0)), "whole pages"),
    "drives": (lambda made: setattr(made, "drives", 3), "3 drives, and 2"),
    "no layout": (lambda made: setattr(made, "layout_magic", b"FUYOUXXX"), "not a layout"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_has_its_checksum_and_is_impossible_is_refused_in_words(made, what):
    change, words = WRONG[what]
    change(made)
    made.put("commit-0-a", "commit-1-b")
    with pytest.raises(StoreError, match=words) as caught:
        read_newest(made.folders)
    assert str(home(made.folders[0])) in str(caught.value) and "Begin from" in str(caught.value)


def test_the_newest_that_is_whole_is_taken(made):
    made.put("commit-0-a")
    older = made.record()
    made.number, made.step = 6, 41
    made.put("commit-1-a", "commit-1-b")
    store = home(made.folders[0])
    (store / "commit-0-a").write_bytes(older)
    (store / "commit-0-b").write_bytes(older)
    assert read_newest(made.folders).step == 41 and read_newest(made.folders).problems == ()
    (store / "commit-1-a").write_bytes(made.record()[:-1])
    assert read_newest(made.folders).step == 41
    assert len(read_newest(made.folders).problems) == 1 and "commit-1-a" in read_newest(made.folders).problems[0]
    (store / "commit-1-b").write_bytes(os.urandom(5000))
    with pytest.raises(StoreError, match="both copies of a record are damaged .*cut short.*may be of a later step"):
        read_newest(made.folders)
    for copy in "ab":  # as that says
        (store / f"commit-1-{copy}").unlink()
    assert read_newest(made.folders).step == 40


def test_what_is_no_file_is_refused(made):
    made.put("commit-0-a")
    store = home(made.folders[0])
    os.rename(store / "commit-0-a", store / "elsewhere")
    for make in (
        lambda path: path.symlink_to("elsewhere"),
        os.mkfifo,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: None,
    ):
        make(store / "commit-0-a")
        with pytest.raises(StoreError, match="no complete step"):
            read_newest(made.folders)
        if (store / "commit-0-a").is_dir():
            (store / "commit-0-a").rmdir()
        else:
            (store / "commit-0-a").unlink(missing_ok=True)
    (home(made.folders[1]) / "data").unlink()
    os.rename(store / "elsewhere", store / "commit-0-a")
    with pytest.raises(StoreError, match="two/fuyou-store/data cannot be read"):
        read_newest(made.folders)


def test_a_payload_that_cannot_be_kept_is_refused():
    for payload, words in (
        ({"a": object()}, "JSON"),
        ({(1, 2): 3}, "JSON"),
        ([1], "a dict, not list"),
        ({"long": "x" * MOST_PAYLOAD_BYTES}, "1048587 bytes.*1.00 MiB"),
    ):
        with pytest.raises(ConfigError, match=words):
            encode_payload(payload)
    deep: dict = {}
    for _ in range(100_000):
        deep = {"deep": deep}
    with pytest.raises(ConfigError, match="JSON"):
        encode_payload(deep)
    assert json.loads(encode_payload({"ü": 1.5})) == {"ü": 1.5}
