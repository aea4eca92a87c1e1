"""The plan's predictions for machines by data sheet, and how close they come to the committed measurements.

    python benchmarks/predictions.py --json benchmarks/results/predictions.json
    python benchmarks/predictions.py --measure benchmarks/results/plan.json     # two runs of the example, CPU minutes

The first takes seconds and measures nothing: the plan of Qwen3.6-35B-A3B by machine, and that of each measured run at
the constants of this kind of CPU. The second measures this machine's rates as `fourfold plan` does, then quantizes the
example model on one thread, whose CPU seconds change less with other load than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from example import MODEL, ROOT, SIZES, overrides
from gemm_rate import machine
from reference_machine import EXAMPLE, GIB, HOST_GIB, WORKER_GIB, full_shape_config
from reference_machine import WORKERS as SIMULATED_WORKERS
from speed import recipe_of

from fourfold.model.skeleton import Skeleton
from fourfold.quantize.cost import TimeEstimate, estimate_time
from fourfold.quantize.plan import Plan, make_plan
from fourfold.quantize.rates import find_machine
from fourfold.recipe import Recipe, load_recipe

sys.path.append(str(ROOT / "tests"))
from checkpoints import write_sparse

RESULTS = Path(__file__).parent / "results"
MACHINES = ("4x3060", "h200", "8xa100")  # of the docs
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def planned(raw: dict[str, Any], recipe: Recipe, **settings: Any) -> Plan:
    """The plan of a checkpoint that consists of config.json, a tokenizer and headers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        shutil.copyfile(EXAMPLE / "tokenizer.json", folder / "tokenizer.json")
        tensors = Skeleton.of(raw, folder / "config.json").blueprint.model.state_dict()
        write_sparse(folder, {name: tuple(value.shape) for name, value in tensors.items()})
        return make_plan(folder, recipe, **settings)


def predict() -> Iterator[dict[str, Any]]:
    """Qwen3.6-35B-A3B with `best`, by machine, with all of its GPUs and with one."""
    raw, recipe = full_shape_config(40), load_recipe("best")
    for name in MACHINES:
        sheet = find_machine(name)
        budgets = {"memory_bytes": sheet.budget_bytes, "host_bytes": sheet.host_budget_bytes}
        for devices in sorted({sheet.devices[:1], sheet.devices}, key=len):
            plan = planned(raw, recipe, devices=devices, **budgets).timed(sheet.rates)
            yield {
                "machine": name,
                "workers": len(devices),
                "basis": plan.time.basis,
                "seconds": plan.time.seconds,
                "bound": plan.time.bound,
                "exchange_seconds": plan.time.exchange_seconds,
                "read_seconds": plan.time.read_seconds,
                "device_peak_bytes": plan.memory.device_peak_bytes,
                "host_peak_bytes": plan.memory.host_peak_bytes,
                "fits": plan.memory.fits,
            }


# --- check against measurements ------------------------------------------------------------------------------------


def check() -> Iterator[dict[str, Any]]:
    """Each row names the result that it is checked against as `file`."""
    for name, checked in CHECKS.items():
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for what, unit, predicted, measured in checked(result):
            row = {"what": what, "unit": unit, "predicted": predicted, "measured": measured}
            yield row | {"ratio": predicted / measured, "file": f"{name}.json"}


def predicted(plan: Plan, workers: int = 1, threads: int = 1) -> TimeEstimate:
    """At the constants of a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return estimate_time(plan.work, ["cpu"] * workers)
    finally:
        torch.set_num_threads(before)


def check_plan(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """Rates as the plan measured them, not the constants."""
    for run in result["runs"]:
        what = f"example, {run['rows']} x {run['length']} tokens, one thread, rates measured by the plan"
        yield what, "CPU seconds", run["predicted_seconds"], run["cpu_seconds"]


def check_example(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    for run in result["runs"]:
        plan = make_plan(ROOT / MODEL, load_recipe("best", overrides(run["rows"], run["length"])))
        what = f"example, {run['rows']} x {run['length']} tokens, {run['threads']} threads"
        yield what, "seconds", predicted(plan, threads=run["threads"]).seconds, run["seconds"]


def layers_of(options: dict[str, str], recipe: Recipe, layers: int) -> Plan:
    """Layers of speed.py's and workers.py's model, without an output head."""
    raw = json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8"))  # its attention, too
    raw["text_config"] |= {
        "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts": int(options["experts"]), "num_experts_per_tok": int(options["topk"]),
        "num_hidden_layers": layers, "layer_types": [options["layer-type"]] * layers, "mtp_num_hidden_layers": 0,
    }  # fmt: skip
    raw["vision_config"]["out_hidden_size"] = 2048
    return planned(raw, recipe)


def work_seconds(time: TimeEstimate) -> float:
    return time.forward_seconds + time.solve_seconds


def check_speed(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """One layer at full width on one thread, the second of two."""
    options = parsed(result["command"])
    for preset in ("best", "fast"):
        plan = layers_of(options, recipe_of(preset, int(options["tokens"])), layers=1)
        what = f"one layer, `{preset}`, {options['experts']} experts, {int(options['tokens']):,} tokens, one thread"
        yield what, "CPU seconds", work_seconds(predicted(plan)), result["tools"][preset]["cpu_seconds"]


def check_workers(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    options = parsed(result["command"])
    plan = layers_of(options, recipe_of(options["recipe"], int(options["tokens"])), int(options["layers"]))
    alone = work_seconds(predicted(plan))
    what = f"{options['layers']} layers, {options['experts']} experts, {int(options['tokens']):,} tokens, one worker"
    yield what, "seconds", alone, result["runs"]["1 worker"]["wall_seconds"]
    for name in ("2 workers", "2 ranks"):
        faster = alone / work_seconds(predicted(plan, workers=2, threads=2))
        yield f"the same, {name}", "times faster", faster, result["times_faster"][name]


def check_reference_machine(result: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    run, options = result["run"], parsed(result["command"])
    recipe = load_recipe("best", [*overrides(run["rows"], run["length"]), "heldout.windows=1"])
    budgets = {"memory_bytes": WORKER_GIB * GIB, "host_bytes": HOST_GIB * GIB}
    devices = ["cpu"] * SIMULATED_WORKERS
    plan = planned(full_shape_config(int(options["layers"])), recipe, devices=devices, **budgets)
    what = f"{options['layers']} layers, 256 experts, {run['rows']} x {run['length']} tokens, {len(devices)} workers"
    yield what, "seconds", predicted(plan, len(devices), 2).seconds, run["wall_seconds"]
    yield "the same, peak memory", "GB", plan.memory.host_peak_bytes / 1e9, run["peak_bytes"] / 1e9


CHECKS = {
    "plan": check_plan,
    "example": check_example,
    "speed": check_speed,
    "workers": check_workers,
    "reference_machine": check_reference_machine,
}


def parsed(command: str) -> dict[str, str]:
    """Flags of a command line, each with its value."""
    words = shlex.split(command)
    return {word.removeprefix("--"): words[place + 1] for place, word in enumerate(words) if word.startswith("--")}


# --- measure -------------------------------------------------------------------------------------------------------


def measure(rows: int, length: int) -> dict[str, Any]:
    """CPU seconds of one thread, predicted by `fourfold plan` and spent by `fourfold quantize`."""
    command = [sys.executable, "-m", "fourfold"]
    how: dict[str, Any] = {
        "check": True, "cwd": ROOT, "text": True, "env": os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT / "src")}
    }  # fmt: skip
    settings = ["--devices", "cpu", *(f"--set={setting}" for setting in overrides(rows, length))]
    answer = subprocess.run([*command, "plan", MODEL, "--json", *settings], capture_output=True, **how)
    expected = json.loads(answer.stdout)["time"]
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "quantize", MODEL, f"{folder}/out", "--quiet", *settings], **how)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "rows": rows,
        "length": length,
        "predicted_seconds": expected["seconds"],
        "basis": expected["basis"],
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "load_average": os.getloadavg()[0],
    }


def write(path: Path, figures: dict[str, Any]) -> None:
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the predictions and checks there")
    parser.add_argument("--measure", type=Path, help="measure instead, and write the measurement there")
    options = parser.parse_args()
    if options.measure:
        runs = [measure(*size) for size in SIZES]
        about = {"command": "python benchmarks/predictions.py", "machine": machine("cpu", 1)}
        write(options.measure, about | {"date": time.strftime("%Y-%m-%d"), "runs": runs})
        return
    found, checks = list(predict()), list(check())
    for row in found:
        print(f"{row['workers']} worker(s) of {row['machine']}: {row['seconds'] / 60:.1f} minutes, {row['bound']}")
    for row in checks:
        print(f"{row['ratio']:.2f}  {row['predicted']:,.2f} of {row['measured']:,.2f} {row['unit']}: {row['what']}")
    if options.json:
        write(options.json, {"recipe": "best", "predictions": found, "checks": checks})


if __name__ == "__main__":
    main()
