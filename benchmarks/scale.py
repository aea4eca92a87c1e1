"""Predictions of the plan for 1 to 64 workers, and how close predictions came to the committed measurements.

    python benchmarks/scale.py --json benchmarks/results/scale.json --plot docs/images/scale.svg

Measures nothing and takes seconds. Predictions come from the functions that `fourfold plan` uses: cost.py (time,
exchange), memory.py and rates.py (data sheets). The checks compare the same functions, at the constants of this kind of
CPU, with the committed results of example.py, speed.py, workers.py and reference_machine.py, and repeat plan.py's.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from example import overrides
from matplotlib import pyplot
from reference_machine import GIB, HOST_GIB, WORKER_GIB, full_shape_config
from reference_machine import WORKERS as SIMULATED_WORKERS
from speed import recipe_of

from fourfold.model.skeleton import Skeleton
from fourfold.quantize.cost import TimeEstimate, estimate_time, exchange
from fourfold.quantize.estimate import BF16, Workload, pool_rows
from fourfold.quantize.fits import choose_group_size
from fourfold.quantize.memory import attend_token_bytes, plan_memory
from fourfold.quantize.plan import make_plan
from fourfold.quantize.ranks import GPU_BYTES
from fourfold.quantize.rates import MACHINES
from fourfold.recipe import Recipe, load_recipe

pyplot.switch_backend("Agg")
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
EXAMPLE = "examples/tiny-qwen3.6-moe"
WORKERS = (1, 2, 4, 8, 16, 32, 64)
PER_HOST = {"rtx3060x4": 4, "h200": 8, "a100x8": 8}  # GPUs of one host, others are reached over the network
WITHIN = 1.5  # a prediction over the measurement, or the other way round


def qwen3_moe(**sizes: Any) -> dict[str, Any]:
    """Experts of the sizes given; attention is Qwen3's, a stand-in where the model named has another."""
    text = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 18_432}
    return {"model_type": "qwen3_moe", "num_experts_per_tok": 8, **text, **sizes}


MODELS = {
    "Qwen3.6-35B-A3B": full_shape_config(40),
    "235B-A22B class": qwen3_moe(
        num_hidden_layers=94, num_experts=128, hidden_size=4096, moe_intermediate_size=1536, vocab_size=151_936
    ),
    "671B class": qwen3_moe(
        num_hidden_layers=61, num_experts=256, hidden_size=7168, moe_intermediate_size=2048, vocab_size=129_280,
        mlp_only_layers=[0, 1, 2],
    ),
    "1T class": qwen3_moe(
        num_hidden_layers=61, num_experts=384, hidden_size=7168, moe_intermediate_size=2048, vocab_size=163_840,
        mlp_only_layers=[0],
    ),
}  # fmt: skip


def workload_of(raw: dict[str, Any], recipe: Recipe) -> Workload:
    """The sizes of a run from config.json alone; without vision and MTP, which are copied."""
    skeleton = Skeleton.of(raw, Path("config.json"))
    recipe = choose_group_size(skeleton, recipe)
    solver, widest = recipe.solver, skeleton.widest
    kept, matrices = zip(*(_parameters(skeleton, layer) for layer in range(skeleton.layers)), strict=True)
    routed = [skeleton.is_routed(layer) for layer in range(skeleton.layers)]
    experts = skeleton.expert_bytes // BF16
    packed_bytes = int(experts * (0.5 + BF16 / recipe.scheme.group))
    shards = [BF16 * count + packed_bytes * has for count, has in zip(kept, routed, strict=True)]
    read_bytes = BF16 * (sum(kept) + experts * sum(routed))
    ends_bytes = 2 * skeleton.vocabulary * widest.hidden * BF16
    tokens = sum(source.rows for source in recipe.calibration.sources) * recipe.calibration.length
    return Workload(
        hidden=widest.hidden,
        model_width=skeleton.text.hidden_size,
        state_width=skeleton.state_width,
        width=widest.width,
        experts=skeleton.experts,
        topk=skeleton.topk,
        vocabulary=skeleton.vocabulary,
        calibration_tokens=tokens,
        calibration_length=recipe.calibration.length,
        heldout_tokens=recipe.heldout.windows * recipe.heldout.length,
        heldout_length=recipe.heldout.length,
        asymmetric=solver.asymmetric,
        candidates=solver.scale_steps * (1 + recipe.scheme.signed) if solver.scale == "search" else 1,
        passes=solver.passes,
        pooled=solver.pool > 0,
        pool_rows=min(pool_rows(solver.pool_rows, widest.width), tokens),
        guidance_tokens=recipe.guidance.tokens,
        guidance_sites=recipe.guidance.sites,
        swept_layers=skeleton.layers if recipe.guidance.tokens else 0,
        layers=skeleton.layers,
        routed_layers=sum(routed),
        solved_layers=sum(routed),
        full_attention_layers=sum(skeleton.layer_kind(layer) != "linear_attention" for layer in range(skeleton.layers)),
        attention_width=skeleton.attention_width,
        kept_parameters=sum(matrices),
        kept_matrix=0,  # of CPUs alone
        kept_width=0,
        attend_token_bytes=attend_token_bytes(skeleton),
        layer_bytes=max(BF16 * (count + experts * has) for count, has in zip(kept, routed, strict=True)),
        expert_bytes=BF16 * experts,
        shard_bytes=max(shards),
        read_bytes=read_bytes + ends_bytes,
        write_bytes=sum(shards) + ends_bytes,
    )


def _parameters(skeleton: Skeleton, layer: int) -> tuple[int, int]:
    """Of a layer without its routed experts: all, and those of matrices."""
    experts = skeleton.blueprint.experts[layer]
    own = f"{experts.module}." if experts is not None else " "
    module = skeleton.blueprint.decoder.layers[layer]
    kept = [value for name, value in module.state_dict().items() if not name.startswith(own)]
    return sum(value.numel() for value in kept), sum(value.numel() for value in kept if value.dim() == 2)


# --- simulation ----------------------------------------------------------------------------------------------------


def simulate(work: Workload, name: str) -> Iterator[dict[str, Any]]:
    """One model on more and more GPUs of one kind."""
    sheet, alone = MACHINES[name], 0.0
    for workers in WORKERS:
        hosts = math.ceil(workers / PER_HOST[name])
        devices = [f"cuda:{number}" for number in range(workers)]
        wire = GPU_BYTES if hosts > 1 else 0
        memory = plan_memory(work, devices, sheet.budget_bytes, sheet.host_budget_bytes, wire)
        found = estimate_time(work, devices, sheet.rates(), inputs=memory.inputs, hosts=hosts)
        moved = exchange(work, workers, on_cpu=False, inputs=memory.inputs, hosts=hosts)
        alone = alone or found.seconds
        yield {
            "workers": workers,
            "hosts": hosts,
            "seconds": found.seconds,
            "times_faster": alone / found.seconds,
            "bound": found.bound,
            "arithmetic_seconds": found.compute_seconds - found.exchange_seconds,
            "exchange_seconds": found.exchange_seconds,
            "read_seconds": found.read_seconds,
            "link_bytes_of_a_worker": moved.link_bytes,
            "wire_bytes_of_a_host": moved.wire_bytes,
            "device_peak_bytes": memory.device_peak_bytes,
            "host_peak_bytes": memory.host_peak_bytes,
            "chunk_experts": memory.chunk_experts,
            "inputs": memory.inputs,
            "fits": memory.fits,
        }


def show(model: str, name: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{model} on {name} (prediction)")
    head = ("workers", "minutes", "faster", "bound by", "link GB", "wire GB", "device GB", "host GB", "fits")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = (
            str(row["workers"]), f"{row['seconds'] / 60:.1f}", f"{row['times_faster']:.1f}", row["bound"],
            *(f"{row[key] / 1e9:,.0f}" for key in ("link_bytes_of_a_worker", "wire_bytes_of_a_host")),
            *(f"{row[key] / 1e9:,.1f}" for key in ("device_peak_bytes", "host_peak_bytes")),
            "yes" if row["fits"] else "no",
        )  # fmt: skip
        print("| " + " | ".join(cells) + " |")


def plot(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fourfold"}  # the same figures, the same bytes
    figure, axes = pyplot.subplots(1, len(MACHINES), figsize=(4 * len(MACHINES), 3.6), constrained_layout=True)
    for axis, name in zip(axes, MACHINES, strict=True):
        axis.loglog(WORKERS, WORKERS, "--", color="grey", label="N-fold")
        for model, by_machine in found.items():
            axis.loglog(WORKERS, [row["times_faster"] for row in by_machine[name]], "o-", markersize=3, label=model)
        axis.set_title(f"{MACHINES[name].gpu}, {PER_HOST[name]} a host", fontsize=9)
        axis.set_xlabel("workers")
        axis.set_xticks(WORKERS, [str(count) for count in WORKERS])
        axis.set_yticks(WORKERS, [str(count) for count in WORKERS])
        axis.minorticks_off()
    axes[0].set_ylabel("times faster than one (prediction)")
    axes[0].legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


# --- check against measurements ------------------------------------------------------------------------------------


def predicted(work: Workload, devices: list[str], threads: int, hosts: int = 1) -> TimeEstimate:
    """At the constants of a CPU; threads: of each host's process."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return estimate_time(work, devices, hosts=hosts)
    finally:
        torch.set_num_threads(before)


def compared(what: str, unit: str, predicted: float, measured: float) -> dict[str, Any]:
    ratio = predicted / measured
    within = 1 / WITHIN <= ratio <= WITHIN
    return {"what": what, "unit": unit, "predicted": predicted, "measured": measured, "ratio": ratio, "within": within}


def check() -> Iterator[dict[str, Any]]:
    """Each row names the result that it is checked against as `file`."""
    for name, checked in (
        ("plan", check_plan), ("example", check_example), ("speed", check_speed), ("workers", check_workers),
        ("reference_machine", check_reference_machine),
    ):  # fmt: skip
        result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        yield from (row | {"file": f"{name}.json"} for row in checked(result))


def check_plan(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rates as the plan measured them, not the constants."""
    for run in result["runs"]:
        what = f"example, {run['rows']} x {run['length']} tokens, one thread, rates measured by the plan"
        yield compared(what, "CPU seconds", run["predicted_seconds"], run["cpu_seconds"])


def check_example(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for run in result["runs"]:
        plan = make_plan(ROOT / EXAMPLE, load_recipe("best", overrides(run["rows"], run["length"])))
        found = predicted(plan.work, ["cpu"], run["threads"])
        what = f"example, {run['rows']} x {run['length']} tokens, {run['threads']} threads"
        yield compared(what, "seconds", found.seconds, run["seconds"])


def check_speed(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One layer at full width on one thread, the second of two."""
    options = parsed(result["command"])
    for preset in ("best", "fast"):
        found = predicted(work_of(options, recipe_of(preset, int(options["tokens"])), layers=1), ["cpu"], 1)
        what = f"one layer, `{preset}`, {options['experts']} experts, {int(options['tokens']):,} tokens, one thread"
        yield compared(what, "CPU seconds", found.compute_seconds, result["tools"][preset]["cpu_seconds"])


def work_of(options: dict[str, str], recipe: Recipe, layers: int) -> Workload:
    """Layers of speed.py's and workers.py's model; its output head is left out."""
    raw = json.loads((ROOT / EXAMPLE / "config.json").read_text(encoding="utf-8"))  # its attention, too
    raw["text_config"] |= {
        "hidden_size": 2048, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "num_experts": int(options["experts"]), "num_experts_per_tok": int(options["topk"]), "vocab_size": 1,
        "num_hidden_layers": layers, "layer_types": [options["layer-type"]] * layers, "mtp_num_hidden_layers": 0,
    }  # fmt: skip
    return workload_of(raw, recipe)


def check_workers(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    options = parsed(result["command"])
    work = work_of(options, recipe_of(options["recipe"], int(options["tokens"])), int(options["layers"]))
    alone = predicted(work, ["cpu"], 1).compute_seconds
    what = f"{options['layers']} layers, {options['experts']} experts, {int(options['tokens']):,} tokens, one worker"
    yield compared(what, "seconds", alone, result["runs"]["1 worker"]["wall_seconds"])
    ways = {"2 workers": (2, 2, 1), "2 ranks": (2, 1, 2)}  # workers, threads, hosts
    for name, (workers, threads, hosts) in ways.items():
        faster = alone / predicted(work, ["cpu"] * workers, threads, hosts).compute_seconds
        yield compared(f"the same, {name}", "times faster", faster, result["times_faster"][name])


def check_reference_machine(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    run, options = result["run"], parsed(result["command"])
    recipe = load_recipe("best", [*overrides(run["rows"], run["length"]), "heldout.windows=1"])
    work, devices = workload_of(full_shape_config(int(options["layers"])), recipe), ["cpu"] * SIMULATED_WORKERS
    what = f"{options['layers']} layers, 256 experts, {run['rows']} x {run['length']} tokens, {len(devices)} workers"
    yield compared(what, "seconds", predicted(work, devices, 2).seconds, run["wall_seconds"])
    memory = plan_memory(work, devices, WORKER_GIB * GIB, HOST_GIB * GIB).host_peak_bytes
    yield compared("the same, peak memory", "GB", memory / 1e9, run["peak_bytes"] / 1e9)


def parsed(command: str) -> dict[str, str]:
    """Flags of a command line, each with its value."""
    words = shlex.split(command)
    return {word.removeprefix("--"): words[place + 1] for place, word in enumerate(words) if word.startswith("--")}


def simulate_all(recipe: Recipe) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Predictions by model, machine and number of workers."""
    works = {model: workload_of(raw, recipe) for model, raw in MODELS.items()}
    return {model: {name: list(simulate(work, name)) for name in MACHINES} for model, work in works.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--plot", type=Path, help="and the speed-up curves there")
    options = parser.parse_args()
    found, checks = simulate_all(load_recipe(options.recipe)), list(check())
    for model, by_machine in found.items():
        for name, rows in by_machine.items():
            show(model, name, rows)
    print("\n| prediction | unit | predicted | measured | ratio |\n|---|---|---|---|---|")
    for row in checks:
        cells = (row["what"], row["unit"], *(f"{row[key]:,.2f}" for key in ("predicted", "measured", "ratio")))
        print(f"| {' | '.join(cells)} |")
    figures = {
        "recipe": options.recipe,
        "rates": {name: sheet.rates().basis for name, sheet in MACHINES.items()},
        "predictions": found,
        "checks": checks,
    }
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
