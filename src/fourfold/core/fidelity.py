"""How near stored int4 weights are to the source's, and whether their codes look like weights at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core import grid, pack

SLAB_ELEMENTS = 2**18  # of one fp32 temporary: it stays in a core's cache, twice as fast as a whole projection at once


def squared_errors(weight_NK: Tensor, tensors: dict[str, Tensor], format: str) -> tuple[float, float, float]:
    """|W - Wq|^2, the same of round-to-nearest with absmax scales, and |W|^2, in fp32 with sums of slabs in float64.

    weight_NK: the source's; tensors: of one projection, by suffix, without a dimension of experts; Wq is what
    core/pack.py unpacks from them.
    """
    words, scales = pack.CODES_AND_SCALES[format]
    rows = max(SLAB_ELEMENTS // weight_NK.shape[1], 1)
    error = rounded = norm = 0.0
    for first in range(0, len(weight_NK), rows):
        place = slice(first, first + rows)
        along = place if format == "compressed-tensors" else (slice(None), place)  # gptq: output features are columns
        group = pack.unpack({words: tensors[words][along], scales: tensors[scales][along]}, format)
        slab_NK = weight_NK[place].float()
        norm += _square(slab_NK)
        error += _square(slab_NK - grid.dequantize(group.codes_ENK, group.scale_ENG))
        scale_NG = grid.absmax_scales(slab_NK, slab_NK.shape[1] // group.scale_ENG.shape[-1], "bf16")
        rounded += _square(grid.rounding_error(slab_NK, scale_NG))
    return error, rounded, norm


def _square(values_NK: Tensor) -> float:
    return float(values_NK.flatten() @ values_NK.flatten())


def code_counts(words: Tensor) -> Tensor:
    """How often each code from -8 to 7 is there: int64 [16]. words: packed int32, in either layout."""
    pairs_16_16 = torch.bincount(words.flatten().view(torch.uint8), minlength=256).view(16, 16)
    return pairs_16_16.sum(dim=0) + pairs_16_16.sum(dim=1)


def entropy_bits(counts: Tensor) -> float:
    """Shannon entropy of counts in bits: 0 where one code is everywhere, 4 where all sixteen are equally frequent."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum())
