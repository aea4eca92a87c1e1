"""Native code for the loops that torch's own operations are slow at on a CPU. Compiled by numba on first use.

Numba brings LLVM with it: no compiler is needed. Compiled code is kept for the next process (native.py).
The solve's kernels work on LANES rows at a time, columns first, so that one instruction does a column of many rows; a
row's sums are in the order of its columns, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fourfold.core.kernels.native import native

if TYPE_CHECKING:
    from fourfold.core.gptq import Refit, State
    from fourfold.core.grid import Grid

LANES = 64  # rows at a time
TOGETHER = 8  # columns whose errors are fed to the later ones in one go
ROUNDER = np.float32(1.5 * 2**23)  # x + ROUNDER - ROUNDER is rint(x), half to even, where |x| < 2^22
ONE, SIXTEEN = np.int32(1), np.int32(16)
SMALLEST, LARGEST = np.float32(2.0**-17), np.float32(65280.0)  # of a stored scale: see grid.py
LEAST_NORMAL = np.float32(2.0**-14)  # of FP16
SUBNORMAL_ROUNDER = np.float32(0.75)  # x + 0.75 - 0.75 is x to the nearest multiple of 2^-24, FP16's step below that

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Levels = tuple[np.float32, np.float32]  # the least code and the greatest
Rule = tuple[bool, bool, np.int32]  # see refit_rule


def inblock(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """See gptq.inblock. Columns lie one after the other in memory: of the results, and best of the inputs."""
    given = [values.mT.contiguous() for values in (target_ENB, weight_ENB, scale_ENB)]
    codes_EBN, error_EBN = torch.empty_like(given[0], dtype=torch.int8), torch.empty_like(given[0])
    arrays = [tensor.numpy() for tensor in (feedback_EBB.contiguous(), codes_EBN, error_EBN)]
    rows = target_ENB.shape[0] * target_ENB.shape[1]
    over_rows(_inblock, rows, [ends(grid), tuple(tensor.numpy() for tensor in given), *arrays])
    return codes_EBN.mT, error_EBN.mT


def refine_group_(
    group: int, gradient_EBN: Tensor, product_EBN: Tensor, hessian_EBB: Tensor, state: State, refit: Refit | None,
    grid: Grid,
) -> None:  # fmt: skip
    """See gptq.refine_group_torch_. Neither gradient nor product is changed."""
    diagonal_EB = hessian_EBB.diagonal(dim1=-2, dim2=-1).contiguous()
    own = gradient_EBN, product_EBN, hessian_EBB / diagonal_EB[:, None], diagonal_EB
    rows = gradient_EBN.shape[0] * gradient_EBN.shape[2]
    arrays = [tuple(tensor.numpy() for tensor in tensors) for tensors in (own, state)]
    over_rows(_refine_group, rows, [group, refit_rule(refit, grid), ends(grid), *arrays])


def ends(grid: Grid) -> Levels:
    """A grid's levels for a kernel."""
    return np.float32(grid.least), np.float32(grid.most)


def refit_rule(refit: Refit | None, grid: Grid) -> Rule:
    """Whether scales move, whether to negative ones, bits of an fp32 mantissa that the stored dtype lacks."""
    return refit is not None, refit is None or refit.signed, np.int32(13 if grid.scale_dtype == "fp16" else 16)


def permute(hessian_EKK: Tensor, order_EK: Tensor) -> Tensor:
    """Rows and columns of each expert in an order, and of the result the upper triangle alone: the rest is not set."""
    permuted_EKK = torch.empty_like(hessian_EKK)
    arrays = [tensor.numpy() for tensor in (hessian_EKK, order_EK.contiguous(), permuted_EKK)]
    over_rows(_permute, order_EK.numel(), arrays)
    return permuted_EKK


def choose_scales(weight_NK: Tensor, importance_K: Tensor, candidate_FNG: Tensor, grid: Grid) -> Tensor:
    """Per row and group the candidate with the least cost, ties to the first: see grid.search_scales. fp32 [N, G]."""
    scale_NG = torch.empty(candidate_FNG.shape[1:])
    tensors = weight_NK, importance_K, candidate_FNG, scale_NG
    over_rows(_choose, len(weight_NK), [*(tensor.numpy() for tensor in tensors), ends(grid)])
    return scale_NG


def over_rows(kernel: Callable[..., None], rows: int, arrays: list[Any], together: int = LANES) -> None:
    """Run a kernel over all rows, in as many parts as torch has threads; a part has a multiple of together rows."""
    step = -(-rows // (torch.get_num_threads() * together)) * together
    spans = list(pairwise([*range(0, rows, step), rows]))
    if len(spans) == 1:
        kernel(0, rows, *arrays)
        return
    # Threads of its own for each call: a pool that is kept would be dead in a forked child.
    with ThreadPoolExecutor(len(spans) - 1) as pool:
        others = [pool.submit(kernel, *span, *arrays) for span in spans[1:]]
        kernel(*spans[0], *arrays)
        for done in others:
            done.result()


@native()
def _load(lanes: Floats, values: Floats) -> None:
    """LANES rows' values of one column; fewer repeat the last of them."""
    if len(values) == LANES:  # of known length: a plain vector copy
        for lane in range(LANES):
            lanes[lane] = values[lane]
    else:
        for lane in range(LANES):
            lanes[lane] = values[min(lane, len(values) - 1)]


@native()
def _inblock(
    first: int, last: int, levels: Levels, given: tuple[Floats, Floats, Floats], feedback: Floats,
    codes: NDArray[np.int8], error: Floats,
) -> None:  # fmt: skip
    """Rows first to last, counted through all experts."""
    target, weight, scale = given
    columns, rows = target.shape[1], target.shape[2]
    ahead, code = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    missed, step = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    while first < last:
        expert, row = first // rows, first % rows
        count = min(LANES, last - first, rows - row)
        part = slice(row, row + count)
        for column in range(columns):
            _load(ahead[column], target[expert, column, part])
            _load(missed[column], weight[expert, column, part])
            _load(step[column], scale[expert, column, part])
        _solve_columns(ahead, missed, step, code, feedback[expert], levels)
        for column in range(columns):
            for lane in range(count):
                codes[expert, column, row + lane] = np.int8(code[column, lane])
                error[expert, column, row + lane] = missed[column, lane]
        first += count


@native()
def _refine_group(
    first: int, last: int, group: int, rule: Rule, levels: Levels,
    own: tuple[Floats, Floats, Floats, Floats], state: tuple[Floats, Floats, Floats, Floats],
) -> None:  # fmt: skip
    """Rows first to last, counted through all experts."""
    gradient, product, feedback, diagonal = own
    target, error, codes, scales = state
    columns, rows = gradient.shape[1], gradient.shape[2]
    start = group * columns
    ahead, code = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    missed, step = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    slope, curvature, moved = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    wanted, chosen = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    while first < last:
        expert, row = first // rows, first % rows
        count = min(LANES, last - first, rows - row)
        part = slice(row, row + count)
        slope[:], curvature[:], moved[:] = 0, 0, 0
        for column in range(columns):
            _load(code[column], codes[expert, start + column, part])
            _load(missed[column], error[expert, start + column, part])
            _load(ahead[column], gradient[expert, column, part])
            _load(step[column], product[expert, column, part])
            for lane in range(LANES):
                slope[lane] += ahead[column, lane] * code[column, lane]
                curvature[lane] += step[column, lane] * code[column, lane]
        if rule[0]:
            move_scales(scales[expert, group, part], slope, curvature, moved, rule[1], rule[2])
        _load(chosen, scales[expert, group, part])
        for column in range(columns):
            _load(wanted, target[expert, start + column, part])
            for lane in range(LANES):
                missed[column, lane] = wanted[lane] - (missed[column, lane] - code[column, lane] * moved[lane])
                ahead[column, lane] = (
                    missed[column, lane]
                    + (ahead[column, lane] - step[column, lane] * moved[lane]) / diagonal[expert, column]
                )  # fmt: skip
                step[column, lane] = chosen[lane]
        # Fed to later columns is by how much an error changed: what it was is in the gradient already.
        _solve_columns(ahead, missed, step, code, feedback[expert], levels)
        for column in range(columns):
            for lane in range(count):
                codes[expert, start + column, row + lane] = code[column, lane]
                error[expert, start + column, row + lane] = (
                    target[expert, start + column, row + lane] - code[column, lane] * step[column, lane]
                )
        first += count


@native()
def move_scales(
    scale: Floats, slope: Floats, curvature: Floats, moved: Floats, signed: bool, dropped: np.int32
) -> None:
    """gptq._refit of up to LANES rows: scale is changed, moved is by how much. dropped: bits, see round_bits."""
    stored = np.empty(1, np.float32)
    for lane in range(len(scale)):
        wanted = scale[lane]
        if curvature[lane] > 0:
            wanted += slope[lane] / curvature[lane]
        stored[0] = min(max(abs(wanted), SMALLEST), LARGEST)
        if dropped < SIXTEEN and stored[0] < LEAST_NORMAL:
            stored[0] = (stored[0] + SUBNORMAL_ROUNDER) - SUBNORMAL_ROUNDER
        else:
            round_bits(stored.view(np.int32), dropped)
        rounded = -stored[0] if wanted < 0 else stored[0]
        if signed or wanted > 0:
            moved[lane] = rounded - scale[lane]
            scale[lane] += moved[lane]


@native()
def _solve_columns(ahead: Floats, missed: Floats, step: Floats, code: Floats, feedback: Floats, levels: Levels) -> None:
    """LANES rows. ahead: their targets, changed; missed: their weights, then their errors; step: scales.

    missed may hold anything else that code times step is taken from: what is left of it is fed to later columns.
    """
    columns = len(ahead)
    least, most = levels
    for start in range(0, columns, TOGETHER):
        end = min(start + TOGETHER, columns)
        for column in range(start, end):
            for lane in range(LANES):
                wanted = min(max(ahead[column, lane] / step[column, lane], least), most)
                code[column, lane] = (wanted + ROUNDER) - ROUNDER
                missed[column, lane] -= code[column, lane] * step[column, lane]
            for later in range(column + 1, end):
                factor = feedback[column, later]
                for lane in range(LANES):
                    ahead[later, lane] += missed[column, lane] * factor
        # Written out, so that a later column is loaded and stored once for all of them: three times as fast.
        for later in range(end, columns):
            f = feedback[start:end, later]
            for lane in range(LANES):
                ahead[later, lane] = (
                    ahead[later, lane]
                    + missed[start, lane] * f[0] + missed[start + 1, lane] * f[1]
                    + missed[start + 2, lane] * f[2] + missed[start + 3, lane] * f[3]
                    + missed[start + 4, lane] * f[4] + missed[start + 5, lane] * f[5]
                    + missed[start + 6, lane] * f[6] + missed[start + 7, lane] * f[7]
                )  # fmt: skip


@native()
def _permute(first: int, last: int, hessian: Floats, order: NDArray[np.int64], permuted: Floats) -> None:
    inputs = order.shape[1]
    for place in range(first, last):
        expert, row = place // inputs, place % inputs
        source = hessian[expert, order[expert, row]]
        for column in range(row // LANES * LANES, inputs):
            permuted[expert, row, column] = source[order[expert, column]]


@native()
def _choose(
    first: int, last: int, weight: Floats, importance: Floats, candidate: Floats, scale: Floats, levels: Levels
) -> None:
    lowest, highest = levels
    tries, groups = candidate.shape[0], candidate.shape[2]
    size = weight.shape[1] // groups
    block = np.empty((size, LANES), np.float32)
    tried, inverse = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    cost, least, best = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for row in range(first, last, LANES):
        count = min(LANES, last - row)
        for group in range(groups):
            start = group * size
            for lane in range(LANES):
                source = row + min(lane, count - 1)
                for place in range(size):
                    block[place, lane] = weight[source, start + place]
            least[:] = np.inf
            for attempt in range(tries):
                for lane in range(LANES):
                    tried[lane] = candidate[attempt, row + min(lane, count - 1), group]
                    inverse[lane] = np.float32(1) / tried[lane]
                    cost[lane] = 0
                for place in range(size):
                    weighing = importance[start + place]
                    for lane in range(LANES):
                        code = (min(max(block[place, lane] * inverse[lane], lowest), highest) + ROUNDER) - ROUNDER
                        missed = code * tried[lane] - block[place, lane]
                        cost[lane] += missed * missed * weighing
                for lane in range(LANES):
                    if cost[lane] < least[lane]:
                        least[lane] = cost[lane]
                        best[lane] = tried[lane]
            for lane in range(count):
                scale[row + lane, group] = best[lane]


@native()
def round_bits(bits: NDArray[np.int32], dropped: np.int32) -> None:
    """fp32 values, as their bits, to the nearest without the last so many (16: BF16), half to even, in place."""
    half, upper = (ONE << (dropped - ONE)) - ONE, -(ONE << dropped)
    for column in range(len(bits)):
        bits[column] = (bits[column] + (half + ((bits[column] >> dropped) & ONE))) & upper
