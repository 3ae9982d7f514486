"""Architectures of transformers by family, tiny and with random weights, and their batches: what the slow suite trains.

Here are the text models; vision, audio and multimodal ones are in architectures_media.py. Nothing here knows fuyou. Sizes
are the smallest that keep a family's peculiarities; dropout, layer drop and caches are what the config's defaults say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY = 96
Batch = dict[str, Any]


# --- batches ------------------------------------------------------------------------------------------------------


def ints(index: int, *shape: int, low: int = 3, high: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(index))


def floats(index: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(index))


def unlabelled(index: int) -> Batch:
    return {"input_ids": ints(index, 2, 16)}


def tokens(index: int) -> Batch:
    """Input and labels alike: a causal model shifts, an encoder-decoder copies, a masked one says what it sees."""
    return {"input_ids": ints(index, 2, 16), "labels": ints(index, 2, 16)}


def long_tokens(index: int) -> Batch:
    """For attention in blocks."""
    return {"input_ids": ints(index, 2, 64), "labels": ints(index, 2, 64)}


def long_classified(index: int) -> Batch:
    return {"input_ids": ints(index, 2, 64), "labels": ints(index, 2, high=5) - 3}


def few_tokens(index: int) -> Batch:
    """One row of four: too few for every expert to get one."""
    return {"input_ids": ints(index, 1, 4), "labels": ints(index, 1, 4)}


def answered(index: int) -> Batch:
    spans = {"start_positions": ints(index, 2, high=8), "end_positions": ints(index, 2, low=8, high=16)}
    return {**unlabelled(index), **spans}


# --- architectures ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A class of transformers, what its config is made from, and its i-th batch.

    `lent`: device bytes beyond what `wrap` insists on, for a model that reads weights without calling their module.
    """

    model: str
    config: dict[str, Any]
    batch: Callable[[int], Batch] = tokens
    lent: int = 0

    def build(self) -> nn.Module:
        """The same weights each time, in training mode."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.manual_seed(0)
        model_class = getattr(transformers, self.model)
        return model_class(model_class.config_class(**self.config)).train()


def family(suffix: str, names: str, config: dict[str, Any], batch: Callable[[int], Batch] = tokens, lent: int = 0):
    """Architectures of one config, by the first part of their class's name."""
    return {name: Architecture(name + suffix, config, batch, lent) for name in names.split()}


SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LENT = 2**19

# fmt: off
TEXT = {
    **SPECIAL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}
EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1,
}
LATENT = {  # attention through a low rank
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8,
}
INDEXED = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "head_dim": 8, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 64}
SEQ2SEQ = {
    **SPECIAL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0,
}


def causal(names: str, **config: Any) -> dict[str, Architecture]:
    return family("ForCausalLM", names, {**TEXT, **config})


def masked(names: str, lent: int = 0, **config: Any) -> dict[str, Architecture]:
    return family("ForMaskedLM", names, {**TEXT, "num_key_value_heads": 4, **config}, lent=lent)


def seq2seq(names: str, batch: Callable[[int], Batch] = tokens, **config: Any) -> dict[str, Architecture]:
    return family("ForConditionalGeneration", names, {**SEQ2SEQ, **config}, batch)


DENSE = {
    **causal(
        "Apertus Arcee BitNet Cohere Cohere2 Cwm DiffLlama Doge Ernie4_5 Exaone4 Gemma Gemma2 Gemma3 Glm Glm4 GPTNeoX "
        "GPTNeoXJapanese Granite Helium HrmText HunYuanDenseV1 Jais2 Llama Ministral Mistral ModernBertDecoder NanoChat "
        "Nemotron Olmo Olmo2 Olmo3 Persimmon Phi Phi3 Qwen2 Qwen3 SeedOss SmolLM3 StableLm Starcoder2 VaultGemma",
        head_dim=8,
    ),
    **causal("BioGpt Falcon Moshi"),
    **causal("Bloom GPTBigCode", n_layer=3, n_head=4, n_embd=32, n_positions=64),
    **causal("CodeGen GPTJ", **GPT, rotary_dim=4),
    **causal("OPT", ffn_dim=64, word_embed_proj_dim=32),
    **causal("XGLM", d_model=32, num_layers=3, attention_heads=4, ffn_dim=64),
    **causal("Mpt", d_model=32, n_layers=3, n_heads=4, max_seq_len=64),
    **causal("MiniCPM3", **LATENT),
    **family("ForCausalLM", "GPTNeo", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64,
    }),
    **causal(
        "Gemma3n", num_kv_shared_layers=0, laurel_rank=8, hidden_size_per_layer_input=8, altup_num_inputs=2, head_dim=8,
        vocab_size_per_layer_input=VOCABULARY, activation_sparsity_pattern=[0.9, 0.0, 0.0],
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    **causal(
        "Gemma4", num_kv_shared_layers=0, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
        head_dim=8, global_head_dim=8,
    ),
    **family("LMHeadModel", "GPT2 OpenAIGPT CTRL", {**GPT, "dff": 64}),
    **family("LMHeadModel", "XLNet", {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64}),
    **family("Decoder", "BertGeneration", {**TEXT, "is_decoder": True}),
}

MIXTURES = {
    **causal(
        "Afmoe AriaText Cohere2Moe DeepseekV4 Ernie4_5_Moe ExaoneMoe FlexOlmo Glm4Moe GptOss GraniteMoe GraniteMoeShared "
        "HunYuanMoEV1 JetMoe Llama4 MiniMax MiniMaxM2 Mixtral Olmoe Phimoe Qwen3Moe SolarOpen",
        head_dim=8, **EXPERTS,
    ),
    **causal("Qwen2Moe", shared_expert_intermediate_size=16, **EXPERTS),
    **causal("DeepseekV2", topk_method="greedy", first_k_dense_replace=1, n_shared_experts=1, **EXPERTS, **LATENT),
    **causal("DeepseekV3", first_k_dense_replace=1, n_shared_experts=1, **EXPERTS, **LATENT),
    **causal("DeepseekV32", first_k_dense_replace=1, n_shared_experts=1, **EXPERTS, **LATENT, **INDEXED),
    **causal("GlmMoeDsa", **EXPERTS, **LATENT, **INDEXED),
    **causal("Dots1", n_shared_experts=1, **EXPERTS),
    **causal("Zaya", **{**EXPERTS, "num_experts_per_tok": 1}),
    **causal(
        "Dbrx", d_model=32, n_heads=4, n_layers=3, max_seq_len=64,
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    ),
    "Mixtral, experts without a token": Architecture(
        "MixtralForCausalLM",
        {**TEXT, **EXPERTS, "num_local_experts": 16, "num_experts_per_tok": 1, "output_router_logits": True}, few_tokens,
    ),
    "SwitchTransformers, experts without a token": Architecture(
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_experts": 16, "expert_capacity": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        few_tokens,
    ),
}

HYBRIDS = {
    **causal("FalconMamba Lfm2 Mamba OlmoHybrid RecurrentGemma", head_dim=8, state_size=4),
    **causal("Rwkv", attention_hidden_size=32),
    **causal("Bamba", **SCAN, attn_layer_indices=[1]),
    **causal("GraniteMoeHybrid", **EXPERTS, **SCAN, shared_intermediate_size=32, layer_types=["mamba", "attention", "mamba"]),
    **causal("FalconH1", **SCAN, mamba_d_ssm=64, head_dim=8),
    **causal(
        "Jamba", **EXPERTS, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        mamba_d_state=4, mamba_dt_rank=4,
    ),
    **causal("Mamba2", num_heads=8, head_dim=8, state_size=8, n_groups=1, chunk_size=8),
    **causal(  # one attention layer, shared by two places
        "Zamba", num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, n_mamba_heads=2, mamba_dt_rank=4,
        mamba_d_state=4,
    ),
    **causal(
        "Zamba2", num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, n_mamba_heads=8,
        mamba_headdim=8, mamba_ngroups=1, chunk_size=8, num_mem_blocks=1, use_mem_rope=False, adapter_rank=8,
    ),
    **causal(
        "NemotronH", num_hidden_layers=4, layers_block_type=["mamba", "attention", "mlp", "moe"], mamba_num_heads=8,
        mamba_head_dim=8, ssm_state_size=8, chunk_size=8, head_dim=8, moe_shared_expert_intermediate_size=16,
        **{**EXPERTS, "n_groups": 1},
    ),
    **causal("Qwen3Next", **EXPERTS, **LINEAR, shared_expert_intermediate_size=16),
    **causal("Qwen3_5", **LINEAR),
    **causal("Lfm2Moe", **EXPERTS, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    **causal(
        "KimiLinear", **EXPERTS, **LATENT, linear_head_dim=8, linear_num_heads=4,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    **family("ForCausalLM", "xLSTM", {
        **SPECIAL, "hidden_size": 32, "num_hidden_layers": 3, "num_blocks": 3, "num_heads": 4, "chunk_size": 16,
        "mode": "train", "ffn_round_up_to_multiple_of": 8, "use_cache": False,  # its cache has other shapes
    }),
}

ENCODERS = {
    **masked(
        "Bert Camembert ConvBert Data2VecText Ernie Esmc EuroBert FNet Gte IBert JinaEmbeddingsV3 LayoutLM MegatronBert "
        "ModernBert MPNet Mra NomicBert RoFormer Roberta RobertaPreLayerNorm Ultrabert XLMRoberta XLMRobertaXL Yoso",
    ),
    **masked("Albert Electra", embedding_size=16),
    **masked("RemBert", input_embedding_size=16, output_embedding_size=32),
    **masked("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=16),
    **masked(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, conv_kernel_size=3,
        norm_rel_ebd="layer_norm", share_att_key=True,
    ),
    **masked("DistilBert", dim=32, n_layers=3, n_heads=4, hidden_dim=64),
    **masked("Esm", mask_token_id=4, position_embedding_type="rotary"),
    **masked("Longformer", attention_window=8),
    **masked("Luke", entity_vocab_size=32, entity_emb_size=16),
    **masked("MobileBert", embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, num_feedforward_networks=2),
    **masked("Nystromformer", segment_means_seq_len=16, num_landmarks=4),
    **masked("RoCBert", pronunciation_vocab_size=32, shape_vocab_size=32, pronunciation_embed_dim=8, shape_embed_dim=8),
    **masked("SqueezeBert", embedding_size=32, q_groups=2, k_groups=2, v_groups=2, intermediate_groups=2, output_groups=2),
    **masked("Tapas", type_vocab_sizes=[3, 8, 8, 2, 8, 8, 4]),
    **masked("Xmod", languages=["a", "b"], default_language="a"),
    **masked(
        "Perceiver", lent=LENT, d_model=32, d_latents=32, num_latents=8, num_self_attends_per_block=3, qk_channels=32,
        num_self_attention_heads=4, num_cross_attention_heads=4, v_channels=32, max_position_embeddings=16,
    ),
    **family("ForMaskedLM", "Funnel", {
        "vocab_size": VOCABULARY, "block_sizes": [1, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64,
    }),
    "Albert, shared groups": Architecture(
        "AlbertForMaskedLM",
        {**TEXT, "embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4, "inner_group_num": 2},
    ),
    **family("ForMaskedLM", "BigBird", {**TEXT, "block_size": 4, "num_random_blocks": 1}, long_tokens),
    **family("WithLMHeadModel", "Flaubert XLM", {
        "vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "layerdrop": 0.3,
        "max_position_embeddings": 64,
    }),
    **family("ForSequenceClassification", "Canine", {
        **TEXT, "num_hash_buckets": 64, "local_transformer_stride": 16, "downsampling_rate": 4,
    }, long_classified),
    **family("ForQuestionAnswering", "Splinter", TEXT, answered),
}

ENCODER_DECODERS = {
    **seq2seq("Bart Blenderbot BlenderbotSmall M2M100 MBart Mvp PLBart Pegasus"),
    **seq2seq("BigBirdPegasus", long_tokens, block_size=4, num_random_blocks=1),
    **seq2seq("FSMT", src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY, langs=["en", "de"]),
    **seq2seq("LED", attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    **seq2seq("NllbMoe", num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=8),
    **seq2seq("PegasusX", num_global_tokens=4, block_size=8),
    **family("MTModel", "Marian", SEQ2SEQ),
    "Bart, layer drop": Architecture(
        "BartForConditionalGeneration", {**SEQ2SEQ, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3}
    ),
    **family("ForConditionalGeneration", "ProphetNet", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64, "num_buckets": 8, "relative_max_distance": 16,
    }),
    **family("ForConditionalGeneration", "T5 MT5 UMT5", T5),
    **family("ForConditionalGeneration", "LongT5", {
        **T5, "local_radius": 4, "global_block_size": 4, "encoder_attention_type": "transient-global",
    }),
    **family("ForConditionalGeneration", "SwitchTransformers", {
        **T5, "num_experts": 4, "expert_capacity": 8, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    }),
    **family("ForConditionalGeneration", "T5Gemma", {
        **SPECIAL, "encoder": {**TEXT, "num_hidden_layers": 2, "head_dim": 8},
        "decoder": {**TEXT, "num_hidden_layers": 2, "head_dim": 8},
    }),
}
# Plain PyTorch differs from itself: each layer seeds torch anew with torch.seed(), which asks the system.
UNREPEATABLE = {
    **family("ModelWithLMHead", "Reformer", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "attention_head_size": 8, "num_attention_heads": 4,
        "feed_forward_size": 64, "attn_layers": ["local", "lsh", "local"], "num_buckets": 2, "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "axial_pos_shape": [4, 4], "axial_pos_embds_dim": [16, 16], "is_decoder": True,
        "max_position_embeddings": 64,
    }),
}
# fmt: on

TEXTS = {**DENSE, **MIXTURES, **HYBRIDS, **ENCODERS, **ENCODER_DECODERS}
