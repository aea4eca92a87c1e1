"""A checkpoint's weights, one layer at a time, as an engine multiplies by them: BF16 as they are, int4 dequantized.

Reads what fourfold, GPTQModel, llm-compressor and AutoRound write for the families that fourfold knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, brief, shortened
from fourfold.formats.format import Format
from fourfold.model import loader
from fourfold.model.config import CONFIG, read_config
from fourfold.model.family import split_names
from fourfold.model.head import Around, Head, build_head, input_name, output_name, read_ends, read_matrix
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.skeleton import Skeleton
from fourfold.model.sources import SourceIndex, group_size_problem, open_source

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """One checkpoint, quantized or not.

    skeleton: its own; format: of int4 projections, None where config.json names none.
    """

    skeleton: Skeleton
    index: SourceIndex
    format: Format | None

    @classmethod
    def open(cls, folder: Path, source: Skeleton | None = None) -> Weights:
        """Check config.json and all headers. source: whose release it is. Raises FourfoldError for a checkpoint of
        another model, a quantization that is not read, and tensors that are missing or of another shape, all in one
        message.
        """
        raw = read_config(folder)
        if source is not None and raw.get("model_type") != source.family.model_type:
            raise FourfoldError(
                f"{folder / CONFIG}: model_type is {brief(raw.get('model_type'))}, the source's is "
                f"{source.family.model_type!r}; a release of the source is wanted"
            )
        index = open_source(folder, raw)
        skeleton = Skeleton.of(raw, folder / CONFIG, index.headers)
        if source is not None and skeleton.layers != source.layers:
            raise FourfoldError(
                f"{folder / CONFIG}: num_hidden_layers: got {skeleton.layers}, expected {source.layers} as the source "
                "has. Bring back the config.json that was written with these shards"
            )
        weights = cls(skeleton=skeleton, index=index, format=index.format)
        problems = list(weights._problems())
        if problems:
            raise FourfoldError(
                f"{folder}: {shortened(problems)}. A whole release of the source is wanted, as it was written"
            )
        if problem := group_size_problem(raw, index.disk, index.format):
            raise FourfoldError(
                f"{folder / 'config.json'}: {problem}. Bring back the config.json that was written with these shards"
            )
        skeleton.read_buffers(lambda name: weights.read(name, torch.device("cpu")))
        return weights

    @property
    def folder(self) -> Path:
        return self.index.folder

    @property
    def has_draft(self) -> bool:
        """Whether there is a draft head that can be run."""
        return self.skeleton.has_draft(self.index.headers)

    def read(self, name: str, device: torch.device) -> Tensor:
        """A tensor by its name in a BF16 checkpoint; fp32 where it had to be dequantized from the scales as stored."""
        return self.index.value(name).to(device)

    def layer(
        self, layer: int, device: torch.device, dtype: torch.dtype, taken_from: int | None = None
    ) -> DecoderLayer:
        """One decoder layer, its routed experts dequantized. taken_from: with the weights of a layer of that number."""
        blueprint, host = self.skeleton.blueprint, torch.device("cpu")

        def named(name: str) -> str:
            return name if taken_from is None else name.replace(f"layers.{layer}.", f"layers.{taken_from}.", 1)

        def room(shape: Shape, **_: object) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def read(name: str, place: Tensor | None) -> Tensor:
            value = self.read(named(name), device)
            return value if place is None else place.copy_(value)

        kept = {name: self.read(named(name), host) for name in blueprint.kept_names(layer)}
        stacks = loader.load_stacks(blueprint, read, layer, room)
        tensors = LayerTensors(kept, None, None, digest="")
        if stacks is not None:
            tensors = replace(tensors, gate_up_ENK=stacks.gate_up_ENK, down_ENK=stacks.down_ENK)
        return build_layer(self.skeleton, layer, tensors, device, dtype)

    def draft_experts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, D] and down [E, D, I] of the draft head's experts, from either layout on disk."""
        prefix = self.skeleton.family.mtp_experts_prefix
        if f"{prefix}gate_up_proj" in self.index.headers:
            fused = (self.read(prefix + name, device).to(dtype) for name in ("gate_up_proj", "down_proj"))
            return next(fused), next(fused)
        experts = self.skeleton.widest
        gate_up_ENK = torch.empty(experts.count, 2 * experts.width, experts.hidden, dtype=dtype, device=device)
        down_ENK = torch.empty(experts.count, experts.output, experts.width, dtype=dtype, device=device)
        for expert in range(experts.count):
            gate_up_ENK[expert, : experts.width] = self.read(f"{prefix}{expert}.gate_proj.weight", device)
            gate_up_ENK[expert, experts.width :] = self.read(f"{prefix}{expert}.up_proj.weight", device)
            down_ENK[expert] = self.read(f"{prefix}{expert}.down_proj.weight", device)
        return gate_up_ENK, down_ENK

    def embedding(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Token embeddings [V, D]."""
        blueprint = self.skeleton.blueprint
        return read_matrix(blueprint, lambda name: self.read(name, device), input_name(blueprint)).to(dtype)

    def around(self, device: torch.device, dtype: torch.dtype) -> Around:
        """What stands before the layers."""
        blueprint = self.skeleton.blueprint
        ends = read_ends(blueprint, lambda name: self.read(name, device))
        return Around(blueprint, ends, device, dtype, self.embedding(device, dtype))

    def head(self, device: torch.device, dtype: torch.dtype) -> Head:
        """Last norm and output head."""
        blueprint = self.skeleton.blueprint

        def read(name: str) -> Tensor:
            return self.read(name, device)

        weight_VD = read_matrix(blueprint, read, output_name(blueprint))
        return build_head(blueprint, read_ends(blueprint, read), weight_VD, device, dtype)

    def _problems(self) -> Iterator[str]:
        """What is missing or has another shape, of all that this checkpoint is read for: no vision tower."""
        blueprint = self.skeleton.blueprint
        inside = (blueprint.layers_path.rpartition("layers")[0], output_name(blueprint).rpartition("weight")[0])
        yield from (f"{name} is missing" for name in blueprint.lacking(inside))
        for name, shape in blueprint.shapes(inside):
            yield from self._problem(name, shape)
        if self.has_draft:
            for name, shape in self.skeleton.draft_tensors():
                if len(shape) < 3 or name in self.index.headers:
                    yield from self._problem(name, shape)
                    continue
                for part, _, place in split_names(name, shape):
                    yield from self._problem(part, (place.stop - place.start, shape[2]))

    def _problem(self, name: str, shape: Shape) -> Iterator[str]:
        headers, disk, form = self.index.headers, self.index.disk.headers, self.format
        if name not in headers:
            yield f"{name} is missing"
            return
        if name not in self.index.stored or form is None:
            if headers[name].shape != shape:
                yield f"{name} is {list(headers[name].shape)}, wanted {list(shape)}"
            return
        stem = name.removesuffix("weight")
        found = {suffix: disk[stem + suffix].shape for suffix in form.suffixes if stem + suffix in disk}
        if len(found[form.scales]) != 2:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, wanted two dimensions"
            return
        groups = found[form.scales][form.inputs_axis]
        if not groups or shape[1] % groups:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, {groups} groups of {shape[1]} inputs"
        bits = self.index.stored[name].bits
        for suffix, wanted in form.read_shapes(shape[0], shape[1], groups, bits).items():
            if suffix in found and found[suffix] != wanted:
                yield f"{stem}{suffix} is {list(found[suffix])}, wanted {list(wanted)} for {bits} bits"
