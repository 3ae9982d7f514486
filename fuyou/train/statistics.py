"""What the data came to, in numbers, before the first step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataStatistics:
    """Counts over one set of rows; every count of tokens is after the cut, but `cut_tokens` and the document lengths."""

    what: str  # "training" or "held-out"
    sequence_length: int  # tokens a row
    documents: int  # as read; a conversation is one
    rows: int
    tokens: int  # in the rows, padding not counted
    predicted_tokens: int  # labels that the loss is a mean of
    padding_tokens: int
    cut_documents: int  # longer than a row, and cut off at its end
    cut_tokens: int  # lost by that
    split_documents: int  # longer than a row, and continued in the next one: nothing lost
    dropped_documents: int  # nothing to predict in them, cut or not
    longest_document: int  # tokens, before cutting
    median_document: int  # tokens, before cutting
    host_bytes: int  # what the rows take in host memory for the whole run

    @property
    def padding_share(self) -> float:
        """Share of the positions that the model computes for nothing, 0 to 1."""
        positions = self.tokens + self.padding_tokens
        return self.padding_tokens / positions if positions else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "padding_share": self.padding_share}

    def lines(self) -> tuple[str, ...]:
        """Two to four plain lines for a person; the last ones only where something was cut, split or dropped."""
        lines = [
            f"{self.what}: {self.documents:,} documents ({self.median_document:,} tokens in the middle, "
            f"{self.longest_document:,} at most) in {self.rows:,} rows of {self.sequence_length:,} tokens.",
            f"{self.what}: {self.tokens:,} tokens, {self.predicted_tokens:,} of them predicted; "
            f"{self.padding_share:.1%} padding; {self.host_bytes / 1e6:,.1f} MB of host memory.",
        ]
        longer = []
        if self.cut_documents:
            longer.append(f"{self.cut_documents:,} are cut off, which loses {self.cut_tokens:,} tokens")
        if self.split_documents:
            longer.append(f"{self.split_documents:,} go on in another row")
        if longer:
            lines.append(
                f"{self.what}: of the documents longer than sequence_length={self.sequence_length}, "
                f"{' and '.join(longer)}."
            )
        if self.dropped_documents:
            lines.append(f"{self.what}: {self.dropped_documents:,} documents have nothing to predict: dropped.")
        return tuple(lines)
