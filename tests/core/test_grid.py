"""Scales against brute force, and what the release may hold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import problems
import reference
from fourfold.core import grid
from fourfold.core.grid import ScaleSearch
from fourfold.core.kernels import cpu
from grids import int4
from problems import GROUP

SEARCH = ScaleSearch(low=0.45, high=1.15, steps=36, signed=True)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SINGLE = st.floats(width=32, allow_nan=False)


@pytest.fixture(scope="module")
def weight_ENK() -> Tensor:
    return problems.make().weight_ENK


@pytest.fixture(scope="module")
def importance_EK() -> Tensor:
    """Like a factor's D: over three decades."""
    return torch.rand(3, 256, generator=torch.Generator().manual_seed(0)).mul(7).exp()


def cost(weight_ENK: Tensor, scale_ENG: Tensor, importance_EK: Tensor) -> Tensor:
    """What the search minimises, float64 [E, N, G]."""
    codes_ENK = grid.round_to_nearest(weight_ENK, scale_ENG, int4())
    error_ENK = weight_ENK.double() - codes_ENK * grid.spread(scale_ENG.double(), GROUP)
    return (error_ENK.square() * importance_EK[:, None].double()).unflatten(-1, (-1, GROUP)).sum(dim=-1)


def group_of(*values: float) -> Tensor:
    """One expert, one row, one group of 32: these weights, then zeros."""
    return torch.tensor([*values, *[0.0] * (GROUP - len(values))])[None, None]


# ---- stored


@settings(max_examples=300)
@given(SINGLE, st.sampled_from(["bf16", "fp16"]))
def test_stored_is_exact_in_what_it_is_stored_as(value: float, dtype: str) -> None:
    found = grid.stored(torch.tensor(value), dtype)
    assert found.item() == reference.stored(value, dtype)
    for name in ("bf16", "fp16") if dtype == "bf16" else ("fp16",):  # BF16 scales are exact in FP16 too
        assert found.to(DTYPES[name]).float() == found
    assert 2.0**-17 <= abs(found) <= 65280 and (found < 0) == (value < 0)
    assert torch.equal(grid.stored(found, dtype), found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_at_the_ends(dtype: str) -> None:
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e9, -1e9, math.inf, -math.inf])
    least, most = 2.0**-17, 65280.0
    assert grid.stored(values, dtype).tolist() == [least, least, least, -least, most, -most, most, -most]


def test_every_scale_of_a_release_is_a_normal_product() -> None:
    """All BF16 values in range, so that none was forgotten: each is exact in FP16."""
    values = torch.arange(2**15, dtype=torch.int16).view(torch.bfloat16).float()
    values = values[(values >= grid.SMALLEST) & (values <= grid.LARGEST)]
    assert len(values) > 4000 and torch.equal(values.half().float(), values)
    assert torch.equal(grid.stored(values, "bf16"), values) and torch.equal(grid.stored(-values, "bf16"), -values)


# ---- absmax


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_absmax_is_two_fifteenths(weight_ENK: Tensor, group_size: int, dtype: str) -> None:
    found = grid.absmax_scales(weight_ENK, int4(group_size, dtype))
    assert found.dtype == torch.float32 and found.shape == (3, 24, 256 // group_size) and (found > 0).all()
    for expert in range(3):
        wanted = reference.absmax_scales(problems.array(weight_ENK[expert]), group_size, dtype)
        assert (found[expert].numpy() == wanted).all()
    assert (grid.absmax_scales(0 * weight_ENK, int4(group_size, dtype)) == 2.0**-17).all()


# ---- search


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("low", "high", "steps"), [(0.45, 1.15, 36), (0.5, 1.0, 3), (0.9, 2.0, 1)])
def test_search_is_brute_force(
    weight_ENK: Tensor, importance_EK: Tensor, dtype: str, signed: bool, low: float, high: float, steps: int
) -> None:
    search = ScaleSearch(low=low, high=high, steps=steps, signed=signed)
    rows = weight_ENK[:, :8]
    found = grid.search_scales(rows, importance_EK, int4(GROUP, dtype), search)
    assert found.dtype == torch.float32
    naive = reference.Search(low, high, steps, signed, dtype)
    wanted = np.stack([
        reference.search_scales(problems.array(rows[e]), problems.array(importance_EK[e]), GROUP, naive)
        for e in range(3)
    ])  # fmt: skip
    assert (found.numpy() == wanted).mean() >= 0.99
    costs = cost(rows, found, importance_EK), cost(rows, torch.from_numpy(wanted).float(), importance_EK)
    assert torch.allclose(*costs, rtol=1e-5)  # where fp32 settles a tie otherwise
    assert signed or not (found < 0).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tailed", [False, True])
def test_search_is_never_worse_than_absmax(importance_EK: Tensor, seed: int, tailed: bool) -> None:
    """By its own cost. Absmax is the factor 16/15, which 0.45, 0.47 ... 1.15 steps over: hence the second search."""
    weight_ENK = problems.make(seed=seed).weight_ENK
    weight_ENK = weight_ENK * weight_ENK.abs() if tailed else weight_ENK
    plain = cost(weight_ENK, grid.absmax_scales(weight_ENK, int4(GROUP)), importance_EK)
    best = cost(weight_ENK, grid.search_scales(weight_ENK, importance_EK, int4(GROUP), SEARCH), importance_EK)
    assert (best <= 1.02 * plain).all() and (best.sum(dim=-1) < plain.sum(dim=-1)).all()
    assert best.sum() < 0.6 * plain.sum()
    holding = ScaleSearch(low=7 / 15, high=16 / 15, steps=10, signed=True)
    surely = cost(weight_ENK, grid.search_scales(weight_ENK, importance_EK, int4(GROUP), holding), importance_EK)
    assert (surely <= plain * (1 + 1e-5)).all()
    unsigned = dataclasses.replace(SEARCH, signed=False)
    one_side = cost(weight_ENK, grid.search_scales(weight_ENK, importance_EK, int4(GROUP), unsigned), importance_EK)
    assert (best <= one_side * (1 + 1e-5)).all() and best.sum() < one_side.sum()


def test_the_sign_puts_the_longer_side_where_it_is_needed() -> None:
    only_one = ScaleSearch(low=1.0, high=1.0, steps=1, signed=True)
    ones_EK = torch.ones(1, GROUP)
    for values, scale in (((8.0, -7.0), -1.0), ((-8.0, 7.0), 1.0)):
        assert grid.search_scales(group_of(*values), ones_EK, int4(GROUP), only_one).item() == scale
    unsigned = dataclasses.replace(only_one, signed=False)
    assert grid.search_scales(group_of(8.0, -7.0), ones_EK, int4(GROUP), unsigned).item() == 1.0


def test_ties_go_to_the_first() -> None:
    ones_EK = torch.ones(1, GROUP)
    wide = ScaleSearch(low=1.25, high=1.25, steps=1, signed=True)  # nothing is clamped: signs are equal
    assert grid.search_scales(group_of(8.0, -7.0, 3.0), ones_EK, int4(GROUP), wide).item() == 1.25
    unseen = grid.search_scales(group_of(8.0, -7.0, 3.0), 0 * ones_EK, int4(GROUP), SEARCH)
    assert unseen.item() == grid.stored(torch.tensor(0.45), "bf16")
    # 3 is 6 halves and 3 ones: both exactly
    halves = ScaleSearch(low=0.5, high=1.0, steps=2, signed=False)
    heavy = torch.tensor([[0.0, 1.0] + [0.0] * 30])
    assert grid.search_scales(group_of(-8.0, 3.0), heavy, int4(GROUP), halves).item() == 0.5


def test_importance_decides() -> None:
    """One outlier beside small weights: whoever matters is hit."""
    weight_ENK = group_of(8.0, 0.45, 0.45, 0.45, 0.45)
    outlier = torch.tensor([[1e6, *[1.0] * 31]])
    others = torch.tensor([[1e-6, *[1.0] * 31]])
    large, small = (grid.search_scales(weight_ENK, weights, int4(GROUP), SEARCH) for weights in (outlier, others))
    assert abs(8 - grid.dequantize(grid.round_to_nearest(weight_ENK, large, int4()), large)[0, 0, 0]) < 0.05
    # the least candidate is 0.45 of what holds the outlier: exactly the small weights
    assert small.abs().item() == pytest.approx(0.45, rel=2**-8) and large.abs() > small.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_groups_without_weight(signed: bool, importance_EK: Tensor, weight_ENK: Tensor) -> None:
    search = dataclasses.replace(SEARCH, signed=signed)
    weight_ENK = weight_ENK.clone()
    weight_ENK[0, 3, 32:64] = 0
    whole = grid.search_scales(weight_ENK, importance_EK, int4(GROUP), search)
    assert whole[0, 3, 1] == 2.0**-17 and whole.isfinite().all()
    assert not grid.round_to_nearest(weight_ENK, whole, int4())[0, 3, 32:64].any()
    assert (grid.search_scales(0 * weight_ENK, importance_EK, int4(GROUP), search) == 2.0**-17).all()


@pytest.mark.parametrize("value", [0.02, -0.02, 1e-9, 1e-4, 3e38])
def test_a_constant_row_is_hit(value: float) -> None:
    """All weights of a group equal: code 7 or -8 within the step of the candidates; tiny ones round to zero."""
    weight_ENK = torch.full((1, 1, GROUP), value)
    scale_ENG = grid.search_scales(weight_ENK, torch.ones(1, GROUP), int4(GROUP), SEARCH)
    assert scale_ENG.isfinite().all() and 2.0**-17 <= scale_ENG.abs() <= 65280
    found = grid.dequantize(grid.round_to_nearest(weight_ENK, scale_ENG, int4()), scale_ENG)
    if 1e-5 < abs(value) < 1:
        assert torch.allclose(found, weight_ENK, rtol=0.01)
    elif abs(value) < 1:
        assert not found.any()
    else:
        assert found.isfinite().all()


def test_an_outlier_of_a_thousand_costs_only_its_own_group(weight_ENK: Tensor, importance_EK: Tensor) -> None:
    loud = weight_ENK.clone()
    loud[1, 5, 70] *= 1000
    before, after = (grid.search_scales(weight, importance_EK, int4(GROUP), SEARCH) for weight in (weight_ENK, loud))
    changed = before != after
    assert changed.sum() == 1 and changed[1, 5, 2] and after.isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_choice_is_torchs_on_any_number_of_threads(threads: int, dtype: str) -> None:
    problem = problems.make(experts=1, outputs=150, seed=3)
    weight_NK, importance_K = problem.weight_ENK[0], torch.rand(256, generator=torch.Generator().manual_seed(1))
    candidate_FNG = grid.candidates(weight_NK, int4(GROUP, dtype), SEARCH)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = cpu.choose_scales(weight_NK, importance_K, candidate_FNG, int4())
    torch.set_num_threads(before)
    wanted = grid.choose_scales_torch(weight_NK, importance_K, candidate_FNG, int4())
    assert (found == wanted).float().mean() > 0.998  # two candidates may cost the same but for rounding
    costs = [cost(weight_NK[None], scales[None], importance_K[None]) for scales in (found, wanted)]
    torch.testing.assert_close(*costs, rtol=1e-5, atol=0)


def test_louder_weights_have_louder_scales(weight_ENK: Tensor, importance_EK: Tensor) -> None:
    wanted = grid.search_scales(weight_ENK, importance_EK, int4(GROUP), SEARCH)
    assert torch.equal(grid.search_scales(4 * weight_ENK, importance_EK, int4(GROUP), SEARCH), 4 * wanted)
    assert torch.equal(grid.search_scales(weight_ENK, 4 * importance_EK, int4(GROUP), SEARCH), wanted)


# ---- codes and back


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 8, 32]), st.integers(0, 2**16))
def test_rounding_and_back(experts: int, rows: int, groups: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_ENK = torch.randint(-40, 41, (experts, rows, groups * size), generator=generator) / 4  # with real ties
    scale_ENG = 2.0 ** torch.randint(-2, 2, (experts, rows, groups), generator=generator)
    scale_ENG *= 1 - 2 * torch.randint(0, 2, scale_ENG.shape, generator=generator)
    codes_ENK = grid.round_to_nearest(weight_ENK, scale_ENG, int4())
    found_ENK = grid.dequantize(codes_ENK, scale_ENG)
    assert codes_ENK.dtype == torch.int8 and codes_ENK.min() >= -8 and codes_ENK.max() <= 7
    assert found_ENK.dtype == torch.float32
    for expert in range(experts):
        scales = problems.array(scale_ENG[expert])
        wanted = reference.round_to_nearest(problems.array(weight_ENK[expert]), scales)
        assert (codes_ENK[expert].numpy() == wanted).all()
        assert (found_ENK[expert].numpy() == reference.dequantize(wanted, scales)).all()
    assert torch.equal(grid.round_to_nearest(found_ENK, scale_ENG, int4()), codes_ENK)
