"""Native code for rows that see each other through a metric: the solve and its refinement, row after row, on a CPU.

Without a metric, or with one that has nothing off its diagonal, every sum is formed in the order in which cpu.py's
kernels form it: the same bits. Tiles of LANES rows are solved in one go, with a GEMM over all other rows before each.
Sums of products are written in LLVM's vectors: where a row and a factor both move, loops were compiled to single steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fourfold.core.kernels.cpu import (
    ROUNDER,
    TOGETHER,
    Floats,
    Levels,
    Rule,
    ends,
    move_scales,
    over_rows,
    refit_rule,
)
from fourfold.core.kernels.native import native

if TYPE_CHECKING:
    from fourfold.core.gptq import Block, Refit, State
    from fourfold.core.grid import Grid

LANES = 32  # rows of a tile in the solve, columns of a row in refinement
TILE = 64  # rows of a tile in refinement
FLOAT_BYTES = 4


def inblock_by_rows(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, unit_ENN: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """See gptq.inblock_by_rows. Columns lie one after the other in memory: of the results, and best of the inputs."""
    given = [each.mT.contiguous() for each in (target_ENB, weight_ENB, scale_ENB)]
    codes_EBN, fed_EBN = torch.empty_like(given[0], dtype=torch.int8), torch.empty_like(given[0])
    error_EBN, unit_ENN = torch.empty_like(given[0]), unit_ENN.contiguous()
    experts, columns, rows = given[0].shape
    diagonals = np.zeros((experts, columns, columns + 3 * LANES), np.float32)
    over_rows(_by_diagonals, experts, [feedback_EBB.contiguous().numpy(), diagonals], together=1)
    arrays = [tuple(tensor.numpy() for tensor in each) for each in (given, (codes_EBN, fed_EBN, error_EBN))]
    wide_ENN = unit_ENN.expand(experts, -1, -1)
    for start in range(0, rows, LANES):
        carried_EBR = torch.bmm(error_EBN[..., :start], wide_ENN[:, :start, start : start + LANES])
        matrices = carried_EBR.numpy(), diagonals, unit_ENN.numpy()
        over_rows(_solve_tile, experts, [start, ends(grid), matrices, *arrays], together=1)
    return codes_EBN.mT, fed_EBN.mT


def refine_by_rows_(
    group: int, block: Block, relative_ENN: Tensor, state: State, refit: Refit | None, grid: Grid
) -> None:
    """See gptq.refine_by_rows_. Columns of relative_ENN lie best one after the other in memory: products are faster."""
    gradient_EBN, product_EBN, hessian_EBB = block
    experts, columns, rows = gradient_EBN.shape
    diagonal_EB = hessian_EBB.diagonal(dim1=-2, dim2=-1)
    width = -(-columns // LANES) * LANES
    wide = [torch.zeros(experts, columns, width), torch.zeros(experts, columns, width), torch.ones(experts, width)]
    for padded, values in zip(wide, (hessian_EBB, hessian_EBB / diagonal_EB[:, None], diagonal_EB), strict=True):
        padded[..., :columns] = values
    spread_ENN = relative_ENN.expand(experts, -1, -1)
    arrays = [tuple(tensor.numpy() for tensor in each) for each in ([gradient_EBN, product_EBN, *wide], state)]
    for start in range(0, rows, TILE):
        tile = slice(start, start + TILE)
        carried_EBR = torch.bmm(gradient_EBN, spread_ENN[..., tile])
        sight = carried_EBR.numpy(), relative_ENN[:, tile, tile].contiguous().numpy()
        given = [(group, start), refit_rule(refit, grid), ends(grid), sight, *arrays]
        over_rows(_refine_tile, experts, given, together=1)


@native()
def _by_diagonals(first: int, last: int, feedback: Floats, diagonals: Floats) -> None:
    """diagonals[d, origin - j] = feedback[j, j + d], d > 0, zeros around: see _solve_tile."""
    columns = feedback.shape[1]
    origin = diagonals.shape[2] - LANES - 1
    for expert in range(first, last):
        for column in range(columns):
            for later in range(column + 1, columns):
                diagonals[expert, later - column, origin - column] = feedback[expert, column, later]


@native()
def _solve_tile(
    first: int, last: int, start: int, levels: Levels, matrices: tuple[Floats, Floats, Floats],
    given: tuple[Floats, Floats, Floats], results: tuple[NDArray[np.int8], Floats, Floats],
) -> None:  # fmt: skip
    """Experts first to last, the tile of rows from start on, one antidiagonal after the other.

    Row r is r columns behind row 0, so at step t it is at column t - r. Everything is kept by step, a row to a lane:
    what a step feeds its own rows' later columns are then diagonals of the feedback, backwards, and what it feeds later
    rows is its own errors moved over so many lanes. Past the last row or column weights are 0 and scales 1.
    """
    carried, diagonals, unit = matrices
    target, weight, scale = given
    codes, fed, error = results
    columns, count = carried.shape[1], carried.shape[2]
    steps = columns + LANES - 1
    ahead, left = np.empty((steps, LANES), np.float32), np.empty((steps, LANES), np.float32)
    size, own = np.empty((steps, LANES), np.float32), np.empty((steps, 2 * LANES), np.float32)
    coupling = np.zeros((LANES, LANES), np.float32)
    for expert in range(first, last):
        ahead[:], left[:], size[:], own[:] = 0, 0, 1, 0
        for column in range(columns):
            for row in range(count):
                ahead[column + row, row] = target[expert, column, start + row]
                left[column + row, row] = carried[expert, column, row]
                size[column + row, row] = scale[expert, column, start + row]
                own[column + row, LANES + row] = weight[expert, column, start + row]
        for row in range(count):
            for above in range(row):
                coupling[row - above, row] = unit[expert % len(unit), start + above, start + row]
        _solve_steps(ahead, left, size, own, coupling, diagonals[expert], levels)
        for column in range(columns):
            for row in range(count):
                codes[expert, column, start + row] = np.int8(ahead[column + row, row])
                fed[expert, column, start + row] = left[column + row, row]
                error[expert, column, start + row] = own[column + row, LANES + row]


@native()
def _solve_steps(
    ahead: Floats, left: Floats, size: Floats, own: Floats, coupling: Floats, diagonals: Floats, levels: Levels
) -> None:
    """By step and row: ahead, targets and then codes; left, of other rows' errors and then what is fed; own, errors."""
    width = diagonals.shape[1]
    least, most = levels
    origin, backwards = width - LANES - 1, -(width + 1) * FLOAT_BYTES
    for step in range(len(ahead)):
        past, above = min(step, len(diagonals) - 1), min(step, LANES - 1)
        _add_products(
            ahead[step].ctypes.data, past, left[step - past].ctypes.data, LANES * FLOAT_BYTES,
            diagonals[past, origin - step + past :].ctypes.data, backwards,
        )  # fmt: skip
        _add_products(
            left[step].ctypes.data, above, own[step - above, LANES - above :].ctypes.data,
            (2 * LANES + 1) * FLOAT_BYTES, coupling[above].ctypes.data, -LANES * FLOAT_BYTES,
        )  # fmt: skip
        for row in range(LANES):
            wanted = min(max((ahead[step, row] + left[step, row]) / size[step, row], least), most)
            code = (wanted + ROUNDER) - ROUNDER
            ahead[step, row] = code
            left[step, row] = (own[step, LANES + row] + left[step, row]) - code * size[step, row]
            own[step, LANES + row] -= code * size[step, row]


@native()
def _refine_tile(
    first: int, last: int, place: tuple[int, int], rule: Rule, levels: Levels, sight: tuple[Floats, Floats],
    block: tuple[Floats, Floats, Floats, Floats, Floats], state: tuple[Floats, Floats, Floats, Floats],
) -> None:  # fmt: skip
    """Experts first to last, the tile of rows from start on, each with the changes of the rows before it."""
    group, start = place
    carried, relative = sight
    gradient, product, hessian, feedback, diagonal = block
    target, error, codes, scales = state
    columns, count, width = carried.shape[1], carried.shape[2], diagonal.shape[1]
    origin = group * columns
    # A row's columns side by side; past the last column everything is 0 and stays 0.
    slope, curved = np.zeros((TILE, width), np.float32), np.zeros((TILE, width), np.float32)
    code, missed = np.zeros((TILE, width), np.float32), np.zeros((TILE, width), np.float32)
    wanted, change = np.zeros((TILE, width), np.float32), np.zeros((TILE, width), np.float32)
    kept = np.empty(width, np.float32)
    gained, curvature, moved = np.empty(1, np.float32), np.empty(1, np.float32), np.empty(1, np.float32)
    for expert in range(first, last):
        for column in range(columns):
            for row in range(count):
                slope[row, column] = carried[expert, column, row]
                curved[row, column] = product[expert, column, start + row]
                code[row, column] = codes[expert, origin + column, start + row]
                missed[row, column] = error[expert, origin + column, start + row]
                wanted[row, column] = target[expert, origin + column, start + row]
        for row in range(count):
            at = start + row
            factors = relative[expert % len(relative), 0, row:]
            _spread(slope[row], 0, row, factors, relative.shape[2] * FLOAT_BYTES, change)
            along, curving = np.float32(0), np.float32(0)
            for column in range(columns):
                along += slope[row, column] * code[row, column]
                curving += curved[row, column] * code[row, column]
            gained[0], curvature[0], moved[0] = along, curving, 0
            if rule[0]:
                move_scales(scales[expert, group, at : at + 1], gained, curvature, moved, rule[1], rule[2])
            size, shift = scales[expert, group, at], moved[0]
            for column in range(width):
                missed[row, column] = wanted[row, column] - (missed[row, column] - code[row, column] * shift)
                change[row, column] = -curved[row, column] * shift
                slope[row, column] = (
                    missed[row, column]
                    + (slope[row, column] - curved[row, column] * shift) / diagonal[expert, column]
                )  # fmt: skip
                kept[column] = missed[row, column] - code[row, column] * size
            own = slope[row], code[row], change[row], kept
            _descend(size, levels, feedback[expert], hessian[expert], missed[row], own)
            for column in range(width):
                missed[row, column] = wanted[row, column] - code[row, column] * size
        for column in range(columns):
            for row in range(count):
                codes[expert, origin + column, start + row] = code[row, column]
                error[expert, origin + column, start + row] = missed[row, column]
                gradient[expert, column, start + row] += change[row, column]


@native()
def _descend(
    size: np.float32, levels: Levels, feedback: Floats, hessian: Floats, missed: Floats,
    row: tuple[Floats, Floats, Floats, Floats],
) -> None:  # fmt: skip
    """One row's codes, from left to right: targets are changed, and H times what errors change by is added to change.

    kept: what is missed where the code stays. It is known beforehand, so as long as codes stay, which most do, no
    column waits for the division of the one before.
    """
    ahead, code, change, kept = row
    least, most = levels
    for start in range(0, len(feedback), TOGETHER):
        end = min(start + TOGETHER, len(feedback))
        for column in range(start, end):
            wanted = min(max(ahead[column] / size, least), most)
            rounded = (wanted + ROUNDER) - ROUNDER
            if rounded != code[column]:
                kept[column] = missed[column] - rounded * size
                code[column] = rounded
                _spread(change, 0, 1, kept[column:], FLOAT_BYTES, hessian[column:])
            for later in range(column + 1, end):
                ahead[later] += kept[column] * feedback[column, later]
        # From the vector on that the next column is in: what is behind it is not read again.
        _spread(ahead, end // LANES * LANES, end - start, kept[start:], FLOAT_BYTES, feedback[start:])


@native()
def _spread(sums: Floats, first: int, count: int, factors: Floats, pitch_bytes: int, values: Floats) -> None:
    """Add count rows of values, as long as sums and one after the other, each times its factor, from a vector on."""
    for begin in range(first, len(sums), LANES):
        _add_multiples(
            sums[begin:].ctypes.data, count, factors.ctypes.data, pitch_bytes,
            values[0, begin:].ctypes.data, len(sums) * FLOAT_BYTES,
        )  # fmt: skip


def _products(typing: Any, sums: Any, count: Any, left: Any, left_pitch: Any, right: Any, right_pitch: Any) -> Any:
    """LANES sums += sum over count of left times right, in order; addresses, and the pitches from each to the next."""
    return types.void(types.uintp, types.intp, types.uintp, types.intp, types.uintp, types.intp), _emit_products


def _multiples(typing: Any, sums: Any, count: Any, left: Any, left_pitch: Any, right: Any, right_pitch: Any) -> Any:
    """The same, with one number for all lanes on the left."""
    return types.void(types.uintp, types.intp, types.uintp, types.intp, types.uintp, types.intp), _emit_multiples


def _emit_products(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _emit(context, builder, arguments, spread=False)


def _emit_multiples(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return _emit(context, builder, arguments, spread=True)


def _emit(context: Any, builder: Any, arguments: Any, *, spread: bool) -> Any:
    sums, count, left, left_pitch, right, right_pitch = arguments
    single, lanes = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)

    def at(address: Any, kind: Any) -> Any:
        return builder.inttoptr(address, kind.as_pointer())

    total = cgutils.alloca_once(builder, lanes)  # type: ignore[no-untyped-call]
    builder.store(builder.load(at(sums, lanes), align=4), total)
    with cgutils.for_range(builder, count) as loop:
        factor_at = builder.add(left, builder.mul(loop.index, left_pitch))
        value = builder.load(at(builder.add(right, builder.mul(loop.index, right_pitch)), lanes), align=4)
        if spread:
            alone = builder.insert_element(
                ir.Constant(lanes, ir.Undefined), builder.load(at(factor_at, single), align=4), ir.IntType(32)(0)
            )
            factor = builder.shuffle_vector(alone, alone, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))
        else:
            factor = builder.load(at(factor_at, lanes), align=4)
        builder.store(builder.fadd(builder.load(total), builder.fmul(factor, value)), total)
    builder.store(builder.load(total), at(sums, lanes), align=4)
    return context.get_dummy_value()


_add_products: Any = intrinsic(_products)
_add_multiples: Any = intrinsic(_multiples)
