"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold import __version__, recipe, reporting, serving, shipping, tables, terminal
from fourfold.options import (
    ALL_FREE,
    CHECK_FAILED,
    EXIT_CODES,
    Against,
    Budget,
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
    Quiet,
    RecipeName,
    Release,
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

if TYPE_CHECKING:
    from fourfold.quantize.plan import Plan

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
    as_json: PlanJson = False,
) -> None:
    """Say what quantize would do: every tensor, memory, disk and time.

    Reads config.json, the tokenizer files and the safetensors headers, and writes nothing but the Hub cache. The time
    is a prediction: this machine is measured for some seconds, on made-up numbers and, for the disk, on 64 MiB of a
    shard whose values nobody looks at. Warnings name what an engine would refuse, such as a tensor parallel size that
    cannot split the groups.
    """
    if machine is not None and devices != "auto":
        raise typer.BadParameter("--machine and --devices exclude each other: another machine, or devices of this one")
    with answer():
        chosen = choose_recipe(recipe_name, overrides or [], calibration)
        if machine is None:
            _print_plan(model, chosen, devices, memory, layers, out=None, as_json=as_json)
        else:
            _print_plan_elsewhere(model, chosen, machine, memory, layers, as_json=as_json)


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
        if dry_run:
            _print_plan(model, chosen, devices, memory, layers, out=out, as_json=as_json)
            return
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        from fourfold.quantize.devices import Machine
        from fourfold.quantize.run import quantize as run

        folder = _find(model, chosen, devices, out, progress=not quiet)
        with terminal.watch(console, manner) as progress:
            summary = run(
                folder,
                out,
                chosen,
                machine=Machine(devices=devices, **(memory or ALL_FREE)._asdict()),
                layers=layers,
                restart=restart,
                trace=trace,
                progress=progress,
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "summary", "data": summary.to_json()})
        elif manner is not terminal.Manner.QUIET:
            tables.show_summary(console, summary)


def _find(
    model: str, chosen: recipe.Recipe, devices: str, out: Path | None, *, progress: bool = True
) -> Path:
    """The model's folder. What can be wrong with the rest is found before a model is downloaded."""
    from fourfold.model.hub import resolve_model
    from fourfold.quantize.calibrate import check_sources
    from fourfold.quantize.devices import expand_devices, under_torchrun
    from fourfold.quantize.journal import check_out

    expand_devices(devices)
    check_sources(chosen)
    if out is not None and not under_torchrun():
        check_out(out, Path(model))
    return resolve_model(model, progress=progress)


def _print_plan(
    model: str,
    chosen: recipe.Recipe,
    devices: str,
    memory: Budget | None,
    layers: range | None,
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    from fourfold.quantize.devices import expand_devices
    from fourfold.quantize.gauge import measure_rates
    from fourfold.quantize.plan import make_plan

    folder = _find(model, chosen, devices, out)
    budget = (memory or ALL_FREE)._asdict()
    made = make_plan(folder, chosen, devices=expand_devices(devices), **budget, layers=layers, out=out)
    _show_plan(made.timed(measure_rates(made)), as_json=as_json)


def _print_plan_elsewhere(
    model: str, chosen: recipe.Recipe, machine: str, memory: Budget | None, layers: range | None, *, as_json: bool
) -> None:
    """Of a machine by its data sheet; nothing of this one is asked."""
    from fourfold.quantize.plan import make_plan
    from fourfold.quantize.rates import find_machine

    sheet = find_machine(machine)
    folder = _find(model, chosen, "cpu", None)
    budget = memory or Budget(sheet.budget_bytes, sheet.host_budget_bytes)
    made = make_plan(folder, chosen, devices=sheet.devices, **budget._asdict(), layers=layers)
    _show_plan(made.timed(sheet.rates()), as_json=as_json)


def _show_plan(made: Plan, *, as_json: bool) -> None:
    console = terminal.open_console()
    if as_json:
        terminal.json_line(console, made.to_json())
    else:
        tables.show_plan(console, made)


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
    devices: Device = "auto",
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
        from fourfold.quantize.devices import one_device
        from fourfold.release.evaluate import Protocol, read_state
        from fourfold.release.evaluate import evaluate as run
        from fourfold.release.tasks import Tasks as Asked

        device = one_device(devices)
        read_state(out)  # before a model is downloaded
        with terminal.watch(console, manner) as progress:
            found = run(
                out,
                resolve_model(source, progress=not quiet),
                protocol=Protocol(text=text, windows=windows, length=length, drafts=drafts),
                against=resolve_model(against, progress=not quiet) if against else None,
                tasks=Asked(names=tuple(tasks.split(",")), url=url) if tasks and url else None,
                device=device,
                progress=progress,
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "metrics", "data": found})
        elif manner is not terminal.Manner.QUIET:
            tables.show_evaluation(console, found)


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
            tables.show_verdict(console, verdict)
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
        tables.show_facts(
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
