"""What a chunk of experts is learnt from, one token after the other in float64: moments, pools, the gap at down.

Sizes are no multiples of a block, and weights and inputs are fp32, so that the gap is exact but for its sums.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.core import moments
from fourfold.datatypes import Rows
from fourfold.distributed.team import Team, alone
from fourfold.distributed.workers import Worker
from fourfold.model.layer import DecoderLayer, Routing
from fourfold.quantize import chunk
from fourfold.quantize.chunk import (
    Chunk,
    Pool,
    down_moments,
    down_pool,
    gate_up_moments,
    gate_up_pool,
    make_chunk,
    random_pool,
    row_pool,
)
from fourfold.quantize.estimate import pool_rows
from fourfold.quantize.observe import MoeInputs, Observed, observe
from quantize.test_solve_layer import make_layer, normal

EXPERTS, HIDDEN, WIDTH, ROWS, LENGTH = 4, 36, 28, 5, 67
TOKENS = ROWS * LENGTH
OWN = range(1, EXPERTS)  # the chunk; expert 3 gets no token
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def layer() -> DecoderLayer:
    return make_layer(0, EXPERTS, WIDTH, HIDDEN, scale=0.2, dtype=torch.float32)


@pytest.fixture(scope="module")
def released_ENK(layer: DecoderLayer) -> Tensor:
    """gate_up of the release."""
    return layer.stacks[0] + 0.01 * normal(EXPERTS, 2 * WIDTH, HIDDEN, seed=3)


@pytest.fixture(scope="module")
def moe_inputs() -> tuple[MoeInputs, MoeInputs]:
    """Of source and release. Router weights of a token do not sum to one."""
    score_TE = normal(TOKENS, EXPERTS, seed=4)
    score_TE[:, 3] = -10
    value_TA, index_TA = score_TE.sigmoid().topk(2)
    routing = Routing(index_TA=index_TA, weight_TA=0.8 * value_TA)
    token_RT = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    hidden_RTD, input_TD = normal(ROWS, LENGTH, HIDDEN, seed=5), normal(TOKENS, HIDDEN, seed=6)
    moved_RTD, moved_TD = 0.1 * normal(ROWS, LENGTH, HIDDEN, seed=7), 0.1 * normal(TOKENS, HIDDEN, seed=8)
    return (
        MoeInputs(Rows(token_RT, hidden_RTD), (TOKENS,), input_TD, routing),
        MoeInputs(Rows(token_RT, hidden_RTD - moved_RTD), (TOKENS,), input_TD + moved_TD, routing),
    )


@pytest.fixture(scope="module")
def observed(layer: DecoderLayer, moe_inputs: tuple[MoeInputs, MoeInputs]) -> Observed:
    """A token weighs up to sixteen times as much as another."""
    importance_T = 4.0 ** normal(TOKENS, seed=9).clamp(-1, 1)
    return replace(observe(alone(CPU), layer, *moe_inputs), importance_T=importance_T)


def pairs_of(observed: Observed, expert: int) -> list[tuple[int, float]]:
    """Token and w of each pair of an expert: router weight times importance."""
    index_TA, weight_TA = observed.routing.index_TA.tolist(), observed.routing.weight_TA.tolist()
    importance_T = observed.importance_T.tolist()
    return [(token, weight * importance_T[token]) for token in range(TOKENS)
            for chosen, weight in zip(index_TA[token], weight_TA[token], strict=True) if chosen == expert]  # fmt: skip


def activation(input_D: Tensor, gate_up_NK: Tensor) -> Tensor:
    gate_I, up_I = (gate_up_NK.double() @ input_D.double()).chunk(2)
    return gate_I / (1 + (-gate_I).exp()) * up_I


def near(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return float((found - wanted).norm()) < tolerance * float(wanted.norm())


def chunk_of(observed: Observed, inputs: str = "device", router_weighted: bool = True) -> Chunk:
    return make_chunk(observed, OWN, router_weighted, inputs)


# ---- moments and gap


@pytest.mark.parametrize("inputs", ["device", "host"])
def test_the_gap_at_down_is_what_the_residual_stream_lacks(
    layer: DecoderLayer, released_ENK: Tensor, moe_inputs: tuple[MoeInputs, MoeInputs], observed: Observed, inputs: str
) -> None:
    """y = W_down (a_source - a_release), and what the rows lack by the token's router weights in sum."""
    source, release = moe_inputs
    assert source.input_TD is not None and release.input_TD is not None
    gate_up_ENK, down_ENK = layer.stacks
    own = down_moments(chunk_of(observed, inputs), layer, released_ENK[OWN.start :])
    assert own.gap_ENK is not None and own.gap2_EN is not None
    lacking_TD = (source.rows.hidden_RTD - release.rows.hidden_RTD).double().flatten(0, 1)
    for expert in OWN:
        gap_NK, gap2_N = torch.zeros(HIDDEN, WIDTH).double(), torch.zeros(HIDDEN).double()
        for token, weight in pairs_of(observed, expert):
            released_I = activation(release.input_TD[token], released_ENK[expert])
            lost_I = activation(source.input_TD[token], gate_up_ENK[expert]) - released_I
            y_N = down_ENK[expert].double() @ lost_I + lacking_TD[token] / observed.routing.weight_TA[token].sum()
            gap_NK += weight * torch.outer(y_N, released_I)
            gap2_N += weight * y_N.square()
        place = expert - OWN.start
        torch.testing.assert_close(own.gap_ENK[place].double(), gap_NK, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.gap2_EN[place].double(), gap2_N, rtol=1e-4, atol=1e-6)
    assert own.gap_ENK[0].norm() > 1 and not own.gap_ENK[2].any()


@pytest.mark.parametrize("router_weighted", [True, False])
def test_moments_weigh_tokens_by_importance(
    layer: DecoderLayer, released_ENK: Tensor, observed: Observed, router_weighted: bool
) -> None:
    """At both sites; the sums of weights too, by which they are divided later."""
    part = chunk_of(observed, router_weighted=router_weighted)
    found = {False: gate_up_moments(part), True: down_moments(part, layer, released_ENK[OWN.start :])}
    for expert in OWN:
        pairs = pairs_of(observed, expert)
        if not router_weighted:
            pairs = [(token, float(observed.importance_T[token])) for token, _ in pairs]
        for at_down, own in found.items():
            inputs = [activation(observed.input_TD[token], released_ENK[expert]) if at_down
                      else observed.input_TD[token].double() for token, _ in pairs]  # fmt: skip
            place, size = expert - OWN.start, WIDTH if at_down else HIDDEN
            wanted_KK = torch.zeros(size, size).double()
            for (_, weight), input_K in zip(pairs, inputs, strict=True):
                wanted_KK += weight * torch.outer(input_K, input_K)
            if pairs:
                assert near(own.hessian_EKK[place], wanted_KK, 0.01)  # xs is rounded to BF16
            assert float(own.weight_E[place]) == pytest.approx(sum(weight for _, weight in pairs), rel=1e-5)


# ---- pools


@pytest.mark.parametrize("router_weighted", [True, False])
def test_the_pool_of_gate_up_weighs_tokens_by_importance(observed: Observed, router_weighted: bool) -> None:
    sums_T = observed.routing.weight_TA.double().sum(dim=1) if router_weighted else torch.ones(TOKENS).double()
    weight_T, input_TD = sums_T * observed.importance_T.double(), observed.input_TD.double()
    wanted_KK = torch.einsum("t,td,te->de", weight_T, input_TD, input_TD) / weight_T.sum()
    assert near(gate_up_pool(alone(CPU), observed, router_weighted), wanted_KK, 0.01)

    def by_two(worker: Worker) -> Tensor:
        return gate_up_pool(worker, replace(observed, counts=(TOKENS // 3, TOKENS - TOKENS // 3)), router_weighted)

    assert near(Team([CPU, CPU]).run(by_two), wanted_KK, 0.01)


def test_the_pool_of_down_weighs_tokens_by_importance(
    layer: DecoderLayer, released_ENK: Tensor, observed: Observed
) -> None:
    """Without router weights, as the tokens are not the expert's own; each brings its own importance."""
    pool = random_pool(observed, 100, 5, CPU)
    token_P = chunk.random_tokens(TOKENS, 100, 5)
    assert len(token_P.unique()) == 100 and torch.equal(pool.input_PD, observed.input_TD[token_P])
    assert torch.equal(pool.importance_P, observed.importance_T[token_P])
    found_EKK = down_pool(layer, released_ENK[OWN.start :], pool)
    for expert in OWN:
        made_PK = torch.stack([activation(input_D, released_ENK[expert]) for input_D in pool.input_PD])
        weight_P = pool.importance_P.double()
        wanted_KK = torch.einsum("p,pi,pj->ij", weight_P, made_PK, made_PK) / weight_P.sum()
        assert near(found_EKK[expert - OWN.start], wanted_KK, 0.01)


def test_a_pool_in_pieces_is_the_pool_in_one(
    layer: DecoderLayer, released_ENK: Tensor, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both kinds, the last piece shorter than the others; a token of another weight in each piece."""
    pool, pieces = random_pool(observed, TOKENS, 5, CPU), list[int]()
    accumulate = moments.accumulate

    def counted(input_TK: Tensor, *rest: object) -> object:
        pieces.append(len(input_TK) // EXPERTS)
        return accumulate(input_TK, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(moments, "accumulate", counted)
    for make in (lambda: down_pool(layer, released_ENK, pool), lambda: row_pool(released_ENK, pool)):
        found = {}
        for size in (TOKENS, 50):
            pieces.clear()
            monkeypatch.setattr(chunk, "POOL_PIECE", size)
            found[size] = make()
            assert pieces == ([TOKENS] if size == TOKENS else [50] * 6 + [35])
        torch.testing.assert_close(found[50], found[TOKENS], rtol=1e-5, atol=1e-6)


def test_a_pool_has_five_tokens_for_each_input_or_more(observed: Observed) -> None:
    """At most all tokens of the layer."""
    assert [pool_rows(2048, width) for width in (128, 409, 410, 512, 768)] == [2048, 2048, 2050, 2560, 3840]
    whole: Pool = random_pool(observed, pool_rows(2048, WIDTH), 5, CPU)
    assert torch.equal(whole.input_PD, observed.input_TD) and torch.equal(whole.importance_P, observed.importance_T)


def test_the_rows_metric_takes_some_of_the_pool_evenly(
    released_ENK: Tensor, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the plan counts, also where the pool is not a multiple of them."""
    pool = random_pool(observed, 100, 5, CPU)
    monkeypatch.setattr(chunk, "ROW_POOL_ROWS", 80)
    found_ENN = row_pool(released_ENK, pool)
    place_P = torch.arange(80) * 5 // 4
    few = Pool(pool.input_PD[place_P], pool.importance_P[place_P])
    monkeypatch.setattr(chunk, "ROW_POOL_ROWS", 100)
    assert torch.equal(found_ENN, row_pool(released_ENK, few))
    assert not torch.allclose(found_ENN, row_pool(released_ENK, pool), rtol=1e-3)
