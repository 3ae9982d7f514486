"""Documents: what a user's files hold, and which of them are held out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from fuyou.core.errors import DataError
from fuyou.train.examples import Conversation, Document, Example
from fuyou.train.readers import TEXTS, Row, data_files, read_paragraphs, read_rows
from fuyou.train.shapes import example_of, shape_of

__all__ = ["Conversation", "Document", "Example", "read_documents", "split"]


def read_documents(paths: Sequence[str]) -> list[Example]:
    """Every document and conversation of the files, in order.

    A path is a file, a folder of files, or a pattern (`data/*.jsonl`). .txt and .md hold paragraphs, which blank lines
    separate; .jsonl, .json (also .gz), .csv, .tsv and .parquet hold rows, whose fields say what they are (see
    `shapes.py`). DataError names the file and line or row of what is missing, empty, malformed, not UTF-8, or of
    another shape than the rows before it.
    """
    examples: list[Example] = []
    for path in data_files(paths):
        try:
            found = _paragraphs(path) if path.suffix.lower() in TEXTS else _examples(read_rows(path))
        except OSError as error:
            raise DataError(f"Data file {path} cannot be read: {error.strerror or error}.") from None
        if not found:
            raise DataError(f"Data file {path} is empty: there is nothing to learn from it.")
        examples += found
    return examples


def _paragraphs(path: Path) -> list[Example]:
    found = list(read_paragraphs(path))
    documents: list[Example] = []
    for index, (line, text) in enumerate(found):
        ends = index == len(found) - 1
        text = text if ends else text + "\n\n"
        documents.append(Document("", text, f"{path} line {line}", index == 0, ends, str(path), index))
    return documents


def _examples(rows: Iterable[Row]) -> list[Example]:
    found: list[Example] = []
    first, begun = None, ""
    for fields, source in rows:
        shape = shape_of(fields, source)
        if first is None:
            first, begun = shape, source
        elif shape is not first:
            raise DataError(
                f"Rows of mixed shape: {begun} holds {first.value}, and {' '.join(source.split(' ')[-2:])} of the same "
                f"file {shape.value}. Give each shape a file of its own."
            )
        found.append(example_of(fields, shape, source))
    return found


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples): `share` of the distinct texts, at least one, chosen by `seed`.

    Copies of one text never end up on both sides. Copies stay in the training set, where the user may mean them; the
    held-out set counts each text once, in the order of the files.
    """
    if share == 0:
        return list(examples), []
    distinct = list(dict.fromkeys(example.identity for example in examples))
    if len(distinct) < 2:
        raise DataError(
            f"The data holds {len(distinct)} distinct document, of which none can be held out: "
            "add documents, or set eval_share to 0."
        )
    count = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = set(random.Random(seed).sample(distinct, count))
    return [each for each in examples if each.identity not in chosen], _first_copies(examples, chosen)


def _first_copies(examples: Iterable[Example], identities: set[str]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        if example.identity in identities:
            first.setdefault(example.identity, example)
    return list(first.values())
