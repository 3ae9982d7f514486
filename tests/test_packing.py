"""Documents that share a row: laid out whole, and, by logits and gradients, none sees another. The oracle is the model
run on each document alone."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers", reason="the models under test are transformers'")

from fuyou.train.data import Layout, make_rows  # noqa: E402
from fuyou.train.documents import Document  # noqa: E402
from fuyou.train.packing import allows_packing, best_fit  # noqa: E402

VOCABULARY, LENGTH = 96, 24


class Codes:
    """A tokenizer: a character is its code; 2 ends a text."""

    bos_token_id, eos_token_id, pad_token_id = None, 2, 0

    def __call__(self, texts, add_special_tokens=True, verbose=True):
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) - 32 for letter in texts]}
        return {"input_ids": [[ord(letter) - 32 for letter in text] for text in texts]}


def documents(count: int, longest: int = LENGTH - 1) -> list[Document]:
    """Texts of 1 to `longest` letters, every second with a prompt."""
    draw = random.Random(3)
    found = []
    for number in range(count):
        text = "".join(chr(draw.randrange(40, 120)) for _ in range(draw.randint(2, longest)))
        border = draw.randrange(1, len(text)) if number % 2 else 0
        found.append(Document(text[:border], text[border:], str(number)))
    return found


# --- layout -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=200), st.integers(0, 5))
def test_best_fit_keeps_every_document_whole_and_rows_within_their_length(lengths, seed):
    rows = best_fit(lengths, 40, seed)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    sums = [sum(lengths[document] for document in row) for row in rows]
    assert max(sums) <= 40
    # Were two rows at most half full, the second one's documents would have gone into the first.
    assert sum(total <= 20 for total in sums) <= 1
    assert best_fit(lengths, 40, seed) == rows


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([6, 5, 4, 3, 2], 10, 0) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 6, 3, 3], 10, 0) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    assert len({str(best_fit([5] * 12, 10, seed)) for seed in range(8)}) > 1  # equal lengths are shuffled by the seed


def packed(count: int, what: str = "training"):
    return make_rows(documents(count), Codes(), LENGTH, True, what, (True, ""))


def test_a_packed_row_says_where_documents_begin():
    rows = packed(40)
    wanted = sorted(
        ([*Codes()(d.prompt)["input_ids"], *Codes()(d.text)["input_ids"], 2], len(d.prompt)) for d in documents(40)
    )
    batch = rows.batch(range(len(rows)), torch.device("cpu"))
    assert set(batch) == {"input_ids", "labels", "position_ids"} and rows.layout is Layout.PACKED
    found = []
    for tokens, labels, positions, length in zip(*(batch[n].tolist() for n in ("input_ids", "labels", "position_ids")),
                                                 rows.lengths.tolist(), strict=True):  # fmt: skip
        begins = [place for place, position in enumerate(positions) if position == 0]
        ends = [*begins[1:], LENGTH]
        for begin, end in zip(begins, ends, strict=True):
            assert positions[begin:end] == list(range(end - begin))
            if begin == length:  # the padding is one more, and the last
                assert end == LENGTH and set(labels[begin:]) == {-100} and set(tokens[begin:]) == {0}
                continue
            prompt = next((place for place in range(begin, end) if labels[place] != -100), end) - begin
            assert labels[begin] == -100 and labels[begin + prompt : end] == tokens[begin + prompt : end]
            found.append((tokens[begin:end], prompt if prompt > 1 else None))
    assert [tokens for tokens, _ in sorted(found)] == [tokens for tokens, _ in wanted]
    prompts = {tuple(tokens): prompt for tokens, prompt in wanted}
    assert all(prompts[tuple(tokens)] == prompt for tokens, prompt in found if prompt is not None)
    assert rows.predicted(range(len(rows))) == sum(len(tokens) - max(1, prompt) for tokens, prompt in wanted)


# --- isolation ----------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
KEYS = {"num_key_value_heads": 2}
MODELS = {
    "Llama": SMALL | KEYS,
    "Qwen2": SMALL | KEYS | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": SMALL | KEYS | {"head_dim": 8},
    "Mistral": SMALL | KEYS | {"sliding_window": 5},
    "Gemma": SMALL | KEYS | {"head_dim": 8},
    "Gemma2": SMALL | KEYS | {"head_dim": 8, "sliding_window": 5},
    "Gemma3Text": SMALL | KEYS | {"head_dim": 8, "sliding_window": 5},
    "Phi": SMALL,
    "Phi3": SMALL | KEYS | {"sliding_window": 5},
    "GPTNeoX": SMALL,
    "GPT2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
             "eos_token_id": 2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "Mixtral": SMALL | KEYS | {"num_local_experts": 4},
    "Olmo2": SMALL | KEYS,
    "Cohere": SMALL | KEYS,
}  # fmt: skip
MIXING = {
    "Bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
               "alibi": True},
    "OPT": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GptOss": SMALL | KEYS | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "Jamba": SMALL | KEYS | {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
                             "attn_layer_offset": 1, "mamba_d_state": 8},
    "Bamba": SMALL | KEYS | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4,
                             "attn_layer_indices": [1]},
    "RecurrentGemma": SMALL | KEYS | {"lru_width": 32, "attention_window_size": 8, "conv1d_width": 4,
                                      "block_types": ["recurrent", "attention"]},
    "Lfm2": SMALL | KEYS | {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def model_of(name: str, attention: str | None = None):
    values = (MODELS | MIXING)[name]
    kind = getattr(transformers, f"{name}Config")
    configuration = kind(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation=attention)
    with torch.no_grad():  # larger weights than the initial ones, so that what leaks is seen
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
    return model.eval()


def pieces(batch) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each document, the padding too."""
    found = []
    for row, positions in enumerate(batch["position_ids"].tolist()):
        begins = [place for place, position in enumerate(positions) if position == 0]
        found += [(row, begin, end) for begin, end in zip(begins, [*begins[1:], len(positions)], strict=True)]
    return found


def crowded(count: int):
    """The batch of the rows with the most documents."""
    rows = packed(12)
    most = sorted(range(len(rows)), key=lambda row: rows.row_starts[row] - rows.row_starts[row + 1])[:count]
    batch = rows.batch(most, torch.device("cpu"))
    assert len(pieces(batch)) >= 3 * count
    return batch


def alone(model, batch, row: int, begin: int, end: int):
    """What the model says of one document without the others: no positions, no mask, as a plain user would."""
    tokens, labels = batch["input_ids"][row : row + 1, begin:end], batch["labels"][row : row + 1, begin:end]
    return model(input_ids=tokens, labels=labels if (labels != -100).any() else None, use_cache=False)


@pytest.mark.parametrize("attention", [None, "eager"])  # None: sdpa where the model has it
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_is_its_documents_each_alone(name, attention):
    model = model_of(name, attention)
    assert allows_packing(model.config) == (True, "") == allows_packing(type(model))
    rows = packed(12)
    batch = rows.batch(range(len(rows)), torch.device("cpu"))
    parts = pieces(batch)
    assert len(parts) > len(rows) + 4
    output = model(**batch, use_cache=False)
    total = count = 0
    wanted: dict[str, torch.Tensor] = {}
    for row, begin, end in parts:
        part = alone(model, batch, row, begin, end)
        torch.testing.assert_close(output.logits[row : row + 1, begin:end], part.logits, rtol=1e-4, atol=1e-5)
        if part.loss is not None:
            labels = int((batch["labels"][row, begin + 1 : end] != -100).sum())
            total, count = total + part.loss * labels, count + labels
    assert count == rows.predicted(range(len(rows)))
    torch.testing.assert_close(output.loss, total / count)

    output.loss.backward()
    wanted = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    (total / count).backward()
    for key, parameter in model.named_parameters():
        if key in wanted:
            scale = wanted[key].abs().max().item()
            torch.testing.assert_close(wanted[key], parameter.grad, rtol=1e-3, atol=2e-5 * scale + 1e-7, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_passes_from_one_document_to_another(name):
    model = model_of(name)
    batch = crowded(2)
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=batch["position_ids"], use_cache=False).logits
    for row, begin, end in pieces(batch):
        logits[row, begin:end].square().sum().backward(retain_graph=True)
        inside = embedded.grad[row, begin:end].clone()
        embedded.grad[row, begin:end] = 0
        assert inside.abs().sum() > 0 and embedded.grad.abs().max() == 0
        embedded.grad = None


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_documents_is_known_and_gets_one_a_row(name):
    model = model_of(name)
    allowed, reason = allows_packing(model.config)
    assert not allowed and type(model).__name__ in reason

    batch = crowded(1)  # what would happen: another first document, other logits after it
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    (_, first, border), (_, begin, end) = pieces(batch)[:2]
    other["input_ids"][0, first:border] = (other["input_ids"][0, first:border] + 7) % 80 + 5
    from fuyou.train.loop import takes

    options = {"use_cache": False} if takes(model, "use_cache") else {}
    if not takes(model, "position_ids"):
        del batch["position_ids"], other["position_ids"]
    with torch.no_grad():
        changed = (model(**batch, **options).logits - model(**other, **options).logits)[0, begin:end].abs().max()
    assert changed > 1e-3

    rows = make_rows(documents(12), Codes(), LENGTH, True, "training", allows_packing(model.config))
    assert rows.layout is Layout.SINGLE and len(rows) == 12 and "one a row" in rows.notes[0] and reason in rows.notes[0]


def test_flash_attention_and_strangers_do_not_pack():
    configuration = transformers.LlamaConfig(**MODELS["Llama"])
    configuration._attn_implementation = "flash_attention_2"
    assert not allows_packing(configuration)[0] and "flash_attention_2" in allows_packing(configuration)[1]
    assert not allows_packing(transformers.T5Config())[0]

    class Stranger(torch.nn.Module):
        def forward(self, input_ids, position_ids=None, use_cache=None):
            return input_ids

    assert not allows_packing(Stranger)[0]


@settings(deadline=None)
@given(st.integers(0, 10))
def test_other_seeds_pack_the_same_documents(seed):
    rows = make_rows(documents(60), Codes(), LENGTH, True, "training", (True, ""), seed=seed)
    assert rows.statistics.documents == 60 and rows.token_count(range(len(rows))) == packed(60).statistics.tokens


# --- every causal language model of transformers -------------------------------------------------------------------

SHRINK = SMALL | {
    "num_key_value_heads": 4, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "d_model": 32, "num_layers": 2,
    "num_heads": 4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8,
    "mamba_n_groups": 1, "mamba_chunk_size": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "chunk_size": 4,
    "state_size": 8, "ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "lru_width": 32,
    "sliding_window": 5,
}  # fmt: skip


def tiny(kind, model):
    """A small model of any class from its configuration's defaults; None where this way of shrinking does not fit it."""
    try:
        defaults = kind()
        values = {name: value for name, value in SHRINK.items() if getattr(defaults, name, None) is not None}
        types = getattr(defaults, "layer_types", None)
        if types:
            values |= {"layer_types": list(dict.fromkeys(types)), "num_hidden_layers": len(set(types))}
        configuration = kind(**values)
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in model(configuration).parameters()) > 10**7:
                return None
        torch.manual_seed(0)
        built = model(configuration).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
            built(torch.randint(5, 80, (1, 6)))
        return built
    except Exception:  # of 190 classes each refuses such values in its own way
        return None


@pytest.mark.slow
def test_no_model_that_is_said_to_keep_documents_apart_mixes_them():
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    tried, kept, needless = 0, 0, []
    for kind in list(mapping.keys()):
        model = mapping[kind] if not isinstance(mapping[kind], tuple) else mapping[kind][0]
        built = tiny(kind, model)
        if built is None:
            continue
        from fuyou.train.loop import takes

        options = {"use_cache": False} if takes(built, "use_cache") else {}
        first, second = torch.randint(5, 80, (1, 7)), torch.randint(5, 80, (1, 9))
        positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
        allowed = allows_packing(model)[0]
        with torch.no_grad():
            try:
                separate = built(second, position_ids=positions[:, 7:], **options).logits
                torch.testing.assert_close(separate, built(second, **options).logits, rtol=1e-3, atol=1e-3)
            except (RuntimeError, TypeError, ValueError, AssertionError):  # shrunk to nonsense, or without positions
                continue
            joined = built(torch.cat([first, second], 1), position_ids=positions, **options).logits[:, 7:]
        same = torch.allclose(joined, separate, rtol=1e-3, atol=1e-3 * separate.abs().max().item())
        tried, kept = tried + 1, kept + allowed
        assert same or not allowed, f"{model.__name__} mixes documents, and allows_packing says that it does not"
        if same and not allowed:
            needless.append(model.__name__)
    assert tried > 100 and kept > 60, (tried, kept)
    assert len(needless) < 8, needless  # such a model trains one document a row: right, but slower than it need be
