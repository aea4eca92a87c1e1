"""What a long job tells whoever watches it, and the seconds of its stages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fourfold.datatypes import Event, Progress, StreamDrift, Tick
from fourfold.quantize import finish
from fourfold.quantize.heap import give_back_free_memory


@dataclass
class ProgressReporter:
    """Tells progress and adds up seconds by stage. layers: that rows go through in this run."""

    progress: Progress
    layers: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def report(self, stage: str, layer: int = -1, text: str = "") -> None:
        self.progress(Event(kind="stage", stage=stage, layer=layer, layers=self.layers, text=text))

    def note(self, text: str, layer: int = -1) -> None:
        self.progress(Event(kind="note", layer=layer, text=text))

    @contextmanager
    def stage(self, stage: str, layer: int = -1, total: int = 0, unit: str = "") -> Iterator[Tick]:
        """A timed stage of `total` units, of which the tick it yields tells how many more are done."""
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done = min(done + count, total) if total else done + count
            self.progress(
                Event(kind="stage", stage=stage, layer=layer, layers=self.layers, done=done, total=total, unit=unit)
            )

        self.report(stage, layer)
        give_back_free_memory()
        start = time.perf_counter()
        yield tick
        self.seconds[stage] += time.perf_counter() - start

    def finish_layer(self, layer: int, drift: StreamDrift) -> None:
        data: dict[str, object] = {"hidden_error": drift.hidden_error, "memory_bytes": finish.peak_memory()}
        if drift.router_agreement is not None:
            data["router_agreement"] = drift.router_agreement
        self.progress(Event(kind="layer", layer=layer, layers=self.layers, data=data))
