"""A planned run while it works: plan, texts, journal, the threads for disk work, and who watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fourfold.datatypes import Tick
from fourfold.distributed.workers import Worker
from fourfold.quantize import calibrate
from fourfold.quantize.guide import Left
from fourfold.quantize.journal import Journal
from fourfold.quantize.output import ReadAhead, Writer
from fourfold.quantize.plan import Plan
from fourfold.quantize.progress import ProgressReporter

Texts = tuple[calibrate.CalibrationRows, calibrate.HeldoutRows]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planned run with its texts, its journal, its threads for disk work, and who watches."""

    plan: Plan
    out: Path
    texts: Texts
    journal: Journal
    ahead: ReadAhead
    writer: Writer
    reporter: ProgressReporter
    remaining_sweep: Left | None  # of the sweep before the loop; None without guidance

    @contextmanager
    def stage(self, worker: Worker, stage: str, layer: int = -1, total: int = 0, unit: str = "") -> Iterator[Tick]:
        """Run a named stage. Only worker 0 reports progress, scaling its own count by the number of workers."""
        with worker.span(stage, layer):
            if not worker.is_leader:
                yield lambda count: worker.heartbeat()
                return
            with self.reporter.stage(stage, layer, total, unit) as tick:

                def tell(count: int) -> None:
                    worker.heartbeat()
                    tick(count * worker.size)

                yield tell
