"""Router margins: how near a token is to another choice of experts, and what a change costs. docs/numerics.md, 15.

The margin of a token is z_a - z_b: z the router's logits, a the chosen expert with the smallest one, b the other expert
with the largest one. Letters: T tokens, S tokens near a tie, E experts, A experts per token, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEAR = 0.25  # share of a router's tokens that are near a tie: those with the smallest margins
SOLVED = 1 / 3  # margin error after a guided solve, of the margin error after RTN (docs/log.md)
LEAST_ERROR = 1e-6  # of a margin, in logits
LONGEST = 5.0  # times the 90 % quantile of its row: a token's vector of the routing field is made no longer


@dataclass(frozen=True)
class Margins:
    """margin_T: fp32, with its graph; last_T, next_T: experts a and b; place_T: of a among the token's experts."""

    margin_T: Tensor
    last_T: Tensor
    next_T: Tensor
    place_T: Tensor


def of_logits(logits_TE: Tensor, index_TA: Tensor) -> Margins:
    """Margins of a router's choice. logits_TE: fp32; index_TA: the chosen experts, fewer than all."""
    smallest = logits_TE.gather(1, index_TA).min(dim=1)
    largest = logits_TE.scatter(1, index_TA, -torch.inf).max(dim=1)
    last_T = index_TA.gather(1, smallest.indices[:, None])[:, 0]
    return Margins(smallest.values - largest.values, last_T, largest.indices, smallest.indices)


def near_and_error(margin_T: Tensor, error_T: Tensor) -> tuple[float, float]:
    """The largest margin that is near a tie, and the standard deviation of margins' errors after a solve, in logits.

    error_T: margins' errors after RTN. A normal error has the standard deviation sqrt(pi / 2) times its mean size.
    """
    near = margin_T.quantile(NEAR)
    deviation = math.sqrt(math.pi / 2) * error_T[margin_T <= near].abs().mean()
    return float(near), max(SOLVED * float(deviation), LEAST_ERROR)


def swap_cost(difference_SD: Tensor, curvature_DD: Tensor) -> Tensor:
    """What another output costs, to second order, in nats: 1/2 d^T C d of each token, fp32 [S].

    difference_SD: what the output changes by; curvature_DD: mean of the loss's gradients' products, fp32.
    """
    return 0.5 * ((difference_SD @ curvature_DD) * difference_SD).sum(dim=1)


def stiffness(cost_S: Tensor, near: float, error: float) -> Tensor:
    """mu of the expected cost mu e^2 / 2 of a margin error e, nats per logit squared. near, error: see near_and_error.

    Of tokens nearer than `near`, whose density at a tie is taken to be 1 / near.
    """
    return cost_S / (near * math.sqrt(2 * math.pi) * error)


def clip(field_RTD: Tensor) -> Tensor:
    """Shorten tokens' vectors to LONGEST times the 90 % quantile of their row: most have none of their own."""
    length_RT1 = field_RTD.float().norm(dim=-1, keepdim=True)
    most_R11 = LONGEST * length_RT1.quantile(0.9, dim=-2, keepdim=True)
    factor_RT1 = torch.where((length_RT1 > most_R11) & (most_R11 > 0), most_R11 / length_RT1, 1.0)
    return field_RTD.float() * factor_RT1
