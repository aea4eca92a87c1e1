"""Moments against the token-by-token reference, and what pooling and damping do at the edges."""

from __future__ import annotations

import dataclasses
import itertools
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import problems
import reference
from fourfold.core import moments
from fourfold.core.kernels import bf16
from fourfold.core.kernels.bf16 import PIECE
from fourfold.datatypes import FourfoldError, Moments
from problems import Problem

KINDS = [("diagonal", 1e-4), ("diagonal", 0.0), ("mean", 0.0)]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problems.make()


@pytest.fixture(scope="module")
def own(problem: Problem) -> Moments:
    return accumulate(problem)


@pytest.fixture(scope="module")
def expected(problem: Problem) -> list[reference.Moments]:
    return [reference.moments(*(values.numpy() for values in problem.tokens_of(expert))) for expert in range(3)]


def accumulate(problem: Problem, *, gap: bool = True) -> Moments:
    pairs = problem.weight_S, problem.offsets
    own = moments.accumulate(problem.input_TK, problem.token_S, *pairs)
    if not gap:
        return own
    outputs, input_SK = problem.missing_SN.shape[1], problem.input_TK[problem.token_S]
    gap_ENK, gap2_EN = moments.gap(problem.missing, outputs, input_SK, *pairs)
    return dataclasses.replace(own, gap_ENK=gap_ENK, gap2_EN=gap2_EN)


def of_tokens(input_TK: Tensor, weight_T: Tensor | None = None) -> Moments:
    """One expert that all tokens go to."""
    weight_T = torch.ones(len(input_TK)) if weight_T is None else weight_T
    return moments.accumulate(input_TK, torch.arange(len(input_TK)), weight_T, [0, len(input_TK)])


def part(problem: Problem, first: int, last: int) -> Problem:
    """The pairs first..last of each expert, as a chunk of tokens brings them."""
    places = [torch.arange(*problem.offsets[e : e + 2])[first:last] for e in range(len(problem.offsets) - 1)]
    place_S, counts = torch.cat(places), [len(place) for place in places]
    return dataclasses.replace(
        problem,
        token_S=problem.token_S[place_S],
        weight_S=problem.weight_S[place_S],
        offsets=[sum(counts[:e]) for e in range(len(counts) + 1)],
        missing_SN=problem.missing_SN[place_S],
    )


def worst(found: Tensor, wanted: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(problems.array(found) - wanted).max() / np.abs(wanted).max())


def assert_same_bits(found: Moments, wanted: Moments) -> None:
    for field in dataclasses.fields(Moments):
        assert torch.equal(getattr(found, field.name), getattr(wanted, field.name)), field.name


# ---- accumulate


@pytest.mark.parametrize("pairs_per_piece", [7, 64, 16_384])
def test_sums_are_those_of_float64(
    problem: Problem, expected: list[reference.Moments], pairs_per_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "PAIRS_PER_PIECE", pairs_per_piece)
    found = accumulate(problem)
    assert all(tensor.dtype == torch.float32 for tensor in (found.hessian_EKK, found.weight_E, found.energy2_E))
    for expert, sums in enumerate(expected):
        assert worst(found.hessian_EKK[expert], sums.hessian_KK) < 1e-6
        assert found.gap_ENK is not None and worst(found.gap_ENK[expert], sums.gap_NK) < 2e-6
        assert found.gap2_EN is not None and worst(found.gap2_EN[expert], sums.gap2_N) < 2e-6
        assert found.weight_E[expert].item() == pytest.approx(sums.weight, rel=1e-6)
        assert found.energy2_E[expert].item() == pytest.approx(sums.energy2, rel=1e-6)
        assert found.count_E[expert].item() == sums.count
    assert found.count_E.sum() == 2 * len(problem.input_TK)


def test_one_token_is_its_rounded_outer_product_to_the_bit() -> None:
    x_K = torch.tensor([1.0, -0.3, 1000.0, 3e-5])
    root = torch.tensor(0.7).sqrt()
    scaled_K = (x_K * root).bfloat16().float()
    found = of_tokens(x_K[None], torch.tensor([0.7]))
    assert torch.equal(found.hessian_EKK[0], scaled_K[:, None] * scaled_K)
    assert not torch.equal(scaled_K, x_K * root)  # so rounding is what is tested


def test_hessians_are_symmetric_and_of_the_expert_alone(problem: Problem, own: Moments) -> None:
    assert torch.equal(own.hessian_EKK, own.hessian_EKK.mT)
    for expert in range(3):
        pairs = slice(problem.offsets[expert], problem.offsets[expert + 1])
        alone = dataclasses.replace(
            problem,
            token_S=problem.token_S[pairs],
            weight_S=problem.weight_S[pairs],
            offsets=[0, pairs.stop - pairs.start],
            missing_SN=problem.missing_SN[pairs],
        )
        found = accumulate(alone)
        for name in ("hessian_EKK", "gap_ENK", "gap2_EN"):
            assert torch.equal(getattr(found, name)[0], getattr(own, name)[expert]), name


def test_an_expert_without_tokens_has_zeros(problem: Problem, own: Moments) -> None:
    found = accumulate(dataclasses.replace(problem, offsets=[0, 0, *problem.offsets[1:]]))
    for field in dataclasses.fields(Moments):
        assert not getattr(found, field.name)[0].any(), field.name
        assert torch.equal(getattr(found, field.name)[1:], getattr(own, field.name)), field.name


@pytest.mark.parametrize("cuts", [(100,), (1, 2), (0, 50, 50, 200)])
def test_chunks_of_tokens_merge(problem: Problem, own: Moments, cuts: tuple[int, ...]) -> None:
    bounds = [0, *cuts, 1000]
    chunks = [part(problem, first, last) for first, last in itertools.pairwise(bounds)]
    merged = reduce(add, [accumulate(chunk) for chunk in chunks])
    for field in dataclasses.fields(Moments):
        found, wanted = getattr(merged, field.name), getattr(own, field.name)
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max(), field.name
    assert torch.equal(merged.count_E, own.count_E)
    assert_same_bits(reduce(add, [accumulate(chunk) for chunk in chunks]), merged)


def test_moments_with_and_without_a_gap_do_not_merge(problem: Problem, own: Moments) -> None:
    without = accumulate(problem, gap=False)
    assert (without + without).gap_ENK is None and (without + without).gap2_EN is None
    for pair in ((own, without), (without, own)):
        with pytest.raises(ValueError, match="gap"):
            add(*pair)


def test_same_bits_again(problem: Problem, own: Moments) -> None:
    assert_same_bits(accumulate(problem), own)


# ---- pool


def test_pool_is_the_weighted_sum(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    weight_T = torch.rand(len(problem.input_TK), generator=torch.Generator().manual_seed(1))
    sums = reference.moments(problem.input_TK.float().numpy(), weight_T.numpy())
    for pairs_per_piece in (100, 16_384):
        monkeypatch.setattr(moments, "PAIRS_PER_PIECE", pairs_per_piece)
        found = moments.pool(problem.input_TK, weight_T) / weight_T.sum()
        assert found.dtype == torch.float32 and worst(found, sums.hessian_KK / sums.weight) < 1e-6


def test_pool_of_the_layer_is_what_its_experts_add_up_to(problem: Problem, own: Moments) -> None:
    weight_T = torch.zeros(len(problem.input_TK)).index_add(0, problem.token_S, problem.weight_S)
    assert torch.allclose(weight_T, torch.ones_like(weight_T))  # renormalised router weights
    wanted = own.hessian_EKK.sum(dim=0) / own.weight_E.sum()
    # sqrt(w) x is rounded to 8 bits once per expert, or once: each product may be 2^-8 off, their mean much less
    assert worst(moments.pool(problem.input_TK, weight_T) / weight_T.sum(), problems.array(wanted)) < 1e-3


# ---- effective tokens


def test_effective_tokens_follow_the_definition(own: Moments, expected: list[reference.Moments]) -> None:
    found = moments.effective_tokens(own).tolist()
    assert found == pytest.approx([reference.effective_tokens(sums) for sums in expected], rel=1e-5)
    assert all(1 < m < 0.8 * sums.count for m, sums in zip(found, expected, strict=True))


@pytest.mark.parametrize(("scales", "effective"), [([], 0), ([3], 1), ([2] * 40, 40), ([1] * 40 + [1e3], 1), ([0], 0)])
def test_loud_tokens_count_as_few(scales: list[float], effective: float) -> None:
    x_1K = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    found = moments.effective_tokens(of_tokens(torch.tensor(scales).reshape(-1, 1) * x_1K))
    assert found.item() == pytest.approx(effective, rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), st.integers(0, 2**16))
def test_effective_tokens_lie_between_one_and_the_count(scales: list[float], seed: int) -> None:
    x_TK = torch.tensor(scales)[:, None] * torch.randn(len(scales), 8, generator=torch.Generator().manual_seed(seed))
    found = moments.effective_tokens(of_tokens(x_TK)).item()
    assert 1 - 1e-5 <= found <= len(scales) * (1 + 1e-5)


# ---- shrink


@pytest.mark.parametrize("n0", [0.0, 1.5, 128.0, 1e6])
@pytest.mark.parametrize("effective", [True, False])
@pytest.mark.parametrize("trace_matched", [True, False])
def test_shrink_follows_the_definition(
    own: Moments, expected: list[reference.Moments], n0: float, effective: bool, trace_matched: bool
) -> None:
    pool_EKK = 3 * own.hessian_EKK.roll(1, dims=0) / own.weight_E.sum()
    found, m_E = moments.shrink(own, pool_EKK, n0, effective=effective, trace_matched=trace_matched)
    for expert, sums in enumerate(expected):
        wanted, m = reference.shrink(
            sums, problems.array(pool_EKK[expert]), n0, effective=effective, trace_matched=trace_matched
        )
        assert worst(found[expert], wanted) < 5e-6
        assert m_E[expert].item() == pytest.approx(m, rel=1e-5)
    shared, _ = moments.shrink(own, pool_EKK[0], n0, effective=effective, trace_matched=trace_matched)
    assert torch.equal(shared[0], found[0])  # one pool for all is used like one of each


def test_shrink_returns_new_tensors(own: Moments) -> None:
    pool_KK, before = own.hessian_EKK[0].clone(), own.hessian_EKK.clone()
    found, _ = moments.shrink(own, pool_KK, 1.0, effective=True, trace_matched=True)
    found.zero_()
    assert torch.equal(own.hessian_EKK, before) and torch.equal(pool_KK, before[0])


@pytest.mark.parametrize("n0", [0.0, 0.3, 128.0])
@pytest.mark.parametrize("effective", [True, False])
def test_without_tokens_the_pool_itself(n0: float, effective: bool) -> None:
    pool_KK = of_tokens(torch.randn(50, 8, generator=torch.Generator().manual_seed(3))).hessian_EKK[0] / 7
    nothing = of_tokens(torch.empty(0, 8))
    found, m_E = moments.shrink(nothing, pool_KK, n0, effective=effective, trace_matched=True)
    assert torch.equal(found[0], pool_KK) and m_E.item() == 0


def test_a_matched_pool_is_as_loud_as_the_expert(own: Moments) -> None:
    for loudness in (1e-3, 1.0, 1e3):
        found, _ = moments.shrink(own, loudness * own.hessian_EKK, 1e9, effective=True, trace_matched=True)
        assert torch.allclose(moments.trace(found), moments.trace(own.hessian_EKK) / own.weight_E, rtol=1e-4)


def test_duplicated_tokens_change_the_confidence_only(problem: Problem) -> None:
    once = of_tokens(problem.input_TK[:20])
    twice = of_tokens(problem.input_TK[:20].repeat(2, 1))
    shrunk = [moments.shrink(sums, torch.eye(256), 0.0, effective=True, trace_matched=True) for sums in (once, twice)]
    assert torch.allclose(shrunk[0][0], shrunk[1][0], rtol=1e-5, atol=1e-9)
    assert shrunk[1][1].item() == pytest.approx(2 * shrunk[0][1].item(), rel=1e-5)


@pytest.mark.parametrize("loudness", [2.0**-20, 0.03125, 0.25, 1.0, 64.0, 2.0**20])
def test_a_silent_pool_leaves_the_own_moments(own: Moments, loudness: float) -> None:
    """All random rows may be 0 in neurons that routed tokens wake up: the pool then has nothing to say."""
    loud = dataclasses.replace(own, hessian_EKK=own.hessian_EKK * loudness, energy2_E=own.energy2_E * loudness**2)
    pool_EKK = torch.zeros_like(own.hessian_EKK)
    found, m_E = moments.shrink(loud, pool_EKK, 128.0, effective=True, trace_matched=True)
    wanted = loud.hessian_EKK * (m_E / (m_E + 128) / own.weight_E)[:, None, None]
    assert torch.allclose(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_moment_that_is_not_finite_is_an_error_naming_the_expert(own: Moments, bad: float) -> None:
    hessian_EKK = own.hessian_EKK.clone()
    hessian_EKK[1, 5, 5] = bad
    broken = dataclasses.replace(own, hessian_EKK=hessian_EKK)
    with pytest.raises(FourfoldError, match=r"expert 1\b.*not finite"):
        moments.shrink(broken, own.hessian_EKK[0], 1.0, effective=True, trace_matched=True)


@pytest.mark.parametrize("effective", [True, False])
def test_the_gap_shrinks_to_zero(own: Moments, expected: list[reference.Moments], effective: bool) -> None:
    m_E = moments.effective_tokens(own) if effective else own.count_E.float()
    assert own.gap_ENK is not None
    before = own.gap_ENK.clone()
    found = moments.shrink_to_zero(own.gap_ENK, own.weight_E, moments.own_share(m_E, 128.0))
    for expert, sums in enumerate(expected):
        assert worst(found[expert], reference.shrink_gap(sums, m_E[expert].item(), 128.0)) < 5e-6
    assert torch.equal(own.gap_ENK, before)
    nothing_E = torch.zeros(1)
    assert not moments.own_share(nothing_E, 0.0).any()
    assert not moments.shrink_to_zero(torch.zeros(1, 4, 4), nothing_E, nothing_E).any()


def test_the_gap_is_the_same_however_experts_are_chunked(problem: Problem) -> None:
    """To the bit, an expert without tokens among them."""
    offsets = [*problem.offsets, problem.offsets[-1]]

    def of(first: int, last: int) -> tuple[Tensor, Tensor]:
        pairs = slice(offsets[first], offsets[last])
        shifted = [offset - pairs.start for offset in offsets[first : last + 1]]
        missing_SN, input_SK = problem.missing_SN[pairs], problem.input_TK[problem.token_S[pairs]]
        return moments.gap(lambda _, piece: missing_SN[piece].clone(), 24, input_SK, problem.weight_S[pairs], shifted)

    whole = of(0, 4)
    for found, *parts in zip(whole, of(0, 1), of(1, 4), strict=True):
        assert torch.equal(torch.cat(parts), found)
        assert found[:3].any(dim=1).all() and not found[3].any()


def test_what_is_missing_is_asked_for_in_pieces_of_one_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "PAIRS_PER_PIECE", 3)
    asked = []

    def missing(expert: int, pairs: slice) -> Tensor:
        asked.append((expert, pairs.start, pairs.stop))
        return torch.ones(pairs.stop - pairs.start, 2)

    moments.gap(missing, 2, torch.ones(9, 4), torch.ones(9), [0, 4, 4, 9])
    assert asked == [(0, 0, 3), (0, 3, 4), (2, 4, 7), (2, 7, 9)]


def test_a_gap_that_is_not_finite_is_an_error(own: Moments) -> None:
    gap_ENK = torch.zeros(3, 5, 256)
    gap_ENK[2, 4, 7] = torch.nan
    with pytest.raises(FourfoldError, match=r"expert 2\b.*not finite"):
        moments.shrink(dataclasses.replace(own, gap_ENK=gap_ENK), own.hessian_EKK[0], 1.0, effective=True,
                       trace_matched=True)  # fmt: skip


# ---- damping


@pytest.mark.parametrize(("kind", "floor"), KINDS)
def test_damping_follows_the_definition(own: Moments, kind: str, floor: float) -> None:
    delta_E = torch.tensor([0.05, 0.2, 1.0])
    hessian_EKK = own.hessian_EKK.clone()
    if floor or kind == "mean":  # dead channels, so that the median is 0
        hessian_EKK[1, :, :200], hessian_EKK[1, :200] = 0, 0
    found = hessian_EKK + torch.diag_embed(moments.damping(hessian_EKK, delta_E, kind, floor))
    for expert in range(3):
        wanted = reference.damp(problems.array(hessian_EKK[expert]), delta_E[expert].item(), kind, floor)
        assert worst(found[expert], wanted) < 1e-6
        small = np.diag(wanted) < 1e-3 * wanted.max()
        quiet = torch.from_numpy(np.diag(wanted)[small]).float()
        assert torch.allclose(found[expert].diagonal()[torch.from_numpy(small)], quiet, rtol=1e-5)


def test_a_loud_channel_does_not_drown_the_others() -> None:
    hessian_EKK = torch.diag(torch.tensor([1e6, 1.0, 1.0, 1.0, 1.0]))[None]
    relative = moments.damping(hessian_EKK, torch.tensor([0.05]), "diagonal", 1e-4)
    assert torch.allclose(relative, torch.tensor([[5e4, *[0.0501] * 4]]), rtol=1e-5)
    assert (moments.damping(hessian_EKK, torch.tensor([0.05]), "mean", 0.0) > 1e4).all()


@pytest.mark.parametrize(("kind", "floor"), [("diagonal", 1e-4), ("mean", 0.0)])
def test_all_dead_channels_are_damped_alike(kind: str, floor: float) -> None:
    added_EK = moments.damping(torch.zeros(2, 8, 8), torch.tensor([0.05, 0.1]), kind, floor)
    assert (added_EK > 0).all() and added_EK.isfinite().all() and (added_EK == added_EK[:, :1]).all()


@pytest.mark.skipif(not bf16.AVAILABLE, reason="a CPU without AVX-512 BF16")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("pairs", "inputs"), [(1, 32), (1203, 96), (PIECE * 2, 64)])
def test_native_products_of_whole_numbers_are_torchs_bit_for_bit(pairs: int, inputs: int, threads: int) -> None:
    """Every sum is exact, whatever its order; pairs that fill no word, tiles that start anew."""
    generator = torch.Generator().manual_seed(3)
    input_TK = torch.randint(-8, 9, (400, inputs), generator=generator).bfloat16()
    token_S = torch.randint(400, (pairs,), generator=generator)
    root_S = torch.randint(1, 4, (pairs,), generator=generator).float()
    sums = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for add_products_ in (bf16.add_products_, moments.add_products_torch_):
        hessian_KK = torch.ones(inputs, inputs)
        energy_S = add_products_(hessian_KK, input_TK, token_S, root_S)
        sums.append((hessian_KK.tril(), energy_S))
    torch.set_num_threads(before)
    assert all(torch.equal(found, wanted) for found, wanted in zip(*sums, strict=True))


@pytest.mark.skipif(not bf16.AVAILABLE, reason="a CPU without AVX-512 BF16")
def test_native_products_are_of_the_same_rounded_rows() -> None:
    problem = problems.make(seed=11)
    sums = []
    for add_products_ in (bf16.add_products_, moments.add_products_torch_):
        hessian_KK = torch.zeros(256, 256)
        energy_S = add_products_(hessian_KK, problem.input_TK, problem.token_S, problem.weight_S.sqrt())
        sums.append((hessian_KK.tril(), energy_S))
    for found, wanted in zip(*sums, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=2e-6 * float(wanted.abs().max()))


def test_products_stay_not_finite() -> None:
    input_TK = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3e38] * 8], dtype=torch.bfloat16)
    for add_products_ in (bf16.add_products_, moments.add_products_torch_)[not bf16.AVAILABLE :]:
        hessian_KK = torch.zeros(32, 32)
        add_products_(hessian_KK, input_TK, torch.tensor([0]), torch.tensor([2.0]))
        assert not hessian_KK.diagonal().isfinite().any()


# ---- shares


def effective(weight_S: np.ndarray) -> float:
    return float(weight_S.sum() ** 2 / (weight_S**2).sum())


def shared(weight_S: np.ndarray, marked_S: np.ndarray, share: float) -> np.ndarray:
    """The weights with a share, none bounded: float64."""
    factors = share / weight_S[marked_S].sum(), (1 - share) / weight_S[~marked_S].sum()
    return weight_S * weight_S.sum() * np.where(marked_S, *factors)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
@pytest.mark.parametrize(("marked", "others"), [(30, 70), (1, 200), (200, 3), (2, 1)])
def test_marked_pairs_have_their_share_of_an_expert(marked: int, others: int, share: float) -> None:
    """Or the nearest one, of a fine grid, that leaves half of the effective tokens which any leaves."""
    generator = torch.Generator().manual_seed(marked)
    marked_S = torch.arange(marked + others) < marked
    marked_S = marked_S[torch.randperm(len(marked_S), generator=generator)]
    weight_S = 3.0 ** torch.randn(len(marked_S), generator=generator)
    found_S = moments.share_weights(weight_S, marked_S, [0, len(weight_S)], share)
    weight, places = weight_S.double().numpy(), marked_S.numpy()
    grid = np.linspace(0, 1, 20_001)
    counts = np.array([effective(shared(weight, places, one)) for one in grid])
    allowed = grid[counts >= counts.max() / 2]
    wanted = shared(weight, places, allowed[np.abs(allowed - share).argmin()])
    assert found_S.dtype == torch.float32
    assert np.abs(found_S.numpy() - wanted).max() < 1e-3 * wanted.max()
    assert found_S.sum().item() == pytest.approx(weight.sum(), rel=1e-6)


def test_shares_are_of_each_expert_alone() -> None:
    """Experts with one kind of pair, with none, and with weights of zero stay as they are."""
    weight_S = torch.tensor([1.0, 2, 3, 4, 5, 6, 0, 0, 2, 2, 2, 2])
    marked_S = torch.tensor([True, True, False, False, True, True, True, False, True, False, False, False])
    found_S = moments.share_weights(weight_S, marked_S, [0, 2, 2, 4, 6, 8, 12], 0.5)
    assert torch.equal(found_S[:8], weight_S[:8])
    assert found_S[8:].tolist() == pytest.approx([4, 4 / 3, 4 / 3, 4 / 3])
