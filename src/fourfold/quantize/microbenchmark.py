"""How fast this machine is: one GEMM and the solve of one projection, on random numbers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from fourfold.core import gptq, grid
from fourfold.quantize.cost import site_flop
from fourfold.quantize.rates import RATES, Rates

INPUTS, OUTPUTS, SAMPLES, PASSES = 2048, 1024, 4096, 2
STACK = {"cpu": 1, "cuda": 16}  # experts at a time
GRID = grid.Grid(levels=grid.INT4, group_size=128, scale_dtype="bf16")
DAMPING = gptq.Damping(delta=0.01, kind="mean", floor=0.0, retries=())


def measure_rates(name: str) -> Rates:
    """Measure BF16 GEMMs and the solve on a device, in some seconds; the other rates stay those of its kind.

    A CPU core by the time of one thread, so that other load does not count; a GPU by the clock. Reads no file.
    """
    device, threads = torch.device(name), torch.get_num_threads()
    constants, count = RATES[device.type], STACK[device.type]
    input_TK, weight_ENK = (torch.randn(*shape, INPUTS, device=device) for shape in ((SAMPLES,), (count, OUTPUTS)))
    hessian_EKK = (input_TK.T @ input_TK / SAMPLES).repeat(count, 1, 1)
    left_TK, right_KN = input_TK.bfloat16(), weight_ENK[0].bfloat16().T

    def solve() -> None:
        factor = gptq.factorize_(hessian_EKK.clone(), DAMPING, "natural", GRID.group_size)
        scale_ENG = grid.absmax_scales(weight_ENK, GRID)
        codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, GRID)
        gptq.refine(weight_ENK, codes_ENK, scale_ENG, hessian_EKK, PASSES, None, GRID)

    torch.set_num_threads(1)
    try:
        bf16 = 2.0 * SAMPLES * INPUTS * OUTPUTS / _seconds(lambda: left_TK @ right_KN, device)
        solved = count * site_flop(INPUTS, OUTPUTS, PASSES) / _seconds(solve, device)
    finally:
        torch.set_num_threads(threads)
    unit = "core" if device.type == "cpu" else torch.cuda.get_device_name(device)
    found = f"as measured here, idle: {bf16 / 1e9:,.0f} GFLOP/s BF16, {solved / 1e9:,.0f} in the solve each"
    assumed = f"{constants.traffic / 1e9:,.1f} GB/s of temporaries, disk at {constants.disk / 1e9:.0f} GB/s"
    return replace(constants, bf16=bf16, solve=solved, unit=unit, basis=f"{found}; assumed: {assumed}")


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of many calls, after one that compiles kernels: other load slows most of them."""
    clock, found = time.perf_counter if device.type == "cuda" else time.thread_time, [0.0]
    while len(found) < 4 or sum(found[1:]) < 0.5:
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - start)
    return min(found[2:])
