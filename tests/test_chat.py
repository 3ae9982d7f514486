"""Conversations to tokens and labels. The oracle writes each template's text by hand, tokenises it with `tokenizers`, and
finds the assistant's tokens by counting bytes; or reads the tokens that came out as a person would. It renders no template
and uses no offsets."""

from __future__ import annotations

import ast
import functools
import json
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", reason="chat templates are the tokenizer's")
tokenizers = pytest.importorskip("tokenizers", reason="the test trains a tokenizer")

from fuyou.cli import main  # noqa: E402
from fuyou.core.errors import ConfigError, DataError  # noqa: E402
from fuyou.train.conversations import ChatTemplate  # noqa: E402
from fuyou.train.data import make_rows  # noqa: E402
from fuyou.train.documents import Conversation, read_documents  # noqa: E402

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LATE_END = (  # as Qwen 1.5's: the last message is not ended before something follows it
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if (loop.last and add_generation_prompt) or not loop.last %}{{ '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NAMES = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
FORGETFUL = (  # as Qwen 3's: the thinking of all but the last turn is dropped once a user answers
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% set answer = m['content'].split('</think>')[-1] %}"
    "{% if loop.index0 > ns.last %}{{ '<think>' + m['content'].split('</think>')[0].split('<think>')[-1] + '</think>' }}"
    "{% endif %}{{ answer }}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- the oracle ---------------------------------------------------------------------------------------------------

Segments = list[tuple[str, bool]]  # text, and whether it is learnt


def chatml(messages) -> Segments:
    return [piece for m in messages for piece in ((f"<|im_start|>{m['role']}\n", False),
            (f"{m['content']}<|im_end|>", m["role"] == "assistant"), ("\n", False))]  # fmt: skip


def late_end(messages) -> Segments:
    return chatml(messages)[:-1]  # the last line break is the template's, once something follows


def llama3(messages) -> Segments:
    return [("<s>", False)] + [piece for m in messages for piece in (
        (f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False),
        (f"{m['content'].strip()}<|eot_id|>", m["role"] == "assistant"))]  # fmt: skip


def mistral(messages) -> Segments:
    return [("<s>", False)] + [
        (f" {m['content']}</s>", True) if m["role"] == "assistant" else (f"[INST] {m['content']} [/INST]", False)
        for m in messages
    ]


def phi(messages) -> Segments:
    return [piece for m in messages for piece in ((f"<|{m['role']}|>\n", False),
            (f"{m['content']}<|end|>", m["role"] == "assistant"), ("\n", False))] + [("</s>", False)]  # fmt: skip


def names(messages) -> Segments:
    return [piece for m in messages for piece in ((f"{m['role']}: ", False),
            (f"{m['content']}\n", m["role"] == "assistant"))]  # fmt: skip


TEMPLATES = {
    "chatml": (CHATML, chatml),
    "marked": (MARKED, chatml),
    "late end": (LATE_END, late_end),
    "llama3": (LLAMA3, llama3),
    "mistral": (MISTRAL, mistral),
    "phi": (PHI, phi),
    "names": (NAMES, names),
}
EOS = {"chatml": "<|im_end|>", "late end": "<|im_end|>", "llama3": "<|eot_id|>"}


def bytes_of_letters() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + n): byte for n, byte in enumerate(others)}}


LETTERS = bytes_of_letters()


def expected(backend, segments: Segments) -> tuple[list[int], list[bool]]:
    """Tokens of the whole text, and for each whether one of its bytes is to be learnt."""
    text = "".join(text for text, _ in segments)
    encoding = backend.encode(text, add_special_tokens=False)
    learnt = [flag for text, flag in segments for _ in text.encode()]
    place, mask = 0, []
    for token in encoding.tokens:
        size = len(token.encode()) if token in SPECIAL else len(token)
        if token not in SPECIAL:
            assert bytes(LETTERS[letter] for letter in token) == text.encode()[place : place + size]
        mask.append(any(learnt[place : place + size]))
        place += size
    assert place == len(learnt)
    return encoding.ids, mask


# --- fixtures -----------------------------------------------------------------------------------------------------


def docstrings(count: int) -> list[tuple[str, str]]:
    """(name, docstring) of the standard library's classes and functions."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in string literals
        for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-k]*/*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                    found.append((f"{path.stem}.{node.name}", ast.get_docstring(node)))
            if len(found) >= count:
                return found
    raise AssertionError(f"{len(found)} docstrings")


@functools.cache
def trained():
    """A byte-level BPE with the special tokens of several model families."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for _, text in docstrings(600)], trainer)
    return bpe


@pytest.fixture(scope="module")
def backend():
    return trained()


def wrapped(backend, template: str | None, eos: str = "</s>", trims: bool = False):
    """The tokenizer as transformers loads it. trims: offsets without white space, as Llama 3's and GPT-2's."""
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trims)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=copy, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def encode(tokenizer, messages, **options) -> list[tuple[list[int], list[bool]]]:
    conversation = Conversation(tuple(messages), "a.jsonl line 1", **options)
    texts = next(iter(ChatTemplate(tokenizer).encode([conversation])))
    return [(list(tokens), [mark == 1 for mark in marks]) for tokens, marks in texts]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def learnt_text(tokenizer, tokens, marks) -> str:
    return tokenizer.decode([token for token, mark in zip(tokens, marks, strict=True) if mark])


# --- masks --------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text(" \n\t\u00a0\u3000.a", max_size=6),
    st.sampled_from(["", "No.", "Aye.", "assistant\n", "<|im_end|>", "é\u0301 \U0001f469\u200d\U0001f680", "</think>x", "[INST]"]),
)  # fmt: skip
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), TEXTS), max_size=6)


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "mistral"])
@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
@example(turns=[("assistant", " ")])  # a token of nothing but a space
@example(turns=[("system", ""), ("assistant", "")])  # nothing but an end
@example(turns=[("assistant", "<|im_end|>")])  # what looks like the end is not
@example(turns=[("user", "No."), ("assistant", "Yes."), ("assistant", "No.")])
def test_any_conversation_is_labelled_as_by_hand(name, trims, turns):
    template, by_hand = TEMPLATES[name]
    tokenizer = wrapped(trained(), template, EOS.get(name, "</s>"), trims)
    messages = [says(*turn) for turn in turns]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nothing is learnt after the last answer
    found = encode(tokenizer, [says(*turn) for turn in turns])
    assert found == ([expected(trained(), by_hand(messages))] if messages else [])


@pytest.mark.parametrize("trims", [False, True])
@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_a_template_without_generation_prompt_is_labelled_as_by_hand(trims, turns):
    messages = [says(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    assert encode(wrapped(trained(), MISTRAL, trims=trims), messages) == [expected(trained(), mistral(messages))]


@settings(max_examples=40, deadline=None)
@given(turns=st.lists(st.tuples(st.text("ab \n", max_size=4), st.text("cd \n", max_size=4), st.text("ef \n", max_size=4)),
                      min_size=1, max_size=4))  # fmt: skip
def test_a_template_that_rewrites_history_gives_each_turn_its_own_text(turns):
    """Every answer is learnt once, after exactly the prompt that the model would be asked with."""
    messages, wanted = [], []
    for question, thought, answer in turns:
        messages.append(says("user", question))
        asked = "".join(f"<|im_start|>{m['role']}\n{m['content'].split('</think>')[-1]}<|im_end|>\n" for m in messages)
        messages.append(says("assistant", f"<think>{thought}</think>{answer}"))
        wanted.append([(f"{asked}<|im_start|>assistant\n", False), (f"<think>{thought}</think>{answer}<|im_end|>", True),
                       ("\n", False)])  # fmt: skip
    found = encode(wrapped(trained(), FORGETFUL, "<|im_end|>"), messages)
    assert found == [expected(trained(), segments) for segments in wanted]


def test_a_turn_that_only_changes_its_thinking_shares_a_text_while_no_user_speaks(backend):
    tokenizer = wrapped(backend, FORGETFUL, "<|im_end|>")
    messages = [says("user", "a"), says("assistant", "<think>b</think>c"), says("tool", "d"), says("assistant", "e")]
    (text,) = encode(tokenizer, messages)
    assert learnt_text(tokenizer, *text) == "<think>b</think>c<|im_end|><think>e</think>e<|im_end|>"


def test_only_what_follows_the_prompt_messages_is_learnt(backend):
    messages = [says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]
    for template in (CHATML, MARKED):
        tokenizer = wrapped(backend, template)
        (text,) = encode(tokenizer, messages, learnt_from=2)
        assert learnt_text(tokenizer, *text) == "d<|im_end|>"
        assert encode(tokenizer, messages[:2], learnt_from=2) == []


def test_the_header_is_not_learnt_where_the_generation_prompt_is_another(backend):
    """As DeepSeek R1's: it asks with <think>, and writes history without."""
    template = PHI.replace("'<|assistant|>\n' }}", "'<|assistant|>\n<think>\n' }}")
    tokenizer = wrapped(backend, template)
    (text,) = encode(
        tokenizer, [says("user", "a"), says("assistant", "Answer"), says("user", "b"), says("assistant", "")]
    )
    assert learnt_text(tokenizer, *text) == "Answer<|end|><|end|>"
    chat = ChatTemplate(tokenizer)
    chat.render(Conversation((says("user", "a"), says("assistant", "b")), "x"))
    assert "1 turns of the training conversations otherwise" in " ".join(chat.notes("training"))


def test_tools_and_calls_reach_the_template_and_calls_are_learnt(backend):
    template = "{% for t in tools or [] %}{{ t['name'] + ';' }}{% endfor %}" + CHATML.replace(
        "m['content'] +", "(m['content'] or '') + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
    )
    tokenizer = wrapped(backend, template)
    call = {"role": "assistant", "tool_calls": [{"name": "sum", "arguments": {"a": 1}}]}
    messages = [says("user", "1+1"), call, says("tool", "2"), says("assistant", "two")]
    (text,) = encode(tokenizer, messages, tools=({"name": "sum"},))
    assert learnt_text(tokenizer, *text) == json.dumps(call["tool_calls"]) + "<|im_end|>two<|im_end|>"
    assert tokenizer.decode(text[0]).startswith("sum;<|im_start|>user\n1+1")


def test_templates_of_trl_agree_where_they_mark_what_is_learnt(backend):
    """TRL ships for several models the template and a copy in which its authors marked the assistant's parts. Where both
    write the same text, the prefixes find what the marks say, but for what TRL learns after the end-of-turn token: a line
    break, Phi's end-of-text."""
    trl = pytest.importorskip("trl", reason="its templates are a second opinion")
    folder = Path(trl.__file__).parent / "chat_templates"
    messages = [
        says("user", "Hello, who?"),
        says("assistant", "A thing."),
        says("user", "And?"),
        says("assistant", " Yes \n"),
    ]
    agreed = []
    for marked in sorted(folder.glob("*_training.jinja")):
        original = marked.with_name(marked.name.replace("_training", ""))
        if not original.is_file() or "generation %}" in original.read_text():
            continue
        if original.stem.startswith(("muse", "qwen3_8")):  # TRL also learns what the generation prompt holds already
            continue
        try:
            with_marks = encode(wrapped(backend, marked.read_text()), messages)
            by_prefix = encode(wrapped(backend, original.read_text()), messages)
            chat = ChatTemplate(wrapped(backend, original.read_text()))
            chat.render(Conversation(tuple(messages), "x"))
        except DataError:  # templates of multimodal models want content in parts
            continue
        if chat.reopened:  # an opening that is not the generation prompt: TRL learns it, this leaves it out
            continue
        if [tokens for tokens, _ in with_marks] != [tokens for tokens, _ in by_prefix]:
            continue  # written differently, as where the copy keeps the thinking of earlier turns
        tokenizer = wrapped(backend, None)
        for (tokens, marks), (_, prefix) in zip(with_marks, by_prefix, strict=True):
            assert all(mark or not found for mark, found in zip(marks, prefix, strict=True)), marked.name
            more = [token for token, mark, found in zip(tokens, marks, prefix, strict=True) if mark and not found]
            assert not tokenizer.decode(more).replace("</s>", "").strip(), (marked.name, tokenizer.decode(more))
        agreed.append(marked.stem)
    assert len(agreed) >= 10, agreed


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_a_chat_template_is_refused(backend):
    with pytest.raises(ConfigError, match="no chat template.*`prompt` and `completion`"):
        encode(wrapped(backend, None), [says("user", "a"), says("assistant", "b")])
    tokenizer = wrapped(backend, None)
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(ConfigError, match="cannot be chosen"):
        encode(tokenizer, [says("user", "a"), says("assistant", "b")])


def test_what_the_template_refuses_is_refused_in_its_words(backend):
    tokenizer = wrapped(backend, MISTRAL)
    with pytest.raises(DataError, match="a.jsonl line 1: .*roles must alternate user/assistant"):
        encode(tokenizer, [says("assistant", "a"), says("assistant", "b")])
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"
    with pytest.raises(DataError, match="a.jsonl line 1: the chat template refuses"):
        encode(tokenizer, [says("user", "a"), says("assistant", "b")])


def test_a_template_that_leaves_content_out_is_refused(backend):
    """As those of multimodal models do with content that is a string."""
    parts = CHATML.replace("m['content'] +", "(m['content'][0]['text'] or '') +")
    with pytest.raises(DataError, match="does not write the content"):
        encode(wrapped(backend, parts), [says("user", "a"), says("assistant", "b")])


def test_an_answer_whose_beginning_cannot_be_told_is_refused(backend):
    """The opening differs from the generation prompt, and there is no content to find."""
    template = PHI.replace("'<|assistant|>\n' }}", "'<|assistant|>\n<think>\n' }}").replace(
        "m['content'] +", "(m['content'] or 'call') +"
    )
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    with pytest.raises(DataError, match="message 2 has no content"):
        encode(wrapped(backend, template), [says("user", "a"), call])
    echo = "{% for m in messages %}{{ messages[-1]['content'] + m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="message 2"):
        encode(wrapped(backend, echo), [says("user", "a"), says("assistant", "b")])


def test_a_tokenizer_without_offsets_is_refused(backend):
    class Slow:
        chat_template, is_fast = CHATML, False

        def get_chat_template(self):
            return CHATML

    with pytest.raises(ConfigError, match="Slow.*tokenizer.json"):
        ChatTemplate(Slow())


# --- a file of more than 2,000 conversations ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> tuple[Path, list[list[dict]]]:
    """chats.jsonl: questions on the standard library's docstrings; one to three of them a conversation."""
    pairs = docstrings(4300)
    conversations, place = [], 0
    while place < len(pairs) and len(conversations) < 2150:
        some = pairs[place : place + 1 + place % 3]
        place += len(some)
        messages = [says("system", "Answer as the documentation does.")] if len(conversations) % 4 == 0 else []
        for name, text in some:
            messages += [says("user", f"What is {name}?"), says("assistant", text)]
        if len(conversations) % 50 == 7:
            messages.append(says("user", "Thank you."))
        conversations.append(messages)
    assert len(conversations) >= 2000
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages, "id": 1}) + "\n" for messages in conversations), "utf-8")
    return path, conversations


def read_by_eye(tokens: list[str], start: list[str], end: str) -> list[bool]:
    """The learnt tokens of a text, as a person marks them: from after the assistant's header to the end of its turn."""
    marks, inside = [], False
    for place, token in enumerate(tokens):
        marks.append(inside)
        if inside and token == end:
            inside = False
        elif not inside and tokens[place - len(start) + 1 : place + 1] == start:
            inside = True
    return marks


@pytest.mark.parametrize(
    ("name", "header", "end", "packing"),
    [
        ("chatml", "<|im_start|>assistant\n", "<|im_end|>", True),
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", False),
    ],
)
def test_every_mask_of_a_large_chat_file(backend, chats, name, header, end, packing):
    path, conversations = chats
    tokenizer = wrapped(backend, TEMPLATES[name][0], EOS[name])
    rows = make_rows(read_documents([str(path)]), tokenizer, 512, packing, "training", (True, ""))
    start = backend.encode(header, add_special_tokens=False).tokens

    wanted = {}
    cut = lost = dropped = 0
    for messages in conversations:
        messages = messages[:-1] if messages[-1]["role"] == "user" else messages
        ids, mask = expected(backend, TEMPLATES[name][1](messages))
        assert mask == read_by_eye([backend.id_to_token(token) for token in ids], start, end)
        if any(mask[1:512]):
            cut, lost = cut + (len(ids) > 512), lost + max(0, len(ids) - 512)
            key = tuple(ids[:512])
            wanted[key] = wanted.get(key, 0) + 1
        else:
            dropped += 1

    found: dict[tuple[int, ...], int] = {}
    starts = rows.document_starts.tolist()
    for begin, stop in zip(starts, starts[1:], strict=False):
        ids = rows.flat_tokens[begin:stop].tolist()
        by_eye = read_by_eye([backend.id_to_token(token) for token in ids], start, end)
        assert [label != -100 for label in rows.flat_labels[begin:stop].tolist()] == by_eye
        assert all(
            label in (-100, token) for label, token in zip(rows.flat_labels[begin:stop].tolist(), ids, strict=True)
        )
        found[tuple(ids)] = found.get(tuple(ids), 0) + 1
    assert found == wanted
    counts = rows.statistics
    assert (counts.documents, counts.cut_documents, counts.cut_tokens) == (len(conversations), cut, lost)
    assert counts.dropped_documents == dropped and (len(rows) < 1500 if packing else len(rows) == sum(wanted.values()))
    assert any("do not end with the assistant" in note for note in rows.notes)
    assert cut > 0


@pytest.fixture(scope="module")
def model(backend, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    wrapped(backend, CHATML, "<|im_end|>").save_pretrained(folder)
    torch.manual_seed(0)
    configuration = transformers.LlamaConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=4, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(configuration).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_chat_file_trains_in_full_and_with_adapters(backend, chats, model, tmp_path, capsys, lora):
    """The held-out loss before the first step is that of plain transformers on each conversation alone: what is learnt,
    cut, packed and kept apart in between is right, or it would be another."""
    if lora is not None:
        pytest.importorskip("peft", reason="adapters are peft's")
    (tmp_path / "nvme").mkdir()
    values = {
        "model": str(model), "data": str(chats[0]), "output": str(tmp_path / "out"), "nvme": str(tmp_path / "nvme"),
        "device": "cpu", "ram": "256MiB", "gpu": "256MiB", "steps": 4, "batch_size": 4, "sequence_length": 256,
        "learning_rate": 1e-2, "eval_share": 0.02, "seed": 3,
    } | ({"lora": lora} if lora else {})  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "c.yaml")]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    before, after = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert after < before

    from fuyou.train.documents import split

    _, held_out = split(read_documents([str(chats[0])]), 0.02, 3)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    total = count = 0
    for conversation in held_out:
        messages = list(conversation.messages)
        ids, mask = expected(backend, chatml(messages[:-1] if messages[-1]["role"] == "user" else messages))
        ids, mask = torch.tensor([ids[:256]]), torch.tensor([mask[:256]])
        predicted = int(mask[:, 1:].sum())
        if predicted:
            with torch.no_grad():
                total += plain(ids, labels=ids.masked_fill(~mask, -100)).loss.item() * predicted
            count += predicted
    assert before == pytest.approx(total / count, rel=1e-5)
