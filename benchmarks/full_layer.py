"""One full-shape layer (256 experts, 2048 / 512) through attend, solve and advance: seconds by step and peak memory.

    python benchmarks/full_layer.py --experts 256 --tokens 16384 --recipe best --json benchmarks/results/full_layer.json

Weights are random with a realistic spectrum: hidden states whose channels follow a power law and share directions,
experts whose rows have different norms. No checkpoint is read or written, so reading and writing are not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from fourfold.datatypes import Rows
from fourfold.model.family import FAMILIES
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.skeleton import CAPTURE, Skeleton
from fourfold.quantize import streams
from fourfold.quantize.observe import Batches
from fourfold.quantize.solve import solve_layer
from fourfold.recipe import load_recipe


def make_skeleton(experts: int, topk: int, hidden: int, width: int) -> Skeleton:
    """Qwen3.6-35B-A3B's text layer, with as many experts as asked for."""
    raw = {
        "model_type": "qwen3_5_moe",
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "hidden_size": hidden,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
            "num_experts": experts,
            "num_experts_per_tok": topk,
            "num_hidden_layers": 1,
            "layer_types": ["linear_attention"],
        },
    }
    config = AutoConfig.for_model(**raw)
    text = config.text_config
    text._attn_implementation, text._experts_implementation = "sdpa", CAPTURE
    return Skeleton(family=FAMILIES["qwen3_5_moe"], raw=raw, config=config, text=text)


def make_layer(skeleton: Skeleton, device: torch.device) -> DecoderLayer:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32).mul_(shape[-1] ** -0.5)
        loudness = torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=generator))
        return values.mul_(loudness).bfloat16()

    empty = skeleton.empty_layer(0).state_dict()
    kept = {name: weight(*value.shape) for name, value in empty.items() if ".experts." not in name and value.dim() > 1}
    kept |= {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in empty.items() if value.dim() == 1}
    stacks = []
    for name in ("gate_up_proj", "down_proj"):
        experts, *shape = empty[f"mlp.experts.{name}"].shape
        stack = torch.empty(experts, *shape, dtype=torch.bfloat16)
        for expert in range(experts):
            stack[expert] = weight(*shape)
        stacks.append(stack)
    return build_layer(skeleton, 0, LayerTensors(kept, *stacks, digest=""), device)


def make_rows(rows: int, length: int, hidden: int, seed: int) -> Rows:
    """Hidden states with power-law channels in a random rotation of 64 shared directions."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, hidden + 1, dtype=torch.float32) ** -0.7
    mixing = torch.randn(64, hidden, generator=torch.Generator().manual_seed(1)) * 0.1
    common = torch.randn(rows, length, 64, generator=generator) @ mixing
    return Rows(
        torch.zeros(rows, length, dtype=torch.int64),
        (torch.randn(rows, length, hidden, generator=generator) * spectrum * 8 + common).bfloat16(),
    )


def ignore(count: int) -> None:
    """Nobody watches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--chunk", type=int, default=16, help="experts whose moments exist at one time")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe, device = load_recipe(options.recipe), torch.device(options.device)
    with torch.no_grad():
        figures = measure(options, recipe, device)
    for step, seconds in figures["seconds"].items():
        print(f"{step:>16} {seconds:9.2f} s")
    print(f"{'peak, host':>16} {figures['peak_host_bytes'] / 1e9:9.2f} GB")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(options: argparse.Namespace, recipe, device: torch.device) -> dict:
    skeleton = make_skeleton(options.experts, options.topk, options.hidden, options.width)
    layer = make_layer(skeleton, device)
    batches = Batches(rows=8, tokens=8192, experts=min(options.chunk, options.experts))
    rows = make_rows(options.tokens // 1024, 1024, options.hidden, seed=2)
    # The release stream comes with the error that a layer before this one would have left.
    noise = 0.02 * torch.randn(rows.hidden_RTD.shape, generator=torch.Generator().manual_seed(3))
    moved = Rows(rows.token_RT, (rows.hidden_RTD.float() * (1 + noise)).bfloat16())
    heldout = make_rows(1, 1024, options.hidden, seed=4)
    source = streams.Stream(rows, heldout)
    release = streams.Stream(
        moved if recipe.solver.asymmetric else None, Rows(heldout.token_RT, heldout.hidden_RTD.clone())
    )
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    traffic = streams.attend(layer, source, release, batches, ignore)
    seconds["attend"] = time.perf_counter() - start
    start = time.perf_counter()
    result = solve_layer(layer, streams.observed(*traffic), recipe, batches, "layers.0.mlp.experts.", ignore)
    seconds |= result.seconds | {"solve_layer": time.perf_counter() - start}
    start = time.perf_counter()
    streams.advance(
        (layer, layer.with_experts(result.gate_up_ENK, result.down_ENK)), traffic, (source, release), batches, ignore
    )
    seconds["advance"] = time.perf_counter() - start
    errors = sorted(row.relative_error for row in result.projections)
    return {
        "options": {name: str(value) for name, value in vars(options).items() if name != "json"},
        "machine": f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": seconds,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "median_relative_error": errors[len(errors) // 2],
    }


if __name__ == "__main__":
    main()
