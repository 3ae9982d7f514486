"""Blocks are found in any module tree: nothing is lost, nothing nests, and the layers of the model are among them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fuyou.core.blocks import Block, find_blocks, loose_parameters, owners
from fuyou.core.errors import ConfigError

# --- models of our own --------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))  # a list inside a block stays inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x + sum(expert(x) for expert in self.experts)


class Gpt(nn.Module):
    def __init__(self, layers: int = 3, width: int = 8, vocabulary: int = 32) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(1, width))
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(vocabulary, width), "h": nn.ModuleList(Layer(width) for _ in range(layers))}
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.transformer["wte"].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.transformer["wte"](tokens) + self.position
        for layer in self.transformer["h"]:
            x = layer(x)
        return self.head(x)


def names_of(model: nn.Module, names: list[str] | None = None) -> list[str]:
    return [block.name for block in find_blocks(model, names)]


def check_partition(model: nn.Module, blocks: list[Block]) -> None:
    """Every parameter is in a block or loose; blocks are called modules that never nest, in registration order."""
    by_name = dict(model.named_modules())
    order = list(by_name)
    assert [by_name[block.name] for block in blocks] == [block.module for block in blocks]
    positions = [order.index(block.name) for block in blocks]
    assert positions == sorted(positions)
    ids = [id(block.module) for block in blocks]
    assert len(set(ids)) == len(ids)
    for block in blocks:
        assert type(block.module).forward is not nn.Module.forward, f"{block.name} is never called"
        assert not any(id(inner) in ids for inner in block.module.modules() if inner is not block.module)

    table = owners(model, blocks)
    loose = loose_parameters(model, blocks)
    assert set(table) == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for _, parameter in loose} == {key for key, indices in table.items() if not indices}
    for parameter in model.parameters():
        inside = [i for i, block in enumerate(blocks) if any(parameter is other for other in block.module.parameters())]
        assert table[id(parameter)] == tuple(inside)


def test_own_gpt() -> None:
    model = Gpt()
    blocks = find_blocks(model)
    check_partition(model, blocks)
    assert [b.name for b in blocks] == ["transformer.wte", *(f"transformer.h.{i}" for i in range(3)), "head"]
    assert [name for name, _ in loose_parameters(model, blocks)] == ["position"]
    assert owners(model, blocks)[id(model.head.weight)] == (0, 4)  # tied: embedding and head


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(3, 2), [""]),
        (nn.MultiheadAttention(8, 2), [""]),  # reads out_proj.weight without calling out_proj
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), ["0", "2"]),
        (nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4)), ["0", "1"]),
        (nn.Sequential(nn.Linear(4, 4)), ["0"]),
        (nn.ModuleList([nn.Linear(4, 4)]), ["0"]),
        (nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer()])]), ["0.0", "0.1", "1.0"]),
        (nn.Sequential(nn.Linear(8, 8), Gpt(), nn.Linear(8, 8)), None),
        (nn.Sequential(nn.ReLU()), []),
    ],
    ids=["linear", "attention", "mlp", "pair", "one", "list", "lists", "model between layers", "no parameters"],
)
def test_small_trees(model: nn.Module, expected: list[str] | None) -> None:
    blocks = find_blocks(model)
    check_partition(model, blocks)
    if expected is None:
        expected = ["0", "1.transformer.wte", *(f"1.transformer.h.{i}" for i in range(3)), "1.head", "2"]
    assert [block.name for block in blocks] == expected


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_decoder() -> None:
    model = nn.Transformer(8, 2, 2, 3, 16)
    blocks = find_blocks(model)
    check_partition(model, blocks)
    assert {b.name for b in blocks} >= {*(f"encoder.layers.{i}" for i in range(2)), "decoder.layers.2", "encoder.norm"}
    assert not loose_parameters(model, blocks)


def test_module_registered_twice_is_one_block() -> None:
    model = Gpt()
    model.alias = model.transformer["wte"]
    assert names_of(model).count("alias") == 0
    check_partition(model, find_blocks(model))


def test_block_inside_another_block_splits_the_outer_one() -> None:
    class Embeddings(nn.Module):
        def __init__(self, words: nn.Embedding) -> None:
            super().__init__()
            self.words = words
            self.norm = nn.LayerNorm(8)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.norm(self.words(tokens))

    model = nn.Module()
    words = nn.Embedding(16, 8)
    model.embeddings = Embeddings(words)
    model.words = words  # called by itself too, e.g. by a decoder
    assert names_of(model) == ["embeddings.words", "embeddings.norm"]
    check_partition(model, find_blocks(model))


def test_parametrized_layer_is_one_block() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), weight_norm(nn.Linear(4, 4)))
    assert names_of(model) == ["0", "1"]
    assert names_of(weight_norm(nn.Linear(4, 4))) == [""]


def test_parameters_of_a_list_of_parameters_are_loose() -> None:
    model = nn.Module()
    model.prompts = nn.ParameterList([nn.Parameter(torch.zeros(3))])
    model.layers = nn.ModuleList([Layer(), Layer()])
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["layers.0", "layers.1"]
    assert [name for name, _ in loose_parameters(model, blocks)] == ["prompts.0"]


def test_hybrid_lists_keep_their_odd_layer_whole() -> None:
    class Other(Layer):
        pass

    assert names_of(nn.ModuleList([Layer(), Layer(), Other()])) == ["0", "1", "2"]


# --- blocks named by the user -------------------------------------------------------------------------------------


def test_named_blocks_come_in_registration_order_and_the_rest_is_loose() -> None:
    model = Gpt()
    blocks = find_blocks(model, ["transformer.h.2", "transformer.h.0"])
    check_partition(model, blocks)
    assert [block.name for block in blocks] == ["transformer.h.0", "transformer.h.2"]
    loose = {name for name, _ in loose_parameters(model, blocks)}
    assert {"position", "transformer.wte.weight", "transformer.h.1.norm.weight"} <= loose


def test_part_of_a_layer_may_be_named() -> None:
    assert names_of(Gpt(), ["transformer.h.1.experts.0"]) == ["transformer.h.1.experts.0"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["transformer.h.9"], "nearest name is 'transformer.h."),
        (["transformer.h.0", "transformer.h.0.norm"], "lies inside 'transformer.h.0'"),
        (["transformer.h"], "name its elements, e.g. 'transformer.h.0'"),
        (["head", "head"], "twice"),
        ([], "empty list"),
        ("head", r"give a list .*\['head'\]"),
    ],
)
def test_bad_names_are_refused_in_words(names: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_blocks(Gpt(), names)


def test_a_named_module_without_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="ReLU without parameters"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])


# --- families of transformers -------------------------------------------------------------------------------------

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**TEXT, "intermediate_size": 32}
GROUPED = {**WIDE, "num_key_value_heads": 2}
CONV = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
CONV_POSITION = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
VISION = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
T5_SIZE = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
MOE = {**GROUPED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# family: (prefix of the class and of its config, suffix of the class, config, layers)
FAMILIES: dict[str, tuple[str, str, dict, int]] = {
    "llama": ("Llama", "ForCausalLM", GROUPED, 3),
    "gpt2": ("GPT2", "LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2}, 3),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", WIDE, 3),
    "opt": ("OPT", "ForCausalLM", {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16}, 3),
    "bloom": ("Bloom", "ForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 3, "n_head": 2}, 3),
    "t5": ("T5", "ForConditionalGeneration", T5_SIZE, 4),
    "mt5 gated": ("MT5", "ForConditionalGeneration", {**T5_SIZE, "feed_forward_proj": "gated-gelu"}, 4),
    "bart": ("Bart", "ForConditionalGeneration", SEQ2SEQ, 4),
    "pegasus": ("Pegasus", "ForConditionalGeneration", SEQ2SEQ, 4),
    "bert": ("Bert", "ForMaskedLM", WIDE, 3),
    "roberta": ("Roberta", "ForMaskedLM", WIDE, 3),
    "albert, shared layers": ("Albert", "ForMaskedLM", {**WIDE, "embedding_size": 8}, 1),
    "deberta-v2": ("DebertaV2", "ForMaskedLM", WIDE, 3),
    "electra": ("Electra", "ForMaskedLM", {**WIDE, "embedding_size": 8}, 3),
    "distilbert": ("DistilBert", "ForMaskedLM", {"vocab_size": 64, "dim": 16, "n_layers": 3, "n_heads": 2}, 3),
    "mixtral": ("Mixtral", "ForCausalLM", MOE, 3),
    "qwen2": ("Qwen2", "ForCausalLM", GROUPED, 3),
    "qwen2-moe": ("Qwen2Moe", "ForCausalLM", {**MOE, "shared_expert_intermediate_size": 16}, 3),
    "gemma": ("Gemma", "ForCausalLM", {**GROUPED, "head_dim": 8}, 3),
    "phi": ("Phi", "ForCausalLM", GROUPED, 3),
    "mistral": ("Mistral", "ForCausalLM", GROUPED, 3),
    "mamba": ("Mamba", "ForCausalLM", {**TEXT, "state_size": 4}, 3),
    "rwkv": ("Rwkv", "ForCausalLM", {**TEXT, "attention_hidden_size": 16}, 3),
    "falcon": ("Falcon", "ForCausalLM", TEXT, 3),
    "gpt-j": ("GPTJ", "ForCausalLM", {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4}, 3),
    "xlnet": ("XLNet", "LMHeadModel", {"vocab_size": 64, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32}, 3),
    "jamba, hybrid": ("Jamba", "ForCausalLM", {**MOE, "attn_layer_period": 3, "attn_layer_offset": 1}, 3),
    "funnel, lists of lists": (
        "Funnel",
        "ForMaskedLM",
        {"vocab_size": 64, "block_sizes": [2, 2], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32},
        4,
    ),
    "vit": ("ViT", "ForImageClassification", {**VISION, "intermediate_size": 32}, 3),
    "clip": (
        "CLIP",
        "Model",
        {"text_config": WIDE, "vision_config": {**VISION, "intermediate_size": 32}, "projection_dim": 8},
        6,
    ),
    "whisper": ("Whisper", "ForConditionalGeneration", {**SEQ2SEQ, "pad_token_id": 0}, 4),
    "wav2vec2": ("Wav2Vec2", "ForCTC", {**WIDE, **CONV, **CONV_POSITION}, 3),
    "swin": (
        "Swin",
        "ForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        2,
    ),
    "convnext": ("ConvNext", "ForImageClassification", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]}, 4),
    "segformer": ("Segformer", "ForImageClassification", {"hidden_sizes": [8, 8, 16, 16]}, 4),
    "perceiver": (
        "Perceiver",
        "ForMaskedLM",
        {
            "vocab_size": 64,
            "d_model": 16,
            "d_latents": 16,
            "num_latents": 8,
            "max_position_embeddings": 16,
            "num_self_attends_per_block": 3,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "qk_channels": 16,
            "v_channels": 16,
        },
        3,
    ),
}


def build(prefix: str, suffix: str, config: dict) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the families are those of transformers (extra [hf])")
    model_class = getattr(transformers, prefix + suffix, None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {prefix + suffix}")
    with torch.device("meta"):  # the tree is what is looked at, not the numbers
        return model_class(getattr(transformers, prefix + "Config")(**config))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    prefix, suffix, config, layers = FAMILIES[family]
    model = build(prefix, suffix, config)
    blocks = find_blocks(model)
    check_partition(model, blocks)
    assert len(blocks) >= layers + 1, [block.name for block in blocks]  # the layers and at least an embedding
    total = sum(parameter.numel() for parameter in model.parameters())
    loose = sum(parameter.numel() for _, parameter in loose_parameters(model, blocks))
    assert loose <= 0.1 * total, f"{loose} of {total} elements are in no block"
    largest = max(sum(parameter.numel() for parameter in block.module.parameters()) for block in blocks)
    assert largest < 0.9 * total, "one block is the model"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head"]),
        (
            "gpt2",
            ["transformer.wte", "transformer.wpe", *(f"transformer.h.{i}" for i in range(3)), "transformer.ln_f"]
            + ["lm_head"],
        ),
        ("bert", ["bert.embeddings", *(f"bert.encoder.layer.{i}" for i in range(3)), "cls"]),
    ],
)
def test_names_of_well_known_families(family: str, expected: list[str]) -> None:
    prefix, suffix, config, _ = FAMILIES[family]
    assert names_of(build(prefix, suffix, config)) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "mixtral"])
def test_every_block_is_called_by_a_forward(family: str) -> None:
    prefix, suffix, config, _ = FAMILIES[family]
    model = build(prefix, suffix, config).to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.zero_()
    called: set[str] = set()
    blocks = find_blocks(model)
    for block in blocks:
        block.module.register_forward_pre_hook(lambda module, args, name=block.name: called.add(name))
    if family == "vit":
        model(pixel_values=torch.zeros(1, 3, 16, 16))
    else:
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))
    assert called == {block.name for block in blocks}
