"""Every tensor of a source checkpoint, claimed exactly once: quantized, copied, split or dropped, and why."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fourfold.core.pack import tensor_shapes
from fourfold.datatypes import Action, FourfoldError, TensorHeader
from fourfold.model.checkpoint import DTYPES, TensorIndex
from fourfold.model.skeleton import Skeleton
from fourfold.recipe import Recipe

BF16_BYTES = 2
KEPT_DTYPES = ("BF16", "F32", "F16")
NAMES_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TensorClaim:
    """What happens to one source tensor, and why. layer: its decoder layer, None outside of them (MTP, vision, head).

    tensors_after, bytes_after: what is written for it.
    """

    header: TensorHeader
    action: Action
    reason: str
    group: str
    layer: int | None
    tensors_after: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """A tensor that the checkpoint must hold, and what is done with it."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    action: Action
    reason: str
    group: str
    layer: int | None
    tensors_after: int = 1
    bytes_after: int | None = None  # None: as many as before


def claim_tensors(skeleton: Skeleton, index: TensorIndex, recipe: Recipe) -> list[TensorClaim]:
    """Claim every source tensor exactly once, in the order of transformers' own model.

    Raises FourfoldError naming what is missing, unexpected, or of another shape or dtype than wanted.
    """
    headers = dict(index.headers)
    missing, shapes, dtypes = [], [], []
    claims = []
    for name, wanted in _wanted(skeleton, index.headers, recipe):
        header = headers.pop(name, None)
        if header is None:
            missing.append(name)
        elif header.shape != wanted.shape:
            shapes.append(f"{name} is {list(header.shape)}, config.json makes it {list(wanted.shape)}")
        elif header.dtype not in wanted.dtypes:
            dtypes.append(f"{name} is {header.dtype}, wanted {' or '.join(wanted.dtypes)}")
        else:
            claims.append(_claim(header, wanted))
    unexpected = []
    for name, header in headers.items():
        extra = _known_extra(skeleton, header)
        if extra is None:
            unexpected.append(name)
        else:
            claims.append(_claim(header, extra))
    problems = [_listed(what, found) for what, found in (("missing", missing), ("unexpected", unexpected),
                                                         ("wrong shape", shapes), ("wrong dtype", dtypes)) if found]
    if problems:
        lines = "\n  ".join(problems)
        raise FourfoldError(f"{index.folder}: the safetensors headers do not fit config.json:\n  {lines}\n"
                            "A BF16 checkpoint as published or as saved by save_pretrained is wanted, whole and unaltered")
    return claims


def _listed(what: str, found: Sequence[str]) -> str:
    more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
    return f"{what}: {'; '.join(found[:NAMES_SHOWN])}{more}"


def _claim(header: TensorHeader, wanted: _Wanted) -> TensorClaim:
    return TensorClaim(
        header=header,
        action=wanted.action,
        reason=wanted.reason,
        group=wanted.group,
        layer=wanted.layer,
        tensors_after=wanted.tensors_after,
        bytes_after=header.size_bytes if wanted.bytes_after is None else wanted.bytes_after,
    )


def _wanted(
    skeleton: Skeleton, headers: Mapping[str, TensorHeader], recipe: Recipe
) -> Iterator[tuple[str, _Wanted]]:
    """Every tensor that must be there, experts in the layout that each layer has on disk."""
    family = skeleton.family
    draft = _has_draft(skeleton, headers)
    for name, shape in skeleton.expected():
        in_draft = skeleton.has_mtp and name.startswith(family.mtp_prefix)
        if in_draft and not draft:
            continue
        layer = _layer_of(skeleton, name)
        prefix = family.mtp_experts_prefix if in_draft else "" if layer is None else family.experts_prefix(layer)
        if prefix and name in (f"{prefix}gate_up_proj", f"{prefix}down_proj"):
            yield from _wanted_experts(prefix, name, shape, headers, None if in_draft else layer, recipe)
        else:
            group, reason = _kept_group(skeleton, name)
            # Matrices of the decoder layers are run in BF16; vectors (norms, A_log) are published in F32 here and there.
            dtypes = ("BF16",) if layer is not None and len(shape) == 2 else KEPT_DTYPES
            yield name, _Wanted(shape=shape, dtypes=dtypes, action=Action.COPY, reason=reason, group=group, layer=layer)


def _wanted_experts(
    prefix: str, name: str, shape: tuple[int, ...], headers: Mapping[str, TensorHeader], layer: int | None, recipe: Recipe
) -> Iterator[tuple[str, _Wanted]]:
    """One stack [E, N, K] of routed experts, or its tensors one by one. layer: None for the draft head's."""
    experts, outputs, inputs = shape
    halves = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    outputs //= len(halves)
    if layer is None:
        split = Action.SPLIT if is_fused(headers, prefix) else Action.COPY
        reason = "draft head stays BF16; " + ("split bit for bit into a tensor per expert, which all engines load"
                                              if split is Action.SPLIT else "a tensor per expert already")
        each, tensors, action, group = outputs * inputs * BF16, 1, split, "MTP"
    else:
        stored = tensor_shapes(recipe.format, outputs, inputs, recipe.scheme.group_size)
        each = sum(DTYPES[dtype].itemsize * math.prod(size) for dtype, size in stored.values())
        tensors, action, group = len(stored), Action.QUANTIZE, "experts"
        reason = f"routed expert: int4, one scale for {recipe.scheme.group_size} inputs, stored as {recipe.format}"
    if is_fused(headers, prefix):
        yield name, _Wanted(shape=shape, dtypes=("BF16",), action=action, reason=reason, group=group, layer=layer,
                            tensors_after=experts * len(halves) * tensors, bytes_after=experts * len(halves) * each)
        return
    one = _Wanted(shape=(outputs, inputs), dtypes=("BF16",), action=action, reason=reason, group=group, layer=layer,
                  tensors_after=tensors, bytes_after=each)
    for expert in range(experts):
        for half in halves:
            yield f"{prefix}{expert}.{half}.weight", one


def is_fused(headers: Iterable[str], prefix: str) -> bool:
    """Whether the experts under `prefix` are two stacks (the Hub's layout); True as well where there are none."""
    return f"{prefix}0.gate_proj.weight" not in headers


def _has_draft(skeleton: Skeleton, headers: Iterable[str]) -> bool:
    """Whether any tensor of the draft head is there: fine-tunes saved by transformers have lost it altogether."""
    return skeleton.has_mtp and any(name.startswith(skeleton.family.mtp_prefix) for name in headers)


def _layer_of(skeleton: Skeleton, name: str) -> int | None:
    prefix = f"{skeleton.family.text_prefix}layers."
    number = name[len(prefix) :].partition(".")[0] if name.startswith(prefix) else ""
    return int(number) if number.isdecimal() and int(number) < skeleton.layers else None


def _kept_group(skeleton: Skeleton, name: str) -> tuple[str, str]:
    for group, marker, reason in skeleton.family.groups:
        if marker in name:
            return group, reason
    raise AssertionError(f"family {skeleton.family.model_type} has no group for {name}")


def _known_extra(skeleton: Skeleton, header: TensorHeader) -> _Wanted | None:
    """Tensors beyond transformers' own that are no sign of another model."""
    if header.name.endswith(".inv_freq"):
        return _Wanted(shape=header.shape, dtypes=(header.dtype,), action=Action.DROP, group="buffers",
                       reason="rotary frequencies: computed from config.json, not learned",
                       layer=_layer_of(skeleton, header.name), tensors_after=0, bytes_after=0)
    tied = skeleton.config.tie_word_embeddings and header.name == "lm_head.weight"
    if tied and header.shape == (skeleton.text.vocab_size, skeleton.text.hidden_size) and header.dtype in KEPT_DTYPES:
        return _Wanted(shape=header.shape, dtypes=(header.dtype,), action=Action.COPY, group="embeddings", layer=None,
                       reason="output head, stored although it is tied to the embeddings: kept as it is")
    return None
