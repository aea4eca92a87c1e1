"""Native code for rows that see each other through a metric: the solve and its refinement, row after row, on a CPU.

A row is a vector of columns here. Without a metric, or with one that has nothing off its diagonal, every sum is formed
in the order in which cpu.py's kernels form it: the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fourfold.core.kernels.cpu import LEAST, MOST, ROUNDER, Floats, move_scales, over_rows, refit_rule

if TYPE_CHECKING:
    from fourfold.core.gptq import Block, Refit, State, Tile

VECTOR = 16  # columns that are fed in one instruction
ABREAST = 4  # rows that are solved side by side, each VECTOR columns behind the one before it


def solve_tile_(
    start: int, carried_EBR: Tensor, given: Tile, feedback_EBB: Tensor, unit_ENN: Tensor, results: Tile
) -> None:
    """See gptq.solve_tile_torch_."""
    arrays = [tuple(tensor.numpy() for tensor in tensors) for tensors in (given, results)]
    matrices = [tensor.numpy() for tensor in (carried_EBR, feedback_EBB, unit_ENN)]
    over_rows(_solve_tile, len(carried_EBR), [start, *matrices, *arrays], together=1)


def refine_tile_(
    group: int, start: int, carried_EBR: Tensor, block: Block, relative_ENN: Tensor, state: State, refit: Refit | None
) -> None:
    """See gptq.refine_tile_torch_."""
    gradient_EBN, product_EBN, hessian_EBB = block
    diagonal_EB = hessian_EBB.diagonal(dim1=-2, dim2=-1).contiguous()
    own = gradient_EBN, product_EBN, hessian_EBB, hessian_EBB / diagonal_EB[:, None], diagonal_EB
    arrays = [tuple(tensor.numpy() for tensor in tensors) for tensors in (own, state)]
    sight = carried_EBR.numpy(), relative_ENN.numpy()
    over_rows(_refine_tile, len(carried_EBR), [group, start, refit_rule(refit), sight, *arrays], together=1)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _solve_tile(
    first: int, last: int, start: int, carried: Floats, feedback: Floats, unit: Floats,
    given: tuple[Floats, Floats, Floats], results: tuple[NDArray[np.int8], Floats, Floats],
) -> None:  # fmt: skip
    """Experts first to last, the tile of rows from start on."""
    target, weight, scale = given
    codes, fed, error = results
    columns, count = carried.shape[1], carried.shape[2]
    width = -(-columns // VECTOR) * VECTOR
    # What is past the last row or column has weights of 0 and scales of 1: nothing is missed there.
    height = -(-count // ABREAST) * ABREAST
    ahead, missed = np.zeros((height, width), np.float32), np.zeros((height, width), np.float32)
    known, step = np.zeros((height, width), np.float32), np.ones((height, width), np.float32)
    code, later = np.zeros((height, width), np.float32), np.zeros((width, width), np.float32)
    coupling = np.zeros((height, height), np.float32)
    for expert in range(first, last):
        for column in range(columns):
            for row in range(count):
                left, own = carried[expert, column, row], weight[expert, column, start + row]
                ahead[row, column] = target[expert, column, start + row] + left
                missed[row, column] = own + left
                known[row, column] = own
                step[row, column] = scale[expert, column, start + row]
            for place in range(column + 1, columns):
                later[column, place] = feedback[expert, column, place]
        for row in range(count):
            for place in range(row + 1, count):
                coupling[row, place] = unit[expert % len(unit), start + row, start + place]
        for row in range(0, height, ABREAST):
            _carry(row, coupling, known, ahead, missed)
            _solve_abreast(row, coupling, later, step, (ahead, missed, known, code))
        for column in range(columns):
            for row in range(count):
                codes[expert, column, start + row] = np.int8(code[row, column])
                fed[expert, column, start + row] = missed[row, column]
                error[expert, column, start + row] = known[row, column]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _carry(row: int, coupling: Floats, error: Floats, ahead: Floats, missed: Floats) -> None:
    """Add to ABREAST rows what all rows before them left over."""
    width = error.shape[1]
    left = np.empty(width, np.float32)
    for here in range(row, row + ABREAST):
        left[:] = 0
        for first in range(0, row, ABREAST):  # written out: see cpu._solve_columns
            f0, f1 = coupling[first, here], coupling[first + 1, here]
            f2, f3 = coupling[first + 2, here], coupling[first + 3, here]
            e0, e1, e2, e3 = error[first], error[first + 1], error[first + 2], error[first + 3]
            for column in range(width):
                left[column] = left[column] + e0[column] * f0 + e1[column] * f1 + e2[column] * f2 + e3[column] * f3
        for column in range(width):
            ahead[here, column] += left[column]
            missed[here, column] += left[column]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _solve_abreast(
    row: int, coupling: Floats, later: Floats, step: Floats, state: tuple[Floats, Floats, Floats, Floats]
) -> None:
    """ABREAST rows along an antidiagonal: a row waits for a division at each column, another works meanwhile.

    A row's columns see the same columns of the rows above it, which are a vector ahead, and its own earlier columns.
    """
    ahead, missed, known, code = state
    vectors = ahead.shape[1] // VECTOR
    for diagonal in range(vectors + ABREAST - 1):
        topmost, lowest = max(0, diagonal - vectors + 1), min(diagonal, ABREAST - 1)
        for place in range(VECTOR):
            for lane in range(topmost, lowest + 1):
                here, start = row + lane, (diagonal - lane) * VECTOR
                column = start + place
                left = np.float32(0)
                for above in range(row, here):
                    left += coupling[above, here] * known[above, column]
                size = step[here, column]
                wanted = min(max((ahead[here, column] + left) / size, LEAST), MOST)
                rounded = (wanted + ROUNDER) - ROUNDER
                code[here, column] = rounded
                short = (missed[here, column] + left) - rounded * size
                missed[here, column] = short
                known[here, column] -= rounded * size
                part, factor = ahead[here, start : start + VECTOR], later[column, start : start + VECTOR]
                for k in range(VECTOR):
                    part[k] += short * factor[k]
        for lane in range(topmost, lowest + 1):
            _feed((diagonal - lane) * VECTOR, missed[row + lane], later, ahead[row + lane])


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _feed(start: int, missed: Floats, later: Floats, ahead: Floats) -> None:
    """Add what a vector of columns missed to all columns behind it."""
    for half in range(start, start + VECTOR, VECTOR // 2):
        m0, m1, m2, m3 = missed[half], missed[half + 1], missed[half + 2], missed[half + 3]
        m4, m5, m6, m7 = missed[half + 4], missed[half + 5], missed[half + 6], missed[half + 7]
        f = later[half : half + VECTOR // 2]
        for k in range(start + VECTOR, len(ahead)):
            ahead[k] = (
                ahead[k] + m0 * f[0, k] + m1 * f[1, k] + m2 * f[2, k] + m3 * f[3, k]
                + m4 * f[4, k] + m5 * f[5, k] + m6 * f[6, k] + m7 * f[7, k]
            )  # fmt: skip


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _refine_tile(
    first: int, last: int, group: int, start: int, rule: tuple[bool, bool, np.int32], sight: tuple[Floats, Floats],
    block: tuple[Floats, Floats, Floats, Floats, Floats], state: tuple[Floats, Floats, Floats, Floats],
) -> None:  # fmt: skip
    """Experts first to last, the tile of rows from start on, each with the changes of the rows before it."""
    carried, relative = sight
    gradient, product, hessian, feedback, diagonal = block
    target, error, codes, scales = state
    columns, count = carried.shape[1], carried.shape[2]
    origin = group * columns
    change, slope_B = np.zeros((count, columns), np.float32), np.empty(columns, np.float32)
    ahead, missed, kept = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    code, curved = np.empty(columns, np.float32), np.empty(columns, np.float32)
    slope, curvature, moved = np.empty(1, np.float32), np.empty(1, np.float32), np.empty(1, np.float32)
    for expert in range(first, last):
        change[:] = 0
        for row in range(count):
            at = start + row
            slope[0], curvature[0], moved[0] = 0, 0, 0
            for column in range(columns):
                slope_B[column] = carried[expert, column, row]
            for before in range(row):
                factor, moves = relative[expert % len(relative), start + before, at], change[before]
                for column in range(columns):
                    slope_B[column] += factor * moves[column]
            for column in range(columns):
                code[column] = codes[expert, origin + column, at]
                curved[column] = product[expert, column, at]
                slope[0] += slope_B[column] * code[column]
                curvature[0] += curved[column] * code[column]
            if rule[0]:
                move_scales(scales[expert, group, at : at + 1], slope, curvature, moved, rule[1], rule[2])
            size, shift, change_B = scales[expert, group, at], moved[0], change[row]
            for column in range(columns):
                was = error[expert, origin + column, at] - code[column] * shift
                missed[column] = target[expert, origin + column, at] - was
                ahead[column] = missed[column] + (slope_B[column] - curved[column] * shift) / diagonal[expert, column]
                change_B[column] = -curved[column] * shift
                kept[column] = missed[column] - code[column] * size
            _descend(size, feedback[expert], hessian[expert], kept, (ahead, missed, code, change_B))
            for column in range(columns):
                codes[expert, origin + column, at] = code[column]
                error[expert, origin + column, at] = target[expert, origin + column, at] - code[column] * size
                gradient[expert, column, at] += change_B[column]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _descend(
    size: np.float32, feedback: Floats, hessian: Floats, kept: Floats, state: tuple[Floats, Floats, Floats, Floats]
) -> None:
    """One row's codes, from left to right. change: H times what its errors changed by, added up.

    kept: what is missed where the code stays. It is known beforehand, so as long as codes stay, which most do, no
    column waits for the division of the one before.
    """
    ahead, missed, code, change = state
    columns = len(ahead)
    for column in range(columns):
        wanted = min(max(ahead[column] / size, LEAST), MOST)
        rounded = (wanted + ROUNDER) - ROUNDER
        short = kept[column]
        if rounded != code[column]:
            short = missed[column] - rounded * size
            code[column] = rounded
            for k in range(columns):
                change[k] += short * hessian[column, k]
        factor = feedback[column]
        for k in range(column + 1, columns):
            ahead[k] += short * factor[k]
