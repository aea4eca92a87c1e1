"""What will happen, before it does: tensors claimed, shards named, memory, disk and time predicted.

From config.json, the tokenizer files and the safetensors headers alone; no weight is read. Rates of this machine are
measured elsewhere (microbenchmark.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.datatypes import Action, FourfoldError
from fourfold.model import loader
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.files import sidecars
from fourfold.quantize.advice import MORE_ROOM, headline, prediction, release_advice, run_advice, source_advice
from fourfold.quantize.claims import EMBEDDINGS, GROUPS, TensorClaim, claim_tensors
from fourfold.quantize.contamination import check_sources
from fourfold.quantize.cost import TimeEstimate, estimate_time
from fourfold.quantize.dense import DenseScheme
from fourfold.quantize.estimate import DRAFT_TOKENS, RTN_STEP, DiskPlan, Workload, plan_disk, pool_rows
from fourfold.quantize.fits import check_guidance, check_images, check_tokenizer, choose_group_size
from fourfold.quantize.footprint import BF16, attend_token_bytes, image_token_bytes
from fourfold.quantize.memory import MemoryPlan, plan_memory
from fourfold.quantize.rates import Rates
from fourfold.recipe import Recipe

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One decoder layer: all its source tensors, and the shard they become.

    kind: of attention, as config.json names it; routed: has routed experts; fused: as two stacks on disk.
    """

    index: int
    kind: str
    routed: bool
    fused: bool
    claims: tuple[TensorClaim, ...]
    shard: str

    @property
    def bytes_before(self) -> int:
        return sum(claim.header.size_bytes for claim in self.claims)

    @property
    def bytes_after(self) -> int:
        return sum(claim.bytes_after for claim in self.claims)


@dataclass(frozen=True, kw_only=True)
class RestShard:
    """A shard of tensors outside the decoder layers. A fused MTP stack is never broken over two shards."""

    shard: str
    claims: tuple[TensorClaim, ...]

    @property
    def bytes_after(self) -> int:
        return sum(claim.bytes_after for claim in self.claims)

    @property
    def is_quantized(self) -> bool:
        """Whether something in it is quantized: it is written after the layers then."""
        return any(claim.action is Action.QUANTIZE for claim in self.claims)


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One line of the plan's table. action: all that happens in the group, joined by " + "; bits: of quantized ones."""

    group: str
    action: str
    bits: tuple[int, ...]
    tensors_before: int
    tensors_after: int
    bytes_before: int
    bytes_after: int

    @property
    def what(self) -> str:
        """The action with bits: "int4 + int8 + copy"."""
        return self.action.replace(Action.QUANTIZE, " + ".join(f"int{bits}" for bits in self.bits))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole of a run.

    solve: layers to be solved, all of them but in a trial, which is `partial`: rows then go through layers
    0 to solve.stop, and only the shards of `solve` are written.
    predicted_shares: of down's error that guidance is predicted to leave, by layer, where a sweep in OUT has told it.
    """

    source: Checkpoint
    recipe: Recipe
    dense: DenseScheme
    layers: tuple[LayerPlan, ...]
    rest: tuple[RestShard, ...]
    solve: range
    partial: bool
    work: Workload
    memory: MemoryPlan
    disk: DiskPlan
    time: TimeEstimate
    run_warnings: tuple[str, ...]
    release_warnings: tuple[str, ...]
    predicted_shares: Mapping[int, float] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[LayerPlan | RestShard, ...]:
        """Every shard of the whole release, in order."""
        return (*self.layers, *self.rest)

    @property
    def claims(self) -> Iterator[TensorClaim]:
        """Every source tensor, once."""
        return (claim for part in self.parts for claim in part.claims)

    @property
    def warnings(self) -> tuple[str, ...]:
        """About the run, then about how engines will take the release."""
        return (*self.run_warnings, *self.release_warnings)

    @property
    def headline(self) -> list[tuple[str, str]]:
        """What is quantized, by what recipe, on what: (name, fact)."""
        return headline(self, None)

    @property
    def prediction(self) -> str:
        """Of what guidance leaves, for people."""
        return prediction(self.predicted_shares)

    @property
    def projections(self) -> int:
        """Expert projections that this run solves."""
        experts = (self.source.blueprint.experts[index] for index in self.solve)
        return sum(one.count * len(one.projections) for one in experts if one is not None)

    def groups(self) -> tuple[GroupRow, ...]:
        """The table of the whole model: a row for each group of tensors that it has, in a fixed order."""
        members: dict[str, list[TensorClaim]] = {}
        for claim in self.claims:
            members.setdefault(claim.group, []).append(claim)
        return tuple(_group_row(group, members[group]) for group in GROUPS if group in members)

    def timed(self, rates: Rates) -> Plan:
        """The same plan, its time at these rates."""
        time = estimate_time(self.work, self.memory.devices, rates, inputs=self.memory.inputs)
        return dataclasses.replace(self, time=time)

    def require_disk(self) -> None:
        """Raises FourfoldError if OUT's disk cannot hold what this run writes."""
        if not self.disk.enough:
            raise FourfoldError(self.disk.problem)

    def require_memory(self) -> None:
        """Raises FourfoldError if a budget cannot be kept."""
        if self.memory.problems:
            raise FourfoldError(f"--memory: {'; '.join(self.memory.problems)}. {MORE_ROOM}")

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types: bytes and seconds as numbers, an entry for each source tensor."""
        memory, disk, time = self.memory, self.disk, self.time
        return {
            "model": str(self.source.folder),
            "model_type": self.source.family.model_type,
            "source_digest": self.source.digest,
            "recipe": self.recipe.name,
            "format": self.recipe.format,
            "group_size": self.recipe.scheme.group,
            "layers": len(self.layers),
            "solve": [self.solve.start, self.solve.stop],
            "partial": self.partial,
            "projections": self.projections,
            "groups": [dataclasses.asdict(row) for row in self.groups()],
            "shards": {part.shard: part.bytes_after for part in self.parts},
            "memory": dataclasses.asdict(memory) | _figures(memory, "host_peak_bytes", "device_peak_bytes", "fits"),
            "disk": dataclasses.asdict(disk) | _figures(disk, "needed_bytes", "enough"),
            "time": dataclasses.asdict(time) | _figures(time, "seconds", "bound"),
            "warnings": list(self.warnings),
            "predicted_share": {str(layer): share for layer, share in self.predicted_shares.items()},
            "tensors": [_tensor_json(claim, part.shard) for part in self.parts for claim in part.claims],
        }


def _figures(value: object, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _tensor_json(claim: TensorClaim, shard: str) -> dict[str, Any]:
    header = claim.header
    before = _figures(header, "name", "dtype") | {
        "shape": list(header.shape),
        "bytes_before": header.size_bytes,
    }
    after = _figures(claim, "action", "reason", "group", "layer", "tensors_after", "bytes_after")
    return before | after | {"shard": shard}


def _group_row(group: str, claims: Sequence[TensorClaim]) -> GroupRow:
    return GroupRow(
        group=group,
        action=" + ".join(action for action in Action if any(claim.action is action for claim in claims)),
        bits=tuple(sorted({claim.bits for claim in claims if claim.bits})),
        tensors_before=len(claims),
        tensors_after=sum(claim.tensors_after for claim in claims),
        bytes_before=sum(claim.header.size_bytes for claim in claims),
        bytes_after=sum(claim.bytes_after for claim in claims),
    )


def make_plan(
    model: Path,
    recipe: Recipe,
    *,
    devices: Sequence[str] = ("cpu",),
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
    exchange_bytes: int = 0,
    layers: range | None = None,
    out: Path | None = None,
) -> Plan:
    """Plan a run, its time at the constants of the devices' kind (`Plan.timed`).

    devices: one for each worker, of this machine or another; memory_bytes, host_bytes, exchange_bytes: see
    memory.plan_memory (budgets are wanted for another machine's); layers: a trial on these alone.
    Raises FourfoldError, before any work, if headers and config.json disagree (all disagreements in one message), a
    group does not divide a width, the tokenizer is missing or another model's, a source of text is missing or a test
    set, or `layers` do not exist. Too little disk or memory is a warning; `Plan.require_disk` makes it an error.
    """
    check_sources(recipe)
    source = Checkpoint.open_source(model)
    solve = _layer_range(layers, source.layers)
    recipe = choose_group_size(source, recipe)
    check_guidance(source, recipe)
    check_tokenizer(model, source.vocabulary)
    check_images(source, recipe)
    layer_plans, rest = _lay_out(source, claim_tensors(source, recipe))
    partial = len(solve) < source.layers
    written: Sequence[LayerPlan | RestShard] = (*layer_plans, *rest)
    if partial:
        written = layer_plans[solve.start : solve.stop]
    dense = DenseScheme.of(source, source.headers, recipe)
    work = _workload(source, recipe, dense, layer_plans, rest, solve)
    memory = plan_memory(work, devices, memory_bytes, host_bytes, exchange_bytes)
    disk = plan_disk(
        work,
        {part.shard: part.bytes_after for part in written},
        sum(claim.tensors_after for part in written for claim in part.claims),
        sum(path.stat().st_size for path in sidecars(model)),
        out,
        memory.spilled_bytes,
    )
    return Plan(
        source=source,
        recipe=recipe,
        dense=dense,
        layers=layer_plans,
        rest=rest,
        solve=solve,
        partial=partial,
        work=work,
        memory=memory,
        disk=disk,
        time=estimate_time(work, devices, inputs=memory.inputs),
        run_warnings=(*source_advice(source), *run_advice(recipe, work, memory, disk)),
        release_warnings=tuple(release_advice(source, recipe, devices)),
    )


def _layer_range(layers: range | None, count: int) -> range:
    if layers is None:
        return range(count)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise FourfoldError(
            f"layers {layers.start}-{layers.stop - 1}: this model has layers 0-{count - 1}; name a first and "
            "a last one of them, as in 0-3"
        )
    return layers


def _lay_out(source: Checkpoint, claims: Sequence[TensorClaim]) -> tuple[tuple[LayerPlan, ...], tuple[RestShard, ...]]:
    """One shard for each decoder layer, in order, then the rest in transformers' order, up to 5 GB each."""
    by_layer: list[list[TensorClaim]] = [[] for _ in range(source.layers)]
    rest: list[list[TensorClaim]] = [[]]
    filled = 0
    for claim in claims:
        if claim.layer is not None:
            by_layer[claim.layer].append(claim)
            continue
        if rest[-1] and filled + claim.bytes_after > SHARD_BYTES:
            rest.append([])
            filled = 0
        rest[-1].append(claim)
        filled += claim.bytes_after
    total = source.layers + len(rest)
    shards = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    layers = tuple(
        LayerPlan(
            index=layer,
            kind=source.layer_kind(layer),
            routed=any(claim.is_expert for claim in own),
            fused=source.is_fused(layer),
            claims=tuple(own),
            shard=shards[layer],
        )
        for layer, own in enumerate(by_layer)
    )
    return layers, tuple(
        RestShard(shard=shard, claims=tuple(own)) for shard, own in zip(shards[len(layers) :], rest, strict=True)
    )


def _int8_shapes(layer: LayerPlan) -> list[tuple[int, ...]]:
    return [claim.header.shape for claim in layer.claims if claim.bits and not claim.is_expert]


def _rtn_windows(recipe: Recipe, windows: int, *, partial: bool) -> int:
    return -(-windows // RTN_STEP) if recipe.heldout.yardstick and not partial else 0


def _workload(
    source: Checkpoint,
    recipe: Recipe,
    dense: DenseScheme,
    layers: Sequence[LayerPlan],
    rest: Sequence[RestShard],
    solve: range,
) -> Workload:
    text, experts, solver, run = source.text, source.widest, recipe.solver, layers[: solve.stop]
    rows, length = sum(source.rows for source in recipe.calibration.sources), recipe.calibration.length
    image_rows = sum(one.rows for one in recipe.image_sources)
    image_windows = recipe.heldout.image_windows * recipe.reads_images
    windows = recipe.heldout.windows + image_windows
    guided = length * min(max(recipe.guidance.tokens // length, 1), rows) if recipe.guidance.tokens else 0
    swept = [layer.bytes_before for layer in layers] if guided else []
    kept = [claim.header.shape for layer in run for claim in layer.claims if claim.multiplies_tokens]
    ends_bytes = 2 * source.vocabulary * text.hidden_size * BF16  # embeddings, output head
    return Workload(
        hidden=experts.hidden,
        model_width=text.hidden_size,
        state_width=source.state_width,
        width=experts.width,
        experts=source.experts,
        topk=source.topk,
        vocabulary=source.vocabulary,
        calibration_tokens=rows * length,
        calibration_length=length,
        heldout_tokens=windows * recipe.heldout.length,
        heldout_length=recipe.heldout.length,
        rtn_tokens=_rtn_windows(recipe, windows, partial=len(solve) < source.layers) * recipe.heldout.length,
        image_tokens=image_rows * length + image_windows * recipe.heldout.length,
        tower_bytes=loader.tower_bytes(source.blueprint) if recipe.reads_images else 0,
        image_token_bytes=image_token_bytes(source) if recipe.reads_images else 0,
        asymmetric=solver.asymmetric,
        passes=solver.passes,
        pooled=solver.pool > 0,
        pool_rows=min(pool_rows(solver.pool_rows, experts.width), rows * length),
        guidance_tokens=guided,
        guidance_sites=recipe.guidance.sites,
        guidance_routing=bool(guided) and recipe.guidance.routing,
        swept_layers=len(swept),
        layers=len(run),
        routed_layers=sum(layer.routed for layer in run),
        solved_layers=sum(layers[index].routed for index in solve),
        full_attention_layers=sum(layer.kind != "linear_attention" for layer in run),
        attention_width=source.attention_width,
        kept_parameters=sum(math.prod(shape) for shape in kept if len(shape) == 2),
        kept_matrix=max(map(math.prod, kept)),
        kept_width=max(map(max, kept)),
        int8_weights=max(sum(map(math.prod, _int8_shapes(layer))) for layer in run),
        int8_squares=max(sum(shape[1] ** 2 for shape in _int8_shapes(layer)) for layer in run),
        int8_inputs=max((shape[1] for layer in run for shape in _int8_shapes(layer)), default=0),
        int8_head=any(claim.group == EMBEDDINGS and claim.bits for shard in rest for claim in shard.claims),
        draft_tokens=min(rows * length, DRAFT_TOKENS) if dense.draft_experts == 4 and len(solve) == len(layers) else 0,
        attend_token_bytes=attend_token_bytes(source),
        layer_bytes=max(layer.bytes_before for layer in run),
        expert_bytes=source.expert_bytes,
        shard_bytes=max(layer.bytes_after for layer in run),
        read_bytes=sum(layer.bytes_before for layer in run) + ends_bytes + 2 * sum(swept) + ends_bytes * bool(swept),
    )
