"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fourfold import __version__, api, recipe, reporting, serving, shipping, terminal
from fourfold.options import (
    ALL_FREE,
    CHECK_FAILED,
    EXIT_CODES,
    Against,
    CalibrationFile,
    Device,
    Devices,
    Drafts,
    DryRun,
    EngineName,
    EnginePython,
    EventsJson,
    Layers,
    Length,
    MachineName,
    Memory,
    Model,
    Out,
    Overrides,
    PlanJson,
    PlannedOut,
    Quiet,
    RecipeName,
    Release,
    Replace,
    Restart,
    Source,
    SourceModel,
    Tasks,
    Text,
    TimeLimit,
    TraceFile,
    Url,
    VerdictJson,
    Windows,
    answer,
    choose_recipe,
)
from fourfold.tables.facts import show_facts
from fourfold.tables.run import show_evaluation, show_plan, show_summary, show_verdict

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


@app.command(
    epilog=f"""\b
Examples:
  fourfold plan Qwen/Qwen3.6-35B-A3B --devices cuda:0 --memory 10GiB
  fourfold plan ./model --recipe fast --json
  fourfold plan ./model --machine rtx3060x4    # what it would take there

{EXIT_CODES}"""
)
def plan(
    model: Model,
    recipe_name: RecipeName = "best",
    overrides: Overrides = None,
    calibration: CalibrationFile = None,
    devices: Devices = "auto",
    memory: Memory = None,
    machine: MachineName = None,
    layers: Layers = None,
    out: PlannedOut = None,
    as_json: PlanJson = False,
) -> None:
    """Say what quantize would do: every tensor, memory, disk and time.

    Reads config.json, the tokenizer files and the safetensors headers, and writes nothing but the Hub cache. The time
    is a prediction: this machine is measured for some seconds, on made-up numbers and, for the disk, on 64 MiB of a
    shard whose values nobody looks at. Warnings name what an engine would refuse, such as a tensor parallel size that
    cannot split the groups.
    """
    with answer():
        chosen = choose_recipe(recipe_name, overrides or [], calibration)
        budget = (memory or ALL_FREE)._asdict()
        asked = {"recipe": chosen, "devices": devices, **budget, "machine": machine, "layers": layers, "out": out}
        _print_plan(model, asked, as_json=as_json)


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
    trace: TraceFile = None,
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
        asked = {"recipe": chosen, "devices": devices, **(memory or ALL_FREE)._asdict(), "layers": layers}
        if dry_run:
            _print_plan(model, asked | {"out": out}, as_json=as_json)
            return
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        if api.follows():
            manner = terminal.Manner.QUIET  # the first rank tells for all
        with terminal.watch(console, manner) as progress:
            summary = api.quantize(model, out, **asked, restart=restart, trace=trace, progress=progress)
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "summary", "data": summary.to_json()})
        elif manner is not terminal.Manner.QUIET:
            show_summary(console, summary)


def _print_plan(model: str, asked: dict[str, Any], *, as_json: bool) -> None:
    """asked: arguments of `api.plan`. Progress goes to stderr, as the plan is all that stdout has."""
    errors = terminal.open_console(stderr=True)
    with terminal.watch(errors, terminal.choose(errors, as_json=False, quiet=False)) as progress:
        made = api.plan(model, **asked, progress=progress)
    console = terminal.open_console()
    if as_json:
        terminal.json_line(console, made.to_json())
    else:
        show_plan(console, made)


@app.command(
    epilog=f"""\b
Examples:
  fourfold evaluate ./release --source Qwen/Qwen3.6-35B-A3B
  fourfold evaluate ./release --source ./model --text wikitext-2-raw-test.parquet --against ./other
  fourfold evaluate ./release --source ./model --tasks gsm8k --url http://localhost:8000

{EXIT_CODES}"""
)
def evaluate(
    out: Release,
    source: Source,
    text: Text = None,
    windows: Windows = None,
    length: Length = 2048,
    against: Against = None,
    drafts: Drafts = True,
    tasks: Tasks = None,
    url: Url = None,
    replace: Replace = False,
    devices: Device = "auto",
    quiet: Quiet = False,
    as_json: EventsJson = False,
) -> None:
    """Measure what the release in OUT lost against its source, on held-out text.

    Perplexity, KL divergence, top-1 agreement, drift and routing by layer, and the acceptance rate of the MTP head go
    into OUT/metrics.json; a larger measurement stays unless --replace is given. Works layer by layer, and for releases
    of GPTQModel, llm-compressor and AutoRound too.
    """
    with answer():
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        with terminal.watch(console, manner) as progress:
            found = api.evaluate(
                out,
                source=source,
                text=text,
                windows=windows,
                length=length,
                against=against,
                drafts=drafts,
                tasks=tasks.split(",") if tasks else (),
                url=url,
                replace=replace,
                devices=devices,
                progress=progress,
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "metrics", "data": found})
        elif manner is not terminal.Manner.QUIET:
            show_evaluation(console, found)


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
    quiet: Quiet = False,
    as_json: VerdictJson = False,
) -> None:
    """Check a release: its files, every tensor against the source, a run in a real engine.

    Writes verify.json into OUT. Files alone are always checked; --source and --engine add a level each. Exit code 0
    says that all that was asked for has passed.
    """
    with answer(out):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        name = None if engine is None else engine.value
        with terminal.watch(console, manner) as progress:
            verdict = api.verify(out, source=source, engine=name, python=python, timeout=timeout, progress=progress)
        if as_json:
            terminal.json_line(console, verdict.to_json())
        elif not quiet:
            show_verdict(console, verdict)
        if not verdict.passed:
            raise typer.Exit(CHECK_FAILED)


app.command(epilog=reporting.REPORT_EXAMPLES)(reporting.report)
app.command(epilog=serving.SERVE_EXAMPLES)(serving.serve)
app.command(epilog=serving.BENCH_EXAMPLES)(serving.bench)
app.command(epilog=shipping.INSPECT_EXAMPLES)(shipping.inspect)
app.command(epilog=shipping.CONVERT_EXAMPLES)(shipping.convert)
app.command(epilog=shipping.COMPARE_EXAMPLES)(shipping.compare)
app.command(epilog=shipping.PUBLISH_EXAMPLES)(shipping.publish)


@recipe_app.command("list", epilog="Example: fourfold recipe list")
def list_recipes() -> None:
    """List the presets that ship with fourfold."""
    with answer():
        show_facts(
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
