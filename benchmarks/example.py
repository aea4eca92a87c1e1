"""The example model quantized by `best`, at two sizes of calibration: seconds, peak memory, held-out metrics, bytes.

    python benchmarks/example.py --json benchmarks/results/example.json

Each run is a process of its own, `python -m fourfold quantize`, started cold.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fourfold.recipe import load_recipe

ROOT = Path(__file__).parents[1]
MODEL = "examples/tiny-qwen3.6-moe"
SIZES = ((256, 1024), (64, 512))  # calibration rows and their length; the first is the recipe's own


def overrides(rows: int, length: int) -> list[str]:
    """The recipe's sources in the same proportions, `rows` in all."""
    sources = load_recipe("best").calibration.sources
    whole = sum(source.rows for source in sources)
    counts = [source.rows * rows // whole for source in sources]
    counts[0] += rows - sum(counts)
    by_source = [f"calibration.sources.{place}.rows={count}" for place, count in enumerate(counts)]
    return [f"calibration.length={length}", *by_source]


def measure(rows: int, length: int, out: Path) -> dict[str, Any]:
    command = ["quantize", MODEL, str(out), "--devices", "cpu", "--quiet"]
    for override in overrides(rows, length):
        command += ["--set", override]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fourfold", *command], check=True, cwd=ROOT, env=environment)
    seconds = time.perf_counter() - start
    state = json.loads((out / "fourfold.json").read_text(encoding="utf-8"))
    return {
        "command": shlex.join(["fourfold", *command]).replace(str(out), "OUT"),
        "rows": rows,
        "length": length,
        "seconds": seconds,
        "seconds_by_stage": state["seconds"] | state["layer_seconds"],
        "peak_host_bytes": state["peak_memory_bytes"]["host"],
        "projections": state["projections"],
        "methods": state["methods"],
        "bytes_before": state["source_tensor_bytes"],
        "bytes_after": state["output"]["tensor_bytes"],
        "metrics": state["metrics"],
        "threads": state["settings"]["threads"],
        "devices": state["devices"],
        "versions": state["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(rows, length, Path(folder) / f"{rows}x{length}") for rows, length in SIZES]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "cores": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "runs": runs,
    }
    for run in runs:
        seconds, memory, kl_mean = run["seconds"], run["peak_host_bytes"] / 1e9, run["metrics"]["kl_mean"]
        print(f"{run['rows']} x {run['length']}: {seconds:.0f} s, {memory:.2f} GB, mean KLD {kl_mean:.5f} nats")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
