"""What lands in OUT: shards behind the loop on a thread of their own, then config, index, log and fourfold.json."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import io
import json
import platform
import resource
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fourfold.core import pack
from fourfold.datatypes import Action, ProjectionStatistics, ShardRecord, TensorHeader
from fourfold.model.checkpoint import DTYPES, TensorIndex, raw_bytes, require_finite
from fourfold.model.family import split_names
from fourfold.model.layer import LayerTensors, read_layer
from fourfold.model.shards import SIDECARS, OutputTensor, copy_file, write_index, write_shard, write_text
from fourfold.quantize.plan import LayerPlan, Plan, RestShard


class Writer:
    """One thread that works behind the loop, one job at a time; a failed job is raised at the next submit or at join."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the last job, so that no more than one result is held, and start this one."""
        self.join()
        self._pending = self._pool.submit(job)

    def join(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)


def write_layer(
    out: Path, layer: LayerPlan, kept: Mapping[str, Tensor], packed: Mapping[str, Tensor], prefix: str
) -> tuple[int, str]:
    """Write one layer's shard durably: kept tensors as they were read, packed ones as they were solved.

    kept: by name inside the layer; packed: by final name. Returns (size in bytes, sha256).
    """
    tensors = [OutputTensor.of(prefix + name, value) for name, value in kept.items()]
    tensors += [OutputTensor.of(name, value) for name, value in packed.items()]
    written = write_shard(out, layer.shard, tensors)
    return written.size_bytes, written.sha256


def stack_names(prefix: str, projections: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Final tensor names of stacked, packed projections: {"gate_proj": {"qweight": [E, ...]}} -> one entry each."""
    return {
        f"{prefix}{expert}.{projection}.{suffix}": stacked[expert]
        for projection, suffixes in projections.items()
        for suffix, stacked in suffixes.items()
        for expert in range(len(stacked))
    }


def write_rest(out: Path, shard: RestShard, index: TensorIndex) -> ShardRecord:
    """Copy one shard of tensors outside the decoder layers; fused MTP experts are split bit for bit."""
    sha = hashlib.sha256()
    tensors: list[OutputTensor] = []
    for claim in shard.claims:
        header = claim.header
        if claim.action is Action.SPLIT:
            tensors += _split(index, header, sha)
        else:
            tensors.append(OutputTensor(header.name, header.dtype, header.shape, _copied(index, header, sha)))
    written = write_shard(out, shard.shard, tensors)
    return ShardRecord(
        shard=shard.shard, layer=-1, size_bytes=written.size_bytes, sha256=written.sha256, source_digest=sha.hexdigest()
    )


def _copied(index: TensorIndex, header: TensorHeader, sha: Any) -> Iterator[memoryview]:
    for chunk in index.chunks(header.name):
        sha.update(chunk)
        require_finite(torch.frombuffer(chunk, dtype=DTYPES[header.dtype]), header.name)
        yield chunk


def _split(index: TensorIndex, header: TensorHeader, sha: Any) -> list[OutputTensor]:
    """A fused stack [E, N, K] as one tensor per expert and projection, read when the first of them is written."""

    @functools.cache
    def stack() -> Tensor:
        stack_ENK = index.read(header.name, sha=sha)
        require_finite(stack_ENK, header.name)
        return stack_ENK

    def rows(expert: int, place: slice) -> Iterator[memoryview]:
        yield raw_bytes(stack()[expert, place])

    return [
        OutputTensor(name, header.dtype, (place.stop - place.start, header.shape[2]), rows(expert, place))
        for name, expert, place in split_names(header.name, header.shape)
    ]


class ReadAhead:
    """Reads the next layer on a thread while this one is worked on. Layers are taken in order."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._next: Future[LayerTensors] = self._read(0)

    def _read(self, layer: int) -> Future[LayerTensors]:
        return self._pool.submit(read_layer, self._plan.index, self._plan.skeleton, layer)

    def take(self, layer: int) -> LayerTensors:
        tensors = self._next.result()
        if layer + 1 < self._plan.solve.stop:
            self._next = self._read(layer + 1)
        return tensors

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def source_digest(plan: Plan) -> str:
    """sha256 of what decides the source before a weight is read: headers, config.json, tokenizer and other sidecars."""
    sha = hashlib.sha256(plan.index.digest.encode())
    for name in ("config.json", *SIDECARS):
        path = plan.index.folder / name
        if path.is_file():
            sha.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return sha.hexdigest()
