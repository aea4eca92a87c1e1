"""Moments to codes and scales for one layer, a chunk of experts at a time: gate_up, then down on its activations."""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from fourfold.core import grid, guidance, moments
from fourfold.datatypes import (
    FourfoldError,
    LayerResult,
    Method,
    Placement,
    ProjectionStatistics,
    QuantizedGroup,
    Tick,
    system_fault,
)
from fourfold.distributed.transfer import Transfer
from fourfold.distributed.workers import Worker
from fourfold.formats import named
from fourfold.formats.format import Format
from fourfold.model.layer import DecoderLayer
from fourfold.quantize.chunk import (
    Chunk,
    Pool,
    down_moments,
    down_pool,
    gate_up_moments,
    gate_up_pool,
    make_chunk,
    random_pool,
    row_moments,
    row_pool,
)
from fourfold.quantize.estimate import pool_rows
from fourfold.quantize.observe import Observed
from fourfold.quantize.site import Site, Solved, solve_site
from fourfold.recipe import Recipe, Solver

STEPS = 4  # of an expert: moments and solve at both sites
SAMPLED_EXPERTS = 1  # experts of a worker and layer that are solved without guidance too, to see what it gains


@dataclass(frozen=True)
class Curvature:
    """Second moment of the loss gradient at a layer's output, on its device. damping: of the row metrics derived from
    it.
    """

    moment_DD: Tensor
    damping: float


@dataclass(frozen=True)
class Chunking:
    """How a layer is split into chunks. experts, inputs: see Batches; stems: prefix of the tensor names, by expert and
    projection; tick: progress callback, STEPS calls for each expert.
    """

    experts: int
    inputs: Placement
    stems: Sequence[Mapping[str, str]]
    tick: Tick


class _Clock:
    def __init__(self, worker: Worker, layer: int) -> None:
        self.worker, self._layer = worker, layer
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        with self.worker.span(stage, self._layer):
            yield
        self.seconds[stage] += time.perf_counter() - start


def solve_layer(
    worker: Worker, layer: DecoderLayer, observed: Observed, recipe: Recipe, chunking: Chunking,
    curvature: Curvature | None = None,
) -> LayerResult:  # fmt: skip
    """Quantize a layer's own experts, the chunks' results put together. curvature: None without guidance.

    A device that runs out of memory goes on with chunks of half the size: the same codes, `LayerResult.chunk` says it.
    Raises FourfoldError if an expert's moments are not finite, or if one expert does not fit in memory.
    """
    clock = _Clock(worker, layer.index)
    device = layer.stacks[0].device
    with clock("moments"):
        pool_KK = gate_up_pool(worker, observed, recipe.solver.router_weighted)
    down_rows = None
    if curvature is not None:
        down_rows = guidance.factorize_rows(curvature.moment_DD[None], curvature.damping)
    job = _Job(
        layer=layer,
        observed=observed,
        recipe=recipe,
        chunking=chunking,
        clock=clock,
        pool_KK=pool_KK,
        pool=random_pool(observed, pool_rows(recipe.solver.pool_rows, layer.stacks[1].shape[2]), layer.index, device),
        curvature=curvature,
        down_rows=down_rows,
        released=(torch.empty_like(layer.stacks[0]), torch.empty_like(layer.stacks[1])),
    )
    whole = Part({}, [], {})
    first, size = 0, chunking.experts
    while first < len(layer.owned):
        experts = range(first, min(first + size, len(layer.owned)))
        part = _within_memory(job, experts)
        if part is None:
            size = _halved(size, worker, layer.index)
            continue
        whole += part
        first = experts.stop
    worker.transfer.synchronize()
    each = sum(clock.seconds.values()) / max(len(whole.rows), 1)
    rows = tuple(dataclasses.replace(row, seconds=each) for row in whole.rows)
    return LayerResult(whole.tensors, *job.released, rows, dict(clock.seconds), size, whole.guided)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all chunks of a layer share. released: the layer's stacks, filled chunk by chunk."""

    layer: DecoderLayer
    observed: Observed
    recipe: Recipe
    chunking: Chunking
    clock: _Clock
    pool_KK: Tensor
    pool: Pool
    curvature: Curvature | None
    down_rows: guidance.RowFactor | None
    released: tuple[Tensor, Tensor]


Guided = dict[str, tuple[float, float]]  # Solved.guided by site


@dataclass(frozen=True)
class Part:
    """Results of some experts or of one of their sites: see LayerResult."""

    tensors: dict[str, Tensor]
    rows: list[ProjectionStatistics]
    guided: Guided

    def __add__(self, other: Part) -> Part:
        return Part(self.tensors | other.tensors, self.rows + other.rows, add_guided(self.guided, other.guided))


def add_guided(first: Guided, second: Guided) -> Guided:
    """Add the error costs with and without guidance, by site."""
    sites = dict.fromkeys([*first, *second])
    pairs = {site: (first.get(site, (0.0, 0.0)), second.get(site, (0.0, 0.0))) for site in sites}
    return {site: (one[0] + two[0], one[1] + two[1]) for site, (one, two) in pairs.items()}


def _within_memory(job: _Job, experts: range) -> Part | None:
    """A chunk's results, or None where the device has too little memory for it."""
    try:
        return _solve_chunk(job, experts)
    except RuntimeError as error:
        if not system_fault(error):
            raise
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


def _solve_chunk(job: _Job, experts: range) -> Part:
    """Codes and scales of a chunk of experts: gate_up first, as down is solved on the outputs of the quantized one."""
    beat = job.clock.worker.heartbeat
    chunk = make_chunk(job.observed, experts, job.recipe.solver.router_weighted, job.chunking.inputs, beat)
    return solve_gate_up(job, chunk) + solve_down(job, chunk)


def solve_gate_up(job: _Job, chunk: Chunk) -> Part:
    """Quantize gate and up of a chunk, which share their inputs."""
    stack_ENK, place = job.layer.stacks[0], chunk.place
    with job.clock("moments"):
        site = Site(
            name="gate_up",
            projections=job.layer.projections[:-1],
            weight_ENK=stack_ENK[place].float(),
            moments=gate_up_moments(chunk),
            pool_EKK=job.pool_KK,
            calibration_tokens=len(job.observed.input_TD),
            rows=_gate_up_rows(job, chunk),
            sampled_experts=_sampled_experts(chunk),
        )
    return _solve_site(job, chunk, site, job.released[0])


def solve_down(job: _Job, chunk: Chunk) -> Part:
    """Quantize down of a chunk."""
    stack_ENK, place = job.layer.stacks[1], chunk.place
    gate_up_ENK = (job.released if job.recipe.solver.asymmetric else job.layer.stacks)[0][place]
    with job.clock("moments"):
        site = Site(
            name="down",
            projections=job.layer.projections[-1:],
            weight_ENK=stack_ENK[place].float(),
            moments=down_moments(chunk, job.layer, gate_up_ENK),
            pool_EKK=down_pool(job.layer, gate_up_ENK, job.pool),
            calibration_tokens=len(job.observed.input_TD),
            rows=job.down_rows,
            sampled_experts=_sampled_experts(chunk),
        )
    return _solve_site(job, chunk, site, job.released[1])


def _sampled_experts(chunk: Chunk) -> int:
    return max(min(SAMPLED_EXPERTS, chunk.experts.stop) - chunk.experts.start, 0)


def _solve_site(job: _Job, chunk: Chunk, site: Site, released_ENK: Tensor) -> Part:
    """released_ENK: of all the layer's experts; the chunk's are written there."""
    layer, format, experts = job.layer, named(job.recipe.format), job.layer.owned[chunk.place]
    job.chunking.tick(len(experts))
    with job.clock("solve"):
        with _named_experts(layer, chunk.place):
            solved = solve_site(site, job.recipe)
        packed = _pack(solved.group, site.projections, format)
        released_ENK[chunk.place] = _unpack(packed, format).to(released_ENK.dtype)
        part = Part(
            _named(job.chunking.stems, experts, packed, job.clock.worker.transfer),
            list(_statistics(layer.index, experts, site.projections, solved, job.recipe.solver)),
            {} if site.rows is None else {site.name: solved.guided},
        )
    job.chunking.tick(len(experts))
    return part


def _gate_up_rows(job: _Job, chunk: Chunk) -> guidance.RowFactor | None:
    """The metric of the rows of a chunk's gate_up, None where only down is guided."""
    curvature, solver = job.curvature, job.recipe.solver
    if curvature is None or job.recipe.guidance.sites == "down":
        return None
    gate_up_ENK, down_ENK = (stack[chunk.place] for stack in job.layer.stacks)
    own, pool_ERR = row_moments(chunk, gate_up_ENK), row_pool(gate_up_ENK, job.pool)
    n0 = solver.pool * gate_up_ENK.shape[1]
    with _named_experts(job.layer, chunk.place):
        moment_ERR, _ = moments.shrink(
            own, pool_ERR, n0, effective=solver.effective_tokens, trace_matched=solver.trace_matched
        )
        metric_ERR = guidance.gate_up_metric(down_ENK.float(), curvature.moment_DD, moment_ERR)
        return guidance.factorize_rows(metric_ERR, curvature.damping)


def join_results(parts: Sequence[LayerResult]) -> LayerResult:
    """What all workers made of a layer, for the disk: tensors and rows together, the seconds of the slowest."""
    tensors: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for part in parts:
        tensors |= part.tensors
        seconds |= {stage: max(spent, seconds.get(stage, 0.0)) for stage, spent in part.seconds.items()}
    rows = sorted((row for part in parts for row in part.projections), key=lambda row: row.expert)
    guided: Guided = reduce(add_guided, (part.guided for part in parts))
    return LayerResult(tensors, None, None, tuple(rows), seconds, min(part.chunk for part in parts), guided)


@contextmanager
def _named_experts(layer: DecoderLayer, place: slice) -> Iterator[None]:
    """Moments that are not finite as an error that names layer and expert."""
    try:
        yield
    except moments.NotFinite as error:
        named = moments.NotFinite(layer.owned[place][error.expert])
        raise FourfoldError(f"layer {layer.index}, {named}") from None


def _pack(group: QuantizedGroup, projections: tuple[str, ...], format: Format) -> dict[str, dict[str, Tensor]]:
    """A site's stack as the release stores it: projection -> tensor suffix -> [E, ...]."""
    count = len(projections)
    codes, scales = group.codes_ENK.chunk(count, dim=1), group.scale_ENG.chunk(count, dim=1)
    return {
        projection: format.pack(QuantizedGroup(codes_ENK, scale_ENG))
        for projection, codes_ENK, scale_ENG in zip(projections, codes, scales, strict=True)
    }


def _unpack(packed: dict[str, dict[str, Tensor]], format: Format) -> Tensor:
    """The weights [E, N, K] that an engine multiplies by, from the packed tensors themselves; fp32."""
    groups = [format.unpack(tensors) for tensors in packed.values()]
    return torch.cat([grid.dequantize(group.codes_ENK, group.scale_ENG) for group in groups], dim=1)


def _named(
    stems: Sequence[Mapping[str, str]], experts: Sequence[int], packed: dict[str, dict[str, Tensor]], link: Transfer
) -> dict[str, Tensor]:
    """Final names: `...mlp.experts.E.gate_proj.weight_packed` and so on; on the host when the link is settled."""
    return {
        f"{stems[expert][projection]}{suffix}": tensor
        for projection, tensors in packed.items()
        for suffix, stacked in tensors.items()
        for expert, tensor in zip(experts, link.to_host(stacked), strict=True)
    }


def _statistics(
    layer: int, experts: Sequence[int], projections: tuple[str, ...], solved: Solved, solver: Solver
) -> Iterator[ProjectionStatistics]:
    """Rows of the log; the stack's output rows are shared out among its projections."""
    width = solved.error_EN.shape[1] // len(projections)
    sums = [values_EN.unflatten(1, (-1, width)).sum(dim=2).tolist()
            for values_EN in (solved.error_EN, solved.weight_EN, solved.proxy_EN)]  # fmt: skip
    sums += [solved.energy_EP.tolist(), solved.over_rtn_EP.tolist()]
    scale_EPS = solved.group.scale_ENG.unflatten(1, (-1, width)).flatten(2)
    least, most = scale_EPS.abs().amin(dim=2).tolist(), scale_EPS.abs().amax(dim=2).tolist()
    negative = (scale_EPS < 0).float().mean(dim=2).tolist()
    level, tokens = solved.level_E.tolist(), solved.tokens_E.tolist()
    effective, damping = solved.effective_E.tolist(), solved.damping_E.tolist()
    for place, expert in enumerate(experts):
        method = solved.methods[place]
        for part, projection in enumerate(projections):
            error, weight, proxy, energy, over_rtn = (values[place][part] for values in sums)
            loss = (proxy + 0.05 * level[place] * error) / tokens[place] if tokens[place] else None
            yield ProjectionStatistics(
                layer=layer,
                expert=expert,
                projection=projection,
                method=method,
                weight_error=(error / weight) ** 0.5 if weight else 0.0,
                relative_error=max(proxy, 0.0) / energy if energy > 0 else 0.0,
                error_over_rtn=over_rtn,
                target=solved.targets[place],
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
