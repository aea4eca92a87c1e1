"""Router margins: what is near a tie, what a change of experts costs, and how much a margin's error costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fourfold.core import margins

TOKENS, EXPERTS, TOPK = 60, 7, 3


def choice(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and each token's experts, in no order."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(TOKENS, EXPERTS, generator=generator)
    index_TA = logits_TE.topk(TOPK, dim=1).indices[:, [1, 2, 0]]
    return logits_TE, index_TA


def test_a_margin_is_that_of_the_last_chosen_expert_and_the_next() -> None:
    logits_TE, index_TA = choice()
    found = margins.of_logits(logits_TE, index_TA)
    for token, (row, chosen) in enumerate(zip(logits_TE.tolist(), index_TA.tolist(), strict=True)):
        falling = sorted(range(EXPERTS), key=lambda expert: -row[expert])
        last, following = falling[TOPK - 1], falling[TOPK]
        assert (found.last_T[token], found.next_T[token]) == (last, following)
        assert found.margin_T[token] == pytest.approx(row[last] - row[following], abs=1e-6)
        assert chosen[found.place_T[token]] == last


def test_a_quarter_is_near_and_errors_of_far_tokens_do_not_count() -> None:
    """The error after a solve is a third of the deviation of a normal error after RTN."""
    margin_T = torch.linspace(0, 1, 40_001)
    error_T = torch.randn(len(margin_T), generator=torch.Generator().manual_seed(1)) * 0.06
    error_T[margin_T > 0.26] = 100.0
    near, error = margins.near_and_error(margin_T, error_T)
    assert near == pytest.approx(0.25, rel=1e-3) and error == pytest.approx(0.02, rel=0.03)
    assert margins.near_and_error(margin_T, torch.zeros_like(margin_T))[1] == margins.LEAST_ERROR


def test_a_swap_costs_half_a_quadratic_form() -> None:
    generator = torch.Generator().manual_seed(2)
    difference_SD, some_DD = torch.randn(5, 8, generator=generator), torch.randn(8, 8, generator=generator)
    curvature_DD = some_DD @ some_DD.T
    wanted = [float(d @ curvature_DD.double() @ d) / 2 for d in difference_SD.double()]
    assert margins.swap_cost(difference_SD, curvature_DD).tolist() == pytest.approx(wanted, rel=1e-5)


def test_stiffness_is_the_slope_of_the_expected_cost() -> None:
    """The cost of changed experts over margins of density 1 / near and normal errors, integrated by the trapezoid rule,
    grows by mu / 2 for each unit of the errors' variance.
    """
    near, cost = 0.4, 3.0

    def expected(variance: float) -> float:
        margin_X = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        changes_X = 0.5 * torch.erfc(margin_X / math.sqrt(2 * variance))
        return cost / near * float(torch.trapezoid(changes_X, margin_X))

    error, step = 0.05, 1e-6
    slope = (expected(error**2 + step) - expected(error**2 - step)) / (2 * step)
    assert float(margins.stiffness(torch.tensor([cost]), near, error)) / 2 == pytest.approx(slope, rel=1e-3)


def test_a_field_is_clipped_where_most_tokens_have_some() -> None:
    field_RTD = torch.zeros(2, 21, 3)
    field_RTD[0, :, 0] = torch.linspace(0, 1, 21)
    field_RTD[0, 20, 0] = 100.0  # the 90 % quantile is 0.9
    field_RTD[1, 4, 1] = 7.0  # the only one of its row
    clipped_RTD = margins.clip(field_RTD)
    assert clipped_RTD[0, 20].tolist() == pytest.approx([4.5, 0, 0])
    assert torch.equal(clipped_RTD[0, :20], field_RTD[0, :20]) and torch.equal(clipped_RTD[1], field_RTD[1])
