"""How weights lie on disk that are neither BF16 nor int4 as releases have it: FP8, NVFP4, MXFP4, AWQ's int4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fourfold.core.pack import unpack_codes
from fourfold.datatypes import FourfoldError, TensorHeader, brief
from fourfold.model.tensors import TensorIndex

FP8 = ("F8_E4M3", "F8_E5M2")
BLOCK = 128  # of FP8, where config.json names none
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where an AWQ word has the output features that follow each other
AWQ_PARTS = {"codes": "qweight", "zeros": "qzeros", "scales": "scales"}


@dataclass(frozen=True)
class StoredWeight:
    """How one weight lies on disk. name: that its tensors' names begin with; parts: these tensors by role, of integers
    by suffix; dequantize: from their values, by role, to fp32; bits: of its codes; groups: of inputs with a scale.
    """

    name: str
    parts: Mapping[str, TensorHeader]
    shape: tuple[int, ...]
    dequantize: Callable[[Mapping[str, Tensor]], Tensor]
    bits: int
    groups: int = 0

    @property
    def outputs(self) -> int:
        return self.shape[0]

    @property
    def inputs(self) -> int:
        return self.shape[1]

    @property
    def group_size(self) -> int:
        return -(-self.inputs // self.groups)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


def other_weights(index: TensorIndex, settings: Mapping[str, Any]) -> Iterator[tuple[str, StoredWeight]]:
    """Weights by their name in a BF16 checkpoint. settings: quantization_config of a kind that sources.py reads.

    Raises FourfoldError for weights whose parts do not fit each other.
    """
    method = settings.get("quant_method")
    if method == "mxfp4":
        yield from _mxfp4(index)
    elif method in ("awq", "auto-round"):
        yield from _awq(index)
    else:
        yield from _fp8(index, _block(index, settings))
        yield from _nvfp4(index)


def _part(index: TensorIndex, name: str) -> str:
    header = index.headers.get(name)
    return f"{name} is {f'{header.dtype} {list(header.shape)}' if header else 'missing'}"


# ---- FP8 with a scale for each block (DeepSeek V3, MiniMax-M2, GLM-5), each output feature, or each tensor


def _block(index: TensorIndex, settings: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block: fp8's own key, or that of a compressed-tensors group."""
    key, groups = "weight_block_size", settings.get("config_groups") or {}
    found = [group.get("weights") or {} for group in groups.values() if isinstance(group, dict)]
    named = [weights["block_structure"] for weights in found if weights.get("block_structure")]
    block = settings.get(key) or next(iter(named), [BLOCK, BLOCK])
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise FourfoldError(f"{index.folder}/config.json: {key}: got {brief(block)}, expected two sizes")
    return block[0], block[1]


def _fp8(index: TensorIndex, block: tuple[int, int]) -> Iterator[tuple[str, StoredWeight]]:
    """Weights `X.weight` in FP8 beside `X.weight_scale_inv`, or `X.weight_scale`, which are multiplied by."""
    for name, header in index.headers.items():
        if header.dtype not in FP8 or name.endswith("_scale"):
            continue
        scale_name = f"{name}_scale_inv" if f"{name}_scale_inv" in index.headers else f"{name}_scale"
        scales, (rows, columns) = index.headers.get(scale_name), block
        if len(header.shape) == 2 and scales is not None:
            outputs, inputs = header.shape
            blocks: dict[tuple[int, ...], tuple[int, int]] = {(-(-outputs // rows), -(-inputs // columns)): block}
            blocks |= dict.fromkeys([(outputs,), (outputs, 1)], (1, inputs))
            blocks |= dict.fromkeys([(), (1,), (1, 1)], (outputs, inputs))
        if len(header.shape) != 2 or scales is None or scales.shape not in blocks:
            wanted = [-(-size // step) for size, step in zip(header.shape, block, strict=False)]
            raise FourfoldError(
                f"{index.folder}: {name} is {header.dtype} {list(header.shape)} and "
                f"{_part(index, scale_name if scales else f'{name}_scale_inv')}, wanted {wanted}, a scale for each "
                f"block of {rows} x {columns}, or one for each output feature or for all. FP8 with other scales is not "
                "read: take the BF16 checkpoint, if one is published"
            )
        found = blocks[scales.shape]

        groups = -(-header.shape[1] // found[1])

        def dequantize(parts: Mapping[str, Tensor], block: tuple[int, int], groups: int) -> Tensor:
            return dequantize_blocks(parts["weight"], parts["scales"].reshape(-1, groups), block)

        parts, read = {"weight": header, "scales": scales}, partial(dequantize, block=found, groups=groups)
        yield name, StoredWeight(name.removesuffix("weight"), parts, header.shape, read, 8, groups)


def dequantize_blocks(weight_NK: Tensor, scale_BC: Tensor, block: tuple[int, int]) -> Tensor:
    """fp32 [N, K] of FP8 weights and the scale of each block, the last blocks being cut off at N and K.

    scale_BC: floats, or exponents as bytes (E8M0: 2^(byte - 127)).
    """
    outputs, inputs = weight_NK.shape
    scale_BC = exponents(scale_BC) if scale_BC.dtype == torch.uint8 else scale_BC.float()
    scale_NC = scale_BC.repeat_interleave(block[0], dim=0)[:outputs]
    weight_NK = weight_NK.float()
    for place, scale_N1 in enumerate(scale_NC.split(1, dim=1)):
        weight_NK[:, place * block[1] : (place + 1) * block[1]] *= scale_N1
    return weight_NK[:, :inputs]


# ---- NVFP4 (compressed-tensors)


def _nvfp4(index: TensorIndex) -> Iterator[tuple[str, StoredWeight]]:
    """`X.weight_packed`, two codes a byte, FP8 `X.weight_scale` [N, K / 16], over `X.weight_global_scale`."""
    for name, codes in index.headers.items():
        stem = name.removesuffix("weight_packed")
        if stem == name or codes.dtype != "U8":
            continue
        scale_name, global_name = f"{stem}weight_scale", f"{stem}weight_global_scale"
        scales, whole = index.headers.get(scale_name), index.headers.get(global_name)
        wanted = (*codes.shape[:1], codes.shape[-1] // 8) if len(codes.shape) == 2 else ()
        if (
            not wanted
            or scales is None
            or whole is None
            or scales.shape != wanted
            or scales.dtype != FP8[0]
            or whole.shape != (1,)
        ):
            raise FourfoldError(
                f"{index.folder}: {', '.join(_part(index, one) for one in (name, scale_name, global_name))}; wanted "
                f"{FP8[0]} {list(wanted)} scales and one for all. Download the checkpoint again"
            )
        parts = {"codes": codes, "scales": scales, "global": whole}
        shape = (codes.shape[0], 2 * codes.shape[1])
        yield f"{stem}weight", StoredWeight(stem, parts, shape, dequantize_nvfp4, 4, wanted[1])


def dequantize_nvfp4(parts: Mapping[str, Tensor]) -> Tensor:
    """fp32 [N, K]. parts: codes, scales, global."""
    scale_NG = parts["scales"].float() / parts["global"].float()
    weight_NK: Tensor = fp4_values(parts["codes"]) * scale_NG.repeat_interleave(16, dim=1)
    return weight_NK


# ---- AWQ, and AutoRound in AWQ's layout


def _awq(index: TensorIndex) -> Iterator[tuple[str, StoredWeight]]:
    """`X.qweight` [K, N / 8], `X.qzeros` [G, N / 8], `X.scales` [G, N]: 4 bits, version GEMM."""
    for name, codes in index.headers.items():
        stem = name.removesuffix(AWQ_PARTS["codes"])
        if stem == name:
            continue
        names = {role: stem + suffix for role, suffix in AWQ_PARTS.items()}
        parts = {role: index.headers[part] for role, part in names.items() if part in index.headers}
        if not _is_awq(parts):
            found = ", ".join(_part(index, part) for part in names.values())
            raise FourfoldError(
                f"{index.folder}: {found}; wanted I32 [K, N / 8], I32 [G, N / 8] and [G, N], AWQ's GEMM layout. "
                "Download the checkpoint again"
            )
        (inputs, _), (groups, outputs) = codes.shape, parts["scales"].shape
        yield f"{stem}weight", StoredWeight(stem, parts, (outputs, inputs), dequantize_awq, 4, groups)


def _is_awq(parts: Mapping[str, TensorHeader]) -> bool:
    if len(parts) < len(AWQ_PARTS) or any(len(part.shape) != 2 for part in parts.values()):
        return False
    (inputs, words), (groups, outputs) = parts["codes"].shape, parts["scales"].shape
    fits = outputs == 8 * words and parts["zeros"].shape == (groups, words) and groups and inputs % groups == 0
    return bool(fits) and parts["codes"].dtype == parts["zeros"].dtype == "I32"


def dequantize_awq(parts: Mapping[str, Tensor]) -> Tensor:
    """fp32 [N, K] of (codes - zero points) * scales. parts: codes, zeros, scales. Layout: AutoAWQ's WQLinear_GEMM."""
    code_KN, zero_GN = (
        unpack_codes(parts[role]).unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2).float()
        for role in ("codes", "zeros")
    )
    size = len(code_KN) // len(zero_GN)
    zero_KN, scale_KN = (value.repeat_interleave(size, dim=0) for value in (zero_GN, parts["scales"].float()))
    weight_KN: Tensor = (code_KN - zero_KN) * scale_KN
    return weight_KN.T


# ---- MXFP4 stacks (gpt-oss)


def _mxfp4(index: TensorIndex) -> Iterator[tuple[str, StoredWeight]]:
    """Stacks `X_blocks` [E, N, G, 16] of two codes a byte beside `X_scales` [E, N, G], as `X` [E, K, N], K = 32 G."""
    for name, blocks in index.headers.items():
        if not name.endswith("_blocks"):
            continue
        stem = name.removesuffix("_blocks")
        scales = index.headers.get(f"{stem}_scales")
        fits = (
            scales is not None and len(blocks.shape) == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3]
        )
        if scales is None or not fits or (blocks.dtype, scales.dtype) != ("U8", "U8"):
            found = "is missing" if scales is None else f"is {scales.dtype} {list(scales.shape)}"
            raise FourfoldError(
                f"{index.folder}: {name} is {blocks.dtype} {list(blocks.shape)} and {stem}_scales {found}, wanted U8 "
                "[E, N, G, 16] and U8 [E, N, G]. Download the checkpoint again"
            )
        experts, outputs, groups, _ = blocks.shape

        def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
            return dequantize_mxfp4(parts["blocks"], parts["scales"]).mT

        parts, shape = {"blocks": blocks, "scales": scales}, (experts, 32 * groups, outputs)
        yield stem, StoredWeight(stem, parts, shape, dequantize, 4)


def dequantize_mxfp4(block_ENGB: Tensor, scale_ENG: Tensor) -> Tensor:
    """fp32 [E, N, K] of bytes with two E2M1 codes each, the low one first, and the exponent of each group of 32."""
    return (fp4_values(block_ENGB) * exponents(scale_ENG)[..., None]).flatten(-2)


def fp4_values(byte_XB: Tensor) -> Tensor:
    """fp32 values of E2M1 codes, two a byte, the low one first."""
    value_C = torch.tensor(E2M1)
    return torch.stack([value_C[(byte_XB & 15).int()], value_C[(byte_XB >> 4).int()]], dim=-1).flatten(-2)


def exponents(byte_X: Tensor) -> Tensor:
    """fp32 2^(byte - 127): E8M0."""
    return torch.exp2(byte_X.float() - E8M0_BIAS)
