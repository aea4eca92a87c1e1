"""Arguments and options of the commands: their types, their help, how their values are read; errors and exit codes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, NamedTuple

import typer

from fourfold import recipe, terminal
from fourfold.datatypes import FourfoldError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
CHECK_FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # the last two as shells count: 128 and the signal
EXIT_CODES = "Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 130 interrupted, 143 terminated."


class EngineChoice(StrEnum):
    """Engines that `verify` and `serve` know."""

    VLLM = "vllm"
    SGLANG = "sglang"


# --- values of options -------------------------------------------------------------------------------------------


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8G" (the same), "8GB" (10^9), "512MiB" or "8000000000". Raises typer.BadParameter."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a size; wanted a number and a unit, as in 8GiB or 512MiB")
    number, prefix, binary = match.groups()
    decimal = text.strip()[-1] in "bB" and not binary
    size = int(float(number) * (1000 if decimal else 1024) ** POWERS[(prefix or "").lower()])
    if size <= 0:
        raise typer.BadParameter(f"{text!r} is no memory at all; wanted a size as in 8GiB")
    return size


def parse_layers(text: str) -> range:
    """Layers of "4" or "0-3", both ends included, counted from 0. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise typer.BadParameter(f"{text!r} names no layers; wanted a first and a last one, counted from 0, as in 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise typer.BadParameter(f"{text!r} ends before it begins; wanted {last}-{first}?")
    return range(first, last + 1)


class Budget(NamedTuple):
    """Bytes of each device and of the host, None for what is free."""

    memory_bytes: int | None
    host_bytes: int | None


ALL_FREE = Budget(None, None)


def parse_memory(text: str) -> Budget:
    """ "10GiB", or by place as in "cuda=10GiB,host=8GiB" or "cpu=3GiB,host=6GiB". Raises typer.BadParameter."""
    if "=" not in text:
        return Budget(parse_size(text), None)
    sizes: dict[str, int] = {}
    for part in text.split(","):
        place, _, size = (word.strip() for word in part.partition("="))
        if place not in ("cuda", "cpu", "host") or place in sizes:
            raise typer.BadParameter(f"{text!r}: {place!r} is no place; wanted cuda=SIZE or cpu=SIZE, and host=SIZE")
        sizes[place] = parse_size(size)
    if len(sizes.keys() & {"cuda", "cpu"}) != 1:
        raise typer.BadParameter(f"{text!r}: wanted cuda=SIZE or cpu=SIZE, one of them, and host=SIZE if need be")
    return Budget(sizes.get("cuda") or sizes.get("cpu"), sizes.get("host"))


def choose_recipe(name: str, overrides: list[str], calibration: Path | None) -> recipe.Recipe:
    """The recipe with its overrides; a calibration file takes the place of all its sources, with as many rows."""
    chosen = recipe.load_recipe(name, overrides)
    if calibration is None:
        return chosen
    rows = sum(source.rows for source in chosen.calibration.sources)
    kind, field = text_kind(calibration)
    path = json.dumps(str(calibration))  # quoted as TOML quotes
    source = f'{{ path = {path}, kind = "{kind}", fields = ["{field}"], rows = {rows} }}'
    return recipe.load_recipe(name, [*overrides, f"calibration.sources=[{source}]"])


def text_kind(path: Path) -> tuple[str, str]:
    """Kind and field of a calibration file: conversations if it has `messages`, else plain text from `text`.

    Raises FourfoldError if it has neither.
    """
    names = _field_names(path)
    if names is None:
        return "text", "text"
    for kind, field in (("chat", "messages"), ("text", "text")):
        if field in names:
            return kind, field
    raise FourfoldError(
        f"{path}: has the fields {', '.join(names) or '(none)'}; --calibration wants `messages` or `text`. For other "
        "fields write a recipe with [[calibration.sources]] and `fields`: `fourfold recipe show best` is a start"
    )


def _field_names(path: Path) -> list[str] | None:
    """Names of the fields of a .jsonl or .parquet file; None for plain text, and for kinds that the recipe refuses."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.read_schema(path).names)
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                first = json.loads(next((line for line in lines if line.strip()), "{}"))
            return list(first) if isinstance(first, dict) else []
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are ValueErrors
        raise FourfoldError(f"{path}: cannot be read as {path.suffix}: {error}") from None
    return None


# --- errors ------------------------------------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM, as from a scheduler or `kill`: ended as Ctrl-C ends, nothing is left behind."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def answer(out: Path | None = None, go_on: str = "") -> Iterator[None]:
    """Give what went wrong one message on stderr and an exit code. A bug of ours keeps its traceback.

    out: where run.log of a bug would be; go_on: what to say to Ctrl-C and SIGTERM.
    """
    console = terminal.open_console(stderr=True)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except FourfoldError as error:
        console.print(f"Error: {terminal.paragraphs(error)}", style="red", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as error:
        how, code = ("Terminated", TERMINATED) if isinstance(error, Terminated) else ("Interrupted", INTERRUPTED)
        console.print(f"{how}. {go_on}".strip(), soft_wrap=True)
        raise typer.Exit(code) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        log = out / ".fourfold" / "run.log" if out else None
        seen = f" How far the run came is in {terminal.plain(log)}." if log and log.exists() else ""
        console.print(
            f"Error: {type(error).__name__}: this is a bug in fourfold, not a mistake of yours.{seen} "
            "Please report it with what follows.",
            style="red",
            soft_wrap=True,
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


# --- arguments and options -------------------------------------------------------------------------------------------


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Folder of the checkpoint, or org/name or org/name@revision of the Hub.",
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", show_default=False, help="Folder of the release: new, empty or begun before.")
]
PlannedOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="OUT",
        show_default=False,
        help="Where the release would go: free disk space, and what the sweep of a guided run begun there predicts.",
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A preset (fourfold recipe list) or a .toml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one value of the recipe, as in solver.passes=3. Repeatable."
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Calibrate on this file in place of the recipe's sources: .txt, or .jsonl or .parquet with a field `text` "
        "(plain text) or `messages` (conversations, rendered with the model's own chat template).",
    ),
]
Devices = Annotated[
    str,
    typer.Option(
        "--devices",
        metavar="DEVICE",
        help="auto (the first GPU, or else the CPU), all, cuda:0,cuda:1, cpu, or cpu*4: the CPU as four workers. "
        "More than one share the work.",
    ),
]
Device = Annotated[
    str,
    typer.Option("--devices", metavar="DEVICE", help="One: auto (the first GPU, or else the CPU), cpu or cuda:N."),
]
Memory = Annotated[
    Budget | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=parse_memory,
        show_default=False,
        help="Memory that the run may take on each GPU, or on the CPU in all, as in 8GiB; or by place, as in "
        "cuda=10GiB,host=8GiB (cpu=SIZE is then of each worker). Less of it means smaller batches. Left out: what is "
        "free now.",
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        show_default=False,
        help="Predict for another machine from its data sheet: rtx3060x4, h200 or a100x8. Left out: this machine.",
    ),
]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        show_default=False,
        help="Write what each worker did when, for chrome://tracing or ui.perfetto.dev.",
    ),
]
Layers = Annotated[
    range | None,
    typer.Option(
        "--layers",
        metavar="A-B",
        parser=parse_layers,
        show_default=False,
        help="A trial: quantize only layers A to B, counted from 0. The output is marked partial.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop, as `fourfold plan` does.")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an earlier run left in OUT; begin anew.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
PlanJson = Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object, all tensors listed.")]
EventsJson = Annotated[bool, typer.Option("--json", help="Print events as JSON lines, the summary last.")]


Source = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        show_default=False,
        help="The BF16 checkpoint it was made of: a folder, or org/name of the Hub.",
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Measure on this text (.txt, or .jsonl or .parquet with a field `text`) in place of the built-in one.",
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, show_default=False, help="Windows of the text. Left out: up to 64."),
]
Length = Annotated[int, typer.Option(metavar="TOKENS", min=2, help="Tokens of a window.")]
Against = Annotated[
    str | None,
    typer.Option(
        metavar="OUT2",
        show_default=False,
        help="Measure a second release in the same pass: a folder, or org/name of the Hub.",
    ),
]
Replace = Annotated[bool, typer.Option("--replace", help="Replace a measurement on more predictions than this one.")]
Drafts = Annotated[bool, typer.Option(help="Run the draft (MTP) heads. Reads all layers some ten times more.")]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAMES", show_default=False, help="Tasks of lm-eval, by commas, on the server at --url."),
]
Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", show_default=False, help="A running server of the release that speaks OpenAI's protocol."
    ),
]
Release = Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="Folder of a finished release.")]
SourceModel = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="MODEL",
        show_default=False,
        help="The checkpoint that OUT was made from, a folder or org/name of the Hub: compare every tensor with it.",
    ),
]
EngineName = Annotated[
    EngineChoice | None,
    typer.Option(
        "--engine", metavar="vllm|sglang", show_default=False, help="Load and run OUT in it, too (in SGLang: load)."
    ),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(
        "--python",
        metavar="PATH",
        show_default=False,
        help="Interpreter of the environment that has the engine. Left out: the first on PATH that has it.",
    ),
]
TimeLimit = Annotated[
    float, typer.Option("--timeout", metavar="MINUTES", min=0.01, help="End an engine that has not answered by then.")
]
VerdictJson = Annotated[bool, typer.Option("--json", help="Print what lands in verify.json, on one line.")]
