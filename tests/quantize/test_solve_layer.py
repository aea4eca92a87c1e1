"""A whole layer solved: chunks of experts, names, rows of the log, and what the streams have to do with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import problems
import reference
from fourfold.core import guidance
from fourfold.datatypes import FourfoldError, LayerResult, Method, Moments, ProjectionStatistics, Rows, Target
from fourfold.distributed.team import alone
from fourfold.formats import named
from fourfold.model.arithmetic import Arithmetic
from fourfold.model.experts import Experts
from fourfold.model.grouped import grouped_linear
from fourfold.model.layer import DecoderLayer, Pairs, Routing, expert_hidden, run_experts, sort_pairs
from fourfold.model.loader import Layer
from fourfold.model.skeleton import Skeleton
from fourfold.quantize import estimate, site, solve
from fourfold.quantize.chunk import (
    Pool,
    gate_up_moments,
    gate_up_pool,
    make_chunk,
    random_pool,
    row_moments,
    row_pool,
)
from fourfold.quantize.observe import MoeInputs, Observed, observe
from fourfold.recipe import Guidance, Recipe, load_recipe

EXPERTS, HIDDEN, WIDTH, TOKENS, GROUP = 4, 64, 96, 240, 32
PREFIX = "model.layers.2.mlp.experts."
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STEMS = [{projection: f"{PREFIX}{expert}.{projection}." for projection in PROJECTIONS} for expert in range(EXPERTS)]


def swiglu(gate_up_SN: Tensor) -> Tensor:
    gate_SI, up_SI = gate_up_SN.chunk(2, dim=-1)
    return silu(gate_SI) * up_SI


SWIGLU = Arithmetic(gated=True, interleaved=False, transposed=False, gate=swiglu, norm=None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """See tests/core/conftest.py."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(preset: str = "best", **solver: Any) -> Recipe:
    chosen = load_recipe(preset, [f"scheme.group_size={GROUP}"])
    return replace(chosen, solver=replace(chosen.solver, **solver))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    index: int, experts: int, width: int, hidden: int, scale: float = 0.1, dtype: torch.dtype = torch.bfloat16
) -> DecoderLayer:
    """Random experts alone. scale: the standard deviation of their weights."""
    return DecoderLayer(
        index=index,
        own=Layer(nn.Identity(), Experts("experts", SWIGLU, experts, hidden, width, hidden, ()), SWIGLU, None),
        skeleton=cast(Skeleton, None),  # nothing but experts is run
        tail=1.0,
        dtype=dtype,
        owned=tuple(range(experts)),
        gate_up_ENK=(scale * normal(experts, 2 * width, hidden, seed=1)).to(dtype),
        down_ENK=(scale * normal(experts, hidden, width, seed=2)).to(dtype),
    )


@pytest.fixture(scope="module")
def layer() -> DecoderLayer:
    return make_layer(2, EXPERTS, WIDTH, HIDDEN)


@pytest.fixture(scope="module")
def observed() -> Observed:
    """Expert 3 gets no token, as its score is never among the best two; a token weighs up to nine times as much as
    another. The gap is so small that no expert's target is replaced by its source weights.
    """
    input_TD = normal(TOKENS, HIDDEN, seed=3) * torch.arange(1, HIDDEN + 1) ** -0.4
    score_TE = normal(TOKENS, EXPERTS, seed=4)
    score_TE[:, 3] = -10
    value_TA, index_TA = score_TE.softmax(dim=1).topk(2)
    routing = Routing(index_TA=index_TA, weight_TA=(value_TA / value_TA.sum(dim=1, keepdim=True)).bfloat16())
    target_TD = input_TD + 0.05 * input_TD @ normal(HIDDEN, HIDDEN, seed=5) / 8
    pairs = sort_pairs(routing, range(EXPERTS), EXPERTS)
    gap_TD = (target_TD - input_TD).tanh() @ normal(HIDDEN, HIDDEN, seed=6) / 16
    importance_T = 3.0 ** normal(TOKENS, seed=9).tanh()
    return Observed(
        input_TD.bfloat16(), (TOKENS,), routing, pairs, target_TD.bfloat16(), gap_TD.bfloat16(), importance_T
    )


def solve_with(
    layer: DecoderLayer, observed: Observed, recipe: Recipe, experts: int = EXPERTS, inputs: str = "device",
    curvature: solve.Curvature | None = None,
) -> LayerResult:  # fmt: skip
    if not recipe.solver.asymmetric:
        observed = replace(observed, target_TD=None, gap_TD=None)
    if not recipe.solver.norm_power:
        observed = replace(observed, importance_T=torch.ones(TOKENS))
    ticks = list[int]()
    chunking = solve.Chunking(experts, inputs, STEMS, ticks.append)
    result = solve.solve_layer(alone(torch.device("cpu")), layer, observed, recipe, chunking, curvature)
    assert sum(ticks) == solve.STEPS * EXPERTS and max(ticks) == experts
    return result


@pytest.fixture(scope="module")
def result(layer: DecoderLayer, observed: Observed) -> LayerResult:
    return solve_with(layer, observed, recipe())


def stacked(layer: DecoderLayer) -> dict[str, Tensor]:
    """The source weights by projection, fp32."""
    gate_up_ENK, down_ENK = (stack.float() for stack in layer.stacks)
    return {"gate_proj": gate_up_ENK[:, :WIDTH], "up_proj": gate_up_ENK[:, WIDTH:], "down_proj": down_ENK}


def on_disk(result: LayerResult, expert: int, projection: str) -> np.ndarray:
    """A projection's weights, unpacked by the reference from what is to be written (compressed-tensors)."""
    name = f"{PREFIX}{expert}.{projection}."
    codes = np.array(reference.unpack_compressed_tensors(result.tensors[name + "weight_packed"].tolist()))
    return reference.dequantize(codes, problems.array(result.tensors[name + "weight_scale"]))


def traffic_of(observed: Observed) -> tuple[Tensor, Pairs]:
    return observed.input_TD, observed.pairs


def hessian_of(observed: Observed, expert: int, *, weighted: bool) -> np.ndarray:
    """Mean of w x x^T over an expert's tokens, float64. weighted: by router weight and importance."""
    input_TD, pairs = traffic_of(observed)
    place = slice(pairs.offsets[expert], pairs.offsets[expert + 1])
    token_S = pairs.token_S[place]
    inputs = input_TD[token_S].float().numpy()
    weight_S = pairs.weight_S[place].float() * observed.importance_T[token_S]
    weights = weight_S.numpy() if weighted else np.ones(len(inputs), dtype=np.float32)
    own = reference.moments(inputs, weights)
    return own.hessian_KK / own.weight


# ---- tensors


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
def test_every_expert_has_every_tensor(layer: DecoderLayer, observed: Observed, format: str) -> None:
    found = solve_with(layer, observed, replace(recipe("fast", passes=0), format=format), experts=3)
    wanted = {}
    for expert in range(EXPERTS):
        for projection, weight_ENK in stacked(layer).items():
            shapes = named(format).tensor_shapes(*weight_ENK.shape[1:], weight_ENK.shape[2] // GROUP)
            wanted |= {f"{PREFIX}{expert}.{projection}.{suffix}": shape for suffix, (_, shape) in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in found.tensors.items()} == wanted


def test_the_streams_multiply_by_what_is_on_disk(layer: DecoderLayer, result: LayerResult) -> None:
    assert result.gate_up_ENK is not None and result.down_ENK is not None
    released = stacked(layer.with_experts(result.gate_up_ENK, result.down_ENK))
    for expert in range(EXPERTS):
        for projection in PROJECTIONS:
            wanted = torch.from_numpy(on_disk(result, expert, projection)).float().bfloat16().float()
            assert torch.equal(released[projection][expert], wanted)
            source = stacked(layer)[projection][expert]
            assert 0.01 < (wanted - source).norm() / source.norm() < 0.4
    assert result.gate_up_ENK.dtype == torch.bfloat16


@pytest.mark.parametrize("preset", ["best", "fast", "card"])
def test_chunks_and_where_inputs_lie_do_not_matter(layer: DecoderLayer, observed: Observed, preset: str) -> None:
    whole = solve_with(layer, observed, recipe(preset))
    for experts, inputs in ((1, "device"), (3, "device"), (3, "host")):
        found = solve_with(layer, observed, recipe(preset), experts, inputs)
        assert found.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)
        rows, wanted = (
            {(row.expert, row.projection): replace(row, seconds=0.0) for row in some.projections}
            for some in (found, whole)
        )
        assert rows.keys() == wanted.keys()
        for key, row in rows.items():
            for field in dataclasses.fields(row):
                value = getattr(wanted[key], field.name)
                close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert getattr(row, field.name) == close, field.name


def test_the_source_weights_stay(layer: DecoderLayer, observed: Observed) -> None:
    before = [stack.clone() for stack in layer.stacks]
    solve_with(layer, observed, recipe())
    assert all(torch.equal(stack, old) for stack, old in zip(layer.stacks, before, strict=True))


# ---- rows of the log


def row_of(result: LayerResult, expert: int, projection: str) -> ProjectionStatistics:
    (row,) = (row for row in result.projections if (row.expert, row.projection) == (expert, projection))
    return row


def test_every_projection_of_every_expert_has_a_row(result: LayerResult, observed: Observed) -> None:
    _, pairs = traffic_of(observed)
    counts = [last - first for first, last in zip(pairs.offsets, pairs.offsets[1:], strict=False)]
    assert len(result.projections) == EXPERTS * 3 and counts[3] == 0
    for expert in range(EXPERTS):
        for projection in PROJECTIONS:
            row = row_of(result, expert, projection)
            assert (row.layer, row.method, row.passes, row.tokens) == (2, Method.GPTQ, 2, counts[expert])
            assert row.target == (Target.RESIDUAL if projection == "down_proj" else Target.PLAIN)
            assert row.damping == pytest.approx(0.05) and 0 <= row.effective_tokens <= counts[expert]
            assert (row.gptqmodel_loss is None) == (counts[expert] == 0) and row.seconds > 0
    spent = sum(row.seconds for row in result.projections)
    assert spent == pytest.approx(sum(result.seconds.values())) and set(result.seconds) == {"moments", "solve"}


def test_rows_can_be_recomputed_from_the_release(layer: DecoderLayer, result: LayerResult) -> None:
    for expert in range(EXPERTS):
        for projection in PROJECTIONS:
            row, weight_NK = row_of(result, expert, projection), problems.array(stacked(layer)[projection][expert])
            error = np.linalg.norm(weight_NK - on_disk(result, expert, projection)) / np.linalg.norm(weight_NK)
            assert row.weight_error == pytest.approx(error, rel=1e-4)
            scales = problems.array(result.tensors[f"{PREFIX}{expert}.{projection}.weight_scale"])
            assert (row.scale_min, row.scale_max) == (np.abs(scales).min(), np.abs(scales).max())
            assert row.scale_negative_share == pytest.approx((scales < 0).mean())


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
def test_relative_error_is_of_the_projections_own_rows(
    layer: DecoderLayer, observed: Observed, result: LayerResult, projection: str
) -> None:
    for expert in range(3):
        weight_NK = problems.array(stacked(layer)[projection][expert])
        error_NK = weight_NK - on_disk(result, expert, projection)
        hessian_KK = hessian_of(observed, expert, weighted=True)
        wanted = reference.proxy(error_NK, hessian_KK) / reference.proxy(weight_NK, hessian_KK)
        assert row_of(result, expert, projection).relative_error == pytest.approx(wanted, rel=1e-3)


def test_gptqmodel_loss_is_what_gptq_itself_sums_up(layer: DecoderLayer, observed: Observed) -> None:
    """Section 10, with w = 1: tr(Err (H + .05 mean(diag H) I) Err^T) / n is the sum of ((w - s q) / U_jj)^2 / n."""
    chosen = replace(recipe("card", fallback_share=0.0), format="compressed-tensors")
    chosen = replace(chosen, scheme=replace(chosen.scheme, scale_dtype="bf16"))
    found = solve_with(layer, observed, chosen)
    for expert in range(3):
        for projection in ("gate_proj", "up_proj"):
            mean_KK = hessian_of(observed, expert, weighted=False)
            damped_KK = reference.damp(mean_KK, 0.05, "mean", 0.0)
            weight_NK = problems.array(stacked(layer)[projection][expert])
            scale_NG = reference.absmax_scales(weight_NK, GROUP, "bf16")
            order = reference.order_columns(np.diag(mean_KK).tolist(), "group-aware", GROUP)
            _, loss = reference.gptq(weight_NK, scale_NG, damped_KK, order)
            row = row_of(found, expert, projection)
            assert row.gptqmodel_loss == pytest.approx(loss / row.tokens, rel=1e-2)
            error_NK = weight_NK - on_disk(found, expert, projection)
            assert row.gptqmodel_loss == pytest.approx(reference.proxy(error_NK, damped_KK) / row.tokens, rel=1e-4)


def test_rounded_experts_are_logged_as_such(layer: DecoderLayer, observed: Observed) -> None:
    found = solve_with(layer, observed, recipe("card"))
    for projection in PROJECTIONS:
        row = row_of(found, 3, projection)
        assert (row.method, row.passes, row.tokens) == (Method.RTN, 0, 0)
        assert row_of(found, 0, projection).method == Method.GPTQ


def test_weights_of_zero_have_no_relative_error(layer: DecoderLayer, observed: Observed) -> None:
    silent = layer.with_experts(torch.zeros_like(layer.stacks[0]), torch.zeros_like(layer.stacks[1]))
    found = solve_with(silent, observed, recipe())
    for row in found.projections:
        assert row.weight_error == row.relative_error == row.scale_negative_share == 0
        assert row.scale_min == row.scale_max == 2.0**-17


# ---- fields of the recipe that act before a site is made


@pytest.mark.parametrize(
    ("field", "value", "changed"),
    [
        ("router_weighted", False, PROJECTIONS),
        ("norm_power", 0.0, PROJECTIONS),
        ("pool_rows", 50, ("down_proj",)),
        ("asymmetric", False, ("down_proj",)),  # on the same inputs: gate and up have no target of their own
    ],
)
def test_every_field_does_something(
    layer: DecoderLayer, observed: Observed, result: LayerResult, monkeypatch: pytest.MonkeyPatch, field: str,
    value: object, changed: tuple[str, ...],
) -> None:  # fmt: skip
    if field == "pool_rows":
        monkeypatch.setattr(estimate, "POOL_ROWS_PER_INPUT", 0)
    found = solve_with(layer, observed, recipe(**{field: value}))
    differing = {name.split(".")[-2] for name in result.tensors
                 if not torch.equal(found.tensors[name], result.tensors[name])}  # fmt: skip
    assert differing == set(changed)


@pytest.mark.parametrize("asymmetric", [True, False])
def test_down_sees_the_released_gate_and_up_on_the_release_stream(
    layer: DecoderLayer, observed: Observed, asymmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watch(name: str, place: int) -> None:
        original = getattr(solve, name)

        def watched(*arguments: Any) -> Any:
            seen.append(arguments[place].clone())
            return original(*arguments)

        monkeypatch.setattr(solve, name, watched)

    watch("down_moments", 2)
    watch("down_pool", 1)
    found = solve_with(layer, observed, recipe(asymmetric=asymmetric), experts=2)
    assert found.gate_up_ENK is not None and len(seen) == 4
    wanted_ENK = found.gate_up_ENK if asymmetric else layer.stacks[0]
    for call, used_ENK in enumerate(seen):
        first = 2 * (call // 2)
        assert torch.equal(used_ENK, wanted_ENK[first : first + 2])


@pytest.mark.parametrize("owned", [(0, 1, 2, 3), (1, 3), (3,)])
def test_own_experts_outputs_are_summed_by_token(
    layer: DecoderLayer, observed: Observed, owned: tuple[int, ...]
) -> None:
    """Against one token after the other in float64; a token that goes to others gets zero, expert 3 has no token."""
    gate_up_ENK, down_ENK = (stack[list(owned)] for stack in layer.stacks)
    own = replace(layer, owned=owned, gate_up_ENK=gate_up_ENK, down_ENK=down_ENK)
    partial_TD = run_experts(own, observed.input_TD, observed.routing)
    assert (partial_TD.shape, partial_TD.dtype) == ((TOKENS, HIDDEN), torch.float32)
    gate_up_ENK, down_ENK = (stack.double() for stack in layer.stacks)
    wanted_TD = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token, input_D in enumerate(observed.input_TD.double()):
        for expert, weight in zip(*(part[token].tolist() for part in vars(observed.routing).values()), strict=True):
            if expert in owned:
                gate_I, up_I = (gate_up_ENK[expert] @ input_D).chunk(2)
                wanted_TD[token] += weight * (down_ENK[expert] @ (silu(gate_I) * up_I))
    assert (partial_TD - wanted_TD).abs().max() <= 0.02 * (wanted_TD.abs().max() + 1e-9)
    assert torch.equal(partial_TD.any(dim=1), wanted_TD.any(dim=1))


def test_the_first_layers_down_has_a_target_of_its_own(layer: DecoderLayer, observed: Observed) -> None:
    """Where both streams are still one, gate and up already differ between them: down makes up for their errors."""
    rows = Rows(token_RT=torch.zeros(1, TOKENS, dtype=torch.int64), hidden_RTD=torch.zeros(1, TOKENS, HIDDEN))
    moe_inputs = MoeInputs(rows, observed.counts, observed.input_TD, observed.routing)
    seen = observe(alone(torch.device("cpu")), layer, moe_inputs, replace(moe_inputs))
    assert seen.target_TD is seen.input_TD and seen.gap_TD is None and (seen.importance_T == 1).all()
    released = {asymmetric: solve_with(layer, seen, recipe(asymmetric=asymmetric)) for asymmetric in (False, True)}
    one, two = (found.gate_up_ENK for found in released.values())
    assert one is not None and two is not None and torch.equal(one, two)
    input_TD, pairs = traffic_of(observed)

    def output(chosen: DecoderLayer) -> Tensor:
        hidden_SI = expert_hidden(input_TD, pairs, chosen.stacks[0], SWIGLU).float()
        expert_S = torch.arange(EXPERTS).repeat_interleave(torch.tensor(pairs.offsets).diff())
        return torch.stack([chosen.stacks[1][expert].float() @ hidden_I
                            for expert, hidden_I in zip(expert_S.tolist(), hidden_SI, strict=True)])  # fmt: skip

    wanted_SD, error = output(layer), {}
    for asymmetric, result in released.items():
        lacking_SD = output(layer.with_experts(result.gate_up_ENK, result.down_ENK)) - wanted_SD
        error[asymmetric] = float((pairs.weight_S.float() * lacking_SD.square().sum(dim=1)).sum())
    assert error[True] < 0.95 * error[False]


def test_what_the_rows_lack_is_source_less_release(layer: DecoderLayer, observed: Observed) -> None:
    """By a token's router weights in sum. Only where there is a second stream."""
    worker = alone(torch.device("cpu"))
    token_RT = torch.zeros(2, TOKENS // 2, dtype=torch.int64)
    source, release = (
        MoeInputs(Rows(token_RT, normal(2, TOKENS // 2, HIDDEN, seed=seed).bfloat16()), observed.counts, input_TD,
                observed.routing)
        for seed, input_TD in ((7, observed.target_TD), (8, observed.input_TD))
    )  # fmt: skip
    kept = source.rows.hidden_RTD.clone(), release.rows.hidden_RTD.clone()
    found_TD = observe(worker, layer, source, release).gap_TD
    assert found_TD is not None
    lacking_TD = (kept[0].float() - kept[1].float()).view(TOKENS, HIDDEN)
    sum_T1 = observed.routing.weight_TA.float().sum(dim=1, keepdim=True)
    assert (found_TD.float() - lacking_TD / sum_T1).abs().max() < 2**-7 * lacking_TD.abs().max()
    louder = replace(release, routing=replace(observed.routing, weight_TA=2 * observed.routing.weight_TA))
    halved_TD = observe(worker, layer, source, louder).gap_TD
    assert halved_TD is not None and torch.equal(2 * halved_TD, found_TD)
    scaled_TD = observe(worker, replace(layer, tail=2.0), source, release).gap_TD  # experts' output is doubled
    assert scaled_TD is not None and torch.equal(2 * scaled_TD, found_TD)
    assert observe(worker, replace(layer, tail=None), source, release).gap_TD is None
    assert torch.equal(source.rows.hidden_RTD, kept[0]) and torch.equal(release.rows.hidden_RTD, kept[1])
    assert observe(worker, layer, source, None).gap_TD is None


def test_down_makes_up_for_what_the_rows_lack(layer: DecoderLayer, observed: Observed) -> None:
    """Router weights of a token sum to one, so each of its experts is wanted to add all of it."""
    input_TD, pairs = traffic_of(observed)
    assert observed.gap_TD is not None and observed.target_TD is not None
    weight_S = pairs.weight_S.float() * observed.importance_T[pairs.token_S]
    expert_S = torch.arange(EXPERTS).repeat_interleave(torch.tensor(pairs.offsets).diff())

    def error(told_TD: Tensor | None) -> Tensor:
        """Of the residual stream behind the layer, as far as one expert's output goes."""
        assert observed.gap_TD is not None and observed.target_TD is not None
        result = solve_with(layer, replace(observed, gap_TD=told_TD), recipe())
        assert result.gate_up_ENK is not None and result.down_ENK is not None
        hidden_SI = expert_hidden(input_TD, pairs, result.gate_up_ENK, SWIGLU).float()
        source_SI = expert_hidden(observed.target_TD, pairs, layer.stacks[0], SWIGLU).float()
        lacking_SD = observed.gap_TD[pairs.token_S].float()
        for expert in range(EXPERTS):
            own = expert_S == expert
            lacking_SD[own] += source_SI[own] @ layer.stacks[1][expert].float().T
            lacking_SD[own] -= hidden_SI[own] @ result.down_ENK[expert].float().T
        return (weight_S[:, None] * lacking_SD.square()).sum()

    assert error(observed.gap_TD) < 0.9 * error(None)


@pytest.mark.parametrize("inputs", ["host", "file"])
def test_gaps_come_from_where_inputs_lie(layer: DecoderLayer, observed: Observed, inputs: str) -> None:
    """Each chunk brings its own pairs': to the same codes."""
    found, wanted = (solve_with(layer, observed, recipe(), experts=2, inputs=place) for place in (inputs, "device"))
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


# ---- guidance


def curved(moment_DD: Tensor) -> solve.Curvature:
    return solve.Curvature(moment_DD, damping=0.05)


def guided(sites: str) -> Recipe:
    return replace(recipe(), guidance=Guidance(tokens=512, sites=sites))


@pytest.fixture(scope="module")
def curvature() -> solve.Curvature:
    """Of gradients that share directions, as those of a model do, and noise: no expert gets worse than RTN by it."""
    gradient_TD = normal(512, HIDDEN, seed=6) * torch.arange(1, HIDDEN + 1) ** -0.7 @ normal(HIDDEN, HIDDEN, seed=7)
    gradient_TD += 3 * normal(512, HIDDEN, seed=8)
    return curved(gradient_TD.T @ gradient_TD / 512)


def test_a_curvature_without_a_shape_changes_nothing(
    layer: DecoderLayer, observed: Observed, result: LayerResult
) -> None:
    found = solve_with(layer, observed, guided("down"), curvature=curved(3 * torch.eye(HIDDEN)))
    assert all(torch.equal(found.tensors[name], result.tensors[name]) for name in result.tensors)
    cost, plain = found.guided["down"]
    assert cost == pytest.approx(plain) and found.guided.keys() == {"down"} and result.guided == {}


@pytest.mark.parametrize(("sites", "changed"), [("down", ("down_proj",)), ("both", PROJECTIONS)])
def test_guidance_changes_the_sites_that_it_is_for(
    layer: DecoderLayer, observed: Observed, result: LayerResult, curvature: solve.Curvature, sites: str,
    changed: tuple[str, ...],
) -> None:  # fmt: skip
    found = solve_with(layer, observed, guided(sites), curvature=curvature)
    differing = {name.split(".")[-2] for name in result.tensors
                 if not torch.equal(found.tensors[name], result.tensors[name])}  # fmt: skip
    assert differing == set(changed)
    assert all(0.1 < cost / plain < 0.95 for cost, plain in found.guided.values())
    assert set(found.guided) == ({"down"} if sites == "down" else {"gate_up", "down"})


def test_the_gain_that_is_told_is_that_of_the_written_codes(
    layer: DecoderLayer, observed: Observed, curvature: solve.Curvature, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At down, of the expert that is judged, against the target and moments that the solve had: from float64."""
    posed: list[Any] = []
    original = site._gain

    def watch(*arguments: Any) -> Any:
        posed.append(arguments[0])
        return original(*arguments)

    monkeypatch.setattr(site, "_gain", watch)
    found = solve_with(layer, observed, guided("down"), curvature=curvature)
    down = posed[1]
    metric_NN = curvature.moment_DD.double() / curvature.moment_DD.diagonal().double().mean()
    diagonal_N = metric_NN.diagonal()
    diagonal_N += 0.05 * diagonal_N + 1e-4 * diagonal_N.median()
    error_NK = down.target_ENK[0].double() - torch.from_numpy(on_disk(found, 0, "down_proj"))
    wanted = float(torch.trace(metric_NN @ error_NK @ down.hessian_EKK[0].double() @ error_NK.T))
    assert found.guided["down"][0] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("experts", [1, 3])
def test_chunks_do_not_matter_to_guidance(
    layer: DecoderLayer, observed: Observed, curvature: solve.Curvature, experts: int
) -> None:
    whole = solve_with(layer, observed, guided("both"), curvature=curvature)
    for inputs in ("device", "host"):
        found = solve_with(layer, observed, guided("both"), experts, inputs, curvature)
        assert all(torch.equal(found.tensors[name], whole.tensors[name]) for name in whole.tensors)
        assert found.guided["down"] == pytest.approx(whole.guided["down"], rel=1e-4)


@pytest.mark.parametrize("counts", [(1, 300, 0, 33), (40, 0, 0, 0), (0, 0, 5, 0), (0, 0, 0, 0)])
def test_products_without_a_gradient_have_the_same_bits(counts: tuple[int, ...]) -> None:
    """They are made in place, an expert's rows filled up with those of the next."""
    input_TK, weight_ENK = normal(64, HIDDEN, seed=1).bfloat16(), normal(4, 96, HIDDEN, seed=2).bfloat16()
    offsets = [0, *np.cumsum(counts).tolist()]
    token_S = torch.arange(offsets[-1]) % 64
    with torch.enable_grad():
        wanted_SN = grouped_linear(input_TK, token_S, offsets, weight_ENK)
    with torch.no_grad():
        found_SN = grouped_linear(input_TK, token_S, offsets, weight_ENK)
    assert torch.equal(found_SN, wanted_SN)


def test_row_moments_are_those_of_the_neurons(layer: DecoderLayer, observed: Observed) -> None:
    """Router weights squared times importance, each pair's own expert, derivatives by autograd in float64."""
    chunk = make_chunk(observed, range(1, 4), False, "device")
    gate_up_ENK = layer.stacks[0][1:4]
    found = row_moments(chunk, gate_up_ENK)
    assert found.count_E[2] == 0 and not found.hessian_EKK[2].any()
    for place, expert in enumerate((1, 2)):
        pairs = slice(observed.pairs.offsets[expert], observed.pairs.offsets[expert + 1])
        input_SD = observed.input_TD[observed.pairs.token_S[pairs]].double()
        weight_S = observed.pairs.weight_S[pairs].double().square()
        weight_S *= observed.importance_T[observed.pairs.token_S[pairs]]
        changed_SN = neurons(input_SD, gate_up_ENK[place])
        wanted_NN = torch.einsum("s,sn,sm->nm", weight_S, changed_SN, changed_SN)
        assert (found.hessian_EKK[place] - wanted_NN).norm() < 0.01 * wanted_NN.norm()
        assert found.weight_E[place] == pytest.approx(float(weight_S.sum()), rel=1e-5)
    importance_P = observed.importance_T[:50]
    pool_ENN = row_pool(gate_up_ENK, Pool(observed.input_TD[:50], importance_P))
    changed_PN = neurons(observed.input_TD[:50].double(), gate_up_ENK[2])
    wanted_NN = (importance_P[:, None] * changed_PN).T @ changed_PN / importance_P.sum()
    assert (pool_ENN[2] - wanted_NN).norm() < 0.01 * wanted_NN.norm()


@pytest.mark.parametrize("router_weighted", [True, False])
def test_images_have_their_share_in_each_experts_moments(
    layer: DecoderLayer, observed: Observed, router_weighted: bool
) -> None:
    """In those of inputs, of rows, and in the pools; for chunks of any size. Without a share all is as it was."""
    image_T = torch.arange(TOKENS) % 5 == 0
    marked = replace(observed, image_T=image_T, image_share=0.4)
    whole = make_chunk(marked, range(EXPERTS), router_weighted, "device")
    plain = make_chunk(observed, range(EXPERTS), router_weighted, "device")
    marked_S = image_T[observed.pairs.token_S]
    for weights in ("weight_S", "row_weight_S"):
        found_S, before_S = (getattr(chunk, weights).double() for chunk in (whole, plain))
        for expert in range(3):
            pairs = slice(observed.pairs.offsets[expert], observed.pairs.offsets[expert + 1])
            share = found_S[pairs][marked_S[pairs]].sum() / found_S[pairs].sum()
            assert share.item() == pytest.approx(0.4, rel=1e-5)
            ratio_S = found_S[pairs] / before_S[pairs]
            assert all(one.std() < 1e-5 * one.mean() for one in (ratio_S[marked_S[pairs]], ratio_S[~marked_S[pairs]]))
    found = gate_up_moments(whole)
    pairs = slice(*observed.pairs.offsets[1:3])
    input_SD = observed.input_TD[observed.pairs.token_S[pairs]].double()
    wanted_DD = torch.einsum("s,sn,sm->nm", whole.weight_S[pairs].double(), input_SD, input_SD)
    assert (found.hessian_EKK[1] - wanted_DD).norm() < 0.01 * wanted_DD.norm()
    part = make_chunk(marked, range(1, 3), router_weighted, "host")
    assert torch.equal(part.weight_S, whole.weight_S[slice(*observed.pairs.offsets[1:4:2])])
    pool = random_pool(marked, TOKENS, 0, torch.device("cpu"))
    assert (pool.importance_P[image_T].sum() / pool.importance_P.sum()).item() == pytest.approx(0.4, rel=1e-5)
    pools = [gate_up_pool(alone(torch.device("cpu")), one, router_weighted) for one in (observed, marked)]
    assert not torch.equal(*pools)


def test_row_moments_are_shrunk_to_the_experts_pool(
    layer: DecoderLayer, observed: Observed, curvature: solve.Curvature, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the inputs' moments are, n0 half of the rows; random rows are all of the layer's here."""
    seen: list[Tensor] = []
    original = guidance.gate_up_metric

    def watch(down_ENK: Tensor, curvature_DD: Tensor, moment_ERR: Tensor) -> Tensor:
        seen.append(moment_ERR)
        return original(down_ENK, curvature_DD, moment_ERR)

    monkeypatch.setattr(guidance, "gate_up_metric", watch)
    solve_with(layer, observed, guided("both"), curvature=curvature)
    for expert in (1, 3):
        pairs = slice(observed.pairs.offsets[expert], observed.pairs.offsets[expert + 1])
        token_S = observed.pairs.token_S[pairs]
        changed_SN = neurons(observed.input_TD[token_S].double(), layer.stacks[0][expert]).float().numpy()
        weight_S = observed.pairs.weight_S[pairs].float().square() * observed.importance_T[token_S]
        own = reference.moments(changed_SN, weight_S.numpy())
        pool_PN, importance_P = neurons(observed.input_TD.double(), layer.stacks[0][expert]), observed.importance_T
        pool_NN = (importance_P[:, None] * pool_PN).T @ pool_PN / importance_P.sum()
        wanted_NN, _ = reference.shrink(own, pool_NN.numpy(), 0.5 * 2 * WIDTH, effective=True, trace_matched=True)
        error_NN = problems.array(seen[0][expert]) - wanted_NN
        assert np.linalg.norm(error_NN) < 0.01 * np.linalg.norm(wanted_NN), expert


def neurons(input_SD: Tensor, gate_up_NK: Tensor) -> Tensor:
    """How each neuron's output changes with its gate and its up, [S, 2I]: rows lie as those of gate_up do."""
    gate_up_SN = (input_SD @ gate_up_NK.double().T).requires_grad_()
    gate_SI, up_SI = gate_up_SN.chunk(2, dim=1)
    (changed_SN,) = torch.autograd.grad((silu(gate_SI) * up_SI).sum(), gate_up_SN)
    return changed_SN


# ---- what is not finite


@pytest.mark.parametrize("experts", [EXPERTS, 2, 1])
def test_an_error_names_the_layer_and_the_expert_itself(
    layer: DecoderLayer, observed: Observed, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the expert's place in its chunk."""
    original = solve.gate_up_moments

    def broken(chunk: Any) -> Moments:
        own: Moments = original(chunk)
        if 2 in chunk.experts:
            own.hessian_EKK[2 - chunk.experts.start, 0, 0] = torch.inf
        return own

    monkeypatch.setattr(solve, "gate_up_moments", broken)
    with pytest.raises(FourfoldError, match=r"layer 2\b.*expert 2\b.*not finite"):
        solve_with(layer, observed, recipe(), experts)
