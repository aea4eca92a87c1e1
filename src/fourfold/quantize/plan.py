"""What will happen, before it does: every tensor claimed, shards named, memory, disk and time predicted.

From config.json, the tokenizer files and the safetensors headers alone; no weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fourfold.core.pack import tensor_shapes
from fourfold.datatypes import Action, FourfoldError, TensorHeader
from fourfold.model.checkpoint import DTYPES, SIDECARS, TensorIndex
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.estimate import (
    BF16,
    FP32,
    DiskPlan,
    MemoryPlan,
    TimeEstimate,
    Workload,
    check_device,
    estimate_time,
    plan_disk,
    plan_memory,
)
from fourfold.recipe import Recipe

SHARD_BYTES = 5 * 10**9
TENSOR_PARALLEL = (1, 2, 4, 8)
KEPT_DTYPES = ("BF16", "F32", "F16")
GROUPS = ("experts", "attention", "linear attention", "router", "shared experts", "dense MLP", "MTP", "vision",
          "embeddings", "norms", "buffers")
NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One decoder layer: all its source tensors, and the shard they become.

    kind: of attention, as config.json names it; routed: has routed experts; fused: they lie on disk as two stacks.
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


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One line of the plan's table; action: all that happens in the group, joined by " + "."""

    group: str
    action: str
    tensors_before: int
    tensors_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole of a run. solve: the layers to be solved, fewer than there are in a trial, which is then `partial`:
    rows go through layers 0 to solve.stop, and only the shards of `solve` are written.
    """

    skeleton: Skeleton
    index: TensorIndex
    recipe: Recipe
    layers: tuple[LayerPlan, ...]
    rest: tuple[RestShard, ...]
    solve: range
    partial: bool
    memory: MemoryPlan
    disk: DiskPlan
    time: TimeEstimate
    warnings: tuple[str, ...]

    @property
    def claims(self) -> Iterator[TensorClaim]:
        """Every source tensor, once, in the order of the shards."""
        return chain.from_iterable(part.claims for part in (*self.layers, *self.rest))

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(part.shard for part in (*self.layers, *self.rest))

    @property
    def projections(self) -> int:
        """Expert projections that this run solves."""
        routed = sum(self.layers[index].routed for index in self.solve)
        return routed * self.skeleton.experts * 3

    def groups(self) -> tuple[GroupRow, ...]:
        """The table: a row for each group of tensors that the checkpoint has, in a fixed order."""
        members: dict[str, list[TensorClaim]] = {}
        for claim in self.claims:
            members.setdefault(claim.group, []).append(claim)
        return tuple(_group_row(group, members[group]) for group in sorted(members, key=GROUPS.index))

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types. Bytes and seconds as numbers, one entry for each source tensor."""
        memory, disk, time = self.memory, self.disk, self.time
        return {
            "model": str(self.index.folder),
            "model_type": self.skeleton.family.model_type,
            "source_digest": self.index.digest,
            "recipe": self.recipe.name,
            "format": self.recipe.format,
            "group_size": self.recipe.scheme.group_size,
            "layers": len(self.layers),
            "solve": [self.solve.start, self.solve.stop],
            "partial": self.partial,
            "projections": self.projections,
            "groups": [dataclasses.asdict(row) for row in self.groups()],
            "shards": {part.shard: part.bytes_after for part in (*self.layers, *self.rest)},
            "memory": dataclasses.asdict(memory) | {"host_peak_bytes": memory.host_peak_bytes, "fits": memory.fits,
                                                    "device_peak_bytes": memory.device_peak_bytes},
            "disk": dataclasses.asdict(disk) | {"needed_bytes": disk.needed_bytes, "enough": disk.enough},
            "time": dataclasses.asdict(time) | {"pflop": time.pflop, "compute_seconds": time.compute_seconds,
                                                "seconds": time.seconds},
            "warnings": list(self.warnings),
            "tensors": [_claim_json(claim, part.shard) for part in (*self.layers, *self.rest) for claim in part.claims],
        }


def make_plan(
    model: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    layers: range | None = None,
    out: Path | None = None,
) -> Plan:
    """Plan a run. memory_bytes: budget of the device, what is free now if None; layers: a trial on these alone.

    Raises FourfoldError, before any work, if headers and config.json disagree (every kind of disagreement in one
    message), a group does not divide a width, the tokenizer is missing, or `layers` or `device` do not exist.
    A lack of disk or memory is a warning here; `quantize` refuses to start on `not plan.disk.enough`.
    """
    check_device(device)
    skeleton, index = Skeleton.open(model), TensorIndex.open(model)
    solve = _layer_range(layers, skeleton.layers)
    _check_widths(skeleton, recipe)
    _check_tokenizer(model, int(skeleton.text.vocab_size))
    layer_plans, rest = _lay_out(skeleton, claim_tensors(skeleton, index, recipe), set(index.headers))
    partial = solve != range(skeleton.layers)
    written = layer_plans[solve.start : solve.stop] if partial else (*layer_plans, *rest)
    work = _workload(skeleton, recipe, layer_plans, solve, written)
    memory = plan_memory(work, device, memory_bytes)
    disk = plan_disk(
        {part.shard: part.bytes_after for part in written},
        sum(claim.tensors_after for part in written for claim in part.claims),
        sum((model / name).stat().st_size for name in SIDECARS if (model / name).is_file()),
        out,
    )
    warnings = (*_release_warnings(skeleton, index, recipe), *_run_warnings(work, memory, disk))
    return Plan(skeleton=skeleton, index=index, recipe=recipe, layers=layer_plans, rest=rest, solve=solve,
                partial=partial, memory=memory, disk=disk, time=estimate_time(work, device), warnings=warnings)


# --- checks before the headers -----------------------------------------------------------------------------------


def _layer_range(layers: range | None, count: int) -> range:
    if layers is None:
        return range(count)
    if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
        raise FourfoldError(f"layers {layers.start}-{layers.stop - 1}: this model has layers 0-{count - 1}; "
                            "name a first and a last one of them")
    return layers


def _check_widths(skeleton: Skeleton, recipe: Recipe) -> None:
    """Group size against both input widths of the experts, and against packing eight codes to a word."""
    if not any(skeleton.is_routed(layer) for layer in range(skeleton.layers)):
        raise FourfoldError("config.json: no layer has routed experts, so there is nothing to quantize; "
                            "fourfold is for Mixture-of-Experts models")
    size = recipe.scheme.group_size
    for name, width in (("hidden_size", skeleton.text.hidden_size),
                        ("moe_intermediate_size", skeleton.text.moe_intermediate_size)):
        if size <= 0 or width % size:
            fitting = [group for group in (128, 64, 32) if not width % group]
            advice = f"try scheme.group_size = {fitting[0]}" if fitting else "no group of 128, 64 or 32 divides it"
            raise FourfoldError(f"scheme.group_size = {size} does not divide {name} = {width}: {advice}")


def _check_tokenizer(folder: Path, vocabulary: int) -> None:
    """There is a tokenizer, and it gives no id that the embedding lacks."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return
        raise FourfoldError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt; calibration text cannot "
                            "be tokenized. Copy the tokenizer files of the model into the folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocab = content["model"]["vocab"]
        ids = [*(vocab.values() if isinstance(vocab, dict) else range(len(vocab))),
               *(token["id"] for token in content.get("added_tokens") or ())]
        largest = max(ids)
    except (ValueError, KeyError, TypeError) as error:
        raise FourfoldError(f"{path}: not a tokenizer as the tokenizers library writes it ({error!r})") from None
    if largest >= vocabulary:
        raise FourfoldError(f"{path}: token id {largest}, but config.json's vocab_size is {vocabulary}; "
                            "the tokenizer is another model's")


# --- shards ------------------------------------------------------------------------------------------------------


def _lay_out(
    skeleton: Skeleton, claims: Sequence[TensorClaim], names: set[str]
) -> tuple[tuple[LayerPlan, ...], tuple[RestShard, ...]]:
    """One shard for each decoder layer, in order, then the rest, filled in order up to 5 GB each."""
    of_layer: list[list[TensorClaim]] = [[] for _ in range(skeleton.layers)]
    rest: list[list[TensorClaim]] = []
    filled = SHARD_BYTES
    for claim in claims:
        if claim.layer is not None:
            of_layer[claim.layer].append(claim)
            continue
        if filled + claim.bytes_after > SHARD_BYTES:
            rest.append([])
            filled = 0
        rest[-1].append(claim)
        filled += claim.bytes_after
    total = skeleton.layers + len(rest)
    shards = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    layers = tuple(
        LayerPlan(
            index=layer,
            kind=skeleton.layer_kind(layer),
            routed=skeleton.is_routed(layer),
            fused=skeleton.is_routed(layer) and is_fused(names, skeleton.family.experts_prefix(layer)),
            claims=tuple(of_layer[layer]),
            shard=shards[layer],
        )
        for layer in range(skeleton.layers)
    )
    return layers, tuple(RestShard(shard=shard, claims=tuple(part))
                         for shard, part in zip(shards[skeleton.layers :], rest, strict=True))


def _group_row(group: str, claims: Sequence[TensorClaim]) -> GroupRow:
    return GroupRow(
        group=group,
        action=" + ".join(action for action in Action if any(claim.action is action for claim in claims)),
        tensors_before=len(claims),
        tensors_after=sum(claim.tensors_after for claim in claims),
        bytes_before=sum(claim.header.size_bytes for claim in claims),
        bytes_after=sum(claim.bytes_after for claim in claims),
    )


def _claim_json(claim: TensorClaim, shard: str) -> dict[str, Any]:
    return {
        "name": claim.header.name,
        "dtype": claim.header.dtype,
        "shape": list(claim.header.shape),
        "action": claim.action.value,
        "reason": claim.reason,
        "group": claim.group,
        "layer": claim.layer,
        "shard": shard,
        "tensors_after": claim.tensors_after,
        "bytes_before": claim.header.size_bytes,
        "bytes_after": claim.bytes_after,
    }


# --- sizes -------------------------------------------------------------------------------------------------------


def _workload(
    skeleton: Skeleton, recipe: Recipe, layers: Sequence[LayerPlan], solve: range, written: Sequence[LayerPlan | RestShard]
) -> Workload:
    text, solver, run = skeleton.text, recipe.solver, layers[: solve.stop]
    hidden, width, experts = text.hidden_size, text.moe_intermediate_size, skeleton.experts
    head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    rows = sum(source.rows for source in recipe.calibration.sources)
    return Workload(
        hidden=hidden,
        width=width,
        experts=experts,
        topk=text.num_experts_per_tok,
        vocabulary=text.vocab_size,
        calibration_tokens=rows * recipe.calibration.length,
        calibration_length=recipe.calibration.length,
        heldout_tokens=recipe.heldout.windows * recipe.heldout.length,
        heldout_length=recipe.heldout.length,
        asymmetric=solver.asymmetric,
        group_size=recipe.scheme.group_size,
        candidates=solver.scale_steps * (2 if recipe.scheme.signed else 1) if solver.scale == "search" else 1,
        passes=solver.passes,
        pooled=solver.pool > 0,
        pool_rows=solver.pool_rows,
        layers=len(run),
        routed_layers=sum(layer.routed for layer in run),
        solved_layers=sum(layers[index].routed for index in solve),
        full_attention_layers=sum(layer.kind != "linear_attention" for layer in run),
        attention_width=text.num_attention_heads * head_dim,
        kept_parameters=sum(math.prod(claim.header.shape) for layer in run for claim in layer.claims
                            if claim.action is Action.COPY and len(claim.header.shape) == 2),
        attend_token_bytes=_attend_token_bytes(text, head_dim),
        layer_bytes=max(layer.bytes_before for layer in run),
        expert_bytes=experts * 3 * width * hidden * BF16,
        shard_bytes=max(part.bytes_after for part in layers),
        read_bytes=sum(layer.bytes_before for layer in run) + 2 * text.vocab_size * hidden * BF16,
        write_bytes=sum(part.bytes_after for part in written),
    )


def _attend_token_bytes(text: Any, head_dim: int) -> int:
    """Temporaries of one token in attention and shared experts, of the dearer kind of layer.

    Full attention: query, gate and output, key and value, each with a rotated or permuted copy, BF16. Linear
    attention: its projections in BF16, then transformers' chunked rule in fp32, some ten tensors of the value's size
    and three of heads x 64.
    """
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    around = (4 * text.hidden_size + 3 * getattr(text, "shared_expert_intermediate_size", 0)) * BF16
    around += 3 * getattr(text, "intermediate_size", 0) * BF16
    full = 2 * (3 * queries + 2 * keys) * BF16
    linear = 0
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        heads = text.linear_num_value_heads
        values = heads * max(text.linear_value_head_dim, text.linear_key_head_dim)
        mixed = 2 * text.linear_num_key_heads * text.linear_key_head_dim + heads * text.linear_value_head_dim
        linear = (3 * mixed + 2 * values) * BF16 + (10 * values + 3 * heads * 64) * FP32
    return around + max(full, linear)


# --- warnings ----------------------------------------------------------------------------------------------------


def _release_warnings(skeleton: Skeleton, index: TensorIndex, recipe: Recipe) -> Iterator[str]:
    """About the release: what engines will make of it (docs/formats.md)."""
    size, width, hidden = recipe.scheme.group_size, skeleton.text.moe_intermediate_size, skeleton.text.hidden_size
    bad = [tp for tp in TENSOR_PARALLEL if width % (tp * size)]
    if bad:
        fitting = next((group for group in (64, 32) if group < size and not width % (bad[-1] * group)), None)
        smaller = f", or scheme.group_size = {fitting}" if fitting else ""
        yield (f"tensor parallel {', '.join(map(str, bad))}: groups of {size} do not divide the expert width {width} "
               f"over so many devices. {_tensor_parallel_effect(recipe.format)} "
               f"Ways out: expert parallel, fewer devices{smaller}")
    if hidden % 128:
        yield f"hidden_size {hidden} is not a multiple of 128: vLLM's and SGLang's Marlin kernels do not take it"
    draft = _has_draft(skeleton, index.headers)
    if skeleton.family.mtp_prefix and not draft:
        yield ("no MTP tensors in the source: the release cannot draft its own tokens, and vLLM loads it without an "
               "error, with 0 drafts accepted")
    if draft and recipe.format != "compressed-tensors":
        yield (f"format {recipe.format} with MTP: SGLang silently drops the draft head's experts, so its drafts are "
               "poor. Ways out: format = \"compressed-tensors\", a draft folder without quantization_config, or vLLM")


def _tensor_parallel_effect(storage: str) -> str:
    if storage == "compressed-tensors":
        return "vLLM refuses to load it; SGLang loads empty scales for down_proj without an error."
    return ("vLLM on GPUs falls back from Marlin to moe_wna16, on CPUs it refuses; SGLang needs --quantization "
            "moe_wna16, its gptq_marlin leaves scales zero without an error.")


def _run_warnings(work: Workload, memory: MemoryPlan, disk: DiskPlan) -> Iterator[str]:
    """About this run on this machine."""
    if work.tokens_per_expert < work.hidden / 2:
        yield (f"calibration is small: {work.calibration_tokens:,} tokens x top {work.topk} over {work.experts} experts "
               f"are {work.tokens_per_expert:,.0f} tokens per expert, fewer than half of the {work.hidden} inputs "
               f"({work.hidden // 2}); more rows in calibration.sources help")
    if not memory.fits:
        yield (f"memory: {memory.device_peak_bytes / 1e9:.1f} GB are predicted on {memory.device} with the smallest "
               f"batches, the budget is {memory.budget_bytes / 1e9:.1f} GB; fewer calibration rows help")
    if not disk.enough and disk.free_bytes is not None:
        yield (f"disk: {disk.needed_bytes / 1e9:.1f} GB are needed where OUT will be, {disk.free_bytes / 1e9:.1f} GB "
               "are free; free some or name an OUT elsewhere")
