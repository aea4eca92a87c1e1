"""What a metric of the rows costs and gains in the solve and its refinement, and what forms of less work would keep.

    python benchmarks/row_metric.py --json benchmarks/results/row_metric.json

One full-width expert at each of its sites, one thread, made-up inputs and gradients with power-law spectra. Two passes
of refinement. `side by side`: rows in interleaved blocks that see earlier blocks alone, by the kernels that know no
metric; in refinement with L_r = sum |H_ri| over a row's own block for its H_rr, without which they diverge.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gemm_rate import machine
from torch import Tensor

from fourfold.core import gptq, grid, guidance, moments
from fourfold.core.gptq import Damping, Factor, Refit
from fourfold.core.guidance import RowFactor
from fourfold.core.kernels import cpu

SITES = {"gate_up": (1024, 2048), "down": (2048, 512)}
GROUP, PASSES, REPETITIONS = 128, 2, 3
DAMPING = Damping(delta=0.05, kind="diagonal", floor=1e-4, retries=())
REFIT = Refit(signed=True)
INT4 = grid.Grid(levels=grid.INT4, group_size=GROUP, scale_dtype="bf16")
SEARCH = grid.ScaleSearch(low=0.45, high=1.15, steps=36, signed=True)


def second_moment(size: int, decay: float, seed: int) -> Tensor:
    """Of 4 size vectors whose k-th principal direction has the variance k^-decay, [1, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixing_KK = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    loudness_K = torch.arange(1, size + 1) ** (-decay / 2)
    sample_TK = (torch.randn(4 * size, size, generator=generator) * loudness_K) @ mixing_KK
    return (sample_TK.T @ sample_TK / len(sample_TK))[None]


def proxy(target_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, hessian_EKK: Tensor, rows: RowFactor) -> float:
    error_ENK = gptq.take(target_ENK - grid.dequantize(codes_ENK, scale_ENG), rows.order_EN)
    return float((rows.metric_ENN @ error_ENK @ hessian_EKK).double().mul_(error_ENK).sum())


def interleaved(rows: RowFactor, blocks: int) -> tuple[Tensor, Tensor]:
    """Places of the processing order, block after block, and H_O's block-wise unit factor in that order."""
    size = rows.metric_ENN.shape[-1]
    order_N = torch.arange(size).view(-1, blocks).T.flatten()
    left_NN = rows.metric_ENN[0][order_N][:, order_N].clone()
    unit_NN, step = torch.zeros_like(left_NN), size // blocks
    for start in reversed(range(0, size, step)):
        block = slice(start, start + step)
        unit_NN[:start, block] = torch.linalg.solve(left_NN[block, block], left_NN[:start, block], left=False)
        left_NN[:start, :start] -= unit_NN[:start, block] @ left_NN[block, :start]
    return order_N, unit_NN


def solve_side_by_side(
    target_ENK: Tensor, scale_ENG: Tensor, factor: Factor, rows: RowFactor, blocks: int
) -> Callable[[], Tensor]:
    place_N, unit_NN = interleaved(rows, blocks)
    natural_EN = rows.order_EN[:, place_N]
    step = len(place_N) // blocks

    def by_blocks(
        target: Tensor, weight: Tensor, feedback: Tensor, scale: Tensor, onto: grid.Grid
    ) -> tuple[Tensor, Tensor]:
        parts, error_EBN = [], torch.empty(weight.mT.shape)
        for start in range(0, len(place_N), step):
            block = slice(start, start + step)
            carried = (error_EBN[..., :start] @ unit_NN[:start, block]).mT
            moved = target[:, block] + carried, weight[:, block] + carried
            codes, fed = cpu.inblock(*moved, feedback, scale[:, block], onto)
            error_EBN[..., block] = (fed - carried).mT
            parts.append((codes, fed))
        codes_ENB, fed_ENB = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return codes_ENB, fed_ENB

    def run() -> Tensor:
        plain, gptq.inblock = gptq.inblock, by_blocks
        codes_ENK = gptq.solve_codes(gptq.take(target_ENK, natural_EN), gptq.take(scale_ENG, natural_EN), factor, INT4)
        gptq.inblock = plain
        return gptq.take(codes_ENK, natural_EN.argsort(dim=1))

    return run


def refine_side_by_side(
    target_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, hessian_EKK: Tensor, rows: RowFactor, blocks: int
) -> tuple[Tensor, Tensor]:
    natural_EN = rows.order_EN
    target_EKN, code_EKN, scale_EGN = (
        gptq.take(each, natural_EN).mT.contiguous().float() for each in (target_ENK, codes_ENK, scale_ENG)
    )
    error_EKN = target_EKN - code_EKN * scale_EGN.repeat_interleave(GROUP, dim=1)
    for _ in range(PASSES):
        for group in range(scale_EGN.shape[1]):
            columns = slice(group * GROUP, (group + 1) * GROUP)
            hessian_EBB = hessian_EKK[:, columns, columns]
            gradient_EBN = hessian_EKK[:, columns] @ error_EKN
            for first in range(blocks):
                part = slice(first, None, blocks)
                bound_ER1 = rows.metric_ENN[:, part, part].abs().sum(dim=2, keepdim=True)
                own = gradient_EBN @ (rows.metric_ENN[:, part] / bound_ER1).mT
                state = tuple(each[..., part].contiguous() for each in (target_EKN, error_EKN, code_EKN, scale_EGN))
                before = state[1][:, columns].clone()
                cpu.refine_group_(group, own, hessian_EBB @ state[2][:, columns], hessian_EBB, state, REFIT, INT4)
                gradient_EBN[..., part] += hessian_EBB @ (state[1][:, columns] - before)
                for whole, own_part in zip((error_EKN, code_EKN, scale_EGN), state[1:], strict=True):
                    whole[..., part] = own_part
    place_EN = natural_EN.argsort(dim=1)
    return gptq.take(code_EKN.to(torch.int8).mT, place_EN), gptq.take(scale_EGN.mT, place_EN)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    seconds, found = [], None
    for _ in range(REPETITIONS):
        start = time.process_time()
        found = run()
        seconds.append(time.process_time() - start)
    return min(seconds), found


def measure(site: str) -> dict[str, Any]:
    outputs, inputs = SITES[site]
    generator = torch.Generator().manual_seed(0)
    target_ENK = 0.02 * torch.randn(1, outputs, inputs, generator=generator)
    hessian_EKK = second_moment(inputs, 1.0, seed=1)
    factor = gptq.factorize_(hessian_EKK, DAMPING, "activation", GROUP)
    metric_ENN = second_moment(outputs, 0.75, seed=2)
    factor_seconds, rows = timed(lambda: guidance.factorize_rows(metric_ENN, 0.05))
    scale_ENG = grid.search_scales(target_ENK, factor.natural_pivot(), INT4, SEARCH)

    def judged(codes_ENK: Tensor, refined_ENG: Tensor) -> float:
        return proxy(target_ENK, codes_ENK, refined_ENG, hessian_EKK, rows)

    solves: dict[str, Callable[[], Tensor]] = {
        "no metric": lambda: gptq.solve_codes(target_ENK, scale_ENG, factor, INT4),
        "row by row": lambda: gptq.solve_codes(target_ENK, scale_ENG, factor, INT4, rows),
        "16 blocks side by side": solve_side_by_side(target_ENK, scale_ENG, factor, rows, 16),
    }
    found: dict[str, Any] = {"predicted_share": float(rows.pivot_EN.sum() / moments.trace(rows.metric_ENN).sum()),
                             "row_factor_seconds": factor_seconds, "solve": {}, "refine": {}}  # fmt: skip
    codes, base = {}, 0.0
    for name, run in solves.items():
        seconds, codes[name] = timed(run)
        base = base or judged(codes[name], scale_ENG)
        found["solve"][name] = {"cpu_seconds": seconds, "loss": judged(codes[name], scale_ENG) / base}
    start_ENK = codes["row by row"]
    given = target_ENK, start_ENK, scale_ENG, hessian_EKK
    refinements: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "no metric": lambda: gptq.refine(target_ENK, codes["no metric"], scale_ENG, hessian_EKK, PASSES, REFIT, INT4),
        "row by row": lambda: gptq.refine(*given, PASSES, REFIT, INT4, rows),
    }
    for blocks in (outputs // 4, outputs // 16, outputs // 64):
        name = f"{outputs // blocks} rows side by side"
        refinements[name] = lambda blocks=blocks: refine_side_by_side(*given, rows, blocks)  # type: ignore[misc]
    for name, refinement in refinements.items():
        seconds, refined = timed(refinement)
        before_ENK = codes["no metric"] if name == "no metric" else start_ENK
        found["refine"][name] = {"cpu_seconds": seconds, "loss": judged(*refined) / base,
                                 "codes_changed": (refined[0] != before_ENK).float().mean().item()}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sites = {site: measure(site) for site in SITES}
    for site, figures in sites.items():
        print(f"{site}: {figures['predicted_share']:.2f} predicted, factor {figures['row_factor_seconds']:.3f} s")
        for stage in ("solve", "refine"):
            for name, values in figures[stage].items():
                print(f"  {stage:>6} {name:>24} {values['cpu_seconds']:7.3f} s, loss {values['loss']:.4f}")
    if options.json:
        figures = {"machine": machine("cpu", 1), "date": time.strftime("%Y-%m-%d"), "sites": sites}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
