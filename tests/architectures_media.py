"""Architectures of transformers for images, video, sound, series, and several of these with text: see architectures.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import (
    LENT,
    SEQ2SEQ,
    T5,
    TEXT,
    VOCABULARY,
    Architecture,
    Batch,
    family,
    floats,
    ints,
    tokens,
    unlabelled,
)

IMAGE_TOKEN = VOCABULARY - 1
Batches = Callable[[int], Batch]


def classes(index: int) -> torch.Tensor:
    return ints(index, 2, low=0, high=2)


def pixels(index: int, size: int = 32) -> Batch:
    return {"pixel_values": floats(index, 2, 3, size, size)}


def images(index: int) -> Batch:
    return {**pixels(index), "labels": classes(index)}


def large_images(index: int) -> Batch:
    return {**pixels(index, 64), "labels": classes(index)}


def large_pixels(index: int) -> Batch:
    return pixels(index, 64)


def segmented(index: int) -> Batch:
    return {**pixels(index), "labels": ints(index, 2, 32, 32, low=0, high=2)}


def depths(index: int) -> Batch:
    return {**pixels(index), "labels": floats(index, 2, 32, 32).abs() + 0.1}


def videos(index: int) -> Batch:
    return {"pixel_values": floats(index, 2, 4, 3, 16, 16), "labels": classes(index)}


def boxed_pixels(index: int) -> Batch:
    labels = [
        {"class_labels": classes(index + row), "boxes": floats(index + row, 2, 4).sigmoid() / 2} for row in (0, 1)
    ]
    return {**pixels(index, 64), "labels": labels}


def heard(key: str, *shape: int, high: int = VOCABULARY) -> Batches:
    return lambda index: {key: floats(index, 2, *shape), "labels": ints(index, 2, 6, low=1, high=high)}


def waves(index: int) -> Batch:
    return {"input_values": floats(index, 2, 1, 320)}


def masked_waves(index: int) -> Batch:
    return {
        "input_values": floats(index, 2, 640),
        "mask_time_indices": ints(index, 2, 39, low=0, high=2).bool(),
        "sampled_negative_indices": ints(index, 2, 39, 3, low=0, high=39),
    }


def series(index: int) -> Batch:
    return {"past_values": floats(index, 2, 16, 3), "future_values": floats(index + 50, 2, 4, 3)}


def timed_series(index: int) -> Batch:
    return {
        "past_values": floats(index, 2, 10).abs(), "past_time_features": floats(index + 50, 2, 10, 1),
        "past_observed_mask": torch.ones(2, 10), "future_values": floats(index + 60, 2, 4).abs(),
        "future_time_features": floats(index + 70, 2, 4, 1),
    }  # fmt: skip


def episodes(index: int) -> Batch:
    return {
        "states": floats(index, 2, 5, 4), "actions": floats(index + 50, 2, 5, 3), "rewards": floats(index + 60, 2, 5, 1),
        "returns_to_go": floats(index + 70, 2, 5, 1), "timesteps": torch.arange(5).expand(2, 5),
        "attention_mask": torch.ones(2, 5),
    }  # fmt: skip


def pairs(index: int) -> Batch:
    return {**unlabelled(index), **pixels(index), "return_loss": True}


def captioned(index: int) -> Batch:
    return {**tokens(index), **pixels(index)}


def with_image(count: int, **more: Batches) -> Batches:
    """Tokens among which `count` stand for the image."""

    def batch(index: int) -> Batch:
        input_ids = ints(index, 2, 8 + count, high=90)
        input_ids[:, 1 : 1 + count] = IMAGE_TOKEN
        extra = {name: value for make in more.values() for name, value in make(index).items()}
        return {"input_ids": input_ids, "labels": input_ids.clone(), **pixels(index), **extra}

    return batch


def one_tile(index: int) -> Batch:
    return {"pixel_values": floats(index, 2, 1, 3, 32, 32)}


def qwen_pixels(index: int) -> Batch:
    input_ids = ints(index, 2, 16, high=85)
    input_ids[:, 1:7] = torch.tensor([93, *[IMAGE_TOKEN] * 4, 94])
    return {
        "input_ids": input_ids, "labels": input_ids.clone(), "pixel_values": floats(index, 32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (input_ids == IMAGE_TOKEN).long(),
    }  # fmt: skip


def cross_attended(index: int) -> Batch:
    ones = torch.ones(2, 1, dtype=torch.long)
    return {
        **tokens(index), "pixel_values": floats(index, 2, 1, 1, 3, 32, 32), "aspect_ratio_ids": ones,
        "aspect_ratio_mask": ones[..., None], "cross_attention_mask": torch.ones(2, 16, 1, 1, dtype=torch.long),
    }  # fmt: skip


# fmt: off
SIGHT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1], "drop_path_rate": 0.1}
PYRAMID = {"hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 4]}
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage4"],
}
DETECTION = {
    **SEQ2SEQ, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET,
    "hidden_size": 32, "num_queries": 5, "num_labels": 2,
}
SOUND = {
    "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2, "vocab_size": 32,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2, "mask_time_prob": 0.3,
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "layerdrop": 0.3,
    "pad_token_id": 0,
}
SPEECH = {**SEQ2SEQ, "max_source_positions": 64, "max_target_positions": 32}
PATCHES = {
    "num_input_channels": 3, "context_length": 16, "patch_length": 4, "patch_stride": 4, "prediction_length": 4,
    "d_model": 16, "num_hidden_layers": 2, "num_layers": 2, "num_attention_heads": 2, "ffn_dim": 32,
}
FORECAST = {
    "prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "label_length": 4,
}


def classifier(names: str, batch: Batches = images, **config: Any) -> dict[str, Architecture]:
    return family("ForImageClassification", names, config, batch)


VISION = {
    **classifier("Beit DeiT Data2VecVision Dinov2 Dinov2WithRegisters IJepa ViT ViTMSN", **SIGHT),
    **classifier("DonutSwin Swin Swinv2", **WINDOWS),
    **classifier("ConvNext ConvNextV2 PoolFormer", **STAGES),
    **classifier("Pvt PvtV2", image_size=32, **STAGES, num_attention_heads=[1, 2, 2, 4]),
    **classifier("Segformer", **PYRAMID),
    **classifier("ResNet", embedding_size=8, hidden_sizes=[16, 32, 32, 32], depths=[1, 2, 2, 1]),
    **classifier("RegNet", embedding_size=8, hidden_sizes=[8, 16, 32, 32], depths=[1, 1, 2, 1], groups_width=8),
    **classifier("Bit", embedding_size=16, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 2, 1], num_groups=4),
    **classifier(
        "MobileViT", image_size=32, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
    ),
    **classifier("MobileNetV1 MobileNetV2", image_size=32, depth_multiplier=0.1, min_depth=8),
    **classifier("MobileViTV2", large_images, image_size=64, width_multiplier=0.1, base_attn_unit_dims=[16, 24, 32]),
    **classifier(
        "Levit", large_images, image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 4], depths=[2, 2, 2],
        key_dim=[8, 8, 8], down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    ),
    **classifier("EfficientNet", width_coefficient=0.1, depth_coefficient=0.2, hidden_dim=128),
    **classifier("FocalNet", image_size=32, embed_dim=16, depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3]),
    **classifier("Hiera", image_size=[32, 32], embed_dim=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
    **classifier("SwiftFormer", image_size=32, embed_dims=[8, 16, 16, 32], depths=[1, 1, 2, 1]),
    **family("Model", "DINOv3ViT", SIGHT, pixels),
    **family("ForPreTraining", "ViTMAE", {
        **SIGHT, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }, pixels),
    **family("ForObjectDetection", "ConditionalDetr DabDetr Detr", DETECTION, large_pixels),
    **family("ForObjectDetection", "DeformableDetr", {
        **DETECTION, "backbone_config": {**RESNET, "out_features": ["stage3", "stage4"]}, "num_feature_levels": 2,
    }, large_pixels, LENT),
    **family("ForObjectDetection", "Yolos", {**SIGHT, "image_size": [32, 32], "num_detection_tokens": 5}, pixels),
    **family("ForSemanticSegmentation", "DPT", {
        **SIGHT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
        "fusion_hidden_size": 16,
    }, segmented),
    **family("ForDepthEstimation", "GLPN", PYRAMID, depths),
    **family("ForSemanticSegmentation", "UperNet", {
        "backbone_config": {
            "model_type": "convnext", **STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "hidden_size": 16, "auxiliary_channels": 8, "auxiliary_in_channels": 16,
    }, segmented),
    **family("ForVideoClassification", "Timesformer VideoMAE", {**SIGHT, "image_size": 16, "num_frames": 4}, videos),
    **family("ForVideoClassification", "Vivit", {
        **SIGHT, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8],
    }, videos),
}

AUDIO = {
    **family(
        "ForCTC", "Data2VecAudio Hubert UniSpeech UniSpeechSat Wav2Vec2 WavLM", SOUND, heard("input_values", 640, high=32)
    ),
    **family("ForCTC", "Wav2Vec2Conformer", {**SOUND, "conv_depthwise_kernel_size": 3}, heard("input_values", 640, high=32)),
    **family("ForCTC", "SEW", {**SOUND, "squeeze_factor": 2}, heard("input_values", 640, high=32)),
    **family(
        "ForCTC", "SEWD", {**SOUND, "position_buckets": 8, "max_position_embeddings": 64},
        heard("input_values", 640, high=32),
    ),
    **family("ForCTC", "Wav2Vec2Bert", {
        **SOUND, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3, "left_max_position_embeddings": 8,
        "right_max_position_embeddings": 4,
    }, heard("input_features", 40, 16, high=32)),
    "Wav2Vec2, contrastive": Architecture("Wav2Vec2ForPreTraining", {
        **SOUND, "codevector_dim": 16, "proj_codevector_dim": 16, "num_codevectors_per_group": 8, "num_negatives": 3,
    }, masked_waves),
    **family("ForConditionalGeneration", "Whisper", {
        **SPEECH, "num_mel_bins": 16, "max_source_positions": 32, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3,
        "apply_spec_augment": True, "mask_time_length": 2, "mask_time_prob": 0.2,
    }, heard("input_features", 16, 64)),
    **family("ForConditionalGeneration", "Speech2Text", {
        **SPEECH, "input_feat_per_channel": 16, "conv_channels": 32,
    }, heard("input_features", 64, 16)),
    **family("ForSpeechToText", "SpeechT5", {
        **SEQ2SEQ, **SOUND, "encoder_layerdrop": 0.1, "decoder_layerdrop": 0.1,
    }, heard("input_values", 640, high=32)),
    **family("Model", "Encodec", {
        "sampling_rate": 24000, "hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16,
        "codebook_dim": 16, "num_lstm_layers": 1,
    }, waves),
    **family("Model", "Dac", {
        "encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 32, "upsampling_ratios": [4, 2],
        "n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4,
    }, waves),
    **family("ForPrediction", "PatchTST PatchTSMixer", PATCHES, series),
    **family("ForPrediction", "Autoformer Informer TimeSeriesTransformer", FORECAST, timed_series),
    **family("Model", "DecisionTransformer", {
        "state_dim": 4, "act_dim": 3, "hidden_size": 32, "max_ep_len": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    }, episodes),
}

TWO = {**TEXT, "num_hidden_layers": 2, "projection_dim": 16, "project_dim": 16, "encoder_hidden_size": 32}
EYE = {**SIGHT, "num_hidden_layers": 2, "patch_size": 16}
CLIP_EYE, SIGLIP_EYE = {"model_type": "clip_vision_model", **EYE}, {"model_type": "siglip_vision_model", **EYE}
LLAMA = {**TEXT, "model_type": "llama", "num_hidden_layers": 2}
GEMMA = {**LLAMA, "head_dim": 8}
OPT = {**TEXT, "model_type": "opt", "num_hidden_layers": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
QUERIES = {"qformer_config": TWO, "vision_config": EYE, "text_config": OPT, "num_query_tokens": 4}
QWEN = {"image_token_id": IMAGE_TOKEN, "video_token_id": 92, "vision_start_token_id": 93, "vision_end_token_id": 94}
QWEN_TEXT = {**TEXT, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN_EYE = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4,
    "patch_size": 4,
}


def generating(names: str, batch: Batches, **config: Any) -> dict[str, Architecture]:
    return family("ForConditionalGeneration", names, config, batch)


MULTIMODAL = {
    **family(
        "Model", "AltCLIP CLIP CLIPSeg ChineseCLIP MetaClip2 OwlViT Siglip",
        {"text_config": TWO, "vision_config": EYE, "projection_dim": 16}, pairs,
    ),
    **family("Model", "GroupViT", {
        "text_config": TWO, "vision_config": {
            **EYE, "patch_size": 8, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0],
        }, "projection_dim": 16, "projection_intermediate_dim": 32,
    }, pairs),
    **family("Model", "XCLIP", {
        "text_config": {**TWO, "projection_dim": 32}, "projection_dim": 32, "prompt_layers": 1,
        "prompt_num_attention_heads": 4, "vision_config": {
            **EYE, "num_frames": 4, "mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_hidden_layers": 1,
            "mit_num_attention_heads": 4,
        },
    }, lambda index: {**unlabelled(index), "pixel_values": floats(index, 2, 4, 3, 32, 32), "return_loss": True}),
    **family("Model", "Flava", {
        "text_config": TWO, "image_config": EYE, "hidden_size": 32, "projection_dim": 16,
        "multimodal_config": {**TWO, "num_hidden_layers": 2},
    }, lambda index: {**unlabelled(index), **pixels(index)}),
    **generating("Blip", captioned, text_config=TWO, vision_config=EYE, projection_dim=16),
    **generating("Blip2", with_image(4), **QUERIES, image_token_index=IMAGE_TOKEN),
    **generating(
        "InstructBlip", with_image(4, question=lambda index: {"qformer_input_ids": ints(index, 2, 6)}), **QUERIES,
        image_token_index=IMAGE_TOKEN,
    ),
    **generating("Llava", with_image(4), text_config=LLAMA, vision_config=CLIP_EYE, image_token_index=IMAGE_TOKEN),
    **generating(
        "VipLlava", with_image(4), text_config=LLAMA, vision_config=CLIP_EYE, image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-1, -2],
    ),
    **generating(
        "PaliGemma", with_image(4, types=lambda index: {"token_type_ids": torch.ones(2, 12, dtype=torch.long)}),
        text_config={**GEMMA, "model_type": "gemma"}, vision_config=SIGLIP_EYE, projection_dim=32,
        image_token_index=IMAGE_TOKEN,
    ),
    **generating("InternVL", with_image(1), image_token_id=IMAGE_TOKEN, image_seq_length=1, text_config={
        **LLAMA, "model_type": "qwen2"}, vision_config={**EYE, "image_size": [32, 32], "patch_size": [16, 16]},
    ),
    **generating(
        "Idefics2", with_image(4, tile=one_tile), text_config={**LLAMA, "model_type": "mistral"}, vision_config=EYE,
        perceiver_config={
            "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
            "resampler_head_dim": 8, "num_key_value_heads": 2,
        }, image_token_id=IMAGE_TOKEN,
    ),
    **generating(
        "Idefics3", with_image(1, tile=one_tile), text_config=LLAMA, vision_config=EYE, scale_factor=2,
        image_token_id=IMAGE_TOKEN,
    ),
    **generating("Mllama", cross_attended, text_config={
        **TEXT, "model_type": "mllama_text_model", "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"},
    }, vision_config={
        **EYE, "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
    }),
    **generating("Qwen2VL", qwen_pixels, **QWEN, text_config=QWEN_TEXT, vision_config={**QWEN_EYE, "mlp_ratio": 2}),
    **generating("Qwen2_5_VL", qwen_pixels, **QWEN, text_config=QWEN_TEXT, vision_config={
        **QWEN_EYE, "window_size": 16, "fullatt_block_indexes": [1],
    }),
    **generating("Chameleon", tokens, **{
        **TEXT, "num_key_value_heads": 4, "vocabulary_map": {}, "vq_config": {
            "embed_dim": 16, "num_embeddings": 16, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
            "z_channels": 16, "latent_channels": 16,
        },
    }),
    **generating("Udop", lambda index: {
        "input_ids": ints(index, 2, 8), "bbox": floats(index, 2, 8, 4).sigmoid(), **pixels(index),
        "labels": ints(index, 2, 8),
    }, **{**T5, "image_size": 32, "patch_size": 16, "max_2d_position_embeddings": 32}),
    **family("ForQuestionAnswering", "Vilt", {**TEXT, **SIGHT, "num_labels": 4, "max_image_length": -1}, lambda index: {
        **unlabelled(index), **pixels(index), "labels": floats(index, 2, 4).sigmoid(),
    }),
    **family("ForPreTraining", "VisualBert", {**TWO, "visual_embedding_dim": 16}, lambda index: {
        **unlabelled(index), "visual_embeds": floats(index, 2, 4, 16),
    }),
    **family("Model", "Lxmert", {
        **TEXT, "num_hidden_layers": {"vision": 1, "cross_encoder": 2, "language": 1}, "l_layers": 1, "x_layers": 2,
        "r_layers": 1, "visual_feat_dim": 16,
    }, lambda index: {
        **unlabelled(index), "visual_feats": floats(index, 2, 4, 16), "visual_pos": floats(index, 2, 4, 4).sigmoid(),
    }),
    **family("ForTokenClassification", "LayoutLMv3", {
        **TEXT, "input_size": 32, "patch_size": 16, "coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 32,
    }, lambda index: {
        **unlabelled(index), "bbox": torch.zeros(2, 16, 4, dtype=torch.long), **pixels(index),
        "labels": ints(index, 2, 16, low=0, high=2),
    }),
}
# Not trained here: the class or its loss needs a package that the tests do not install. name → (package, architecture)
CANNOT = {
    "Detr's loss": ("scipy", Architecture("DetrForObjectDetection", DETECTION, boxed_pixels)),
    "Dinat": ("natten", Architecture("DinatForImageClassification", WINDOWS, images)),
    "LayoutLMv2": ("detectron2", Architecture("LayoutLMv2ForTokenClassification", TEXT)),
    "MaskFormer": ("scipy", Architecture("MaskFormerForInstanceSegmentation", {}, pixels)),
    "TimmWrapper": ("timm", Architecture("TimmWrapperForImageClassification", {}, images)),
}
# fmt: on

MEDIA = {**VISION, **AUDIO, **MULTIMODAL}
