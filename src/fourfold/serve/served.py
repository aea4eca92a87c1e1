"""A checkpoint as a server sees it: what config.json, the headers, the chat template and generation_config.json say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError
from fourfold.formats.format import Format
from fourfold.model.config import quantization, read_config
from fourfold.model.json_object import read_object
from fourfold.model.skeleton import Skeleton
from fourfold.model.weights import Weights
from fourfold.serve.kvcache import Geometry

SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
REFERENCE = "Qwen3.6-35B-A3B"  # the model of the reference's measured figures
SPLIT = {  # numbers of config.json that the tensor-parallel size must divide
    "attention heads": "num_attention_heads",
    "key heads of linear attention": "linear_num_key_heads",
    "value heads of linear attention": "linear_num_value_heads",
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """format: None where nothing is quantized; group_size: 0 without groups; context: the longest of the model;
    draft_bytes: of the draft head's tensors, 0 without; weight_bytes: of all others; splits: of SPLIT; sampling: of
    generation_config.json.
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
    geometry: Geometry
    splits: Mapping[str, int]
    template: str
    sampling: Mapping[str, Any]

    @property
    def has_draft(self) -> bool:
        return self.draft_bytes > 0

    @property
    def is_reference(self) -> bool:
        """Whether the card's figures are of this very model: by its sizes, whatever its name."""
        sizes = (self.model_type, self.geometry.attention, self.geometry.linear, self.expert_width)
        return sizes == ("qwen3_5_moe", 10, 30, 512) and self.format is not None


def open_served(folder: Path, name: str = "") -> Served:
    """Read any maker's checkpoint but for its weights. name: for clients, by default the folder's own.

    Raises FourfoldError for a folder that is no whole checkpoint or is quantized in an unknown way.
    """
    raw = read_config(folder)
    weights = Weights.open(folder)
    skeleton = weights.skeleton
    prefix = skeleton.family.mtp_prefix
    sizes = {name: header.size_bytes for name, header in weights.index.disk.headers.items()}
    draft_bytes = sum(size for name, size in sizes.items() if prefix and name.startswith(prefix))
    text = skeleton.text
    splits = {title: int(getattr(text, name)) for title, name in SPLIT.items() if getattr(text, name, None)}
    return Served(
        folder=folder, name=name or folder.resolve().name, model_type=skeleton.family.model_type,
        format=weights.format, group_size=_group_size(raw), expert_width=skeleton.widest.width,
        vision="vision_config" in raw, context=int(text.max_position_embeddings),
        weight_bytes=sum(sizes.values()) - draft_bytes, draft_bytes=draft_bytes if weights.has_draft else 0,
        geometry=_geometry(skeleton), splits=splits, template=_template(folder),
        sampling=sampling(folder),
    )  # fmt: skip


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
    return Geometry(
        attention=skeleton.layers - linear,
        linear=linear,
        kv_heads=int(text.num_key_value_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads),
        latent=int(latent and latent + text.qk_rope_head_dim),
        **({field: int(getattr(text, name)) for field, name in states.items()} if linear else {}),
    )


def _group_size(raw: Mapping[str, Any]) -> int:
    """Of the one way in which experts are quantized; model/weights.py has looked at the rest of it."""
    settings = quantization(raw)
    groups = settings.get("config_groups") or {}
    sizes = [group["weights"].get("group_size") for group in groups.values()] or [settings.get("group_size")]
    return max((int(size) for size in sizes if size), default=0)


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
