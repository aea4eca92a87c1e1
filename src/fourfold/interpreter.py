"""The interpreter of an environment that has an inference engine: looked for, and asked what is installed there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fourfold.datatypes import FourfoldError

PROBE_SECONDS = 60
PROBE = "import importlib.util, sys; sys.exit(0 if importlib.util.find_spec(sys.argv[1]) else 3)"
NOT_THERE = 3
PACKAGES = {"llama.cpp": "xllamacpp", "mlx": "mlx_lm"}  # what is imported, by the engine's name, where it is another


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


def require_python(name: str, given: Path | None, instead: str = "") -> Path:
    """As `find_python`, but raises FourfoldError if the engine is not installed. instead: of --python, what to do."""
    python = find_python(name, given)
    if python is None:
        where = f"in {given}" if given else "for any Python on PATH"
        raise FourfoldError(
            f"{name}: not installed {where}. Name the interpreter of its environment with --python" + instead
        )
    return python


def _ask(python: Path, name: str) -> tuple[bool, str]:
    """Whether an interpreter has a package, and if it cannot be asked, why."""
    command = [str(python), "-c", PROBE, PACKAGES.get(name, name)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    if done.returncode in (0, NOT_THERE):
        return done.returncode == 0, ""
    return False, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
