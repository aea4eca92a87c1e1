"""An engine as a child process: start it, wait, probe it, pass signals on, end it with all that it started."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import httpx2

from fourfold import process
from fourfold.datatypes import FourfoldError
from fourfold.interpreter import find_python, require_python
from fourfold.process import Child
from fourfold.quantize.journal import FINISHED, STATE, refuse_links
from fourfold.serve import engines
from fourfold.serve.command import Command, Deployment, build
from fourfold.serve.engines import ENGINES, VLLM, Version
from fourfold.serve.machine import look
from fourfold.serve.probe import Probed, probe
from fourfold.serve.served import Served

POLL_SECONDS = 0.5
STOP_SECONDS = 30.0  # for an engine to end by itself after a signal; vLLM takes 2
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROBE_SECONDS = 60
PROBE = """
import importlib.metadata as m, json, sys
points = [p.value for p in m.entry_points(group="vllm.general_plugins")]
print(json.dumps([m.version(sys.argv[1]), any(v.startswith("fourfold.") for v in points)]))
"""


class Outcome(NamedTuple):
    """How serving ended. failure: why, if not by a signal; signal: the first that came, 0: none."""

    failure: str
    signal: int


def installed(python: Path, engine: str) -> tuple[Version, bool]:
    """Return the engine's version, and whether its environment has our plugin. Raises FourfoldError if unknown."""
    words = [str(python), "-c", PROBE, engine]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    if done.returncode:
        problem = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FourfoldError(f"{python}: does not say which {engine} it has ({problem}). Name another with --python")
    text, plugin = json.loads(done.stdout)
    return engines.version(text), bool(plugin)


def check_port(host: str, port: int) -> None:
    """Raises FourfoldError if another server has it: it would be taken for ours."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FourfoldError(f"{host}:{port}: {error.strerror}; use another with --port or --host") from None


def choose_engine(python: Path | None, *, starts: bool, container: bool) -> str:
    """Return the first of ENGINES that is installed, else vLLM. Raises FourfoldError if one must be installed."""
    found = None if container else next((name for name in ENGINES if find_python(name, python)), None)
    if found is None and (starts or python is not None) and not container:
        where = f"in {python}" if python else "for any Python on PATH"
        fix = "Name the interpreter of an engine's environment with --python, or see the command with --print"
        raise FourfoldError(f"--engine: neither {' nor '.join(ENGINES)} is installed {where}. {fix}")
    return found or VLLM


def prepare(
    served: Served, wanted: Deployment, python: Path | None, *, starts: bool, container: bool
) -> tuple[Command, Path]:
    """Return the command for this machine and the installed engine, and the interpreter of its environment.

    starts: it is to be run, so the engine must be installed, and problems raise FourfoldError. container: it is for an
    image, whatever is installed here.
    """
    wanted, found = replace(wanted, inherited=dict(os.environ)), None
    if starts or (python is not None and not container):
        found = require_python(wanted.engine, python, ", or see the command with --print")
    elif not container:
        found = find_python(wanted.engine, None)
    if found is not None:
        version, plugin = installed(found, wanted.engine)
        wanted = replace(wanted, version=version, plugin=plugin)
    reference = wanted.profile == engines.REFERENCE and not starts
    command = build(served, engines.REFERENCE_MACHINE if reference else look(), wanted)
    if starts:
        if command.problems:
            raise FourfoldError("\n".join(command.problems))
        check_port(command.host, command.port)
    return command, found or Path(sys.executable)


def log_file(folder: Path, engine: str) -> Path:
    """Return the log's place: in a release of ours beside its other logs, else in the current folder."""
    ours = (folder / FINISHED).is_file()
    if ours:
        refuse_links(folder)
    return (folder / STATE if ours else Path()) / f"serve-{engine}.log"


def run(
    command: Command, python: Path, log: Path, limit_seconds: float, when_ready: Callable[[float, Probed], None]
) -> Outcome:
    """Run an engine until it ends or a signal comes. None of its processes remains.

    python: interpreter of its environment; limit_seconds: until it must answer; when_ready: receives the seconds that
    this took, and the result of a first request.
    """
    words = command.run_words(python)
    try:
        log.parent.mkdir(exist_ok=True)
        log.touch()
    except OSError as error:
        raise FourfoldError(f"{log}: cannot be written ({error.strerror}); name another file with --log") from None
    # Compiled kernels are kept between starts: only temporary files go with the process.
    kept = {"XDG_CACHE_HOME": Path.home() / ".cache", "XDG_CONFIG_HOME": Path.home() / ".config"}
    folders = {name: os.environ.get(name, str(folder)) for name, folder in kept.items()}
    address = command.url
    with process.start(words, log, folders | dict(command.environment)) as child, _passing_on(child) as signals:
        if _wait(child, lambda: bool(signals) or _answers(address), limit_seconds) and not signals:
            seconds = child.seconds
            when_ready(seconds, probe(address, command))
            _wait(child, lambda: bool(signals), math.inf)
        if not signals:
            return Outcome(failure=_why(command, child, limit_seconds), signal=0)
        _wait(child, lambda: len(signals) > 1, STOP_SECONDS)  # a second signal ends it at once
        return Outcome(failure="", signal=signals[0])


def _wait(child: Child, done: Callable[[], bool], limit_seconds: float) -> bool:
    """Until it is done: True; or the child has ended or the limit is over: False."""
    deadline = time.monotonic() + limit_seconds
    while child.running() and time.monotonic() < deadline:
        if done():
            return True
        time.sleep(POLL_SECONDS)
    return False


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=5.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


@contextmanager
def _passing_on(child: Child) -> Iterator[list[int]]:
    """Pass signals on to the engine, and list which came."""
    signals: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        signals.append(number)
        child.signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(command: Command, child: Child, limit_seconds: float) -> str:
    """Why it does not serve, with what is known of such a failure. Ends it if it only did not answer in time."""
    child.timed_out = child.running()
    child.end()
    failure = child.why(limit_seconds)
    known = engines.explain(command.engine.name, child.log.read_text(encoding="utf-8", errors="replace"))
    return "\n".join([f"{command.engine.title}: {failure}", *(f"known issue: {cause}" for cause in known)])
