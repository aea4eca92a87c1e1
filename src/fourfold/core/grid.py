"""Scales and codes: search, quantize, dequantize. docs/numerics.md section 5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 65280.0  # the largest BF16 value that FP16 holds
SMALLEST = 2.0**-17  # exact in BF16 and, as a subnormal, in FP16
SLAB_BYTES = {"cpu": 2**18, "cuda": 2**28}  # of one fp32 temporary of the search; a CPU core's cache, a GPU's memory


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """Candidates: `steps` factors from low to high of max|w| / 8, both signs if signed; stored as dtype."""

    low: float
    high: float
    steps: int
    signed: bool
    dtype: str


def stored(scale: Tensor, dtype: str) -> Tensor:
    """Scales as the release holds them, fp32: rounded to "bf16" or "fp16", magnitude in [2^-17, 65280], sign kept."""
    magnitude = scale.abs().clamp(SMALLEST, LARGEST).to(torch.bfloat16 if dtype == "bf16" else torch.float16).float()
    return torch.where(scale < 0, -magnitude, magnitude)


def absmax_scales(weight_ENK: Tensor, group_size: int, dtype: str) -> Tensor:
    """max|w| * 2 / 15 per group, as GPTQModel's symmetric grid has it. fp32 [E, N, G]."""
    largest_ENG = weight_ENK.unflatten(-1, (-1, group_size)).abs().amax(dim=-1)
    return stored(largest_ENG * (2 / 15), dtype)


def search_scales(weight_ENK: Tensor, importance_EK: Tensor, group_size: int, search: ScaleSearch) -> Tensor:
    """Per group the stored scale with the least sum_j importance_j (w_j - s clamp(rint(w_j / s)))^2, ties to the first.

    importance_EK: >= 0, natural column order. Returns fp32 [E, N, G]. Works in slabs of rows, so temporaries are small.
    """
    experts, rows, inputs = weight_ENK.shape
    groups = inputs // group_size
    scale_ENG = torch.empty(experts, rows, groups, device=weight_ENK.device)
    slab = max(SLAB_BYTES[weight_ENK.device.type] // (4 * inputs), 1)
    for expert in range(experts):
        importance_GK = importance_EK[expert].view(groups, group_size)
        for first in range(0, rows, slab):
            weight_NGK = weight_ENK[expert, first : first + slab].reshape(-1, groups, group_size)
            scale_ENG[expert, first : first + slab] = _search_slab(weight_NGK, importance_GK, search)
    return scale_ENG


def _search_slab(weight_NGK: Tensor, importance_GK: Tensor, search: ScaleSearch) -> Tensor:
    base_NG = weight_NGK.abs().amax(dim=-1) / 8
    factors = torch.linspace(search.low, search.high, search.steps).tolist()
    best_NG = torch.full_like(base_NG, torch.inf)
    scale_NG = torch.full_like(base_NG, SMALLEST)
    error_NGK = torch.empty_like(weight_NGK)
    for factor in factors:
        for sign in (1.0, -1.0) if search.signed else (1.0,):
            candidate_NG = stored(base_NG * (factor * sign), search.dtype)
            torch.mul(weight_NGK, candidate_NG.reciprocal()[..., None], out=error_NGK)
            error_NGK.round_().clamp_(-8, 7)
            error_NGK.mul_(candidate_NG[..., None]).sub_(weight_NGK).square_()
            cost_NG = torch.einsum("ngk,gk->ng", error_NGK, importance_GK)
            better_NG = cost_NG < best_NG
            best_NG = torch.where(better_NG, cost_NG, best_NG)
            scale_NG = torch.where(better_NG, candidate_NG, scale_NG)
    return scale_NG


def spread(scale_ENG: Tensor, group_size: int) -> Tensor:
    """A scale for each input feature, [E, N, K]."""
    return scale_ENG.repeat_interleave(group_size, dim=-1)


def round_to_nearest(weight_ENK: Tensor, scale_ENG: Tensor) -> Tensor:
    """Codes int8 [E, N, K] in [-8, 7], half to even."""
    group_size = weight_ENK.shape[-1] // scale_ENG.shape[-1]
    return (weight_ENK / spread(scale_ENG, group_size)).round().clamp(-8, 7).to(torch.int8)


def dequantize(codes_ENK: Tensor, scale_ENG: Tensor) -> Tensor:
    """codes * scale in fp32 [E, N, K]; engines round it to their dtype."""
    grouped_ENGK = codes_ENK.unflatten(-1, (scale_ENG.shape[-1], -1)).float()
    weight_ENK: Tensor = (grouped_ENGK * scale_ENG[..., None]).flatten(-2)
    return weight_ENK
