"""Conversations to tokens and labels, through the tokenizer's chat template: loss on what the assistant writes.

Which characters of the rendered text are the assistant's:
- A template with {% generation %} marks them itself.
- Otherwise turn i is what the template appends to the prompt that the model would be asked with: the conversation
  before it with add_generation_prompt=True, against the conversation up to and with it. What the template writes after
  the end-of-turn token (a line break, Phi's <|endoftext|>) is not learnt: nobody asks the model for it.
- A template that writes earlier turns differently once the conversation goes on (it drops their thinking, say) gives
  such a turn a text of its own, which ends with the turn, as the model would see and write it.
A token that holds a character of a turn is learnt, so that a turn whose first word shares a token with the header's last
space still begins.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Any

from fuyou.core.errors import ConfigError, DataError
from fuyou.train.examples import Conversation

Encoded = tuple["array[int]", bytes]  # tokens, and for each 1 where it is a label
Span = tuple[int, int]  # characters of a rendered text: first, and one after the last
Tail = tuple[str, str]

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_CURE = "Use the tokenizer of a chat model, or data with `prompt` and `completion`, or with `text`."


@dataclass
class Rendered:
    """One text for the tokenizer, and where the assistant's turns are in it."""

    text: str
    spans: list[Span]


@dataclass
class ChatTemplate:
    """A tokenizer's chat template, and counts of what a person should know about the conversations it was given."""

    tokenizer: Any
    marks: bool = field(init=False)  # the template marks the assistant's parts itself
    asks: bool = field(init=False)  # the template knows add_generation_prompt
    unfinished: int = 0  # conversations with messages after the last assistant's turn, which are left out
    rewritten: int = 0  # conversations of which some turns needed texts of their own
    extra_texts: int = 0
    reopened: int = 0  # turns that the template opens otherwise than its generation prompt
    empty: int = 0  # assistant's turns without content

    def __post_init__(self) -> None:
        template = _template_of(self.tokenizer)
        self.marks = _MARKS.search(template) is not None
        self.asks = "add_generation_prompt" in template
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"The tokenizer ({type(self.tokenizer).__name__}) does not say which characters a token stands for, so "
                "that the assistant's tokens cannot be told from the others: take one with a tokenizer.json."
            )
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        self._special = tuple(str(token) for token in added.values() if str(token).strip())
        self._tails: dict[bool, Tail] = {}  # with tools, and without
        self._ends_late = False
        self._backend = _without_trimming(self.tokenizer.backend_tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> Iterator[list[Encoded]]:
        """For each conversation its texts, one but for a template that rewrites; none where nothing is to be learnt."""
        rendered = [self.render(conversation) for conversation in conversations]
        texts = [one.text for some in rendered for one in some]
        if not texts:
            yield from ([] for _ in rendered)
            return
        # The template writes beginning-of-text itself where the model wants one.
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        if found[0].ids != self.tokenizer(texts[0], add_special_tokens=False, verbose=False)["input_ids"]:
            raise ConfigError(
                f"The tokenizer ({type(self.tokenizer).__name__}) changes what its tokenizer.json makes of a text, so that "
                "the assistant's tokens cannot be told from the others: take one that does not."
            )
        encodings = iter(found)
        for some in rendered:
            yield [self._labelled(one, next(encodings)) for one in some]

    def render(self, conversation: Conversation) -> list[Rendered]:
        """The texts of a conversation with the assistant's spans; DataError where the template refuses it."""
        messages = list(conversation.messages)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        turns = [index for index in turns if index >= conversation.learnt_from]
        if not turns:
            return []
        self.unfinished += turns[-1] + 1 < len(messages)
        self.empty += sum(not messages[i].get("content") and not messages[i].get("tool_calls") for i in turns)
        messages = messages[: turns[-1] + 1]  # what follows the last answer could only change how it is written
        return self._marked(conversation, messages) if self.marks else self._prefixes(conversation, messages, turns)

    def _marked(self, conversation: Conversation, messages: list[dict[str, Any]]) -> list[Rendered]:
        text, spans = self._write_marked(conversation, messages)
        known = 0
        if any(message["role"] == "assistant" for message in messages[: conversation.learnt_from]):
            known = len(self._write_marked(conversation, messages[: conversation.learnt_from])[1])
        spans = [span for span in spans[known:] if span[0] < span[1]]
        return [Rendered(text, spans)] if spans else []

    def _prefixes(self, conversation: Conversation, messages: list[dict[str, Any]], turns: list[int]) -> list[Rendered]:
        texts: list[Rendered] = []
        for index in reversed(turns):  # from the longest text, so that every text that goes on is already there
            turn = self._write(conversation, messages[: index + 1])
            start = self._start(conversation, messages[: index + 1], turn)
            written, learnt = self._tail(conversation, messages[: index + 1])
            if self._ends_late:
                turn = self._ended(conversation, messages[: index + 1], turn)
            end = len(turn) - len(written) + len(learnt) if turn[start:].endswith(written) else len(turn)
            for longer in texts:
                if longer.text.startswith(turn[:end]):
                    longer.spans.insert(0, (start, end))
                    break
            else:
                texts.append(Rendered(turn, [(start, end)]))
        self.rewritten += len(texts) > 1
        self.extra_texts += len(texts) - 1
        return texts[::-1]

    def _start(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> int:
        """Where the last message, an assistant's, begins in `text`, its header left out."""
        *before, last = messages
        if before:
            asked = self._write(conversation, before, add_generation_prompt=True)
            if text.startswith(asked):
                header = len(asked)
                if self.asks or not isinstance(last.get("content"), str):
                    return header
                # A template that never writes a generation prompt may still open the turn with a name.
                opened = self._opening(conversation, messages, text)
                return opened if text[header:opened].strip() else header
        self.reopened += bool(before)
        if not isinstance(last.get("content"), str):
            raise DataError(
                f"{conversation.source}: message {len(messages)} has no content, and the chat template opens it otherwise "
                "than its generation prompt: what the model would write cannot be told. Mark it in the template with "
                "{% generation %}, or remove the conversation."
            )
        return self._opening(conversation, messages, text)

    def _ended(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> str:
        """`text` with the end-of-text token that some templates write only once something follows (Qwen 1.5's)."""
        end = self.tokenizer.eos_token
        asked = self._write(conversation, messages, add_generation_prompt=True) if end else ""
        return text + end if end and asked.startswith(text + end) else text

    def _tail(self, conversation: Conversation, messages: list[dict[str, Any]]) -> Tail:
        """(what the template writes after the last answer's content, the part of it that is learnt): up to its first
        end-of-turn token, "<|end|>" of "<|end|>\n<|endoftext|>"; all of it where that is not seen."""
        tools = conversation.tools is not None
        if tools not in self._tails:
            *before, last = messages
            answered = [*before, {"role": last["role"], "content": "No."}]
            text = self._write(conversation, answered)
            place = text.rfind("No.")
            if place < 0:
                raise DataError(
                    f"{conversation.source}: the chat template does not write the content of the assistant's messages, as "
                    "those of multimodal models, which want it in parts. Set a chat template for text on the tokenizer."
                )
            ended = self._ended(conversation, answered, text)
            self._ends_late = ended != text
            written = ended[place + len("No.") :]
            found = re.match(r"\s*\S+", written)
            learnt = found[0] if found and found[0].endswith(self._special) else written
            self._tails[tools] = written, learnt
        return self._tails[tools]

    def _opening(self, conversation: Conversation, messages: list[dict[str, Any]], text: str) -> int:
        """How much of `text` comes before the content of its last message: what stays when the content is another."""
        *before, last = messages
        yes, no = (self._write(conversation, [*before, {**last, "content": content}]) for content in ("Yes.", "No."))
        place = len(commonprefix([yes, no]))
        opened = len(commonprefix([text, yes, no]))
        once = yes[place:].startswith("Yes.") and yes[place + len("Yes.") :] == no[place + len("No.") :]
        earlier = len(commonprefix([yes, self._write(conversation, before)])) if before else 0
        if not once or opened < earlier:
            raise DataError(
                f"{conversation.source}: the chat template writes message {len(messages)} more than once, or what is before "
                "it differently for each answer, so that the answer's beginning cannot be told. Mark it in the template "
                "with {% generation %}."
            )
        return opened

    def _write(self, conversation: Conversation, messages: list[dict[str, Any]], **options: bool) -> str:
        tools = None if conversation.tools is None else list(conversation.tools)
        options.setdefault("add_generation_prompt", False)
        with _refusing(conversation):
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)

    def _write_marked(self, conversation: Conversation, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The text with the marked spans in characters. apply_chat_template(return_assistant_tokens_mask=True) gives
        them in tokens, but loses a span that begins, and overruns one that ends, with white space that a tokenizer
        leaves out of its offsets."""
        from transformers.utils.chat_template_utils import render_jinja_template

        tools: Any = None if conversation.tools is None else list(conversation.tools)
        with _refusing(conversation):
            rendered: Any = render_jinja_template(  # (texts, spans); it is annotated as one string
                conversations=[messages],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                add_generation_prompt=False,
                **self.tokenizer.special_tokens_map,
            )
        return rendered[0][0], [(start, end) for start, end in rendered[1][0]]

    def _labelled(self, rendered: Rendered, encoding: Any) -> Encoded:
        tokens, offsets = encoding.ids, encoding.offsets
        labelled = bytearray(len(tokens))
        place = 0
        for start, end in rendered.spans:
            while place < len(tokens) and _before(offsets[place], start):
                place += 1
            first = place
            while place < len(tokens) and offsets[place][0] < end:
                place += 1
            labelled[first:place] = b"\x01" * (place - first)
        return array("i", tokens), bytes(labelled)

    def notes(self, what: str) -> Iterator[str]:
        """A sentence for each thing that was done to some of the conversations."""
        if self.unfinished:
            yield f"{self.unfinished:,} {what} conversations do not end with the assistant: what follows its last turn is left out."
        if self.rewritten:
            yield (
                f"The chat template rewrites earlier turns in {self.rewritten:,} {what} conversations: "
                f"{self.extra_texts:,} turns are learnt from texts of their own, as the model would write them."
            )
        if self.reopened:
            yield (
                f"The chat template opens {self.reopened:,} turns of the {what} conversations otherwise than its "
                "generation prompt: their content is learnt, and what the prompt adds is not."
            )
        if self.empty:
            yield f"{self.empty:,} turns of the assistant in the {what} conversations are empty: saying nothing is learnt."


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _template_of(tokenizer: Any) -> str:
    if not has_template(tokenizer):
        raise ConfigError(f"The tokenizer has no chat template, by which conversations become text. {_CURE}")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"The tokenizer's chat template cannot be chosen ({' '.join(str(error).split())}). {_CURE}"
        ) from None


def _without_trimming(backend: Any) -> Any:
    """The tokenizer below, with offsets that take in white space: those of Llama 3 and GPT-2 leave it out, so that a
    token of one space would belong nowhere. Only post-processing does that, and adds special tokens, which is not asked."""
    copy = type(backend).from_str(backend.to_str())
    copy.post_processor = None
    copy.no_padding()
    copy.no_truncation()
    return copy


def _before(offset: Span, start: int) -> bool:
    """Whether a token ends before character `start`; one without characters is a prefix of what follows it."""
    return offset[1] <= start if offset[0] < offset[1] else offset[0] < start


class _refusing:
    """A template is a program of somebody else's: whatever it raises is about this conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self._source = conversation.source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, ImportError):
            raise ConfigError(f"Chat templates cannot be used ({' '.join(str(error).split())}).") from None
        if isinstance(error, Exception):
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise DataError(
                f"{self._source}: the chat template refuses the conversation ({reason}): change it, or remove the row."
            ) from None
