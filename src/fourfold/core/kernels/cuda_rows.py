"""Triton kernels for rows that see each other through a metric: the solve and its refinement, row after row.

The contracts are those of gptq.py's functions of the same name. A program has a tile of one expert's rows. What is
serial in it is short: antidiagonals in the solve, in refinement the way from one code that changes to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourfold.core.kernels.cuda import FUSED, LARGEST, SMALLEST, SUB_BLOCK, code_of, ends, jit, stored, tl, triton

if TYPE_CHECKING:
    from fourfold.core.gptq import Block, Refit, State
    from fourfold.core.grid import Grid

ROWS = 64  # of a tile, with a GEMM over all other rows before each
SOLVE_WARPS, REFINE_WARPS = 8, 4  # with which no register is spilled


def inblock_by_rows(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, unit_ENN: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """gptq.inblock_by_rows. Sums are in another order, so a code differs where it is a tie but for rounding."""
    given = tuple(each.mT.contiguous() for each in (target_ENB, weight_ENB, scale_ENB))
    codes_EBN, fed_EBN = torch.empty_like(given[0], dtype=torch.int8), torch.empty_like(given[0])
    error_EBN, feedback_EBB, unit_ENN = torch.empty_like(given[0]), feedback_EBB.contiguous(), unit_ENN.contiguous()
    experts, columns, rows = given[0].shape
    wide_ENN, stride = unit_ENN.expand(experts, -1, -1), 0 if len(unit_ENN) == 1 else rows * rows
    for start in range(0, rows, ROWS):
        carried_EBR = torch.bmm(error_EBN[..., :start], wide_ENN[:, :start, start : start + ROWS])
        count = carried_EBR.shape[2]
        _solve_tile[(experts,)](
            *given, carried_EBR, feedback_EBB, unit_ENN, codes_EBN, fed_EBN, error_EBN, start, count, rows, columns,
            stride, **ends(grid), ROWS=_size(count), BLOCK=_size(columns), num_warps=SOLVE_WARPS, **FUSED,
        )  # fmt: skip
    return codes_EBN.mT, fed_EBN.mT


def refine_by_rows_(
    group: int, block: Block, relative_ENN: Tensor, state: State, refit: Refit | None, grid: Grid
) -> None:
    """gptq.refine_by_rows_, likewise."""
    gradient_EBN, product_EBN, hessian_EBB = block
    hessian_EBB, relative_ENN = hessian_EBB.contiguous(), relative_ENN.contiguous()
    experts, columns, rows = gradient_EBN.shape
    wide_ENN, stride = relative_ENN.expand(experts, -1, -1), 0 if len(relative_ENN) == 1 else rows * rows
    for start in range(0, rows, ROWS):
        carried_EBR = torch.bmm(gradient_EBN, wide_ENN[..., start : start + ROWS])
        count = carried_EBR.shape[2]
        _refine_tile[(experts,)](
            *state, carried_EBR, gradient_EBN, product_EBN, hessian_EBB, relative_ENN, start, count, group,
            state[3].shape[1], rows, columns, stride, REFIT=refit is not None, SIGNED=refit is None or refit.signed,
            FP16=grid.scale_dtype == "fp16", LEAST=SMALLEST, MOST=LARGEST,
            **ends(grid), ROWS=_size(count), BLOCK=_size(columns), num_warps=REFINE_WARPS, **FUSED,
        )  # fmt: skip


def _size(count: int) -> int:
    size: int = triton.next_power_of_2(count)
    return max(size, SUB_BLOCK)


@jit
def _solve_tile(
    target_ptr, weight_ptr, scale_ptr, carried_ptr, feedback_ptr, unit_ptr, codes_ptr, fed_ptr, error_ptr,
    start, count, rows, columns, unit_stride,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tile, an antidiagonal at a time: each row is a column behind the one above it."""
    expert = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    feedback_ptr += expert * columns * columns
    unit_ptr += expert * unit_stride + start * rows + start
    # What each element has been fed so far: by earlier columns of its row, and by earlier rows of its column.
    ahead = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    left = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for diagonal in range(0, columns + count - 1):
        at, above = diagonal - row, diagonal - column
        held = (row < count) & (at >= 0) & (at < columns)
        here = at[:, None] == column[None, :]
        place = (expert * columns + at) * rows + start + row
        carried = tl.load(carried_ptr + (expert * columns + at) * count + row, mask=held, other=0.0)
        carried += tl.sum(tl.where(here, left, 0.0), axis=1)
        weight = tl.load(weight_ptr + place, mask=held, other=0.0)
        scale = tl.load(scale_ptr + place, mask=held, other=1.0)
        target = tl.load(target_ptr + place, mask=held, other=0.0) + carried
        target += tl.sum(tl.where(here, ahead, 0.0), axis=1)
        code = code_of(tl.div_rn(target, scale), LOW, HIGH)
        error = weight - code * scale
        fed = (weight + carried) - code * scale
        tl.store(codes_ptr + place, code.to(tl.int8), mask=held)
        tl.store(fed_ptr + place, fed, mask=held)
        tl.store(error_ptr + place, error, mask=held)
        later = held[:, None] & (column[None, :] > at[:, None]) & (column < columns)[None, :]
        feedback = tl.load(feedback_ptr + at[:, None] * columns + column[None, :], mask=later, other=0.0)
        ahead += fed[:, None] * feedback
        below = (above >= 0)[None, :] & (above[None, :] < row[:, None]) & (row < count)[:, None]
        coupling = tl.load(unit_ptr + above[None, :] * rows + row[:, None], mask=below, other=0.0)
        left += tl.sum(tl.where(here, error[:, None], 0.0), axis=0)[None, :] * coupling


@jit
def _move(
    scale, slope, code, product, SIGNED: tl.constexpr, FP16: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr
):
    """gptq._refit of one row."""
    curvature = tl.sum(product * code, axis=0)
    gained = tl.div_rn(tl.sum(slope * code, axis=0), tl.where(curvature > 0, curvature, 1.0))
    wanted = scale + tl.where(curvature > 0, gained, 0.0)
    moved = stored(wanted, FP16, LEAST, MOST) - scale
    return moved if SIGNED else tl.where(wanted > 0, moved, 0.0)


@jit
def _refine_tile(
    target_ptr, error_ptr, code_ptr, scale_ptr, carried_ptr, gradient_ptr, product_ptr, hessian_ptr, relative_ptr,
    start, count, group, groups, rows, columns, relative_stride,
    REFIT: tl.constexpr, SIGNED: tl.constexpr, FP16: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One expert's tile, a row at a time, and in a row from one code that changes to the next."""
    expert = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    held = column < columns
    hessian_ptr += expert * columns * columns
    relative_ptr += expert * relative_stride + start
    diagonal = tl.load(hessian_ptr + column * (columns + 1), mask=held, other=1.0)
    carried = tl.load(
        carried_ptr + (expert * columns + column)[None, :] * count + row[:, None],
        mask=held[None, :] & (row < count)[:, None], other=0.0,
    )  # fmt: skip
    for here in range(0, count):
        at = start + here
        slope = tl.sum(tl.where((row == here)[:, None], carried, 0.0), axis=0)
        in_state = ((expert * groups + group) * columns + column) * rows + at
        in_block = (expert * columns + column) * rows + at
        target = tl.load(target_ptr + in_state, mask=held, other=0.0)
        error = tl.load(error_ptr + in_state, mask=held, other=0.0)
        code = tl.load(code_ptr + in_state, mask=held, other=0.0)
        product = tl.load(product_ptr + in_block, mask=held, other=0.0)
        scale_at = scale_ptr + (expert * groups + group) * rows + at
        scale = tl.load(scale_at)
        if REFIT:
            moved = _move(scale, slope, code, product, SIGNED, FP16, LEAST, MOST)
            scale += moved
            error -= code * moved
            change = -product * moved
            tl.store(scale_at, scale)
        else:
            change = tl.zeros((BLOCK,), dtype=tl.float32)
        missed = target - error
        ahead = missed + tl.div_rn(slope + change, diagonal)
        wanted_code = code_of(tl.div_rn(ahead, scale), LOW, HIGH)
        first = tl.min(tl.where(held & (wanted_code != code), column, BLOCK), axis=0)
        while first < BLOCK:
            chosen = column == first
            code = tl.where(chosen, wanted_code, code)
            short = tl.sum(tl.where(chosen, missed - code * scale, 0.0), axis=0)
            fed = short * tl.load(hessian_ptr + first * columns + column, mask=held, other=0.0)
            ahead += tl.div_rn(fed, diagonal)
            change += fed
            wanted_code = code_of(tl.div_rn(ahead, scale), LOW, HIGH)
            first = tl.min(tl.where(held & (column > first) & (wanted_code != code), column, BLOCK), axis=0)
        tl.store(code_ptr + in_state, code, mask=held)
        tl.store(error_ptr + in_state, target - code * scale, mask=held)
        gradient = tl.load(gradient_ptr + in_block, mask=held, other=0.0)
        tl.store(gradient_ptr + in_block, gradient + change, mask=held)
        later = (row > here) & (row < count)
        coupling = tl.load(relative_ptr + at * rows + row, mask=later, other=0.0)
        carried += coupling[:, None] * change[None, :]
