"""Small checkpoints of the MoE families of transformers, from keys that most share and a few of their own.

FAMILIES         what each family's checkpoint is made from, and what is known of its layers
tiny(folder, t)  writes one: random BF16 weights, config.json with the keys that the Hub's have

Nothing here imports fourfold.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 512
EXPERT_SCALE = 8  # an expert in the wrong place moves the logits by far more than rounding does
AGAIN = None  # a tail that is neither a sum nor a constant times the experts' output
TOPK = {"prev_topk_indices": 0}

_COMMON: Mapping[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 128),
    "shared_intermediate_size": 256,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 32),
    "qk_head_dim": 64,
    "sliding_window": 16,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    **{"index_n_heads": 4, "index_head_dim": 32, "index_topk": 16},
    "num_nextn_predict_layers": 0,
}
_TOKENS = {
    **{"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503},
    **{"audio_token_id": 504, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Of towers that are built and never run.
_TOWER: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "intermediate_size", "mlp_dim", "d_model", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("depth", "num_hidden_layers", "num_layers", "encoder_layers"), 1),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim", "projector_hidden_size"), 256),
    **dict.fromkeys(("vision_output_dim", "projection_dim"), 256),
    **dict.fromkeys(("projection_intermediate_size", "projector_input_dim", "projector_output_dim"), 64),
    **{"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]},
    "head_dim": 32,
}


@dataclass(frozen=True)
class Case:
    """One checkpoint. text: keys of the text model beyond the common ones; towers: of config.json's other parts.

    hub: keys that the Hub's config.json has and transformers' own class renames or drops; tail: what the experts'
    output is multiplied by before it is added to the layer's, AGAIN for anything else; carry: arguments that a layer
    takes from the one before, by place; exact: False where transformers has no kernel for all experts at once.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    towers: Mapping[str, Any] = field(default_factory=dict)
    hub: Mapping[str, Any] = field(default_factory=dict)
    tail: float | None = 1.0
    carry: Mapping[int | str, int] = field(default_factory=dict)
    exact: bool = True


_SHARED_INDEXER = {
    "num_hidden_layers": 6,
    "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
}
_NEMOTRON = {
    "num_hidden_layers": 6,
    "layers_block_type": ["mamba", "moe", "attention", "moe", "mamba", "moe"],
    **{"mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2, "ssm_state_size": 16, "mamba_n_groups": 2},
    "moe_shared_expert_intermediate_size": 256,
}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_head_dim": 96}  # the sizes that vLLM has kernels for
_DELTA = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # the same
_GRANITE = {
    **{"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 6.0},
    "attention_multiplier": 0.0078125,
}
_MUSE_SPARK_TOWERS = {
    "vision_config": {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2},
    "audio_config": {
        **{"hidden_sizes": [32, 32, 32, 64], "depths": [1, 1, 1, 1], "num_hidden_layers": 4, "out_hidden_size": 256},
    },
    **{"out_hidden_size": 64, "projector_hidden_size": 64},
}
_SMALL_TOWER = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}

FAMILIES: Mapping[str, Case] = {
    "afmoe": Case(tail=AGAIN, hub={"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1}),
    "axk1": Case(_LATENT, tail=AGAIN),
    "axk2": Case(),
    "bailing_hybrid": Case(),
    "beam": Case(tail=AGAIN),
    "cohere2_moe": Case(tail=0.5),
    "deepseek_v2": Case(_LATENT),
    "deepseek_v3": Case(
        {**_LATENT, "n_group": 4, "topk_group": 2}, hub={"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    ),
    "deepseek_v32": Case(),
    "deepseek_v4": Case(
        {
            **{"num_hidden_layers": 5, "o_groups": 2, "o_lora_rank": 64},
            "layer_types": [
                "sliding_attention",
                *(["heavily_compressed_attention", "compressed_sparse_attention"] * 2),
            ],
            "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe", "moe"],
            "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        },
        tail=AGAIN,
    ),
    "dots1": Case(),
    "ernie4_5_moe": Case(),
    "exaone_moe": Case(),
    "flex_olmo": Case(tail=AGAIN),
    "flint": Case(),
    "gemma4": Case(
        {
            **{"enable_moe_block": True, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
            **{"global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
            "layer_types": [*(["sliding_attention"] * 3), "full_attention"],
        },
        towers={"vision_config": {"default_output_length": 280}},
        tail=AGAIN,
    ),
    "glm4_moe": Case(hub={"head_dim": 64, "first_k_dense_replace": 1}),
    "glm4_moe_lite": Case(_LATENT, hub={"first_k_dense_replace": 1}),
    "glm4v_moe": Case(
        {
            "rope_parameters": {
                **{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                "mrope_section": [4, 6, 6],
            }
        },
        hub={"head_dim": 64, "first_k_dense_replace": 1, "use_qk_norm": False},
    ),
    "glm5_next": Case(
        {
            **{"num_hidden_layers": 6, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4},
            **{"linear_num_heads": 4, "linear_head_dim": 32},
            "layer_types": [
                *(["linear_attention", "indexed_attention"] * 2),
                *("indexed_attention", "linear_attention"),
            ],
            "indexer_types": ["full", "full", "full", "full", "shared", "full"],
            "mlp_layer_types": ["dense", *(["sparse"] * 5)],
        },
        tail=AGAIN,
        carry=TOPK,
    ),
    "glm_moe_dsa": Case(_SHARED_INDEXER, carry=TOPK),
    "gpt_oss": Case({"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "granitemoe": Case(_GRANITE, tail=0.22),
    "granitemoehybrid": Case(
        {
            **_GRANITE,
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            **{"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1},
            "intermediate_size": 128,
        },
        tail=0.22,
    ),
    "granitemoe_swa": Case(_GRANITE, tail=0.22),
    "granitemoeshared": Case(),
    "hunyuan_v1_moe": Case(),
    "hy_v3": Case(hub={"expert_hidden_dim": 128, "route_norm": True, "first_k_dense_replace": 1, "qk_norm": True}),
    "hy_v4": Case(_SHARED_INDEXER, tail=AGAIN, carry=TOPK),
    "inkling_mm_model": Case(
        {"swa_head_dim": 64, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2},
        towers={"audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16}},
        tail=AGAIN,
    ),  # a short convolution follows
    "jamba": Case(
        {
            **{"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4, "attn_layer_offset": 2},
            **{"mamba_d_state": 8, "mamba_expand": 2, "mamba_dt_rank": 16, "use_mamba_kernels": False},
        }
    ),
    "kimi_k25": Case({**_LATENT, "model_type": "deepseek_v3"}, towers={"vision_config": _SMALL_TOWER}, exact=False),
    "kimi_linear": Case({"linear_num_heads": 4, "linear_head_dim": 32}),
    "kolibri1": Case(tail=AGAIN),
    "laguna": Case(),
    "lfm2_moe": Case({"layer_types": ["conv", "full_attention"] * 2}),
    "mellum": Case(),
    "mimo_v2_flash": Case(hub={"hybrid_layer_pattern": [0, 1, 1, 1], "layernorm_epsilon": 1e-6}),
    "minimax": Case({"layer_types": ["linear_attention", "full_attention"] * 2}),
    "minimax_m2": Case(hub={"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True}),
    "minimax_m3_vl": Case(towers={"projector_hidden_size": 64}, tail=2.0),
    "mistral3": Case(
        {**_LATENT, "model_type": "mistral4"},
        towers={"vision_config": {"model_type": "pixtral", "head_dim": 32, **_SMALL_TOWER}, "image_token_index": 500},
    ),
    "mistral4": Case(_LATENT),
    "mistral_large4": Case(towers={"vision_config": {**_SMALL_TOWER, "head_dim": 32}}, carry=TOPK),
    "mixtral": Case(),
    "muse_spark": Case({"moe_hidden_size": 128}, towers=_MUSE_SPARK_TOWERS, tail=AGAIN),
    "nemotron_h": Case({**_NEMOTRON, "moe_latent_size": None}),
    "nemotron_h+latent": Case({**_NEMOTRON, "moe_latent_size": 128}, tail=AGAIN),
    "olmoe": Case({"num_key_value_heads": 4}),
    "phimoe": Case(),
    "qwen2_moe": Case(),
    "qwen3_5_moe": Case(_DELTA),
    "qwen3_moe": Case(),
    "qwen3_next": Case(_DELTA),
    "qwen3_omni_moe_thinker": Case(),
    "qwen3_vl_moe": Case(hub={"norm_topk_prob": True}),
    "qwen4_exp": Case(
        {
            **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 64, "indexer_budget": 16},
            **{"indexer_compress_ratio": 4, "ple_layer_ids": [1], "ngram_vocab_size_base": 64, "hc_lowrank": 16},
            **{"make_ngram_vocab_size_divisible_by": 16, "split_ngram_parts": 4, "heads_per_ngram": 2},
            "ple_embed_dim": 64,
        },
        tail=AGAIN,
    ),
    "solar_open": Case(),
    "step3p7": Case(exact=False),
    "zaya": Case({"num_experts_per_tok": 1}, tail=AGAIN, carry={1: 0}),  # times a weight for each channel
}
# Families that are known to need code of their own.
REFUSED: Mapping[str, Case] = {
    "ernie4_5_vl_moe": Case(
        {
            **{"moe_intermediate_size": [128, 128], "hidden_size": 512, "head_dim": 128},
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]},
        }
    ),
    "inkling2": Case({"num_hidden_layers": 5, "n_layers_per_attn_res_block": 2}),
    "jetmoe": Case(),
    "llama4": Case(),
    "longcat_flash": Case(
        {
            **{"num_layers": 2, "ffn_hidden_size": 256, "expert_ffn_hidden_size": 128, "zero_expert_num": 4},
            **{"moe_topk": 3, "head_dim": 32},
        }
    ),
}


def tiny(folder: Path, family: str, vocabulary: int = VOCABULARY) -> Path:
    """Write a small checkpoint of a family, the same weights for the same name; return its folder.

    Every parameter of one dimension is moved off its first value, and experts are large, so that each one tells.
    """
    model_class, raw = settings(family)
    text = raw.get("text_config", raw)
    text["vocab_size"] = vocabulary
    config = _config(raw)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # not `to`: what is fp32 in a BF16 model stays so
    try:
        model = model_class(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(1)
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    vectors += [value for name, value in model.named_buffers() if value.ndim <= 1 or "bias" in name]
    with torch.no_grad():
        for value in vectors:
            if value.is_floating_point():
                value += torch.randn(value.shape, generator=generator).to(value.dtype) * 0.05
        for module in model.modules():
            for stack in _experts(module):
                stack *= EXPERT_SCALE
        for name, value in model.state_dict().items():
            if name.endswith("tid2eid"):  # each id's experts, all zero at first
                value.copy_(torch.rand(len(value), 8, generator=generator).argsort(dim=1)[:, : value.shape[1]])
    model.save_pretrained(folder, max_shard_size="200MB")
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    return folder


def settings(family: str) -> tuple[Any, dict[str, Any]]:
    """transformers' class for a family, and a config.json with the keys that the Hub's have."""
    case, model_type = {**FAMILIES, **REFUSED}[family], family.partition("+")[0]
    keys = _keys(model_type, case)
    config = CONFIG_MAPPING[model_type](**keys)
    raw = json.loads(config.to_json_string(use_diff=False))
    text = raw.get("text_config", raw)
    text |= case.hub
    model_class = _class(model_type)
    raw |= {"model_type": model_type, "architectures": [model_class.__name__], "dtype": "bfloat16"}
    raw.pop("transformers_version", None)
    return model_class, raw


def _class(model_type: str) -> Any:
    mappings = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    name = next(mapping[model_type] for mapping in mappings if model_type in mapping)
    return getattr(transformers, name)


def _config(raw: Mapping[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[raw["model_type"]]
    return config_class.from_dict(config_class._decode_special_floats(dict(raw)))


def _keys(model_type: str, case: Case) -> dict[str, Any]:
    """What the config class is called with: the common keys that it has, then the family's own."""
    config_class = CONFIG_MAPPING[model_type]
    names, parts = _names(config_class), getattr(config_class, "sub_configs", None) or {}
    if "text_config" not in parts or "text_config" not in names:
        return _text_keys(config_class) | dict(case.text)
    text_class = CONFIG_MAPPING[case.text["model_type"]] if "model_type" in case.text else parts["text_config"]
    keys = {key: value for key, value in _TOKENS.items() if key in names}
    for part, part_class in parts.items():
        if part != "text_config" and part in names and getattr(part_class, "model_type", ""):
            keys[part] = {key: value for key, value in _TOWER.items() if key in _names(part_class)}
    for part, value in case.towers.items():
        keys[part] = {**keys.get(part, {}), **value} if isinstance(value, dict) else value
    return {**keys, "text_config": _text_keys(text_class) | dict(case.text)}


def _text_keys(config_class: Any) -> dict[str, Any]:
    keys = {key: value for key, value in _COMMON.items() if key in _names(config_class)}
    if "kv_lora_rank" in keys:
        keys["num_key_value_heads"] = keys["num_attention_heads"]
    return keys


def _names(config_class: Any) -> set[str]:
    """Keys that a config class takes."""
    names: set[str] = set()
    for base in config_class.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return names


def _experts(module: nn.Module) -> list[torch.Tensor]:
    own = dict(module.named_parameters(recurse=False))
    return [value for value in own.values() if value.ndim == 3] if "down_proj" in own else []
