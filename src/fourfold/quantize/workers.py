"""Devices as workers that run one loop side by side: rows are split, experts are owned, outputs are summed back.

On one host a worker is a thread with a device of its own, and what they exchange lies in host memory. Under torchrun
each rank brings its workers, and the first of them speaks for the rank over torch.distributed. A worker alone is the
same code with nothing to exchange. Workers meet in the same order everywhere; nobody waits busily.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.quantize.link import Link
from fourfold.quantize.ranks import Ranks
from fourfold.quantize.trace import Trace

T = TypeVar("T")

PATIENCE_SECONDS = 300.0  # without a sign of life: a worker hangs. Kernels that are compiled first take a minute
LOOKS = 4  # in that time
LONGEST_STAGES = 20  # so many times the longest stage seen are waited, where that is more
BETWEEN = "start"  # and between stages; not in the trace
GRACE_SECONDS = 60.0  # in which workers come to their next sign of life after one has failed


class Stopped(Exception):
    """Raised in a worker because another one failed, or because the run was interrupted."""


@dataclass
class _State:
    """Where a worker is. since: seconds since the epoch, of its stage's stretch in the trace. beats: its signs of life;
    seen: how many at the last look; silent: looks without a new one; began: looks before the stage.
    """

    stage: str = BETWEEN
    layer: int = -1
    since: float = 0.0
    beats: int = 0
    seen: int = -1
    silent: int = 0
    began: int = 0
    ended: bool = False

    def __str__(self) -> str:
        return self.stage + (f" of layer {self.layer}" if self.layer >= 0 else "")


class Team:
    """The workers of this process. devices: one for each, on this host; ranks: the other processes, if any.

    threads: of each worker's arithmetic on the CPU; names: of all workers' devices, on all hosts; patience_seconds:
    without a sign of life, after which a worker that waits for nobody hangs; stages that took long make it longer.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        ranks: Ranks | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.devices, self.ranks = tuple(devices), ranks
        self.links = tuple(map(Link, devices))
        self.threads = max(torch.get_num_threads() // len(devices), 1)
        self.trace = Trace()
        self.spill: Path | None = None  # folder for what is gathered, where host memory is too small for it
        self.patience_seconds = patience_seconds
        self._states = [_State() for _ in devices]
        self._looks = self._longest = 0  # in all; within the longest stage that has ended
        self._changed = threading.Condition()
        self._arrived: set[int] = set()
        self._turn = 0
        self._values: list[Any] = [None] * len(devices)
        self._outcome: Any = None
        self._failure: BaseException | None = None
        self._readers = 0
        named = [str(device) for device in devices]
        everyone = ranks.everyone(named) if ranks else [named]
        self.counts = [len(names) for names in everyone]  # workers of each rank
        self.names = tuple(name for names in everyone for name in names)
        self.first, self.size = sum(self.counts[: ranks.rank if ranks else 0]), sum(self.counts)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that all workers of this process write to; a file without a name where `spill` says so."""
        if self.spill is None:
            return self.links[0].room(shape, dtype)
        with tempfile.NamedTemporaryFile(dir=self.spill, prefix=".inputs-") as file:
            flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype)
        return flat.view(shape)

    def leave(self) -> None:
        """Part from the other processes."""
        if self.ranks is not None:
            self.ranks.leave()

    @property
    def leads(self) -> bool:
        """Whether this process has the first of all workers: it keeps the journal and writes."""
        return self.first == 0

    def agree(self, make: Callable[[], T]) -> T:
        """Outside `run`: what `make` gives in the leading process, in every process. Its FourfoldError likewise."""
        return make() if self.ranks is None else self.ranks.agree(make)

    def least(self, value: int) -> int:
        """Outside `run`: the smallest of all processes' values."""
        return value if self.ranks is None else min(self.ranks.everyone(value))

    def run(self, job: Callable[[Worker], T]) -> T:
        """Run a job on every worker, each on a thread of its own; what the first of this process returns.

        When one fails the others stop at their next sign of life, and what it raised is raised here: a FourfoldError
        that names device, layer and stage, or for a bug the exception itself with that as its note.
        """
        results: list[T] = []
        threads = [
            threading.Thread(target=self._work, args=(place, job, results), name=f"worker {place}", daemon=True)
            for place in range(len(self.devices))
        ]
        for thread in threads:
            thread.start()
        try:
            self._watch()
        except BaseException as error:  # an interrupt: it belongs to the workers too
            self._fail(error)
            raise
        finally:
            deadline = time.monotonic() + GRACE_SECONDS
            for thread in threads:
                thread.join(max(deadline - time.monotonic(), 0.0) if self._failure else None)
        if self._failure is not None:
            raise self._failure
        return results[0]

    def _work(self, place: int, job: Callable[[Worker], T], results: list[T]) -> None:
        worker = Worker(self, place)
        state = self._states[place]
        try:
            torch.set_num_threads(self.threads)
            if worker.device.type == "cuda":
                torch.cuda.set_device(worker.device.index or 0)  # of this thread: Triton launches there
            with torch.no_grad():
                result = job(worker)
            if place == 0:
                results.append(result)
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again on the thread that called `run`
            where = f"{worker.name}, {state}"
            if len(self.devices) > 1 and isinstance(error, FourfoldError):
                error = FourfoldError(f"{where}: {error}")
            elif not isinstance(error, FourfoldError):
                error.add_note(f"{where}")
            self._fail(error)
        finally:
            with self._changed:
                state.ended = True
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _watch(self) -> None:
        """Until all workers have ended or one has failed."""
        due = 0.0
        with self._changed:
            while self._failure is None and not all(state.ended for state in self._states):
                if time.monotonic() >= due:
                    self._look()
                    due = time.monotonic() + self.patience_seconds / LOOKS
                self._changed.wait(timeout=self.patience_seconds / LOOKS)

    def _look(self) -> None:
        """Fail if a worker that waits for nobody gave no sign of life for more than LOOKS looks, or for many times as
        many as the longest stage took.

        Looks are counted, not seconds: a process that was stopped for a night has missed the looks as well.
        """
        self._looks += 1
        patience = max(LOOKS, LONGEST_STAGES * self._longest)
        for place, state in enumerate(self._states):
            elsewhere = place == 0 and self.ranks is not None and self.ranks.asking
            waits = place in self._arrived or state.ended or elsewhere
            state.silent = 0 if waits or state.beats != state.seen else state.silent + 1
            state.seen = state.beats
            if state.silent > patience:
                seconds = self.patience_seconds * patience / LOOKS
                self._failure = self._failure or FourfoldError(
                    f"{self.name(place)} hangs: no sign of life for {seconds:,.0f} s in {state}. Rerun the same "
                    "command to resume, without that device if need be"
                )

    def name(self, place: int) -> str:
        """Of one of this process's workers, for people."""
        return f"worker {self.first + place} on {self.devices[place]}"

    def beat(self, place: int) -> None:
        """A sign of life. Raises Stopped where the run is over."""
        if self._failure is not None:
            raise Stopped
        self._states[place].beats += 1

    def at(self, place: int, stage: str, layer: int) -> tuple[str, int]:
        """A worker begins with a stage, or goes back to one; a sign of life. Returns where it was."""
        state, now = self._states[place], time.time()
        before = state.stage, state.layer
        if state.stage != BETWEEN:
            self.trace.add(state.stage, self.first + place, state.since, now, state.layer)
        self._longest = max(self._longest, self._looks - state.began - 1)  # looks after the first
        state.stage, state.layer, state.since, state.began = stage, layer, now, self._looks
        self.beat(place)
        return before

    def meet(self, place: int, value: Any, combine: Callable[[list[Any]], T]) -> T:
        """Wait for all workers of this process; what `combine` makes of their values, on the first one's thread."""
        self._values[place] = value
        self._wait(place)
        if place == 0:
            self._outcome = combine(list(self._values))
            self._values = [None] * len(self.devices)
        self._wait(place)
        with self._changed:
            outcome: T = self._outcome
            self._readers += 1
            if self._readers == len(self.devices):  # nothing large outlives the meeting
                self._readers, self._outcome = 0, None
        return outcome

    def _wait(self, place: int) -> None:
        self.beat(place)
        if len(self.devices) == 1:
            return
        before = self.at(place, "wait", self._states[place].layer)
        with self._changed:
            turn = self._turn
            self._arrived.add(place)
            if len(self._arrived) == len(self.devices):
                self._arrived.clear()
                self._turn += 1
                self._changed.notify_all()
            while self._turn == turn and self._failure is None:
                self._changed.wait()
        self.at(place, *before)


@dataclass(frozen=True)
class Gathering:
    """Rows of all workers, in order of rank, in one piece of host memory that this process's workers share.

    counts: of each worker; own_TX: where a worker puts its own, before `Worker.gathered`.
    """

    all_TX: Tensor
    counts: tuple[int, ...]
    own_TX: Tensor


@dataclass(frozen=True)
class Worker:
    """One of a team, on its own thread. Every verb is called by all workers in the same order."""

    team: Team
    place: int  # in this process

    @property
    def rank(self) -> int:
        """Among all workers."""
        return self.team.first + self.place

    @property
    def size(self) -> int:
        return self.team.size

    @property
    def device(self) -> torch.device:
        return self.team.devices[self.place]

    @property
    def link(self) -> Link:
        return self.team.links[self.place]

    @property
    def name(self) -> str:
        return self.team.name(self.place)

    @property
    def leads(self) -> bool:
        """The first of all: it writes and tells."""
        return self.rank == 0

    def beat(self) -> None:
        self.team.beat(self.place)

    @contextmanager
    def span(self, stage: str, layer: int = -1) -> Iterator[None]:
        """A stretch of work under a name: where this worker is, and in the trace, without the stretches inside it."""
        before = self.team.at(self.place, stage, layer)
        yield
        self.team.at(self.place, *before)

    # ---- split rows

    def share(self, count: int) -> slice:
        """This worker's part of `count` rows; the first ones may have one more."""
        first, last = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    # ---- gather

    def room(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Gathering:
        """For `count` rows of this worker, which it has still to make, and those of all others."""
        counts = tuple(self.everyone(count))
        first, last = sum(counts[: self.rank]), sum(counts[: self.rank + 1])
        all_TX = self.once(lambda: self.team.allocate((sum(counts), *shape), dtype))
        return Gathering(all_TX, counts, all_TX[first:last])

    def gathered(self, room: Gathering) -> tuple[Tensor, tuple[int, ...]]:
        """The rows of all workers, when each has put its own there, and how many are of each."""
        ranks, ends = self.team.ranks, [0, *accumulate(room.counts)]
        self.team.meet(
            self.place, None, lambda _: ranks.fill_(room.all_TX, self._rows_of_ranks(ends)) if ranks else None
        )
        return room.all_TX, room.counts

    def gather(self, parts: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """The rows of all workers, in order of rank, and how many are of each.

        parts: this worker's rows, in pieces, which are taken out of the list as they are copied; what a worker alone
        has in one piece stays where it is.
        """
        if self.size == 1 and len(parts) == 1:
            return parts[0], (len(parts.pop()),)
        known = self.everyone((parts[0].shape[1:], parts[0].dtype) if parts else None)
        shape, dtype = next(like for like in known if like is not None)  # a worker may have no rows
        room = self.room(sum(map(len, parts)), shape, dtype)
        start = 0
        parts.reverse()
        while parts:
            part = parts.pop()
            room.own_TX[start : start + len(part)] = part
            start += len(part)
        return self.gathered(room)

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives, made once in each process and shared by its workers."""
        return self.team.meet(self.place, None, lambda _: make())

    def everyone(self, value: T) -> list[T]:
        """The values of all workers, in order of rank; small ones, as they travel pickled between hosts."""
        ranks = self.team.ranks

        def combine(values: list[T]) -> list[T]:
            return values if ranks is None else [item for part in ranks.everyone(values) for item in part]

        return self.team.meet(self.place, value, combine)

    def collect(self, value: T) -> list[T]:
        """The values of all workers at the leading one, in order of rank; elsewhere an empty list."""
        ranks = self.team.ranks

        def combine(values: list[T]) -> list[T]:
            return values if ranks is None else [item for part in ranks.collect(values) for item in part]

        values = self.team.meet(self.place, value, combine)
        return values if self.leads else []

    # ---- own experts

    def own(self, tokens_E: Tensor) -> tuple[int, ...]:
        """Experts of this worker, ascending. tokens_E: routed tokens of each, the same everywhere."""
        return deal(tokens_E, self.size)[self.rank]

    # ---- sum

    def sum(self, partial_TD: Tensor, counts: Sequence[int]) -> Tensor:
        """This worker's rows of the sum of what all workers put out for all rows; added in order of rank, on the host.

        partial_TD: on the host, for the rows of every worker, in order of rank; counts: rows of each worker.
        """
        if self.size == 1:
            return partial_TD
        ends = [0, *accumulate(counts)]
        ranks = self.team.ranks

        def combine(partials: list[Tensor]) -> list[Tensor]:
            return partials if ranks is None else ranks.reduce(partials, self._rows_of_ranks(ends))

        mine = slice(ends[self.rank], ends[self.rank + 1])
        partials = self.team.meet(self.place, partial_TD, combine)
        first = ends[self.team.first] if ranks else 0
        total_TD = partials[0][mine.start - first : mine.stop - first].clone()
        for partial in partials[1:]:
            total_TD += partial[mine.start - first : mine.stop - first]
        return total_TD

    def total(self, partial: Tensor) -> Tensor:
        """The sum of all workers' values, added in order of rank, on this worker's device."""
        if self.size == 1:
            return partial
        partials = self.everyone(partial.cpu())
        total = partials[0].clone()
        for other in partials[1:]:
            total += other
        return total.to(self.device)

    def _rows_of_ranks(self, ends: Sequence[int]) -> list[slice]:
        firsts = [0, *accumulate(self.team.counts)]
        return [slice(ends[first], ends[last]) for first, last in pairwise(firsts)]


def alone(device: torch.device) -> Worker:
    """A worker without others, on the caller's thread."""
    return Worker(Team((device,)), 0)


def deal(tokens_E: Tensor, hands: int) -> list[tuple[int, ...]]:
    """Experts dealt in snake order, those with most tokens first: as many for each, and nearly as many tokens.

    Ties go by number, so that every worker deals the same hands.
    """
    order = tokens_E.cpu().argsort(descending=True, stable=True).tolist()
    dealt: list[list[int]] = [[] for _ in range(hands)]
    for place, expert in enumerate(order):
        turn, seat = divmod(place, hands)
        dealt[seat if turn % 2 == 0 else hands - 1 - seat].append(expert)
    return [tuple(sorted(hand)) for hand in dealt]
