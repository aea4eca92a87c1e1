"""How close `fourfold plan` comes to a run on this machine: CPU seconds of one thread, predicted and spent.

    python benchmarks/plan.py --json benchmarks/results/plan.json

The plan measures the machine's rates, then the example model is quantized. CPU seconds of one thread are those of an
idle machine, so other processes hardly change them. scale.py repeats the ratio beside its other checks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from example import MODEL, ROOT, SIZES, overrides
from gemm_rate import machine

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(rows: int, length: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "fourfold"]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT / "src")}
    settings = [f"--set={setting}" for setting in overrides(rows, length)]
    plan = [*command, "plan", MODEL, "--devices", "cpu", "--json", *settings]
    planned = subprocess.run(plan, check=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    expected = json.loads(planned.stdout)["time"]
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        job = [*command, "quantize", MODEL, f"{folder}/out", "--devices", "cpu", "--quiet", *settings]
        subprocess.run(job, check=True, cwd=ROOT, env=environment)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "rows": rows,
        "length": length,
        "predicted_seconds": expected["seconds"],
        "basis": expected["basis"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "wall_seconds": wall,
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    runs = [measure(*size) for size in SIZES]
    for run in runs:
        predicted, spent = run["predicted_seconds"], run["cpu_seconds"]
        print(f"{run['rows']} x {run['length']}: {predicted:.1f} s predicted, {spent:.1f} s spent")
    figures = {
        "command": "python benchmarks/plan.py",
        "machine": machine("cpu", 1),
        "date": time.strftime("%Y-%m-%d"),
        "runs": runs,
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
