"""What `compact` costs beside `best`: KLD on held-out text, and draft acceptance, on two models.

    python benchmarks/compact.py --json benchmarks/results/compact.json

Arithmetic is fp32, so that what is seen is the weights' and not BF16's. The control is the source itself in BF16
arithmetic against fp32: what every engine adds. Means are dominated by tokens whose experts change, which any
perturbation causes; medians are not.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from quality import cpu_name

from fourfold.core import metrics
from fourfold.datatypes import Rows
from fourfold.distributed.devices import Machine
from fourfold.model.checkpoint import Checkpoint
from fourfold.quantize import calibrate
from fourfold.quantize.progress import ProgressReporter
from fourfold.quantize.run import quantize
from fourfold.quantize.streams import compare
from fourfold.recipe import Heldout, load_recipe
from fourfold.release import drafts
from fourfold.release.sweep import Compute, embed, sweep_

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"example": ROOT / "examples/tiny-qwen3.6-moe", "deep": ROOT.parent / "shared/models/deep-moe"}
CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
WINDOW = 512
FIGURES = ("kl_mean", "kl_median", "kl_p99", "top1_agreement")


def behind_layers(weights: Checkpoint, token_RT: torch.Tensor, compute: Compute) -> Rows:
    rows = embed(weights, token_RT, compute)
    sweep_((weights,), (rows,), compute, lambda layer: nullcontext(lambda count: None))
    return Rows(token_RT, rows.hidden_RTD.float())


def measure(source: Checkpoint, releases: dict[str, Checkpoint], token_RT: torch.Tensor) -> dict[str, Any]:
    """Figures of each release, and of the source in BF16, against the source in fp32."""
    exact, head = Compute(CPU, FP32), source.head(CPU, FP32)
    reference = behind_layers(source, token_RT, exact)
    found: dict[str, Any] = {}
    for name, weights in ({"control": source} | releases).items():
        compute = Compute(CPU, BF16) if name == "control" else exact
        rows = behind_layers(weights, token_RT, compute)
        statistics = compare((head, weights.head(CPU, FP32)), (reference, rows))
        summary = metrics.summarize(statistics)
        found[name] = {key: summary[key] for key in FIGURES}
    return found


def run(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    recipes = {name: load_recipe(name) for name in ("best", "compact")}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, recipe in recipes.items():
            quantize(model, Path(folder) / name, recipe, machine=Machine(memory_bytes=2**33))
        source = Checkpoint.open(model)
        releases = {name: Checkpoint.open(Path(folder) / name, source) for name in recipes}
        heldout = Heldout(windows=options.windows, length=WINDOW)
        text = calibrate.heldout_windows(heldout, calibrate.load_tokenizer(model), fewer=True, sizes="--windows")
        figures = measure(source, releases, text.token_RT)
        bytes_by_release = {
            name: sum(header.size_bytes for header in weights.disk.headers.values())
            for name, weights in releases.items()
        }
        result = {"figures": figures, "bytes": bytes_by_release, "windows": len(text.token_RT), "window": WINDOW}
        if source.has_draft:
            drafts.PROMPTS = options.prompts
            prompt_RT, watch = drafts.cut_prompts(text.token_RT), ProgressReporter(lambda event: None, 0)
            drafted = drafts.measure_drafts(releases["compact"], source, prompt_RT, Compute(CPU, BF16), watch)
            assert drafted is not None and drafted.source_head is not None
            other = drafted.source_head
            result["drafts"] = {
                "prompts": len(prompt_RT),
                "mean_length": drafted.greedy.mean_length,
                "mean_length_bf16": other.mean_length,
                "difference": other.difference,
                "interval": other.interval,
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=256, help="of 512 tokens, or as many as the text has")
    parser.add_argument("--prompts", type=int, default=512, help="after which each model writes and drafts")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "command": f"python benchmarks/compact.py --windows {options.windows} --prompts {options.prompts}",
        "date": date.today().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("fourfold", "torch", "transformers")},
        "models": {},
    }
    for name in options.models:
        found["models"][name] = run(MODELS[name], options)
        print(json.dumps(found["models"][name], indent=1), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
