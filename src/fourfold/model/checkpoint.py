"""A checkpoint: its model (skeleton.py) and its tensors (sources.py). Layers and what stands around them are read as an
engine multiplies by them: BF16 as it is, int4 dequantized.

Reads what fourfold, GPTQModel, llm-compressor, AutoAWQ and AutoRound write for the families that fourfold knows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, brief, shortened
from fourfold.model import loader
from fourfold.model.config import CONFIG, read_config, read_source_config
from fourfold.model.family import split_stack
from fourfold.model.head import Around, Head, Read, build_head, input_name, output_name, read_ends, read_matrix
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.loader import Room
from fourfold.model.skeleton import Skeleton
from fourfold.model.sources import SourceIndex, open_source
from fourfold.model.tensors import DTYPES, join_digests

Shape = tuple[int, ...]
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Checkpoint(SourceIndex, Skeleton):
    """One checkpoint, quantized or not.

    change: of a value by its name, as it is read by `value`; None for none.
    """

    change: Callable[[str, Tensor], Tensor] | None = None

    @classmethod
    def open(cls, folder: Path, source: Skeleton | None = None) -> Self:
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
        checkpoint = cls._of(folder, raw)
        if source is not None and checkpoint.layers != source.layers:
            raise FourfoldError(
                f"{folder / CONFIG}: num_hidden_layers: got {checkpoint.layers}, expected {source.layers} as the "
                "source has. Bring back the config.json that was written with these shards"
            )
        if problems := list(checkpoint._problems()):
            raise FourfoldError(
                f"{folder}: {shortened(problems)}. A whole release of the source is wanted, as it was written"
            )
        if problem := checkpoint.group_size_problem():
            raise FourfoldError(
                f"{folder / 'config.json'}: {problem}. Bring back the config.json that was written with these shards"
            )
        checkpoint.read_buffers(checkpoint.value)
        return checkpoint

    @classmethod
    def open_source(cls, folder: Path) -> Self:
        """Read config.json and headers of a checkpoint to be quantized, whose tensors are still to be claimed
        (quantize/claims.py). Raises FourfoldError for a folder that holds none.
        """
        return cls._of(folder, read_source_config(folder))

    @classmethod
    def _of(cls, folder: Path, raw: Mapping[str, Any]) -> Self:
        tensors = open_source(folder, raw)
        return cls(**vars(Skeleton.of(raw, folder / CONFIG, tensors.headers)), **vars(tensors))

    @property
    def has_draft_head(self) -> bool:
        """Whether there is a draft head that can be run."""
        return self.has_draft(self.headers)

    def value(self, name: str, device: torch.device = HOST) -> Tensor:
        """A tensor by its name in a BF16 checkpoint; fp32 where it had to be dequantized from the scales as stored.

        Raises FourfoldError for NaN or Inf.
        """
        value = self.dequantized(name) if name in self.stored else self.read_finite(name)
        value = value.to(device)
        return value if self.change is None else self.change(name, value)

    def read_layer(self, layer: int, kept_names: Iterable[str], room: Room = torch.empty) -> LayerTensors:
        """Read one layer, once, experts straight into their stacks from either layout on disk, all in BF16.

        kept_names: the layer's tensors that are no routed experts; room: memory on the host for them.
        Raises FourfoldError for a shard that cannot be read and for NaN or Inf in a weight.
        """
        digests: dict[str, str] = {}

        def read(name: str, out: Tensor | None = None) -> Tensor:
            if out is None:
                header = self.header(name)
                out = room(header.shape, dtype=DTYPES[header.dtype])
            sha = hashlib.sha256()
            value = self.read_finite(name, out=out, sha=sha)
            digests[name] = sha.hexdigest()
            return value

        kept = {name: read(name) for name in sorted(kept_names)}
        stacks = loader.load_stacks(self.blueprint, read, layer, room)
        return LayerTensors.of(kept, stacks, join_digests(digests))

    def layer(
        self, layer: int, device: torch.device, dtype: torch.dtype, taken_from: int | None = None
    ) -> DecoderLayer:
        """One decoder layer, its routed experts dequantized. taken_from: with the weights of a layer of that number."""

        def named(name: str) -> str:
            return name if taken_from is None else name.replace(f"layers.{layer}.", f"layers.{taken_from}.", 1)

        def room(shape: Shape, **_: object) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def read(name: str, place: Tensor | None) -> Tensor:
            value = self.value(named(name), device)
            return value if place is None else place.copy_(value)

        kept = {name: self.value(named(name)) for name in self.blueprint.kept_names(layer)}
        tensors = LayerTensors.of(kept, loader.load_stacks(self.blueprint, read, layer, room))
        return build_layer(self, layer, tensors, device, dtype)

    def draft_experts(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2I, D] and down [E, D, I] of the draft head's experts, from either layout on disk."""
        prefix = self.family.mtp_experts_prefix
        if f"{prefix}gate_up_proj" in self.headers:
            fused = (self.value(prefix + name, device).to(dtype) for name in ("gate_up_proj", "down_proj"))
            return next(fused), next(fused)
        experts = self.widest
        gate_up_ENK = torch.empty(experts.count, 2 * experts.width, experts.hidden, dtype=dtype, device=device)
        down_ENK = torch.empty(experts.count, experts.output, experts.width, dtype=dtype, device=device)
        for expert in range(experts.count):
            gate_up_ENK[expert, : experts.width] = self.value(f"{prefix}{expert}.gate_proj.weight", device)
            gate_up_ENK[expert, experts.width :] = self.value(f"{prefix}{expert}.up_proj.weight", device)
            down_ENK[expert] = self.value(f"{prefix}{expert}.down_proj.weight", device)
        return gate_up_ENK, down_ENK

    def embedding(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Token embeddings [V, D]."""
        return read_matrix(self.blueprint, lambda name: self.value(name, device), input_name(self.blueprint)).to(dtype)

    def around(
        self, device: torch.device, dtype: torch.dtype, read: Read | None = None, *, towers: bool = False
    ) -> Around:
        """What stands before the layers. read: as `value` does, by default; towers: with those that take images."""
        read = read or (lambda name: self.value(name, device))
        embedding_VD = read_matrix(self.blueprint, read, input_name(self.blueprint)).to(dtype)
        ends = read_ends(self.blueprint, read)
        if towers:
            ends |= loader.load_towers(self.blueprint, lambda name, _: read(name))
        return Around(self.blueprint, ends, device, dtype, embedding_VD)

    def head(self, device: torch.device, dtype: torch.dtype) -> Head:
        """Last norm and output head."""

        def read(name: str) -> Tensor:
            return self.value(name, device)

        weight_VD = read_matrix(self.blueprint, read, output_name(self.blueprint))
        return build_head(self.blueprint, read_ends(self.blueprint, read), weight_VD, device, dtype)

    def _problems(self) -> Iterator[str]:
        """What is missing or has another shape, of all that this checkpoint is read for: no vision tower."""
        blueprint = self.blueprint
        inside = (blueprint.layers_path.rpartition("layers")[0], output_name(blueprint).rpartition("weight")[0])
        yield from (f"{name} is missing" for name in blueprint.lacking(inside))
        for name, shape in blueprint.shapes(inside):
            yield from self._problem(name, shape)
        if self.has_draft_head:
            for name, shape in self.draft_tensors():
                if len(shape) < 3 or name in self.headers:
                    yield from self._problem(name, shape)
                    continue
                for part, _, rows in split_stack(name, shape):
                    yield from self._problem(part, rows)

    def _problem(self, name: str, shape: Shape) -> Iterator[str]:
        headers, form = self.headers, self.format
        if name not in headers:
            yield f"{name} is missing"
            return
        if name not in self.stored or form is None:
            if headers[name].shape != shape:
                yield f"{name} is {list(headers[name].shape)}, wanted {list(shape)}"
            return
        stored = self.stored[name]
        stem, found = stored.name, {suffix: part.shape for suffix, part in stored.parts.items()}
        if len(found[form.scales]) != 2:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, wanted two dimensions"
            return
        groups, bits = stored.groups, stored.bits
        if not groups or shape[1] % groups:
            yield f"{stem}{form.scales} is {list(found[form.scales])}, {groups} groups of {shape[1]} inputs"
        for suffix, wanted in form.read_shapes(shape[0], shape[1], groups, bits).items():
            if suffix in found and found[suffix] != wanted:
                yield f"{stem}{suffix} is {list(found[suffix])}, wanted {list(wanted)} for {bits} bits"
