"""GGUF and MLX output of `convert`, read by the names and layouts of its engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.formats import gguf, mlx
from fourfold.formats.format import differences
from fourfold.model.config import CONFIG
from fourfold.model.json_object import read_object
from fourfold.model.shards import OutputTensor
from fourfold.model.stored import StoredWeight
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes
from fourfold.records.release import Export
from fourfold.release.conversion import Job
from fourfold.release.export import mlx_config, mlx_parts, mlx_shards
from fourfold.release.gguf_plan import GgufPlan
from fourfold.release.stacks import Quantized, dequantized, sort_projections


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Weights of a projection in OUT and in NEW, fp32 [N, K], or rows of them."""

    part: StoredWeight
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class MlxFolder:
    """A folder for MLX."""

    folder: Path
    job: Job
    quantized: Quantized

    @cached_property
    def index(self) -> TensorIndex:
        return TensorIndex.open(self.folder)

    @cached_property
    def parts(self) -> Mapping[str, tuple[StoredWeight, ...]]:
        return mlx_parts(self.quantized)

    @cached_property
    def made(self) -> Mapping[str, OutputTensor]:
        shards = mlx_shards(self.job, self.quantized)
        return {tensor.name: tensor for tensors in shards.values() for tensor in tensors}

    def names(self) -> set[str]:
        return {*self.index.headers}

    def wanted(self) -> Mapping[str, bool]:
        """Return the names of the tensors that OUT makes, and whether `pairs` has each."""
        return {name: f"{name.rpartition('.')[0]}." in self.parts for name in self.made}

    def settings_problems(self) -> list[str]:
        """Return how the settings beside the tensors differ from what OUT makes."""
        return list(differences(read_object(self.folder / CONFIG), mlx_config(self.job, self.quantized)))

    def pairs(self) -> Iterator[Pair]:
        """Yield everything with codes: OUT's weights in NEW's order, NEW's as the engine's format defines them."""
        for name, parts in self.parts.items():
            for number, part in enumerate(parts):
                first = number * part.outputs  # row, of all experts' rows
                for before in dequantized(self.job, part):
                    after = self._weight(name, part.bits, first, len(before))
                    yield Pair(part=part, before=before, after=after)
                    first += len(before)

    def _weight(self, name: str, bits: int, first: int, count: int) -> Tensor:
        word_NW, scale_NG, bias_NG = (
            self._rows(name + suffix, first, count) for suffix in (mlx.WORDS, mlx.SCALES, mlx.BIASES)
        )
        return mlx.dequantize(word_NW, scale_NG, bias_NG, bits)

    def _rows(self, name: str, first: int, count: int) -> Tensor:
        header = self.index.header(name)
        value = torch.empty(count, header.shape[-1], dtype=DTYPES[header.dtype])
        self.index.read_range(name, first * value[0].nbytes, raw_bytes(value))
        return value

    def differs(self, name: str) -> bool:
        """Return whether a tensor that `pairs` does not have is not what OUT makes."""
        made, header = self.made[name], self.index.header(name)
        if (made.dtype, made.shape) != (header.dtype, header.shape):
            return True
        assert not isinstance(made.data, Tensor)
        return any(one != other for one, other in zip(made.data(), self.index.chunks(name), strict=True))


def float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file or its shards, through the gguf package."""

    folder: Path
    plan: GgufPlan

    @cached_property
    def readers(self) -> list[Any]:
        return gguf.read_files(sorted(self.folder.glob("*.gguf")))

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        return {tensor.name: tensor for reader in self.readers for tensor in reader.tensors}

    @cached_property
    def made(self) -> Mapping[str, gguf.GgufTensor]:
        return {tensor.name: tensor for tensor in self.plan.tensors}

    def names(self) -> set[str]:
        return {*self.tensors}

    def wanted(self) -> Mapping[str, bool]:
        return {name: name in self.plan.placed for name in self.made}

    def settings_problems(self) -> list[str]:
        fields, found = self.readers[0].fields, dict[str, Any]()
        wanted = {key: float32(one) if isinstance(one, float) else one for key, one in self.plan.keys[0].items()}
        for key in wanted.keys() & fields.keys():
            found[key] = fields[key].contents()
        return list(differences(found, wanted))

    def pairs(self) -> Iterator[Pair]:
        for name, placed in self.plan.placed.items():
            tensor = self.tensors[name]
            for expert, part in enumerate(placed.parts):
                first = 0
                for before in self.plan.weights(placed, part):
                    after = gguf.dequantize(tensor, expert if placed.row is None else slice(first, first + len(before)))
                    yield Pair(part=part, before=before, after=after)
                    first += len(before)

    def differs(self, name: str) -> bool:
        one, made = self.tensors[name], self.made[name]
        if (one.tensor_type.name, tuple(reversed(one.shape.tolist()))) != (made.kind, made.shape):
            return True
        found = torch.from_numpy(one.data.view("uint8").reshape(-1).copy())
        return not torch.equal(found, made.make().contiguous().view(-1).view(torch.uint8))


Reading = MlxFolder | GgufFile


def open_reading(new: Path, job: Job, record: Export) -> Reading:
    """record: conversion.json."""
    quantized = sort_projections(job)
    if record.after == gguf.NAME:
        return GgufFile(new, GgufPlan(job, quantized, rest=record.rest, mtp=record.has_drafts))
    return MlxFolder(new, job, quantized)


@dataclass(kw_only=True)
class Changes:
    """Weights of one projection that are not OUT's. bits: of a code."""

    bits: int
    weights: int = 0
    changed: int = 0


def count_changes(reading: Reading, report: Callable[[int], None] = lambda done: None) -> dict[str, Changes]:
    """Return how many weights of each projection differ. report: is given the number of projections so far."""
    found: dict[str, Changes] = {}
    for pair in reading.pairs():
        one = found.setdefault(pair.part.name.rstrip("."), Changes(bits=pair.part.bits))
        one.weights += pair.before.numel()
        same = pair.before.shape == pair.after.shape
        one.changed += int((pair.before != pair.after).sum()) if same else pair.before.numel()
        report(len(found))
    return found
