"""A checkpoint's weights, one layer at a time, as an engine multiplies by them: BF16 as they are, int4 dequantized.

Reads what fourfold, GPTQModel, llm-compressor and AutoRound write for the families that fourfold knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold import formats
from fourfold.datatypes import FourfoldError, brief
from fourfold.formats.format import Format
from fourfold.model.checkpoint import TensorIndex, require_finite
from fourfold.model.config import CONFIG, quantization, read_config
from fourfold.model.family import split_names
from fourfold.model.head import Head, build_head
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.skeleton import Skeleton

NAMES_SHOWN = 5
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """One checkpoint, quantized or not.

    skeleton: of the BF16 source, which a release shares; format: of quantized projections, None where config.json names
    no quantization.
    """

    skeleton: Skeleton
    index: TensorIndex
    format: Format | None

    @classmethod
    def open(cls, folder: Path, skeleton: Skeleton) -> Weights:
        """Check config.json and all headers. Raises FourfoldError for a checkpoint of another model, a quantization
        that is not read, and tensors that are missing or of another shape, all in one message.
        """
        raw = read_config(folder)
        if raw.get("model_type") != skeleton.family.model_type:
            raise FourfoldError(
                f"{folder / CONFIG}: model_type is {brief(raw.get('model_type'))}, the source's is "
                f"{skeleton.family.model_type!r}; a release of the source is wanted"
            )
        weights = cls(skeleton=skeleton, index=TensorIndex.open(folder), format=readable_format(raw, folder))
        skeleton.require_layers(folder, weights.index.headers)
        problems = list(weights._problems())
        if problems:
            more = f" and {len(problems) - NAMES_SHOWN:,} more" if len(problems) > NAMES_SHOWN else ""
            raise FourfoldError(
                f"{folder}: {'; '.join(problems[:NAMES_SHOWN])}{more}. A whole release of the source is wanted, as it "
                "was written"
            )
        if problem := group_size_problem(raw, weights.index, weights.format):
            raise FourfoldError(
                f"{folder / 'config.json'}: {problem}. Bring back the config.json that was written with these shards"
            )
        return weights

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def has_draft(self) -> bool:
        """Whether there is a draft head: releases saved by way of transformers have lost it."""
        prefix = self.skeleton.family.mtp_prefix
        return self.skeleton.has_mtp and any(name.startswith(prefix) for name in self.index.headers)

    def read(self, name: str, device: torch.device) -> Tensor:
        """A tensor by its name in a BF16 checkpoint; fp32 where it had to be dequantized from the scales as stored."""
        if name in self.index.headers:
            value = self.index.read(name)
            require_finite(value, name)
            return value.to(device)
        assert self.format is not None
        stem, tensors = name.removesuffix("weight"), {}
        for suffix in self.format.suffixes:
            if stem + suffix in self.index.headers:
                tensors[suffix] = self.index.read(stem + suffix)
                require_finite(tensors[suffix], stem + suffix)
        return self.format.dequantize({suffix: part.to(device)[None] for suffix, part in tensors.items()})[0]

    def layer(self, layer: int, device: torch.device, dtype: torch.dtype) -> DecoderLayer:
        """One decoder layer, its routed experts dequantized."""
        prefix = self.skeleton.family.layer_prefix(layer)
        names = self.skeleton.empty_layer(layer).state_dict()
        kept = {name: self.read(prefix + name, device) for name in names if not name.startswith("mlp.experts.")}
        stacks: tuple[Tensor | None, Tensor | None] = None, None
        if len(kept) < len(names):
            stacks = self.experts(self.skeleton.family.experts_prefix(layer), device, dtype)
        return build_layer(self.skeleton, layer, LayerTensors(kept, *stacks, digest=""), device, dtype)

    def experts(self, prefix: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, D] and down [E, D, I] of the experts under a prefix, from either layout on disk."""
        if f"{prefix}gate_up_proj" in self.index.headers:
            fused = (self.read(prefix + name, device).to(dtype) for name in ("gate_up_proj", "down_proj"))
            return next(fused), next(fused)
        text, experts = self.skeleton.text, self.skeleton.experts
        width, hidden = text.moe_intermediate_size, text.hidden_size
        gate_up_ENK = torch.empty(experts, 2 * width, hidden, dtype=dtype, device=device)
        down_ENK = torch.empty(experts, hidden, width, dtype=dtype, device=device)
        for expert in range(experts):
            gate_up_ENK[expert, :width] = self.read(f"{prefix}{expert}.gate_proj.weight", device)
            gate_up_ENK[expert, width:] = self.read(f"{prefix}{expert}.up_proj.weight", device)
            down_ENK[expert] = self.read(f"{prefix}{expert}.down_proj.weight", device)
        return gate_up_ENK, down_ENK

    def embedding(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Token embeddings [V, D]."""
        return self.read(f"{self.skeleton.family.text_prefix}embed_tokens.weight", device).to(dtype)

    def head(self, device: torch.device, dtype: torch.dtype) -> Head:
        """Last norm and output head."""
        prefix, tied = self.skeleton.family.text_prefix, self.skeleton.config.tie_word_embeddings
        weight_VD = self.read(f"{prefix}embed_tokens.weight" if tied else "lm_head.weight", device)
        return build_head(self.skeleton, self.read(f"{prefix}norm.weight", device), weight_VD, device, dtype)

    def _problems(self) -> Iterator[str]:
        """What is missing or has another shape, of all that this checkpoint is read for."""
        family, headers = self.skeleton.family, self.index.headers
        draft = self.has_draft
        for name, shape in self.skeleton.expected():
            in_draft = bool(family.mtp_prefix) and name.startswith(family.mtp_prefix)
            if not name.startswith((family.text_prefix, "lm_head.")) and not (in_draft and draft):
                continue
            if ".mlp.experts." not in name or name in headers:
                yield from self._problem(name, shape)
                continue
            for part, _, place in split_names(name, shape):
                yield from self._problem(part, (place.stop - place.start, shape[2]))

    def _problem(self, name: str, shape: Shape) -> Iterator[str]:
        headers = self.index.headers
        if name in headers:
            if headers[name].shape != shape:
                yield f"{name} is {list(headers[name].shape)}, wanted {list(shape)}"
            return
        stem, form = name.removesuffix("weight"), self.format
        suffixes = form.suffixes if form else ()
        found = {suffix: headers[stem + suffix].shape for suffix in suffixes if stem + suffix in headers}
        if len(shape) != 2 or form is None or not {form.codes, form.scales} <= set(found):
            yield f"{name} is missing"
            return
        if len(found[form.scales]) != 2:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, wanted two dimensions"
            return
        groups = found[form.scales][form.inputs_axis]
        if not groups or shape[1] % groups:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, {groups} groups of {shape[1]} inputs"
        for suffix, wanted in form.read_shapes(*shape, groups).items():
            if suffix in found and found[suffix] != wanted:
                yield f"{stem}{suffix} is {list(found[suffix])}, wanted {list(wanted)} for 4 bits"


def storage_format(raw: Mapping[str, Any], folder: Path) -> Format | None:
    """Return the format that config.json's `quantization_config` means, None if it has none.

    Raises FourfoldError for a method that is not known. Width and layout are for `readable_format`.
    """
    config = quantization(raw)
    if not config:
        return None
    for form in formats.FORMATS:
        if form.named_by(config):
            return form
    detail = config.get("packing_format") or config.get("checkpoint_format")
    found = brief(config.get("quant_method")) + (f" with {brief(detail)}" if detail else "")
    wanted = ", ".join(form.read_as for form in formats.FORMATS)
    raise FourfoldError(f"{folder / CONFIG}: quantized by {found}, which is not read; expected 4 bits by {wanted}")


def group_size_problem(raw: Mapping[str, Any], index: TensorIndex, format: Format | None) -> str:
    """How config.json's group size differs from what the scales have; "" if it does not, or names none.

    Engines take the size from config.json: with another one they stop, or multiply by the wrong scales. -1 and null are
    a scale for each row; a size for some modules alone (`dynamic`, `config_groups`) counts as one of several.
    """
    stated = list(_group_sizes(raw.get("quantization_config") or raw.get("compression_config")))
    if format is None or not stated:
        return ""
    codes, scales, axis = format.codes, format.scales, format.inputs_axis
    for name, header in sorted(index.headers.items()):
        word = index.headers.get(name.removesuffix(scales) + codes)
        if not name.endswith(f".{scales}") or word is None or len(header.shape) != 2 or len(word.shape) != 2:
            continue
        groups, inputs = header.shape[axis], 8 * word.shape[axis]
        by_row = groups == 1 and any(size in (-1, None) for size in stated)
        if groups and inputs % groups == 0 and inputs // groups not in stated and not by_row:
            return (
                f"quantization_config.group_size: got {', '.join(map(brief, stated))}, expected {inputs // groups}, as "
                f"{name} {list(header.shape)} has it for {inputs:,} inputs"
            )
    return ""


def _group_sizes(settings: object) -> Iterator[object]:
    """Each value of a key group_size, however deep."""
    for key, value in settings.items() if isinstance(settings, dict) else ():
        if key == "group_size":
            yield value
        yield from _group_sizes(value)


def readable_format(raw: Mapping[str, Any], folder: Path) -> Format | None:
    """storage_format of what `Weights` reads. Raises FourfoldError for a method, width or layout that it does not."""
    format = storage_format(raw, folder)
    if format and (problem := format.unreadable(quantization(raw))):
        raise FourfoldError(f"{folder / CONFIG}: {problem}")
    return format
