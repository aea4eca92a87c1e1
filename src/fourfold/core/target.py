"""Targets that compensate for errors of earlier layers. docs/numerics.md section 8."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.gptq import Factor, take

PANEL = 128  # columns of an inverse that are made at one time


def retarget(weight_ENK: Tensor, gap_ENK: Tensor, factor: Factor) -> Tensor:
    """Return W + Y H^-1, whose output comes closest to W x + y. [E, N, K].

    gap_ENK: Y, mean of w y x^T, y the additional output that is wanted, shrunk as ridge regression does
    (moments.shrink_to_zero): as in LoaQ (arXiv 2509.06297), with what GPTAQ (arXiv 2504.02692) wants in it.
    """
    moved_ENK = _project(gap_ENK, factor).div_(factor.pivot_EK[:, None, :])
    moved_ENK = torch.linalg.solve_triangular(factor.unit_EKK, moved_ENK, upper=True, left=False, unitriangular=True)
    natural_ENK: Tensor = moved_ENK.gather(2, factor.order_EK.argsort(dim=1)[:, None, :].expand_as(weight_ENK))
    return natural_ENK.add_(weight_ENK)


def james_stein(
    gap_ENK: Tensor, energy_EN: Tensor, count_E: Tensor, share_E: Tensor, freedom_E: Tensor, factor: Factor
) -> Tensor:
    """Return Y with each row shrunk to zero by how much of it may be chance: James and Stein, positive part. [E, N, K].

    gap_ENK: Y, mean of w y x^T times share_E, s = m / (m + n0), so that Y H'^-1 is the ridge estimate of the map from x
    to y; energy_EN: mean of w y^2; count_E: T tokens; freedom_E: F, see degrees_of_freedom. The map explains
    e = Y H'^-1 Y^T of a row's energy and leaves r = energy - e. Of noise alone it would explain r s F / (T - F).
    """
    explained_EN = _project(gap_ENK, factor).square_().div_(factor.pivot_EK[:, None, :]).sum(dim=2)
    chance_E = share_E * freedom_E / (count_E - freedom_E).clamp(min=1e-6)
    noise_EN = (energy_EN - explained_EN).mul_(chance_E[:, None])
    kept_EN = ((explained_EN - noise_EN) / explained_EN).nan_to_num_(0.0).clamp_(0.0, 1.0)  # 0 / 0: nothing to keep
    return gap_ENK * kept_EN.where(explained_EN < energy_EN, 0.0)[:, :, None]


def degrees_of_freedom(hessian_EKK: Tensor, share_E: Tensor, factor: Factor) -> Tensor:
    """Return s tr(H'^-1 H), the inputs that ridge regression can use: below K and below the number of tokens. fp32 [E].

    hessian_EKK: sum or mean H of the expert's own tokens times a number that share_E includes; factor: of H'.
    """
    inverse_EKK, total_E = _inverse(factor.unit_EKK), torch.zeros_like(factor.pivot_EK[:, 0])
    for first in range(0, inverse_EKK.shape[1], PANEL):
        panel, end = slice(first, first + PANEL), first + PANEL
        own_EBK = take(hessian_EKK, factor.order_EK[:, panel])
        own_EBK = own_EBK.gather(2, factor.order_EK[:, None, :end].expand(-1, own_EBK.shape[1], -1))
        own_EBK[:, :, :first] *= 2  # H is symmetric: what lies before the panel stands for what lies behind it
        summed_EKB = torch.bmm(inverse_EKK[:, :end, :end], own_EBK.mT).mul_(inverse_EKK[:, :end, panel])
        total_E += summed_EKB.sum(dim=2).div_(factor.pivot_EK[:, :end]).sum(dim=1)
    return share_E * total_E


def _inverse(unit_EKK: Tensor) -> Tensor:
    """Of unit upper triangular matrices, from the first panel of columns to the last: two GEMMs for each."""
    inverse_EKK = torch.zeros_like(unit_EKK)
    for first in range(0, unit_EKK.shape[1], PANEL):
        panel, before = slice(first, first + PANEL), slice(0, first)
        square_EBB = unit_EKK[:, panel, panel]
        eye_EBB = torch.eye(square_EBB.shape[1], dtype=unit_EKK.dtype, device=unit_EKK.device).expand_as(square_EBB)
        own_EBB = torch.linalg.solve_triangular(square_EBB, eye_EBB, upper=True, unitriangular=True)
        inverse_EKK[:, panel, panel] = own_EBB
        moved_EKB = torch.bmm(inverse_EKK[:, before, before], unit_EKK[:, before, panel])
        inverse_EKK[:, before, panel] = torch.bmm(moved_EKB, own_EBB).neg_()
    return inverse_EKK


def _project(value_ENK: Tensor, factor: Factor) -> Tensor:
    """Y M^-T, columns in processing order: Y H^-1 Y^T is the sum of its squares over D."""
    index_ENK = factor.order_EK[:, None, :].expand_as(value_ENK)
    ordered_ENK, lower_EKK = value_ENK.gather(2, index_ENK), factor.unit_EKK.mT
    projected_ENK: Tensor = torch.linalg.solve_triangular(
        lower_EKK, ordered_ENK, upper=False, left=False, unitriangular=True
    )
    return projected_ENK
