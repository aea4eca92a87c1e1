"""How near stored int4 weights are to the source's, and whether their codes look like weights at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core import grid
from fourfold.core.grid import INT4, Grid
from fourfold.core.pack import unpack_codes

SLAB_ELEMENTS = 2**18  # of one fp32 temporary: it stays in a core's cache, twice as fast as a whole projection at once


def squared_errors(weight_NK: Tensor, words_NW: Tensor, stored_scale_NG: Tensor) -> tuple[float, float, float]:
    """|W - Wq|^2, the same of round-to-nearest with absmax scales, and |W|^2, in fp32 with sums of slabs in float64.

    weight_NK: the source's; words_NW: codes as core/pack.py packs them, int32 [N, K // 8]; stored_scale_NG: any float
    dtype. The last two may be views in any order of memory.
    """
    rows = max(SLAB_ELEMENTS // weight_NK.shape[1], 1)
    group_size = weight_NK.shape[1] // stored_scale_NG.shape[-1]
    plain = Grid(levels=INT4, group_size=group_size, scale_dtype="bf16")
    error = rounded = norm = 0.0
    for first in range(0, len(weight_NK), rows):
        place = slice(first, first + rows)
        slab_NK, stored_NG = weight_NK[place].float(), stored_scale_NG[place].float()
        norm += _square(slab_NK)
        error += _square(slab_NK - grid.dequantize(unpack_codes(words_NW[place]), stored_NG))
        rounded += _square(grid.rounding_error(slab_NK, grid.absmax_scales(slab_NK, plain), plain))
    return error, rounded, norm


def _square(values_NK: Tensor) -> float:
    return float(values_NK.flatten() @ values_NK.flatten())


def code_counts(words: Tensor) -> Tensor:
    """How often each code is there: int64 [16], in the order of grid.INT4. words: packed int32, in either layout."""
    pairs_16_16 = torch.bincount(words.flatten().view(torch.uint8), minlength=256).view(16, 16)
    return pairs_16_16.sum(dim=0) + pairs_16_16.sum(dim=1)


def entropy_bits(counts: Tensor) -> float:
    """Shannon entropy of counts in bits: 0 where one code is everywhere, 4 where all sixteen are equally frequent."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum())
