"""What is quantized beside the layers' routed experts (`scheme.rest`): which weights, and their int8 codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import grid
from fourfold.datatypes import FourfoldError, QuantizedGroup, TensorHeader
from fourfold.formats import named
from fourfold.formats.format import FUSED, MoreModules, Shape
from fourfold.model.family import kept_group
from fourfold.model.head import output_name
from fourfold.model.layer import LayerTensors
from fourfold.model.skeleton import Skeleton
from fourfold.recipe import GROUP_SIZES, Recipe, Rest
from fourfold.recipe_table import NEVER_QUANTIZED

BITS = {"bf16": 16, "int8": 8, "int4": 4}
PARTS = {"attention": "attention", "linear attention": "linear_attention", "shared experts": "shared_experts"}
OUTPUTS = 64  # a multiple of which the outputs of a module must be: tiles of vLLM's Marlin
SLAB_ROWS = 1024  # rows that are rounded at one time
INT8_SEARCH = grid.ScaleSearch(low=0.97, high=1.08, steps=12, signed=False)  # 7 % less error than absmax


@dataclass(frozen=True, kw_only=True)
class DenseScheme:
    """Bits of each weight beside the layers' routed experts that is quantized, by its name on disk, and inputs that
    share a scale. Draft experts are not among them: their bits are `draft_experts`, 16 where they are not quantized.
    """

    bits: Mapping[str, int]
    group_size: int
    draft_experts: int

    @classmethod
    def of(cls, skeleton: Skeleton, headers: Mapping[str, TensorHeader], recipe: Recipe) -> DenseScheme:
        """Raises FourfoldError for an output head that is tied to the embeddings, and a draft head that fourfold cannot
        run.
        """
        rest, has_draft = recipe.scheme.rest, skeleton.has_draft(headers)
        if rest == Rest():
            return cls(bits={}, group_size=recipe.scheme.group, draft_experts=16)
        if rest.head != "bf16" and skeleton.blueprint.model.all_tied_weights_keys:
            raise FourfoldError(
                f"scheme.rest.head: got {rest.head!r}, but this model's output head is tied to its embeddings: vLLM "
                "answers nonsense and SGLang drops the head, both without an error. Try: --set scheme.rest.head=bf16"
            )
        if skeleton.blueprint.drafts and not has_draft and rest.draft_experts == "int4":
            raise FourfoldError(
                "scheme.rest.draft_experts: got 'int4', but fourfold cannot run this model's draft layers to solve "
                "them. Try: --set scheme.rest.draft_experts=bf16 --set scheme.rest.draft_dense=bf16"
            )
        mixed = "bf16" in (rest.draft_experts, rest.draft_dense) and rest.draft_experts != rest.draft_dense
        if has_draft and mixed and not named(recipe.format).mixed_drafts:
            raise FourfoldError(
                f"scheme.rest: got draft_experts = {rest.draft_experts!r} and draft_dense = {rest.draft_dense!r}, but "
                f"with format {recipe.format!r} vLLM takes a draft head that is quantized whole, or not at all"
            )
        heads = _head_names(skeleton)
        shapes = dict(_candidates(skeleton, headers)) | {name: skeleton.blueprint.headers[name].shape for name in heads}
        widths = {name: BITS[rest.head] if name in heads else _bits(skeleton, name, rest) for name in shapes}
        bits = {name: width for name, width in widths.items() if width < 16}
        parts = recipe.scheme.tensor_parallel
        fits = {name for name in bits if shapes[name][0] % OUTPUTS == 0 and shapes[name][1] % (32 * parts) == 0}
        fits = {name for name in fits if _beside(name, shapes) <= fits}
        size = next(size for size in GROUP_SIZES if not any(shapes[name][1] % (size * parts) for name in fits))
        experts = BITS[rest.draft_experts] if has_draft else 16
        kept = {name: width for name, width in bits.items() if name in fits}
        return cls(bits=kept, group_size=size, draft_experts=experts)

    def more_modules(self, skeleton: Skeleton, drafts: tuple[str, ...]) -> MoreModules | None:
        """Return what quantization_config says of it, None where experts alone are quantized."""
        bits = {name.removesuffix(".weight"): width for name, width in self.bits.items()}
        if self.draft_experts < 16:
            bits[f"{skeleton.family.mtp_experts_prefix}0.down_proj"] = self.draft_experts
        return MoreModules.of(bits, drafts, self.group_size)


def _candidates(skeleton: Skeleton, headers: Mapping[str, TensorHeader]) -> Iterator[tuple[str, Shape]]:
    """Weights [N, K] of linear modules in layers and draft head beside their routed experts, by name on disk."""
    blueprint = skeleton.blueprint
    for name, shape in skeleton.draft_tensors() if skeleton.has_draft(headers) else ():
        if len(shape) == 2 and ".experts." not in name:
            yield name, shape
    for layer in range(skeleton.layers):
        for name in blueprint.kept_names(layer):
            if name.endswith(".weight") and len(blueprint.headers[name].shape) == 2:
                yield name, blueprint.headers[name].shape


def _beside(name: str, shapes: Mapping[str, Shape]) -> set[str]:
    """Weights that engines join with this one: they have one width. shapes: of all weights that there are."""
    parent, _, module = name.removesuffix(".weight").rpartition(".")
    parts = next((parts for parts in FUSED.values() if module in parts), ())
    return {f"{parent}.{part}.weight" for part in parts} & shapes.keys()


def _head_names(skeleton: Skeleton) -> tuple[str, ...]:
    return skeleton.blueprint.sources[output_name(skeleton.blueprint)].all_names


def _bits(skeleton: Skeleton, name: str, rest: Rest) -> int:
    """The bits that a recipe has for a weight of a layer or the draft head; 16 for one that stays as it is."""
    prefix = skeleton.family.mtp_prefix
    in_draft = bool(prefix) and name.startswith(prefix)
    part = PARTS.get(kept_group(name.removeprefix(prefix) if in_draft else name)[0])
    module = name.removesuffix(".weight").rpartition(".")[2]
    if part is None or module in NEVER_QUANTIZED:
        return 16
    return BITS[rest.draft_dense if in_draft else getattr(rest, part)]


def round_weight(weight_NK: Tensor, bits: int, group_size: int, recipe: Recipe) -> QuantizedGroup:
    """Round a weight to nearest, each group with the scale of the least squared error.

    Returns codes [1, N, K] of `bits` bits (4 or 8) and scales [1, N, K / group_size].
    """
    levels = grid.INT8 if bits == 8 else grid.INT4
    onto = grid.Grid(levels=levels, group_size=group_size, scale_dtype=recipe.scheme.scale_dtype)
    solver = recipe.solver
    search = INT8_SEARCH
    if bits == 4:
        search = grid.ScaleSearch(
            low=solver.scale_low, high=solver.scale_high, steps=solver.scale_steps, signed=recipe.scheme.signed
        )
    one_1K = torch.ones(1, weight_NK.shape[1], device=weight_NK.device)
    codes, scales = [], []
    for slab_NK in weight_NK.split(SLAB_ROWS):
        slab_1NK = slab_NK.float()[None]
        scale_1NG = grid.search_scales(slab_1NK, one_1K, onto, search)
        codes.append(grid.round_to_nearest(slab_1NK, scale_1NG, onto))
        scales.append(scale_1NG)
    return QuantizedGroup(torch.cat(codes, dim=1), torch.cat(scales, dim=1), bits)


def dequantized(group: QuantizedGroup) -> Tensor:
    """Return the weight [N, K] of a group of one, as engines multiply by it: BF16."""
    slabs = zip(group.codes_ENK[0].split(SLAB_ROWS), group.scale_ENG[0].split(SLAB_ROWS), strict=True)
    return torch.cat([grid.dequantize(codes_NK, scale_NG).bfloat16() for codes_NK, scale_NG in slabs])


@dataclass(frozen=True)
class QuantizedWeights:
    """Quantized weights of a layer or shard. weights: dequantized, by name on disk; stored: as the release has them."""

    weights: Mapping[str, Tensor]
    stored: Mapping[str, Tensor]

    @classmethod
    def of(cls, groups: Mapping[str, QuantizedGroup], recipe: Recipe) -> QuantizedWeights:
        """groups: codes and scales of one weight each, by its name on disk."""
        stored: dict[str, Tensor] = {}
        for name, group in groups.items():
            stem, packed = name.removesuffix("weight"), named(recipe.format).pack(group)
            stored |= {stem + suffix: value[0] for suffix, value in packed.items()}
        return cls({name: dequantized(group) for name, group in groups.items()}, stored)

    def in_place_of(self, tensors: LayerTensors) -> LayerTensors:
        """Return what the layer's shard is made from: codes and scales in place of the weights."""
        kept = {name: value for name, value in tensors.kept.items() if name not in self.weights}
        return dataclasses.replace(tensors, kept=kept | {name: value.cpu() for name, value in self.stored.items()})


def round_weights(tensors: Mapping[str, Tensor], scheme: DenseScheme, recipe: Recipe) -> QuantizedWeights:
    """Round those of some tensors (by name on disk) that the scheme quantizes."""
    names = [name for name in tensors if name in scheme.bits]
    return QuantizedWeights.of(
        {name: round_weight(tensors[name], scheme.bits[name], scheme.group_size, recipe) for name in names}, recipe
    )
