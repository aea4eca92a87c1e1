"""Check all bytes in one pass: sha256 of each shard, kept tensors, projections, and the source's values for both."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, Tick
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes, require_finite
from fourfold.release.verify.byte_reader import Piece, read_blocks
from fourfold.release.verify.expected import Expected, codes_of
from fourfold.release.verify.projection import Inspected, Problem, Storage, inspect

FINITE, KEPT, SPLIT = "finite", "kept tensors", "MTP split"  # names of checks
WORKERS = max(2, min(8, (os.cpu_count() or 1) - 1))  # beside the thread that reads and hashes
MOST_JOBS = 5 * WORKERS  # running and waiting: their pieces are in memory


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a tensor's values lie in the source: from byte `start` of tensor `name` on. shape: of those values.

    in_rows: they lie there as they are; False in stacks of another order, whose values are not compared.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    split: bool = False
    in_rows: bool = True


@dataclass
class ByteChecks:
    """Results of the pass. problems: by name of check; compared_bytes: that equal the source's, by name of check."""

    sha256: dict[str, str] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    compared_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    inspected: list[Inspected] = field(default_factory=list)
    float_tensors: set[str] = field(default_factory=set)
    bytes_read: int = 0

    def add(self, result: Inspected | tuple[Problem, ...]) -> None:
        if isinstance(result, Inspected):
            self.inspected.append(result)
        for check, said in result.problems if isinstance(result, Inspected) else result:
            if said not in self.problems[check]:
                self.problems[check].append(said)


@dataclass(frozen=True, kw_only=True)
class ByteChecker:
    """origins: of kept tensors by name, of projections by their name with a dot; empty without a source."""

    index: TensorIndex
    expected: Mapping[str, Expected]
    storage: Storage
    source: TensorIndex | None
    origins: Mapping[str, Origin]

    def run(self, tick: Tick) -> ByteChecks:
        """Read everything once. tick: receives counts of bytes. Raises FourfoldError for files that cannot be read."""
        parts = self._parts()
        sizes = Counter(parts.values())
        results, waiting = ByteChecks(), dict[str, dict[str, Piece]]()
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)  # workers run side by side already
            pool = stack.enter_context(ThreadPoolExecutor(WORKERS, thread_name_prefix="verify"))
            jobs = deque[Future[Inspected | tuple[Problem, ...]]]()
            for block in read_blocks(self.index, parts):
                while len(jobs) >= MOST_JOBS:
                    results.add(jobs.popleft().result())
                for piece in block.pieces:
                    name = piece.header.name
                    if name not in parts:
                        self._count(results, piece)
                        jobs.append(pool.submit(self._check_kept, piece))
                        continue
                    projection = parts[name]
                    held = waiting.setdefault(projection, {})
                    held[name.removeprefix(projection)] = piece
                    if len(held) == sizes[projection]:
                        jobs.append(pool.submit(self._inspect, projection, waiting.pop(projection)))
                        results.bytes_read += self._source_bytes(projection)
                if block.sha256:
                    results.sha256[block.shard] = block.sha256
                results.bytes_read += block.size_bytes
                tick(block.size_bytes)
            for job in jobs:
                results.add(job.result())
        results.inspected.sort(key=lambda one: one.name)
        for problems in results.problems.values():
            problems.sort()
        return results

    def _parts(self) -> dict[str, str]:
        """Tensor -> projection, of projections whose tensors are all as expected."""
        wanted = {name: expected for name, expected in self.expected.items() if expected.projection}
        broken = set()
        for name, part in wanted.items():
            header = self.index.headers.get(name)
            if header is None or header.dtype not in part.dtypes or header.shape != part.shape:
                broken.add(part.projection)
        return {name: part.projection for name, part in wanted.items() if part.projection not in broken}

    def _count(self, results: ByteChecks, piece: Piece) -> None:
        name = piece.header.name
        if DTYPES[piece.header.dtype].is_floating_point:
            results.float_tensors.add(name)
        if name in self.origins:
            results.compared_bytes[SPLIT if self.origins[name].split else KEPT] += piece.data.nbytes
            results.bytes_read += piece.data.nbytes

    def _source_bytes(self, projection: str) -> int:
        if self.source is None or projection not in self.origins or not self.origins[projection].in_rows:
            return 0
        origin = self.origins[projection]
        return int(torch.Size(origin.shape).numel()) * DTYPES[self.source.header(origin.name).dtype].itemsize

    def _check_kept(self, piece: Piece) -> tuple[Problem, ...]:
        name = piece.header.name
        problems: list[Problem] = []
        try:
            if piece.header.shape:  # a bound of its own may be infinite on purpose
                require_finite(piece.values, name)
        except FourfoldError as error:
            problems.append((FINITE, str(error)))
        origin = self.origins.get(name)
        if origin is not None and self.source is not None:
            wanted = torch.empty_like(piece.data)
            self.source.read_range(origin.name, origin.start + piece.start, raw_bytes(wanted))
            if not torch.equal(piece.data, wanted):
                problems.append((SPLIT if origin.split else KEPT, f"{name} is not {origin.name} of the source"))
        return tuple(problems)

    def _inspect(self, projection: str, pieces: Mapping[str, Piece]) -> Inspected:
        tensors = {suffix: piece.values.view(piece.header.shape) for suffix, piece in pieces.items()}
        origin, source = self.origins.get(projection), self.source

        def read_source() -> Tensor:
            assert origin is not None and source is not None
            weight_NK = torch.empty(origin.shape, dtype=DTYPES[source.header(origin.name).dtype])
            source.read_range(origin.name, origin.start, raw_bytes(weight_NK))
            return weight_NK

        stored = self.expected[projection + self.storage.format.codes]
        codes = codes_of(projection, stored.bits, self.storage.draft_prefix)
        storage = replace(self.storage, bits=stored.bits, group_size=stored.group_size, codes=codes)
        return inspect(projection, tensors, storage, read_source if origin and origin.in_rows and source else None)
