"""torch's switches for deterministic kernels: of the whole process, so they are put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fourfold.distributed.workers import Worker


class Switches(NamedTuple):
    """warn_only: an operation without a deterministic kernel warns; fill: uninitialized memory is filled."""

    deterministic: bool
    warn_only: bool
    fill: bool

    @classmethod
    def now(cls) -> Switches:
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]  # not in torch's stubs
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(torch.are_deterministic_algorithms_enabled(), warn_only, fill)

    def set(self) -> None:
        torch.use_deterministic_algorithms(self.deterministic, warn_only=self.warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill  # type: ignore[attr-defined]


@contextmanager
def repeatable(worker: Worker) -> Iterator[None]:
    """On GPUs, sum a backward pass in one order, in all workers of this process: torch's default is faster, and differs
    from run to run.
    """
    if worker.device.type != "cuda":
        yield
        return
    before = worker.run_once(Switches.now)  # before any worker of this process sets them
    Switches(deterministic=True, warn_only=True, fill=False).set()  # filling would take time and change nothing
    try:
        yield
        worker.all_gather_object(None)
    finally:
        before.set()
