"""Targets that compensate for errors of earlier layers. docs/numerics.md section 8."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.gptq import Factor, take

PANEL = 128  # columns of an inverse that exist at one time


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
    experts, inputs = factor.pivot_EK.shape
    total_E = torch.zeros_like(factor.pivot_EK[:, 0])
    for first in range(0, inputs, PANEL):
        columns = torch.arange(first, min(first + PANEL, inputs), device=total_E.device)
        unit_EKB = torch.zeros(experts, inputs, len(columns), device=total_E.device)
        unit_EKB[:, columns, columns - first] = 1.0
        half_EKB = torch.linalg.solve_triangular(factor.unit_EKK, unit_EKB, upper=True, unitriangular=True)
        half_EKB /= factor.pivot_EK[:, :, None]
        inverse_EKB = torch.linalg.solve_triangular(factor.unit_EKK.mT, half_EKB, upper=False, unitriangular=True)
        own_EBK = take(hessian_EKK, factor.order_EK[:, columns])
        own_EBK = own_EBK.gather(2, factor.order_EK[:, None, :].expand_as(own_EBK))
        total_E += (own_EBK * inverse_EKB.mT).sum(dim=(1, 2))
    return share_E * total_E


def _project(value_ENK: Tensor, factor: Factor) -> Tensor:
    """Y M^-T, columns in processing order: Y H^-1 Y^T is the sum of its squares over D."""
    index_ENK = factor.order_EK[:, None, :].expand_as(value_ENK)
    ordered_ENK, lower_EKK = value_ENK.gather(2, index_ENK), factor.unit_EKK.mT
    projected_ENK: Tensor = torch.linalg.solve_triangular(
        lower_EKK, ordered_ENK, upper=False, left=False, unitriangular=True
    )
    return projected_ENK
