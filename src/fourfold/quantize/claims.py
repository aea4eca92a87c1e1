"""Every tensor of a source checkpoint, claimed exactly once: quantized, copied, split or dropped, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fourfold.datatypes import Action, FourfoldError, TensorHeader
from fourfold.formats import named
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.family import DOWN, GATE, UP, kept_group
from fourfold.model.skeleton import Skeleton
from fourfold.model.tensors import DTYPES
from fourfold.quantize.dense import DenseScheme
from fourfold.recipe import Recipe

EXPERTS, EMBEDDINGS = "experts", "embeddings"
GROUPS = (
    EXPERTS,
    "attention",
    "linear attention",
    "router",
    "shared experts",
    "dense MLP",
    "MTP",
    "vision",
    EMBEDDINGS,
    "norms",
    "buffers",
    "other",
)
KEPT_DTYPES = ("BF16", "F32", "F16")
WHOLE = ("I64", "I32", "U8", "BOOL")
NAMES_SHOWN = 3
DRAFT_PREFIX = re.compile(r".*?(layers\.\d+|mtp[^.]*)\.")  # a layer past the end, or one of its own name


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor that must be there, what is done with it, and why.

    layer: its decoder layer, None outside of them (MTP, vision, head); tensors_after, bytes_after: what is written in
    its place, None: as many bytes as before; bits: of each weight there, where it is quantized.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    action: Action
    reason: str
    group: str
    layer: int | None
    tensors_after: int = 1
    bytes_after: int | None = None
    bits: int | None = None
    group_size: int | None = None

    def claim(self, header: TensorHeader) -> TensorClaim:
        size = header.size_bytes if self.bytes_after is None else self.bytes_after
        return TensorClaim(**{**vars(self), "bytes_after": size}, header=header)

    def quantized(self, bits: int, group_size: int, recipe: Recipe, reason: str, count: int = 1) -> Wanted:
        """Return the same tensor, of `count` projections of its `shape`, stored as codes of `bits` bits and scales."""
        outputs, inputs = self.shape
        stored = named(recipe.format).tensor_shapes(outputs, inputs, inputs // group_size, bits)
        return replace(
            self,
            action=Action.QUANTIZE,
            reason=f"{reason}: int{bits}, a scale for {group_size} inputs each, stored as {recipe.format}",
            tensors_after=count * len(stored),
            bytes_after=count * sum(DTYPES[dtype].itemsize * math.prod(dims) for dtype, dims in stored.values()),
            bits=bits,
            group_size=group_size,
        )


@dataclass(frozen=True, kw_only=True)
class TensorClaim(Wanted):
    """One source tensor that is there."""

    header: TensorHeader
    bytes_after: int

    @property
    def is_expert(self) -> bool:
        """Whether it holds routed experts of a layer."""
        return self.group == EXPERTS

    @property
    def is_kept(self) -> bool:
        """Whether it is a weight beside the layers' experts, copied or rounded."""
        return not self.is_expert and self.action in (Action.COPY, Action.QUANTIZE)

    @property
    def multiplies_tokens(self) -> bool:
        """Whether it is a matrix, or a stack of them, that tokens are multiplied by beside their experts."""
        return self.is_kept and len(self.header.shape) > 1


def claim_tensors(source: Checkpoint, recipe: Recipe) -> tuple[TensorClaim, ...]:
    """Claim every source tensor exactly once, in the order of transformers' own model, drafts and extras last.

    Raises FourfoldError naming all that is missing, unexpected, or of another shape or dtype than wanted.
    """
    left = dict(source.headers)
    missing: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    claims: list[TensorClaim] = []
    for name, wanted in wanted_tensors(source, source.headers, recipe):
        header = left.pop(name, None)
        if header is None:
            missing.append(name)
        elif header.shape != wanted.shape:
            shapes.append(f"{name} is {list(header.shape)}, wanted {list(wanted.shape)}")
        elif header.dtype not in wanted.dtypes:
            dtypes.append(f"{name} is {header.dtype}, wanted {' or '.join(wanted.dtypes)}")
        else:
            claims.append(wanted.claim(header))
    in_memory = set(source.blueprint.missing)
    if in_memory.intersection(missing):
        missing = [*source.blueprint.lacking(), *(name for name in missing if name not in in_memory)]
    extras = {name: known_extra(source, header) for name, header in left.items()}
    claims += [extra.claim(left[name]) for name, extra in extras.items() if extra]
    unexpected = [name for name, extra in extras.items() if not extra]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "wrong dtype": dtypes}
    problems = "".join(f"\n  {what}: {_listed(names)}" for what, names in found.items() if names)
    if problems:
        raise FourfoldError(
            f"{source.folder}: the safetensors headers do not fit config.json:{problems}\n"
            "A whole and unaltered checkpoint is wanted, as published or from save_pretrained"
        )
    return tuple(claims)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return "; ".join(names[:NAMES_SHOWN]) + more


def draft_prefixes(skeleton: Skeleton, names: Iterable[str]) -> tuple[str, ...]:
    """What the names of the draft heads' tensors begin with, of those that are there."""
    if skeleton.has_draft(names):
        return (skeleton.family.mtp_prefix,)
    found = (DRAFT_PREFIX.match(name) for name in skeleton.blueprint.drafts)
    return tuple(dict.fromkeys(match[0] for match in found if match))


def wanted_tensors(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], recipe: Recipe
) -> Iterator[tuple[str, Wanted]]:
    """Every tensor that must be there, in the order of transformers' model, experts in the layout that each layer has
    on disk.
    """
    blueprint, dense = skeleton.blueprint, DenseScheme.of(skeleton, headers, recipe)
    experts = {
        f"{blueprint.prefix(layer)}{one.module}.{parameter}": layer
        for layer, one in enumerate(blueprint.experts)
        if one is not None
        for parameter in one.parameters
    }
    for name, value in blueprint.model.state_dict().items():
        layer = layer_of(skeleton, name)
        if name in experts:
            yield from _wanted_experts(skeleton, name, experts[name], recipe)
        elif name in blueprint.sources:
            source = blueprint.sources[name]
            for on_disk in source.all_names:
                shape = tuple(value.shape) if source.converter is None else blueprint.headers[on_disk].shape
                kept = _kept(on_disk, shape, layer, value.is_floating_point())
                yield on_disk, _rounded(on_disk, kept, dense, recipe)
        elif name in blueprint.missing:
            yield name, _kept(name, tuple(value.shape), layer)
    if skeleton.has_draft(headers):
        for name, shape in skeleton.draft_tensors():
            if len(shape) == 3:
                for on_disk, wanted in _wanted_draft_experts(name, shape, headers):
                    yield on_disk, _quantized_draft(wanted, shape, dense, recipe)
            else:
                yield name, _rounded(name, _kept(name, shape, None), dense, recipe)


def _kept(name: str, shape: tuple[int, ...], layer: int | None, floats: bool = True) -> Wanted:
    group, reason = kept_group(name)
    # Rows go through these matrices in BF16. Vectors (A_log, norms) are published in F32 here and there.
    in_stream = len(shape) == 2 and (layer is not None or group == "embeddings") and group != "router"
    dtypes = WHOLE if not floats else ("BF16",) if in_stream else KEPT_DTYPES
    return Wanted(shape=shape, dtypes=dtypes, action=Action.COPY, reason=reason, group=group, layer=layer)


def _rounded(name: str, kept: Wanted, dense: DenseScheme, recipe: Recipe) -> Wanted:
    """A weight beside the experts, as it is kept or rounded."""
    if name not in dense.bits:
        return kept
    return kept.quantized(dense.bits[name], dense.group_size, recipe, f"scheme.rest, {kept.group}")


def _quantized_draft(wanted: Wanted, stack: tuple[int, ...], dense: DenseScheme, recipe: Recipe) -> Wanted:
    """Draft experts, as they are kept or quantized. stack: shape of all of them, [E, N, K]."""
    if dense.draft_experts == 16:
        return wanted
    count = max(wanted.tensors_after, 1) if wanted.action is Action.SPLIT else 1
    one = replace(wanted, shape=(stack[0] * stack[1] // count if count > 1 else wanted.shape[0], stack[2]))
    found = one.quantized(dense.draft_experts, recipe.scheme.group, recipe, "draft experts", count)
    return replace(found, shape=wanted.shape)


def _wanted_experts(skeleton: Skeleton, name: str, layer: int, recipe: Recipe) -> Iterator[tuple[str, Wanted]]:
    """What makes one tensor of the experts in memory: a stack on disk, or the projections one by one."""
    experts = skeleton.experts_of(layer)
    projections = (DOWN,) if name.endswith("down_proj") else experts.projections[:-1]
    if experts.separate:
        for names in experts.separate:
            for projection in projections:
                yield names[projection], _wanted_expert(experts.shape(projection), layer, recipe)
        return
    source = skeleton.blueprint.sources.get(name)
    if not experts.stacked:  # some are missing
        for on_disk in (name,) if source is None else source.all_names:
            shape = () if source is None else skeleton.blueprint.headers[on_disk].shape
            yield on_disk, replace(_wanted_expert(experts.shape(projections[0]), layer, recipe), shape=shape)
        return
    for stack in dict.fromkeys(experts.stacked[projection] for projection in projections):
        held = [projection for projection in projections if experts.stacked[projection] == stack]
        one, count = _wanted_expert(experts.shape(held[0]), layer, recipe), experts.count * len(held)
        assert one.bytes_after is not None
        shape = _stack_shape(skeleton, name, stack, (experts.count, len(held) * one.shape[0], one.shape[1]))
        yield (
            stack,
            replace(one, shape=shape, tensors_after=count * one.tensors_after, bytes_after=count * one.bytes_after),
        )


def _stack_shape(skeleton: Skeleton, name: str, stack: str, canonical: tuple[int, ...]) -> tuple[int, ...]:
    """What a stack must be: as in memory, or, where transformers converts it, anything of as many values."""
    blueprint = skeleton.blueprint
    if blueprint.sources[name].converter is None:
        return tuple(blueprint.model.get_parameter(name).shape)
    shape = tuple(blueprint.headers[stack].shape)
    return shape if math.prod(shape) == math.prod(canonical) else canonical


def _wanted_expert(shape: tuple[int, int], layer: int, recipe: Recipe) -> Wanted:
    """One projection [N, K] of a routed expert."""
    one = Wanted(shape=shape, dtypes=("BF16",), action=Action.QUANTIZE, reason="", group=EXPERTS, layer=layer)
    return one.quantized(4, recipe.scheme.group, recipe, "routed expert")


def _wanted_draft_experts(
    name: str, shape: tuple[int, ...], headers: Mapping[str, TensorHeader]
) -> Iterator[tuple[str, Wanted]]:
    """A stack of draft experts as it lies on disk, or its E (or 2E) projections one by one."""
    prefix, _, stack = name.rpartition(".")
    one = Wanted(
        shape=(shape[1] // (2 if stack == "gate_up_proj" else 1), shape[2]),
        dtypes=KEPT_DTYPES,
        action=Action.COPY,
        reason="draft head stays BF16: a tensor per expert already",
        group="MTP",
        layer=None,
    )
    projections = (GATE, UP) if stack == "gate_up_proj" else (DOWN,)
    if f"{prefix}.gate_up_proj" in headers or f"{prefix}.down_proj" in headers:
        reason = "draft head stays BF16: split bit for bit into a tensor per expert, which every engine loads"
        count = shape[0] * len(projections)
        yield name, replace(one, shape=shape, action=Action.SPLIT, reason=reason, tensors_after=count)
        return
    for expert in range(shape[0]):
        for projection in projections:
            yield f"{prefix}.{expert}.{projection}.weight", one


def layer_of(skeleton: Skeleton, name: str) -> int | None:
    """The decoder layer of a name in memory."""
    path = f"{skeleton.blueprint.layers_path}."
    number = name[len(path) :].partition(".")[0] if name.startswith(path) else ""
    return int(number) if number.isdecimal() and int(number) < skeleton.layers else None


def known_extra(skeleton: Skeleton, header: TensorHeader) -> Wanted | None:
    """Tensors beyond transformers' own that are no sign of another model, else None."""
    if header.name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")):
        return Wanted(
            shape=header.shape,
            dtypes=(header.dtype,),
            action=Action.DROP,
            reason="rotary frequencies: computed from config.json, not learned",
            group="buffers",
            layer=layer_of(skeleton, header.name),
            tensors_after=0,
            bytes_after=0,
        )
    if header.name in skeleton.blueprint.drafts:
        return _as_it_is(header, "MTP", "draft head stays as it is: transformers does not build it, not measured")
    head = tuple(skeleton.blueprint.model.get_output_embeddings().weight.shape)
    tied = skeleton.blueprint.model.all_tied_weights_keys and header.name == "lm_head.weight" and header.shape == head
    if tied and header.dtype in KEPT_DTYPES:
        reason = "output head, stored although tied to the embeddings: kept as it is"
        return _as_it_is(header, "embeddings", reason)
    return None


def _as_it_is(header: TensorHeader, group: str, reason: str) -> Wanted:
    """A tensor outside of the layers that is copied whatever it is."""
    return Wanted(
        shape=header.shape, dtypes=(header.dtype,), action=Action.COPY, reason=reason, group=group, layer=None
    )
