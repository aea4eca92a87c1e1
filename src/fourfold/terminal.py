"""How a command talks to the terminal: consoles, text of unknown origin, progress from events."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from fourfold.datatypes import Event, ignore
from fourfold.datatypes import Progress as Callback
from fourfold.units import clock_text

PACE_LAYERS = 4  # time left is the mean of so many layers: a period of 3 linear attentions and 1 full one
PIPE_WIDTH = 10_000  # columns: no line of a table is as long
BAR_WIDTH = 20  # columns: with the longest stage and its figures a line has fewer than 80
STAGES = {  # what a stage is called where its own name says too little
    "rehearse": "rehearsing a small copy",
    "gauge": "measuring this machine",
    "calibrate": "reading calibration text",
    "forward": "guidance, forward",
    "backward": "guidance, backward",
    "embed": "embedding rows",
    "restore": "reading back",
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


class Manner(Enum):
    """How progress is shown: bars that move, a line per layer, JSON lines, or nothing."""

    LIVE = "live"
    LINES = "lines"
    JSON = "json"
    QUIET = "quiet"


def open_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no guessed colours."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def plain(text: object) -> str:
    """Text of unknown origin on one line, control characters (and with them terminal sequences) replaced."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text))


def paragraphs(text: object) -> str:
    """The same, line breaks kept."""
    return "\n".join(plain(line) for line in str(text).splitlines())


def say(console: Console, text: str | Text, style: str | None = None) -> None:
    """Print a paragraph: on a terminal wrapped between words, into a pipe on one line."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def show_table(console: Console, table: Table) -> None:
    """Print a table: on a terminal within its width, into a pipe as wide as it is, without trailing blanks."""
    if console.is_terminal:
        console.print(table)
        return
    for line in console.render_lines(table, console.options.update(width=PIPE_WIDTH), pad=False):
        console.print("".join(segment.text for segment in line).rstrip(), soft_wrap=True)


def memory_text(memory_bytes: Mapping[str, int]) -> str:
    """Bytes of each place, for people to read."""
    return ", ".join(f"{plain(place)} {decimal(size)}" for place, size in memory_bytes.items())


# --- progress ----------------------------------------------------------------------------------------------------


class Pace:
    """Seconds of the layers that went by, from the events and a clock; what is left, from layers solved in this run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[tuple[int, str], float] = {}  # by (layer, stage): a writer's stage runs beside a layer's
        self.layer, self._layer_began = -1, clock()  # the layer in work
        self._solved = False
        self._recent: deque[float] = deque(maxlen=PACE_LAYERS)
        self.layer_seconds = 0.0
        self.left_seconds: float | None = None

    def follow(self, event: Event) -> None:
        """Take note of one event. After a "layer" event `layer_seconds` is that layer's, `left_seconds` is renewed."""
        now = self._clock()
        if event.kind == "stage":
            self._began.setdefault((event.layer, event.stage), now)
            # Not `!=`: the writer is still busy with the layer before.
            if event.layer > self.layer and event.stage not in SWEEP:
                self.layer, self._layer_began, self._solved = event.layer, now, False
            self._solved |= event.stage == "solve"
        elif event.kind == "layer":
            self.layer_seconds = now - self._layer_began
            if self._solved:  # layers that are only read back are quick and say nothing about the rest
                self._recent.append(self.layer_seconds)
            if self._recent:
                self.left_seconds = sum(self._recent) / len(self._recent) * (event.layers - event.layer - 1)

    def per_second(self, event: Event) -> float:
        """Speed of the event's stage so far, in its own units."""
        return event.done / max(self._clock() - self._began[event.layer, event.stage], 1e-9)


def layer_line(event: Event, pace: Pace, width: int = PIPE_WIDTH) -> str:
    """One finished layer on one line, with as much of what is known of it as `width` columns hold.

    data: hidden_error, router_agreement (as "routing"), memory_bytes are shown where given.
    """
    data = event.data
    remaining = f", {clock_text(pace.left_seconds)} left" if pace.left_seconds else ""
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


def note_text(event: Event) -> str:
    """What the run is, or a note about it."""
    return ("note: " if event.kind == "note" else "") + paragraphs(event.text)


def stage_text(event: Event) -> str:
    return plain(STAGES.get(event.stage, event.stage))


class Lines:
    """One line per layer and per stage outside the loop over them, for logs and pipes."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self.console, self.pace = console, pace
        self._last_stage = ""

    def show(self, event: Event) -> None:
        if event.kind in ("start", "note"):
            self._say(note_text(event))
        elif event.kind == "layer":
            self._say(layer_line(event, self.pace))
        elif event.kind == "stage" and (event.layer < 0 or event.stage in SWEEP) and event.stage != self._last_stage:
            self._last_stage = event.stage
            self._say(stage_text(event))

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
        self.console.file.flush()  # a log file is read while the run is on


class Bars:
    """A bar over the layers and one over the stage in work; finished layers scroll by above them."""

    def __init__(self, console: Console, pace: Pace) -> None:
        self.pace = pace
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(BAR_WIDTH),
            TaskProgressColumn(),  # a percentage, nothing where the total is unknown
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
        )
        self._layers = self.progress.add_task("layers", total=None, figures="")
        self._stage_name = "starting"
        self._stage = self.progress.add_task(self._stage_name, total=None, figures="")

    def show(self, event: Event) -> None:
        console = self.progress.console
        if event.kind in ("start", "note"):
            say(console, note_text(event))
        elif event.kind == "layer":
            say(console, layer_line(event, self.pace, console.width))
            left = self.pace.left_seconds
            figures = f"{event.layer + 1}/{event.layers}" + (f", {clock_text(left)} left" if left else "")
            self.progress.update(self._layers, completed=event.layer + 1, total=event.layers, figures=figures)
        elif event.kind == "stage" and event.stage not in BEHIND:
            self._show_stage(event)

    def _show_stage(self, event: Event) -> None:
        figures = ""
        if event.done and event.unit:
            figures = f"{self.pace.per_second(event):,.0f} {plain(event.unit)}/s"
        where = f"layer {event.layer + 1}: " if event.layer >= 0 else ""
        name = where + stage_text(event)
        if name != self._stage_name:  # a new bar: one that had a total keeps it
            self.progress.remove_task(self._stage)
            self._stage, self._stage_name = self.progress.add_task(name, total=None, figures=""), name
        if event.done:  # until then the bar pulses
            self.progress.update(self._stage, completed=event.done, total=event.total or None, figures=figures)


def json_line(console: Console, value: Mapping[str, object]) -> None:
    """One JSON object on one line, at once."""
    console.file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    console.file.flush()


def choose(console: Console, *, as_json: bool, quiet: bool) -> Manner:
    """JSON lines before silence, since who asks for both wants to read them; bars only where they can move."""
    if as_json:
        return Manner.JSON
    if quiet:
        return Manner.QUIET
    return Manner.LIVE if console.is_terminal else Manner.LINES


@contextmanager
def watch(console: Console, manner: Manner, clock: Callable[[], float] = time.monotonic) -> Iterator[Callback]:
    """A progress callback that shows events in the given manner. Events may come from several threads."""
    if manner is Manner.QUIET:
        yield ignore
        return
    lock, pace = threading.Lock(), Pace(clock)
    bars = Bars(console, pace) if manner is Manner.LIVE else None
    shown = bars or Lines(console, pace)

    def tell(event: Event) -> None:
        with lock:
            if manner is Manner.JSON:
                json_line(console, asdict(event))
            else:
                pace.follow(event)
                shown.show(event)

    if bars is None:
        yield tell
        return
    with bars.progress:
        yield tell
