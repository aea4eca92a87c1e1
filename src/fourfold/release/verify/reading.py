"""GGUF and MLX output of `convert`, read by the names and layouts of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.formats import gguf, mlx
from fourfold.formats.format import differences
from fourfold.formats.gguf_names import EXPERTS
from fourfold.model.checkpoint import DTYPES, TensorIndex, raw_bytes
from fourfold.model.config import CONFIG
from fourfold.model.json_object import read_object
from fourfold.model.shards import OutputTensor
from fourfold.records.release import Export
from fourfold.release.conversion import Job
from fourfold.release.export import mlx_shards
from fourfold.release.gguf_plan import GgufPlan
from fourfold.release.stacks import Stack, stacks


@dataclass(frozen=True)
class MlxFolder:
    """A folder for MLX."""

    folder: Path
    job: Job

    @cached_property
    def index(self) -> TensorIndex:
        return TensorIndex.open(self.folder)

    @cached_property
    def made(self) -> Mapping[str, OutputTensor]:
        shards = mlx_shards(self.job, stacks(self.job))
        return {tensor.name: tensor for tensors in shards.values() for tensor in tensors}

    def names(self) -> set[str]:
        return {*self.index.headers}

    def wanted(self) -> Mapping[str, bool]:
        """Return the names of the tensors that OUT makes, and whether each is a stack of int4 experts."""
        return {name: ".switch_mlp." in name for name in self.made}

    def settings_problems(self) -> list[str]:
        """Return how the settings beside the tensors differ from what OUT makes."""
        skeleton = self.job.skeleton
        wanted = mlx.config(skeleton.raw, skeleton.text, self.job.group_size)
        return list(differences(read_object(self.folder / CONFIG), wanted))

    def weight(self, stack: Stack, expert: int) -> Tensor:
        """Dequantize one expert to fp32 [N, K], as the engine's format defines it."""
        name = mlx.stack_name(stack.parts[0].name, stack.projection)
        word_NW, scale_NG, bias_NG = (
            self._slice(name + suffix, expert) for suffix in (mlx.WORDS, mlx.SCALES, mlx.BIASES)
        )
        byte_NB = word_NW.view(torch.uint8)
        nibble_NK = torch.stack([byte_NB & 15, byte_NB >> 4], dim=-1).flatten(1).float()
        nibble_NGK: Tensor = nibble_NK.unflatten(1, (scale_NG.shape[1], -1))
        return (nibble_NGK * scale_NG.float()[..., None] + bias_NG.float()[..., None]).flatten(1)

    def _slice(self, name: str, expert: int) -> Tensor:
        header = self.index.header(name)
        value = torch.empty(header.shape[1:], dtype=DTYPES[header.dtype])
        self.index.read_range(name, expert * value.nbytes, raw_bytes(value))
        return value

    def differs(self, name: str) -> bool:
        """Return whether a tensor that is no stack of int4 experts is not what OUT makes."""
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
        return {name: tensor.kind == gguf.Q4_0 for name, tensor in self.made.items()}

    def settings_problems(self) -> list[str]:
        fields, found = self.readers[0].fields, dict[str, Any]()
        wanted = {key: float32(one) if isinstance(one, float) else one for key, one in self.plan.keys[0].items()}
        for key in wanted.keys() & fields.keys():
            found[key] = fields[key].contents()
        return list(differences(found, wanted))

    def weight(self, stack: Stack, expert: int) -> Tensor:
        return gguf.dequantize(self.tensors[f"blk.{stack.layer}.{EXPERTS[stack.projection]}.weight"], expert)

    def differs(self, name: str) -> bool:
        one, made = self.tensors[name], self.made[name]
        if (one.tensor_type.name, tuple(reversed(one.shape.tolist()))) != (made.kind, made.shape):
            return True
        found = torch.from_numpy(one.data.view("uint8").reshape(-1).copy())
        return not torch.equal(found, made.make().contiguous().view(-1).view(torch.uint8))


Reading = MlxFolder | GgufFile


def open_reading(new: Path, job: Job, record: Export) -> Reading:
    """record: conversion.json."""
    if record.after == gguf.NAME:
        return GgufFile(new, GgufPlan(job, stacks(job), rest=record.rest, mtp=record.has_drafts))
    return MlxFolder(new, job)
