"""A checkpoint as a server sees it: what config.json, the headers, the chat template and generation_config.json say;
or, before there is one, what a plan says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fourfold.datatypes import FourfoldError
from fourfold.formats import named
from fourfold.formats.format import Format, fused, module_end
from fourfold.formats.patterns import match_patterns
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.head import input_name, output_name
from fourfold.model.json_object import read_object
from fourfold.model.skeleton import Skeleton
from fourfold.model.sources import group_sizes
from fourfold.quantize.plan import Plan
from fourfold.serve.kvcache import Geometry

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
REFERENCE = "Qwen3.6-35B-A3B"  # the model of the reference's measured figures
SPLIT = {  # numbers of config.json that the tensor-parallel size must divide
    "attention heads": "num_attention_heads",
    "key heads of linear attention": "linear_num_key_heads",
    "value heads of linear attention": "linear_num_value_heads",
}
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")  # modules whose inputs tensor parallel splits


@dataclass(frozen=True, kw_only=True)
class Served:
    """format: None where nothing is quantized; group_size: of experts, 0 without groups; context: the longest of the
    model; draft_bytes: of the draft head's tensors, 0 without; weight_bytes: of all others; ends_bytes: of embeddings
    and output head among these; int8: some weights have 8 bits; quantized_head: the output head is quantized;
    int4_drafts: draft experts are int4; splits: numbers that the tensor-parallel size must divide; sampling: of
    generation_config.json; drafts_by_name: config.json excludes parts of the draft head's fused modules by name alone.
    """

    folder: Path
    name: str
    model_type: str
    format: Format | None
    group_size: int
    expert_width: int
    vision: bool
    context: int
    weight_bytes: int
    draft_bytes: int
    ends_bytes: int
    int8: bool
    quantized_head: bool
    int4_drafts: bool
    geometry: Geometry
    splits: Mapping[str, int]
    template: str
    sampling: Mapping[str, Any]
    drafts_by_name: bool = False

    @property
    def has_draft(self) -> bool:
        return self.draft_bytes > 0

    @property
    def is_reference(self) -> bool:
        """Whether the card's figures are of this very model: by its sizes, whatever its name."""
        sizes = (self.model_type, self.geometry.attention, self.geometry.linear, self.expert_width)
        return sizes == ("qwen3_5_moe", 10, 30, 512) and self.format is not None


class Part(NamedTuple):
    """A tensor of a BF16 checkpoint, as it is stored. bits: of its codes, 0 where it is not quantized; inputs: of its
    module; group: inputs that share a scale, 0 where all of a row do.
    """

    size_bytes: int
    bits: int = 0
    inputs: int = 0
    group: int = 0


def open_served(folder: Path, name: str = "") -> Served:
    """Read any maker's checkpoint but for its weights. name: for clients, by default the folder's own.

    Raises FourfoldError for a folder that is no whole checkpoint or is quantized in an unknown way.
    """
    return describe(Checkpoint.open(folder), name)


def describe(checkpoint: Checkpoint, name: str = "") -> Served:
    """Describe a checkpoint. Raises UnknownCache."""
    folder = checkpoint.folder
    return _served(
        checkpoint, dict(_stored(checkpoint)), checkpoint.format, name=name or folder.resolve().name,
        template=_template(folder), sampling=sampling(folder), drafts_by_name=_drafts_by_name(checkpoint),
    )  # fmt: skip


def _drafts_by_name(checkpoint: Checkpoint) -> bool:
    selection = checkpoint.format.selection(checkpoint.settings) if checkpoint.format else None
    prefix = checkpoint.family.mtp_prefix
    if selection is None or not prefix:
        return False
    joined = fused({name: True for name in selection.exact if name.startswith(prefix)})
    where = f"config.json: quantization_config.{selection.key}"
    return bool(joined.keys() - match_patterns(selection.excluded, joined, where)[0] - {*selection.exact})


def planned_served(plan: Plan) -> Served:
    """Describe the release that a plan makes. Raises UnknownCache."""
    parts = {
        claim.header.name: Part(
            claim.bytes_after,
            claim.bits or 0,
            claim.header.shape[-1] if claim.bits else 0,
            plan.recipe.scheme.group if ".experts." in claim.header.name else plan.dense.group_size,
        )
        for claim in plan.claims
        if claim.tensors_after
    }
    name = plan.source.folder.name
    return _served(plan.source, parts, named(plan.recipe.format), name=name, template="", sampling={})


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Part]]:
    """Every tensor, by its name in a BF16 checkpoint."""
    form, stated = checkpoint.format, list(group_sizes(checkpoint.settings))
    by_row = None in stated or -1 in stated
    for name, header in checkpoint.headers.items():
        stored = checkpoint.stored.get(name)
        if stored is None or form is None:
            yield name, Part(stored.size_bytes if stored else header.size_bytes)
            continue
        group = 0 if stored.groups == 1 and by_row else stored.group_size
        yield name, Part(stored.size_bytes, stored.bits, stored.inputs, group)


def _served(checkpoint: Checkpoint, parts: Mapping[str, Part], form: Format | None, **others: Any) -> Served:
    """Describe a checkpoint with these tensors instead, by name. others: fields that do not depend on them."""
    text, blueprint, prefix = checkpoint.text, checkpoint.blueprint, checkpoint.family.mtp_prefix
    draft = {name: part for name, part in parts.items() if prefix and name.startswith(prefix)}
    draft_bytes = sum(part.size_bytes for part in draft.values())
    head = blueprint.sources[output_name(blueprint)].all_names
    ends = {*blueprint.sources[input_name(blueprint)].all_names, *head}
    splits = {title: int(getattr(text, name)) for title, name in SPLIT.items() if getattr(text, name, None)}
    return Served(
        folder=checkpoint.folder, model_type=checkpoint.family.model_type, format=form,
        group_size=max((part.group for name, part in parts.items() if part.bits and ".experts." in name), default=0),
        expert_width=checkpoint.widest.width, vision="vision_config" in checkpoint.raw,
        context=int(text.max_position_embeddings), draft_bytes=draft_bytes if checkpoint.has_draft_head else 0,
        weight_bytes=sum(part.size_bytes for part in parts.values()) - draft_bytes,
        ends_bytes=sum(parts[name].size_bytes for name in ends if name in parts),
        int8=any(part.bits == 8 for part in parts.values()),
        quantized_head=any(parts[name].bits for name in head if name in parts),
        int4_drafts=any(part.bits == 4 and ".experts." in name for name, part in draft.items()),
        geometry=_geometry(checkpoint), splits=splits | dict(_split_groups(parts)), **others,
    )  # fmt: skip


def _split_groups(parts: Mapping[str, Part]) -> Iterator[tuple[str, int]]:
    """Groups of inputs of modules beside the experts, whose inputs tensor parallel splits."""
    for name, part in parts.items():
        module = module_end(name.removesuffix(".weight"))
        if part.bits and part.group and ".experts." not in name and module.endswith(ROW_PARALLEL):
            yield f"groups of {part.group} inputs of {module}", part.inputs // part.group


class UnknownCache(FourfoldError):
    """The cache of a model cannot be worked out from config.json."""


def _geometry(skeleton: Skeleton) -> Geometry:
    try:
        return _read_geometry(skeleton)
    except (AttributeError, RuntimeError, TypeError):  # other keys, or keys that differ from layer to layer
        problem = f"the cache of {skeleton.family.model_type} cannot be worked out from config.json"
        fix = "so that no command is derived; start the engine by hand"
        raise UnknownCache(f"{skeleton.blueprint.path}: {problem}, {fix}") from None


def _read_geometry(skeleton: Skeleton) -> Geometry:
    text, kinds = skeleton.text, [skeleton.layer_kind(layer) for layer in range(skeleton.layers)]
    linear = kinds.count("linear_attention")
    if getattr(text, "index_head_dim", None):
        raise AttributeError("engines keep an index beside the cache, each in a way of its own")
    latent = getattr(text, "kv_lora_rank", None) or 0
    states = {
        "conv": "linear_conv_kernel_dim", "key_heads": "linear_num_key_heads", "key_dim": "linear_key_head_dim",
        "value_heads": "linear_num_value_heads", "value_dim": "linear_value_head_dim",
    }  # fmt: skip
    widths: dict[str, Any] = {field: int(getattr(text, name)) for field, name in states.items()} if linear else {}
    return Geometry(
        attention=skeleton.layers - linear,
        linear=linear,
        kv_heads=int(text.num_key_value_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        latent=int(latent and latent + text.qk_rope_head_dim),
        **widths,
    )


def _template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read(folder / "tokenizer_config.json").get("chat_template") or ""
    return template if isinstance(template, str) else json.dumps(template)


def sampling(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of SAMPLED."""
    found = _read(folder / "generation_config.json")
    return {name: found[name] for name in SAMPLED if name in found}


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
