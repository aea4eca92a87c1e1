"""One projection as it is stored: codes, scales, and what engines read beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fourfold.core import fidelity, grid
from fourfold.formats.format import Format
from fourfold.recipe import Scheme

CODES, SCALES, LAYOUT = "codes", "scales", "zero points and shapes"  # names of checks
Problem = tuple[str, str]  # name of the check, what is wrong


class Codes(Enum):
    """How codes came to be: experts in int4 are solved and logged, linear modules in int8 solved, others rounded."""

    EXPERT = "expert"
    LINEAR = "linear"
    ROUNDED = "rounded"


# Steps of its scale that a weight may be from its code. Solved int8 codes of two test models: 2.4 at most.
MOST_STEPS = {Codes.LINEAR: 8.0, Codes.ROUNDED: fidelity.HALF_A_STEP}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The format of the release, what the recipe promised of scales, and how a projection's codes are stored.

    draft_prefix: of the draft head's names, "" where there is none.
    """

    format: Format
    scheme: Scheme
    draft_prefix: str
    bits: int = 4
    group_size: int = 0
    codes: Codes = Codes.EXPERT


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What was seen of one projection. name: with a dot at its end.

    counts: of codes, in the order of fidelity.LEVELS; weight_error: |W - Wq| / |W|; error_over_rtn: |W - Wq| over that
    of round-to-nearest; codes_off: that are farther from the weight than MOST_STEPS allows. None without a source.
    """

    name: str
    bits: int
    codes: Codes
    counts: tuple[int, ...]
    entropy_bits: float
    scale_least: float
    scale_most: float
    weight_error: float | None
    error_over_rtn: float | None
    codes_off: int | None
    problems: tuple[Problem, ...]


def inspect(
    name: str, tensors: Mapping[str, Tensor], storage: Storage, read_source: Callable[[], Tensor] | None
) -> Inspected:
    """Look at every element of one projection.

    tensors: by suffix, as Format.tensor_shapes has them; read_source: gives the source's weight [N, K].
    """
    form, bits = storage.format, storage.bits
    words, scales = tensors[form.codes], tensors[form.scales]
    counts = fidelity.code_counts(words, bits)
    magnitude = scales.float().abs()
    weight_error, over_rtn, off, dead_source = None, None, None, False
    if read_source is not None:
        stored = read_source(), form.oriented(words), form.oriented(scales)
        error, rounded, norm = fidelity.squared_errors(*stored, bits)
        weight_error, dead_source = (error / norm) ** 0.5 if norm else 0.0, norm == 0
        over_rtn = (error / rounded) ** 0.5 if rounded else 0.0
        steps = MOST_STEPS.get(storage.codes)
        off = None if steps is None else fidelity.codes_off(*stored, bits, steps)
    problems = [
        *_code_problems(counts, bits, dead_source),
        *_scale_problems(scales, magnitude, storage),
        *((LAYOUT, said) for said in form.companion_problems(tensors, storage.group_size, bits)),
    ]
    return Inspected(
        name=name,
        bits=bits,
        codes=storage.codes,
        counts=tuple(counts.tolist()),
        entropy_bits=fidelity.entropy_bits(counts),
        scale_least=float(magnitude.amin()),
        scale_most=float(magnitude.amax()),
        weight_error=weight_error,
        error_over_rtn=over_rtn,
        codes_off=off,
        problems=tuple((check, f"{name.rstrip('.')}: {said}") for check, said in problems),
    )


def _code_problems(counts: Tensor, bits: int, dead_source: bool) -> Iterator[Problem]:
    used = counts.nonzero().flatten() + fidelity.LEVELS[bits][0]
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
        yield (
            SCALES,
            (f"{int(bad.sum()):,} of {scales.numel():,} scales are not within 2^-17 and 65280 in magnitude, {what}"),
        )
        return
    if storage.scheme.scale_dtype == "bf16" and scales.dtype is torch.float16:
        rounded = int((magnitude.bfloat16().float() != magnitude).sum())
        if rounded:
            yield SCALES, f"{rounded:,} of {scales.numel():,} scales are no BF16 values, as the recipe wants them"
