"""How near stored codes and scales are to the source's weights, and whether codes look like weights at all."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core import grid
from fourfold.core.grid import INT4, INT8, Grid
from fourfold.core.pack import unpack_codes

LEVELS = {4: INT4, 8: INT8}
HALF_A_STEP = 0.5 + 2**-10  # a tie may have been rounded either way, on another device too
SLAB_ELEMENTS = 2**18  # of one fp32 temporary: it stays in a core's cache, twice as fast as a whole projection at once


def squared_errors(
    weight_NK: Tensor, words_NW: Tensor, stored_scale_NG: Tensor, bits: int = 4
) -> tuple[float, float, float]:
    """|W - Wq|^2, the same of round-to-nearest with absmax scales, and |W|^2, in fp32 with sums of slabs in float64.

    weight_NK: the source's; words_NW: codes as core/pack.py packs them, int32 [N, K * bits // 32]; stored_scale_NG: any
    float dtype. The last two may be views in any order of memory.
    """
    rows = max(SLAB_ELEMENTS // weight_NK.shape[1], 1)
    group_size = weight_NK.shape[1] // stored_scale_NG.shape[-1]
    plain = Grid(levels=LEVELS[bits], group_size=group_size, scale_dtype="bf16")
    error = rounded = norm = 0.0
    for first in range(0, len(weight_NK), rows):
        place = slice(first, first + rows)
        slab_NK, stored_NG = weight_NK[place].float(), stored_scale_NG[place].float()
        norm += _square(slab_NK)
        error += _square(slab_NK - grid.dequantize(unpack_codes(words_NW[place], bits), stored_NG))
        rounded += _square(grid.rounding_error(slab_NK, grid.absmax_scales(slab_NK, plain), plain))
    return error, rounded, norm


def _square(values_NK: Tensor) -> float:
    return float(values_NK.flatten() @ values_NK.flatten())


def codes_off(weight_NK: Tensor, words_NW: Tensor, stored_scale_NG: Tensor, bits: int, most: float) -> int:
    """Return how many codes are more than `most` steps of their scale from the weight. Others as of squared_errors."""
    levels, off = LEVELS[bits], 0
    rows = max(SLAB_ELEMENTS // weight_NK.shape[1], 1)
    for first in range(0, len(weight_NK), rows):
        place = slice(first, first + rows)
        scale_NG1 = stored_scale_NG[place].float()[..., None]
        steps_NGK = weight_NK[place].float().unflatten(-1, (stored_scale_NG.shape[-1], -1)) / scale_NG1
        code_NK = unpack_codes(words_NW[place], bits)
        away_NK = (steps_NGK.clamp_(levels[0], levels[-1]).flatten(-2) - code_NK).abs_()
        off += int((~(away_NK <= most)).sum())
    return off


def code_counts(words: Tensor, bits: int = 4) -> Tensor:
    """How often each code is there: int64 [2^bits], in the order of LEVELS. words: packed int32, in either layout."""
    counts_256 = torch.bincount(words.flatten().view(torch.uint8), minlength=256)
    if bits == 8:
        return counts_256
    pairs_16_16 = counts_256.view(16, 16)
    return pairs_16_16.sum(dim=0) + pairs_16_16.sum(dim=1)


def entropy_bits(counts: Tensor) -> float:
    """Shannon entropy of counts in bits: 0 where one code is everywhere, 4 where sixteen are equally frequent."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum())
