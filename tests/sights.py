"""Small checkpoints of real architectures that see or hear: the weights are random, the processors real, on PIL."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

TEMPLATE = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.content is string %%}{{ m.content }}{%% else %%}"
    "{%% for p in m.content %%}{%% if p.type != 'text' %%}%s{%% else %%}{{ p.text }}{%% endif %%}{%% endfor %%}{%% endif %%}"
    "<|im_end|>\n{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}")
TOKENS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<fake_token_around_image>",
          "<end_of_utterance>", "<global-img>", *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
          "<start_of_image>", "<end_of_image>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
          "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
EYE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
       "patch_size": 14, "initializer_range": 0.2}
EAR = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
       "initializer_range": 0.2}
WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 4}


def families(id: Any, vocab_size: int) -> dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str, dict[str, str]]]:
    """Return by name: config, image processor, processor, what the template writes for an image, the tokenizer's names."""
    text = {**TEXT, "vocab_size": vocab_size}
    qwen = {"image_token_id": id("<|image_pad|>"), "video_token_id": id("<|video_pad|>"),
            "vision_start_token_id": id("<|vision_start|>"), "vision_end_token_id": id("<|vision_end|>")}
    pad = "<|vision_start|><|image_pad|><|vision_end|>"
    square = {"height": 56, "width": 56}
    small = {"shortest_edge": 784, "longest_edge": 28 * 28 * 12}
    return {
        "qwen2_vl": ({"model_type": "qwen2_vl", "text_config": {**text, **MROPE, "model_type": "qwen2_vl_text"}, **qwen,
                      "vision_config": {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2,
                                        "initializer_range": 0.2}},
                     {"image_processor_type": "Qwen2VLImageProcessor", "size": small},
                     {"processor_class": "Qwen2VLProcessor"}, pad, {}),
        "qwen2_5_vl": ({"model_type": "qwen2_5_vl", "text_config": {**text, **MROPE, "model_type": "qwen2_5_vl_text"}, **qwen,
                        "vision_config": {"hidden_size": 32, "out_hidden_size": 32, "depth": 2, "num_heads": 2,
                                          "intermediate_size": 64, "fullatt_block_indexes": [1], "initializer_range": 0.2}},
                       {"image_processor_type": "Qwen2VLImageProcessor", "size": small},
                       {"processor_class": "Qwen2_5_VLProcessor"}, pad, {}),
        "qwen3_vl": ({"model_type": "qwen3_vl", **qwen,
                      "text_config": {**text, "head_dim": 8, "model_type": "qwen3_vl_text", "num_hidden_layers": 3,
                                      "rope_parameters": {**MROPE["rope_parameters"], "mrope_interleaved": True}},
                      "vision_config": {"hidden_size": 32, "out_hidden_size": 32, "depth": 3, "num_heads": 2,
                                        "intermediate_size": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 14,
                                        "num_position_embeddings": 64, "initializer_range": 0.2}},
                     {"image_processor_type": "Qwen2VLImageProcessor", "size": small, "patch_size": 14},
                     {"processor_class": "Qwen3VLProcessor"}, pad, {}),
        "qwen3_5": ({"model_type": "qwen3_5", **qwen,
                     "text_config": {**text, "head_dim": 16, "model_type": "qwen3_5_text", "linear_key_head_dim": 8,
                                     "layer_types": ["linear_attention", "full_attention"], "linear_value_head_dim": 8,
                                     "linear_num_key_heads": 2, "linear_num_value_heads": 2,
                                     "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 0],
                                                         "mrope_interleaved": True, "partial_rotary_factor": 0.25}},
                     "vision_config": {"hidden_size": 32, "out_hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 14,
                                       "intermediate_size": 64, "num_position_embeddings": 64, "initializer_range": 0.2}},
                    {"image_processor_type": "Qwen2VLImageProcessor", "size": small, "patch_size": 14},
                    {"processor_class": "Qwen3VLProcessor"}, pad, {}),
        "llava": ({"model_type": "llava", "text_config": {**text, "model_type": "llama"}, "image_token_index": id("<image>"),
                   "vision_config": {**EYE, "model_type": "clip_vision_model", "projection_dim": 32}},
                  {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": square},
                  {"processor_class": "LlavaProcessor", "patch_size": 14, "vision_feature_select_strategy": "default",
                   "num_additional_image_tokens": 1}, "<image>\n", {}),
        "smolvlm": ({"model_type": "smolvlm", "text_config": {**text, "model_type": "llama"}, "image_token_id": id("<image>"),
                     "vision_config": {**EYE, "model_type": "smolvlm_vision"}, "scale_factor": 2},
                    {"image_processor_type": "SmolVLMImageProcessor", "size": {"longest_edge": 112},
                     "max_image_size": {"longest_edge": 56}},
                    {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}, "<image>", {}),
        "idefics3": ({"model_type": "idefics3", "text_config": {**text, "model_type": "llama"}, "image_token_id": id("<image>"),
                      "vision_config": {**EYE, "model_type": "idefics3_vision"}, "scale_factor": 2},
                     {"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 112},
                      "max_image_size": {"longest_edge": 56}},
                     {"processor_class": "Idefics3Processor", "image_seq_len": 4}, "<image>", {}),
        "gemma3": ({"model_type": "gemma3", "mm_tokens_per_image": 4, "tie_word_embeddings": False,
                    "image_token_index": id("<image>"), "boi_token_index": id("<start_of_image>"),
                    "eoi_token_index": id("<end_of_image>"),
                    "text_config": {**text, "head_dim": 8, "model_type": "gemma3_text", "sliding_window": 16,
                                    "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8},
                    "vision_config": {**EYE, "model_type": "siglip_vision_model"}},
                   {"image_processor_type": "Gemma3ImageProcessor", "size": square},
                   {"processor_class": "Gemma3Processor", "image_seq_length": 4}, "<start_of_image>",
                   {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}),
        "internvl": ({"model_type": "internvl", "text_config": {**text, "model_type": "qwen2"},
                      "image_token_id": id("<IMG_CONTEXT>"), "image_seq_length": 4,
                      "vision_config": {**EYE, "model_type": "internvl_vision", "image_size": [56, 56],
                                        "patch_size": [14, 14]}},
                     {"image_processor_type": "GotOcr2ImageProcessor", "size": square, "crop_to_patches": True,
                      "min_patches": 1, "max_patches": 2},
                     {"processor_class": "InternVLProcessor", "image_seq_length": 4}, "<IMG_CONTEXT>\n",
                     {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                      "video_token": "<video>"}),
        "qwen2_audio": ({"model_type": "qwen2_audio", "text_config": {**text, "model_type": "qwen2"},
                         "audio_token_index": id("<|AUDIO|>"), "audio_config": {**EAR, "max_source_positions": 200}},
                        WHISPER, {"processor_class": "Qwen2AudioProcessor"}, "<|audio_bos|><|AUDIO|><|audio_eos|>", {}),
        "qwen3_asr": ({"model_type": "qwen3_asr", "text_config": {**text, "head_dim": 8, "model_type": "qwen3"},
                       "audio_token_id": id("<|AUDIO|>"), "tie_word_embeddings": False,
                       "audio_config": {**EAR, "output_dim": 32, "downsample_hidden_size": 16}},
                      {**WHISPER, "feature_extractor_type": "Qwen3ASRFeatureExtractor"},
                      {"processor_class": "Qwen3ASRProcessor"}, "<|audio_bos|><|AUDIO|><|audio_eos|>",
                      {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}),
        "gemma4": ({"model_type": "gemma4", "tie_word_embeddings": False, "image_token_id": id("<image>"),
                    "boi_token_id": id("<start_of_image>"), "eoi_token_id": id("<end_of_image>"),
                    "audio_token_id": id("<|AUDIO|>"), "boa_token_id": id("<|audio_bos|>"),
                    "eoa_token_index": id("<|audio_eos|>"), "video_token_id": id("<video>"),
                    "text_config": {**text, "head_dim": 8, "global_head_dim": 8, "model_type": "gemma4_text",
                                    "hidden_size_per_layer_input": 0, "sliding_window": 16,
                                    "layer_types": ["sliding_attention", "full_attention"]},
                    "vision_config": {**EYE, "head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 64},
                    "audio_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                                     "subsampling_conv_channels": [128, 8], "output_proj_dims": 32,
                                     "initializer_range": 0.2}},
                   {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 14, "max_soft_tokens": 70,
                    "feature_extractor_type": "Gemma4AudioFeatureExtractor"},
                   {"processor_class": "Gemma4Processor"},
                   "{% if p.type == 'image' %}<image>{% else %}<|AUDIO|>{% endif %}",
                   {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                    "audio_token": "<|AUDIO|>", "boa_token": "<|audio_bos|>", "eoa_token": "<|audio_eos|>"}),
    }


def save(family: str, folder: Path, tokenizer_folder: Path) -> None:
    """Write a checkpoint of a family as it would come from a hub."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    config, image_processor, processor, placeholder, names = families(tokenizer.convert_tokens_to_ids, len(tokenizer))[family]
    if names:
        tokenizer.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    tokenizer.chat_template = TEMPLATE % placeholder
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    kind = config.pop("model_type")
    network = transformers.AutoModelForMultimodalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    for parameter in network.parameters():
        if parameter.dim() > 1 and not parameter.any():  # it would hide the picture
            parameter.data.normal_(0, 0.2)
    network.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    network.save_pretrained(folder)
