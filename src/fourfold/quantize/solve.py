"""Moments to codes and scales for one layer, a chunk of experts at a time: gate_up, then down on its activations."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import gptq, grid, metrics, moments, pack
from fourfold.datatypes import FourfoldError, LayerResult, Method, Moments, ProjectionStatistics, QuantizedGroup, Tick
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.layer import DecoderLayer
from fourfold.quantize.observe import (
    Observed,
    down_moments,
    down_pool,
    gate_up_moments,
    gate_up_pool,
    make_chunk,
    random_tokens,
)
from fourfold.quantize.workers import Worker
from fourfold.recipe import Recipe, Solver

RETRIES = {"diagonal": (0.1, 0.2, 0.5, 1.0), "mean": tuple(0.01 * step for step in range(6, 101))}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input site of a chunk of experts: the stack of projections that share it, and what is known of its inputs.

    weight_ENK: the source's BF16 values in fp32; pool_EKK: [K, K] or [E, K, K]; calibration_tokens: of the whole run.
    """

    projections: tuple[str, ...]
    weight_ENK: Tensor
    moments: Moments
    pool_EKK: Tensor
    calibration_tokens: int


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A site's codes and scales, and for the log what is known per expert, and per row of the stack."""

    group: QuantizedGroup
    error_EN: Tensor  # |W - Wq|^2 of each row
    weight_EN: Tensor  # |W|^2
    proxy_EN: Tensor  # its share of tr(Err H Err^T), H the expert's own mean, undamped
    energy_EP: Tensor  # tr(W H W^T) of each of its P projections
    level_E: Tensor  # mean of diag H
    tokens_E: Tensor
    effective_E: Tensor
    damping_E: Tensor
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Chunking:
    """experts, inputs: see Batches; prefix: of the experts' final tensor names; tick: is told of solved experts."""

    experts: int
    inputs: str
    prefix: str
    tick: Tick


class _Clock:
    def __init__(self, worker: Worker, layer: int) -> None:
        self._worker, self._layer = worker, layer
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        with self._worker.span(stage, self._layer):
            yield
        self.seconds[stage] += time.perf_counter() - start


def solve_layer(
    worker: Worker, layer: DecoderLayer, observed: Observed, recipe: Recipe, chunking: Chunking
) -> LayerResult:
    """Quantize a layer's own experts, the chunks' results put together.

    A device that runs out of memory goes on with chunks of half the size: the same codes, `LayerResult.chunk` says it.
    Raises FourfoldError naming the layer and the expert whose moments are not finite, and where one is too many.
    """
    clock = _Clock(worker, layer.index)
    tokens, device = len(observed.input_TD), layer.stacks[0].device
    token_P = random_tokens(tokens, recipe.solver.pool_rows, seed=layer.index).to(observed.input_TD.device)
    with clock("moments"):
        pool_KK = gate_up_pool(worker, observed, recipe.solver.router_weighted)
    job = _Job(
        layer=layer,
        observed=observed,
        recipe=recipe,
        chunking=chunking,
        clock=clock,
        pool_KK=pool_KK,
        pool_PD=observed.input_TD[token_P].to(device),
        released=(torch.empty_like(layer.stacks[0]), torch.empty_like(layer.stacks[1])),
    )
    tensors: dict[str, Tensor] = {}
    rows: list[ProjectionStatistics] = []
    first, size = 0, chunking.experts
    while first < len(layer.owned):
        places = range(first, min(first + size, len(layer.owned)))
        solved = _within_memory(job, places)
        if solved is None:
            size = _halved(size, worker, layer.index)
            continue
        tensors |= solved[0]
        rows += solved[1]
        first = places.stop
        chunking.tick(len(places))
    each = sum(clock.seconds.values()) / max(len(rows), 1)
    rows = [dataclasses.replace(row, seconds=each) for row in rows]
    return LayerResult(tensors, *job.released, tuple(rows), dict(clock.seconds), size)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all chunks of a layer share. released: the layer's stacks, filled chunk by chunk."""

    layer: DecoderLayer
    observed: Observed
    recipe: Recipe
    chunking: Chunking
    clock: _Clock
    pool_KK: Tensor
    pool_PD: Tensor
    released: tuple[Tensor, Tensor]


Part = tuple[dict[str, Tensor], list[ProjectionStatistics]]


def _within_memory(job: _Job, places: range) -> Part | None:
    """A chunk's results, or None where the device has too little memory for it."""
    try:
        return _solve_chunk(job, places)
    except torch.OutOfMemoryError:
        return None  # what the chunk held goes with this frame's traceback


def _halved(size: int, worker: Worker, layer: int) -> int:
    if size == 1:
        raise FourfoldError(
            f"layer {layer}: one expert's moments and solve are too much for the free memory of {worker.device}; end "
            "what else runs on it, or take --memory with less than is free, so that batches are smaller"
        )
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()
    return size // 2


def _solve_chunk(job: _Job, places: range) -> Part:
    """Codes of a chunk of experts: gate_up, then down on what the released gate_up puts out."""
    layer, solver, clock = job.layer, job.recipe.solver, job.clock
    place, experts = slice(places.start, places.stop), layer.owned[places.start : places.stop]
    tensors: dict[str, Tensor] = {}
    rows: list[ProjectionStatistics] = []
    chunk = make_chunk(job.observed, places, solver.router_weighted, job.chunking.inputs)
    for which, projections in enumerate(((GATE, UP), (DOWN,))):
        with clock("moments"):
            if which == 0:
                site_moments, pool_EKK = gate_up_moments(chunk), job.pool_KK
            else:
                used_ENK = (job.released if solver.asymmetric else layer.stacks)[0][place]
                site_moments = down_moments(chunk, layer, used_ENK)
                pool_EKK = down_pool(layer, used_ENK, job.pool_PD)
        with clock("solve"):
            site = Site(
                projections=projections,
                weight_ENK=layer.stacks[which][place].float(),
                moments=site_moments,
                pool_EKK=pool_EKK,
                calibration_tokens=len(job.observed.input_TD),
            )
            solved = _solve_named(site, job.recipe, layer.index, experts)
            packed = _pack(solved.group, projections, job.recipe.format)
            released_ENK = job.released[which]
            released_ENK[place] = _unpack(packed, job.recipe.format).to(released_ENK.dtype)
            tensors |= _named(job.chunking.prefix, experts, packed)
            rows += _statistics(layer.index, experts, projections, solved, solver)
    return tensors, rows


def join_results(parts: Sequence[LayerResult]) -> LayerResult:
    """What all workers made of a layer, for the disk: tensors and rows together, the seconds of the slowest."""
    tensors: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        tensors |= part.tensors
        seconds |= {stage: max(spent, seconds.get(stage, 0.0)) for stage, spent in part.seconds.items()}
    rows = sorted((row for part in parts for row in part.projections), key=lambda row: row.expert)
    return LayerResult(tensors, None, None, tuple(rows), seconds, min(part.chunk for part in parts))


def _solve_named(site: Site, recipe: Recipe, layer: int, experts: Sequence[int]) -> Solved:
    try:
        return solve_site(site, recipe)
    except moments.NotFinite as error:
        named = moments.NotFinite(experts[error.expert])
        raise FourfoldError(f"layer {layer}, {named}") from None


def solve_site(site: Site, recipe: Recipe) -> Solved:
    """Codes and scales of one site's stack, by the recipe. docs/numerics.md."""
    solver, scheme = recipe.solver, recipe.scheme
    weight_ENK, size = site.weight_ENK, scheme.group_size
    n0 = solver.pool * weight_ENK.shape[-1]
    hessian_EKK, effective_E = moments.shrink(
        site.moments, site.pool_EKK, n0, effective=solver.effective_tokens, trace_matched=solver.trace_matched
    )
    damping = gptq.Damping(
        delta=solver.damp, kind=solver.damp_kind, floor=solver.damp_floor, retries=RETRIES[solver.damp_kind]
    )
    factor = gptq.factorize_(hessian_EKK, damping, solver.order, size)
    target_ENK = weight_ENK
    if site.moments.cross_EKK is not None and solver.alpha:
        cross_EKK = moments.shrink_cross(site.moments, effective_E, n0)
        target_ENK = gptq.retarget(weight_ENK, cross_EKK, factor, solver.alpha)
        del cross_EKK
    if solver.scale == "search":
        conditional = solver.scale_weights == "conditional"
        importance_EK = factor.natural_pivot() if conditional else hessian_EKK.diagonal(dim1=-2, dim2=-1)
        search = grid.ScaleSearch(low=solver.scale_low, high=solver.scale_high, steps=solver.scale_steps,
                                  signed=scheme.signed, dtype=scheme.scale_dtype)  # fmt: skip
        scale_ENG = grid.search_scales(target_ENK, importance_EK, size, search)
    else:
        scale_ENG = grid.absmax_scales(target_ENK, size, scheme.scale_dtype)
    codes_ENK = gptq.solve_codes(target_ENK, scale_ENG, factor)
    if solver.passes:
        refit = gptq.Refit(dtype=scheme.scale_dtype, signed=scheme.signed) if solver.refine_scales else None
        codes_ENK, scale_ENG = gptq.refine(target_ENK, codes_ENK, scale_ENG, hessian_EKK, solver.passes, refit)
    methods = [Method.DIAGONAL if failed else Method.GPTQ for failed in factor.diagonal_E.tolist()]
    group = QuantizedGroup(codes_ENK, scale_ENG)
    del hessian_EKK
    if solver.fallback_share:
        rounded_E = site.moments.count_E < solver.fallback_share * site.calibration_tokens
        group, methods = _round_few(group, weight_ENK, rounded_E, methods, scheme.scale_dtype)
    return _judge(site, group, factor.delta_E, effective_E, tuple(methods))


def _round_few(
    group: QuantizedGroup, weight_ENK: Tensor, rounded_E: Tensor, methods: list[Method], scale_dtype: str
) -> tuple[QuantizedGroup, list[Method]]:
    """Round to nearest the experts that the recipe's fallback rule names."""
    size = weight_ENK.shape[-1] // group.scale_ENG.shape[-1]
    scale_ENG = grid.absmax_scales(weight_ENK, size, scale_dtype)
    codes_ENK = grid.round_to_nearest(weight_ENK, scale_ENG)
    where_E11 = rounded_E[:, None, None]
    rounded = QuantizedGroup(
        torch.where(where_E11, codes_ENK, group.codes_ENK), torch.where(where_E11, scale_ENG, group.scale_ENG)
    )
    return rounded, [Method.RTN if few else method for few, method in zip(rounded_E.tolist(), methods, strict=True)]


def _judge(
    site: Site, group: QuantizedGroup, damping_E: Tensor, effective_E: Tensor, methods: tuple[Method, ...]
) -> Solved:
    """Errors against the source weights, with each expert's own mean moments (the pool where no token came)."""
    weight_ENK, own = site.weight_ENK, site.moments
    error_ENK = weight_ENK - grid.dequantize(group.codes_ENK, group.scale_ENG)
    unseen = (own.weight_E == 0).nonzero().flatten().tolist()
    hessian_EKK, share_E = own.hessian_EKK, 1 / own.weight_E.where(own.weight_E > 0, 1.0)
    if unseen:
        hessian_EKK = hessian_EKK.clone()
        hessian_EKK[unseen] = site.pool_EKK.expand_as(hessian_EKK)[unseen]
    projection_EPNK = weight_ENK.unflatten(1, (len(site.projections), -1))
    return Solved(
        group=group,
        error_EN=error_ENK.square().sum(dim=-1),
        weight_EN=weight_ENK.square().sum(dim=-1),
        proxy_EN=metrics.proxy_rows(error_ENK, hessian_EKK) * share_E[:, None],
        energy_EP=metrics.energy(projection_EPNK, hessian_EKK) * share_E[:, None],
        level_E=hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(dim=-1) * share_E,
        tokens_E=own.count_E,
        effective_E=effective_E,
        damping_E=damping_E,
        methods=methods,
    )


def _pack(group: QuantizedGroup, projections: tuple[str, ...], format: str) -> dict[str, dict[str, Tensor]]:
    """A site's stack as the release stores it: projection -> tensor suffix -> [E, ...]."""
    count = len(projections)
    codes, scales = group.codes_ENK.chunk(count, dim=1), group.scale_ENG.chunk(count, dim=1)
    return {
        projection: pack.pack(QuantizedGroup(*part), format)
        for projection, *part in zip(projections, codes, scales, strict=True)
    }


def _unpack(packed: dict[str, dict[str, Tensor]], format: str) -> Tensor:
    """The weights [E, N, K] that an engine multiplies by, from the packed tensors themselves; fp32."""
    groups = [pack.unpack(tensors, format) for tensors in packed.values()]
    return torch.cat([grid.dequantize(group.codes_ENK, group.scale_ENG) for group in groups], dim=1)


def _named(prefix: str, experts: Sequence[int], packed: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Final names, on the host: `...mlp.experts.E.gate_proj.weight_packed` and so on."""
    return {
        f"{prefix}{expert}.{projection}.{suffix}": tensor
        for projection, tensors in packed.items()
        for suffix, stacked in tensors.items()
        for expert, tensor in zip(experts, stacked.cpu(), strict=True)
    }


def _statistics(
    layer: int, experts: Sequence[int], projections: tuple[str, ...], solved: Solved, solver: Solver
) -> Iterator[ProjectionStatistics]:
    """Rows of the log; the stack's output rows are shared out among its projections."""
    width = solved.error_EN.shape[1] // len(projections)
    sums = [values_EN.unflatten(1, (-1, width)).sum(dim=2).tolist()
            for values_EN in (solved.error_EN, solved.weight_EN, solved.proxy_EN)]  # fmt: skip
    sums.append(solved.energy_EP.tolist())
    scale_EPS = solved.group.scale_ENG.unflatten(1, (-1, width)).flatten(2)
    least, most = scale_EPS.abs().amin(dim=2).tolist(), scale_EPS.abs().amax(dim=2).tolist()
    negative = (scale_EPS < 0).float().mean(dim=2).tolist()
    level, tokens = solved.level_E.tolist(), solved.tokens_E.tolist()
    effective, damping = solved.effective_E.tolist(), solved.damping_E.tolist()
    for place, expert in enumerate(experts):
        method = solved.methods[place]
        for part, projection in enumerate(projections):
            error, weight, proxy, energy = (values[place][part] for values in sums)
            loss = (proxy + 0.05 * level[place] * error) / tokens[place] if tokens[place] else None
            yield ProjectionStatistics(
                layer=layer,
                expert=expert,
                projection=projection,
                method=method,
                weight_error=(error / weight) ** 0.5 if weight else 0.0,
                relative_error=max(proxy, 0.0) / energy if energy > 0 else 0.0,
                gptqmodel_loss=loss,
                tokens=tokens[place],
                effective_tokens=effective[place],
                damping=damping[place],
                passes=0 if method is Method.RTN else solver.passes,
                scale_min=least[place][part],
                scale_max=most[place][part],
                scale_negative_share=negative[place][part],
                seconds=0.0,
            )
