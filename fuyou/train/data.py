"""Rows: documents as tokens and labels of one length, ready for a causal language model."""

from __future__ import annotations

import enum
import statistics
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fuyou.core.errors import DataError
from fuyou.train.conversations import ChatTemplate, Encoded, has_template
from fuyou.train.examples import Conversation, Document, Example
from fuyou.train.packing import best_fit
from fuyou.train.statistics import DataStatistics

IGNORED = -100  # the label that every transformers loss skips
_BATCH = 1024  # documents a tokenizer call


class Layout(enum.Enum):
    """What a row is, and what its batch carries beside input_ids and labels.

    STREAM: one text cut every `sequence_length` tokens, whose documents see their neighbours; nothing.
    SINGLE: one document; attention_mask.
    PACKED: several documents, none of which sees another; position_ids, which start again at 0 for each document and
    for the padding, and of which transformers makes a block-diagonal mask (`packing.allows_packing` says where).
    """

    STREAM = "stream"
    SINGLE = "single"
    PACKED = "packed"


@dataclass(frozen=True)
class Rows:
    """Rows of one length, kept in host memory without their padding: 8 bytes a token and 8 a document."""

    flat_tokens: np.ndarray  # (N,) int32, row after row
    flat_labels: np.ndarray  # (N,) int32, IGNORED on prompts and on what nothing predicts; the model shifts them
    document_starts: np.ndarray  # (D + 1,) int64, in the flat arrays
    row_starts: np.ndarray  # (R + 1,) int64, in document_starts
    sequence_length: int
    padding_token: int
    layout: Layout
    statistics: DataStatistics
    notes: tuple[str, ...]  # what was done to the data beside what the statistics say, one sentence each

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @property
    def tokens(self) -> np.ndarray:
        """(R, T) int32, padded: a copy."""
        return self._padded(self.flat_tokens, range(len(self)), self.padding_token)

    @property
    def labels(self) -> np.ndarray:
        """(R, T) int32, IGNORED on the padding: a copy."""
        return self._padded(self.flat_labels, range(len(self)), IGNORED)

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens before the padding."""
        return np.diff(self.document_starts[self.row_starts])

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids, labels (B, T) int64, and what the layout needs: attention_mask or position_ids (B, T) int64."""
        arrays = {
            "input_ids": self._padded(self.flat_tokens, rows, self.padding_token),
            "labels": self._padded(self.flat_labels, rows, IGNORED),
        }
        if self.layout is Layout.SINGLE:
            inside = np.arange(self.sequence_length)[None] < self.lengths[np.asarray(rows)][:, None]
            arrays["attention_mask"] = inside
        elif self.layout is Layout.PACKED:
            arrays["position_ids"] = np.stack([self._positions(row) for row in rows])
        return {name: torch.from_numpy(each.astype(np.int64)).to(device) for name, each in arrays.items()}

    def predicted(self, rows: Sequence[int]) -> int:
        """Tokens that the loss over these rows is a mean of: labels that are not ignored, the first column aside."""
        return sum(int((self._of(self.flat_labels, row)[1:] != IGNORED).sum()) for row in rows)

    def token_count(self, rows: Sequence[int]) -> int:
        """Tokens of these rows, padding not counted."""
        return int(self.lengths[np.asarray(rows)].sum())

    def _of(self, flat: np.ndarray, row: int) -> np.ndarray:
        first, last = self.document_starts[self.row_starts[row : row + 2]]
        return flat[first:last]

    def _padded(self, flat: np.ndarray, rows: Sequence[int], padding: int) -> np.ndarray:
        padded = np.full((len(rows), self.sequence_length), padding, np.int32)
        for place, row in enumerate(rows):
            found = self._of(flat, row)
            padded[place, : len(found)] = found
        return padded

    def _positions(self, row: int) -> np.ndarray:
        """(T,) positions within each document; the padding counts as one more, so that no document sees it."""
        starts = self.document_starts[self.row_starts[row] : self.row_starts[row + 1] + 1]
        begins = np.zeros(self.sequence_length + 1, np.int64)
        begins[starts - starts[0]] = starts - starts[0]
        return np.arange(self.sequence_length) - np.maximum.accumulate(begins)[:-1]


def make_rows(
    documents: Sequence[Example],
    tokenizer: Any,
    sequence_length: int,
    packing: bool | str,
    what: str,
    isolation: tuple[bool, str] | None = None,
    seed: int = 0,
) -> Rows:
    """Tokenise and lay out in rows; `what` ("training", "held-out") names the set in errors and notes.

    packing: True: whole documents, several a row, none of which sees another, where `isolation` (what
    `packing.allows_packing` says of the model) allows it, and else one a row; False: one a row; "stream": one text cut
    every `sequence_length` tokens, its documents seeing their neighbours, as in GPT-3 (arXiv 2005.14165, appendix B).
    With `isolation` None, True is "stream".

    But in a stream, paragraphs that follow each other in their file are one text, a text longer than a row goes on in
    another, and what has a prompt, or is a conversation, is cut off at the end of its row. What then has nothing to
    predict is dropped. DataError where no row is left.
    """
    notes: list[str] = []
    layout = Layout.STREAM if packing else Layout.SINGLE
    if packing is True and isolation is not None:
        layout = Layout.PACKED if isolation[0] else Layout.SINGLE
        if not isolation[0]:
            notes.append(
                f"The {what} documents stand one a row, with padding: {isolation[1]}, so documents in one row would see "
                "each other. Set packing to stream where that does no harm, as in long texts."
            )
    encoded = _Texts()
    _encode(documents, tokenizer, what, notes, encoded, joins=layout is not Layout.STREAM)
    pieces = _Pieces()
    if layout is Layout.STREAM:
        _cut_stream(encoded, sequence_length, pieces)
        if pieces.dropped:
            whole = len(pieces.bounds) + pieces.dropped
            notes.append(f"{pieces.dropped} of {whole} {what} rows have nothing to predict: dropped.")
    else:
        _cut_documents(encoded, sequence_length, pieces)
    if not pieces.bounds:
        raise DataError(_nothing_left(encoded, len(documents), sequence_length, what))
    rows = [[piece] for piece in range(len(pieces.bounds))]
    if layout is Layout.PACKED:
        rows = best_fit([end - start for start, end in pieces.bounds], sequence_length, seed)
    return _rows(encoded, pieces, rows, layout, sequence_length, _padding_token(tokenizer), what, tuple(notes))


@dataclass
class _Texts:
    """What the documents came to, one after another: 5 bytes a token."""

    tokens: array[int] = field(default_factory=lambda: array("i"))
    labelled: bytearray = field(default_factory=bytearray)  # 1 where a token is a label
    starts: list[int] = field(default_factory=lambda: [0])
    goes_on: list[bool] = field(default_factory=list)  # may be continued in another row
    unlearnt: int = 0  # conversations without a turn of the assistant

    def append(self, text: Encoded, goes_on: bool, joins: bool = False) -> None:
        self.tokens += text[0]
        self.labelled += text[1]
        if joins:
            self.starts[-1] = len(self.tokens)
        else:
            self.starts.append(len(self.tokens))
            self.goes_on.append(goes_on)

    def __len__(self) -> int:
        return len(self.goes_on)

    def lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]

    def predicts(self, start: int, end: int) -> bool:
        """Whether a row of these tokens has a label: nothing predicts its first token."""
        return self.labelled.find(1, start + 1, end) != -1


@dataclass
class _Pieces:
    """Where the parts that stand whole in a row begin and end, and what became of the rest."""

    bounds: list[tuple[int, int]] = field(default_factory=list)
    cut: int = 0
    cut_tokens: int = 0
    split: int = 0
    dropped: int = 0

    def keep(self, texts: _Texts, start: int, end: int) -> bool:
        kept = texts.predicts(start, end)
        if kept:
            self.bounds.append((start, end))
        return kept


def _encode(
    examples: Sequence[Example], tokenizer: Any, what: str, notes: list[str], into: _Texts, joins: bool
) -> None:
    """Every example in order; notes say how conversations were laid out."""
    with_template = has_template(tokenizer)
    template, plain, alpaca = None, 0, 0
    first, last = _special_tokens(tokenizer)
    previous: Document | None = None
    for start in range(0, len(examples), _BATCH):
        some = list(examples[start : start + _BATCH])
        for index, example in enumerate(some):
            if isinstance(example, Conversation) and example.plain is not None:
                alpaca += 1
                if not with_template:
                    some[index] = example.plain
                    plain += 1
        conversations = [each for each in some if isinstance(each, Conversation)]
        if conversations and template is None:
            template = ChatTemplate(tokenizer)
        chats = template.encode(conversations) if template else iter(())
        texts = _encode_texts([each for each in some if isinstance(each, Document)], tokenizer, first, last)
        for example in some:
            if isinstance(example, Document):
                joined = joins and previous is not None and example.follows(previous)
                into.append(next(texts), not example.prompt, joined)
                previous = example
            else:
                found = next(chats)
                into.unlearnt += not found
                for text in found:
                    into.append(text, False)
                previous = None
    if alpaca:
        how = "the prompts of Stanford Alpaca, the tokenizer having no chat template" if plain else "the chat template"
        notes.append(f"{alpaca:,} {what} rows of `instruction` and `output` are written by {how}.")
    if template:
        notes.extend(template.notes(what))


def _encode_texts(
    documents: Sequence[Document], tokenizer: Any, first: list[int], last: list[int]
) -> Iterator[Encoded]:
    """Prompt and text tokenised apart, so that the border between them is a border of tokens."""
    if not documents:
        return
    prompts = _token_ids(tokenizer, [document.prompt for document in documents])
    texts = _token_ids(tokenizer, [document.text for document in documents])
    for document, prompt, text in zip(documents, prompts, texts, strict=True):
        before = (first if document.begins else []) + prompt
        after = text + (last if document.ends else [])
        # A text without a prompt learns its first token too, from what stands before it in its row.
        unlabelled = len(before) if prompt else 0
        tokens = array("i", before + after)
        yield tokens, bytes(unlabelled) + b"\x01" * (len(tokens) - unlabelled)


def _token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """(before a document, after it): beginning-of-text where this tokenizer adds it by itself; end-of-text if any."""
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_begin = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    return [begin] if adds_begin else [], [] if end is None else [end]


def _padding_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def _cut_stream(texts: _Texts, length: int, pieces: _Pieces) -> None:
    for start in range(0, len(texts.tokens), length):
        if not pieces.keep(texts, start, min(start + length, len(texts.tokens))):
            pieces.dropped += 1


def _cut_documents(texts: _Texts, length: int, pieces: _Pieces) -> None:
    """Each text whole, cut off, or, where it may go on, in parts: none of one token, which nothing would predict."""
    for number, (start, end) in enumerate(zip(texts.starts, texts.starts[1:], strict=False)):
        if end - start > length and texts.goes_on[number]:
            pieces.split += 1
            while end - start > length:
                part = length - 1 if end - start == length + 1 and length > 2 else length
                pieces.keep(texts, start, start + part)
                start += part
            pieces.keep(texts, start, end)
            continue
        kept = pieces.keep(texts, start, min(end, start + length))
        pieces.dropped += not kept
        if kept and end - start > length:
            pieces.cut += 1
            pieces.cut_tokens += end - start - length
    pieces.dropped += texts.unlearnt


def _nothing_left(texts: _Texts, documents: int, length: int, what: str) -> str:
    """Why no row is left, with the numbers that say what to set."""
    message = f"The {what} data ({documents:,} documents) makes no row of {length:,} tokens with anything to predict: "
    before = []  # tokens before the first that is learnt
    for start, end in zip(texts.starts, texts.starts[1:], strict=False):
        found = texts.labelled.find(1, start + 1, end)
        if found != -1:
            before.append(found - start)
    if not before:
        if texts.unlearnt:
            return f"{message}no conversation has a turn of the assistant. Add some, or take other data."
        return f"{message}it is empty once tokenised. Add data."
    return (
        f"{message}what is to be learnt begins after {min(before):,} tokens at least, {max(before):,} at most, and is cut "
        f"off. Set sequence_length to {max(before) + 1:,} or more, or shorten the prompts."
    )


def _rows(
    texts: _Texts,
    pieces: _Pieces,
    rows: list[list[int]],
    layout: Layout,
    length: int,
    padding: int,
    what: str,
    notes: tuple[str, ...],
) -> Rows:
    """The pieces in the order of their rows, with labels in place of marks, and the count of it all."""
    bounds = [pieces.bounds[piece] for row in rows for piece in row]
    starts = np.cumsum([0, *(end - start for start, end in bounds)], dtype=np.int64)
    row_starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    flat_tokens, flat_labels = np.empty(starts[-1], np.int32), np.full(starts[-1], IGNORED, np.int32)
    all_tokens = np.frombuffer(texts.tokens, np.int32)
    labelled = np.frombuffer(texts.labelled, np.uint8) == 1
    for place, (start, end) in zip(starts.tolist(), bounds, strict=False):
        here = slice(place, place + end - start)
        flat_tokens[here] = all_tokens[start:end]
        flat_labels[here][labelled[start:end]] = all_tokens[start:end][labelled[start:end]]
        if layout is Layout.PACKED:
            flat_labels[place] = IGNORED  # or the last token of another document would predict it
    row_tokens = starts[row_starts]
    predicted = int((flat_labels != IGNORED).sum() - (flat_labels[row_tokens[:-1]] != IGNORED).sum())
    lengths = texts.lengths()
    counts = DataStatistics(
        what=what,
        sequence_length=length,
        documents=len(texts) + texts.unlearnt,
        rows=len(rows),
        tokens=len(flat_tokens),
        predicted_tokens=predicted,
        padding_tokens=len(rows) * length - len(flat_tokens),
        cut_documents=pieces.cut,
        cut_tokens=pieces.cut_tokens,
        split_documents=pieces.split,
        dropped_documents=texts.unlearnt if layout is Layout.STREAM else pieces.dropped,
        longest_document=max(lengths),
        median_document=int(statistics.median(lengths)),
        host_bytes=flat_tokens.nbytes + flat_labels.nbytes + starts.nbytes + row_starts.nbytes,
    )
    return Rows(flat_tokens, flat_labels, starts, row_starts, length, padding, layout, counts, notes)
