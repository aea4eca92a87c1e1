"""What a Python without the GIL buys: the example quantized by several CPU workers, with the GIL off and on.

    PYTHONPATH=src .free-threaded/venv/bin/python benchmarks/free_threaded.py --rows 32 --length 256 --rounds 2 \\
        --devices 'cpu*4' 'cpu*2' --json benchmarks/results/free_threaded.json

Runs take turns in the same interpreter (`make test-free-threaded` builds it): PYTHON_GIL=0, PYTHON_GIL=1, and so on.
Wall seconds are the first worker's, from its first row to its last; CPU seconds are the whole process's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from example import MODEL, ROOT, overrides
from gemm_rate import machine


def run(devices: str, gil: str, rows: int, length: int, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fourfold", "quantize", MODEL, str(out), "--devices", devices, "--quiet"]
    for override in overrides(rows, length):
        command += ["--set", override]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHON_GIL": gil}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    state = json.loads((out / "fourfold.json").read_text(encoding="utf-8"))
    assert state["gil"] is (gil == "1")
    return {
        "wall_seconds": state["workers"][0]["of_seconds"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "waited_seconds": [worker["waited_seconds"] for worker in state["workers"]],
        "content": state["output"]["content"],
    }


def compare(devices: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds of both, and medians over them."""
    runs: dict[str, list[dict[str, Any]]] = {"0": [], "1": []}
    for number in range(options.rounds):
        for gil, found in runs.items():
            out = folder / f"{devices}-{gil}-{number}"
            found.append(run(devices, gil, options.rows, options.length, out))
            print(f"{devices} PYTHON_GIL={gil} {found[-1]['wall_seconds']:.1f} s, CPU {found[-1]['cpu_seconds']:.1f} s")
    wall, cpu = (
        {gil: statistics.median(each[key] for each in found) for gil, found in runs.items()}
        for key in ("wall_seconds", "cpu_seconds")
    )
    return {
        "times_faster_without_gil": wall["1"] / wall["0"],
        "times_less_cpu_without_gil": cpu["1"] / cpu["0"],
        "same_bytes": len({each["content"] for found in runs.values() for each in found}) == 1,
        "gil_off": runs["0"],
        "gil_on": runs["1"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--devices", nargs="+", default=["cpu*2", "cpu*4"])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit(f"{sys.executable} cannot run without the GIL; make test-free-threaded builds one that can")
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine("cpu", torch.get_num_threads()),
        "python": sys.version,
        "date": time.strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory() as folder:
        result["runs"] = {devices: compare(devices, options, Path(folder)) for devices in options.devices}
    result["load_average"] = os.getloadavg()
    for devices, found in result["runs"].items():
        print(f"{devices}: without the GIL {found['times_faster_without_gil']:.2f} times as fast")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
