"""How a layer's time grows with experts, tokens and width: seconds of solve beside a straight line, as JSON and a plot.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

From a middle size (64 experts, top 8, 8,192 tokens, 1024 -> 256) one size at a time is changed. Tokens and experts
should cost in proportion (above a fixed part), width with its square and cube.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from full_layer import measure
from full_layer import parse as parse_layer
from gemm_rate import machine
from matplotlib import pyplot

from fourfold.recipe import load_recipe

pyplot.switch_backend("Agg")
MIDDLE = {"experts": 64, "tokens": 8192, "width": 256}
SERIES = {
    "experts": (8, 16, 32, 64, 128, 256),
    "tokens": (2048, 4096, 8192, 16_384, 32_768, 65_536),
    "width": (128, 256, 512),
}
OUTSIDE = ("attention, router", "advance")  # steps that are no part of the solve


def run(sizes: dict[str, int], preset: str, threads: int) -> dict[str, Any]:
    flags = {**sizes, "hidden": 4 * sizes["width"], "topk": 8, "chunk": 4, "threads": threads, "recipe": preset}
    options = parse_layer([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    figures = measure(options, load_recipe(preset), torch.device("cpu"))
    solve = {step: seconds for step, seconds in figures["steps"].items() if step not in OUTSIDE}
    gflop = sum(figures["flop"][step] for step in solve) / 1e9
    return {**sizes, "seconds": sum(solve.values()), "gflop": gflop, "steps": figures["steps"]}


def plot(series: dict[str, list[dict[str, Any]]], path: Path) -> None:
    figure, axes = pyplot.subplots(1, len(series), figsize=(4 * len(series), 3.4), constrained_layout=True)
    for axis, (name, rows) in zip(axes, series.items(), strict=True):
        sizes, seconds = [row[name] for row in rows], [row["seconds"] for row in rows]
        axis.loglog(sizes, seconds, "o-", label="measured")
        rate = rows[-1]["gflop"] / rows[-1]["seconds"]
        axis.loglog(sizes, [row["gflop"] / rate for row in rows], "--", color="grey", label="as the arithmetic")
        axis.set_xlabel(name)
        axis.set_ylabel("seconds of a layer's solve")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, required=True, help="where the figures go; the plot beside it, as .svg")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(MIDDLE, options.recipe, options.threads)  # compiles, warms up
    series: dict[str, list[dict[str, Any]]] = {}
    for name, sizes in SERIES.items():
        series[name] = []
        for size in sizes:
            row = run(MIDDLE | {name: size}, options.recipe, options.threads)
            series[name].append(row)
            rate = row["gflop"] / row["seconds"]
            print(f"{name:>8} {size:7,} {row['seconds']:8.2f} s {rate:7.1f} GFLOP/s", flush=True)
    figures = {
        "command": f"python benchmarks/scaling.py --recipe {options.recipe} --threads {options.threads}",
        "machine": machine("cpu", options.threads),
        "date": time.strftime("%Y-%m-%d"),
        "middle": MIDDLE,
        "series": series,
    }
    options.json.write_text(json.dumps(figures, indent=1) + "\n")
    plot(series, options.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
