"""Checkpoints as other quantizers write them: experts packed by compressed-tensors, or in AutoAWQ's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

import checkpoints

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ, awq/utils/packing_utils.py: the feature in each nibble of a word
PRESETS = {  # kind: preset of compressed-tensors, its compressor
    "ct-asymmetric": ("W4A16_ASYM", "pack-quantized"),
    "ct-fp8-channel": ("FP8_DYNAMIC", "float-quantized"),
    "ct-fp8-block": ("FP8_BLOCK", "float-quantized"),
    "ct-nvfp4": ("NVFP4A16", "nvfp4-pack-quantized"),
}
KINDS = (*PRESETS, "awq", "autoround-awq", "fp8-block", "fp8-channel")


def make(folder: Path, kind: str, **options: Any) -> dict[str, Tensor]:
    """A checkpoint of checkpoints.tiny with experts of a kind. Returns their weights by name, as its maker has them."""
    checkpoints.tiny(folder, per_expert=True, **options)
    wanted: dict[str, Tensor] = {}

    def quantize(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.") and ".mlp.experts." in name]:
            stem, weight = name.removesuffix("weight"), tensors.pop(name)
            parts, wanted[name] = pack(weight, kind)
            tensors.update({f"{stem}{part}": value.contiguous() for part, value in parts.items()})

    checkpoints.edit(folder, quantize)
    checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=config(kind)))
    return wanted


def config(kind: str) -> dict[str, Any]:
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    if kind == "autoround-awq":
        settings = {"bits": 4, "group_size": 32, "sym": False}
        return {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", **settings}
    if kind.startswith("fp8"):
        return {"quant_method": "fp8", **({"weight_block_size": [64, 64]} if kind == "fp8-block" else {})}
    preset, layout = PRESETS[kind]
    group = json.loads(preset_name_to_scheme(preset, ["Linear"]).model_dump_json()) | {"format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": []}


def pack(weight: Tensor, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by suffix, and the weight that they stand for."""
    if kind in ("awq", "autoround-awq"):
        return _awq(weight)
    if kind.startswith("fp8"):
        parts, wanted = _compressed(weight, *PRESETS[f"ct-{kind}"], block=64)
        suffix = "_inv" if kind == "fp8-block" else ""
        return {"weight": parts["weight"], f"weight_scale{suffix}": parts["weight_scale"].float()}, wanted
    return _compressed(weight, *PRESETS[kind], block=128)


def _compressed(weight: Tensor, preset: str, layout: str, block: int) -> tuple[dict[str, Tensor], Tensor]:
    """As llm-compressor's minmax observers and compressed-tensors' compressors do."""
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    args, state = scheme.weights, {"weight": weight}
    assert args is not None
    if args.block_structure is not None:
        args.block_structure = [block, block]
        rows = weight.unflatten(0, (-1, block)).unflatten(2, (-1, block)).float()
        low, high = rows.amin((1, 3)), rows.amax((1, 3))
    elif args.group_size and args.group_size > 0:
        grouped = weight.float().unflatten(1, (-1, args.group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    else:
        low, high = (value.float() for value in (weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)))
    if layout.startswith("nvfp4"):
        state["weight_global_scale"] = generate_gparam(weight.float().amin(), weight.float().amax()).reshape(1)
    scale, zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(layout)
    parts = compressor.compress(state, scheme)
    return parts, compressor.decompress(parts, scheme)["weight"]


def _awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """AutoAWQ's WQLinear_GEMM: codes and zero points of eight output features in a word, scales in FP16."""
    grouped = weight.float().unflatten(1, (-1, 32))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-5).half()
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    parts = {"qweight": _words(codes.flatten(1).T), "qzeros": _words(zero.T), "scales": scale.T.contiguous()}
    unpacked = AutoAWQConverter.unpack_awq(parts["qweight"], parts["qzeros"], 4)
    read = (value & 15 for value in AutoAWQConverter.reverse_awq_order(*unpacked, 4))
    code_KN, zero_GN = (value.float() for value in read)
    repeated = [value.repeat_interleave(32, dim=0) for value in (zero_GN, parts["scales"].float())]
    return parts, ((code_KN - repeated[0]) * repeated[1]).T


def _words(codes_RN: Tensor) -> Tensor:
    nibbles = codes_RN.to(torch.int64).unflatten(-1, (-1, 8))[..., AWQ_ORDER]
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
