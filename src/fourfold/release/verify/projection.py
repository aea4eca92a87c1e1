"""One expert projection as it is stored: codes, scales, and what engines read beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import fidelity, grid, pack
from fourfold.recipe import Scheme

CODES, SCALES, LAYOUT = "codes", "scales", "zero points and shapes"  # names of checks
Problem = tuple[str, str]  # name of the check, what is wrong


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How the release stores projections, and what the recipe promised of their scales."""

    format: str
    scheme: Scheme


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was seen of one projection. name: with a dot at its end.

    weight_error: |W - Wq| / |W|; error_over_rtn: |W - Wq| over that of round-to-nearest. None without a source.
    """

    name: str
    counts: tuple[int, ...]  # of codes -8 to 7
    entropy_bits: float
    scale_least: float
    scale_most: float
    weight_error: float | None
    error_over_rtn: float | None
    problems: tuple[Problem, ...]


def inspect(
    name: str, tensors: Mapping[str, Tensor], storage: Storage, read_source: Callable[[], Tensor] | None
) -> Inspected:
    """Look at every element of one projection.

    tensors: by suffix, as core/pack.tensor_shapes has them; read_source: gives the source's weight [N, K].
    """
    words, scales = (tensors[suffix] for suffix in pack.CODES_AND_SCALES[storage.format])
    counts_16 = fidelity.code_counts(words)
    magnitude = scales.float().abs()
    weight_error, over_rtn, dead_source = None, None, False
    if read_source is not None:
        error, rounded, norm = fidelity.squared_errors(read_source(), dict(tensors), storage.format)
        weight_error, dead_source = (error / norm) ** 0.5 if norm else 0.0, norm == 0
        over_rtn = (error / rounded) ** 0.5 if rounded else 0.0
    problems = [
        *_code_problems(counts_16, dead_source),
        *_scale_problems(scales, magnitude, storage),
        *_layout_problems(tensors, storage),
    ]
    return Inspected(
        name=name,
        counts=tuple(counts_16.tolist()),
        entropy_bits=fidelity.entropy_bits(counts_16),
        scale_least=float(magnitude.amin()),
        scale_most=float(magnitude.amax()),
        weight_error=weight_error,
        error_over_rtn=over_rtn,
        problems=tuple((check, f"{name.rstrip('.')}: {said}") for check, said in problems),
    )


def _code_problems(counts_16: Tensor, dead_source: bool) -> Iterator[Problem]:
    used = counts_16.nonzero().flatten() - 8
    if len(used) > 1:
        return
    code = int(used[0])
    if code:
        yield CODES, f"constant: every code is {code}"
    elif not dead_source:
        yield CODES, "dead: every code is 0"


def _scale_problems(scales: Tensor, magnitude: Tensor, storage: Storage) -> Iterator[Problem]:
    bad = ~((magnitude >= grid.SMALLEST) & (magnitude <= grid.LARGEST))  # true of NaN
    if bad.any():
        zeros = int((magnitude == 0).sum())
        what = f"{zeros:,} are zero" if zeros else f"{float(magnitude[bad][0]):.3g} is one"
        yield SCALES, (
            f"{int(bad.sum()):,} of {scales.numel():,} scales are not within 2^-17 and 65280 in magnitude, {what}"
        )
        return
    if storage.scheme.scale_dtype == "bf16" and scales.dtype is torch.float16:
        rounded = int((magnitude.bfloat16().float() != magnitude).sum())
        if rounded:
            yield SCALES, f"{rounded:,} of {scales.numel():,} scales are no BF16 values, as the recipe wants them"


def _layout_problems(tensors: Mapping[str, Tensor], storage: Storage) -> Iterator[Problem]:
    if storage.format == "compressed-tensors":
        outputs, packed = tensors["weight_packed"].shape
        if tensors["weight_shape"].tolist() != [outputs, packed * 8]:
            yield LAYOUT, f"weight_shape is {tensors['weight_shape'].tolist()}, wanted {[outputs, packed * 8]}"
        return
    word, qzeros = pack.ZERO_WORDS[storage.format], tensors["qzeros"]
    wrong = qzeros != word
    if wrong.any():
        yield LAYOUT, (
            f"{int(wrong.sum()):,} of {qzeros.numel():,} words of qzeros are not {word % 2**32:#010x} as "
            f"checkpoint_format {storage.format} wants them, one is {int(qzeros[wrong][0]) % 2**32:#010x}"
        )
    if not torch.equal(tensors["g_idx"], _group_index(tensors["g_idx"].numel(), storage.scheme.group_size)):
        yield LAYOUT, f"g_idx is not k // {storage.scheme.group_size}: groups would be taken for others"


@functools.lru_cache(maxsize=8)
def _group_index(inputs: int, group_size: int) -> Tensor:
    return torch.arange(inputs, dtype=torch.int32) // group_size
