"""The metric of the rows: what the rest of the model makes of an expert's outputs. docs/numerics.md section 13.

With it an error costs tr(H_O Err H Err^T), H_O [N, N] the second moment of the end loss's gradient at the projection's
output: a Kronecker-factored Fisher metric. Only its shape matters, and a multiple of the identity is no metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import gptq, moments

FLOOR = 1e-4  # of the median of a metric's diagonal, added to it


@dataclass(frozen=True)
class RowFactor:
    """H_O = M diag(D) M^T, scaled and damped, rows in processing order: the most sensitive first.

    metric_ENN: H_O in that order; unit_ENN: M, unit upper triangular; pivot_EN: D; order_EN: natural index of each
    processed row; diagonal_E: experts whose H_O was replaced by its diagonal, as it has no factor.
    A leading dimension of 1 is shared by all experts.
    """

    metric_ENN: Tensor
    unit_ENN: Tensor
    pivot_EN: Tensor
    order_EN: Tensor
    diagonal_E: Tensor


def factorize_rows(metric_ENN: Tensor, odamp: float) -> RowFactor:
    """Scale each expert's metric to a mean diagonal of 1, damp it and factorize it; the argument is not changed.

    metric_ENN: symmetric, positive semidefinite up to rounding; 0 stands for no preference. odamp: share of the
    diagonal that is added to it. Raises NotFinite for the first expert whose metric is not finite. A metric without a
    factor is replaced by its diagonal: a value in the result, and the codes of no metric.
    Peak: four stacks [E, N, N] above the argument; the result holds two.
    """
    mean_E = metric_ENN.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    if not mean_E.isfinite().all():
        raise moments.NotFinite(int((~mean_E.isfinite()).nonzero()[0]))
    scaled_ENN = metric_ENN / mean_E.where(mean_E > 0, 1.0)[:, None, None]
    damping = gptq.Damping(delta=odamp, kind="diagonal", floor=FLOOR, retries=())
    factor = gptq.factorize_(scaled_ENN, damping, "activation", 1)
    index_ENN = factor.order_EK[:, None, :].expand_as(scaled_ENN)
    ordered_ENN = gptq.take(scaled_ENN, factor.order_EK).gather(2, index_ENN)
    return RowFactor(ordered_ENN, factor.unit_EKK, factor.pivot_EK, factor.order_EK, factor.diagonal_E)


def predicted_share(curvature_DD: Tensor, odamp: float = 0.05) -> float:
    """tr(D) / tr(H_O): the share of down's error that guidance is expected to leave. Near 1 it buys nothing.

    curvature_DD: the second moment of the end loss's gradient at the layer's output, which is down's H_O.
    """
    rows = factorize_rows(curvature_DD[None], odamp)
    return float(rows.pivot_EN.sum() / moments.trace(rows.metric_ENN).sum())


def gate_up_metric(down_weight_EDI: Tensor, curvature_DD: Tensor, moment_ERR: Tensor) -> Tensor:
    """H_O of gate and up, rows [gate; up]: (1_2x2 kron W_down^T C W_down) * B, elementwise. fp32 [E, 2I, 2I].

    An error of gate and up reaches the layer's output as W_down (p dz + q du), weighed by the router: the first factor
    is how much that output matters, the second how much of it the neurons let through.
    curvature_DD: see predicted_share; moment_ERR: mean of w^2 s s^T over the expert's tokens, s of `sensitivities`.
    """
    weight_EDI = down_weight_EDI.float()
    seen_EII = torch.matmul(torch.matmul(weight_EDI.mT, curvature_DD), weight_EDI)
    return seen_EII.repeat(1, 2, 2).mul_(moment_ERR)


def sensitivities(gate_up_T2I: Tensor) -> Tensor:
    """How a neuron's output u silu(z) changes with its gate z and its up u: [u silu'(z); silu(z)], [T, 2I].

    gate_up_T2I: [z; u], of which the derivatives are formed in fp32; the result has its dtype. With the router's
    weights squared these are the inputs of a second moment like any other: see moments.accumulate.
    """
    gate_TI, up_TI = gate_up_T2I.float().chunk(2, dim=-1)
    open_TI = gate_TI.sigmoid()
    silu_TI = gate_TI * open_TI
    slope_TI = open_TI + silu_TI * (1 - open_TI)
    return torch.cat([up_TI * slope_TI, silu_TI], dim=-1).to(gate_up_T2I.dtype)
