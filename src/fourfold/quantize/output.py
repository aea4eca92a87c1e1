"""Shards of OUT, written behind the loop on a thread of their own, and layers of MODEL, read ahead of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fourfold.core import grid
from fourfold.datatypes import Action, FourfoldError, LayerResult, ShardRecord, TensorHeader
from fourfold.distributed.trace import READER, WRITER, Trace
from fourfold.distributed.transfer import Transfer
from fourfold.distributed.workers import Worker
from fourfold.formats import named
from fourfold.model.family import split_stack
from fourfold.model.layer import LayerTensors
from fourfold.model.shards import OutputTensor, WrittenShard, write_shard
from fourfold.model.tensors import DTYPES, TensorIndex, join_digests, raw_bytes, require_finite
from fourfold.quantize.claims import TensorClaim
from fourfold.quantize.dense import round_weights
from fourfold.quantize.plan import Plan, RestShard


class Writer:
    """One thread that works behind the loop, a job at a time; a failed job is raised at the next submit or at join."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._pending: Future[None] | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the last job, so that no more than one result is held, and start this one."""
        self.join()
        self._pending = self._pool.submit(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        start = time.time()
        job()
        self._trace.add("write", WRITER, start, time.time())

    def join(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)


def write_tensors(out: Path, shard: str, tensors: Mapping[str, Tensor]) -> WrittenShard:
    """Write tensors by their final names, durably."""
    return write_shard(out, shard, [OutputTensor.of(name, value) for name, value in tensors.items()])


def read_experts(plan: Plan, out: Path, record: ShardRecord, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some of a finished layer's experts, gate_up and down, dequantized in BF16 from its shard."""
    index = TensorIndex.open_shards(out, [record.shard])
    stems, format = plan.source.stems(record.layer), named(plan.recipe.format)

    def stack(projection: str) -> Tensor:
        stacks: dict[str, Tensor] = {}
        for suffix in (format.codes, format.scales):
            names = [f"{stems[expert][projection]}{suffix}" for expert in experts]
            header = index.header(names[0])
            stacks[suffix] = torch.empty(len(names), *header.shape, dtype=DTYPES[header.dtype])
            for place, name in enumerate(names):
                index.read(name, out=stacks[suffix][place])
        group = format.unpack(stacks)
        return torch.stack([grid.dequantize(codes_NK, scale_NG).bfloat16()
                            for codes_NK, scale_NG in zip(group.codes_ENK, group.scale_ENG, strict=True)])  # fmt: skip

    *gate_up, down = (stack(projection) for projection in stems[0])
    return torch.cat(gate_up, dim=1), down


def damage(path: Path, sha256: str) -> str:
    """Return how a finished file differs from what was written, as its name and the reason; empty if it does not."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    return "" if found == sha256 else f"{path.name}: sha256 {found[:16]}, expected {sha256[:16]}"


def check_source(record: ShardRecord, digest: str) -> None:
    """Raises FourfoldError if the source's tensors of a shard are not those it was made from. digest: of them now."""
    if record.source_digest != digest:
        what = f"layer {record.layer}" if record.layer >= 0 else "tensors outside the layers"
        raise FourfoldError(
            f"{what}: the source holds not the bytes that {record.shard} was made from; "
            "bring the first source back, or start over with --restart"
        )


def write_rest(plan: Plan, out: Path, shard: RestShard, solved: LayerResult | None = None) -> ShardRecord:
    """Write one shard of tensors outside the decoder layers: copied, rounded, fused MTP experts split bit for bit.

    solved: codes and scales of the draft experts and the output head, where the shard has them.
    """
    index = plan.source
    digests = {header.name: hashlib.sha256() for header in _read_of(shard)}
    tensors: list[OutputTensor] = []
    given = {} if solved is None else solved.tensors
    for claim in shard.claims:
        header = claim.header
        names = _names_of(plan, claim) if claim.action is Action.QUANTIZE else []
        if names and names[0] in given:
            for chunk in index.chunks(header.name):
                digests[header.name].update(chunk)
            tensors += [OutputTensor.of(name, given[name]) for name in names]
        elif claim.action is Action.QUANTIZE:
            weight_NK = index.read_finite(header.name)
            digests[header.name].update(raw_bytes(weight_NK))  # as rest_digest sees them
            stored = round_weights({header.name: weight_NK}, plan.dense, plan.recipe).stored
            tensors += [OutputTensor.of(name, value) for name, value in stored.items()]
        elif claim.action is Action.SPLIT:
            tensors += _split(index, header, digests[header.name])
        elif claim.action is Action.COPY:
            tensors.append(OutputTensor.copied(header, partial(_copied, index, header, digests[header.name])))
    written = write_shard(out, shard.shard, tensors)
    experts = plan.source.family.mtp_experts_prefix
    return ShardRecord(
        shard=shard.shard,
        layer=-1,
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        source_digest=_joined(digests),
        projections=solved.projections if solved and any(key.startswith(experts) for key in written.keys) else (),
    )


def _names_of(plan: Plan, claim: TensorClaim) -> list[str]:
    """Names in the release of the quantized weights that one source tensor holds."""
    name, shape = claim.header.name, claim.header.shape
    weights = [part for part, *_ in split_stack(name, shape)] if len(shape) == 3 else [name]
    suffixes = named(plan.recipe.format).tensor_shapes(8, 8, 1)
    return [weight.removesuffix("weight") + suffix for weight in weights for suffix in suffixes]


def rest_digest(shard: RestShard, index: TensorIndex) -> str:
    """The source_digest that write_rest would record now; reads the source's tensors, writes nothing."""
    digests = {header.name: hashlib.sha256() for header in _read_of(shard)}
    for name, sha in digests.items():
        for chunk in index.chunks(name):
            sha.update(chunk)
    return _joined(digests)


def _read_of(shard: RestShard) -> Iterator[TensorHeader]:
    return (claim.header for claim in shard.claims if claim.action is not Action.DROP)


def _joined(digests: Mapping[str, hashlib._Hash]) -> str:
    return join_digests({name: sha.hexdigest() for name, sha in digests.items()})


def _copied(index: TensorIndex, header: TensorHeader, sha: Any) -> Iterator[memoryview]:
    for chunk in index.chunks(header.name):
        sha.update(chunk)
        if math.prod(header.shape) > 1:  # a bound of its own may be infinite on purpose
            require_finite(torch.frombuffer(chunk, dtype=DTYPES[header.dtype]), header.name)
        yield chunk


def _split(index: TensorIndex, header: TensorHeader, sha: Any) -> list[OutputTensor]:
    """A fused stack [E, N, K] as one tensor per expert and projection. It is read once to be hashed, when the first of
    them is written, and once more by them: as a whole it takes more memory than all that is written beside it.
    """

    @functools.cache
    def hashed() -> None:
        for _ in _copied(index, header, sha):
            pass

    def rows(start: int, shape: tuple[int, int]) -> Iterator[memoryview]:
        hashed()
        rows_NK = torch.empty(shape, dtype=DTYPES[header.dtype])
        index.read_range(header.name, start, raw_bytes(rows_NK))
        yield raw_bytes(rows_NK)

    return [
        OutputTensor.copied(header, partial(rows, start, shape), name, shape)
        for name, start, shape in split_stack(header.name, header.shape, DTYPES[header.dtype].itemsize)
    ]


@dataclass(frozen=True)
class Taken:
    """A layer as it was read, and as it was sent to each worker of this process: what is no routed expert."""

    tensors: LayerTensors
    sent: tuple[LayerTensors, ...]

    def at(self, worker: Worker) -> LayerTensors:
        """With what was sent on the worker's device, where it may be used from now on."""
        worker.transfer.wait_for_uploads()
        return self.sent[worker.local_rank]


class ReadAhead:
    """Reads the next layer on a thread, and sends it to the devices, while this one is worked on.

    Layers are taken in the order of `layers`. links: of this process's workers; routed experts stay on the host until
    it is known whose they are.
    """

    def __init__(self, plan: Plan, trace: Trace, layers: Iterable[int], links: Sequence[Transfer]) -> None:
        self._plan, self._trace, self._layers, self._links = plan, trace, iter(layers), links
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._next = self._read()

    def _read(self) -> tuple[int, Future[Taken]] | None:
        layer = next(self._layers, None)
        if layer is None:
            return None
        kept = [claim.header.name for claim in self._plan.layers[layer].claims if claim.is_kept]
        return layer, self._pool.submit(self._run, layer, kept)

    def _run(self, layer: int, kept: list[str]) -> Taken:
        start = time.time()
        tensors = self._plan.source.read_layer(layer, kept, self._links[0].host_buffer)
        self._trace.add("read", READER, start, time.time(), layer)
        return Taken(tensors, tuple(self._send(tensors, link) for link in self._links))

    @staticmethod
    def _send(tensors: LayerTensors, link: Transfer) -> LayerTensors:
        return dataclasses.replace(tensors, kept={name: link.to_device(value) for name, value in tensors.kept.items()})

    def take(self, worker: Worker, layer: int) -> Taken:
        """The next layer, for all workers of this process."""

        def take() -> Taken:
            assert self._next is not None and self._next[0] == layer, f"layer {layer} is out of turn"
            with worker.span("wait for reader", layer):
                taken = self._next[1].result()
            self._next = self._read()
            return taken

        return worker.run_once(take)

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
