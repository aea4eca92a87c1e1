"""One site solved by a recipe: against the whole way in float64, ingredient by ingredient, and at the edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import problems
import reference
from fourfold.core import gptq, grid, guidance, metrics, moments
from fourfold.datatypes import FourfoldError, Method, Moments, QuantizedGroup, Target
from fourfold.formats import named
from fourfold.quantize.site import Site, Solved, solve_site
from fourfold.recipe import CHOICES, Recipe, Scheme, Solver, load_recipe
from grids import int4
from problems import GROUP, Problem

# What acts before a site is made: see test_solve_layer.py, and of norm_power test_observe.py and test_run.py.
ELSEWHERE = {"asymmetric", "norm_power", "router_weighted", "pool_rows", "rest", "tensor_parallel"}
# Fields of the presets, a value other than that of `best`, and what else must be set for the field to be used.
OTHER_VALUES: list[tuple[str, object, dict[str, Any]]] = [
    ("pool", 0.1, {}),
    ("effective_tokens", False, {}),
    ("trace_matched", False, {}),
    ("damp", 0.3, {}),
    ("damp_kind", "mean", {}),
    ("damp_floor", 0.03, {}),
    ("order", "group-aware", {}),
    ("order", "natural", {}),
    ("scale", "absmax", {}),
    ("scale_weights", "diagonal", {}),
    ("scale_low", 0.9, {}),
    ("scale_high", 0.8, {}),
    ("scale_steps", 5, {}),
    ("passes", 0, {}),
    ("passes", 4, {}),
    ("refine_scales", False, {}),
    ("fallback_share", 0.9, {}),
    ("signed", False, {}),
    ("scale_dtype", "fp16", {}),
    ("group_size", 64, {}),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """See tests/core/conftest.py."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problems.make()


@pytest.fixture(scope="module")
def site(problem: Problem) -> Site:
    return make_site(problem)


@pytest.fixture(scope="module")
def solved(site: Site) -> Solved:
    return solve_site(site, recipe())


def recipe(preset: str = "best", **changes: Any) -> Recipe:
    """A preset with groups of 32 and these fields of its scheme or solver."""
    base = load_recipe(preset, ["scheme.group_size=32"])
    names = {field.name for field in dataclasses.fields(Scheme)}
    scheme = {key: value for key, value in changes.items() if key in names}
    solver = {key: value for key, value in changes.items() if key not in names}
    return replace(base, scheme=replace(base.scheme, **scheme), solver=replace(base.solver, **solver))


def make_site(problem: Problem, *, gap: bool = True, weighted: bool = True) -> Site:
    """gap: with a target, as down has one on two streams."""
    weight_S = problem.weight_S if weighted else torch.ones_like(problem.weight_S)
    tokens = len(problem.input_TK)
    own = moments.accumulate(problem.input_TK, problem.token_S, weight_S, problem.offsets)
    if gap:
        outputs, input_SK = problem.weight_ENK.shape[1], problem.input_TK[problem.token_S]
        gap_ENK, gap2_EN = moments.gap(problem.missing, outputs, input_SK, weight_S, problem.offsets)
        own = replace(own, gap_ENK=gap_ENK, gap2_EN=gap2_EN)
    return Site(
        name="gate_up",
        projections=("gate_proj", "up_proj"),
        weight_ENK=problem.weight_ENK,
        moments=own,
        pool_EKK=moments.pool(problem.input_TK, torch.ones(tokens)) / tokens,
        calibration_tokens=tokens,
    )


def of_expert(site: Site, experts: list[int]) -> Site:
    own = {field.name: getattr(site.moments, field.name) for field in dataclasses.fields(Moments)}
    chosen = Moments(**{name: None if values is None else values[experts] for name, values in own.items()})
    return replace(site, weight_ENK=site.weight_ENK[experts], moments=chosen)


def with_tokens(site: Site, input_TK: Tensor, expert: int = 1) -> Site:
    """The same site with these tokens, of weight one and without a gap, for one of its experts."""
    own, count = site.moments, len(input_TK)
    few = moments.accumulate(input_TK, torch.arange(count), torch.ones(count), [0, count])
    changed = {}
    for field in dataclasses.fields(Moments):
        if getattr(own, field.name) is not None:
            changed[field.name] = getattr(own, field.name).clone()
            given = getattr(few, field.name)
            changed[field.name][expert] = 0.0 if given is None else given[0]
    return replace(site, moments=Moments(**changed))


def released(solved: Solved) -> Tensor:
    return grid.dequantize(solved.group.codes_ENK, solved.group.scale_ENG)


def rtn(weight_ENK: Tensor, dtype: str = "bf16") -> QuantizedGroup:
    scale_ENG = grid.absmax_scales(weight_ENK, int4(GROUP, dtype))
    return QuantizedGroup(grid.round_to_nearest(weight_ENK, scale_ENG, int4()), scale_ENG)


def same(first: Solved, second: Solved) -> bool:
    return all(
        torch.equal(getattr(first.group, name), getattr(second.group, name)) for name in ("codes_ENK", "scale_ENG")
    )


def assert_sound(solved: Solved) -> None:
    """No NaN anywhere, codes and scales as they may be stored."""
    for field in dataclasses.fields(Solved):
        value = getattr(solved, field.name)
        assert not isinstance(value, Tensor) or value.isfinite().all(), field.name
    codes_ENK, scale_ENG = solved.group.codes_ENK, solved.group.scale_ENG
    assert codes_ENK.dtype == torch.int8 and codes_ENK.min() >= -8 and codes_ENK.max() <= 7
    assert torch.equal(grid.stored(scale_ENG, "bf16"), scale_ENG)


# ---- the whole way in float64


@dataclasses.dataclass
class Expected:
    codes_NK: NDArray[np.int64]
    scale_NG: NDArray[np.float64]
    target_NK: NDArray[np.float64]
    hessian_KK: NDArray[np.float64]

    def loss(self, codes_NK: NDArray[np.int64], scale_NG: NDArray[np.float64]) -> float:
        return reference.proxy(self.target_NK - reference.dequantize(codes_NK, scale_NG), self.hessian_KK)


def expected(problem: Problem, site: Site, recipe: Recipe, expert: int) -> Expected:
    """What a recipe's ingredients come to for one expert, by the reference alone."""
    solver, scheme = recipe.solver, recipe.scheme
    inputs = [values.numpy() for values in problem.tokens_of(expert)]
    if not solver.router_weighted:
        inputs[1] = np.ones_like(inputs[1])
    own, weight_NK = reference.moments(*inputs), problems.array(site.weight_ENK[expert])
    n0 = solver.pool * weight_NK.shape[1]
    mean_KK, m = reference.shrink(own, problems.array(site.pool_EKK), n0, effective=solver.effective_tokens,
                                  trace_matched=solver.trace_matched)  # fmt: skip
    hessian_KK = reference.damp(mean_KK, solver.damp, solver.damp_kind, solver.damp_floor)
    order = reference.order_columns(np.diag(mean_KK).tolist(), solver.order, scheme.group)
    target_NK = weight_NK
    if site.moments.gap_ENK is not None:
        target_NK = reference.residual_target(weight_NK, own, m, n0, hessian_KK)
    if solver.scale == "search":
        _, pivot_K = reference.unit_factor(hessian_KK[np.ix_(order, order)])
        importance_K = np.zeros_like(pivot_K)
        importance_K[order] = pivot_K
        search = reference.Search(solver.scale_low, solver.scale_high, solver.scale_steps, scheme.signed,
                                  scheme.scale_dtype)  # fmt: skip
        scale_NG = reference.search_scales(target_NK, importance_K, scheme.group, search)
    else:
        scale_NG = reference.absmax_scales(target_NK, scheme.group, scheme.scale_dtype)
    codes_NK, _ = reference.gptq(target_NK, scale_NG, hessian_KK, order)
    codes_NK, scale_NG = reference.coordinate_descent(
        target_NK, codes_NK, scale_NG, hessian_KK, solver.passes, scheme.scale_dtype if solver.refine_scales else ""
    )
    return Expected(codes_NK, scale_NG, target_NK, hessian_KK)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("best", {}),
        ("best", {"pool": 0.1, "signed": False}),
        ("fast", {}),
        ("fast", {"refine_scales": False, "passes": 1, "order": "natural", "scale_dtype": "fp16"}),
        ("card", {"fallback_share": 0.0}),
        ("card", {"fallback_share": 0.0, "passes": 2}),
    ],
)
def test_a_recipe_is_what_its_ingredients_come_to_in_float64(
    problem: Problem, preset: str, changes: dict[str, Any]
) -> None:
    assert_as_expected(problem, recipe(preset, **changes))


@pytest.mark.parametrize("preset", ["best", "card"])
def test_three_blocks_of_columns_are_as_in_float64(preset: str) -> None:
    problem = problems.make(experts=3, outputs=8, inputs=3 * gptq.BLOCK, tokens=600)
    assert_as_expected(problem, recipe(preset, fallback_share=0.0))


def assert_as_expected(problem: Problem, chosen: Recipe) -> None:
    site = make_site(problem, gap=chosen.solver.asymmetric, weighted=chosen.solver.router_weighted)
    found = solve_site(site, chosen)
    assert found.methods == (Method.GPTQ,) * 3 and found.damping_E.tolist() == pytest.approx([0.05] * 3)
    for expert in range(2):
        wanted = expected(problem, site, chosen, expert)
        codes_NK, scale_NG = found.group.codes_ENK[expert].long().numpy(), problems.array(found.group.scale_ENG[expert])
        rows_N = (codes_NK == wanted.codes_NK).all(axis=1) & (scale_NG == wanted.scale_NG).all(axis=1)
        assert rows_N.mean() >= 0.85  # one tie that falls otherwise moves the rest of its row
        found_loss, wanted_loss = wanted.loss(codes_NK, scale_NG), wanted.loss(wanted.codes_NK, wanted.scale_NG)
        assert found_loss == pytest.approx(wanted_loss, rel=3e-3)


def test_errors_are_against_the_source_weights_and_the_own_moments(problem: Problem, site: Site) -> None:
    site = replace(site, weight_ENK=site.weight_ENK.bfloat16().float())  # as of any checkpoint
    found = solve_site(site, recipe())
    error_ENK = site.weight_ENK - released(found)
    for expert in range(3):
        own = reference.moments(*(values.numpy() for values in problem.tokens_of(expert)))
        mean_KK, error_NK = own.hessian_KK / own.weight, problems.array(error_ENK[expert])
        weight_NK = problems.array(site.weight_ENK[expert])
        sums = {
            "error_EN": float((error_NK**2).sum()),
            "weight_EN": float((weight_NK**2).sum()),
            "proxy_EN": reference.proxy(error_NK, mean_KK),
            "energy_EP": reference.proxy(weight_NK, mean_KK),
        }
        for name, wanted in sums.items():
            assert getattr(found, name)[expert].sum().item() == pytest.approx(wanted, rel=1e-4), name
        shrunk_KK = expected(problem, site, recipe(), expert).hessian_KK
        scale_NG = reference.absmax_scales(weight_NK, GROUP, "bf16")
        rounded_NK = weight_NK - np.rint(weight_NK / reference.spread(scale_NG, 256)).clip(-8, 7) * reference.spread(
            scale_NG, 256
        )
        over_rtn = [reference.proxy(error_NK[rows], shrunk_KK) / reference.proxy(rounded_NK[rows], shrunk_KK)
                    for rows in (slice(12), slice(12, 24))]  # fmt: skip
        assert found.over_rtn_EP[expert].tolist() == pytest.approx(over_rtn, rel=1e-3)
        assert found.level_E[expert].item() == pytest.approx(np.diag(mean_KK).mean(), rel=1e-5)
        assert found.effective_E[expert].item() == pytest.approx(reference.effective_tokens(own), rel=1e-5)
        assert found.tokens_E[expert].item() == own.count


# ---- what must not matter


@pytest.mark.parametrize("preset", ["best", "fast", "card"])
def test_same_bits_again_alone_and_in_another_order(problem: Problem, preset: str) -> None:
    chosen = recipe(preset)
    site = make_site(problem, gap=chosen.solver.asymmetric)
    whole = solve_site(site, chosen)
    assert same(solve_site(site, chosen), whole)
    turned = solve_site(of_expert(site, [2, 0, 1]), chosen)
    assert torch.equal(turned.group.codes_ENK, whole.group.codes_ENK[[2, 0, 1]])
    for expert in range(3):
        alone = solve_site(of_expert(site, [expert]), chosen)
        assert torch.equal(alone.group.codes_ENK[0], whole.group.codes_ENK[expert])
        assert torch.equal(alone.group.scale_ENG[0], whole.group.scale_ENG[expert])


def test_solving_leaves_the_site_as_it_is(site: Site) -> None:
    before = [tensor.clone() for tensor in (site.weight_ENK, site.moments.hessian_EKK, site.pool_EKK)]
    gap_ENK = site.moments.gap_ENK
    assert gap_ENK is not None
    gap_before = gap_ENK.clone()
    solve_site(site, recipe())
    after = (site.weight_ENK, site.moments.hessian_EKK, site.pool_EKK)
    assert all(torch.equal(tensor, old) for tensor, old in zip(after, before, strict=True))
    assert torch.equal(gap_ENK, gap_before)


def test_louder_inputs_change_nothing(site: Site, solved: Solved) -> None:
    """Four times the moments is exact in fp32, so every bit must stay; so is four times the weights, scales follow.

    Inputs are twice as loud and outputs lack twice as much; of weights four times as large outputs lack four times.
    """
    own = site.moments
    assert own.gap_ENK is not None and own.gap2_EN is not None
    loud = replace(own, hessian_EKK=4 * own.hessian_EKK, gap_ENK=4 * own.gap_ENK, gap2_EN=4 * own.gap2_EN,
                   energy2_E=16 * own.energy2_E)  # fmt: skip
    assert same(solve_site(replace(site, moments=loud, pool_EKK=4 * site.pool_EKK), recipe()), solved)
    lacking = replace(own, gap_ENK=4 * own.gap_ENK, gap2_EN=16 * own.gap2_EN)
    heavy = solve_site(replace(site, weight_ENK=4 * site.weight_ENK, moments=lacking), recipe())
    assert torch.equal(heavy.group.codes_ENK, solved.group.codes_ENK)
    assert torch.equal(heavy.group.scale_ENG, 4 * solved.group.scale_ENG)


# ---- ingredients


def test_every_field_is_looked_at() -> None:
    fields = {field.name for kind in (Solver, Scheme) for field in dataclasses.fields(kind)}
    assert {name for name, _, _ in OTHER_VALUES} == fields - ELSEWHERE
    for key, choices in CHOICES.items():
        kind, _, name = key.rpartition(".")
        if kind == "solver":
            tried = {value for field, value, _ in OTHER_VALUES if field == name} | {getattr(Solver(), name)}
            assert tried == set(choices), name


@pytest.mark.parametrize(("field", "value", "others"), OTHER_VALUES)
def test_every_field_does_something(
    site: Site, solved: Solved, field: str, value: object, others: dict[str, Any]
) -> None:
    usual = solve_site(site, recipe(**others)) if others else solved
    changed = solve_site(site, recipe(**others, **{field: value}))
    assert not torch.equal(changed.group.codes_ENK, usual.group.codes_ENK)
    assert (changed.group.scale_ENG.shape != usual.group.scale_ENG.shape) == (field == "group_size")


def test_without_signs_no_scale_is_negative(site: Site, solved: Solved) -> None:
    unsigned = solve_site(site, recipe(signed=False))
    assert (unsigned.group.scale_ENG > 0).all()
    assert 0.2 < (solved.group.scale_ENG < 0).float().mean() < 0.8


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_without_signs_no_scale_is_negative_even_where_weights_are_quiet(seed: int) -> None:
    """Codes of quiet groups serve the errors of loud ones: refinement then finds optima of the other sign."""
    problem = problems.make(seed=seed)
    loudness_K = torch.logspace(-4, 0, 8).repeat_interleave(GROUP)
    input_TK = problem.input_TK + 3 * problem.input_TK[:, :1]  # all channels have much in common
    quiet = replace(problem, input_TK=input_TK, weight_ENK=problem.weight_ENK * loudness_K)
    found = solve_site(make_site(quiet, gap=False), recipe(signed=False))
    assert (found.group.scale_ENG > 0).all()


def test_passes_and_refine_scales(site: Site, solved: Solved) -> None:
    none = solve_site(site, recipe(passes=0))
    codes_only = solve_site(site, recipe(refine_scales=False))
    assert torch.equal(codes_only.group.scale_ENG, none.group.scale_ENG)
    assert not torch.equal(codes_only.group.codes_ENK, none.group.codes_ENK)
    assert (solved.group.scale_ENG != none.group.scale_ENG).float().mean() > 0.3
    # No pass sees a scale, so it is the search's: as for codes without a solve
    assert same(solve_site(site, recipe(passes=0, refine_scales=False)), none)


def test_a_gap_of_nothing_is_the_plain_target(problem: Problem, site: Site) -> None:
    nothing = replace(problem, missing_SN=torch.zeros_like(problem.missing_SN))
    found, plain = solve_site(make_site(nothing), recipe()), solve_site(make_site(problem, gap=False), recipe())
    assert same(found, plain)
    assert found.targets == solve_site(site, recipe()).targets == (Target.RESIDUAL,) * 3
    assert plain.targets == (Target.PLAIN,) * 3


def test_absmax_scales_are_of_the_target_and_never_negative(problem: Problem, site: Site) -> None:
    plain = solve_site(make_site(problem, gap=False), recipe(scale="absmax", passes=0))
    assert torch.equal(plain.group.scale_ENG, grid.absmax_scales(site.weight_ENK, int4(GROUP)))
    moved = solve_site(site, recipe(scale="absmax", passes=0))
    assert not torch.equal(moved.group.scale_ENG, plain.group.scale_ENG) and (moved.group.scale_ENG > 0).all()


@pytest.mark.parametrize(("scale_dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("scale", ["search", "absmax"])
def test_scales_are_exact_in_their_dtype(site: Site, scale: str, scale_dtype: str, torch_dtype: torch.dtype) -> None:
    scale_ENG = solve_site(site, recipe(scale=scale, scale_dtype=scale_dtype)).group.scale_ENG
    assert torch.equal(scale_ENG.to(torch_dtype).float(), scale_ENG)


@pytest.mark.parametrize("format", CHOICES["format"])
@pytest.mark.parametrize("scale_dtype", CHOICES["scheme.scale_dtype"])
def test_what_was_measured_is_what_is_stored(site: Site, format: str, scale_dtype: str) -> None:
    """A pair of format and dtype is refused when the recipe is read, or the format holds its scales exactly."""
    overrides = ["scheme.group_size=32", f"format={format}", f"scheme.scale_dtype={scale_dtype}"]
    try:
        chosen = load_recipe("best", overrides)
    except FourfoldError:
        return
    group = solve_site(site, chosen).group
    assert torch.equal(named(format).unpack(named(format).pack(group)).scale_ENG, group.scale_ENG)


# ---- the reference card's rule


def test_experts_with_few_tokens_are_rounded_by_the_fallback_rule(site: Site) -> None:
    """Below the share of all calibration tokens, not at it."""
    tokens, counts = site.calibration_tokens, sorted(site.moments.count_E.tolist())
    places = [site.moments.count_E.tolist().index(count) for count in counts]
    assert len(set(counts)) == 3
    for few in range(4):
        share = counts[few] / tokens if few < 3 else 1.0
        found = solve_site(site, recipe(fallback_share=share))
        untouched = solve_site(site, recipe(fallback_share=0.0))
        for expert in range(3):
            rounded = expert in places[:few]
            assert found.methods[expert] == (Method.RTN if rounded else Method.GPTQ)
            wanted = rtn(site.weight_ENK) if rounded else untouched.group
            assert torch.equal(found.group.codes_ENK[expert], wanted.codes_ENK[expert])
            assert torch.equal(found.group.scale_ENG[expert], wanted.scale_ENG[expert])
        error_EN = (site.weight_ENK - released(found)).square().sum(dim=-1)
        assert torch.allclose(found.error_EN, error_EN)


def test_the_card_rounds_below_half_a_percent_with_fp16_scales(site: Site) -> None:
    chosen = recipe("card")
    assert chosen.solver.fallback_share == 0.005
    count = int(site.moments.count_E[1])
    at_it, below = (replace(site, calibration_tokens=count * 200 + more) for more in (0, 1))
    assert solve_site(of_expert(at_it, [1]), chosen).methods == (Method.GPTQ,)
    found = solve_site(of_expert(below, [1]), chosen)
    wanted = rtn(site.weight_ENK[1:2], "fp16")
    assert found.methods == (Method.RTN,) and torch.equal(found.group.scale_ENG, wanted.scale_ENG)
    assert torch.equal(found.group.codes_ENK, wanted.codes_ENK)


# ---- quality


def output_error(problem: Problem, weight_ENK: Tensor, wq_ENK: Tensor, expert: int) -> float:
    """Mean of w |(W - Wq) x|^2."""
    return float(lacking(problem, weight_ENK, wq_ENK, expert).sum())


def lacking(problem: Problem, weight_ENK: Tensor, wq_ENK: Tensor, expert: int, share: float = 0.0) -> Tensor:
    """Mean of w (W x + y - Wq x)^2 of each output, y what it lacks, times `share`: [N]."""
    input_SK, weight_S, missing_SN = (values.double() for values in problem.tokens_of(expert))
    error_SN = input_SK @ (weight_ENK[expert] - wq_ENK[expert]).double().T + share * missing_SN
    return (weight_S[:, None] * error_SN.square()).sum(dim=0) / weight_S.sum()


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(["best", "fast"]), st.booleans(), st.sampled_from([20, 120, 480]))
def test_never_worse_than_rounding_in_sum(seed: int, preset: str, signed: bool, tokens: int) -> None:
    problem = problems.make(seed=seed, tokens=tokens, outputs=16, inputs=128)
    site = make_site(problem, gap=False)
    found, plain = released(solve_site(site, recipe(preset, signed=signed))), rtn(site.weight_ENK)
    rounded = grid.dequantize(plain.codes_ENK, plain.scale_ENG)
    errors = [
        sum(output_error(problem, site.weight_ENK, wq_ENK, expert) for expert in range(3))
        for wq_ENK in (found, rounded)
    ]
    assert errors[0] <= errors[1]


def test_each_preset_is_better_than_the_one_before_it(problem: Problem) -> None:
    """In what each is for: output error; for best, what the outputs lack, in rows where little of that is noise."""
    site, symmetric = make_site(problem), make_site(problem, gap=False)
    plain = rtn(site.weight_ENK)
    candidates = {
        "rounded": grid.dequantize(plain.codes_ENK, plain.scale_ENG),
        "card": released(solve_site(symmetric, recipe("card"))),
        "fast": released(solve_site(symmetric, recipe("fast"))),
    }
    sums = [
        sum(output_error(problem, site.weight_ENK, wq_ENK, expert) for expert in range(3))
        for wq_ENK in candidates.values()
    ]
    assert sums[0] > 1.2 * sums[1] > 1.2 * sums[2]
    best = released(solve_site(site, recipe("best")))
    for expert in range(3):
        with_gap, without = (lacking(problem, site.weight_ENK, wq_ENK, expert, share=1.0)[:6].sum()
                             for wq_ENK in (best, candidates["fast"]))  # fmt: skip
        assert with_gap < 0.75 * without


# ---- edges


def test_without_tokens_an_expert_is_solved_on_the_pool(site: Site) -> None:
    empty = with_tokens(site, torch.empty(0, 256))
    found = solve_site(empty, recipe())
    assert_sound(found)
    assert found.methods == (Method.GPTQ,) * 3 and found.effective_E[1] == 0 and found.tokens_E[1] == 0
    tokens = site.calibration_tokens  # an expert that saw just what the pool is made of
    pooled = {
        "hessian_EKK": site.pool_EKK[None] * 1024,
        "weight_E": torch.tensor([1024.0]),
        "count_E": torch.tensor([tokens]),
        "energy2_E": (1024 * moments.trace(site.pool_EKK[None])).square() / tokens,
    }
    like = solve_site(replace(of_expert(site, [1]), moments=Moments(**pooled)), recipe())
    assert (like.group.codes_ENK[0] == found.group.codes_ENK[1]).float().mean() >= 0.999
    assert torch.allclose(found.proxy_EN[1], like.proxy_EN[0], rtol=1e-3)  # judged by the pool
    assert torch.equal(found.group.codes_ENK[[0, 2]], solve_site(site, recipe()).group.codes_ENK[[0, 2]])


@pytest.mark.parametrize("preset", ["best", "card"])
def test_one_token_solves(problem: Problem, site: Site, preset: str) -> None:
    input_1K = problem.input_TK[:1].float()
    found = solve_site(with_tokens(site, input_1K), recipe(preset, fallback_share=0.0))
    if preset == "best":
        assert_sound(found)
    assert found.methods == (Method.GPTQ,) * 3 and found.tokens_E[1] == 1
    assert found.effective_E[1].item() == pytest.approx(1, rel=1e-5)
    plain = rtn(site.weight_ENK[1:2])
    rounded_NK = grid.dequantize(plain.codes_ENK, plain.scale_ENG)[0]
    for wq_NK in (released(found)[1],):
        error_N, rounded_N = (input_1K @ (site.weight_ENK[1] - wq).T for wq in (wq_NK, rounded_NK))
        assert error_N.square().sum() < rounded_N.square().sum()


def test_the_same_token_again_and_again(problem: Problem, site: Site) -> None:
    """Of itself (no pool) it says what it says once; with a pool, 64 times are more confident than once."""
    once, often = (with_tokens(site, problem.input_TK[:1].float().repeat(n, 1)) for n in (1, 64))
    alone = [solve_site(tokens, recipe(pool=0.0)) for tokens in (once, often)]
    assert (alone[0].group.codes_ENK == alone[1].group.codes_ENK).float().mean() >= 0.999
    pooled = [solve_site(tokens, recipe()) for tokens in (once, often)]
    for found in (*alone, *pooled):
        assert_sound(found)
    assert pooled[1].effective_E[1].item() == pytest.approx(64, rel=1e-4)
    assert pooled[1].proxy_EN[1].sum() < pooled[0].proxy_EN[1].sum()


def dead_columns(problem: Problem, columns: list[int]) -> Problem:
    input_TK = problem.input_TK.clone()
    input_TK[:, columns] = 0
    return replace(problem, input_TK=input_TK)


@pytest.mark.parametrize("preset", ["best", "fast", "card"])
def test_dead_channels_keep_their_rounded_weights(problem: Problem, preset: str) -> None:
    columns = [0, 33, 34, 35, 255]
    chosen = recipe(preset)
    site = make_site(dead_columns(problem, columns), gap=chosen.solver.asymmetric)
    found = solve_site(site, chosen)
    assert found.methods == (Method.GPTQ,) * 3 and found.damping_E.tolist() == pytest.approx([0.05] * 3)
    rounded_ENK = grid.round_to_nearest(site.weight_ENK, found.group.scale_ENG, int4())
    assert torch.equal(found.group.codes_ENK[..., columns], rounded_ENK[..., columns])
    assert rounded_ENK[..., columns].count_nonzero() > 0.8 * rounded_ENK[..., columns].numel()


@pytest.mark.parametrize("columns", [[7], list(range(200)), list(range(256))])
def test_dead_channels_without_a_floor_do_not_empty_the_expert(problem: Problem, columns: list[int]) -> None:
    """The recipe allows damp_floor = 0: whatever method is left, the weights must survive."""
    found = solve_site(make_site(dead_columns(problem, columns)), recipe(damp_floor=0.0))
    assert_sound(found)
    assert (found.error_EN.sum(dim=1) < 0.5 * found.weight_EN.sum(dim=1)).all()


def test_nothing_but_dead_channels_is_plain_rounding(problem: Problem) -> None:
    site = make_site(dead_columns(problem, list(range(256))))
    found = solve_site(site, recipe())
    assert_sound(found)
    assert torch.equal(found.group.codes_ENK, grid.round_to_nearest(site.weight_ENK, found.group.scale_ENG, int4()))
    assert (found.error_EN.sum(dim=1) < 0.03 * found.weight_EN.sum(dim=1)).all() and not found.proxy_EN.any()


@pytest.mark.parametrize("channel", [0, 100, 255])
def test_one_channel_a_thousand_times_as_loud(problem: Problem, channel: int) -> None:
    input_TK = problem.input_TK.clone()
    input_TK[:, channel] *= 1000
    loud = replace(problem, input_TK=input_TK)
    site = make_site(loud, gap=False)
    found = solve_site(site, recipe("fast"))
    assert_sound(found)
    assert found.methods == (Method.GPTQ,) * 3 and found.damping_E.tolist() == pytest.approx([0.05] * 3)
    relative_E = found.proxy_EN.sum(dim=1) / found.energy_EP.sum(dim=1)
    plain = rtn(site.weight_ENK)
    rounded = grid.dequantize(plain.codes_ENK, plain.scale_ENG)
    for expert in range(3):
        errors = (output_error(loud, site.weight_ENK, wq_ENK, expert) for wq_ENK in (released(found), rounded))
        assert next(errors) < 0.2 * next(errors)
    assert (relative_E < 1e-3).all()


def test_weights_of_zero(site: Site) -> None:
    """Outputs that lack something get weights all the same, but for an expert without any: there RTN has no error."""
    weight_ENK, gap_ENK, gap2_EN = site.weight_ENK.clone(), site.moments.gap_ENK, site.moments.gap2_EN
    assert gap_ENK is not None and gap2_EN is not None
    gap_ENK, gap2_EN = gap_ENK.clone(), gap2_EN.clone()
    weight_ENK[1] = 0
    for values in (weight_ENK, gap_ENK, gap2_EN):
        values[0, 5] = 0
    own = replace(site.moments, gap_ENK=gap_ENK, gap2_EN=gap2_EN)
    found = solve_site(replace(site, weight_ENK=weight_ENK, moments=own), recipe())
    assert found.targets == (Target.RESIDUAL, Target.PLAIN, Target.RESIDUAL)
    assert_sound(found)
    assert not found.group.codes_ENK[1].any() and (found.group.scale_ENG[1] == 2.0**-17).all()
    assert not found.group.codes_ENK[0, 5].any() and not found.error_EN[1].any() and not found.proxy_EN[1].any()
    usual = solve_site(site, recipe())
    assert torch.equal(found.group.codes_ENK[2], usual.group.codes_ENK[2])
    assert torch.equal(found.group.codes_ENK[0, :5], usual.group.codes_ENK[0, :5])  # rows do not see each other


@pytest.mark.parametrize("value", [0.02, -0.02, 5e-6])
def test_a_constant_row(site: Site, value: float) -> None:
    """Solved like any other: sound, and its outputs near; so small that no scale holds it, it is still finite."""
    weight_ENK = site.weight_ENK.clone()
    weight_ENK[1, 3] = value
    for preset in ("best", "card"):
        found = solve_site(replace(site, weight_ENK=weight_ENK), recipe(preset))
        assert all(getattr(found, name).isfinite().all() for name in ("error_EN", "proxy_EN"))
        if abs(value) > 1e-3:
            plain = replace(site.moments, gap_ENK=None, gap2_EN=None)
            symmetric = solve_site(replace(site, weight_ENK=weight_ENK, moments=plain), recipe(preset))
            energy_EN = metrics.proxy_rows(weight_ENK, site.moments.hessian_EKK) / site.moments.weight_E[:, None]
            assert symmetric.proxy_EN[1, 3] < 5e-3 * energy_EN[1, 3]


# ---- what is not finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["hessian_EKK", "gap_ENK"])
def test_a_moment_that_is_not_finite_is_an_error_naming_the_expert(site: Site, name: str, bad: float) -> None:
    values = getattr(site.moments, name).clone()
    values[1, 7, 7] = bad
    broken = replace(site, moments=replace(site.moments, **{name: values}))
    with pytest.raises(FourfoldError, match=r"expert 1\b.*not finite"):
        solve_site(broken, recipe())


@pytest.mark.parametrize("of_each", [True, False])
def test_a_pool_that_is_not_finite_is_an_error(site: Site, of_each: bool) -> None:
    pool_EKK = site.pool_EKK.expand(3, 256, 256).clone() if of_each else site.pool_EKK.clone()
    (pool_EKK[1] if of_each else pool_EKK)[7, 7] = torch.inf
    with pytest.raises(FourfoldError, match=r"not finite"):
        solve_site(replace(site, pool_EKK=pool_EKK), recipe())


@pytest.mark.parametrize("loudness", [0.25, 1, 1024])
def test_a_silent_pool_leaves_an_expert_to_its_own_tokens(problem: Problem, loudness: float) -> None:
    site = make_site(replace(problem, input_TK=problem.input_TK * loudness), gap=False)
    found = solve_site(replace(site, pool_EKK=torch.zeros_like(site.pool_EKK)), recipe())
    assert_sound(found)
    assert found.methods == (Method.GPTQ,) * 3
    wanted = solve_site(site, recipe(pool=0.0))
    assert (found.group.codes_ENK == wanted.group.codes_ENK).float().mean() >= 0.999


# ---- factors that fail


def indefinite(site: Site, correlation: float) -> Site:
    """Expert 1's first two channels have a product that no tokens give: not positive definite from 1 on."""
    hessian_EKK = site.moments.hessian_EKK.clone()
    hessian_EKK[1] = 50 * torch.eye(256)
    hessian_EKK[1, 0, 1] = hessian_EKK[1, 1, 0] = 50 * correlation
    return replace(site, moments=replace(site.moments, hessian_EKK=hessian_EKK))


@pytest.mark.parametrize(
    ("preset", "correlation", "delta", "method"),
    [
        ("fast", 0.5, 0.05, Method.GPTQ),
        ("fast", 1.15, 0.2, Method.GPTQ),
        ("fast", 1.4, 0.5, Method.GPTQ),
        ("fast", 1.9, 1.0, Method.GPTQ),
        ("fast", 2.5, 1.0, Method.DIAGONAL),
        ("card", 0.5, 0.05, Method.GPTQ),
        ("card", 1.105, 0.11, Method.GPTQ),
        ("card", 1.995, 1.0, Method.GPTQ),
        ("card", 2.5, 1.0, Method.DIAGONAL),
    ],
)
def test_a_failing_factor_is_damped_more_and_logged(
    problem: Problem, preset: str, correlation: float, delta: float, method: Method
) -> None:
    chosen = recipe(preset, pool=0.0)
    site = make_site(problem, gap=False)
    found = solve_site(indefinite(site, correlation), chosen)
    assert found.methods == (Method.GPTQ, method, Method.GPTQ)
    assert found.damping_E.tolist() == pytest.approx([0.05, delta, 0.05])
    assert all(getattr(found, name).isfinite().all() for name in ("error_EN", "proxy_EN", "level_E"))
    usual = solve_site(site, chosen)
    for expert in (0, 2):
        assert torch.equal(found.group.codes_ENK[expert], usual.group.codes_ENK[expert])
    if method is Method.DIAGONAL:
        wanted = grid.round_to_nearest(site.weight_ENK, found.group.scale_ENG, int4())
        assert torch.equal(found.group.codes_ENK[1], wanted[1])
        assert found.error_EN[1].sum() < 0.05 * found.weight_EN[1].sum()


def test_a_row_metric_without_a_factor_is_logged(site: Site, solved: Solved) -> None:
    """Indefinite, as rounding can make it: its diagonal guides nothing, and the log says so."""
    rows = site.weight_ENK.shape[1]
    indefinite = guidance.factorize_rows(2 * torch.ones(1, rows, rows) - torch.eye(rows), 0.05)
    found = solve_site(replace(site, rows=indefinite), recipe())
    assert found.methods == (Method.ROW_DIAGONAL,) * 3 and same(found, solved)
    sound = guidance.factorize_rows(torch.eye(rows)[None], 0.05)
    assert solve_site(replace(site, rows=sound), recipe()).methods == (Method.GPTQ,) * 3
