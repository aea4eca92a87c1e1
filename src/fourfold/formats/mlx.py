"""MLX's affine 4-bit: the words of a release as they are, biases of -8 times the scale. docs/formats.md.

Layout: mlx.core.quantize and mlx-lm's SwitchLinear. All other tensors keep Hugging Face's names and shapes: mlx-lm and
mlx-vlm move convolutions and add one to norms when they load. Imports torch only inside of functions on tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fourfold.formats.fixed import attention_interval
from fourfold.formats.format import Shape

if TYPE_CHECKING:
    from torch import Tensor

NAME, TITLE = "mlx", "MLX"
SCALE_DTYPE = "BF16"
WORDS, SCALES, BIASES = "weight", "scales", "biases"
# Model types whose classes in mlx-lm load this layout, with the values of config.json that a class has fixed. That
# of qwen3_next takes a folder without a tensor for each expert as converted, and leaves norms and convolutions alone.
MODEL_TYPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_5_moe": {},
    "qwen3_moe": {},
    "qwen2_moe": {"norm_topk_prob": False},
    "glm4_moe": {},
    "olmoe": {},
    "mixtral": {},
}
# Keys that mlx-lm wants at the top of config.json, where transformers 5 has others.
ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def stack_name(stem: str, projection: str) -> str:
    """Return what a projection of all experts of a layer is called, with a dot at its end. stem: of the first expert's.

    `model.layers.3.mlp.experts.0.up_proj.` is of `model.layers.3.mlp.switch_mlp.up_proj.`.
    """
    return f"{stem.partition('.experts.')[0]}.switch_mlp.{projection}."


def tensor_shapes(experts: int, outputs: int, inputs: int, groups: int) -> dict[str, tuple[str, Shape]]:
    """Return what projections [N, K] of E experts become: suffix -> (safetensors dtype, shape)."""
    scales = SCALE_DTYPE, (experts, outputs, groups)
    return {WORDS: ("U32", (experts, outputs, inputs // 8)), SCALES: scales, BIASES: scales}


def biases(scale: Tensor) -> Tensor:
    """Return what MLX adds to nibble * scale: -8 scales, exact in any float dtype that holds the scale."""
    return scale * -8


def config(raw: Mapping[str, Any], text: Any, group_size: int) -> dict[str, Any]:
    """Return config.json. raw: the release's; text: transformers' config of the text model.

    Loaders quantize the modules that have scales, so no module is named.
    """
    settings = {"group_size": group_size, "bits": 4, "mode": "affine"}
    kept: dict[str, Any] = {
        key: value for key, value in raw.items() if key not in ("quantization_config", "compression_config")
    }
    if "text_config" not in raw:
        added = {"rope_scaling": None} | {
            key: text.rope_parameters[key] for key in ROPE_KEYS if key in text.rope_parameters
        }
        if hasattr(text, "num_experts"):
            added["num_experts"] = text.num_experts
        kept = added | kept
    elif interval := attention_interval(text):  # mlx-lm goes by it, not by layer_types
        kept["text_config"] = kept["text_config"] | {"full_attention_interval": interval}
    return kept | {"quantization": settings, "quantization_config": settings}
