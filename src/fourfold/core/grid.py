"""Scales and codes: search, quantize, dequantize. docs/numerics.md section 5."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core.kernels import cpu, cuda

INT4, INT8 = range(-8, 8), range(-128, 128)  # levels of the codes
LARGEST = 65280.0  # the largest BF16 value that FP16 holds
SMALLEST = 2.0**-17  # exact in BF16 and, as a subnormal, in FP16


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a weight becomes: a code times the scale of its group.

    levels: all codes, from a negative one on; group_size: inputs that share a scale; scale_dtype: "bf16" or "fp16".
    """

    levels: range
    group_size: int
    scale_dtype: str

    @property
    def least(self) -> int:
        return self.levels[0]

    @property
    def most(self) -> int:
        return self.levels[-1]


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """Candidates: `steps` factors from low to high of max|w| / |least code|, both signs if signed."""

    low: float
    high: float
    steps: int
    signed: bool


def stored(scale: Tensor, dtype: str) -> Tensor:
    """Scales as the release holds them, fp32: rounded to "bf16" or "fp16", magnitude in [2^-17, 65280], sign kept."""
    magnitude = scale.abs().clamp(SMALLEST, LARGEST).to(torch.bfloat16 if dtype == "bf16" else torch.float16).float()
    return torch.where(scale < 0, -magnitude, magnitude)


def absmax_scales(weight_ENK: Tensor, grid: Grid) -> Tensor:
    """2 max|w| over the width of the grid per group, as GPTQModel's symmetric grid has it. fp32 [E, N, G]."""
    largest_ENG = weight_ENK.unflatten(-1, (-1, grid.group_size)).abs().amax(dim=-1)
    return stored(largest_ENG * (2 / (grid.most - grid.least)), grid.scale_dtype)


def search_scales(weight_ENK: Tensor, importance_EK: Tensor, grid: Grid, search: ScaleSearch) -> Tensor:
    """Per group the stored scale with the least sum_j importance_j (w_j - s clamp(rint(w_j / s)))^2, ties to the first.

    importance_EK: >= 0, natural column order. Returns fp32 [E, N, G]. Works expert by expert, so temporaries are small.
    """
    if weight_ENK.is_cuda:
        return cuda.search_scales(weight_ENK, importance_EK, grid, search)
    scales = []
    for weight_NK, importance_K in zip(weight_ENK, importance_EK, strict=True):
        candidate_FNG = candidates(weight_NK, grid, search)
        choose = cpu.choose_scales if weight_NK.dtype == torch.float32 else choose_scales_torch
        scales.append(choose(weight_NK, importance_K, candidate_FNG, grid))
    return torch.stack(scales)


def candidates(weight_NK: Tensor, grid: Grid, search: ScaleSearch) -> Tensor:
    """All scales that are tried for each group, as stored, in the order of trial: fp32 [F, N, G]."""
    base_NG = weight_NK.unflatten(-1, (-1, grid.group_size)).abs().amax(dim=-1) / -grid.least
    factor_F = torch.linspace(search.low, search.high, search.steps)
    if search.signed:
        factor_F = torch.stack([factor_F, -factor_F], dim=1).flatten()
    return stored(base_NG * factor_F.to(base_NG.device)[:, None, None], grid.scale_dtype)


def choose_scales_torch(weight_NK: Tensor, importance_K: Tensor, candidate_FNG: Tensor, grid: Grid) -> Tensor:
    """The choice among candidates, for any device and dtype: what the native kernels are held against. fp32 [N, G]."""
    groups = candidate_FNG.shape[-1]
    weight_NGK, importance_GK = weight_NK.unflatten(-1, (groups, -1)), importance_K.view(groups, -1)
    scale_NG = candidate_FNG[0]
    best_NG = torch.full_like(scale_NG, torch.inf)
    for candidate_NG in candidate_FNG:
        code_NGK = (weight_NGK * candidate_NG.reciprocal()[..., None]).round_().clamp_(grid.least, grid.most)
        error_NGK = code_NGK.mul_(candidate_NG[..., None]).sub_(weight_NGK).square_()
        cost_NG = torch.einsum("ngk,gk->ng", error_NGK, importance_GK)
        better_NG = cost_NG < best_NG
        best_NG = torch.where(better_NG, cost_NG, best_NG)
        scale_NG = torch.where(better_NG, candidate_NG, scale_NG)
    return scale_NG


def spread(scale_ENG: Tensor, group_size: int) -> Tensor:
    """A scale for each input feature, [E, N, K]."""
    return scale_ENG.repeat_interleave(group_size, dim=-1)


def round_to_nearest(weight_ENK: Tensor, scale_ENG: Tensor, grid: Grid) -> Tensor:
    """Codes int8 [E, N, K], half to even."""
    group_size = weight_ENK.shape[-1] // scale_ENG.shape[-1]
    return (weight_ENK / spread(scale_ENG, group_size)).round().clamp(grid.least, grid.most).to(torch.int8)


def rounding_error(weight_ENK: Tensor, scale_ENG: Tensor, grid: Grid) -> Tensor:
    """Codes of round_to_nearest times scales, less the weights: fp32 [E, N, K]. One temporary, the result."""
    grouped_ENGK, scale_ENG1 = weight_ENK.unflatten(-1, (scale_ENG.shape[-1], -1)), scale_ENG[..., None]
    code_ENGK = (grouped_ENGK / scale_ENG1).round_().clamp_(grid.least, grid.most)
    error_ENK: Tensor = code_ENGK.mul_(scale_ENG1).sub_(grouped_ENGK).flatten(-2)
    return error_ENK


def dequantize(codes_ENK: Tensor, scale_ENG: Tensor) -> Tensor:
    """codes * scale in fp32 [E, N, K]; engines round it to their dtype."""
    grouped_ENGK = codes_ENK.unflatten(-1, (scale_ENG.shape[-1], -1)).float()
    weight_ENK: Tensor = (grouped_ENGK * scale_ENG[..., None]).flatten(-2)
    return weight_ENK
