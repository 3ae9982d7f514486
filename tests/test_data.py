"""Documents, the held-out split, and rows with their labels, against computations that share no code with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fuyou.core.errors import DataError
from fuyou.train.data import make_rows
from fuyou.train.documents import Document, read_documents, split

END, BEGIN = 0, 1


class Letters:
    """A tokenizer: a character is its code, 0 ends a text, and 1 may begin one."""

    def __init__(self, begins: bool = False) -> None:
        self.bos_token_id = BEGIN
        self.eos_token_id = END
        self.pad_token_id = None
        self._begins = begins

    def __call__(self, text, add_special_tokens=True, verbose=True):
        if isinstance(text, list):
            return {"input_ids": [self._ids(item, add_special_tokens) for item in text]}
        return {"input_ids": self._ids(text, add_special_tokens)}

    def _ids(self, text: str, special: bool) -> list[int]:
        return [BEGIN] * (special and self._begins) + [ord(letter) for letter in text]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_text_file_is_its_paragraphs_and_nothing_is_lost(tmp_path):
    text = "# Title\nsame paragraph\n\nsecond\n   \n\n\nthird, with a\nsecond line\n"
    path = tmp_path / "a.md"
    path.write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    documents = read_documents([str(path)])
    assert [d.text.rstrip("\n") for d in documents] == [
        "# Title\nsame paragraph",
        "second",
        "third, with a\nsecond line",
    ]
    assert [d.source for d in documents] == [f"{path} line {n}" for n in (1, 4, 8)]
    assert [(d.begins, d.ends) for d in documents] == [(True, False), (False, False), (False, True)]


def test_jsonl_rows_in_the_order_of_the_files(tmp_path):
    first = write(tmp_path / "a.jsonl", {"text": "one", "id": 7}, "", {"text": "two", "other": None})
    second = write(tmp_path / "b.txt", "three")
    third = write(tmp_path / "c.jsonl", {"prompt": "four ", "completion": "five"})
    documents = read_documents([first, second, third])
    assert [(d.prompt, d.text) for d in documents] == [("", "one"), ("", "two"), ("", "three"), ("four ", "five")]
    assert documents[1].source == f"{first} line 3"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "not JSON"),
        ("[1, 2]", "list"),
        ('{"body": "a"}', "neither"),
        ("{}", "no field"),
        ('{"prompt": "a"}', "neither"),
        ('{"text": 3}', "not a string"),
        ('{"text": null}', "not a string"),
        ('{"prompt": 1, "completion": "a"}', "`prompt` is int"),
        ('{"prompt": "a", "completion": ["b"]}', "`completion` is list"),
        ('{"text": "a", "completion": "b"}', "as well as"),
        ('{"text": " "}', "empty"),
        ('{"text": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, reason):
    good = {"prompt": "a", "completion": "b"} if '"prompt"' in line else {"text": "good"}
    path = write(tmp_path / "a.jsonl", good, line)
    with pytest.raises(DataError, match=reason) as caught:
        read_documents([path])
    assert f"{path} line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "a.docx").write_text("a")
    (tmp_path / "folder.txt").mkdir()
    for name, reason in {
        "latin.jsonl": "line 2 is not UTF-8",
        "empty.txt": "empty",
        "empty.jsonl": "empty",
        "a.docx": "none of .txt",
        "folder.txt": "holds no file",
        "missing.txt": "does not exist",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_documents([str(tmp_path / name)])
        assert name in str(caught.value)


# --- holding out --------------------------------------------------------------------------------------------------


def test_held_out_text_is_in_no_training_document():
    documents = [Document("", f"text {n % 40}  and more", f"a line {n}") for n in range(100)]
    documents += [Document("text 3 and ", "more", "a line 101")]  # the same text, cut elsewhere
    training, held_out = split(documents, 0.2, seed=1)
    assert len(held_out) == 8  # 20 % of 40 distinct texts
    words = [" ".join((d.prompt + d.text).split()) for d in training]
    assert not {" ".join((d.prompt + d.text).split()) for d in held_out} & set(words)
    assert len(set(words)) == 32 and len(words) > 32  # copies stay on the training side
    assert split(documents, 0.2, seed=1) == (training, held_out)
    assert split(documents, 0.2, seed=2) != (training, held_out)
    assert split(documents, 0.0, seed=1) == (documents, [])


def test_a_split_leaves_both_sides_something():
    two = [Document("", "a", "1"), Document("", "b", "2")]
    assert [len(side) for side in split(two, 0.001, seed=0)] == [1, 1]
    assert [len(side) for side in split(two, 0.999, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="eval_share"):
        split(two[:1] * 5, 0.5, seed=0)


# --- rows ---------------------------------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_packed_rows_are_the_stream_and_labels_leave_prompts_out():
    documents = [
        Document("ask:", "answer", "1"),
        Document("", "plain text", "2"),
        Document("a prompt longer than a row", "x", "3"),
        Document("q", "end", "4"),
    ]
    rows = make_rows(documents, Letters(), 8, packing=True, what="training")
    tokens, labels = [], []
    for document in documents:
        prompt, text = ids(document.prompt), [*ids(document.text), END]
        tokens += prompt + text
        labels += [-100] * len(prompt) + text
    tail = -len(tokens) % 8
    expected = np.array(tokens + [END] * tail).reshape(-1, 8), np.array(labels + [-100] * tail).reshape(-1, 8)
    learns = (expected[1][:, 1:] != -100).any(axis=1)
    assert not learns.all() and f"{(~learns).sum()} of {len(learns)} training rows" in rows.notes[0]
    np.testing.assert_array_equal(rows.tokens, expected[0][learns])
    np.testing.assert_array_equal(rows.labels, expected[1][learns])
    assert rows.token_count(range(len(rows))) == 8 * len(rows) - tail
    assert rows.predicted([0, 1]) == (expected[1][learns][:2, 1:] != -100).sum()


def test_paragraphs_of_one_file_are_one_text_in_the_stream(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\ntwo\n\nthree\n")
    rows = make_rows(read_documents([str(path)]), Letters(begins=True), 32, packing=True, what="training")
    assert rows.tokens[0].tolist() == [BEGIN, *ids("one\n\ntwo\n\nthree"), END] + [END] * 15
    assert rows.labels[0].tolist() == [BEGIN, *ids("one\n\ntwo\n\nthree"), END] + [-100] * 15


def test_unpacked_rows_are_a_document_each():
    documents = [Document("ask:", "answer", "1"), Document("", "ab", "2"), Document("longer than a row", "x", "3")]
    rows = make_rows(documents, Letters(begins=True), 12, packing=False, what="held-out")
    batch = rows.batch([0, 1], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[BEGIN, *ids("ask:answer"), END], [BEGIN, *ids("ab"), END] + [END] * 8]
    assert batch["labels"].tolist() == [[-100] * 5 + [*ids("answer"), END], [BEGIN, *ids("ab"), END] + [-100] * 8]
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 4 + [0] * 8]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert len(rows) == 2 and rows.statistics.dropped_documents == 1  # cut off before anything to learn


def test_data_without_anything_to_predict_is_refused():
    silent = Letters()
    silent.eos_token_id = None
    silent._ids = lambda text, special: []
    with pytest.raises(DataError, match="training data .1 documents"):
        make_rows([Document("", "x", "1")], silent, 4, packing=True, what="training")
    with pytest.raises(DataError, match="held-out data"):
        make_rows([Document("only a prompt, far too long", "x", "1")], Letters(), 4, packing=False, what="held-out")


def test_a_document_boundary_at_every_place_of_a_row():
    for length in range(2, 40):
        documents = [Document("p" * n, "t" * (n + 1), "1") for n in range(12)]
        rows = make_rows(documents, Letters(), length, packing=True, what="training")
        whole = [-100 if letter == "p" else 0 if letter == "." else ord(letter) for n in range(12) for letter in
                 "p" * n + "t" * (n + 1) + "."]  # fmt: skip
        cut = [whole[start : start + length] for start in range(0, len(whole), length)]
        cut = [row for row in cut if any(label != -100 for label in row[1:])]
        assert [row[: len(c)] for row, c in zip(rows.labels.tolist(), cut, strict=True)] == cut
