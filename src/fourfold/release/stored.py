"""What a checkpoint stores, by its headers and whoever wrote it: projections of codes and scales, all other tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.formats.format import Format, Shape
from fourfold.formats.patterns import check_patterns
from fourfold.model.tensors import TensorIndex

CENTRE = 0  # a zero point in the middle of the grid, as a code


@dataclass(frozen=True, kw_only=True)
class Projection:
    """name: without suffix, with a dot at its end; [N, K] = outputs, inputs; bits: of a code; suffixes: those that
    are there.
    """

    name: str
    bits: int
    outputs: int
    inputs: int
    groups: int
    suffixes: tuple[str, ...]

    @property
    def group_size(self) -> int:
        return self.inputs // self.groups


@dataclass(frozen=True, kw_only=True)
class Stored:
    """format: None where nothing is quantized; projections: by name; kept: every other tensor by name."""

    index: TensorIndex
    format: Format | None
    projections: Mapping[str, Projection]
    kept: Mapping[str, TensorHeader]

    @property
    def quantized_modules(self) -> dict[str, tuple[int, int]]:
        """Bits and group size of each, by its name without suffix."""
        return {name.rstrip("."): (one.bits, one.group_size) for name, one in sorted(self.projections.items())}

    @property
    def kept_modules(self) -> list[str]:
        return linear_modules({name: header.shape for name, header in self.kept.items()})

    def read(self, projection: Projection) -> dict[str, Tensor]:
        """All that is stored of a projection, by suffix."""
        return {suffix: self.index.read(projection.name + suffix) for suffix in projection.suffixes}


def linear_modules(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the linear modules among tensors without codes, stacks of experts by their names too."""
    return [
        name.removesuffix(".weight")
        for name, shape in sorted(shapes.items())
        if len(shape) == 2 and name.endswith(".weight") and "embed" not in name
    ]


def take_stock(index: TensorIndex, format: Format | None, settings: Mapping[str, Any]) -> Stored:
    """Sort a checkpoint's tensors. settings: its quantization_config, which has the bits of each module. Raises
    FourfoldError for a projection whose parts do not fit each other.
    """
    projections: dict[str, Projection] = {}
    if format is not None:
        stems = [name.removesuffix(format.codes) for name in sorted(index.headers) if name.endswith(f".{format.codes}")]
        check_patterns(format, settings, [stem.rstrip(".") for stem in stems])
        for stem in stems:
            projections[stem] = _projection(index, stem, format, format.bits(settings, stem.rstrip(".")))
    parts = {name + suffix for name, projection in projections.items() for suffix in projection.suffixes}
    kept = {name: header for name, header in index.headers.items() if name not in parts}
    return Stored(index=index, format=format, projections=projections, kept=kept)


def _projection(index: TensorIndex, name: str, format: Format, bits: int) -> Projection:
    codes, scales = format.codes, format.scales
    word, scale = index.headers[name + codes], index.headers.get(name + scales)
    if scale is None or len(scale.shape) != 2 or len(word.shape) != 2 or word.dtype != "I32":
        found = f"{scale.dtype} {list(scale.shape)}" if scale else "missing"
        raise FourfoldError(
            f"{index.folder}: {name}{codes} is {word.dtype} {list(word.shape)} and {name}{scales} is {found}; wanted "
            "int32 words and a scale for each group, both of two dimensions"
        )
    axis = format.inputs_axis
    outputs, inputs, groups = word.shape[1 - axis], word.shape[axis] * 32 // bits, scale.shape[axis]
    if not groups or inputs % groups:
        raise FourfoldError(
            f"{index.folder}: {name}{scales} is {list(scale.shape)}: {groups} groups of {inputs:,} inputs; wanted a "
            "number of groups that divides them"
        )
    known = dict.fromkeys([*format.suffixes, *format.tensor_shapes(outputs, inputs, groups, bits)])
    there = tuple(suffix for suffix in known if name + suffix in index.headers)
    return Projection(name=name, bits=bits, outputs=outputs, inputs=inputs, groups=groups, suffixes=there)


def layout_problems(tensors: Mapping[str, Tensor], projection: Projection, format: Format) -> Iterator[str]:
    """Why a projection is no plain symmetric one: zero points off the middle, groups of inputs that do not follow.

    tensors: by suffix; what is absent is as it should be.
    """
    zeros, index = format.zero_points(tensors, projection.outputs, projection.bits), tensors.get(format.index)
    if zeros is not None and (wrong := int((zeros != CENTRE).sum())):
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


def generalized(module: str) -> str:
    """A regular expression for a module in each layer: numbers between dots are any."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))
