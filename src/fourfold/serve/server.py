"""An engine as a child process: started, waited for, probed, told of signals, and ended with all that it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

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
STOP_SECONDS = 30.0  # that an engine has to end by itself once it was told; vLLM takes 2
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ASK_SECONDS = 60
ASK = """
import importlib.metadata as m, json, sys
points = [p.value for p in m.entry_points(group="vllm.general_plugins")]
print(json.dumps([m.version(sys.argv[1]), any(v.startswith("fourfold.") for v in points)]))
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How serving ended. failure: why, if not by a signal to us; signal: the one that told us to stop, 0: none."""

    failure: str
    signal: int


def installed(python: Path, engine: str) -> tuple[Version, bool]:
    """The engine's version, and whether our plugin is in its environment. Raises FourfoldError if it cannot be told."""
    done = subprocess.run(
        [str(python), "-c", ASK, engine], capture_output=True, text=True, timeout=ASK_SECONDS, check=False
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FourfoldError(f"{python}: does not say which {engine} it has ({said}); name another with --python")
    text, plugin = json.loads(done.stdout)
    return engines.version(text), bool(plugin)


def check_port(host: str, port: int) -> None:
    """Raises FourfoldError if another server has it: it would be taken for ours."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FourfoldError(f"{host}:{port}: {error.strerror}; take another with --port or --host") from None


def choose_engine(python: Path | None, *, starts: bool, container: bool) -> str:
    """The engine where none is named: the first of ENGINES that is installed, or vLLM if none need be.

    Raises FourfoldError if one must be installed and none is.
    """
    found = None if container else next((name for name in ENGINES if find_python(name, python)), None)
    if found is None and (starts or python is not None) and not container:
        where = f"in {python}" if python else "for any Python on PATH"
        raise FourfoldError(
            f"--engine: neither {' nor '.join(ENGINES)} is installed {where}. Name the interpreter of an engine's "
            "environment with --python, or see the command with --print"
        )
    return found or VLLM


def prepare(
    served: Served, wanted: Deployment, python: Path | None, *, starts: bool, container: bool
) -> tuple[Command, Path]:
    """The command for this machine and the engine that is installed, and the interpreter of its environment.

    starts: it is to be run: then the engine must be there, and problems raise. container: for an image, so what is
    installed here is of no matter. Raises FourfoldError.
    """
    if container:
        found = None
    elif starts or python is not None:
        found = require_python(wanted.engine, python, ", or see the command with --print")
    else:
        found = find_python(wanted.engine, None)
    wanted = replace(wanted, inherited=dict(os.environ))
    if found is not None:
        version, plugin = installed(found, wanted.engine)
        wanted = replace(wanted, version=version, plugin=plugin)
    reference = wanted.profile == engines.REFERENCE and not starts
    command = build(served, engines.REFERENCE_MACHINE if reference else look(), wanted)
    if starts and command.problems:
        raise FourfoldError("\n".join(command.problems))
    if starts:
        check_port(command.host, command.port)
    return command, found or Path(sys.executable)


def log_file(folder: Path, engine: str) -> Path:
    """In a release of ours beside its other logs; others' folders are not written to."""
    ours = (folder / FINISHED).is_file()
    if ours:
        refuse_links(folder)
    return (folder / STATE if ours else Path()) / f"serve-{engine}.log"


def run(
    command: Command, python: Path, log: Path, limit_seconds: float, when_ready: Callable[[float, Probed], None]
) -> Outcome:
    """Start an engine and stay with it until it ends or we are told to stop. No process of it is left.

    python: interpreter of its environment; limit_seconds: until it must answer; when_ready: gets the seconds that it
    took, and what a first request found.
    """
    words = command.run_words(python)
    try:
        log.parent.mkdir(exist_ok=True)
        log.touch()
    except OSError as error:
        raise FourfoldError(f"{log}: cannot be written ({error.strerror}); name another file with --log") from None
    address = command.url
    with process.start(words, log, _environment(command.environment)) as child, _passing_on(child) as told:
        if _wait(child, lambda: bool(told) or _answers(address), limit_seconds) and not told:
            seconds = child.seconds
            when_ready(seconds, probe(address, command))
            while not _wait(child, lambda: bool(told), limit_seconds) and child.running():
                pass
        if not told:
            return Outcome(failure=_why(command, child, limit_seconds), signal=0)
        _wait(child, lambda: len(told) > 1, STOP_SECONDS)  # a second signal ends it at once
        return Outcome(failure="", signal=told[0])


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    """Compiled kernels are kept between starts: only temporary files go with the process."""
    home = Path.home()
    kept = {"XDG_CACHE_HOME": home / ".cache", "XDG_CONFIG_HOME": home / ".config"}
    return {name: os.environ.get(name, str(folder)) for name, folder in kept.items()} | dict(own)


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
    """Signals to us go to the engine; the list says which came."""
    told: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        child.signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(command: Command, child: Child, limit_seconds: float) -> str:
    """Why it does not serve, with what is known of such a failure. Ends it if it only did not answer in time."""
    timed_out = child.running()
    child.end()
    said = child.ended(timed_out).why(limit_seconds)
    known = engines.explain(command.engine.name, child.log.read_text(encoding="utf-8", errors="replace"))
    return "\n".join([f"{command.engine.title}: {said}", *(f"known: {why}" for why in known)])
