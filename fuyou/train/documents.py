"""Documents: what a user's text and JSONL files hold, and which of them are held out."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuyou.core.errors import DataError

_SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class Document:
    """One text to learn: loss is on `text`, never on `prompt`.

    begins, ends: whether a beginning-of-text token may stand before it, and an end-of-text token after it. The
    paragraphs of one text file are a document each, so that they can be held out one by one, but the file begins
    and ends once.
    """

    prompt: str
    text: str
    source: str  # "file line N"
    begins: bool = True
    ends: bool = True

    @property
    def identity(self) -> str:
        """Two documents that differ in white space only, or in where the prompt ends, are the same text."""
        return " ".join(f"{self.prompt} {self.text}".split())


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Every document of the files, in order.

    .txt, .md: paragraphs, which blank lines separate.  .jsonl: an object a line, with "text", or with "prompt" and
    "completion"; other fields are ignored, as are blank lines. DataError names the file and line of what is missing,
    empty, malformed or not UTF-8.
    """
    documents: list[Document] = []
    for name in paths:
        path = Path(name)
        if path.suffix.lower() not in _SUFFIXES:
            raise DataError(
                f"Data file {name} is none of {', '.join(_SUFFIXES)}: convert it, or name files one by one."
            )
        if not path.is_file():
            raise DataError(f"Data file {name} {'is not a file' if path.exists() else 'does not exist'}: check `data`.")
        try:
            found = list(_jsonl(path) if path.suffix.lower() == ".jsonl" else _paragraphs(path))
        except OSError as error:
            raise DataError(f"Data file {name} cannot be read: {error.strerror}.") from None
        if not found:
            raise DataError(f"Data file {name} is empty: there is nothing to learn from it.")
        documents += found
    return documents


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, each decoded by itself so that an error can name its line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} line {number} is not UTF-8 ({error.reason}): convert the file.") from None


def _paragraphs(path: Path) -> Iterator[Document]:
    text = re.sub(r"\r\n?", "\n", "".join(line for _, line in _lines(path))).rstrip()
    line, found = 1, []
    for piece in re.split(r"((?:\n[^\S\n]*)+\n)", text):  # paragraph, blank lines, paragraph, …
        if piece.strip():
            found.append((line, piece))
        line += piece.count("\n")
    for index, (line, piece) in enumerate(found):
        ends = index == len(found) - 1
        yield Document("", piece if ends else piece + "\n\n", f"{path} line {line}", begins=index == 0, ends=ends)


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in _lines(path):
        if line.strip():
            yield _row(line, f"{path} line {number}")


def _row(line: str, source: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise DataError(f"{source} holds a JSON {type(row).__name__}, not an object with `text` or `prompt`.")
    if "text" in row and ("prompt" in row or "completion" in row):
        raise DataError(f"{source} has `text` as well as `prompt` or `completion`: keep `text` or the other two.")
    if "text" not in row and not ("prompt" in row and "completion" in row):
        raise DataError(
            f"{source} has neither `text` nor both `prompt` and `completion`; it has {', '.join(row) or 'no field'}."
        )
    prompt, name = ("", "text") if "text" in row else (row["prompt"], "completion")
    for field, value in (("prompt", prompt), (name, row[name])):
        if not isinstance(value, str):
            raise DataError(f"{source}: `{field}` is {type(value).__name__}, not a string.")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{source}: `{field}` holds half a surrogate pair, which is no character.") from None
    if not row[name].strip():
        raise DataError(f"{source}: `{name}` is empty: remove the line.")
    return Document(prompt, row[name], source)


def split(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training documents, held-out documents): `share` of the distinct texts, at least one, chosen by `seed`.

    Copies of one text never end up on both sides. Copies stay in the training set, where the user may mean them; the
    held-out set counts each text once, in the order of the files.
    """
    if share == 0:
        return list(documents), []
    distinct = list(dict.fromkeys(document.identity for document in documents))
    if len(distinct) < 2:
        raise DataError(
            f"The data holds {len(distinct)} distinct document, of which none can be held out: "
            "add documents, or set eval_share to 0."
        )
    count = min(len(distinct) - 1, max(1, round(share * len(distinct))))
    chosen = set(random.Random(seed).sample(distinct, count))
    return [d for d in documents if d.identity not in chosen], _first_copies(documents, chosen)


def _first_copies(documents: Iterable[Document], identities: set[str]) -> list[Document]:
    first: dict[str, Document] = {}
    for document in documents:
        if document.identity in identities:
            first.setdefault(document.identity, document)
    return list(first.values())
