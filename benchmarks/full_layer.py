"""One full-shape layer (2048 -> 512) through attend, solve and advance: each step beside what the machine can do.

    python benchmarks/full_layer.py --experts 256 --topk 8 --tokens 32768 --json benchmarks/results/full_layer.json

Weights are random with a realistic spectrum: hidden states whose channels follow a power law and share directions,
experts whose rows have different norms. No checkpoint is read or written, so reading and writing are not in it.
A step's rate is its arithmetic (the least that its mathematics needs) over its seconds; "of GEMM" is that rate over
this machine's own GEMM rate in the same format, measured first (gemm_rate.py). Seconds are CPU seconds with one
thread, wall seconds otherwise.

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/full_layer.py --products bf16 fp32 \
        --experts 8 --topk 2 --tokens 4096 --recipe fast --threads 1 --json benchmarks/results/full_layer_widened.json

compares BF16 products with those of core/widening; these variables make torch take the way of a processor with AVX2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from gemm_rate import machine, measure_rates
from torch import Tensor

from fourfold.core import gptq, grid, guidance, metrics, moments, widening
from fourfold.core.kernels import bf16
from fourfold.datatypes import Batches, Rows
from fourfold.distributed.team import alone
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.skeleton import Skeleton
from fourfold.quantize import chunk, observe, site, solve, streams
from fourfold.quantize.estimate import pool_rows
from fourfold.quantize.finish import peak_memory
from fourfold.quantize.fits import choose_group_size
from fourfold.quantize.footprint import CPU_ATTEND_TOKENS
from fourfold.quantize.memory import ATTEND_TOKENS
from fourfold.recipe import Recipe, load_recipe

ROW = 1024  # tokens
SLOWER = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # with them torch works as on another processor
PATHS = ("rates", "profile", "json")  # options that change no figure
MOMENTS = "bf16" if bf16.AVAILABLE or torch.cuda.is_available() else "fp32"
# step: the functions it is made of (the outermost counts), the format whose GEMM rate it is held against
STEPS: dict[str, tuple[list[tuple[Any, str]], str]] = {
    "attention, router": ([(streams, "attend")], "bf16"),
    "moments": ([(moments, "accumulate")], MOMENTS),
    "pools": ([(solve, "gate_up_pool"), (solve, "down_pool")], MOMENTS),
    "activations for down": ([(chunk, "expert_hidden")], "bf16"),
    "shrink": ([(moments, "shrink"), (moments, "shrink_to_zero")], "fp32"),
    "factor": ([(gptq, "factorize_")], "fp32"),
    "gap between the streams": ([(observe, "_gap"), (moments, "gap")], "fp32"),
    "importance of tokens": ([(observe, "token_importance")], "fp32"),
    "target of down": ([(site, "_target")], "fp32"),
    "row metric": (
        [(solve, "row_moments"), (solve, "row_pool"), (guidance, "gate_up_metric"), (guidance, "factorize_rows")],
        MOMENTS,
    ),
    "scale search": ([(grid, "search_scales")], "fp32"),
    "columns": ([(gptq, "solve_codes")], "fp32"),
    "refinement": ([(gptq, "refine")], "fp32"),
    "errors for the log": (
        [(site, "_over_rtn"), (site, "_own_moments"), (metrics, "proxy_rows"), (metrics, "energy")],
        "fp32",
    ),
    "packing": ([(solve, "_pack"), (solve, "_unpack")], "fp32"),
    "advance": ([(streams, "advance"), (streams, "pass_rows_")], "bf16"),
}


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
    return Skeleton.of(raw, Path("config.json"))


def make_layer(skeleton: Skeleton, device: torch.device) -> DecoderLayer:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32).mul_(shape[-1] ** -0.5)
        loudness = torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=generator))
        return values.mul_(loudness).bfloat16()

    headers, routed = skeleton.blueprint.headers, skeleton.widest
    shapes = {name: headers[name].shape for name in skeleton.blueprint.kept_names(0)}
    kept = {name: weight(*shape) for name, shape in shapes.items() if len(shape) > 1}
    kept |= {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items() if len(shape) == 1}
    stacks = []
    for shape in ((2 * routed.width, routed.hidden), (routed.output, routed.width)):
        stack = torch.empty(routed.count, *shape, dtype=torch.bfloat16)
        for expert_NK in stack:
            expert_NK.copy_(weight(*shape))
        stacks.append(stack)
    return build_layer(skeleton, 0, LayerTensors(kept, *stacks, digest=""), device)


def make_rows(rows: int, length: int, hidden: int, seed: int) -> Rows:
    """Hidden states with power-law channels in a random rotation of 64 shared directions."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, hidden + 1, dtype=torch.float32) ** -0.7
    mixing = torch.randn(64, hidden, generator=torch.Generator().manual_seed(1)) * 0.1
    hidden_RTD = torch.empty(rows, length, hidden, dtype=torch.bfloat16)
    for row in range(rows):
        common_TD = torch.randn(length, 64, generator=generator) @ mixing
        hidden_RTD[row] = torch.randn(length, hidden, generator=generator) * spectrum * 8 + common_TD
    return Rows(torch.zeros(rows, length, dtype=torch.int64), hidden_RTD)


def make_streams(tokens: int, hidden: int, asymmetric: bool) -> streams.Streams:
    """Both streams; the release stream comes with the error that a layer before this one would have left."""
    rows, heldout = make_rows(tokens // ROW, ROW, hidden, seed=2), make_rows(1, ROW, hidden, seed=4)
    moved = rows.hidden_RTD.clone()
    for row_TD in moved:
        row_TD *= 1 + 0.02 * torch.randn(row_TD.shape, generator=torch.Generator().manual_seed(3))
    release = Rows(rows.token_RT, moved) if asymmetric else None
    second = streams.Stream(release, Rows(heldout.token_RT, heldout.hidden_RTD.clone()))
    return streams.Streams(streams.Stream(rows, heldout), second, None)


def make_curvature(recipe: Recipe, hidden: int, device: torch.device) -> solve.Curvature | None:
    """Of gradients that share directions, if the recipe has guidance."""
    if not recipe.guidance.tokens:
        return None
    gradient_TD = make_rows(4, ROW, hidden, seed=5).hidden_RTD.flatten(0, 1).float().to(device)
    return solve.Curvature(gradient_TD.T @ gradient_TD / len(gradient_TD), damping=0.05)


class Clock:
    """Seconds by step, of functions wrapped while a layer is measured; a step within a step is the outer one's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def wrap(self, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            if self._inside:
                return function(*arguments, **named)
            self._inside, start = True, self.now()
            try:
                return function(*arguments, **named)
            finally:
                self._inside = False
                self.seconds[step] += self.now() - start

        return timed

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = [(room, name, getattr(room, name)) for places, _ in STEPS.values() for room, name in places]
        for step, (places, _) in STEPS.items():
            for room, name in places:
                setattr(room, name, self.wrap(step, getattr(room, name)))
        try:
            yield
        finally:
            for room, name, function in before:
                setattr(room, name, function)


def arithmetic(options: argparse.Namespace, recipe: Recipe, kept_parameters: int) -> dict[str, float]:
    """Operations of each step, a multiplication and an addition counted as two: the least that it needs."""
    solver, hidden, width = recipe.solver, options.hidden, options.width
    experts, pairs, both = options.experts, options.tokens * options.topk, 1 + solver.asymmetric
    sites = ((hidden, 2 * width), (width, hidden))  # (K, N)
    squares = sum(inputs**2 for inputs, _ in sites)
    weights = sum(inputs * outputs for inputs, outputs in sites)
    products = experts * sum(outputs * inputs**2 for inputs, outputs in sites)
    expert_forward = pairs * 6.0 * hidden * width
    heldout = 2 * ROW
    candidates = solver.scale_steps * (1 + recipe.scheme.signed)
    guided = recipe.guidance.tokens > 0
    pooled = experts * min(pool_rows(solver.pool_rows, width), options.tokens)
    return {
        "attention, router": 2.0 * options.tokens * both * kept_parameters,
        "moments": 1.0 * pairs * squares,  # one triangle
        "pools": options.tokens * hidden**2 + pooled * (4.0 * hidden * width + width**2),
        "activations for down": pairs * both * 4.0 * hidden * width,
        "shrink": 0.0,
        "factor": experts * sum(inputs**3 for inputs, _ in sites) / 3.0,
        "gap between the streams": pairs * 4.0 * hidden * width * solver.asymmetric,
        "importance of tokens": 2.0 * options.tokens * hidden * (solver.norm_power > 0),
        "target of down": experts * (3.0 * hidden * width**2 + 2.0 * width**3) * solver.asymmetric,
        "row metric": (pairs + pooled) * (4.0 * hidden * width + 4.0 * width**2) * guided,
        "scale search": experts * weights * 7.0 * candidates if solver.scale == "search" else 0.0,
        "columns": 1.0 * products,
        "refinement": 2.0 * solver.passes * products,
        "errors for the log": 4.0 * products,  # of errors, of weights, and of both beside RTN's: one triangle each
        "packing": 0.0,
        "advance": expert_forward * both + heldout * (2.0 * kept_parameters + options.topk * 6.0 * hidden * width),
    }


def measure(options: argparse.Namespace, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """A layer's seconds by step, its arithmetic, peak memory and median relative error."""
    skeleton = make_skeleton(options.experts, options.topk, options.hidden, options.width)
    recipe = choose_group_size(skeleton, recipe)
    layer = make_layer(skeleton, device)
    rows = (CPU_ATTEND_TOKENS if device.type == "cpu" else ATTEND_TOKENS) // ROW
    batches = Batches(rows=rows, tokens=8192, experts=min(options.chunk, options.experts))
    both = make_streams(options.tokens, options.hidden, recipe.solver.asymmetric)
    clock, worker = Clock(device), alone(device)
    curvature = make_curvature(recipe, options.hidden, device)
    chunking = solve.Chunking(batches.experts, batches.inputs, skeleton.stems(0), ignore)
    start = clock.now()
    with clock.watching(), torch.no_grad():
        moe_inputs = streams.attend(worker, layer, None, both, batches, ignore)
        layer = streams.own_experts(worker, layer, moe_inputs)
        seen = observe.observe(worker, layer, *moe_inputs)
        source = streams.advance(worker, layer, moe_inputs[0], both.source, batches, ignore)
        if power := recipe.solver.norm_power:
            importance_T = observe.token_importance(worker, source.calibration, power).to(device)
            seen = dataclasses.replace(seen, importance_T=importance_T)
        result = solve.solve_layer(worker, layer, seen, recipe, chunking, curvature)
        release_layer = layer.with_experts(result.gate_up_ENK, result.down_ENK)
        release = streams.advance(worker, release_layer, moe_inputs[1], both.release, batches, ignore)
        heldout = source.heldout, release.heldout
        streams.pass_rows_(worker, (layer, release_layer), heldout, batches, ignore)
    seconds = clock.now() - start
    kept = sum(value.numel() for value in layer.own.module.parameters() if value.dim() == 2)
    errors = sorted(row.relative_error for row in result.projections)
    return {
        "options": flags(options),
        "seconds": seconds,
        "steps": dict(clock.seconds),
        "flop": arithmetic(options, recipe, kept),
        "peak_bytes": peak_memory(),
        "median_relative_error": errors[len(errors) // 2],
    }


@contextmanager
def profiled(path: Path, device: str) -> Iterator[None]:
    """Write a table of what took longest, kernels on a GPU, operators on a CPU."""
    with torch.profiler.profile() as profile:
        yield
    key = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    path.write_text(profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70))


def ignore(count: int) -> None:
    """Nobody watches."""


def with_rates(figures: dict[str, Any], rates: dict[str, Any], products: str = "bf16") -> dict[str, Any]:
    """Each step's seconds, GFLOP, GFLOP/s and share of the GEMM rate of its format; the floor of all in seconds."""
    steps, floor = {}, 0.0
    for step, seconds in figures["steps"].items():
        kind = products if STEPS[step][1] == "bf16" else STEPS[step][1]
        flop, best = figures["flop"][step], rates["gemm"][kind]["gflop_per_second"]
        rate = flop / seconds / 1e9 if seconds else 0.0
        steps[step] = {"seconds": seconds, "gflop": flop / 1e9, "gflop_per_second": rate, "of_gemm": rate / best}
        floor += flop / best / 1e9
    return figures | {"steps": steps, "floor_seconds": floor, "rates": rates}


def show(figures: dict[str, Any]) -> None:
    print(f"{'step':>23} {'seconds':>9} {'share':>6} {'GFLOP':>10} {'GFLOP/s':>8} {'of GEMM':>8}")
    for step, row in figures["steps"].items():
        line = f"{step:>23} {row['seconds']:9.2f} {row['seconds'] / figures['seconds']:6.1%}"
        if row["gflop"]:
            line += f" {row['gflop']:10,.0f} {row['gflop_per_second']:8,.0f} {row['of_gemm']:8.0%}"
        print(line)
    floor = f"all arithmetic at the GEMM rates: {figures['floor_seconds']:.2f} s"
    print(f"{'layer':>23} {figures['seconds']:9.2f}; {floor}")
    peak = ", ".join(f"{place} {size / 1e9:.2f} GB" for place, size in figures["peak_bytes"].items())
    print(f"{'peak memory':>23} {peak}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--chunk", type=int, default=1, help="experts whose moments exist at one time")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, repeatable")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    usual = ["fp32" if widening.required else "bf16"]
    parser.add_argument("--products", nargs="+", choices=["bf16", "fp32"], default=usual,
                        help="how a CPU multiplies BF16 (core/widening); both: one layer each")  # fmt: skip
    parser.add_argument("--rates", type=Path, help="the JSON of gemm_rate.py, so that rates are not measured here")
    parser.add_argument("--profile", type=Path, help="write torch's profile there, as a table of the longest kernels")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rates = json.loads(options.rates.read_text()) if options.rates else measure_rates(options.device, options.threads)
    recipe, ways = load_recipe(options.recipe, options.set), {}
    for products in options.products:
        widening.required = products == "fp32"
        with profiled(options.profile, options.device) if options.profile else nullcontext():
            figures = measure(options, recipe, torch.device(options.device))
        ways[products] = with_rates(figures, rates, products)
        show(ways[products])
    if options.json:
        options.json.write_text(json.dumps(report(options, ways), indent=1) + "\n")


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """Options that decide the figures, as they are typed."""
    found = {name: value for name, value in vars(options).items() if name not in ("set", *PATHS)}
    found["products"] = " ".join(options.products)
    return found | ({"set": " --set ".join(options.set)} if options.set else {})


def report(options: argparse.Namespace, ways: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the only way, or of each by its name; how they were measured."""
    emulated = " ".join(f"{name}={os.environ[name]}" for name in SLOWER if name in os.environ)
    words = " ".join(f"--{name} {value}" for name, value in flags(options).items())
    both = {"options": flags(options), "seconds": sum(way["seconds"] for way in ways.values()), "products": ways}
    return (both if len(ways) > 1 else next(iter(ways.values()))) | {
        "command": f"{emulated} python benchmarks/full_layer.py {words}".lstrip(),
        "machine": machine(options.device, options.threads) + (f", emulated by {emulated}" if emulated else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
