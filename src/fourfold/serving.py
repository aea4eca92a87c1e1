"""The commands that work with a running server, and their options: serve, bench."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fourfold import terminal
from fourfold.datatypes import FourfoldError
from fourfold.formats import EXPORTS
from fourfold.options import (
    CHECK_FAILED,
    ENGINES,
    EXIT_CODES,
    RELEASE_ENGINES,
    EnginePython,
    Quiet,
    answer,
    choice,
    number,
)
from fourfold.tables.server import show_bench, show_command, show_ready

if TYPE_CHECKING:
    from fourfold.records.release import Export
    from fourfold.serve.command import Deployment

SIGNALLED = 128  # and the signal: as shells count
SERVE_EXAMPLES = f"""\b
Examples:
  fourfold serve ./release --engine vllm
  fourfold serve ./release --engine sglang --kv-cache fp8 --print
  fourfold serve ./release-gguf --engine llama.cpp --print
  fourfold serve ./release --engine vllm --thinking-budget 8192 -- --max-num-seqs 8

{EXIT_CODES}"""
BENCH_EXAMPLES = f"""\b
Examples:
  fourfold bench http://localhost:8000
  fourfold bench http://localhost:8000 --concurrency 1,2,4,8 --out-tokens 512 --out bench.json

{EXIT_CODES}"""


def parse_ranks(text: str) -> int | None:
    """GPUs of "4", None for "auto". Raises typer.BadParameter."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise typer.BadParameter(f"got {text!r}, expected auto, or a number of GPUs as in 4")
    return int(text)


class Levels(tuple[int, ...]):
    """Requests at one time, one level after another. A class: Typer takes a plain tuple for as many words."""


def parse_levels(text: str) -> Levels:
    """Requests at one time of "1,4,16". Raises typer.BadParameter."""
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII) or 0 in map(int, text.split(",")):
        raise typer.BadParameter(f"got {text!r}, expected numbers from 1 on, as in 1,4,16")
    return Levels(dict.fromkeys(map(int, text.split(","))))


# --- serve -----------------------------------------------------------------------------------------------------------

ServedModel = Annotated[
    str,
    typer.Argument(metavar="OUT", show_default=False, help="Folder of a finished release, or org/name of the Hub."),
]
EngineWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- WORDS]", show_default=False, help="After `--`: more words for the engine, passed on as they are."
    ),
]
ServeEngine = Annotated[
    str | None,
    typer.Option(
        "--engine", **choice(*ENGINES), show_default=False, help="The engine. Default: the installed one, vLLM first."
    ),
]
Mtp = Annotated[
    int | None,
    typer.Option(
        "--mtp",
        metavar="N",
        **number(int, 0, 8),
        show_default=False,
        help="Tokens that the MTP head drafts at a time, 0 for none. Default: 2 in vLLM, 3 in SGLang, where it can.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        metavar="TOKENS",
        **number(int, 1),
        show_default=False,
        help="Longest context. Default: what fits, by estimate.",
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        **choice("fp8", "auto"),
        show_default=False,
        help="Data type of the KV cache. Default: auto, which is BF16.",
    ),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tp",
        metavar="N|auto",
        parser=parse_ranks,
        show_default=False,
        help="GPUs to split over. Default: auto, as many as divide the model.",
    ),
]
ServeProfile = Annotated[
    str,
    typer.Option(
        "--profile",
        **choice("default", "reference"),
        help="Whose settings stand where no option does; with --print, reference is for its machine, 4 x RTX 3060.",
    ),
]
ThinkingBudget = Annotated[
    int | None,
    typer.Option(
        "--thinking-budget",
        metavar="N",
        **number(int, 0),
        show_default=False,
        help="Thinking tokens of requests that set no budget (vLLM, with fourfold's plugin in its environment).",
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        "--presence-penalty",
        metavar="X",
        **number(float, -2, 2),
        show_default=False,
        help="Presence penalty of requests that set none (vLLM).",
    ),
]
Host = Annotated[str, typer.Option("--host", metavar="HOST", help="Address that the server listens on.")]
Port = Annotated[
    int | None,
    typer.Option(
        "--port",
        metavar="N",
        **number(int, 1, 65535),
        show_default=False,
        help="Default: 8000 for vLLM, 30000 for SGLang.",
    ),
]
PrintOnly = Annotated[bool, typer.Option("--print", help="Print the command and what it will come to; run nothing.")]
Docker = Annotated[bool, typer.Option("--docker", help="Print it for the engine's container; run nothing.")]
ServeLog = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        dir_okay=False,
        show_default=False,
        help="Where the engine's output goes. Default: OUT/.fourfold/serve-ENGINE.log, or here for others' releases.",
    ),
]
StartLimit = Annotated[
    float, typer.Option("--timeout", metavar="MINUTES", **number(float, 0.01), help="Stop an engine not ready by then.")
]


def serve(
    out: ServedModel,
    words: EngineWords = None,
    *,
    engine: ServeEngine = None,
    mtp: Mtp = None,
    context: Context = None,
    kv_cache: KvCache = None,
    tp: TensorParallel = None,
    profile: ServeProfile = "default",
    thinking_budget: ThinkingBudget = None,
    presence_penalty: PresencePenalty = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    python: EnginePython = None,
    log: ServeLog = None,
    timeout: StartLimit = 30,
    print_only: PrintOnly = False,
    docker: Docker = False,
) -> None:
    """Serve a release with vLLM or SGLang, or what convert wrote.

    Derives the command from the release, this machine and the engine, and checks it before anything starts; --print
    shows it. Once the engine is ready, one request tests thinking, tools and drafts. Runs until interrupted. What
    `convert` wrote is served by llama-server, mlx_lm.server or mlx_vlm.server, which are on PATH.
    """
    with answer(None, "The engine and all it started have ended."):
        from fourfold.quantize.journal import check_checkpoint
        from fourfold.release.contents import read_export

        record = read_export(Path(out))
        runs_in = RELEASE_ENGINES if record is None else (EXPORTS[record.after],)
        if engine is not None and engine not in runs_in:
            raise FourfoldError(f"--engine: got {engine}, expected {' or '.join(runs_in)} for {out}")
        if record is not None:
            others = {
                "--tp": tp, "--thinking-budget": thinking_budget, "--presence-penalty": presence_penalty,
                "--python": python, "--docker": docker, "--log": log,
                "--profile": profile if profile != "default" else None,
            }  # fmt: skip
            options = {"mtp": mtp, "context": context, "kv_cache": kv_cache, "host": host, "port": port}
            _serve_local(Path(out), record, others, print_only=print_only, extra=words or (), **options)
            return
        check_checkpoint(out, whole=True)
        from fourfold.serve.command import Deployment
        from fourfold.serve.server import choose_engine

        starts = not (print_only or docker)
        wanted = Deployment(
            engine=engine or choose_engine(python, starts=starts, container=docker),
            profile=profile,
            drafts=mtp,
            context=context,
            kv_cache=kv_cache,
            ranks=tp,
            host=host,
            port=port,
            thinking_budget=thinking_budget,
            presence_penalty=presence_penalty,
            extra=tuple(words or ()),
        )
        _serve_release(out, wanted, python, log, timeout * 60, starts=starts, docker=docker)


def _serve_release(
    out: str, wanted: Deployment, python: Path | None, log: Path | None, limit_seconds: float, *,
    starts: bool, docker: bool,
) -> None:  # fmt: skip
    """Print the command for a release, or run it to its end."""
    from fourfold.model.hub import resolve_model
    from fourfold.serve.served import open_served
    from fourfold.serve.server import log_file, prepare, run

    served = open_served(resolve_model(out), Path(out).name)
    command, interpreter = prepare(served, wanted, python, starts=starts, container=docker)
    shown = command.docker(served.folder) if docker else command.text()
    console = terminal.open_console(stderr=True)
    show_command(console, command)
    if not starts:
        typer.echo(shown)
        raise typer.Exit(CHECK_FAILED if command.problems else 0)
    path = log or log_file(served.folder, wanted.engine)
    terminal.say(console, f"starting; the engine's log: {terminal.plain(path)}")
    show = partial(show_ready, console, command)
    outcome = run(command, interpreter, path, limit_seconds, show)
    if outcome.failure:
        terminal.say(console, terminal.paragraphs(outcome.failure), "red")
        raise typer.Exit(CHECK_FAILED)
    terminal.say(console, f"stopped by {signal.Signals(outcome.signal).name}; no process of it is left")
    raise typer.Exit(SIGNALLED + outcome.signal)


def _serve_local(
    folder: Path, record: Export, others: Mapping[str, object], *, print_only: bool, **options: Any
) -> None:
    """Print the command for what `convert` wrote, and become it."""
    from fourfold.serve import local, machine

    engine = EXPORTS[record.after]
    if engine == "mlx":
        others = {**others} | {f"--{key.replace('_', '-')}": options.pop(key) for key in ("mtp", "context", "kv_cache")}
    local.refuse_options(engine, others)
    if engine == "mlx":
        command = local.mlx_server(folder, **options)
    else:
        command = local.llama_server(folder, record, machine.look(), **options)
    console = terminal.open_console(stderr=True)
    for note in (*command.problems, *command.notes):
        terminal.say(console, terminal.paragraphs(note))
    typer.echo(command.text())
    if command.problems:
        raise typer.Exit(CHECK_FAILED)
    if not print_only:
        if shutil.which(command.words[0]) is None:
            raise FourfoldError(f"{command.words[0]}: got none on PATH, expected {engine}. Install it, or use --print")
        sys.stdout.flush()
        os.execvp(command.words[0], command.words)


# --- bench -----------------------------------------------------------------------------------------------------------

ServerUrl = Annotated[
    str, typer.Argument(metavar="URL", show_default=False, help="A running vLLM or SGLang, as http://localhost:8000.")
]
Concurrency = Annotated[
    Levels,
    typer.Option(metavar="N,N,...", parser=parse_levels, help="Requests at one time, one level after another."),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="Prompts: .txt, one a line, or .jsonl with `messages` or `text`. Default: built-in questions.",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        **number(int, 1),
        show_default=False,
        help="Requests at each concurrency. Default: 4 times the concurrency, at least 8.",
    ),
]
OutTokens = Annotated[int, typer.Option("--out-tokens", metavar="N", **number(int, 2), help="Tokens per request.")]
Temperature = Annotated[float, typer.Option(metavar="X", **number(float, 0, 2), help="0: always the likeliest token.")]
RequestLimit = Annotated[
    float, typer.Option("--request-timeout", metavar="SECONDS", **number(float, 0.1), help="Give up a request then.")
]
LevelLimit = Annotated[
    float, typer.Option("--timeout", metavar="MINUTES", **number(float, 0.01), help="A level is ended after that.")
]
BenchOut = Annotated[Path, typer.Option("--out", metavar="FILE", dir_okay=False, help="Where the figures are written.")]
BenchJson = Annotated[bool, typer.Option("--json", help="Print what lands in the file, on one line.")]


def bench(
    url: ServerUrl,
    concurrency: Concurrency = "1,4,16",  # type: ignore[assignment]  # read as the option itself is
    prompts: Prompts = None,
    requests: Requests = None,
    out_tokens: OutTokens = 128,
    temperature: Temperature = 0,
    request_timeout: RequestLimit = 300,
    timeout: LevelLimit = 10,
    out: BenchOut = Path("bench.json"),
    quiet: Quiet = False,
    as_json: BenchJson = False,
) -> None:
    """Measure a server: latency, speed, acceptance, KV cache.

    Runs one concurrency after another. Tokens are counted by the server's own `usage`, drafts by its metrics before and
    after. Exit code 0 means that each request was answered in full.
    """
    with answer():
        console = terminal.open_console()
        manner = terminal.Manner.QUIET if as_json else terminal.choose(console, as_json=False, quiet=quiet)
        from fourfold.serve.bench import Load
        from fourfold.serve.bench import bench as run

        load = Load(
            concurrency=concurrency,
            requests=requests,
            output_tokens=out_tokens,
            temperature=temperature,
            prompts=prompts,
            request_seconds=request_timeout,
            level_seconds=timeout * 60,
        )
        with terminal.watch(console, manner) as progress:
            found = run(url, load, progress)
        found.write(out)
        if as_json:
            terminal.json_line(console, found.to_json())
        elif not quiet:
            show_bench(console, found)
        if any(level.requests.failed for level in found.levels):
            raise typer.Exit(CHECK_FAILED)
