"""The commands that work with a server: serve, bench."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from fourfold.cli import options
from fourfold.cli.console import open_console, paragraphs, plain, say
from fourfold.cli.errors import CHECK_FAILED, when_stopped
from fourfold.cli.tables.server import show_bench, show_command, show_ready
from fourfold.datatypes import FourfoldError, Progress
from fourfold.formats import EXPORTS

if TYPE_CHECKING:
    from fourfold.records.bench import Bench
    from fourfold.records.release import Export
    from fourfold.serve.command import Deployment
    from fourfold.serve.drafter import Drafter

NOT_DEPLOYED = ("engine", "mtp", "draft", "tp", "python", "log")  # other fields of ServerOptions are Deployment's
SIGNALLED = 128  # and the signal: as shells count
LOCAL_OPTIONS = {  # of the servers that run what `convert` wrote
    "llama.cpp": ("engine", "mtp", "draft", "context", "kv_cache", "host", "port"),
    "mlx": ("engine", "host", "port"),
}


def read_ranks(text: str) -> int | None:
    """GPUs of "4", None for "auto". Raises ValueError."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdecimal() or not int(text):
        raise ValueError(f"got {text!r}, expected auto, or a number of GPUs as in 4")
    return int(text)


def read_levels(text: str, least: int = 1, most: int = 9999, example: str = "1,4,16") -> tuple[int, ...]:
    """Numbers such as "1,4,16", each once. Raises ValueError."""
    found = [int(word) for word in text.split(",") if re.fullmatch(r"\d{1,7}", word, re.ASCII)]
    if len(found) != text.count(",") + 1 or not all(least <= number <= most for number in found):
        raise ValueError(f"got {text!r}, expected numbers from {least} to {most:,}, as in {example}")
    return tuple(dict.fromkeys(found))


def _numbers(read: Callable[[str], tuple[int, ...]]) -> Parameter:
    return options.value(read, "N,N,...", show_default=lambda levels: ",".join(map(str, levels or ())))


Levels = Annotated[tuple[int, ...], _numbers(read_levels)]
Contexts = Annotated[tuple[int, ...] | None, _numbers(partial(read_levels, most=2**20, example="1024,8192"))]
Depths = Annotated[tuple[int, ...] | None, _numbers(partial(read_levels, least=0, most=8, example="0,1,2,3"))]


@Parameter(name="*", group=Group("Server", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What an engine is started with."""

    engine: options.Engine | None = None
    """Engine to start. Default: the installed one, vLLM first."""
    mtp: Annotated[int | None, options.number(int, 0, 8)] = None
    """Tokens that the MTP head drafts at a time, 0 for none. Default: 2 in vLLM, 3 in SGLang, where it works."""
    draft: Annotated[str | None, Parameter(metavar="REPO")] = None
    """External drafter (EAGLE-3, DFlash, a small model) in place of the MTP head: local path or Hugging Face model ID;
    for llama.cpp a GGUF file. --mtp sets its tokens at a time."""
    context: Annotated[int | None, options.number(int, 1, metavar="TOKENS")] = None
    """Longest context. Default: what fits, by estimate."""
    kv_cache: Annotated[str | None, options.choice("DTYPE", "fp8", "auto")] = None
    """Data type of the KV cache. Default: auto, which is BF16."""
    tp: Annotated[int | None, options.value(read_ranks, "N|auto")] = None
    """Tensor-parallel size. Default: auto, the most available GPUs that divide the model."""
    profile: Annotated[str, options.choice("PROFILE", "default", "reference")] = "default"
    """Defaults of options that are not given. reference: for 4 x RTX 3060, whose memory --print then predicts."""
    thinking_budget: Annotated[int | None, options.number(int, 0)] = None
    """Limit of thinking tokens for requests that set none. vLLM only, with fourfold installed beside it."""
    presence_penalty: Annotated[float | None, options.number(float, -2, 2, "X")] = None
    """Presence penalty of requests without one (vLLM)."""
    host: Annotated[str, Parameter(metavar="HOST")] = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int | None, options.number(int, 1, 65535)] = None
    """Port to listen on. Default: 8000 for vLLM, 30000 for SGLang, 8080 for llama.cpp and MLX."""
    python: options.EnginePython = None
    log: options.OutputFile | None = None
    """Log file of the engine. Default: OUT/.fourfold/serve-ENGINE.log, or the current folder for a release that is not
    fourfold's."""


def serve(
    out: str,
    /,
    *words: Annotated[str, Parameter(name="[-- WORDS]")],
    server: ServerOptions = ServerOptions(),
    timeout: Annotated[float, options.number(float, 0.01, metavar="MINUTES")] = 30,
    print_only: Annotated[bool, Parameter(name="--print")] = False,
    docker: bool = False,
) -> int:
    """Serve a release with vLLM or SGLang, or a GGUF or MLX one.

    Derives the command from the release, this machine and the engine, and checks it before anything starts; --print
    shows it. Once the engine is ready, a test request checks thinking, tool calls and drafts. Runs until interrupted.
    GGUF and MLX are served by llama-server, mlx_lm.server or mlx_vlm.server, which must be on PATH.

    Args:
        out: Folder of a finished release, or Hugging Face model ID.
        words: After `--`: further arguments for the engine, passed on unchanged.
        timeout: Stop the engine if it is not ready after this time.
        print_only: Print the command and its predicted memory; run nothing.
        docker: Print the command for the engine's container; run nothing.

    Examples:
        fourfold serve ./release --engine vllm
        fourfold serve ./release --engine sglang --kv-cache fp8 --print
        fourfold serve ./release-gguf --engine llama.cpp --print
        fourfold serve ./release --thinking-budget 8192 -- --max-num-seqs 8
    """
    with when_stopped("The engine and all its processes have ended."):
        from fourfold.quantize.journal import check_checkpoint
        from fourfold.release.contents import read_export

        record = read_export(Path(out))
        runs_in = options.RELEASE_ENGINES if record is None else (EXPORTS[record.after],)
        if server.engine is not None and server.engine not in runs_in:
            raise FourfoldError(f"--engine: got {server.engine}, expected {' or '.join(runs_in)} for {out}")
        if record is not None:
            return _serve_local(Path(out), record, server, words, docker=docker, print_only=print_only)
        check_checkpoint(out, whole=True)
        from fourfold.serve.command import Deployment
        from fourfold.serve.server import choose_engine

        starts = not (print_only or docker)
        engine = server.engine or choose_engine(server.python, starts=starts, container=docker)
        given = {name: value for name, value in vars(server).items() if name not in NOT_DEPLOYED}
        drafter = _open_drafter(server.draft, docker=docker)
        deployment = Deployment(
            engine=engine, drafts=server.mtp, drafter=drafter, ranks=server.tp, extra=words, **given
        )  # fmt: skip
        return _serve_release(out, deployment, server, timeout * 60, starts=starts, docker=docker)


def _open_drafter(draft: str | None, *, docker: bool) -> Drafter | None:
    if draft is None:
        return None
    if docker:
        raise FourfoldError(f"--draft: got {draft} with --docker, expected a server without a container")
    from fourfold.model.hub import resolve_model
    from fourfold.serve.drafter import open_drafter

    return open_drafter(resolve_model(draft))


def _serve_release(
    out: str, deployment: Deployment, server: ServerOptions, limit_seconds: float, *, starts: bool, docker: bool
) -> int:
    """Print the command for a release, or run it to its end; the exit code."""
    from fourfold.model.hub import resolve_model
    from fourfold.serve.served import open_served
    from fourfold.serve.server import log_file, prepare, run

    served = open_served(resolve_model(out), Path(out).name)
    command, interpreter = prepare(served, deployment, server.python, starts=starts, container=docker)
    text = command.docker(served.folder) if docker else command.text()
    console = open_console(stderr=True)
    show_command(console, command)
    if not starts:
        print(text)
        return CHECK_FAILED if command.problems else 0
    path = server.log or log_file(served.folder, deployment.engine)
    say(console, f"starting; the engine's log: {plain(path)}")
    outcome = run(command, interpreter, path, limit_seconds, partial(show_ready, console, command))
    if outcome.failure:
        say(console, paragraphs(outcome.failure), "red")
        return CHECK_FAILED
    say(console, f"stopped by {signal.Signals(outcome.signal).name}; all its processes have ended")
    return SIGNALLED + outcome.signal


def _serve_local(
    folder: Path, record: Export, server: ServerOptions, words: tuple[str, ...], *, docker: bool,
    print_only: bool,
) -> int:  # fmt: skip
    """Print the command for what `convert` wrote, and become it."""
    from fourfold.serve import local, machine

    engine = EXPORTS[record.after]
    given = {
        f"--{field.name.replace('_', '-')}": getattr(server, field.name)
        for field in fields(server)
        if field.name not in LOCAL_OPTIONS[engine] and getattr(server, field.name) != field.default
    }
    local.refuse_options(engine, {**given, "--docker": docker})
    if engine == "mlx":
        command = local.mlx_server(folder, host=server.host, port=server.port, extra=words)
    else:
        command = local.llama_server(
            folder, record, machine.look(), mtp=server.mtp, draft=server.draft, context=server.context,
            kv_cache=server.kv_cache, host=server.host, port=server.port, extra=words,
        )  # fmt: skip
    console = open_console(stderr=True)
    for note in (*command.problems, *command.notes):
        say(console, paragraphs(note))
    print(command.text())
    if command.problems:
        return CHECK_FAILED
    if not print_only:
        if shutil.which(command.words[0]) is None:
            raise FourfoldError(f"{command.words[0]}: got none on PATH, expected {engine}. Install it, or use --print")
        sys.stdout.flush()
        os.execvp(command.words[0], command.words)
    return 0


def bench(
    url: str,
    /,
    *words: Annotated[str, Parameter(name="[-- WORDS]")],
    concurrency: Levels = (1, 4, 16),
    context: Contexts = None,
    drafts: Depths = None,
    prompts: options.ExistingFile | None = None,
    requests: Annotated[int | None, options.number(int, 1)] = None,
    out_tokens: Annotated[int, options.number(int, 2)] = 128,
    temperature: Annotated[float, options.number(float, 0, 2, "X")] = 0,
    request_timeout: Annotated[float, options.number(float, 0.1, metavar="SECONDS")] = 300,
    timeout: Annotated[float, options.number(float, 0.01, metavar="MINUTES")] = 10,
    out: options.OutputFile = Path("bench.json"),
    output: options.Output = options.Output(),
) -> int:
    """Measure a server: latency, speed, acceptance, KV cache.

    Runs one concurrency after another. Counts tokens by the server's own `usage`, and drafts by its metrics before and
    after. Exit code 0 means that every request was answered in full.

    Args:
        url: Running vLLM or SGLang, as http://localhost:8000; with --drafts the folder of a release.
        words: With --drafts, after `--`: options of `fourfold serve`.
        concurrency: Concurrent requests, one level after another.
        context: Also by length: prompts of so many tokens, cut from held-out text.
        drafts: Also by draft tokens, as 0,1,2,3: start a server of the release for each, and name the best.
        prompts: Prompts: .txt with one per line, or .jsonl with `messages` or `text`. Default: built-in questions.
        requests: Requests per level. Default: 4 times the concurrency, at least 8.
        out_tokens: Tokens per request.
        temperature: 0 for greedy decoding.
        request_timeout: Give up a request after this time.
        timeout: End a level after this time.
        out: Where the result is written.

    Examples:
        fourfold bench http://localhost:8000
        fourfold bench http://localhost:8000 --concurrency 1,2,4,8 --out-tokens 512 --out bench.json
        fourfold bench http://localhost:8000 --context 1024,8192,32768
        fourfold bench ./release --drafts 0,1,2,3 -- --engine vllm
    """
    from fourfold.serve.bench import Load
    from fourfold.serve.bench import bench as run
    from fourfold.serve.depths import bench_depths

    load = Load(
        concurrency=concurrency, requests=requests, output_tokens=out_tokens, temperature=temperature,
        prompts=prompts, request_seconds=request_timeout, level_seconds=timeout * 60, contexts=context or (),
    )  # fmt: skip
    if words and drafts is None:
        raise FourfoldError(f"{words[0]}: got words after --, expected them with --drafts only")

    def measure(progress: Progress) -> Bench:
        found = run(url, load, progress) if drafts is None else bench_depths(url, drafts, load, words, progress)
        found.write(out)
        return found

    found = output.present(measure, show_bench)
    return CHECK_FAILED if any(level.requests.failed for level in found.levels) else 0
