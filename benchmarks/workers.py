"""What a second worker brings: the same run on one and two CPU workers of one thread each, and on two ranks.

    python benchmarks/workers.py --rounds 2 --json benchmarks/results/workers.json

Three layers of a Qwen3.5-MoE at full width (2048 -> 512) with 32 experts, random weights, real text. Wall seconds from
the first layer's reading to the last layer's end, as ratios of runs that take turns; start, embedding and the output
head are left out. The share of each worker's time by stage is from its own trace.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from gemm_rate import machine
from speed import make_model, recipe_of

from fourfold.datatypes import Event
from fourfold.distributed.devices import Machine
from fourfold.quantize.run import quantize

REQUIRED = {"2 workers": 1.8, "2 ranks": 1.7}  # times faster than one worker, one thread each
RUNS = {  # devices, threads of the process, ranks
    "1 worker": ("cpu", 1, 1),
    "2 workers": ("cpu*2", 2, 1),
    "2 ranks": ("cpu", 1, 2),
}


def run_here(model: Path, out: Path, preset: str, tokens: int, devices: str) -> None:
    """In this process, a rank of several or alone: prints wall seconds of the layers."""
    seen: dict[str, float] = {}

    def watch(event: Event) -> None:
        if event.kind == "stage" and event.stage == "read":
            seen.setdefault("start", time.perf_counter())
        if event.kind == "layer":
            seen["end"] = time.perf_counter()

    trace = out.with_suffix(".trace.json")
    quantize(model, out, recipe_of(preset, tokens), machine=Machine(devices=devices), trace=trace, progress=watch)
    if seen:
        print(json.dumps(seen["end"] - seen["start"]))


def run_child(options: argparse.Namespace, model: Path, out: Path, name: str) -> dict[str, Any]:
    devices, threads, ranks = RUNS[name]
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [__file__, "--child", str(model), str(out), options.recipe, str(options.tokens), devices]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    shutil.rmtree(out)
    trace = out.with_suffix(".trace.json")
    shares = stage_seconds(json.loads(trace.read_text())["traceEvents"])
    trace.unlink()
    return {"wall_seconds": json.loads(done.stdout.splitlines()[-1]), "stages": shares}


def stage_seconds(events: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By worker the seconds of each stage; waiting is inside them, and listed too."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["ph"] == "X" and event["tid"] >= 0:
            found[f"worker {event['tid']}"][event["name"]] += event["dur"] / 1e6
    return {worker: {stage: round(seconds, 2) for stage, seconds in spent.items()} for worker, spent in found.items()}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        make_model(scratch / "model", options.experts, options.topk, options.layer_type, options.layers)
        for _ in range(options.rounds):
            for name in RUNS:
                runs[name].append(run_child(options, scratch / "model", scratch / "out", name))
                print(name, runs[name][-1]["wall_seconds"], file=sys.stderr)
    return {
        name: {
            "wall_seconds": statistics.median(run["wall_seconds"] for run in found),
            "wall_seconds_of_each_run": [run["wall_seconds"] for run in found],
            "stage_seconds": found[-1]["stages"],
        }
        for name, found in runs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--layer-type", default="full_attention", choices=["full_attention", "linear_attention"])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        model, out, preset, tokens, devices = options.child
        run_here(Path(model), Path(out), preset, int(tokens), devices)
        return
    found = compare(options)
    one, met = found["1 worker"]["wall_seconds"], True
    print(f"{'run':>24} {'wall s':>8} {'times faster':>13} {'required':>9}")
    for name, row in found.items():
        faster, wanted = one / row["wall_seconds"], REQUIRED.get(name)
        met &= wanted is None or faster >= wanted
        print(f"{name:>24} {row['wall_seconds']:8.1f} {faster:13.2f} {wanted or '':>9}")
    if options.json:
        names = ("experts", "topk", "layers", "tokens", "rounds", "recipe", "layer_type")
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
        figures = {
            "command": f"python benchmarks/workers.py {flags}",
            "machine": machine("cpu", 2),
            "date": time.strftime("%Y-%m-%d"),
            "runs": found,
            "times_faster": {name: one / row["wall_seconds"] for name, row in found.items()},
            "required_met": met,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
