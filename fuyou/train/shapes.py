"""What a row is, from its fields alone: text, prompt and completion, messages, Alpaca, ShareGPT."""

from __future__ import annotations

import enum
import json
from typing import Any

from fuyou.core.config import nearest
from fuyou.core.errors import DataError
from fuyou.train.examples import Conversation, Document, Example

# github.com/tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT: what Alpaca itself was trained on. The answer follows
# without a line break.
_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
_ALPACA = f"Below is an instruction that describes a task. {_REQUEST}{{}}\n\n### Response:"
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{_REQUEST}{{}}\n\n### Input:\n{{}}\n\n### Response:"
)

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT_ROLES = {
    **{role: role for role in _ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


class Shape(enum.Enum):
    """The value is what a person calls it in a message."""

    MESSAGES = "`messages`"
    SHAREGPT = "`conversations`"
    PROMPT = "`prompt` and `completion`"
    PROMPT_MESSAGES = "`prompt` and `completion` as messages"
    ALPACA = "`instruction` and `output`"
    TEXT = "`text`"


_FIELDS = {
    Shape.MESSAGES: ("messages",),
    Shape.SHAREGPT: ("conversations",),
    Shape.PROMPT: ("prompt", "completion"),
    Shape.ALPACA: ("instruction", "output"),
}


def shape_of(row: dict[str, Any], source: str) -> Shape:
    """The one shape whose fields the row has; fields of no shape are ignored, and so are nulls, which tables put where
    a row lacks a field. `text` beside a whole Alpaca row or conversation is that row laid out, and ignored.
    DataError for none, and for two."""
    there = {name for name, value in row.items() if value is not None}
    found = [shape for shape, fields in _FIELDS.items() if there.issuperset(fields)]
    if len(found) > 1:
        raise DataError(f"{source} has {found[0].value} as well as {found[1].value}: keep one of the two.")
    if "text" in there and (found == [Shape.PROMPT] or (not found and there & {"prompt", "completion"})):
        raise DataError(f"{source} has `text` as well as `prompt` or `completion`: keep `text` or the other two.")
    if found == [Shape.PROMPT]:
        lists = [isinstance(row[name], list) for name in ("prompt", "completion")]
        return Shape.PROMPT_MESSAGES if all(lists) else Shape.PROMPT
    if found:
        return found[0]
    if "text" in there:
        return Shape.TEXT
    _refuse_nulls(row, source)
    raise DataError(
        f"{source} has neither `text`, nor `messages`, nor both `prompt` and `completion`, nor both `instruction` and "
        f"`output`, nor `conversations`; it has {', '.join(map(str, row)) or 'no field'}."
    )


def _refuse_nulls(row: dict[str, Any], source: str) -> None:
    for fields in (*_FIELDS.values(), ("text",)):
        if all(name in row for name in fields):
            name = next(name for name in fields if row[name] is None)
            raise DataError(f"{source}: `{name}` is null, not a string or a list: fill it, or remove the row.")


def example_of(row: dict[str, Any], shape: Shape, source: str) -> Example:
    """The row as what is learnt from it; DataError for a field of the wrong type, or without anything in it."""
    if shape is Shape.TEXT:
        return Document("", _filled(row, "text", source), source)
    if shape is Shape.PROMPT:
        prompt = _string(row, "prompt", source)
        return Document(prompt, _filled(row, "completion", source), source)
    if shape is Shape.ALPACA:
        return _alpaca(row, source)
    if shape is Shape.PROMPT_MESSAGES:
        before = _messages(row["prompt"], "prompt", source, "role", "content")
        after = _messages(row["completion"], "completion", source, "role", "content")
        return Conversation((*before, *after), source, len(before), _tools(row, source))
    if shape is Shape.MESSAGES:
        return Conversation(
            tuple(_messages(row["messages"], "messages", source, "role", "content")), source, 0, _tools(row, source)
        )
    return _sharegpt(row, source)


def _alpaca(row: dict[str, Any], source: str) -> Conversation:
    """One user turn and one answer. Without a chat template: the prompt that Stanford Alpaca was trained on."""
    instruction, output = _string(row, "instruction", source), _filled(row, "output", source)
    given = _string(row, "input", source) if row.get("input") is not None else ""
    messages = _system(row, source)
    history = row.get("history") or []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise DataError(f"{source}: `history` {index + 1} is not a pair of strings, [instruction, output].")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    plain = None
    if not messages:  # the Alpaca prompts have no place for a system prompt or for earlier turns
        prompt = _ALPACA_INPUT.format(instruction, given) if given else _ALPACA.format(instruction)
        plain = Document(prompt, output, source)
    messages.append({"role": "user", "content": f"{instruction}\n{given}" if given else instruction})
    messages.append({"role": "assistant", "content": output})
    return Conversation(tuple(messages), source, 0, None, plain)


def _sharegpt(row: dict[str, Any], source: str) -> Conversation:
    """`from` and `value`, or `role` and `content`, under `conversations`; a `system` field opens the conversation."""
    turns = row["conversations"]
    old = isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]
    names = ("from", "value") if old else ("role", "content")
    messages = _messages(turns, "conversations", source, *names)
    if messages and messages[0]["role"] != "system":
        messages = _system(row, source) + messages
    return Conversation(tuple(messages), source, 0, _tools(row, source))


def _system(row: dict[str, Any], source: str) -> list[dict[str, Any]]:
    if row.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _string(row, "system", source)}]


def _messages(turns: Any, field: str, source: str, role: str, content: str) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise DataError(f"{source}: `{field}` is {_kind(turns)}, not a list of messages {{{role!r}, {content!r}}}.")
    if not turns:
        raise DataError(f"{source}: `{field}` is an empty list: remove the row.")
    return [_message(turn, f"{source}: `{field}` {n}", role, content) for n, turn in enumerate(turns, 1)]


def _message(turn: Any, where: str, role: str, content: str) -> dict[str, Any]:
    """The turn as a chat template takes it: role and content, then what else it has (tool_calls, name, …)."""
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {_kind(turn)}, not an object with {role!r} and {content!r}.")
    turn = {name: value for name, value in turn.items() if value is not None}
    if not isinstance(turn.get(role), str):
        raise DataError(f"{where}: {role!r} is {_kind(turn.get(role))}, not a string such as 'user'.")
    known = _SHAREGPT_ROLES if role == "from" else {name: name for name in _ROLES}
    if turn[role] not in known:
        raise DataError(
            f"{where}: the role {turn[role]!r} is none of {', '.join(known)}{nearest(turn[role], list(known))}"
        )
    rest = {name: _unsplit(value) for name, value in turn.items() if name not in (role, content)}
    text = turn.get(content)
    if text is None and rest.get("tool_calls"):
        return {"role": known[turn[role]], **rest}
    return {"role": known[turn[role]], "content": _text_of(text, where, content), **rest}


def _text_of(value: Any, where: str, field: str) -> str:
    """A string, or text parts joined: [{"type": "text", "text": …}]. Images and sound are refused."""
    if isinstance(value, list) and value:
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise DataError(
                    f"{where}: {field!r} holds a part of type {kind!r}: only text parts can be learnt from; "
                    "remove the others, or the row."
                )
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {field!r} is {_kind(value)}, not a string.")
    return _encodable(value, f"{where}: {field!r}")


def _unsplit(value: Any) -> Any:
    """Nested values without the nulls that tables put where one row lacks what another has."""
    if isinstance(value, dict):
        return {name: _unsplit(each) for name, each in value.items() if each is not None}
    return [_unsplit(each) for each in value] if isinstance(value, list) else value


def _tools(row: dict[str, Any], source: str) -> tuple[dict[str, Any], ...] | None:
    """The functions that the template may describe to the model: a list of JSON schemas, or that list as a string."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source}: `tools` is not JSON: {error}.") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{source}: `tools` is not a list of function schemas.")
    return tuple(_unsplit(tool) for tool in tools)


def _string(row: dict[str, Any], field: str, source: str) -> str:
    if not isinstance(row[field], str):
        raise DataError(f"{source}: `{field}` is {_kind(row[field])}, not a string.")
    return _encodable(row[field], f"{source}: `{field}`")


def _filled(row: dict[str, Any], field: str, source: str) -> str:
    if not _string(row, field, source).strip():
        raise DataError(f"{source}: `{field}` is empty: remove the row.")
    return row[field]


def _encodable(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a surrogate pair, which is no character.") from None
    return text


def _kind(value: Any) -> str:
    return "missing or null" if value is None else type(value).__name__
