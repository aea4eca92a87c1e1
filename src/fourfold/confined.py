"""A Python process with limits of CPU time and memory, for regular expressions and chat templates of a checkpoint.

These can run for ever or exhaust memory, and nothing inside this process can stop them.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

REASON_CHARACTERS = 300


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: for the first request; each later one adds more_seconds; memory_bytes: above what imports took."""

    cpu_seconds: float
    memory_bytes: int
    more_seconds: float = 0.0


class ConfinedError(Exception):
    """The child died of a request; the text says why."""


class Confined:
    """A child that answers requests, one at a time. `with` ends it."""

    def __init__(self, module: str, limits: Limits) -> None:
        """module: calls `answer_requests` when it is run."""
        self._limits = limits
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            assert file is not None
            try:
                file.close()
            except BrokenPipeError:
                continue  # a request that the child has not taken

    def ask(self, request: object) -> Any:
        """Return the answer, in JSON types. Raises ConfinedError if the child died of the request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the child has ended: there is no answer either
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise ConfinedError(self._reason())
        return json.loads(line)

    def _reason(self) -> str:
        """Why the child has ended."""
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().rpartition("\n")[2].strip()
        if code == -signal.SIGXCPU:
            return f"it takes more than {self._limits.cpu_seconds:g} s of CPU time"
        if last.startswith("MemoryError") or code == -signal.SIGKILL:
            return f"it takes more than {self._limits.memory_bytes >> 20:,} MiB of memory"
        return last[:REASON_CHARACTERS] or f"its process ended with {code}"


def answer_requests(answer: Callable[[Any], Any], limits: Limits) -> None:
    """The child's side: answer requests from stdin until it is closed. What `answer` raises ends the process."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    used_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    _limit(resource.RLIMIT_AS, used_pages * resource.getpagesize() + limits.memory_bytes)
    _limit(resource.RLIMIT_CORE, 0)
    cpu_seconds = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) + limits.cpu_seconds
    while True:
        _limit(resource.RLIMIT_CPU, int(cpu_seconds) + 1)
        try:
            request = pickle.load(sys.stdin.buffer)  # from the parent, which made it
        except EOFError:
            return
        print(json.dumps(answer(request)), file=replies, flush=True)
        cpu_seconds += limits.more_seconds


def _limit(what: int, value: int) -> None:
    _, most = resource.getrlimit(what)
    resource.setrlimit(what, (value if most == resource.RLIM_INFINITY else min(value, most), most))
