"""Token statistics against the full vocabulary in float64, and what is made of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import problems
import reference
from fourfold.core import metrics
from fourfold.core.metrics import Statistics

TOKENS, HIDDEN, VOCABULARY = 40, 16, 300
FIELDS = [field.name for field in dataclasses.fields(Statistics)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "VOCABULARY_CHUNK", 64)  # four whole chunks and a part


def make(seed: int = 0, *, noise: float = 0.3, loudness: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    source_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    return {
        "source_TD": source_TD,
        "release_TD": source_TD + noise * torch.randn(TOKENS, HIDDEN, generator=generator),
        "head_VD": loudness * torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "next_T": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
    }


def expected(given: dict[str, Tensor]) -> reference.TokenStatistics:
    arrays = (problems.array(given[name]) for name in ("source_TD", "release_TD", "head_VD"))
    return reference.token_statistics(*arrays, given["next_T"].tolist())


def random_statistics(seed: int, tokens: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4, tokens, generator=generator, dtype=torch.float64)
    agree_T = torch.rand(tokens, generator=generator) < 0.7
    return Statistics(*values, agree_T, torch.randint(6, (tokens,), generator=generator).double() / 5)


# ---- token statistics


@pytest.mark.parametrize("chunk", [1, 37, 64, 300, 8192])
@pytest.mark.parametrize("seed", [0, 1])
def test_statistics_are_those_of_the_full_vocabulary(chunk: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "VOCABULARY_CHUNK", chunk)
    given = make(seed)
    found, wanted = metrics.token_statistics(**given), expected(given)
    for name in FIELDS[:4]:
        assert getattr(found, name).dtype == torch.float64
        assert np.abs(getattr(found, name).numpy() - getattr(wanted, name)).max() < 1e-5, name
    assert (found.agree_T.numpy() == wanted.agree_T).all() and 0 < found.agree_T.float().mean() < 1
    assert np.allclose(found.five_T.numpy(), wanted.five_T) and 0 < found.five_T.mean() < 1
    assert found.kl_T.min() > 0.005  # so that 1e-5 says something


def test_a_small_divergence_is_resolved() -> None:
    given = make(noise=3e-3)
    found, wanted = metrics.token_statistics(**given), expected(given)
    assert wanted.kl_T.mean() < 2e-4
    assert found.kl_T.mean().item() == pytest.approx(float(wanted.kl_T.mean()), rel=1e-2)
    assert np.abs(found.kl_T.numpy() - wanted.kl_T).max() < 2e-6


@pytest.mark.parametrize("direction", ["rising", "falling"])
def test_running_maxima_move_from_chunk_to_chunk(direction: str) -> None:
    """Logits over a range that exp does not hold in fp32: sums so far must shrink, and later ones too."""
    given = make(1, noise=0.02)
    ramp_V = torch.linspace(0, 400, VOCABULARY)
    given["head_VD"][:, 0] = ramp_V if direction == "rising" else ramp_V.flip(0)
    given["source_TD"][:, 0] = 1.0
    given["release_TD"][:, 0] = 1.0
    found, wanted = metrics.token_statistics(**given), expected(given)
    for name in FIELDS[:4]:
        assert np.allclose(getattr(found, name).numpy(), getattr(wanted, name), rtol=1e-4, atol=1e-4), name
    assert (found.agree_T.numpy() == wanted.agree_T).all() and wanted.nll_source_T.max() > 200


def test_a_stream_compared_with_itself() -> None:
    given = make(2) | {"release_TD": make(2)["source_TD"]}
    found = metrics.token_statistics(**given)
    assert (found.kl_T == 0).all() and found.agree_T.all() and torch.equal(found.nll_source_T, found.nll_release_T)
    assert metrics.summarize(found)["perplexity_ratio"] == 1 and metrics.summarize(found)["top1_agreement"] == 1


def test_a_head_that_knows_nothing_and_one_that_knows_all() -> None:
    given = make() | {"head_VD": torch.zeros(VOCABULARY, HIDDEN)}
    found = metrics.token_statistics(**given)
    assert torch.allclose(found.nll_source_T, torch.full((TOKENS,), math.log(VOCABULARY), dtype=torch.float64))
    assert torch.allclose(found.entropy_T, found.nll_source_T) and not found.kl_T.any() and found.agree_T.all()
    head_VD = torch.zeros(VOCABULARY, HIDDEN)
    head_VD[70, 0] = 200.0
    sure = torch.zeros(TOKENS, HIDDEN)
    sure[:, 0] = 1
    certain = {"source_TD": sure, "release_TD": sure, "head_VD": head_VD, "next_T": torch.full((TOKENS,), 70)}
    found = metrics.token_statistics(**certain)
    assert not found.nll_source_T.any() and found.entropy_T.abs().max() < 1e-9 and found.agree_T.all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(1e-6, 10), st.floats(0.01, 30), st.integers(1, 400))
def test_divergence_is_never_negative(seed: int, noise: float, loudness: float, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "VOCABULARY_CHUNK", chunk)
        found = metrics.token_statistics(**make(seed, noise=noise, loudness=loudness))
    for name in FIELDS[:4]:
        values = getattr(found, name)
        assert values.isfinite().all() and values.min() >= -1e-4, name
    assert (found.kl_T >= 0).all() and found.entropy_T.max() <= math.log(VOCABULARY) + 1e-4


def test_each_model_may_have_a_head_of_its_own() -> None:
    given = make(5)
    other_VD = given["head_VD"] + 0.2 * make(6)["head_VD"]
    found = metrics.token_statistics(**given, release_head_VD=other_VD)
    arrays = (problems.array(given[name]) for name in ("source_TD", "release_TD", "head_VD"))
    wanted = reference.token_statistics(*arrays, given["next_T"].tolist(), problems.array(other_VD))
    for name in FIELDS[:4]:
        assert np.abs(getattr(found, name).numpy() - getattr(wanted, name)).max() < 1e-5, name
    assert (found.kl_T - metrics.token_statistics(**given).kl_T).abs().max() > 0.01


def test_bf16_states_and_head_are_multiplied_in_fp32() -> None:
    given = make(3)
    rounded: dict[str, Any] = {name: t.bfloat16() if t.is_floating_point() else t for name, t in given.items()}
    found, wanted = metrics.token_statistics(**rounded), expected(rounded)
    for name in FIELDS[:4]:
        assert np.abs(getattr(found, name).numpy() - getattr(wanted, name)).max() < 1e-5, name


def test_equal_logits_in_two_chunks_agree() -> None:
    given = make(4)
    best_T = (given["source_TD"] @ given["head_VD"].T).argmax(dim=1)
    given["head_VD"] = torch.cat([given["head_VD"], given["head_VD"][best_T[:1]]])  # the best of token 0 once more
    given["release_TD"] = given["source_TD"] * 1.0
    assert metrics.token_statistics(**given).agree_T.all()


# ---- what is made of them


def test_join_puts_stretches_one_after_the_other() -> None:
    first, second = random_statistics(0, 5), random_statistics(1, 3)
    joined = metrics.join([first, second])
    for name in FIELDS:
        assert torch.equal(getattr(joined, name), torch.cat([getattr(first, name), getattr(second, name)]))
    whole, parts = make(), []
    for rows in (slice(0, 13), slice(13, TOKENS)):
        cut = {name: values if name == "head_VD" else values[rows] for name, values in whole.items()}
        parts.append(metrics.token_statistics(**cut))
    for name in FIELDS[:4]:
        together = getattr(metrics.token_statistics(**whole), name)
        assert torch.allclose(getattr(metrics.join(parts), name), together, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 37, 1000])
def test_summary_follows_the_definitions(tokens: int) -> None:
    statistics = random_statistics(7, tokens)
    found, kl = metrics.summarize(statistics), statistics.kl_T.tolist()
    source = math.exp(sum(statistics.nll_source_T.tolist()) / tokens)
    release = math.exp(sum(statistics.nll_release_T.tolist()) / tokens)
    assert found == pytest.approx({
        "positions": tokens,
        "perplexity_source": source,
        "perplexity_release": release,
        "perplexity_ratio": release / source,
        "kl_mean": sum(kl) / tokens,
        "kl_median": reference.quantile(kl, 0.5),
        "kl_p90": reference.quantile(kl, 0.9),
        "kl_p99": reference.quantile(kl, 0.99),
        "kl_max": max(kl),
        "top1_agreement": sum(statistics.agree_T.tolist()) / tokens,
        "top5_agreement": sum(statistics.five_T.tolist()) / tokens,
        "entropy_source": sum(statistics.entropy_T.tolist()) / tokens,
    }, rel=1e-12)  # fmt: skip


# ---- how sure, and where


def test_intervals_are_those_of_windows_drawn_one_by_one() -> None:
    """Each draw put together window by window, and its figures taken by their definitions."""
    windows, window = 6, 5
    statistics = random_statistics(3, windows * window)
    drawn_BW = metrics.resample(windows)
    assert (drawn_BW.sum(dim=1) == windows).all() and len(drawn_BW) == 1000
    figures: dict[str, list[float]] = {name: [] for name in metrics.intervals(statistics, window) or {}}
    for counts in drawn_BW.long().tolist():
        places = [w * window + t for w, count in enumerate(counts) for _ in range(count) for t in range(window)]
        draw = Statistics(*(getattr(statistics, name)[places] for name in FIELDS))
        summary, ascending = metrics.summarize(draw), sorted(draw.kl_T.tolist())
        for share, name in ((0.5, "kl_median"), (0.99, "kl_p99")):
            summary[name] = ascending[math.ceil(share * len(ascending)) - 1]
        for name, values in figures.items():
            values.append(summary[name])
    found = metrics.intervals(statistics, window)
    assert found is not None and set(found) >= {"perplexity_ratio", "kl_mean", "kl_median", "top1_agreement"}
    for name, values in figures.items():
        wanted = [reference.quantile(values, 0.025), reference.quantile(values, 0.975)]
        assert found[name] == pytest.approx(wanted, rel=1e-9), name
        assert found[name][0] < found[name][1]


def test_one_window_has_no_interval_and_the_same_windows_have_none_to_speak_of() -> None:
    one = random_statistics(4, 7)
    assert metrics.intervals(one, 7) is None
    low, high = (metrics.intervals(metrics.join([one] * 4), 7) or {})["kl_mean"]
    assert high - low < 1e-12


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of windows whose means are known to be 0.5: 95 % of the intervals hold it, fewer for few windows."""
    held = 0
    for seed in range(100):
        low, high = (metrics.intervals(random_statistics(seed, 40 * 3), 3) or {})["kl_mean"]
        held += low < 0.5 < high
    assert 85 <= held <= 100


def test_buckets_of_entropy_share_out_all_positions() -> None:
    statistics = random_statistics(5, 300)
    entropy_T = statistics.entropy_T * 6
    entropy_T[:7] = torch.tensor(metrics.ENTROPY_EDGES, dtype=torch.float64)  # an edge belongs to the bucket it begins
    statistics = dataclasses.replace(statistics, entropy_T=entropy_T)
    rows = metrics.by_entropy(statistics)
    assert sum(row["positions"] for row in rows) == 300
    edges = [*metrics.ENTROPY_EDGES, math.inf]
    for row, low, high in zip(rows, edges[:-1], edges[1:], strict=True):
        here = [t for t, entropy in enumerate(entropy_T.tolist()) if low <= entropy < high]
        assert (row["from"], row["to"]) == (low, None if high == math.inf else high)
        assert row["positions"] == len(here) > 0
        assert row["kl_mean"] == pytest.approx(statistics.kl_T[here].mean().item())
        assert row["top1_agreement"] == pytest.approx(statistics.agree_T[here].double().mean().item())
    sure = dataclasses.replace(statistics, entropy_T=torch.zeros(300, dtype=torch.float64))
    assert metrics.by_entropy(sure)[-1] == {"from": 4.0, "to": None, "positions": 0}


def test_a_position_is_in_the_bin_of_its_divergence() -> None:
    statistics = random_statistics(6, 300)
    kl_T = statistics.kl_T.clone()
    kl_T[: len(metrics.KL_EDGES)] = torch.tensor(metrics.KL_EDGES, dtype=kl_T.dtype)  # an edge begins a bin
    kl_T[-2:] = torch.tensor([-1e-9, 1e3])
    rows = metrics.kl_histogram(dataclasses.replace(statistics, kl_T=kl_T))
    assert sum(row["positions"] for row in rows) == 300
    assert [row["to"] for row in rows] == [row["from"] for row in rows[1:]] + [None]
    for row in rows[1:]:
        here = [kl for kl in kl_T.double().tolist() if row["from"] <= kl < (row["to"] or math.inf)]
        assert row["positions"] == len(here)


# ---- drafts


def test_overlap_is_what_speculative_sampling_keeps() -> None:
    """Against the rule itself: a token drawn from d is kept with min(1, p / d)."""
    generator = torch.Generator().manual_seed(0)
    target_TV, draft_TV = torch.randn(2, 5, 30, generator=generator).unbind()
    p_TV, d_TV = (values.double().softmax(dim=1) for values in (target_TV, draft_TV))
    rows = zip(p_TV.tolist(), d_TV.tolist(), strict=True)
    kept_T = [sum(d * min(1.0, p / d) for p, d in zip(p_V, d_V, strict=True)) for p_V, d_V in rows]
    assert metrics.overlap(target_TV, draft_TV).tolist() == pytest.approx(kept_T, rel=1e-5)
    assert metrics.overlap(target_TV, target_TV).tolist() == pytest.approx([1.0] * 5)


def test_a_step_counts_where_all_before_it_were_kept() -> None:
    hit_RPS = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 1, 1]]], dtype=torch.bool)
    overlap_RPS = torch.tensor([[[0.5, 0.5, 1], [1, 0, 1]], [[1, 1, 1], [0.5, 1, 0]]])
    found = metrics.acceptance(hit_RPS, overlap_RPS)
    assert found["positions"] == 4
    assert found["greedy"]["by_position"] == [0.75, 0.5, 0.25] and found["greedy"]["mean_length"] == 2.5
    assert found["sampled"]["by_position"] == [0.75, 0.4375, 0.3125] and found["sampled"]["mean_length"] == 2.5
    assert found["greedy"]["interval"] == [2.0, 3.0]
    assert metrics.acceptance(hit_RPS[:1], overlap_RPS[:1])["greedy"]["interval"] is None


# ---- errors and routing


@pytest.mark.parametrize("inputs", [96, 80])
def test_energy_is_the_proxy_of_the_weights_themselves(inputs: int) -> None:
    """96 has the native way where the CPU can, 80 never."""
    generator = torch.Generator().manual_seed(4)
    weight_EPNK = torch.randn(2, 3, 21, inputs, generator=generator).bfloat16().float()
    input_ETK = torch.randn(2, 200, inputs, generator=generator)
    hessian_EKK = input_ETK.mT @ input_ETK
    wanted_EP = torch.einsum("epnk,ekl,epnl->ep", weight_EPNK.double(), hessian_EKK.double(), weight_EPNK.double())
    found_EP = metrics.energy(weight_EPNK, hessian_EKK)
    assert torch.allclose(found_EP.double(), wanted_EP, rtol=1e-6)


def test_proxy_rows_add_up_to_the_trace() -> None:
    problem = problems.make(inputs=64)
    error_ENK, hessian_EKK = problem.weight_ENK, problems.hessians(problem).float()
    found = metrics.proxy_rows(error_ENK, hessian_EKK)
    assert found.shape == (3, 24)
    for expert in range(3):
        error_NK, hessian_KK = problems.array(error_ENK[expert]), problems.array(hessian_EKK[expert])
        assert found[expert].sum().item() == pytest.approx(reference.proxy(error_NK, hessian_KK), rel=1e-5)
        assert found[expert, 4].item() == pytest.approx(reference.proxy(error_NK[4:5], hessian_KK), rel=1e-5)


def test_router_agreement_counts_common_experts_in_any_order() -> None:
    first_TA = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    second_TA = torch.tensor([[1, 0], [3, 9], [8, 9], [6, 7]])
    assert metrics.router_agreement(first_TA, first_TA.flip(1)) == 1
    assert metrics.router_agreement(first_TA, second_TA) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert metrics.router_agreement(second_TA, first_TA) == pytest.approx((1 + 0.5 + 0 + 1) / 4)
