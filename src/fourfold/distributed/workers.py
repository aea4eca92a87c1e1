"""Workers, one per device, that run the same loop: samples are split, experts are assigned, expert outputs are summed.

On one host a worker is a thread, and collectives go through host memory. Under torchrun each rank has its own workers;
the first worker of a rank calls torch.distributed. A single worker runs the same code and exchanges nothing. Every
worker calls the collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fourfold.distributed.transfer import Transfer

if TYPE_CHECKING:
    from fourfold.distributed.team import Team

T = TypeVar("T")


@dataclass(frozen=True)
class GatherBuffer:
    """Host memory for the rows of all workers, in order of rank, shared by this process's workers.

    counts: of each worker; own_TX: this worker's slice, filled before `Worker.finish_gather`.
    """

    all_TX: Tensor
    counts: tuple[int, ...]
    own_TX: Tensor


@dataclass(frozen=True)
class Worker:
    """One worker of a team, on its own thread. All workers call its collectives in the same order."""

    team: Team
    local_rank: int  # in this process

    @property
    def rank(self) -> int:
        """Rank among all workers of all processes."""
        return self.team.first + self.local_rank

    @property
    def size(self) -> int:
        return self.team.size

    @property
    def device(self) -> torch.device:
        return self.team.devices[self.local_rank]

    @property
    def transfer(self) -> Transfer:
        return self.team.transfers[self.local_rank]

    @property
    def name(self) -> str:
        return self.team.name(self.local_rank)

    @property
    def is_leader(self) -> bool:
        """Whether this is worker 0, which writes the output and reports progress."""
        return self.rank == 0

    def heartbeat(self) -> None:
        self.team.heartbeat(self.local_rank)

    @contextmanager
    def span(self, stage: str, layer: int = -1) -> Iterator[None]:
        """Name a stretch of work, for errors and for the trace, where nested stretches are not counted twice."""
        before = self.team.enter(self.local_rank, stage, layer)
        yield
        self.team.enter(self.local_rank, *before)

    # ---- split rows

    def own_samples(self, count: int) -> slice:
        """Return this worker's part of `count` samples; the first workers may have one more."""
        first, last = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    # ---- gather

    def gather_buffer(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> GatherBuffer:
        """Allocate a buffer for `count` rows of this worker, still to be computed, and the rows of all others."""
        counts = tuple(self.all_gather_object(count))
        first, last = sum(counts[: self.rank]), sum(counts[: self.rank + 1])
        all_TX = self.run_once(lambda: self.team.allocate((sum(counts), *shape), dtype))
        return GatherBuffer(all_TX, counts, all_TX[first:last])

    def finish_gather(self, room: GatherBuffer) -> tuple[Tensor, tuple[int, ...]]:
        """Return the rows of all workers and their counts, after each has written its own into the buffer."""
        ranks, ends = self.team.ranks, [0, *accumulate(room.counts)]

        def fill(_: list[None]) -> None:
            if ranks:
                ranks.all_gather_into_(room.all_TX, self._rows_of_ranks(ends))

        self.team.exchange(self.local_rank, None, fill)
        return room.all_TX, room.counts

    def all_gather(self, parts: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Return the rows of all workers, in order of rank, and their counts.

        parts: this worker's rows, in pieces, which are taken out of the list as they are copied; what a worker alone
        has in one piece stays where it is.
        """
        if self.size == 1 and len(parts) == 1:
            return parts[0], (len(parts.pop()),)
        known = self.all_gather_object((parts[0].shape[1:], parts[0].dtype) if parts else None)
        shape, dtype = next(like for like in known if like is not None)  # a worker may have no rows
        room = self.gather_buffer(sum(map(len, parts)), shape, dtype)
        start = 0
        parts.reverse()
        while parts:
            part = parts.pop()
            room.own_TX[start : start + len(part)] = part
            start += len(part)
        return self.finish_gather(room)

    def run_once(self, make: Callable[[], T]) -> T:
        """Call `make` once per process and return its result to all of its workers."""
        return self.team.exchange(self.local_rank, None, lambda _: make())

    def all_gather_object(self, value: T) -> list[T]:
        """Return the values of all workers, in order of rank. Small values only: they are pickled between processes."""
        ranks = self.team.ranks

        def combine(values: list[T]) -> list[T]:
            return values if ranks is None else [item for part in ranks.all_gather_object(values) for item in part]

        return self.team.exchange(self.local_rank, value, combine)

    def gather_object(self, value: T) -> list[T]:
        """Return the values of all workers, in order of rank, to worker 0; an empty list to the others."""
        ranks = self.team.ranks

        def combine(values: list[T]) -> list[T]:
            return values if ranks is None else [item for part in ranks.gather_object(values) for item in part]

        values = self.team.exchange(self.local_rank, value, combine)
        return values if self.is_leader else []

    # ---- own experts

    def assigned_experts(self, tokens_E: Tensor) -> tuple[int, ...]:
        """Return this worker's experts, ascending. tokens_E: routed tokens of each expert, equal on all workers."""
        return assign_experts(tokens_E, self.size)[self.rank]

    # ---- sum

    def reduce_scatter(self, partial_TD: Tensor, counts: Sequence[int]) -> Tensor:
        """Sum all workers' outputs and return this worker's rows of the sum, added in order of rank, on the host.

        partial_TD: on the host, for the rows of every worker, in order of rank; counts: rows of each worker.
        """
        if self.size == 1:
            return partial_TD
        ends = [0, *accumulate(counts)]
        ranks = self.team.ranks

        def combine(partials: list[Tensor]) -> list[Tensor]:
            return partials if ranks is None else ranks.reduce_scatter(partials, self._rows_of_ranks(ends))

        mine = slice(ends[self.rank], ends[self.rank + 1])
        partials = self.team.exchange(self.local_rank, partial_TD, combine)
        first = ends[self.team.first] if ranks else 0
        total_TD = partials[0][mine.start - first : mine.stop - first].clone()
        for partial in partials[1:]:
            total_TD += partial[mine.start - first : mine.stop - first]
        return total_TD

    def all_reduce(self, partial: Tensor) -> Tensor:
        """Return the sum of all workers' values, added in order of rank, on this worker's device."""
        if self.size == 1:
            return partial
        partials = self.all_gather_object(partial.cpu())
        total = partials[0].clone()
        for other in partials[1:]:
            total += other
        return total.to(self.device)

    def _rows_of_ranks(self, ends: Sequence[int]) -> list[slice]:
        firsts = [0, *accumulate(self.team.counts)]
        return [slice(ends[first], ends[last]) for first, last in pairwise(firsts)]


def assign_experts(tokens_E: Tensor, workers: int) -> list[tuple[int, ...]]:
    """Assign experts to workers in snake order by tokens, most first: equal numbers of experts, nearly equal tokens.

    Ties are broken by expert number, so that every worker computes the same assignment.
    """
    order = tokens_E.cpu().argsort(descending=True, stable=True).tolist()
    assigned: list[list[int]] = [[] for _ in range(workers)]
    for place, expert in enumerate(order):
        turn, column = divmod(place, workers)
        assigned[column if turn % 2 == 0 else workers - 1 - column].append(expert)
    return [tuple(sorted(experts)) for experts in assigned]
