"""An inference engine in an environment of its own: found by its interpreter, asked by a script that runs there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError
from fourfold.release.verify import process

SCRIPTS = Path(__file__).parents[1] / "engines"
PROBE_SECONDS = 60
PROBE = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 3)"
NOT_THERE = 3


@dataclass(frozen=True, kw_only=True)
class Engine:
    """name: of the package too. python: its interpreter; logs: folder where each run's output is kept."""

    name: str
    python: Path
    logs: Path
    limit_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    def ask(self, script: str, title: str, request: Mapping[str, Any]) -> Answer:
        """Run one of our scripts under the engine's interpreter. title: of the run, for its log's name."""
        log = self.logs / f"verify-{self.name}-{title}.log"
        with tempfile.TemporaryDirectory(prefix="fourfold-", dir=process.SCRATCH) as scratch:
            asked, answered = Path(scratch, "request.json"), Path(scratch, "answer.json")
            asked.write_text(json.dumps(request), encoding="utf-8")
            command = [str(self.python), str(SCRIPTS / script), str(asked), str(answered)]
            ended = process.run(command, log, self.limit_seconds, self.environment)
            if not ended.ok or not answered.is_file():
                return Answer(log=log, failure=ended.why(self.limit_seconds))
            return Answer(log=log, content=json.loads(answered.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a run gave: content, or why it gave none."""

    log: Path
    content: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""


def find_python(name: str, given: Path | None) -> Path | None:
    """The interpreter of an environment that has the engine; None if no interpreter that was looked at has it.

    given: the only one to look at; else the one of the engine's command on PATH, our own, python3 and python on PATH.
    Raises FourfoldError if `given` runs no Python.
    """
    if given is not None:
        has, problem = _ask(given, name)
        if problem:
            raise FourfoldError(
                f"--python {given}: runs no Python ({problem}); give the interpreter of {name}'s environment"
            )
        return given if has else None
    command = shutil.which(name)
    beside = [Path(command).resolve().parent / "python"] if command else []
    named = [Path(found) for found in map(shutil.which, ("python3", "python")) if found]
    candidates = dict.fromkeys([*beside, Path(sys.executable), *named])
    return next((python for python in candidates if python.is_file() and _ask(python, name)[0]), None)


def _ask(python: Path, name: str) -> tuple[bool, str]:
    """Whether an interpreter has a package, and if it cannot be asked, why."""
    command = [str(python), "-c", PROBE, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    if done.returncode in (0, NOT_THERE):
        return done.returncode == 0, ""
    return False, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def environment(cache: Path) -> dict[str, str]:
    """For engines: nothing is fetched or reported, little memory for the KV cache on a CPU; the user's own values win.

    cache: a folder that runs of one call share.
    """
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(cache),  # vLLM's notes on model classes, which take a process of their own to make
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}
