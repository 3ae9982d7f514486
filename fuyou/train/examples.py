"""What is learnt from: one text, or one conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


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
    file: str = ""  # of a paragraph: its file, and its place among the file's paragraphs
    paragraph: int = 0

    @property
    def identity(self) -> str:
        """Two documents that differ in white space only, or in where the prompt ends, are the same text."""
        return " ".join(f"{self.prompt} {self.text}".split())

    def follows(self, other: Document) -> bool:
        """Whether this is the paragraph after `other` in the same file."""
        return bool(self.file) and self.file == other.file and self.paragraph == other.paragraph + 1


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template: loss is on the assistant's turns from message `learnt_from` on.

    Messages are {"role", "content", …} as a chat template takes them, without null fields. `plain`: what stands in
    where the tokenizer has no chat template; None where nothing can.
    """

    messages: tuple[dict[str, Any], ...]
    source: str
    learnt_from: int = 0
    tools: tuple[dict[str, Any], ...] | None = None
    plain: Document | None = None

    @property
    def identity(self) -> str:
        return " ".join(json.dumps([self.messages, self.tools], sort_keys=True).split())


Example = Document | Conversation
