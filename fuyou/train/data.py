"""Rows: documents as tokens and labels of one length, ready for a causal language model."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fuyou.core.errors import DataError
from fuyou.train.documents import Document

IGNORED = -100  # the label that every transformers loss skips
_BATCH = 1024  # documents a tokenizer call


@dataclass(frozen=True)
class Rows:
    """Rows of one length; a row ends in padding where `lengths` is less than that. Host memory, 8 bytes a token."""

    tokens: np.ndarray  # (R, T) int32
    labels: np.ndarray  # (R, T) int32, IGNORED on prompts and padding; the model shifts them
    lengths: np.ndarray  # (R,) tokens before the padding
    mask: bool  # batches carry an attention mask
    notes: tuple[str, ...]  # what had to be cut or dropped, one sentence each

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """input_ids, labels (B, T) int64, and attention_mask where documents are padded one by one."""
        index = np.asarray(rows)
        batch = {
            "input_ids": torch.from_numpy(self.tokens[index].astype(np.int64)),
            "labels": torch.from_numpy(self.labels[index].astype(np.int64)),
        }
        if self.mask:
            inside = np.arange(self.tokens.shape[1])[None] < self.lengths[index][:, None]
            batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def predicted(self, rows: Sequence[int]) -> int:
        """Tokens that the loss over these rows is a mean of: labels that are not ignored, the first column aside."""
        return int((self.labels[np.asarray(rows), 1:] != IGNORED).sum())

    def token_count(self, rows: Sequence[int]) -> int:
        """Tokens of these rows, padding not counted."""
        return int(self.lengths[np.asarray(rows)].sum())


def make_rows(documents: Sequence[Document], tokenizer: Any, sequence_length: int, packing: bool, what: str) -> Rows:
    """Tokenise and lay out in rows; `what` ("training", "held-out") names the set in errors and notes.

    packing: the documents are one stream, cut every `sequence_length` tokens; the last row is padded. Attention sees
    the neighbours within a row, as in GPT-3 (arXiv 2005.14165, appendix B). Otherwise a row is one document, cut off at
    `sequence_length` or padded. Rows without a label to predict are dropped. DataError where no row is left.
    """
    encoded = _encode(documents, tokenizer)
    cut = 0
    if packing:
        pieces = _stream(encoded, sequence_length)
    else:
        everything = list(encoded)
        cut = sum(len(tokens) > sequence_length for tokens, _ in everything)
        pieces = ((tokens[:sequence_length], labelled[:sequence_length]) for tokens, labelled in everything)
    kept, dropped = [], 0
    for tokens, labelled in pieces:
        if any(labelled[1:]):
            kept.append((tokens, labelled))
        else:
            dropped += 1
    if not kept:
        raise DataError(
            f"The {what} data ({len(documents)} documents) makes no row of {sequence_length} tokens with anything to "
            "predict: it is empty once tokenised, or holds prompts only; add data, or raise sequence_length."
        )
    notes = []
    if cut:
        notes.append(f"{cut} of {len(everything)} {what} documents are longer than {sequence_length} tokens: cut off.")
    if dropped:
        notes.append(f"{dropped} of {len(kept) + dropped} {what} rows have nothing to predict: dropped.")
    return _padded(kept, sequence_length, _padding_token(tokenizer), not packing, tuple(notes))


Encoded = tuple["array[int]", bytes]  # tokens, and for each 1 where it is a label


def _encode(documents: Sequence[Document], tokenizer: Any) -> Iterator[Encoded]:
    """Prompt and text tokenised apart, so that the border between them is a border of tokens."""
    first, last = _special_tokens(tokenizer)
    for start in range(0, len(documents), _BATCH):
        some = documents[start : start + _BATCH]
        prompts = _token_ids(tokenizer, [document.prompt for document in some])
        texts = _token_ids(tokenizer, [document.text for document in some])
        for document, prompt, text in zip(some, prompts, texts, strict=True):
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


def _stream(encoded: Iterator[Encoded], length: int) -> Iterator[Encoded]:
    tokens, labelled = array("i"), bytearray()
    for more_tokens, more_labelled in encoded:
        tokens += more_tokens
        labelled += more_labelled
        whole = len(tokens) - len(tokens) % length
        for start in range(0, whole, length):
            yield tokens[start : start + length], bytes(labelled[start : start + length])
        del tokens[:whole], labelled[:whole]
    if tokens:
        yield tokens, bytes(labelled)


def _padded(rows: list[Encoded], length: int, padding: int, mask: bool, notes: tuple[str, ...]) -> Rows:
    tokens = np.full((len(rows), length), padding, np.int32)
    labels = np.full((len(rows), length), IGNORED, np.int32)
    lengths = np.empty(len(rows), np.int32)
    for row, (some, labelled) in enumerate(rows):
        tokens[row, : len(some)] = some
        here = np.frombuffer(labelled, np.uint8) == 1
        labels[row, : len(some)][here] = tokens[row, : len(some)][here]
        lengths[row] = len(some)
    return Rows(tokens, labels, lengths, mask, notes)
