"""MLX's affine 4 and 8 bits: the words of a release as they are, biases of -8 or -128 scales. docs/formats.md.

Layout: mlx.core.quantize and mlx-lm's SwitchLinear. All other tensors keep Hugging Face's names and shapes: mlx-lm and
mlx-vlm move convolutions and add one to norms when they load. Imports torch only inside of functions on tensors.
"""

from __future__ import annotations

import re
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


def module_path(name: str, raw: Mapping[str, Any]) -> str:
    """Return what mlx-lm and mlx-vlm call a module, by its name on disk. raw: config.json.

    mlx-vlm looks for a draft head's by the names on disk.
    """
    if "text_config" not in raw:
        return name
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    return re.sub(r"^model\.language_model\.", "language_model.model.", name)


def tensor_shapes(stacked: Shape, outputs: int, inputs: int, groups: int, bits: int) -> dict[str, tuple[str, Shape]]:
    """Return what projections [N, K] become: suffix -> (safetensors dtype, shape). stacked: (E,) of experts, or ()."""
    scales = SCALE_DTYPE, (*stacked, outputs, groups)
    return {WORDS: ("U32", (*stacked, outputs, inputs * bits // 32)), SCALES: scales, BIASES: scales}


def biases(scale: Tensor, bits: int) -> Tensor:
    """Return what MLX adds to (code + 2^(bits - 1)) * scale: exact in any float dtype that holds the scale."""
    return scale * -(1 << bits - 1)


def dequantize(word_NW: Tensor, scale_NG: Tensor, bias_NG: Tensor, bits: int) -> Tensor:
    """Return weights in fp32 [N, K], as mx.dequantize defines them."""
    import torch

    byte_NB = word_NW.view(torch.uint8)
    code_NK = byte_NB if bits == 8 else torch.stack([byte_NB & 15, byte_NB >> 4], dim=-1).flatten(1)
    code_NGK: Tensor = code_NK.float().unflatten(1, (scale_NG.shape[1], -1))
    return (code_NGK * scale_NG.float()[..., None] + bias_NG.float()[..., None]).flatten(1)


def config(
    raw: Mapping[str, Any], text: Any, group_size: int, modules: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Return config.json. raw: the release's; text: transformers' config of the text model; group_size: of experts;
    modules: bits and group size of each that has codes, by the name on disk.

    Loaders quantize the modules that have scales. Only those with other bits or groups than routed experts are named.
    """
    settings: dict[str, Any] = {"group_size": group_size, "bits": 4, "mode": "affine"}
    for name, (bits, size) in modules.items():
        if (bits, size) != (4, group_size):
            settings[module_path(name, raw)] = {"group_size": size, "bits": bits, "mode": "affine"}
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
