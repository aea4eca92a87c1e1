"""The command line: parse, call one function, print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated, Any

import typer

from fourfold import __version__, api, reporting, serving, shipping, terminal
from fourfold.options import (
    ALL_FREE,
    CHECK_FAILED,
    EXIT_CODES,
    INTERRUPTED,
    TERMINATED,
    Against,
    CalibrationFile,
    Command,
    Derived,
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
    Samples,
    SequenceLength,
    Source,
    SourceModel,
    Tasks,
    TensorParallel,
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
command = partial(app.command, cls=Command)
recipe_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, epilog="Example: fourfold recipe show best > mine.toml"
)
app.add_typer(recipe_app, name="recipe", help="List and show recipes, the settings of quantize.")


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
    """Quantize Mixture-of-Experts models to int4 (W4A16, GPTQ) for vLLM and SGLang.

    Every routed expert is quantized with GPTQ, one layer at a time; all other tensors are copied bit for bit. At the
    end the release's perplexity and KL divergence on held-out text are reported.
    """


@command(
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
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    devices: Devices = "auto",
    memory: Memory = None,
    machine: MachineName = None,
    tensor_parallel: TensorParallel = None,
    layers: Layers = None,
    out: PlannedOut = None,
    as_json: PlanJson = False,
) -> None:
    """Show what quantize would do: tensors, memory, disk, time.

    Reads config.json, the tokenizer files, the safetensors headers and the calibration text, which is not tokenized.
    Writes nothing but the Hub cache. The time is a prediction, from a microbenchmark of this machine that takes some
    seconds. Warnings name what an engine would refuse.
    """
    with answer():
        chosen = choose_recipe(recipe_name, overrides or [], calibration, samples, sequence_length, tensor_parallel)
        asked = {"recipe": chosen, "devices": devices, **(memory or ALL_FREE)._asdict(), "layers": layers}
        asked |= {"machine": machine, "out": out}
        _print_plan(model, asked, as_json=as_json)


@command(
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
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    devices: Devices = "auto",
    memory: Memory = None,
    tensor_parallel: TensorParallel = None,
    layers: Layers = None,
    derived: Derived = False,
    dry_run: DryRun = False,
    restart: Restart = False,
    trace: TraceFile = None,
    quiet: Quiet = False,
    as_json: EventsJson = False,
) -> None:
    """Quantize MODEL into OUT.

    Resumable: stop it at any time and rerun the same command; the output is bit-identical. At most one layer of work is
    lost. Everything is checked before the first weight is read.
    """
    go_on = f"Finished layers are kept. Rerun the same command{' without --restart' if restart else ''} to resume."
    with answer(out, go_on):
        chosen = choose_recipe(recipe_name, overrides or [], calibration, samples, sequence_length, tensor_parallel)
        asked = {"recipe": chosen, "devices": devices, **(memory or ALL_FREE)._asdict(), "layers": layers}
        if dry_run:
            _print_plan(model, asked | {"out": out}, as_json=as_json)
            return
        console = terminal.open_console()
        manner = terminal.choose(console, as_json=as_json, quiet=quiet)
        if api.follows():
            manner = terminal.Manner.QUIET  # the first rank tells for all
        with terminal.watch(console, manner) as progress:
            summary = api.quantize(
                model, out, **asked, derived=derived, restart=restart, trace=trace, progress=progress
            )
        if manner is terminal.Manner.JSON:
            terminal.json_line(console, {"kind": "summary", "data": summary.to_json()})
        elif manner is not terminal.Manner.QUIET:
            show_summary(console, summary, model)


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


@command(
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
    """Measure what the release in OUT lost against its source.

    Writes OUT/metrics.json: perplexity, KL divergence, top-1 agreement, drift and routing by layer, and the acceptance
    rate of the MTP head, on held-out text; a larger measurement stays unless --replace is given. Works layer by layer,
    also on releases of GPTQModel, llm-compressor and AutoRound.
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
            terminal.json_line(console, {"kind": "metrics", "data": found.to_json()})
        elif manner is not terminal.Manner.QUIET:
            show_evaluation(console, found)


@command(
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
    """Check a release: its files, its source, a run in an engine.

    Writes OUT/verify.json. The files are always checked; --source compares every tensor, --engine loads and runs OUT.
    Exit code 0 means that all levels asked for have passed.
    """
    with answer(out):
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        with terminal.watch(console, manner) as progress:
            verdict = api.verify(out, source=source, engine=engine, python=python, timeout=timeout, progress=progress)
        if as_json:
            terminal.json_line(console, verdict.to_json())
        elif not quiet:
            show_verdict(console, verdict)
        if not verdict.passed:
            raise typer.Exit(CHECK_FAILED)


command(epilog=reporting.REPORT_EXAMPLES)(reporting.report)
command(epilog=serving.SERVE_EXAMPLES)(serving.serve)
command(epilog=serving.BENCH_EXAMPLES)(serving.bench)
command(epilog=shipping.INSPECT_EXAMPLES)(shipping.inspect)
command(epilog=shipping.CONVERT_EXAMPLES)(shipping.convert)
command(epilog=shipping.COMPARE_EXAMPLES)(shipping.compare)
command(epilog=shipping.PUBLISH_EXAMPLES)(shipping.publish)


@recipe_app.command("list", epilog="Example: fourfold recipe list")
def list_recipes() -> None:
    """List the presets."""
    with answer():
        from fourfold.recipe import load_recipe, recipe_names

        show_facts(terminal.open_console(), [(name, load_recipe(name).description) for name in recipe_names()])


@recipe_app.command("show", epilog="Example: fourfold recipe show best > mine.toml")
def show_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", show_default=False, help="A preset or a .toml file.")],
) -> None:
    """Print a recipe in full, as TOML."""
    with answer():
        from fourfold.recipe import dump_recipe, load_recipe

        typer.echo(dump_recipe(load_recipe(name)), nl=False)


def main() -> None:
    """The console script. A run that was told to stop leaves at once, with no word from threads of native libraries."""
    # transformers' hints about optional CUDA kernels would cut through a progress bar; errors are still raised.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app(prog_name="fourfold")
    except SystemExit as stopped:
        if stopped.code in (INTERRUPTED, TERMINATED):  # all has been cleaned up; workers may still be in a kernel
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(stopped.code))
        raise
