"""Arguments and options of the commands: their types, their help, how their values are read; errors and exit codes."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from typer.core import TyperCommand

from fourfold import terminal
from fourfold.datatypes import FourfoldError, nearest
from fourfold.quantize.rates import MACHINES

if TYPE_CHECKING:
    from fourfold.recipe import Recipe

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", re.IGNORECASE)
POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
CHECK_FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # the last two as shells count: 128 and the signal
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # Click's, or that of the copy that newer Typers bring
RELEASE_ENGINES = ("vllm", "sglang")
ENGINES = (*RELEASE_ENGINES, "llama.cpp", "mlx")  # the last two run what `convert` wrote
EXIT_CODES = "Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 130 interrupted, 143 terminated."


# --- values of options: parsed here, as Typer's own messages differ between versions -----------------------------


def number(kind: type[int] | type[float], least: float, most: float = math.inf) -> dict[str, Any]:
    """Arguments of typer.Option for a number from `least` to `most`, both included."""
    what = "a whole number" if kind is int else "a number"
    expected = f"{what} from {least:g} to {most:g}" if most < math.inf else f"{what}, at least {least:g}"

    def parse(text: object) -> int | float:
        with suppress(ValueError):
            if least <= (value := kind(str(text))) <= most:
                return value
        raise typer.BadParameter(f"got {text!r}, expected {expected}")

    return {"parser": parse}


def choice(*names: str) -> dict[str, Any]:
    """Arguments of typer.Option for one of a few words."""

    def parse(text: str) -> str:
        if text in names:
            return text
        raise typer.BadParameter(f"got {text!r}, expected one of {', '.join(names)}.{nearest(text, names)}")

    return {"parser": parse, "metavar": "|".join(names), "autocompletion": lambda: list(names)}


def parse_size(text: str) -> int:
    """Bytes of "8GiB", "8G" (the same), "8GB" (10^9) or "512MiB". Raises typer.BadParameter."""
    match = SIZE.fullmatch(text.strip())
    if not match:
        raise typer.BadParameter(f"got {text!r}, expected a number with a unit, as in 8GiB or 512MiB")
    amount, prefix, binary = match.groups()
    decimal = text.strip()[-1] in "bB" and not binary
    size = int(float(amount) * (1000 if decimal else 1024) ** POWERS[prefix.lower()])
    if size <= 0:
        raise typer.BadParameter(f"got {text!r}, expected more than nothing, as in 8GiB")
    return size


def parse_layers(text: str) -> range:
    """Layers of "4" or "0-3", both ends included, counted from 0. Raises typer.BadParameter."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
    if not match:
        raise typer.BadParameter(f"got {text!r}, expected a first and a last layer, counted from 0, as in 0-3")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise typer.BadParameter(f"got {text!r}, which ends before it starts. Did you mean {last}-{first}?")
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
            raise typer.BadParameter(f"{part.strip()}: expected cuda=SIZE or cpu=SIZE, and host=SIZE, each once")
        sizes[place] = parse_size(size)
    if len(sizes.keys() & {"cuda", "cpu"}) != 1:
        raise typer.BadParameter(f"got {text!r}, expected cuda=SIZE or cpu=SIZE beside host=SIZE")
    return Budget(sizes.get("cuda") or sizes.get("cpu"), sizes.get("host"))


def choose_recipe(
    name: str,
    overrides: list[str],
    calibration: Path | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    tensor_parallel: int | None = None,
) -> Recipe:
    """The recipe with its overrides; a calibration file takes the place of all its sources, with as many samples."""
    from fourfold import recipe

    split = [f"scheme.tensor_parallel={tensor_parallel}"] if tensor_parallel else []
    chosen = recipe.load_recipe(name, [*overrides, *split])
    if calibration is not None:
        kind, field = text_kind(calibration)
        rows = sum(source.rows for source in chosen.calibration.sources)
        source = recipe.Source(rows=rows, kind=kind, fields=(field,), path=str(calibration.absolute()))
        chosen = replace(chosen, calibration=replace(chosen.calibration, sources=(source,)))
    return recipe.resize_calibration(chosen, samples, sequence_length)


def text_kind(path: Path) -> tuple[Literal["text", "chat"], str]:
    """Kind and field of a calibration file: conversations if it has `messages`, else plain text from `text`.

    Raises FourfoldError if it has neither, or is of another kind.
    """
    from fourfold.recipe import FILE_KINDS

    if path.suffix not in FILE_KINDS:
        found = path.suffix or "no suffix"
        raise FourfoldError(f"--calibration {path}: got {found}, expected one of {', '.join(FILE_KINDS)}")
    names = _field_names(path)
    if names is not None and "messages" in names:
        return "chat", "messages"
    if names is None or "text" in names:
        return "text", "text"
    raise FourfoldError(
        f"--calibration {path}: got the fields {', '.join(names) or '(none)'}, expected `messages` or `text`. "
        "For others write a recipe with [[calibration.sources]] and `fields`: start from `fourfold recipe show best`"
    )


def _field_names(path: Path) -> list[str] | None:
    """Names of the fields of a .jsonl or .parquet file; None for plain text."""
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


class Command(TyperCommand):
    """A command that suggests the one option that was probably meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            if possible := getattr(error, "possibilities", None):
                error.message = f"{error.message}.{nearest(error.option_name, possible)}"
                error.possibilities = ()
            raise


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
        terminal.say(console, f"Error: {terminal.paragraphs(error)}", "red")
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt as error:
        how, code = ("Terminated", TERMINATED) if isinstance(error, Terminated) else ("Interrupted", INTERRUPTED)
        terminal.say(console, f"{how}. {go_on}".strip())
        raise typer.Exit(code) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        log = out / ".fourfold" / "run.log" if out else None
        seen = f" How far the run came is in {terminal.plain(log)}." if log and log.exists() else ""
        bug = f"Error: {type(error).__name__}: this is a bug in fourfold, not a mistake of yours.{seen}"
        terminal.say(console, f"{bug} Please report it with what follows.", "red")
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
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        **number(int, 1),
        show_default=False,
        help="Calibration samples in all; the recipe's sources keep their proportions. Default: the recipe's.",
    ),
]
SequenceLength = Annotated[
    int | None,
    typer.Option(
        metavar="TOKENS",
        **number(int, 2),
        show_default=False,
        help="Tokens of a sample. Default: the recipe's.",
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tp",
        metavar="GPUS",
        **number(int, 1, 64),
        show_default=False,
        help="GPUs that will serve the release by tensor parallel: the group size fits their part of an expert, too.",
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
        "cuda=10GiB,host=8GiB (cpu=SIZE is then of each worker). Less of it means smaller batches. Default: what is "
        "free now.",
    ),
]
MachineName = Annotated[
    str | None,
    typer.Option(
        "--machine",
        metavar="NAME",
        show_default=False,
        help=f"Predict for another machine from its data sheet: {', '.join(MACHINES)}. Default: this machine.",
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
Derived = Annotated[
    bool,
    typer.Option(
        "--derived",
        help=(
            "Quantize an architecture that is not in fourfold's tests, "
            "if a small copy of it runs like transformers' own."
        ),
    ),
]
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
    typer.Option(metavar="N", **number(int, 1), show_default=False, help="Windows of the text. Default: up to 64."),
]
Length = Annotated[int, typer.Option(metavar="TOKENS", **number(int, 2), help="Tokens of a window.")]
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
        help="The checkpoint that OUT was made from, a folder or org/name of the Hub: compare every tensor with it. "
        "Where `convert` wrote OUT as GGUF or for MLX: the release.",
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        **choice(*ENGINES),
        show_default=False,
        help="Load and run OUT in it, too (in SGLang: load; llama.cpp and MLX run what `convert` wrote for them).",
    ),
]
EnginePython = Annotated[
    Path | None,
    typer.Option(
        "--python",
        metavar="PATH",
        show_default=False,
        help="Interpreter of the environment that has the engine. Default: the first on PATH that has it.",
    ),
]
TimeLimit = Annotated[
    float,
    typer.Option(
        "--timeout", metavar="MINUTES", **number(float, 0.01), help="End an engine that has not answered by then."
    ),
]
VerdictJson = Annotated[bool, typer.Option("--json", help="Print what lands in verify.json, on one line.")]
