"""Checkpoints whose weights are not BF16, seen as BF16 ones: FP8, NVFP4, MXFP4, int4.

A weight and what it is dequantized with are one tensor here, BF16, under the name that a BF16 checkpoint has for it;
the rest of fourfold knows no other. Values are rounded once, from the fp32 product, as transformers' own dequantizers
do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold import formats
from fourfold.datatypes import FourfoldError, TensorHeader, brief
from fourfold.formats.compressed_tensors import COMPRESSED_TENSORS, float_kind
from fourfold.formats.format import Format
from fourfold.formats.patterns import check_patterns
from fourfold.model.config import CONFIG, quantization
from fourfold.model.files import CHUNK_BYTES
from fourfold.model.stored import StoredWeight, other_weights
from fourfold.model.tensors import TensorIndex, raw_bytes

BF16_BYTES = 2
OTHER_KINDS = {"fp8": "FP8", "mxfp4": "MXFP4"}  # by quant_method


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
        """Quantized weights [N, K] by their name, a dot at its end. Raises FourfoldError for parts that do not fit."""
        if self.format is None:
            stems = {name.removesuffix("weight"): one for name, one in self.stored.items() if name.endswith(".weight")}
            return dict(sorted(stems.items()))
        codes = self.format.codes
        names = sorted(name for name in self.disk.headers if name.endswith(f".{codes}"))
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
    index, settings = TensorIndex.open(folder), quantization(raw)
    kind, format = weights_kind(raw, folder)
    stored = dict(other_weights(index, settings)) if kind and format is None else {}
    if format or settings.get("quant_method") == COMPRESSED_TENSORS.method:
        stored |= _integers(index, format or COMPRESSED_TENSORS, settings)
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
        scaled = f"{stem}{format.scales}" in index.headers
        if stem == name or not scaled or len(header.shape) != 2 or header.dtype == "U8":
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


def weights_kind(raw: Mapping[str, Any], folder: Path) -> tuple[str, Format | None]:
    """Return what weights are stored as, "" for BF16, and of int4 (and int8) the format that releases have too.

    Raises FourfoldError for a method, width or layout that is not read.
    """
    settings = quantization(raw)
    method = settings.get("quant_method")
    if not settings or method in OTHER_KINDS:
        return OTHER_KINDS[str(method)] if settings else "", None
    packing = str(settings.get("packing_format"))
    if method == "awq" or (method == "auto-round" and packing.endswith("awq")):
        found = (settings.get("bits", 4), str(settings.get("version", "gemm")).lower())
        if found != (4, "gemm"):
            raise FourfoldError(
                f"{folder / CONFIG}: AWQ with {brief(found[0])} bits, version {brief(found[1])}; expected 4 bits, gemm"
            )
        return "AWQ", None
    if method == COMPRESSED_TENSORS.method and (kind := float_kind(settings)):
        return kind, None
    format = storage_format(raw, folder)
    assert format is not None
    if problem := format.unreadable(settings):
        raise FourfoldError(f"{folder / CONFIG}: {problem}")
    return "int4", format
