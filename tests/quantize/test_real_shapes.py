"""Plans at the sizes of published models, from config.json and headers alone: shards are sparse files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.plan import make_plan
from fourfold.recipe import load_recipe

Shape = dict[str, Any]
# config.json as far as it says sizes; projections and parameters as their makers state them, in billions.
SHAPES: dict[str, tuple[Shape, int, float]] = {
    "DeepSeek-V3": ({"model_type": "deepseek_v3", "n_routed_experts": 256}, 3 * 256 * 58, 671),
    "GLM-4.7-Flash": (
        {
            "model_type": "glm4_moe_lite",
            **{"vocab_size": 154_880, "hidden_size": 2048, "intermediate_size": 10_240, "moe_intermediate_size": 1536},
            **{"num_hidden_layers": 47, "num_attention_heads": 20, "num_key_value_heads": 20, "q_lora_rank": 768},
            **{"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256},
            **{"n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1},
            **{"n_group": 1, "topk_group": 1},
        },
        3 * 64 * 46,
        30,
    ),
    "Qwen3-Next-80B-A3B": (
        {
            "model_type": "qwen3_next",
            **{"num_hidden_layers": 48, "hidden_size": 2048, "num_experts": 512, "num_experts_per_tok": 10},
            **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "vocab_size": 151_936},
        },
        3 * 512 * 48,
        80,
    ),
    "Qwen3.6-35B-A3B": (
        {
            "model_type": "qwen3_5_moe",
            "text_config": {
                **{"vocab_size": 248_320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16},
                **{"num_key_value_heads": 2, "head_dim": 256, "num_experts": 256, "num_experts_per_tok": 8},
                **{"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
            },
        },
        3 * 256 * 40,
        35,
    ),
    "Gemma-4-26B-A4B": (
        {
            "model_type": "gemma4",
            "text_config": {
                **{"vocab_size": 262_144, "hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30},
                **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512},
                **{"num_global_key_value_heads": 2, "enable_moe_block": True, "num_experts": 128},
                **{"top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size_per_layer_input": 0},
                **{"num_kv_shared_layers": 0, "attention_k_eq_v": True, "vocab_size_per_layer_input": 262_144},
            },
        },
        3 * 128 * 30,
        26,
    ),
    "Nemotron-3-Nano-30B-A3B": (
        {
            "model_type": "nemotron_h",
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            **{"vocab_size": 131_072, "hidden_size": 2688, "intermediate_size": 1856, "num_attention_heads": 32},
            **{"num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8},
            **{"ssm_state_size": 128, "n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 1},
            **{"moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "moe_latent_size": None},
            **{"num_hidden_layers": 52, "n_group": 1, "topk_group": 1},
        },
        2 * 128 * 23,
        31.6,
    ),
    "GLM-4.5-Air": (
        {
            "model_type": "glm4_moe",
            **{"vocab_size": 151_552, "hidden_size": 4096, "intermediate_size": 10_944, "moe_intermediate_size": 1408},
            **{"num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128},
            **{"n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
        },
        3 * 128 * 45,
        106,
    ),
    "Kimi-K2": (
        {
            "model_type": "deepseek_v3",
            **{"vocab_size": 163_840, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64},
            **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        },
        3 * 384 * 60,
        1026,
    ),
    "Qwen3-235B-A22B": (
        {
            "model_type": "qwen3_moe",
            **{"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 94},
            **{"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128},
            **{"num_experts_per_tok": 8, "moe_intermediate_size": 1536},
        },
        3 * 128 * 94,
        235,
    ),
    "MiniMax-M2": (
        {
            "model_type": "minimax_m2",
            **{"vocab_size": 200_064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62},
            **{"num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128},
            **{"num_local_experts": 256, "num_experts_per_tok": 8},
        },
        3 * 256 * 62,
        230,
    ),
}


def sparse(folder: Path, raw: Shape) -> int:
    """A checkpoint of this config.json with the names that transformers writes. Returns its bytes."""
    folder.mkdir()
    headers = Skeleton.of(raw, folder / "config.json").blueprint.headers
    table, end = dict[str, Any](), 0
    for name, header in headers.items():
        table[name] = {"dtype": header.dtype, "shape": header.shape, "data_offsets": [end, end + header.size_bytes]}
        end += header.size_bytes
    text = json.dumps(table).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(raw))
    for name in checkpoints.TOKENIZER_FILES:
        shutil.copy(checkpoints.EXAMPLE / name, folder / name)
    return end


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_published_model_is_planned(tmp_path: Path, name: str) -> None:
    raw, projections, billions = SHAPES[name]
    size_bytes = sparse(tmp_path / "model", raw)
    plan = make_plan(tmp_path / "model", load_recipe("best"), memory_bytes=2**33)
    assert size_bytes == pytest.approx(2e9 * billions, rel=0.03)
    assert plan.projections == projections
    assert 0 < plan.memory.host_peak_bytes < size_bytes / 3
    assert sum(claim.header.size_bytes for part in plan.parts for claim in part.claims) == size_bytes
