"""Other tools that quantize, each in an environment of its own, made when it is missing (peers/install.sh)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "peers"


def sources(tool: str) -> list[Path]:
    """The files that decide what a tool makes of a model: its pinned version and how it is called."""
    pins = [FOLDER / "requirements" / name for name in (f"{tool}.txt", f"{tool}-bare.txt")]
    return [FOLDER / "runner.py", FOLDER / f"{tool}_quantize.py", *pins]


def quantize(tool: str, model: Path, token_rows: list[list[int]], out: Path, options: Sequence[str]) -> dict[str, Any]:
    """Quantize with one thread on these tokens into `out`; returns the figures that the script reports.

    Raises SystemExit with the end of its output where it fails.
    """
    install = [FOLDER / "install.sh", tool]
    subprocess.run(install, check=True, stdout=sys.stderr, env=os.environ | {"PYTHON": sys.executable})
    with tempfile.TemporaryDirectory(prefix="fourfold-peer-") as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps(token_rows))
        # They leave logs where they are started, and Hub and offload folders where these point.
        environment = os.environ | {"HF_HOME": str(Path(folder) / "hub"), "TMPDIR": folder}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        command = [FOLDER / f".venv-{tool}/bin/python", FOLDER / f"{tool}_quantize.py", model, rows, out, *options]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{tool}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
