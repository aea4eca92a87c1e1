"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fourfold import __version__, recipe, terminal
from fourfold.datatypes import FourfoldError

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", re.IGNORECASE)
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
CHECK_FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXIT_CODES = "Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 130 interrupted."

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text: lines flow to the terminal's width, and no bracket is taken for markup
    pretty_exceptions_enable=False,  # a bug's traceback is for a report: whole, and as Python writes it
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"""\b
Examples:
  fourfold plan Qwen/Qwen3.6-35B-A3B
  fourfold quantize Qwen/Qwen3.6-35B-A3B ./release --devices cuda:0
  fourfold verify ./release --source Qwen/Qwen3.6-35B-A3B

{EXIT_CODES}""",
)
recipe_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, epilog="Example: fourfold recipe show best > mine.toml"
)
app.add_typer(recipe_app, name="recipe", help="List and show recipes: what quantize does to a model.")


class EngineChoice(StrEnum):
    """Engines that `verify` knows."""

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


def parse_devices(text: str) -> str:
    """ "auto" or one device; whether the machine has it is looked at later. Raises typer.BadParameter."""
    if "," in text:
        raise typer.BadParameter(f"{text!r}: one device is supported for now; wanted auto, cpu or one such as cuda:0")
    return text.strip()


def choose_device(devices: str) -> str:
    """The device that "auto" stands for: the first GPU, or else the CPU. Any other is taken as it is."""
    if devices != "auto":
        return devices
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


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


@contextmanager
def answer(out: Path | None = None, go_on: str = "") -> Iterator[None]:
    """Give what went wrong one message on stderr and an exit code. A bug of ours keeps its traceback.

    out: where run.log of a bug would be; go_on: what to say when the user interrupts.
    """
    console = terminal.open_console(stderr=True)
    try:
        yield
    except FourfoldError as error:
        console.print(f"Error: {terminal.paragraphs(error)}", style="red", soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        console.print(f"Interrupted. {go_on}".strip(), soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
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


# --- commands ----------------------------------------------------------------------------------------------------


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fourfold {__version__}")
        raise typer.Exit


@app.callback()
def entry(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fold a BF16 Mixture-of-Experts checkpoint into an int4 release.

    Every routed expert is quantized with GPTQ, layer by layer; all other tensors are copied bit for bit. The held-out
    perplexity and KL divergence of the release are known when quantization ends.
    """


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
        parser=parse_devices,
        help="auto (the first GPU, or else the CPU), cpu or cuda:N.",
    ),
]
Memory = Annotated[
    int | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        parser=parse_size,
        show_default=False,
        help="Memory that the run may take on the device, as in 8GiB; less of it means smaller batches. "
        "Left out: what is free now.",
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


@app.command(
    epilog=f"""\b
Examples:
  fourfold plan Qwen/Qwen3.6-35B-A3B --devices cuda:0 --memory 10GiB
  fourfold plan ./model --recipe fast --json

{EXIT_CODES}"""
)
def plan(
    model: Model,
    recipe_name: RecipeName = "best",
    overrides: Overrides = None,
    calibration: CalibrationFile = None,
    devices: Devices = "auto",
    memory: Memory = None,
    layers: Layers = None,
    as_json: PlanJson = False,
) -> None:
    """Say what quantize would do: every tensor, memory, disk and time.

    Reads config.json, the tokenizer files and the safetensors headers; no weight is read and nothing is written but the
    Hub cache. Warnings name what an engine would refuse, such as a tensor parallel size that cannot split the groups.
    """
    with answer():
        chosen = choose_recipe(recipe_name, overrides or [], calibration)
        _print_plan(model, chosen, devices, memory, layers, out=None, as_json=as_json)


@app.command(
    epilog=f"""\b
Examples:
  fourfold quantize Qwen/Qwen3.6-35B-A3B ./release
  fourfold quantize ./model ./release --recipe fast --set solver.passes=3
  fourfold quantize ./model ./trial --layers 0-3    # a look at four layers

{EXIT_CODES}"""
)
def quantize(
    model: Model,
    out: Out,
    recipe_name: RecipeName = "best",
    overrides: Overrides = None,
    calibration: CalibrationFile = None,
    devices: Devices = "auto",
    memory: Memory = None,
    layers: Layers = None,
    dry_run: DryRun = False,
    restart: Restart = False,
    quiet: Quiet = False,
    as_json: EventsJson = False,
) -> None:
    """Quantize MODEL into OUT.

    Can be stopped at any time: the same command goes on where it stopped, and the result is the same to the byte. A
    finished layer is on disk before the next but one is begun. Everything is checked before the first weight is read.
    """
    go_on = f"Finished layers are kept: the same command{' without --restart' if restart else ''} goes on."
    with answer(out, go_on):
        chosen = choose_recipe(recipe_name, overrides or [], calibration)
        if dry_run:
            _print_plan(model, chosen, devices, memory, layers, out=out, as_json=as_json)
            return
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        from fourfold.quantize.run import quantize as run

        folder, device = _find(model, chosen, devices, out, progress=not quiet)
        with terminal.watch(console, manner) as progress:
            summary = run(
                folder,
                out,
                chosen,
                device=device,
                memory_bytes=memory,
                layers=layers,
                restart=restart,
                progress=progress,
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "summary", "data": summary.to_json()})
        elif manner is not terminal.Manner.QUIET:
            terminal.show_summary(console, summary)


def _find(
    model: str, chosen: recipe.Recipe, devices: str, out: Path | None, *, progress: bool = True
) -> tuple[Path, str]:
    """The model's folder, and the device. What can be wrong with the rest is found before a model is downloaded."""
    from fourfold.model.hub import resolve_model
    from fourfold.quantize.calibrate import check_sources
    from fourfold.quantize.journal import check_out
    from fourfold.quantize.memory import check_device

    device = choose_device(devices)
    check_device(device)
    check_sources(chosen)
    if out is not None:
        check_out(out, Path(model))
    return resolve_model(model, progress=progress), device


def _print_plan(
    model: str,
    chosen: recipe.Recipe,
    devices: str,
    memory: int | None,
    layers: range | None,
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    from fourfold.quantize.plan import make_plan

    folder, device = _find(model, chosen, devices, out)
    made = make_plan(folder, chosen, device=device, memory_bytes=memory, layers=layers, out=out)
    console = terminal.open_console()
    if as_json:
        terminal.json_line(console, made.to_json())
    else:
        terminal.show_plan(console, made)


@app.command(
    epilog=f"""\b
Examples:
  fourfold evaluate ./release --source Qwen/Qwen3.6-35B-A3B
  fourfold evaluate ./release --source ./model --text wikitext-2-raw-test.parquet --against ./other
  fourfold evaluate ./release --source ./model --tasks gsm8k --url http://localhost:8000

{EXIT_CODES}"""
)
def evaluate(
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False, help="Folder of a finished release.")],
    source: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            show_default=False,
            help="The BF16 checkpoint it was made of: a folder, or org/name of the Hub.",
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Measure on this text (.txt, or .jsonl or .parquet with a field `text`) in place of the built-in one.",
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Windows of the text. Left out: up to 64."),
    ] = None,
    length: Annotated[int, typer.Option(metavar="TOKENS", min=2, help="Tokens of a window.")] = 2048,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="OUT2",
            show_default=False,
            help="Measure a second release in the same pass: a folder, or org/name of the Hub.",
        ),
    ] = None,
    drafts: Annotated[
        bool, typer.Option(help="Run the draft (MTP) heads. Reads all layers some ten times more.")
    ] = True,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", show_default=False, help="Tasks of lm-eval, by commas, on the server at --url."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", show_default=False, help="A running server of the release that speaks OpenAI's protocol."
        ),
    ] = None,
    devices: Devices = "auto",
    quiet: Quiet = False,
    as_json: EventsJson = False,
) -> None:
    """Measure what the release in OUT lost against its source, on held-out text.

    Perplexity, KL divergence, equal tokens, drift and routing by layer, and how many drafts of the MTP head are kept go
    into OUT/metrics.json. Works layer by layer, and for releases of GPTQModel, llm-compressor and AutoRound too.
    """
    if (tasks is None) != (url is None):
        raise typer.BadParameter("--tasks and --url go together: which tasks, and the server to ask")
    with answer():
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        from fourfold.model.hub import resolve_model
        from fourfold.quantize.memory import check_device
        from fourfold.release.evaluate import Protocol, read_state
        from fourfold.release.evaluate import evaluate as run
        from fourfold.release.tasks import Tasks

        device = choose_device(devices)
        check_device(device)
        read_state(out)  # before a model is downloaded
        with terminal.watch(console, manner) as progress:
            found = run(
                out,
                resolve_model(source, progress=not quiet),
                protocol=Protocol(text=text, windows=windows, length=length, drafts=drafts),
                against=resolve_model(against, progress=not quiet) if against else None,
                tasks=Tasks(names=tuple(tasks.split(",")), url=url) if tasks and url else None,
                device=device,
                progress=progress,
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "metrics", "data": found})
        elif manner is not terminal.Manner.QUIET:
            terminal.show_evaluation(console, found)


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


@app.command(
    epilog=f"""\b
Examples:
  fourfold verify ./release
  fourfold verify ./release --source Qwen/Qwen3.6-35B-A3B
  fourfold verify ./release --source ./model --engine vllm --python ~/vllm/bin/python

{EXIT_CODES}"""
)
def verify(
    out: Release,
    source: SourceModel = None,
    engine: EngineName = None,
    python: EnginePython = None,
    timeout: TimeLimit = 60,
    as_json: VerdictJson = False,
) -> None:
    """Check a release: its files, every tensor against the source, a run in a real engine.

    Writes verify.json into OUT. Files alone are always checked; --source and --engine add a level each. Exit code 0
    says that all that was asked for has passed.
    """
    if python is not None and engine is None:
        raise typer.BadParameter("--python is of use with --engine only; wanted both, or neither")
    with answer(out):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=False)
        from fourfold.model.hub import resolve_model
        from fourfold.release.verify.run import Asked
        from fourfold.release.verify.run import verify as run

        model = None if source is None else resolve_model(source, progress=not as_json)
        asked = None if engine is None else Asked(name=engine.value, python=python, limit_seconds=timeout * 60)
        with terminal.watch(console, manner) as progress:
            verdict = run(out, model=model, engine=asked, progress=progress)
        if as_json:
            terminal.json_line(console, verdict.to_json())
        else:
            terminal.show_verdict(console, verdict)
        if not verdict.passed:
            raise typer.Exit(CHECK_FAILED)


@recipe_app.command("list", epilog="Example: fourfold recipe list")
def list_recipes() -> None:
    """List the presets that ship with fourfold."""
    with answer():
        terminal.show_facts(
            terminal.open_console(), [(name, recipe.load_recipe(name).description) for name in recipe.recipe_names()]
        )


@recipe_app.command("show", epilog="Example: fourfold recipe show best > mine.toml")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", show_default=False, help="A preset or a .toml file.")],
) -> None:
    """Print a recipe in full, as TOML to start your own from."""
    with answer():
        typer.echo(recipe.dump_recipe(recipe.load_recipe(name)), nl=False)


def main() -> None:
    """The console script."""
    app(prog_name="fourfold")
