"""Speed beside GPTQModel: a whole decoder layer, captured and quantized, on the same rows, with one thread each.

    python benchmarks/speed.py --json benchmarks/results/speed.json

A two-layer Qwen3.5-MoE at full width (2048 -> 512) with fewer experts, random weights, real text; experts only.
fourfold: CPU seconds of the second layer, held-out rows included (in the first both streams are still one).
GPTQModel: CPU seconds of its quantize() over two, start-up, loading and saving left out; its quickest setting on a CPU
(batches of 8, one thread). It runs in an environment of its own, made by benchmarks/peers/install.sh if missing.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peer
import torch
from gemm_rate import machine
from transformers import AutoConfig, AutoModelForImageTextToText

from fourfold.datatypes import Event
from fourfold.quantize import calibrate
from fourfold.quantize.run import quantize
from fourfold.recipe import Recipe, load_recipe

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "tiny-qwen3.6-moe"
ROW = 1024  # tokens
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
REQUIRED = {"fast": 3.0, "best": 1.4}  # times fewer CPU seconds than GPTQModel


def make_model(folder: Path, experts: int, topk: int, layer_type: str, layers: int = 2) -> None:
    """A checkpoint of random weights, power-law embedding, the example's tokenizer; as transformers saves it."""
    raw = json.loads((EXAMPLE / "config.json").read_text(encoding="utf-8"))
    raw["text_config"] |= {
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": experts,
        "num_experts_per_tok": topk,
        "num_hidden_layers": layers,
        "layer_types": [layer_type] * layers,
        "mtp_num_hidden_layers": 0,
    }
    raw["vision_config"]["out_hidden_size"] = 2048
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**raw), dtype=torch.bfloat16)
    loudness_D = torch.arange(1, 2049, dtype=torch.float32) ** -0.5
    model.get_input_embeddings().weight.data.mul_(loudness_D[torch.randperm(2048)] * 20)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)


def recipe_of(preset: str, tokens: int) -> Recipe:
    """A preset on so many tokens of the built-in texts, with as little held-out text as there can be."""
    sources = load_recipe(preset).calibration.sources
    rows = [tokens // ROW // len(sources)] * len(sources)
    rows[0] += tokens // ROW - sum(rows)
    counts = [f"calibration.sources.{number}.rows={count}" for number, count in enumerate(rows)]
    return load_recipe(preset, [*counts, f"calibration.length={ROW}", "heldout.windows=1", "heldout.length=256"])


def run_fourfold(model: Path, out: Path, preset: str, tokens: int) -> dict[str, Any]:
    """In this process: CPU seconds of the second layer, from its reading to its end."""
    seconds: dict[str, float] = {}

    def watch(event: Event) -> None:
        if event.layer == 1 and event.kind == "stage" and event.stage == "read":
            seconds.setdefault("start", time.process_time())
        if event.layer == 1 and event.kind == "layer":
            seconds["end"] = time.process_time()

    summary = quantize(model, out, recipe_of(preset, tokens), progress=watch)
    return {
        "cpu_seconds": seconds["end"] - seconds["start"],
        "methods": summary.methods,
        "peak_bytes": summary.peak_memory_bytes["host"],
    }


def run_child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_peer(model: Path, scratch: Path, tokens: int) -> dict[str, Any]:
    """GPTQModel on the rows of `best`; CPU seconds of a layer are its quantize() over two."""
    rows = calibrate.collect(recipe_of("best", tokens), calibrate.load_tokenizer(model)).token_RT.tolist()
    found = peer.quantize("gptqmodel", model, rows, scratch / "peer", ["--fallback-share", "0.005"])
    shutil.rmtree(scratch / "peer")
    return found | {"cpu_seconds": found["cpu_seconds"] / 2}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of every tool in turn, so that a machine that slows down slows all of them."""
    runs: dict[str, list[dict[str, Any]]] = {"gptqmodel": [], "fast": [], "best": []}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_model(scratch / "model", options.experts, options.topk, options.layer_type)
        for _ in range(options.rounds):
            for preset in ("fast", "best"):
                out = scratch / preset
                runs[preset].append(run_child("--child", preset, str(scratch / "model"), str(out), str(options.tokens)))
                shutil.rmtree(out)
            runs["gptqmodel"].append(run_peer(scratch / "model", scratch, options.tokens))
    return {
        tool: {
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in found),
            "cpu_seconds_of_each_run": [run["cpu_seconds"] for run in found],
            "peak_bytes": max(run["peak_bytes"] for run in found),
        }
        for tool, found in runs.items()
    }


def show(tools: dict[str, dict[str, Any]], experts: int) -> bool:
    """The table, and whether what is required is met."""
    peer, met = tools["gptqmodel"]["cpu_seconds"], True
    print(f"{'tool':>12} {'CPU s':>8} {'per expert':>10} {'times fewer':>12} {'required':>9} {'peak GB':>8}")
    for tool, row in tools.items():
        times = peer / row["cpu_seconds"]
        met &= times >= REQUIRED.get(tool, 0.0)
        wanted = f"{REQUIRED[tool]:.1f}" if tool in REQUIRED else ""
        seconds, peak_gb = row["cpu_seconds"], row["peak_bytes"] / 1e9
        print(f"{tool:>12} {seconds:8.1f} {seconds / experts:10.2f} {times:12.2f} {wanted:>9} {peak_gb:8.2f}")
    return met


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--topk", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layer-type", default="full_attention", choices=["full_attention", "linear_attention"])
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--child", nargs=4, metavar=("PRESET", "MODEL", "OUT", "TOKENS"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.child:
        preset, model, out, tokens = options.child
        print(json.dumps(run_fourfold(Path(model), Path(out), preset, int(tokens))))
        return
    tools = compare(options)
    met = show(tools, options.experts)
    if options.json:
        names = ("experts", "topk", "tokens", "rounds", "layer_type")
        flags = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names)
        peer = tools["gptqmodel"]["cpu_seconds"]
        figures = {
            "command": f"python benchmarks/speed.py {flags}",
            "machine": machine("cpu", 1),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("torch", "transformers", "fourfold")},
            "tools": tools,
            "times_fewer": {tool: peer / row["cpu_seconds"] for tool, row in tools.items()},
            "required_met": met,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
