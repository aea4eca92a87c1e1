"""Every tensor of a source checkpoint, claimed exactly once: quantized, copied, split or dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fourfold.datatypes import Action, FourfoldError, TensorHeader
from fourfold.formats import named
from fourfold.model.checkpoint import DTYPES, TensorIndex
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.skeleton import Skeleton
from fourfold.recipe import Recipe

GROUPS = (
    "experts",
    "attention",
    "linear attention",
    "router",
    "shared experts",
    "dense MLP",
    "MTP",
    "vision",
    "embeddings",
    "norms",
    "buffers",
)
KEPT_DTYPES = ("BF16", "F32", "F16")
NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TensorClaim:
    """What happens to one source tensor, and why.

    layer: its decoder layer, None outside of them (MTP, vision, head); tensors_after, bytes_after: what is
    written in its place.
    """

    header: TensorHeader
    action: Action
    reason: str
    group: str
    layer: int | None
    tensors_after: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A tensor that must be there, and what is done with it. bytes_after None: as many as before."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    action: Action
    reason: str
    group: str
    layer: int | None
    tensors_after: int = 1
    bytes_after: int | None = None

    def claim(self, header: TensorHeader) -> TensorClaim:
        return TensorClaim(
            header=header,
            action=self.action,
            reason=self.reason,
            group=self.group,
            layer=self.layer,
            tensors_after=self.tensors_after,
            bytes_after=header.size_bytes if self.bytes_after is None else self.bytes_after,
        )


def claim_tensors(skeleton: Skeleton, index: TensorIndex, recipe: Recipe) -> tuple[TensorClaim, ...]:
    """Claim every source tensor exactly once, in the order of transformers' own model, extras last.

    Raises FourfoldError naming all that is missing, unexpected, or of another shape or dtype than wanted.
    """
    left = dict(index.headers)
    missing: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    claims: list[TensorClaim] = []
    for name, wanted in wanted_tensors(skeleton, index.headers, recipe):
        header = left.pop(name, None)
        if header is None:
            missing.append(name)
        elif header.shape != wanted.shape:
            shapes.append(f"{name} is {list(header.shape)}, wanted {list(wanted.shape)}")
        elif header.dtype not in wanted.dtypes:
            dtypes.append(f"{name} is {header.dtype}, wanted {' or '.join(wanted.dtypes)}")
        else:
            claims.append(wanted.claim(header))
    extras = {name: known_extra(skeleton, header) for name, header in left.items()}
    claims += [extra.claim(left[name]) for name, extra in extras.items() if extra]
    unexpected = [name for name, extra in extras.items() if not extra]
    found = {"missing": missing, "unexpected": unexpected, "wrong shape": shapes, "wrong dtype": dtypes}
    problems = "".join(f"\n  {what}: {_listed(names)}" for what, names in found.items() if names)
    if problems:
        raise FourfoldError(
            f"{index.folder}: the safetensors headers do not fit config.json:{problems}\n"
            "A whole and unaltered BF16 checkpoint is wanted, as published or from save_pretrained"
        )
    return tuple(claims)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
    return "; ".join(names[:NAMES_SHOWN]) + more


def is_fused(names: Container[str], experts_prefix: str) -> bool:
    """Whether the experts under a prefix are stacks, as on the Hub, not a tensor each (save_pretrained)."""
    return f"{experts_prefix}gate_up_proj" in names or f"{experts_prefix}down_proj" in names


def has_draft(skeleton: Skeleton, names: Iterable[str]) -> bool:
    """Whether any tensor of the draft head is there: fine-tunes saved by transformers have lost it."""
    return skeleton.has_mtp and any(name.startswith(skeleton.family.mtp_prefix) for name in names)


def draft_prefixes(skeleton: Skeleton, names: Iterable[str]) -> tuple[str, ...]:
    """What the names of the draft heads' tensors begin with, of those that are there."""
    return (skeleton.family.mtp_prefix,) if has_draft(skeleton, names) else ()


def wanted_tensors(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], recipe: Recipe
) -> Iterator[tuple[str, Wanted]]:
    """Every tensor that must be there, experts in the layout that each layer has on disk."""
    family, draft = skeleton.family, has_draft(skeleton, headers)
    for name, shape in skeleton.expected():
        in_draft = skeleton.has_mtp and name.startswith(family.mtp_prefix)
        if in_draft and not draft:
            continue
        layer = _layer_of(skeleton, name)
        group, reason = _kept_group(skeleton, name)
        if name.endswith((".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")):
            prefix = name[: name.rindex(".") + 1]
            one = _wanted_draft_expert(name, shape) if layer is None else _wanted_expert(name, shape, layer, recipe)
            yield from _wanted_experts(name, shape, one, is_fused(headers, prefix))
            continue
        # Rows go through these matrices in BF16. Vectors (A_log, norms) are published in F32 here and there.
        in_stream = len(shape) == 2 and (layer is not None or group == "embeddings")
        dtypes = ("BF16",) if in_stream else KEPT_DTYPES
        yield (
            name,
            Wanted(shape=shape, dtypes=dtypes, action=Action.COPY, reason=reason, group=group, layer=layer),
        )


def _wanted_expert(name: str, shape: tuple[int, ...], layer: int, recipe: Recipe) -> Wanted:
    """One projection [N, K] of a routed expert."""
    outputs, inputs = _projection_shape(name, shape)
    size = recipe.scheme.group_size
    stored = named(recipe.format).tensor_shapes(outputs, inputs, inputs // size)
    return Wanted(
        shape=(outputs, inputs),
        dtypes=("BF16",),
        action=Action.QUANTIZE,
        reason=f"routed expert: int4, a scale for {size} inputs each, stored as {recipe.format}",
        group="experts",
        layer=layer,
        tensors_after=len(stored),
        bytes_after=sum(DTYPES[dtype].itemsize * math.prod(dims) for dtype, dims in stored.values()),
    )


def _projection_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    _, rows, inputs = shape
    return (rows // 2 if name.endswith("gate_up_proj") else rows), inputs


def _wanted_draft_expert(name: str, shape: tuple[int, ...]) -> Wanted:
    """One projection [N, K] of a draft expert."""
    return Wanted(
        shape=_projection_shape(name, shape),
        dtypes=KEPT_DTYPES,
        action=Action.COPY,
        reason="draft head stays BF16: a tensor per expert already",
        group="MTP",
        layer=None,
    )


def _wanted_experts(name: str, shape: tuple[int, ...], one: Wanted, fused: bool) -> Iterator[tuple[str, Wanted]]:
    """A stack of experts as it lies on disk, or its E (or 2E) projections one by one."""
    prefix, _, stack = name.rpartition(".")
    projections = (GATE, UP) if stack == "gate_up_proj" else (DOWN,)
    if not fused:
        for expert in range(shape[0]):
            for projection in projections:
                yield f"{prefix}.{expert}.{projection}.weight", one
        return
    count = shape[0] * len(projections)
    tensors, total = count * one.tensors_after, None if one.bytes_after is None else count * one.bytes_after
    stacked = replace(one, shape=shape, tensors_after=tensors, bytes_after=total)
    if one.action is Action.COPY:
        reason = "draft head stays BF16: split bit for bit into a tensor per expert, which every engine loads"
        stacked = replace(stacked, action=Action.SPLIT, reason=reason)
    yield name, stacked


def _layer_of(skeleton: Skeleton, name: str) -> int | None:
    prefix = f"{skeleton.family.text_prefix}layers."
    number = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdecimal() and int(number) < skeleton.layers else None


def _kept_group(skeleton: Skeleton, name: str) -> tuple[str, str]:
    for group, marker, reason in skeleton.family.groups:
        if marker in name:
            return group, reason
    raise AssertionError(f"family {skeleton.family.model_type} has no group for {name}")


def known_extra(skeleton: Skeleton, header: TensorHeader) -> Wanted | None:
    """Tensors beyond transformers' own that are no sign of another model, else None."""
    if header.name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")):
        return Wanted(
            shape=header.shape,
            dtypes=(header.dtype,),
            action=Action.DROP,
            reason="rotary frequencies: computed from config.json, not learned",
            group="buffers",
            layer=_layer_of(skeleton, header.name),
            tensors_after=0,
            bytes_after=0,
        )
    head = (skeleton.text.vocab_size, skeleton.text.hidden_size)
    tied = skeleton.config.tie_word_embeddings and header.name == "lm_head.weight" and header.shape == head
    if tied and header.dtype in KEPT_DTYPES:
        return Wanted(
            shape=header.shape,
            dtypes=(header.dtype,),
            action=Action.COPY,
            reason="output head, stored although tied to the embeddings: kept as it is",
            group="embeddings",
            layer=None,
        )
    return None
