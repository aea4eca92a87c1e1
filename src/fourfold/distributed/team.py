"""The workers of one process, each on a thread: started, watched, stopped together. workers.py has what each can do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.distributed.ranks import Ranks
from fourfold.distributed.spill import Spill
from fourfold.distributed.trace import Trace
from fourfold.distributed.transfer import Transfer
from fourfold.distributed.workers import Worker

T = TypeVar("T")

PATIENCE_SECONDS = 300.0  # without a heartbeat, after which a worker counts as hung; compiling kernels takes a minute
LOOKS = 4  # in that time
LONGEST_STAGES = 20  # patience is at least this multiple of the longest completed stage
BETWEEN = "start"  # also between stages; not in the trace
GRACE_SECONDS = 60.0  # for the next heartbeat of the other workers after one has failed


class Stopped(Exception):
    """Raised in a worker when another one failed or the run was interrupted."""


@dataclass
class _State:
    """Where a worker is. since: start of its stage, in seconds since the epoch; beats: heartbeats; seen: heartbeats at
    the last check; silent: consecutive checks without one; began: number of the check at the stage's start.
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
        self.transfers = tuple(map(Transfer, devices))
        self.threads = max(torch.get_num_threads() // len(devices), 1)
        self.trace = Trace()
        self.spill: Spill | None = None  # for hidden states, where host memory is too small for them
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
        everyone = ranks.all_gather_object(named) if ranks else [named]
        self.counts = [len(names) for names in everyone]  # workers of each rank
        self.names = tuple(name for names in everyone for name in names)
        self.first, self.size = sum(self.counts[: ranks.rank if ranks else 0]), sum(self.counts)

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate host memory for hidden states, in a file where they are to spill."""
        return self.transfers[0].host_buffer(shape, dtype) if self.spill is None else self.spill.allocate(shape, dtype)

    def destroy(self) -> None:
        """Leave the process group."""
        if self.ranks is not None:
            self.ranks.destroy()

    @property
    def is_leader(self) -> bool:
        """Whether this process has worker 0, which writes the output and the journal."""
        return self.first == 0

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return in every process what `make` returns in the leading one, or raise its error. Outside `run` only."""
        return make() if self.ranks is None else self.ranks.broadcast(make)

    def all_reduce_min(self, value: int) -> int:
        """Return the smallest of all processes' values. Outside `run` only."""
        return value if self.ranks is None else min(self.ranks.all_gather_object(value))

    def run(self, job: Callable[[Worker], T]) -> T:
        """Run a job on every worker, each on its own thread; return the result of this process's first worker.

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
        """Wait until all workers have ended or one has failed."""
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
            elsewhere = place == 0 and self.ranks is not None and self.ranks.waiting
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
        """Return the name of one of this process's workers, for messages."""
        return f"worker {self.first + place} on {self.devices[place]}"

    def heartbeat(self, place: int) -> None:
        """Record that a worker is alive. Raises Stopped if the run is over. Spilled hidden states leave memory."""
        if self._failure is not None:
            raise Stopped
        self._states[place].beats += 1
        if self.spill is not None:
            self.spill.drop()

    def enter(self, place: int, stage: str, layer: int) -> tuple[str, int]:
        """Record that a worker enters a stage, which is a heartbeat too. Returns its previous stage and layer."""
        state, now = self._states[place], time.time()
        before = state.stage, state.layer
        if state.stage != BETWEEN:
            self.trace.add(state.stage, self.first + place, state.since, now, state.layer)
        self._longest = max(self._longest, self._looks - state.began - 1)  # looks after the first
        state.stage, state.layer, state.since, state.began = stage, layer, now, self._looks
        self.heartbeat(place)
        return before

    def exchange(self, place: int, value: Any, combine: Callable[[list[Any]], T]) -> T:
        """Barrier over this process's workers; return `combine` of their values, computed on the first one's thread."""
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
        self.heartbeat(place)
        if len(self.devices) == 1:
            return
        before = self.enter(place, "wait", self._states[place].layer)
        with self._changed:
            turn = self._turn
            self._arrived.add(place)
            if len(self._arrived) == len(self.devices):
                self._arrived.clear()
                self._turn += 1
                self._changed.notify_all()
            while self._turn == turn and self._failure is None:
                self._changed.wait()
        self.enter(place, *before)


def alone(device: torch.device) -> Worker:
    """Return a single worker on the caller's thread."""
    return Worker(Team((device,)), 0)
