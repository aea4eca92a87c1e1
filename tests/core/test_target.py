"""Targets that compensate for errors of earlier layers, against float64 with the inverse as it is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import problems
import reference
from core.test_gptq import ORDERS, UNDAMPED, damped, factorize, integers, proxy_E
from fourfold.core import moments, target


@pytest.fixture(scope="module")
def weight_ENK() -> Tensor:
    return problems.make().weight_ENK.double()


@pytest.fixture(scope="module")
def hessian_EKK() -> Tensor:
    return problems.hessians(problems.make())


@pytest.mark.parametrize("order", ORDERS)
def test_retarget_is_w_plus_gap_over_h(weight_ENK: Tensor, hessian_EKK: Tensor, order: str) -> None:
    gap_ENK = problems.gaps(problems.make())
    before = weight_ENK.clone(), gap_ENK.clone()
    factor = factorize(hessian_EKK, order)[0]
    found = target.retarget(weight_ENK, gap_ENK, factor)
    for expert in range(3):
        weight_NK, gap_NK = problems.array(weight_ENK[expert]), problems.array(gap_ENK[expert])
        wanted = reference.retarget(weight_NK, gap_NK, damped(hessian_EKK, expert))
        assert np.abs(problems.array(found[expert]) - wanted).max() < 1e-10 * np.abs(wanted).max()
        assert np.abs(wanted - weight_NK).max() > 1e-3 * np.abs(weight_NK).max()  # there is something to see
    for tensor, old in zip((weight_ENK, gap_ENK), before, strict=True):
        assert torch.equal(tensor, old)
    assert torch.equal(target.retarget(weight_ENK, 0 * gap_ENK, factor), weight_ENK)


def test_the_retarget_identity() -> None:
    """|W x + y - Wq x|^2 = (W* - Wq) H (W* - Wq)^T + a constant, for any Wq."""
    problem = problems.make(inputs=64, outputs=6)
    hessian_EKK, weight_ENK = problems.hessians(problem), problem.weight_ENK.double()
    target_ENK = target.retarget(weight_ENK, problems.gaps(problem), factorize(hessian_EKK, settings=UNDAMPED)[0])
    for expert in range(3):
        input_SK, weight_S, missing_SN = (values.double() for values in problem.tokens_of(expert))
        constants = []
        for seed in range(4):
            wq_NK = weight_ENK[expert] + 0.01 * integers(-9, 10, 6, 64, seed=seed)
            output_SN = input_SK @ (weight_ENK[expert] - wq_NK).T + missing_SN
            loss = (weight_S[:, None] * output_SN.square()).sum() / weight_S.sum()
            constants.append((loss - proxy_E((target_ENK[expert] - wq_NK)[None], hessian_EKK[expert][None])).item())
        assert constants == pytest.approx([constants[0]] * 4, rel=1e-9, abs=1e-12)


# ---- ridge regression, and what of its map may be chance


@pytest.mark.parametrize("order", ORDERS)
def test_james_stein_leaves_what_is_not_chance(weight_ENK: Tensor, hessian_EKK: Tensor, order: str) -> None:
    """Rows kept in part, nearly whole, and not at all: also those that explain more than there is."""
    factor = factorize(hessian_EKK, order)[0]
    gap_ENK = 0.1 * weight_ENK @ hessian_EKK
    explained_EN = (gap_ENK * (0.1 * weight_ENK)).sum(dim=2)  # but for the damping
    energy_EN = explained_EN * torch.linspace(0.5, 9, explained_EN.shape[1], dtype=explained_EN.dtype)
    count_E = torch.tensor([4 * gap_ENK.shape[2], gap_ENK.shape[2] // 2, 10**6])
    share_E = torch.tensor([0.7, 0.3, 1.0], dtype=torch.float64)
    freedom_E = torch.tensor([100.0, 60.0, 200.0], dtype=torch.float64)
    found_ENK = target.james_stein(gap_ENK, energy_EN, count_E, share_E, freedom_E, factor)
    shares = []
    for expert in range(3):
        gap_NK, energy_N = problems.array(gap_ENK[expert]), problems.array(energy_EN[expert])
        given = int(count_E[expert]), float(share_E[expert]), float(freedom_E[expert])
        wanted = reference.james_stein(gap_NK, energy_N, *given, damped(hessian_EKK, expert))
        assert np.abs(problems.array(found_ENK[expert]) - wanted).max() < 1e-10 * np.abs(gap_NK).max()
        shares += (np.abs(wanted).max(axis=1) / np.abs(gap_NK).max(axis=1)).tolist()
    assert min(shares) == 0 and max(shares) > 0.999 and any(0.1 < share < 0.9 for share in shares)
    nothing = [torch.zeros_like(value) for value in (gap_ENK, energy_EN, count_E, share_E, freedom_E)]
    assert torch.equal(target.james_stein(*nothing, factor), nothing[0])


@pytest.mark.parametrize("panel", [7, 100, 1024])
@pytest.mark.parametrize("order", ORDERS)
def test_degrees_of_freedom_follow_the_definition(
    hessian_EKK: Tensor, order: str, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "PANEL", panel)
    factor, damped_EKK = factorize(hessian_EKK, order)
    found = target.degrees_of_freedom(hessian_EKK, torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), factor)
    for expert, (m, n0) in enumerate([(9.0, 1.0), (3.0, 3.0), (1.0, 9.0)]):
        hessian_KK = problems.array(hessian_EKK[expert])
        own = reference.Moments(7 * hessian_KK, 7.0, 10, 1.0, np.zeros((0, 0)), np.zeros(0))
        wanted = reference.degrees_of_freedom(own, m, n0, problems.array(damped_EKK[expert]))
        assert found[expert].item() == pytest.approx(wanted, rel=1e-10)


def test_the_whole_target_is_that_of_float64() -> None:
    """Sums of tokens, shrunk, damped, believed in part, in fp32: as the solver puts it together."""
    problem, n0 = problems.make(), 128.0
    own = moments.accumulate(problem.input_TK, problem.token_S, problem.weight_S, problem.offsets)
    gap_ENK, gap2_EN = moments.gap(
        problem.missing, 24, problem.input_TK[problem.token_S], problem.weight_S, problem.offsets
    )
    pool_KK = moments.pool(problem.input_TK, torch.ones(480)) / 480
    hessian_EKK, m_E = moments.shrink(own, pool_KK, n0, effective=True, trace_matched=True)
    factor, _ = factorize(hessian_EKK)
    share_E = moments.own_share(m_E, n0)
    freedom_E = target.degrees_of_freedom(own.hessian_EKK, share_E / own.weight_E, factor)
    mean_ENK, energy_EN = moments.shrink_to_zero(gap_ENK, own.weight_E, share_E), gap2_EN / own.weight_E[:, None]
    kept_ENK = target.james_stein(mean_ENK, energy_EN, own.count_E, share_E, freedom_E, factor)
    found = target.retarget(problem.weight_ENK, kept_ENK, factor)
    for expert in range(3):
        sums = reference.moments(*(values.numpy() for values in problem.tokens_of(expert)))
        shrunk_KK, m = reference.shrink(sums, problems.array(pool_KK), n0, effective=True, trace_matched=True)
        weight_NK = problems.array(problem.weight_ENK[expert])
        wanted = reference.residual_target(weight_NK, sums, m, n0, damped(torch.from_numpy(shrunk_KK)[None], 0))
        moved = np.abs(wanted - weight_NK).max()
        assert np.abs(problems.array(found[expert]) - wanted).max() < 1e-3 * moved and moved > 1e-3


@pytest.mark.parametrize("told", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("tokens", [1, 8, 32, 128, 2048])
def test_a_map_is_believed_as_far_as_its_tokens_support_it(told: float, tokens: int) -> None:
    """y = B x and noise, 64 inputs of heavy-tailed loudness: for all possible tokens the map is no worse than none.

    The pool is the inputs' true second moment, as that of a layer nearly is.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    color_KK = torch.eye(64, dtype=torch.float64) + 0.2 * normal(64, 64)
    input_SK = normal(tokens, 64) @ color_KK * normal(tokens, 1).abs().pow(1.5)
    pool_KK = color_KK.T @ color_KK * normal(10**5).abs().pow(3).mean()
    map_NK = normal(200, 64)
    map_NK *= (told / ((map_NK @ pool_KK) * map_NK).sum(dim=1, keepdim=True)) ** 0.5
    gap_SN = input_SK @ map_NK.T + (1 - told) ** 0.5 * normal(tokens, 200)
    own = moments.accumulate(input_SK, torch.arange(tokens), torch.ones(tokens), [0, tokens])
    hessian_EKK, m_E = moments.shrink(own, pool_KK.float(), 32.0, effective=True, trace_matched=True)
    factor = factorize(hessian_EKK.double(), settings=UNDAMPED)[0]
    share_E = moments.own_share(m_E, 32.0).double()
    freedom_E = target.degrees_of_freedom(own.hessian_EKK.double() / tokens, share_E, factor)
    gap_ENK = (gap_SN.T @ input_SK / tokens)[None] * share_E[:, None, None]
    energy_EN = gap_SN.square().mean(dim=0)[None]
    kept_ENK = target.james_stein(gap_ENK, energy_EN, torch.tensor([tokens]), share_E, freedom_E, factor)

    def error(gap_ENK: Tensor) -> float:
        """What a map misses of B x, mean of the rows; no map misses `told`."""
        zero_NK = torch.zeros_like(map_NK)
        found_NK = target.retarget(zero_NK[None], gap_ENK, factor)[0]
        missed_NK = found_NK - map_NK
        return float(((missed_NK @ pool_KK) * missed_NK).sum() / len(map_NK))

    assert 0 < freedom_E.item() < min(tokens, 64)
    assert error(kept_ENK) <= told + 0.02
    assert told or error(kept_ENK) <= 0.5 * error(gap_ENK)  # of noise alone ridge regression makes more
    assert tokens < 2048 or error(kept_ENK) < 0.15 * told + 0.02
