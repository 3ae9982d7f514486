"""Documents, the held-out split, and rows with their labels, against computations that share no code with them."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fuyou.core.errors import ConfigError, DataError
from fuyou.train.data import Layout, make_rows
from fuyou.train.documents import Conversation, Document, read_documents, split

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
        "missing.txt": "does not exist here",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_documents([str(tmp_path / name)])
        assert name in str(caught.value)


# --- shapes -------------------------------------------------------------------------------------------------------


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHAT = (says("user", "Hi"), says("assistant", "Ho"))

SHAPES = {
    "text": ({"text": "a"}, Document("", "a", "")),
    "prompt": ({"prompt": "a", "completion": "b"}, Document("a", "b", "")),
    "messages": ({"messages": list(CHAT), "text": "Hi Ho"}, Conversation(CHAT, "")),
    "prompt beside messages": ({"messages": list(CHAT), "prompt": "Hi", "prompt_id": 1}, Conversation(CHAT, "")),
    "text parts": ({"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": "H"},
                    {"type": "text", "text": "o"}]}]}, Conversation(CHAT, "")),
    "nulls": ({"messages": [{**CHAT[0], "name": None}, {**CHAT[1], "tool_calls": None}], "text": None},
              Conversation(CHAT, "")),
    "calls": ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "x": None}]}],
               "tools": '[{"name": "f"}]'},
              Conversation((CHAT[0], {"role": "assistant", "tool_calls": [{"id": "1"}]}), "", 0, ({"name": "f"},))),
    "prompt as messages": ({"prompt": [says("system", "S"), CHAT[0]], "completion": [CHAT[1]]},
                           Conversation((says("system", "S"), *CHAT), "", 2)),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho", "weight": 1}]},
                 Conversation((CHAT[0], {**CHAT[1], "weight": 1}), "")),
    "sharegpt system": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
                         "system": "S"}, Conversation((says("system", "S"), *CHAT), "")),
    "sharegpt roles": ({"conversations": [*CHAT, {"role": "tool", "content": "T"}]},
                       Conversation((*CHAT, says("tool", "T")), "")),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Ho", "text": "Below is …"}, Conversation(CHAT, "", 0, None,
        Document("Below is an instruction that describes a task. Write a response that appropriately completes the "
                 "request.\n\n### Instruction:\nHi\n\n### Response:", "Ho", ""))),
    "alpaca input": ({"instruction": "Add", "input": "1, 2", "output": "3"},
        Conversation((says("user", "Add\n1, 2"), says("assistant", "3")), "", 0, None,
        Document("Below is an instruction that describes a task, paired with an input that provides further context. "
                 "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n"
                 "1, 2\n\n### Response:", "3", ""))),
    "alpaca history": ({"instruction": "Hi", "output": "Ho", "system": "S", "history": [["a", "b"]]},
        Conversation((says("system", "S"), says("user", "a"), says("assistant", "b"), *CHAT), "")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_is_known_by_its_fields(tmp_path, name):
    row, wanted = SHAPES[name]
    (found,) = read_documents([write(tmp_path / "a.jsonl", row)])
    assert found.source == f"{tmp_path / 'a.jsonl'} line 1"
    plain = getattr(found, "plain", None)
    assert plain is None or plain.source == found.source
    blank = type(found)(**{**found.__dict__, "source": "", **({"plain": wanted.plain} if plain else {})})
    assert blank == wanted
    if plain is not None:
        assert (plain.prompt, plain.text) == (wanted.plain.prompt, wanted.plain.text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "`messages` is an empty list"),
        ({"messages": "Hi"}, "`messages` is str, not a list of messages"),
        ({"messages": None}, "`messages` is null"),
        ({"messages": ["Hi"]}, "`messages` 1 is str, not an object"),
        ({"messages": [{"content": "a"}]}, "`messages` 1: 'role' is missing or null"),
        ({"messages": [CHAT[0], says("asistant", "a")]}, "`messages` 2: the role 'asistant'.*did you mean 'assistant'"),
        ({"messages": [{"role": "user"}]}, "'content' is missing or null"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' is int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "text": "a"}]}]}, "part of type 'audio'"),
        ({"messages": [says("user", "\ud800")]}, "surrogate"),
        ({"messages": [*CHAT], "tools": "["}, "`tools` is not JSON"),
        ({"messages": [*CHAT], "tools": ["f"]}, "`tools` is not a list of function schemas"),
        ({"messages": [*CHAT], "conversations": []}, "`messages` as well as `conversations`"),
        ({"messages": [*CHAT], "instruction": "a", "output": "b"}, "as well as `instruction` and `output`"),
        ({"conversations": [{"from": "function_call", "value": "f"}]}, "the role 'function_call'"),
        ({"conversations": [{"from": "human", "value": None}]}, "'value' is missing or null"),
        ({"instruction": "a", "output": " "}, "`output` is empty"),
        ({"instruction": 1, "output": "a"}, "`instruction` is int"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "`input` is list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "`history` 1 is not a pair"),
        ({"instruction": "a", "output": None}, "`output` is null"),
        ({"prompt": [says("user", "a")], "completion": "b"}, "`prompt` is list"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_documents([write(tmp_path / "a.jsonl", row)])
    assert f"{tmp_path / 'a.jsonl'} line 1" in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_mixed_shape_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *[{"messages": list(CHAT)}] * 6, {"text": "a"})
    with pytest.raises(DataError, match="line 1 holds `messages`, and line 7 of the same file `text`"):
        read_documents([path])
    path = write(
        tmp_path / "b.jsonl", {"prompt": "a", "completion": "b"}, {"prompt": list(CHAT), "completion": list(CHAT)}
    )
    with pytest.raises(DataError, match="line 1 holds `prompt` and `completion`, and line 2 .* as messages"):
        read_documents([path])


def test_alpaca_rows_follow_the_chat_template_where_there_is_one(tmp_path):
    documents = read_documents([write(tmp_path / "a.jsonl", {"instruction": "Hi", "output": "Ho"})])
    rows = make_rows(documents, Letters(), 256, packing=False, what="training")
    length = len(rows.tokens[0][rows.labels[0] == -100][: rows.lengths[0] - 3])
    assert rows.tokens[0][: length + 3].tolist() == [*ids(documents[0].plain.prompt), *ids("Ho"), END]
    assert [label for label in rows.labels[0].tolist() if label != -100] == [*ids("Ho"), END]
    assert "Stanford Alpaca" in rows.notes[0]


# --- files --------------------------------------------------------------------------------------------------------

ROWS = [{"messages": [*CHAT]}, {"messages": [says("system", "é\n"), *CHAT]}]


def test_json_in_all_its_forms_is_read_alike(tmp_path):
    wanted = [Conversation(tuple(row["messages"]), "") for row in ROWS]
    lines = "\n".join(json.dumps(row) for row in ROWS)
    for name, content in {
        "a.jsonl": lines,
        "b.json": lines,
        "c.json": json.dumps(ROWS),
        "d.json": "\ufeff [\n"
        + json.dumps(ROWS[0], indent=2)
        + " ,\n"
        + json.dumps(ROWS[1], ensure_ascii=False)
        + "]\n ",
    }.items():
        (tmp_path / name).write_text(content, "utf-8")
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            found = read_documents([str(path)])
            assert [Conversation(each.messages, "") for each in found] == wanted, path
            word = "line" if ".jsonl" in name else "row"
            assert [each.source for each in found] == [f"{path} {word} {n}" for n in (1, 2)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[", "ends within it, after 0 rows"),
        ('[{"text": "a"}', "row 1 is followed by neither"),
        ('[{"text": "a"} {"text": "b"}]', "row 1 is followed by neither"),
        ('[{"text": "a"}, {"text"}]', "row 2 is not JSON"),
        ('[{"text": "a"}] x', "goes on after its array"),
        ('[{"text": "a"}, 3]', "row 2 holds a JSON int"),
        ('{"data": [{"text": "a"}]}', "row 1 has neither.*it has data"),
        ("[]", "is empty"),
        ("", "is empty"),
    ],
)
def test_broken_json_is_named(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_documents([str(tmp_path / "a.json")])
    assert str(tmp_path / "a.json") in str(caught.value)


def test_broken_gzip_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain")
    for name in ("a", "b"):
        with pytest.raises(DataError, match="not whole gzip"):
            read_documents([str(tmp_path / f"{name}.jsonl.gz")])


def test_folders_and_patterns_name_their_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, {"text": name})
    (tmp_path / "README.md").write_text("About this data.")
    (tmp_path / "notes.pdf").write_text("x")
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "c.jsonl", {"text": "c.jsonl"})
    assert [d.text for d in read_documents([str(tmp_path)])] == ["a.jsonl", "b.jsonl"]
    assert [d.text for d in read_documents([str(tmp_path / "[b]*.jsonl")])] == ["b.jsonl"]
    assert [d.text for d in read_documents([str(tmp_path / "**" / "*.jsonl")])] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    write(tmp_path / "[x].jsonl", {"text": "a name, not a pattern"})
    assert [d.text for d in read_documents([str(tmp_path / "[x].jsonl")])] == ["a name, not a pattern"]
    (tmp_path / "text.txt").write_text("a text")
    for path, reason in {"": "rows .* and text", "*.csv": "No file matches", "*.pdf": "none of .txt"}.items():
        with pytest.raises(DataError, match=reason):
            read_documents([str(tmp_path / path)])


def test_a_saved_dataset_folder_is_explained(tmp_path):
    datasets = pytest.importorskip("datasets", reason="it writes the folder")
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match="save_to_disk.*to_parquet"):
        read_documents([str(tmp_path / "d")])


def test_tables_are_read_through_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="tables are read through it")
    rows = [
        {"prompt": "007", "completion": "NA"},
        {"prompt": 'a,\t"b"\nc', "completion": "1"},
        {"prompt": "", "completion": "é"},
    ]
    for separator, name in ((",", "a [1].csv"), ("\t", "b.tsv")):
        quoted = ["prompt,completion,id".replace(",", separator)] + [
            separator.join('"' + value.replace('"', '""') + '"' for value in (*row.values(), "7")) for row in rows
        ]
        (tmp_path / name).write_text("\n".join(quoted), "utf-8")
        documents = read_documents([str(tmp_path / name)])
        assert [{"prompt": d.prompt, "completion": d.text} for d in documents] == rows
        assert documents[1].source == f"{tmp_path / name} row 2"
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    chats = [{"messages": [*CHAT], "text": "x"}, {"messages": [CHAT[0], call], "text": None}]
    datasets.Dataset.from_list(chats).to_parquet(tmp_path / "c.parquet")
    first, second = read_documents([str(tmp_path / "c.parquet")])
    assert first.messages == CHAT and second.messages[1] == {k: v for k, v in call.items() if v is not None}


def test_broken_tables_are_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="tables are read through it")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not all of it")
    datasets.Dataset.from_list([{"text": "a" * 1000}] * 100).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    (tmp_path / "c.csv").write_text('text\n"a\n')
    (tmp_path / "d.csv").write_text("")
    (tmp_path / "e.csv").write_bytes(b"text\n\xe9\n")
    datasets.Dataset.from_list([{"body": "a"}]).to_parquet(tmp_path / "f.parquet")
    (tmp_path / "g.csv").write_text("text,id\n")
    for name, reason in {
        "a.parquet": "cannot be read as Parquet",
        "b.parquet": "cannot be read as Parquet",
        "c.csv": "cannot be read as CSV",
        "d.csv": "cannot be read as CSV|is empty",
        "e.csv": "cannot be read as CSV",
        "f.parquet": "row 1 has neither.*it has body",
        "g.csv": "is empty",
    }.items():
        with pytest.raises(DataError, match=reason) as caught:
            read_documents([str(tmp_path / name)])
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_tables_without_datasets_name_the_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **named):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest, **named)

    (tmp_path / "a.csv").write_text("text\na\n")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"a.csv is read through `datasets`.*fuyou\[data\]"):
        read_documents([str(tmp_path / "a.csv")])


def test_reading_a_table_asks_no_network_and_leaves_nothing_in_the_home(tmp_path):
    datasets = pytest.importorskip("datasets", reason="tables are read through it")
    datasets.Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("text\nb\n")
    (tmp_path / "home").mkdir()
    program = textwrap.dedent("""
        import socket, sys
        def refuse(*_, **__):
            raise SystemExit("asked the network")
        socket.socket.connect = socket.getaddrinfo = refuse
        from fuyou.train.documents import read_documents
        print([d.text for d in read_documents(sys.argv[1:])])
    """)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    before = set(tmp_path.iterdir())
    files = [str(tmp_path / "a.parquet"), str(tmp_path / "b.csv")]
    done = subprocess.run(
        [sys.executable, "-c", program, *files], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == "['a', 'b']", done.stderr
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []
    assert set(tmp_path.iterdir()) == before


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


# --- rows of whole documents --------------------------------------------------------------------------------------


def test_long_texts_go_on_in_other_rows_and_prompts_are_cut_off():
    text, chat = (
        "".join(chr(200 + n) for n in range(100)),
        Document("ask:", "".join(chr(400 + n) for n in range(50)), "2"),
    )
    for packing, layout in ((True, Layout.PACKED), (False, Layout.SINGLE)):
        rows = make_rows([Document("", text, "1"), chat], Letters(), 16, packing, "training", (True, ""))
        assert rows.layout is layout
        starts = rows.document_starts.tolist()
        parts = [rows.flat_tokens[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
        learnt = sorted(part for part in parts if part[0] >= 200)
        assert [token for part in learnt for token in part] == [*ids(text), END]  # nothing is lost
        assert all(2 <= len(part) <= 16 for part in parts)
        assert [part for part in parts if part[0] < 200] == [ids("ask:") + ids(chat.text)[:12]]
        counts = rows.statistics
        assert (counts.split_documents, counts.cut_documents, counts.cut_tokens) == (1, 1, 4 + 50 + 1 - 16)
        assert (counts.documents, counts.longest_document, counts.median_document) == (2, 101, 78)
        words = " ".join(counts.lines())
        assert "1 are cut off, which loses 39 tokens and 1 go on in another row" in words


def test_paragraphs_that_follow_each_other_are_one_text(tmp_path):
    """But not across the gap that a held-out paragraph leaves, and not from file to file."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one\n\ntwo\n\nthree\n\nfour\n")
    documents = read_documents([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")])
    del documents[2]
    rows = make_rows(documents, Letters(begins=True), 64, False, "training")
    found = ["".join(map(chr, row[:length])) for row, length in zip(rows.tokens, rows.lengths, strict=True)]
    whole = "one\n\ntwo\n\nthree\n\nfour"
    assert found == [f"{chr(BEGIN)}one\n\ntwo\n\n", f"four{chr(END)}", f"{chr(BEGIN)}{whole}{chr(END)}"]


def test_statistics_count_what_is_in_the_rows():
    documents = [Document("ask:" * n, "answer", str(n)) for n in range(1, 9)]
    for packing in (True, False, "stream"):
        rows = make_rows(documents, Letters(), 24, packing, "held-out", (True, ""))
        counts, every = rows.statistics, range(len(rows))
        batch = rows.batch(every, torch.device("cpu"))
        inside = np.arange(24)[None] < rows.lengths[:, None]
        assert counts.tokens == rows.token_count(every) == inside.sum()
        assert counts.padding_tokens == (~inside).sum() and counts.rows == len(rows)
        assert counts.padding_share == pytest.approx((~inside).mean())
        assert counts.predicted_tokens == rows.predicted(every) == int((batch["labels"][:, 1:] != -100).sum())
        arrays = (rows.flat_tokens, rows.flat_labels, rows.document_starts, rows.row_starts)
        assert counts.host_bytes == sum(array.nbytes for array in arrays)
        assert set(counts.to_dict()) > {"documents", "padding_share", "host_bytes"} and json.dumps(counts.to_dict())
        if packing != "stream":
            # Prompts of 24 and more leave nothing to predict; of 20, four of the seven last tokens.
            assert (counts.dropped_documents, counts.cut_documents, counts.cut_tokens) == (3, 1, 3)
            assert counts.predicted_tokens == 4 * 7 + 4
            assert "3 documents have nothing to predict: dropped." in counts.lines()[-1]


def test_wholly_cut_data_says_what_to_set():
    documents = [Document("x" * n, "answer", "1") for n in (40, 30)]
    with pytest.raises(DataError, match="begins after 30 tokens at least, 40 at most.*sequence_length to 41 or more"):
        make_rows(documents, Letters(), 16, True, "training", (True, ""))
    make_rows(documents, Letters(), 41, True, "training", (True, ""))


def test_packing_without_isolation_is_one_document_a_row_and_says_so():
    documents = [Document("", "ab", "1"), Document("", "cd", "2")]
    rows = make_rows(documents, Letters(), 8, True, "training", (False, "X carries a state"))
    assert rows.layout is Layout.SINGLE and len(rows) == 2
    assert "X carries a state" in rows.notes[0] and "packing to stream" in rows.notes[0]
    assert make_rows(documents, Letters(), 8, "stream", "training", (False, "")).layout is Layout.STREAM
