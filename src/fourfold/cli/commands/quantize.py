"""The commands that make a release and measure it: plan, quantize, evaluate, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from fourfold import api
from fourfold.cli import options
from fourfold.cli.console import open_console
from fourfold.cli.errors import CHECK_FAILED, when_stopped
from fourfold.cli.progress import choose_mode, show_progress
from fourfold.cli.tables.run import show_evaluation, show_plan, show_summary, show_verdict
from fourfold.datatypes import Progress
from fourfold.quantize.rates import GPUS

if TYPE_CHECKING:
    from fourfold.quantize.summary import Summary
    from fourfold.records.results import Metrics, Verdict

MACHINE_HELP = (
    f"Predict for another machine from data sheets: {', '.join(GPUS)}, or several, as in 4x3090. Default: this machine."
)


def plan(
    model: options.Model,
    /,
    *,
    recipe: options.RecipeOptions = options.RecipeOptions(),
    run: options.RunOptions = options.RunOptions(),
    machine: Annotated[str | None, Parameter(metavar="NAME", help=MACHINE_HELP)] = None,
    out: Annotated[Path | None, Parameter(metavar="OUT")] = None,
    json: bool = False,
) -> None:
    """Show what quantize would do: tensors, memory, disk, time.

    Reads config.json, the tokenizer files, the safetensors headers and the calibration text, but does not tokenize it.
    Of a model on the Hub it fetches headers alone, into the Hub cache. Writes nothing else. The time is predicted from
    a microbenchmark of this machine, which takes some seconds. Warns about settings that an engine would reject.

    Args:
        out: Output folder: also show its free disk space and, if a guided run has started there, its predicted effect.
        json: Print the plan with all tensors as one JSON object.

    Examples:
        fourfold plan Qwen/Qwen3.6-35B-A3B --devices cuda:0 --memory 10GiB
        fourfold plan ./model --recipe fast --json
        fourfold plan ./model --machine 4x3060    # predicted for that machine
    """
    errors = open_console(stderr=True)  # stdout has only the plan
    with show_progress(errors, choose_mode(errors)) as progress:
        arguments = run.arguments()
        planned = api.plan(model, recipe=recipe.load(), machine=machine, out=out, progress=progress, **arguments)
    options.Output(json=json).present(lambda _: planned, show_plan)


def quantize(
    model: options.Model,
    out: Path,
    /,
    *,
    recipe: options.RecipeOptions = options.RecipeOptions(),
    run: options.RunOptions = options.RunOptions(),
    derived: bool = False,
    dry_run: bool = False,
    restart: bool = False,
    trace: options.OutputFile | None = None,
    output: options.EventOutput = options.EventOutput(),
) -> None:
    """Quantize MODEL into OUT.

    Resumable: stop it at any time and rerun the same command; the output is bit-identical. At most one layer of work is
    lost. Arguments, configuration, calibration text and disk space are checked before any weight is read.

    Args:
        out: Folder of the release: new, empty, or of a run to resume.
        derived: Allow an untested architecture if a small copy with random weights runs as in transformers.
        dry_run: Print the plan and stop, as `fourfold plan` does.
        restart: Delete the results of an earlier run in OUT and start over.
        trace: Write a timeline of each worker, for chrome://tracing or ui.perfetto.dev.

    Examples:
        fourfold quantize Qwen/Qwen3.6-35B-A3B ./release
        fourfold quantize ./model ./release --recipe fast --set solver.passes=3
        fourfold quantize ./model ./trial --layers 0-3    # a trial on four layers
    """
    if dry_run:
        plan(model, recipe=recipe, run=run, out=out, json=output.json)
        return
    if api.follows():
        output = options.EventOutput(quiet=True)  # the first rank reports for all
    advice = f"Finished layers are kept. Rerun the same command{' without --restart' if restart else ''} to resume."
    with when_stopped(advice, out):
        chosen = recipe.load()

        def work(progress: Progress) -> Summary:
            return api.quantize(
                model, out, recipe=chosen, derived=derived, restart=restart, trace=trace, progress=progress,
                **run.arguments(),
            )  # fmt: skip

        output.present(work, lambda console, summary: show_summary(console, summary, model), kind="summary")


def evaluate(
    out: options.Release,
    /,
    *,
    source: options.ModelId | None = None,
    text: options.ExistingFile | None = None,
    windows: Annotated[int | None, options.number(int, 1)] = None,
    length: Annotated[int, options.number(int, 2, metavar="TOKENS")] = 2048,
    against: Annotated[str | None, Parameter(metavar="OUT2")] = None,
    drafts: Annotated[bool, Parameter(negative="--no-drafts")] = True,
    tasks: Annotated[str | None, Parameter(metavar="NAMES")] = None,
    url: Annotated[str | None, Parameter(metavar="URL")] = None,
    source_url: Annotated[str | None, Parameter(metavar="URL")] = None,
    suite: Annotated[str | None, options.choice("SUITE", "quick", "full")] = None,
    replace: bool = False,
    devices: Annotated[str, Parameter(metavar="DEVICE")] = "auto",
    output: options.EventOutput = options.EventOutput(),
) -> None:
    """Measure the release in OUT against its source.

    Writes OUT/metrics.json: perplexity, KL divergence, top-1 agreement, drift and routing per layer, and the acceptance
    rate of the MTP head, on held-out text. An earlier measurement on more tokens is kept unless --replace is given.
    Works layer by layer, also on int4, FP8 and NVFP4 releases of GPTQModel, llm-compressor, AutoAWQ and AutoRound. With
    --url it measures running servers too, or alone without --source: benchmarks, tool calls, long prompts, and KL
    divergence between both.

    Args:
        source: BF16 checkpoint that OUT was made from: local path or Hugging Face model ID.
        text: Measure on this text (.txt, or .jsonl or .parquet with a field `text`) instead of the built-in one.
        windows: Number of text windows to evaluate. Default: up to 64.
        length: Tokens per window.
        against: Measure a second release, too, and keep it for the card's plot: local path or Hugging Face model ID.
        drafts: Measure the acceptance rate of the draft (MTP) heads: about ten more passes over all layers.
        tasks: Comma-separated lm-eval tasks, run on the servers: alone, or with --suite in place of its own.
        url: Running server of the release with an OpenAI-compatible API.
        source_url: Running server of the source: its scores beside the release's, flipped answers, KL divergence.
        suite: Questions to the servers: quick or full. Default: quick, if --tasks is not given.
        replace: Overwrite an earlier measurement even if it covers more tokens.
        devices: One device: auto (the first GPU, or else the CPU), cpu or cuda:N.

    Examples:
        fourfold evaluate ./release --source Qwen/Qwen3.6-35B-A3B
        fourfold evaluate ./release --source ./model --text wikitext-2-raw-test.parquet --against ./other
        fourfold evaluate ./release --url http://localhost:8000 --source-url http://localhost:8001 --suite quick
        fourfold evaluate ./release --url http://localhost:8000 --tasks gsm8k
    """

    def measure(progress: Progress) -> Metrics:
        return api.evaluate(
            out, source=source, text=text, windows=windows, length=length, against=against, drafts=drafts,
            tasks=tasks.split(",") if tasks else (), url=url, source_url=source_url, suite=suite, replace=replace,
            devices=devices, progress=progress,
        )  # fmt: skip

    output.present(measure, show_evaluation, kind="metrics")


def verify(
    out: Annotated[str, Parameter(help="Folder of a finished release; with --load also the URL of a running server.")],
    /,
    *,
    source: options.ModelId | None = None,
    engine: options.Engine | None = None,
    python: options.EnginePython = None,
    load: Annotated[int | None, Parameter(metavar="N")] = None,
    signature: Annotated[str, Parameter(metavar="KEY|IDENTITY")] = "",
    issuer: Annotated[str, Parameter(metavar="URL")] = "",
    timeout: Annotated[float, options.number(float, 0.01, metavar="MINUTES")] = 60,
    output: options.Output = options.Output(),
) -> int:
    """Check a release: its files, its source, a run in an engine.

    Writes OUT/verify.json. The files are always checked; --source compares every tensor, --engine loads and runs OUT,
    --load tests whether many requests at once get the same answers as one. Exit code 0 means that all requested checks
    have passed.

    Args:
        source: Compare every tensor with this checkpoint: the BF16 model, or for GGUF and MLX the release that was
            converted. Local path or Hugging Face model ID. For a server: folder of the release that it must serve.
        engine: Load and run OUT in this engine (SGLang: load only; llama.cpp and MLX: output of `convert`).
        load: Send N requests at once, an even number from 2 to 256: with --engine vllm, or to the server at URL. Greedy
            texts must be those of single requests, up to near ties.
        signature: Require that OUT is as this signer published it: file of a public key, or identity of a keyless
            signature.
        issuer: Who confirmed that identity, such as https://github.com/login/oauth.
        timeout: Stop the engine if it has not answered after this time.

    Examples:
        fourfold verify ./release
        fourfold verify ./release --source Qwen/Qwen3.6-35B-A3B
        fourfold verify ./release --source ./model --engine vllm --python ~/vllm/bin/python
        fourfold verify ./release --engine vllm --load 16
        fourfold verify http://localhost:8000 --load 16
    """

    def check(progress: Progress) -> Verdict:
        return api.verify(
            out, source=source, engine=engine, python=python, load=load, signature=signature, issuer=issuer,
            timeout=timeout, progress=progress,
        )  # fmt: skip

    verdict = output.present(check, show_verdict)
    return 0 if verdict.passed else CHECK_FAILED
