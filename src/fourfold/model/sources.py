"""Checkpoints whose weights are not BF16, seen as BF16 ones: FP8 with block scales, MXFP4, int4.

A weight and what it is dequantized with are one tensor here, BF16, under the name that a BF16 checkpoint has for it;
the rest of fourfold knows no other. Values are rounded once, from the fp32 product, as transformers' own dequantizers
do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold import formats
from fourfold.datatypes import FourfoldError, TensorHeader, brief
from fourfold.formats.format import Format
from fourfold.formats.patterns import check_patterns
from fourfold.model.config import CONFIG, quantization
from fourfold.model.files import CHUNK_BYTES
from fourfold.model.tensors import TensorIndex, raw_bytes

BF16_BYTES = 2
FP8 = ("F8_E4M3", "F8_E5M2")
BLOCK = 128  # of FP8, where config.json names none
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0_BIAS = 127


@dataclass(frozen=True)
class StoredWeight:
    """How one weight lies on disk. name: that its tensors' names begin with; parts: these tensors by role, of integers
    by suffix; dequantize: from their values, by role, to fp32; bits: of its codes; groups: of inputs, of integers.
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
        return self.inputs // self.groups

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())


@dataclass(frozen=True)
class SourceIndex(TensorIndex):
    """A checkpoint as a source. headers: as a BF16 checkpoint has them; of a weight that is stored otherwise the
    offsets only say how large it is in BF16. disk: what lies there; settings: its quantization_config; stored: those
    weights; kind: what they are, "" of BF16; format: of int4.
    """

    disk: TensorIndex
    settings: Mapping[str, Any]
    stored: Mapping[str, StoredWeight]
    kind: str
    format: Format | None

    @cached_property
    def projections(self) -> Mapping[str, StoredWeight]:
        """Weights of integers by their name, a dot at its end. Raises FourfoldError for parts that do not fit."""
        codes = self.format.codes if self.format else ""
        names = sorted(name for name in self.disk.headers if codes and name.endswith(f".{codes}"))
        return {stem: self._projection(stem) for stem in (name.removesuffix(codes) for name in names)}

    def _projection(self, stem: str) -> StoredWeight:
        assert self.format is not None
        codes, scales, headers = self.format.codes, self.format.scales, self.disk.headers
        word, scale = headers[stem + codes], headers.get(stem + scales)
        if scale is None or len(scale.shape) != 2 or len(word.shape) != 2 or word.dtype != "I32":
            found = f"{scale.dtype} {list(scale.shape)}" if scale else "missing"
            raise FourfoldError(
                f"{self.folder}: {stem}{codes} is {word.dtype} {list(word.shape)} and {stem}{scales} is {found}; "
                "wanted int32 words and a scale for each group, both of two dimensions"
            )
        one = self.stored[f"{stem}weight"]
        if not one.groups or one.inputs % one.groups:
            raise FourfoldError(
                f"{self.folder}: {stem}{scales} is {list(scale.shape)}: {one.groups} groups of {one.inputs:,} inputs; "
                "wanted a number of groups that divides them"
            )
        return one

    @cached_property
    def kept(self) -> Mapping[str, TensorHeader]:
        """All other tensors."""
        parts = {part.name for weight in self.projections.values() for part in weight.parts.values()}
        return {name: header for name, header in self.disk.headers.items() if name not in parts}

    @property
    def quantized_modules(self) -> dict[str, tuple[int, int]]:
        """Bits and group size of each, by its name without suffix."""
        return {name.rstrip("."): (one.bits, one.group_size) for name, one in self.projections.items()}

    def read_parts(self, weight: StoredWeight) -> dict[str, Tensor]:
        """All that is stored of a weight, by role."""
        return {role: self.disk.read(part.name) for role, part in weight.parts.items()}

    def group_size_problem(self) -> str:
        """How config.json's group size differs from what the scales have; "" if it does not, or names none.

        Engines take the size from config.json: with another one they stop, or multiply by the wrong scales. -1 and null
        are a scale for each row; a size for some modules alone (`dynamic`, `config_groups`) counts as one of several.
        """
        stated = list(group_sizes(self.settings))
        if self.format is None or not stated:
            return ""
        for _, one in sorted(self.stored.items()):
            by_row = one.groups == 1 and any(size in (-1, None) for size in stated)
            if one.groups and one.inputs % one.groups == 0 and one.group_size not in stated and not by_row:
                scale, found = one.parts[self.format.scales], ", ".join(map(brief, stated))
                return (
                    f"quantization_config.group_size: got {found}, expected {one.group_size}, as {scale.name} "
                    f"{list(scale.shape)} has it for {one.inputs:,} inputs"
                )
        return ""

    @property
    def added_bytes(self) -> int:
        """How much larger the checkpoint is in BF16 than on disk."""
        return sum(self.headers[name].size_bytes - weight.size_bytes for name, weight in self.stored.items())

    def read(self, name: str, *, out: Tensor | None = None, sha: hashlib._Hash | None = None) -> Tensor:
        """As TensorIndex.read. sha: of the bytes on disk, of all parts of a weight that is stored otherwise."""
        if name not in self.stored:
            return super().read(name, out=out, sha=sha)
        weight = self.dequantized(name, sha).to(torch.bfloat16)
        if out is None:
            return weight
        out.view(weight.shape).copy_(weight)
        return out

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """As TensorIndex.chunks; a weight that is stored otherwise is held whole."""
        if name not in self.stored:
            yield from super().chunks(name, chunk_bytes)
            return
        content = raw_bytes(self.dequantized(name).to(torch.bfloat16))
        for start in range(0, len(content), chunk_bytes):
            yield content[start : start + chunk_bytes]

    def read_range(self, name: str, start: int, out: memoryview) -> None:
        """As TensorIndex.read_range; a weight that is stored otherwise is dequantized as a whole."""
        if name not in self.stored:
            super().read_range(name, start, out)
            return
        out[:] = raw_bytes(self.dequantized(name).to(torch.bfloat16))[start : start + len(out)]

    def dequantized(self, name: str, sha: hashlib._Hash | None = None) -> Tensor:
        weight = self.stored[name]
        parts = {role: self.disk.read_finite(part.name, sha=sha) for role, part in weight.parts.items()}
        return weight.dequantize(parts).contiguous()


def open_source(folder: Path, raw: Mapping[str, Any]) -> SourceIndex:
    """The checkpoint in a folder, whose config.json is `raw`, as a BF16 one.

    Raises FourfoldError for a quantization that is not read, and for weights whose parts do not fit each other.
    """
    index = TensorIndex.open(folder)
    settings, format = quantization(raw), None
    method = settings.get("quant_method")
    if not settings:
        stored, kind = {}, ""
    elif method == "fp8":
        stored, kind = dict(_fp8(index, settings)), "FP8"
    elif method == "mxfp4":
        stored, kind = dict(_mxfp4(index)), "MXFP4"
    else:
        format = readable_format(raw, folder)
        assert format is not None
        stored, kind = dict(_integers(index, format, settings)), "int4"
    parts = {part.name for weight in stored.values() for part in weight.parts.values()}
    headers = {name: header for name, header in index.headers.items() if name not in parts}
    for name, weight in stored.items():
        shard = next(iter(weight.parts.values())).shard
        size = BF16_BYTES * math.prod(weight.shape)
        headers[name] = TensorHeader(
            name=name, dtype="BF16", shape=weight.shape, shard=shard, start_byte=0, end_byte=size
        )
    return SourceIndex(
        folder=folder,
        headers=headers,
        digest=index.digest,
        disk=index,
        settings=settings,
        stored=stored,
        kind=kind,
        format=format,
    )


# ---- FP8 with a scale for each block (DeepSeek V3, MiniMax-M2, GLM-5)


def _fp8(index: TensorIndex, settings: Mapping[str, Any]) -> Iterator[tuple[str, StoredWeight]]:
    """Weights `X.weight` in FP8 beside `X.weight_scale_inv`, one scale for each block."""
    block = settings.get("weight_block_size") or [BLOCK, BLOCK]
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise FourfoldError(f"{index.folder}/config.json: weight_block_size: got {brief(block)}, expected two sizes")
    rows, columns = block
    for name, header in index.headers.items():
        if header.dtype not in FP8:
            continue
        scales = index.headers.get(f"{name}_scale_inv")
        wanted = tuple(-(-size // step) for size, step in zip(header.shape, block, strict=False))
        if len(header.shape) != 2 or scales is None or scales.shape != wanted:
            found = "is missing" if scales is None else f"is {list(scales.shape)}"
            raise FourfoldError(
                f"{index.folder}: {name} is {header.dtype} {list(header.shape)} and {name}_scale_inv {found}, wanted "
                f"{list(wanted)}, a scale for each block of {rows} x {columns}. FP8 with other scales is not read: "
                "take the BF16 checkpoint, if one is published"
            )

        def dequantize(parts: Mapping[str, Tensor]) -> Tensor:
            return dequantize_blocks(parts["weight"], parts["scales"], (rows, columns))

        yield name, StoredWeight(name, {"weight": header, "scales": scales}, header.shape, dequantize, 8)


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
    value_C = torch.tensor(E2M1)
    pair_ENGB2 = torch.stack([value_C[(block_ENGB & 15).int()], value_C[(block_ENGB >> 4).int()]], dim=-1)
    weight_ENGK = pair_ENGB2.flatten(-2) * exponents(scale_ENG)[..., None]
    return weight_ENGK.flatten(-2)


def exponents(byte_X: Tensor) -> Tensor:
    """fp32 2^(byte - 127): E8M0."""
    return torch.exp2(byte_X.float() - E8M0_BIAS)


# ---- int4, int8


def _integers(index: TensorIndex, format: Format, settings: Mapping[str, Any]) -> Iterator[tuple[str, StoredWeight]]:
    """Weights that are stored as codes and scales in a format that releases have too."""
    beside = dict.fromkeys([format.codes, *format.suffixes, *format.tensor_shapes(8, 8, 1)])

    def dequantize(parts: Mapping[str, Tensor], bits: int) -> Tensor:
        stacked = {role: part[None] for role, part in parts.items() if role in format.suffixes}
        return format.dequantize(stacked, bits)[0]

    check_patterns(format, settings, [name.rpartition(".")[0] for name in index.headers])
    for name, header in index.headers.items():
        stem = name.removesuffix(format.codes)
        if stem == name or f"{stem}{format.scales}" not in index.headers or len(header.shape) != 2:
            continue
        found = {suffix: index.headers[stem + suffix] for suffix in beside if stem + suffix in index.headers}
        axis, bits, scale = format.inputs_axis, format.bits(settings, stem.removesuffix(".")), found[format.scales]
        shape = (header.shape[1 - axis], 32 // bits * header.shape[axis])
        groups = scale.shape[axis] if len(scale.shape) == 2 else 0
        yield f"{stem}weight", StoredWeight(stem, found, shape, partial(dequantize, bits=bits), bits, groups)


def layout_problems(tensors: Mapping[str, Tensor], projection: StoredWeight, format: Format) -> Iterator[str]:
    """Why a projection is no plain symmetric one: zero points off the middle, groups of inputs that do not follow.

    tensors: by suffix; what is absent is as it should be.
    """
    zeros, index = format.zero_points(tensors, projection.outputs, projection.bits), tensors.get(format.index)
    if zeros is not None and (wrong := int((zeros != 0).sum())):
        middle = 1 << projection.bits - 1
        least, most = int(zeros.min()) + middle, int(zeros.max()) + middle
        if least == most:
            yield (
                f"all zero points are {least}, wanted {middle}: does checkpoint_format say gptq of gptq_v2, or the "
                "reverse?"
            )
            return
        yield f"{wrong:,} of {zeros.numel():,} zero points are not {middle}: it was quantized asymmetrically"
    if index is not None and not torch.equal(
        index.long().flatten(), torch.arange(projection.inputs) // projection.group_size
    ):
        yield "its groups are not of inputs that follow each other: it was quantized in an order of its own (desc_act)"


def storage_format(raw: Mapping[str, Any], folder: Path) -> Format | None:
    """Return the format that config.json's `quantization_config` means, None if it has none.

    Raises FourfoldError for a method that is not known. Width and layout are for `readable_format`.
    """
    config = quantization(raw)
    if not config:
        return None
    for form in formats.FORMATS:
        if form.named_by(config):
            return form
    detail = config.get("packing_format") or config.get("checkpoint_format")
    found = brief(config.get("quant_method")) + (f" with {brief(detail)}" if detail else "")
    wanted = ", ".join(form.read_as for form in formats.FORMATS)
    raise FourfoldError(f"{folder / CONFIG}: quantized by {found}, which is not read; expected 4 bits by {wanted}")


def group_sizes(settings: object) -> Iterator[object]:
    """Each value of a key group_size, however deep."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key == "group_size":
            yield value
        yield from group_sizes(value)


def readable_format(raw: Mapping[str, Any], folder: Path) -> Format | None:
    """storage_format of what `Weights` reads. Raises FourfoldError for a method, width or layout that it does not."""
    format = storage_format(raw, folder)
    if format and (problem := format.unreadable(quantization(raw))):
        raise FourfoldError(f"{folder / CONFIG}: {problem}")
    return format
