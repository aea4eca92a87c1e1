"""int4 packing and unpacking for each storage format, and what config.json says of it. docs/formats.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.core.kernels import cuda
from fourfold.datatypes import QuantizedGroup

ZERO_WORDS = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32}  # the zero point 8, stored as 7 by v1 and as 8 by v2
CODES_AND_SCALES = {
    "compressed-tensors": ("weight_packed", "weight_scale"),
    "gptq": ("qweight", "scales"),
    "gptq_v2": ("qweight", "scales"),
}  # all that unpack looks at
SCALE_DTYPES = {"compressed-tensors": torch.bfloat16, "gptq": torch.float16, "gptq_v2": torch.float16}
KEPT_PATTERNS = (
    "lm_head",
    "re:.*visual.*",
    "re:.*self_attn.*",
    "re:.*linear_attn.*",
    "re:.*shared_expert.*",
    "re:.*mlp\\.gate$",
    "re:.*mtp.*",
)


def pack_codes(codes_ENK: Tensor) -> Tensor:
    """Eight 4-bit codes along K to an int32 word, lowest nibble first; the nibble of code q is q + 8.

    codes_ENK: int8 in [-8, 7], K a multiple of 8. Returns int32 [E, N, K // 8].
    Layout: compressed-tensors `pack-quantized`, vLLM Marlin. Raises ValueError if K is not a multiple of 8.
    """
    if codes_ENK.is_cuda:
        return cuda.pack_codes(codes_ENK)
    if codes_ENK.shape[-1] % 8:
        raise ValueError(f"codes have {codes_ENK.shape[-1]} input features; packing needs a multiple of 8")
    # Two nibbles to a byte, and the bytes of a little-endian word are in order already: no int64 stack is needed.
    nibbles = (codes_ENK + 8).view(torch.uint8)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack_codes(words_ENW: Tensor) -> Tensor:
    """The inverse of pack_codes: int32 [E, N, K // 8] to int8 [E, N, K]."""
    pairs = words_ENW.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8


def pack(group: QuantizedGroup, format: str) -> dict[str, Tensor]:
    """A stack of projections as a release stores it: tensor suffix -> stack [E, ...]. See tensor_shapes."""
    experts, outputs, inputs = group.codes_ENK.shape
    codes, scales = CODES_AND_SCALES[format]
    stored = {
        codes: relayout(pack_codes(group.codes_ENK), "compressed-tensors", format),
        scales: relayout(group.scale_ENG, "compressed-tensors", format).to(SCALE_DTYPES[format]),
    }
    beside = companions(format, outputs, inputs, group.scale_ENG.shape[-1])
    return stored | {suffix: value.expand(experts, *value.shape).clone() for suffix, value in beside.items()}


def relayout(stored: Tensor, format: str, wanted: str) -> Tensor:
    """Codes or scales [..., rows, columns] as one format stores them, in the order of another, element for element.

    compressed-tensors has a row for each output feature, the formats of GPTQ a column.
    """
    same = (format == "compressed-tensors") == (wanted == "compressed-tensors")
    return stored if same else stored.mT.contiguous()


def companions(format: str, outputs: int, inputs: int, groups: int) -> dict[str, Tensor]:
    """What is stored beside codes and scales of a projection [N, K]: by suffix, the same for all of its shape."""
    if format == "compressed-tensors":
        return {"weight_shape": torch.tensor([outputs, inputs])}
    return {
        "qzeros": torch.full((groups, outputs // 8), ZERO_WORDS[format], dtype=torch.int32),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def unpack(tensors: dict[str, Tensor], format: str) -> QuantizedGroup:
    """The inverse of pack. tensors: by suffix; only codes and scales are looked at."""
    if format == "compressed-tensors":
        return QuantizedGroup(unpack_codes(tensors["weight_packed"]), tensors["weight_scale"].float())
    return QuantizedGroup(unpack_codes(tensors["qweight"].mT), tensors["scales"].mT.float())


def dequantize(tensors: dict[str, Tensor], format: str) -> Tensor:
    """The weights fp32 [E, N, K] that stacks of stored tensors stand for, whoever made them.

    tensors: by suffix, as `pack` gives them, and besides: `qzeros` (gptq: zero point - 1, gptq_v2: zero point) or
    `weight_zero_point` (compressed-tensors: int32 [E, N / 8, G], packed along N, zero point + 8); `g_idx` or
    `weight_g_idx` (int32 [E, K], each input's group) where groups are not of consecutive inputs. Absent zero points are
    8, as they are for symmetric quantization.
    Layouts: AutoGPTQ and GPTQModel qlinear, compressed-tensors pack_quantized.
    """
    group, suffix = unpack(tensors, format), "weight_g_idx" if format == "compressed-tensors" else "g_idx"
    codes_ENK, scale_ENG = group.codes_ENK, group.scale_ENG
    experts, outputs, inputs = codes_ENK.shape
    zero_ENG = torch.zeros(1, 1, 1, dtype=torch.int8, device=codes_ENK.device).expand(scale_ENG.shape)
    if "qzeros" in tensors:
        zero_ENG = (unpack_codes(tensors["qzeros"]) + (1 if format == "gptq" else 0)).mT
    elif "weight_zero_point" in tensors:
        zero_ENG = unpack_codes(tensors["weight_zero_point"].mT).mT[:, :outputs]
    index_EK = tensors.get(suffix)
    if index_EK is None:
        size = inputs // scale_ENG.shape[-1]
        index_EK = (torch.arange(inputs, device=codes_ENK.device) // size).expand(experts, inputs)
    index_ENK = index_EK.to(torch.int64)[:, None, :].expand(experts, outputs, inputs)
    centred_ENK = codes_ENK.float() - zero_ENG.float().gather(2, index_ENK)
    return centred_ENK * scale_ENG.gather(2, index_ENK)


def tensor_shapes(format: str, outputs: int, inputs: int, group_size: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What one projection [N, K] becomes: suffix -> (safetensors dtype, shape)."""
    groups = inputs // group_size
    if format == "compressed-tensors":
        return {
            "weight_packed": ("I32", (outputs, inputs // 8)),
            "weight_scale": ("BF16", (outputs, groups)),
            "weight_shape": ("I64", (2,)),
        }
    return {
        "qweight": ("I32", (inputs // 8, outputs)),
        "scales": ("F16", (groups, outputs)),
        "qzeros": ("I32", (groups, outputs // 8)),
        "g_idx": ("I32", (inputs,)),
    }


def quantization_config(format: str, group_size: int) -> dict[str, Any]:
    """config.json's `quantization_config`. The MTP head is excluded in each: engines build it unquantized only then
    (vLLM models/qwen3_5_mtp.py looks for a `dynamic` key that starts with "-:" and holds "mtp").
    """
    if format == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size,
                   "dynamic": False, "actorder": None, "observer": "minmax"}  # fmt: skip
        group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(KEPT_PATTERNS),
            "config_groups": {"group_0": group},
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": format,
        "pack_dtype": "int32",
        "dynamic": {"-:^(?!.*\\.mlp\\.experts).*$": {}, "-:.*mtp.*": {}},
    }
