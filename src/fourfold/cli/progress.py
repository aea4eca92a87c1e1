"""The progress of a command, from its events: bars, a line per layer, or JSON lines."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from enum import Enum

from rich.console import Console
from rich.filesize import decimal

from fourfold.cli.console import PIPE_WIDTH, paragraphs, plain, print_json
from fourfold.datatypes import Event, ignore
from fourfold.datatypes import Progress as Callback
from fourfold.units import clock_text

PACE_LAYERS = 4  # the remaining time is the mean over these layers: a period of 3 linear attentions and 1 full one
BAR_WIDTH = 20  # columns: with the longest stage and its figures a line has fewer than 80
STAGES = {  # what a stage is called where its own name says too little
    "rehearse": "rehearsing a small copy",
    "gauge": "measuring this machine",
    "calibrate": "reading calibration text",
    "forward": "guidance, forward",
    "backward": "guidance, backward",
    "embed": "embedding rows",
    "restore": "reading back",
    "head": "quantizing the output head",
    "drafts": "quantizing draft experts",
    "measure": "measuring on held-out text",
    "draft": "drafting on text that the model writes",
    "tasks": "running lm-eval",
    "copy": "copying other tensors",
    "finish": "finishing",
    "verify": "reading every byte",
    "convert": "converting",
    "compare": "comparing",
    "publish": "reading every byte",
    "engine": "running the engine",
}
SWEEP = ("forward", "backward")  # before the loop: its layers are gone through once more
BEHIND = ("write", "record", "recorded", "copy")  # of the writer's thread: not what the loop is at


class OutputMode(Enum):
    """How progress is shown: moving bars, a line per layer, JSON lines, or nothing."""

    BARS = "bars"
    LINES = "lines"
    JSON = "json"
    QUIET = "quiet"


def memory_text(memory_bytes: Mapping[str, int]) -> str:
    """Bytes per place, as text."""
    return ", ".join(f"{plain(place)} {decimal(size)}" for place, size in memory_bytes.items())


class Pace:
    """Seconds per layer, from the events and a clock; remaining seconds, from the layers solved in this run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[tuple[int, str], float] = {}  # by (layer, stage): a writer's stage runs beside a layer's
        self.layer, self._layer_began = -1, clock()  # the layer in work
        self._solved = False
        self._recent: deque[float] = deque(maxlen=PACE_LAYERS)
        self.layer_seconds = 0.0
        self.remaining_seconds: float | None = None

    def follow(self, event: Event) -> None:
        """Record one event. A "layer" event updates `layer_seconds` and `remaining_seconds`."""
        now = self._clock()
        if event.kind == "stage":
            self._began.setdefault((event.layer, event.stage), now)
            # Not `!=`: the writer is still busy with the layer before.
            if event.layer > self.layer and event.stage not in SWEEP:
                self.layer, self._layer_began, self._solved = event.layer, now, False
            self._solved |= event.stage == "solve"
        elif event.kind == "layer":
            self.layer_seconds = now - self._layer_began
            if self._solved:  # layers that are only read back are fast and say nothing about the rest
                self._recent.append(self.layer_seconds)
            if self._recent:
                self.remaining_seconds = sum(self._recent) / len(self._recent) * (event.layers - event.layer - 1)

    def per_second(self, event: Event) -> float:
        """Units per second of the event's stage so far."""
        return event.done / max(self._clock() - self._began[event.layer, event.stage], 1e-9)


def layer_line(event: Event, pace: Pace, width: int = PIPE_WIDTH) -> str:
    """One finished layer on one line, with as many figures as fit into `width` columns."""
    data = event.data
    remaining = f", {clock_text(pace.remaining_seconds)} left" if pace.remaining_seconds else ""
    line = f"layer {event.layer + 1}/{event.layers}  {clock_text(pace.layer_seconds)}{remaining}"
    parts = [plain(event.text)] if event.text else []
    if isinstance(data.get("hidden_error"), float):
        parts.append(f"hidden error {data['hidden_error']:.4f}")
    if isinstance(data.get("router_agreement"), float):
        parts.append(f"routing {data['router_agreement']:.1%}")
    if isinstance(memory := data.get("memory_bytes"), dict) and memory:
        gpus = [size for place, size in memory.items() if place != "host"]
        parts.append(memory_text({"host": memory["host"]} | ({"GPU": max(gpus)} if gpus else {})))
    for part in parts:
        if len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line


class Display:
    """What people see: a line per layer and per note; above them bars, or a line for each stage outside the layers."""

    def __init__(self, console: Console, pace: Pace, *, bars: bool) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

        self.console, self.pace, self._stage_name = console, pace, "starting"
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            TaskProgressColumn(),  # a percentage, nothing where the total is unknown
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            disable=not bars,
        )
        self._layers = self.bars.add_task("layers", total=None, figures="")
        self._stage = self.bars.add_task(self._stage_name, total=None, figures="")

    def show(self, event: Event) -> None:
        if event.kind in ("start", "note"):
            self._print(("note: " if event.kind == "note" else "") + paragraphs(event.text))
        elif event.kind == "layer":
            self._print(layer_line(event, self.pace, PIPE_WIDTH if self.bars.disable else self.console.width))
            remaining = self.pace.remaining_seconds
            figures = f"{event.layer + 1}/{event.layers}" + (f", {clock_text(remaining)} left" if remaining else "")
            self.bars.update(self._layers, completed=event.layer + 1, total=event.layers, figures=figures)
        elif event.kind == "stage" and self.bars.disable:
            if (event.layer < 0 or event.stage in SWEEP) and event.stage != self._stage_name:
                self._stage_name = event.stage
                self._print(stage_text(event))
        elif event.kind == "stage" and event.stage not in BEHIND:
            self._move(event)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=self.bars.disable)
        self.console.file.flush()  # a log file is read while the run is on

    def _move(self, event: Event) -> None:
        """Move the bar of the event's stage."""
        speed = f"{self.pace.per_second(event):,.0f} {plain(event.unit)}/s" if event.done and event.unit else ""
        name = (f"layer {event.layer + 1}: " if event.layer >= 0 else "") + stage_text(event)
        if name != self._stage_name:  # a new bar: one that had a total keeps it
            self.bars.remove_task(self._stage)
            self._stage, self._stage_name = self.bars.add_task(name, total=None, figures=""), name
        if event.done:  # until then the bar pulses
            self.bars.update(self._stage, completed=event.done, total=event.total or None, figures=speed)


def stage_text(event: Event) -> str:
    return plain(STAGES.get(event.stage, event.stage))


def choose_mode(console: Console) -> OutputMode:
    """Bars only where they can move."""
    return OutputMode.BARS if console.is_terminal else OutputMode.LINES


@contextmanager
def show_progress(
    console: Console, mode: OutputMode, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callback]:
    """A progress callback that shows events in the given mode. Events may come from several threads."""
    if mode is OutputMode.QUIET:
        yield ignore
        return
    lock, pace = threading.Lock(), Pace(clock)
    display = Display(console, pace, bars=mode is OutputMode.BARS)

    def report(event: Event) -> None:
        with lock:
            if mode is OutputMode.JSON:
                print_json(console, asdict(event))
            else:
                pace.follow(event)
                display.show(event)

    with display.bars if mode is OutputMode.BARS else nullcontext():
        yield report
