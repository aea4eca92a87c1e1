"""No expert is worse than round-to-nearest, however few tokens it has and however loud they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fourfold.core import grid, target
from fourfold.datatypes import LayerResult, Method, Target
from fourfold.model.layer import DecoderLayer, Routing, sort_pairs
from fourfold.quantize import site, solve
from fourfold.quantize.observe import MOST_IMPORTANT, Observed
from fourfold.recipe import Guidance, Recipe, load_recipe
from grids import int4
from quantize.test_solve_layer import PROJECTIONS, alone, make_layer, normal, swiglu

HIDDEN, WIDTH, TOKENS, GROUP = 64, 64, 512, 32
COUNTS = (0, 1, HIDDEN // 8, HIDDEN // 2, 2 * HIDDEN, TOKENS)  # tokens of each expert but the last, which has the rest
EXPERTS = len(COUNTS) + 1
PRESETS = ("card", "fast", "best", "guided")


@pytest.fixture(scope="module")
def layer() -> DecoderLayer:
    return make_layer(1, EXPERTS, WIDTH, HIDDEN)


@pytest.fixture(scope="module")
def observed() -> Observed:
    return moe_inputs(COUNTS)


def moe_inputs(counts: Sequence[int], loudness_T1: Tensor | float = 1.0) -> Observed:
    """A few tokens are thirty times as loud as the others; drift and gap are noise, louder at them too.

    counts: see COUNTS; loudness_T1: that of each token besides.
    """
    loudness_T1 = normal(TOKENS, 1, seed=3).abs().pow(3).add(0.3) * loudness_T1
    input_TD = normal(TOKENS, HIDDEN, seed=4) * torch.arange(1, HIDDEN + 1) ** -0.4 * loudness_T1
    second_T = torch.repeat_interleave(torch.arange(len(counts) - 1), torch.tensor(counts[:-1]))
    rest_T = torch.full((TOKENS - len(second_T),), EXPERTS - 1)
    second_T = torch.cat([second_T, rest_T])[torch.randperm(TOKENS, generator=torch.Generator().manual_seed(5))]
    share_T = 0.5 + 0.4 * torch.rand(TOKENS, generator=torch.Generator().manual_seed(6))
    weight_TA = torch.stack([share_T, 1 - share_T], dim=1).bfloat16()
    routing = Routing(torch.stack([torch.full_like(second_T, len(counts) - 1), second_T], dim=1), weight_TA)
    target_TD = input_TD + 0.05 * loudness_T1 * normal(TOKENS, HIDDEN, seed=7)
    gap_TD = 0.2 * loudness_T1 * normal(TOKENS, HIDDEN, seed=8)
    pairs = sort_pairs(routing, range(EXPERTS), EXPERTS)
    assert torch.tensor(pairs.offsets).diff().tolist()[:-1] == list(counts)
    importance_T = (loudness_T1.median() / loudness_T1.flatten()).sqrt().clamp(max=MOST_IMPORTANT)
    return Observed(
        input_TD.bfloat16(), (TOKENS,), routing, pairs, target_TD.bfloat16(), gap_TD.bfloat16(), importance_T
    )


def quantized(layer: DecoderLayer, observed: Observed, preset: str) -> LayerResult:
    recipe = load_recipe(preset, [f"scheme.group_size={GROUP}"])
    curvature = None
    if preset == "guided":
        loudness_D = torch.arange(1, HIDDEN + 1) ** -0.7
        recipe = replace(recipe, guidance=Guidance(tokens=512, sites="both"))
        gradient_TD = normal(512, HIDDEN, seed=9) * loudness_D @ normal(HIDDEN, HIDDEN, seed=10)
        curvature = solve.Curvature(gradient_TD.T @ gradient_TD / 512, damping=0.05)
    if not recipe.solver.asymmetric:
        observed = replace(observed, target_TD=None, gap_TD=None)
    if not recipe.solver.norm_power:
        observed = replace(observed, importance_T=torch.ones(TOKENS))
    stems = [{projection: f"{expert}.{projection}." for projection in PROJECTIONS} for expert in range(EXPERTS)]
    chunking = solve.Chunking(3, "device", stems, lambda count: None)
    return solve.solve_layer(alone(torch.device("cpu")), layer, observed, recipe, chunking, curvature)


def over_rtn(layer: DecoderLayer, observed: Observed, result: LayerResult, recipe: Recipe) -> dict[str, Tensor]:
    """Output error of each expert over all tokens of the layer, by site, over that of RTN: [E]."""
    input_TD = observed.input_TD.float()
    hidden_ETI = swiglu(input_TD @ layer.stacks[0].float().mT)
    assert result.gate_up_ENK is not None and result.down_ENK is not None
    ratios = {}
    for name, source_ENK, released_ENK, input_ETK in (
        ("gate_up", layer.stacks[0].float(), result.gate_up_ENK.float(), input_TD[None]),
        ("down", layer.stacks[1].float(), result.down_ENK.float(), hidden_ETI),
    ):
        scale_ENG = grid.absmax_scales(source_ENK, int4(GROUP, recipe.scheme.scale_dtype))
        codes_ENK = grid.round_to_nearest(source_ENK, scale_ENG, int4())
        rounded_ENK = grid.dequantize(codes_ENK, scale_ENG).bfloat16().float()
        errors = [(input_ETK @ (source_ENK - quantized_ENK).mT).square().sum(dim=(1, 2))
                  for quantized_ENK in (released_ENK, rounded_ENK)]  # fmt: skip
        ratios[name] = errors[0] / errors[1]
    return ratios


@pytest.mark.parametrize("preset", PRESETS)
def test_no_expert_is_worse_than_rounding(layer: DecoderLayer, observed: Observed, preset: str) -> None:
    """Over all tokens of the layer, as any of them may come to any expert in use.

    `card` fits an expert to its own tokens alone, and the guard counts these as m of m + K / 2. Here an expert with
    twice as many tokens as inputs passes, and its error over all tokens is 8 % above RTN's.
    """
    result = quantized(layer, observed, preset)
    for name, ratio_E in over_rtn(layer, observed, result, load_recipe(preset)).items():
        assert (ratio_E <= (1.1 if preset == "card" else 1 + 1e-3)).all(), (name, ratio_E)
        assert (ratio_E[-2:] < 0.9).all(), (name, ratio_E)
    assert all(0 < row.error_over_rtn <= 1 for row in result.projections)


def test_the_target_asks_no_more_than_tokens_support(
    layer: DecoderLayer, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the guard: cold experts are not far from RTN, as less is believed of their few tokens."""
    monkeypatch.setattr(site, "_over_rtn", lambda projections, weight_ENK, *rest: torch.zeros(len(weight_ENK), 2))
    ratios = over_rtn(layer, observed, quantized(layer, observed, "best"), load_recipe("best"))
    assert max(ratio_E.max() for ratio_E in ratios.values()) < 1.5, ratios


def test_an_expert_that_a_target_spoils_is_solved_again(
    layer: DecoderLayer, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that believes everything is replaced by the source weights, and the log says so."""
    targets = []
    for gap in (target.james_stein, lambda gap_ENK, *rest: 50 * gap_ENK):
        monkeypatch.setattr(target, "james_stein", gap)
        result = quantized(layer, observed, "best")
        targets.append([row.target for row in result.projections if row.projection == "down_proj"])
    for name, ratio_E in over_rtn(layer, observed, result, load_recipe("best")).items():
        assert (ratio_E <= 1 + 1e-3).all(), (name, ratio_E)
    assert targets[0][-2] is Target.RESIDUAL and targets[1][1:] == [Target.PLAIN] * (EXPERTS - 1)


def loud_token() -> Observed:
    """One of 512 is 10^4 times as loud, and its state as long."""
    loudness_T1 = torch.ones(TOKENS, 1)
    loudness_T1[100] = 1e4
    return moe_inputs(COUNTS, loudness_T1)


def loud_channel() -> Observed:
    usual = moe_inputs(COUNTS)
    assert usual.target_TD is not None
    louder_D = torch.ones(HIDDEN, dtype=torch.bfloat16)
    louder_D[5] = 100
    return replace(usual, input_TD=usual.input_TD * louder_D, target_TD=usual.target_TD * louder_D)


def first_tokens() -> Observed:
    """Each row's first token sees itself alone: all are one, and expert 2 gets no other."""
    usual = moe_inputs(COUNTS)
    assert usual.target_TD is not None and usual.gap_TD is not None
    own_T = (usual.routing.index_TA == 2).any(dim=1)
    first = {name: getattr(usual, name).clone() for name in ("input_TD", "target_TD", "gap_TD")}
    for value_TD in first.values():
        value_TD[own_T] = 30 * value_TD[own_T][0]
    importance_T = usual.importance_T.where(~own_T, 0.2)
    return replace(usual, importance_T=importance_T, **first)


def five_tokens() -> Observed:
    return moe_inputs((*COUNTS[:2], 5, *COUNTS[3:]))


@pytest.mark.parametrize("preset", ["fast", "best", "guided"])
@pytest.mark.parametrize("make", [loud_token, loud_channel, first_tokens, five_tokens])
def test_extremes_leave_every_expert_at_least_as_good_as_rounding(
    layer: DecoderLayer, make: Callable[[], Observed], preset: str
) -> None:
    result = quantized(layer, make(), preset)
    for row in result.projections:
        assert row.method is Method.GPTQ and 0 < row.error_over_rtn <= 1 + 1e-3, row
        assert 0 < row.scale_min <= row.scale_max < 0.2 and 0 < row.weight_error < 1, row
    assert all(tensor.isfinite().all() for name, tensor in result.tensors.items() if name.endswith("weight_scale"))
