"""What each worker did when: a Chrome trace, and the share of its time that it was busy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold.model.files import write_text


@dataclass(frozen=True)
class Span:
    """A stretch of one worker's time, seconds since the epoch. lane: the worker's rank, -1 reader, -2 writer.

    Stretches of a lane do not overlap: what a stage has inside it is not the stage's, so that names may be summed.
    """

    name: str
    lane: int
    start: float
    end: float
    layer: int


READER, WRITER = -1, -2
WAITS = {"wait": "other workers", "wait for reader": "the reader", "wait for writer": "the writer"}  # span: for whom


class Trace:
    """Spans of one process, added from any thread (a list's append is one step)."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, name: str, lane: int, start: float, end: float, layer: int = -1) -> None:
        self.spans.append(Span(name, lane, start, end, layer))


def waited(spans: Sequence[Span]) -> dict[int, tuple[dict[str, float], float]]:
    """By worker: seconds it waited, by whom for, and seconds from its first span to its last."""
    found: dict[int, tuple[dict[str, float], float]] = {}
    for lane in sorted({span.lane for span in spans if span.lane >= 0}):
        own = [span for span in spans if span.lane == lane]
        waits = dict.fromkeys(WAITS.values(), 0.0)
        for span in own:
            if span.name in WAITS:
                waits[WAITS[span.name]] += span.end - span.start
        found[lane] = waits, max(span.end for span in own) - min(span.start for span in own)
    return found


def write_trace(path: Path, spans: Sequence[Span]) -> None:
    """A file for chrome://tracing or ui.perfetto.dev: the format's complete events ("X"), microseconds."""
    names = {READER: "reader", WRITER: "writer"}
    lanes = sorted({span.lane for span in spans})
    events = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": lane, "args": {"name": names.get(lane, f"worker {lane}")}}
        for lane in lanes
    ]
    events += [
        {
            "ph": "X",
            "name": span.name,
            "pid": 0,
            "tid": span.lane,
            "ts": round(span.start * 1e6),
            "dur": round((span.end - span.start) * 1e6),
            "args": {"layer": span.layer},
        }
        for span in sorted(spans, key=lambda span: span.start)
    ]
    write_text(path, json.dumps({"traceEvents": events}))
