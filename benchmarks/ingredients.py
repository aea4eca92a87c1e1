"""CPU seconds of a run by ingredient, on two layers of real-moe, with every preset.

    python benchmarks/ingredients.py --json benchmarks/results/ingredients.json

The two layers are a model of their own, with the embeddings and the head. Seconds of layers are multiplied by the
number of layers of the whole model over two. One thread. Kernels that are compiled in the run count, so run it twice; a
busy machine takes more CPU seconds, so compare the presets of one run.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from quality import METHODS, REAL, ROW_TOKENS, STORAGE, Bench, cpu_name, model_path, shown
from safetensors.torch import save_file

from fourfold.core import gptq, grid, metrics, moments
from fourfold.datatypes import Event
from fourfold.model.tensors import TensorIndex
from fourfold.quantize import guide, site, solve, streams
from fourfold.quantize.run import quantize

FIRST, LAYERS = 10, 2  # of real-moe: one before its massive activations, and the first with them
PRESETS = ("fast", "best", "guided")
ONCE = "sweep: gradients of the head"  # in a run, not in each layer
SOLVE, SITES = "solve, rest", ("gate and up", "down")
OTHER = "reading, packing, writing, rest"
# What an ingredient is: functions by the module that calls them. Each counts without the others inside it.
INGREDIENTS: dict[str, tuple[tuple[Any, str], ...]] = {
    ONCE: ((guide, "_from_head"),),
    "sweep: forward": ((guide, "_forward"),),
    "sweep: backward": ((guide, "_backward"), (guide, "_curvature")),
    "streams: attention and router": ((streams, "attend"),),
    "streams: experts": ((streams, "advance"),),
    "held-out rows": ((streams, "pass_rows_"),),
    "moments of inputs, pools": tuple(
        (solve, name) for name in ("gate_up_pool", "gate_up_moments", "down_moments", "down_pool")
    ),
    "moments of the target": ((moments, "gap"),),
    "moments of the rows, pool": ((solve, "row_moments"), (solve, "row_pool")),
    "metric of the rows": ((solve, "_gate_up_rows"),),
    SOLVE: ((solve, "solve_site"),),
    "target": ((site, "_target"),),
    "factor": ((gptq, "factorize_"),),
    "scales": ((grid, "search_scales"),),
    "columns": ((gptq, "solve_codes"),),
    "refinement": ((gptq, "refine"),),
    "one expert without guidance": ((site, "_gain"),),
    "comparison with RTN, log": ((site, "_over_rtn"), (metrics, "proxy_rows"), (metrics, "energy")),
}
BY_SITE = ("factor", "scales", "columns", "refinement")


@dataclass
class _Open:
    """An ingredient in work, and what of its seconds belongs to others inside it."""

    name: str
    inner: tuple[float, float] = (0.0, 0.0)


class Clock:
    """CPU seconds, and those of them in the kernel, by ingredient: of the worker's thread alone."""

    def __init__(self) -> None:
        self.spent: dict[str, tuple[float, float]] = {}
        self._local = threading.local()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            stack: list[_Open] = self._local.__dict__.setdefault("stack", [])
            if name in BY_SITE and not (stack and stack[-1].name.startswith(SOLVE)):
                return function(*arguments, **options)  # part of the ingredient around it
            site_of = f", {SITES[len(arguments[0].projections) == 1]}" if name == SOLVE else ""
            site_of = stack[-1].name.removeprefix(SOLVE) if name in BY_SITE else site_of
            stack.append(_Open(f"{name}{site_of}"))
            start = _now()
            try:
                return function(*arguments, **options)
            finally:
                whole, ended = _less(_now(), start), stack.pop()
                known = self.spent.get(ended.name, (0.0, 0.0))
                self.spent[ended.name] = _less(known, _less(ended.inner, whole))
                if stack:
                    stack[-1].inner = _less(stack[-1].inner, _less((0.0, 0.0), whole))

        return measured


def _now() -> tuple[float, float]:
    return time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD).ru_stime


def _less(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return first[0] - second[0], first[1] - second[1]


def part_of(model: Path, folder: Path) -> Path:
    """Layers FIRST to FIRST + LAYERS of a model as a model."""
    index, tensors = TensorIndex.open(model), {}
    for name in index.headers:
        head, _, rest = name.partition("layers.")
        number, _, tail = rest.partition(".")
        if rest and not FIRST <= int(number) < FIRST + LAYERS:
            continue
        tensors[f"{head}layers.{int(number) - FIRST}.{tail}" if rest else name] = index.read(name)
    for path in model.iterdir():
        if ".safetensors" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def measure(bench: Bench, preset: str, tokens: int, layers: int, out: Path) -> dict[str, Any]:
    """CPU seconds of one preset, by ingredient, for a model of so many layers."""
    clock, begun = Clock(), {}

    def tell(event: Event) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        begun.setdefault(event.stage, (usage.ru_utime + usage.ru_stime, usage.ru_stime))

    recipe = bench.recipe(next(method for method in METHODS if method.name == preset), tokens, 0)
    with ExitStack() as stack:
        for name, functions in INGREDIENTS.items():
            for owner, attribute in functions:
                timed = clock.timed(name, getattr(owner, attribute))
                stack.enter_context(patch.object(owner, attribute, timed))
        quantize(bench.model, out, recipe, progress=tell)
    start = begun.get("forward", begun["embed"])
    total = _less(begun["measure"], start)
    spent = dict(clock.spent)
    spent[OTHER] = functools.reduce(_less, spent.values(), total)
    whole = {
        name: [seconds * (1 if name == ONCE else layers / LAYERS) for seconds in both] for name, both in spent.items()
    }
    cpu, system = (sum(both[place] for both in whole.values()) for place in range(2))
    return {
        "preset": preset,
        "cpu_seconds": cpu,
        "system_seconds": system,
        "measured_cpu_seconds": total[0],
        "ingredients": {name: {"cpu_seconds": both[0], "system_seconds": both[1]} for name, both in whole.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_path, default=REAL.name, help="a folder, or real-moe: built if missing")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=PRESETS)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = json.loads((options.model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    with tempfile.TemporaryDirectory(prefix="fourfold-ingredients-") as name:
        folder = Path(name)
        (folder / "part").mkdir()
        bench = Bench(part_of(options.model, folder / "part"), folder / "cache", ())
        runs = [measure(bench, preset, options.tokens, layers, folder / preset) for preset in options.presets]
    for found in runs:
        print(
            f"{found['preset']}: {found['cpu_seconds']:.0f} CPU s, {found['system_seconds']:.0f} of them in the kernel"
        )
        for ingredient, spent in sorted(found["ingredients"].items(), key=lambda item: -item[1]["cpu_seconds"]):
            print(f"  {spent['cpu_seconds']:7.1f}  {spent['system_seconds']:6.1f}  {ingredient}")
    if options.json:
        found = {
            "command": shlex.join(["python", "benchmarks/ingredients.py", *map(shown, sys.argv[1:])]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
            "versions": {name: version(name) for name in ("fourfold", "torch", "transformers")},
            "model": {"name": options.model.name, "layers": layers, "measured_layers": [FIRST, FIRST + LAYERS - 1]},
            "tokens": options.tokens,
            "calibration_row_tokens": ROW_TOKENS,
            "storage": STORAGE,
            "runs": runs,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
