"""The hot loops on a CUDA device: Triton kernels with the contracts of the torch functions of the same name.

The torch functions are the reference; `accumulate` is of moments.py, `search_scales` of grid.py, `inblock` of gptq.py,
`pack_codes` of pack.py. All tensors of a call are on one device. Sums have one order, however experts are chunked.
TRITON_INTERPRET=1, set before triton is imported, runs the kernels on CPU tensors, slowly: how tests hold them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fourfold.datatypes import Moments

if TYPE_CHECKING:
    from fourfold.core.grid import Grid, ScaleSearch

try:
    import triton
    from triton import language as tl
except ModuleNotFoundError:  # torch's CPU builds come without it, and nothing here is called then
    triton = tl = None

AVAILABLE = triton is not None
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
FUSED = {"enable_fp_fusion": True}  # triton's default is about to change, and says so


def jit(kernel: Callable[..., Any]) -> Any:
    return kernel if triton is None else triton.jit(kernel)


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def ends(grid: Grid) -> dict[str, float]:
    """A grid's levels for a kernel, which is compiled for them."""
    return {"LOW": float(grid.least), "HIGH": float(grid.most)}


# ---- numbers


@jit
def code_of(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """clamp(rint(value), LOW, HIGH), half to even: past 1.5 * 2^23 fp32 has no room for a fraction.

    Clamped first, to the same end, as the sum rounds so only below 2^22. libdevice's rint is not for the interpreter.
    """
    return (tl.minimum(tl.maximum(value, LOW), HIGH) + 12582912.0) - 12582912.0


@jit
def round_bf16(value):
    """fp32 rounded to BF16, half to even, in fp32; finite values. The interpreter's own cast cuts bits off."""
    bits = value.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@jit
def stored(scale, FP16: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr):
    """grid.stored."""
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), LEAST), MOST)
    if FP16:
        magnitude = magnitude.to(tl.float16).to(tl.float32)
    else:
        magnitude = round_bf16(magnitude)
    return tl.where(scale < 0, -magnitude, magnitude)


# ---- second moments

PAIRS_PER_STEP = 64  # pairs between two loads of a tile's two strips
TILE = 128  # rows and columns of a tile of the sums


@jit
def _scaled(input_ptr, token, root, column, inside, INTERPRET: tl.constexpr):
    """bf16(sqrt(w) x) of a strip [pairs, columns]; 0 outside.

    Interpreted, BF16 values are kept in fp32: tl.dot would multiply their bit patterns.
    """
    value = tl.load(input_ptr + token[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    value = value * root[:, None]
    if INTERPRET:
        return round_bf16(value)
    else:
        return value.to(tl.bfloat16)


@jit
def _second_moments(
    input_ptr, token_ptr, root_ptr, offset_ptr, sum_ptr, inputs,
    TILE: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One lower tile of one expert's sums, added to it, and put in both its places."""
    right, left, expert = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if right <= left:
        first, last = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
        row, column = left * TILE + tl.arange(0, TILE), right * TILE + tl.arange(0, TILE)
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(first, last, STEP):
            pair = start + tl.arange(0, STEP)
            token = tl.load(token_ptr + pair, mask=pair < last, other=0) * inputs
            root = tl.load(root_ptr + pair, mask=pair < last, other=0.0)
            inside = (pair < last)[:, None]
            strip = _scaled(input_ptr, token, root, row, inside & (row < inputs)[None, :], INTERPRET)
            other = _scaled(input_ptr, token, root, column, inside & (column < inputs)[None, :], INTERPRET)
            total = tl.dot(tl.trans(strip), other, total)
        if right == left:  # bit for bit symmetric, whatever order a tensor core sums in
            total = tl.where(row[:, None] >= column[None, :], total, tl.trans(total))
        place = sum_ptr + expert * inputs * inputs + row[:, None] * inputs + column[None, :]
        inside = (row < inputs)[:, None] & (column < inputs)[None, :]
        total += tl.load(place, mask=inside, other=0.0)
        tl.store(place, total, mask=inside)
        if right < left:
            mirrored = sum_ptr + expert * inputs * inputs + column[:, None] * inputs + row[None, :]
            tl.store(mirrored, tl.trans(total), mask=(column < inputs)[:, None] & (row < inputs)[None, :])


@jit
def _token_sums(
    input_ptr, token_ptr, weight_ptr, root_ptr, offset_ptr, weight_sum_ptr, energy2_ptr, inputs,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """sum w and sum |xs|^4 of one expert."""
    expert = tl.program_id(0)
    first, last = tl.load(offset_ptr + expert), tl.load(offset_ptr + expert + 1)
    weight_sum, energy2 = tl.zeros((STEP,), dtype=tl.float32), tl.zeros((STEP,), dtype=tl.float32)
    for start in range(first, last, STEP):
        pair = start + tl.arange(0, STEP)
        token = tl.load(token_ptr + pair, mask=pair < last, other=0) * inputs
        root = tl.load(root_ptr + pair, mask=pair < last, other=0.0)
        energy = tl.zeros((STEP,), dtype=tl.float32)
        for begin in range(0, inputs, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            inside = (pair < last)[:, None] & (column < inputs)[None, :]
            value = _scaled(input_ptr, token, root, column, inside, INTERPRET).to(tl.float32)
            energy += tl.sum(value * value, axis=1)
        energy2 += energy * energy
        weight_sum += tl.load(weight_ptr + pair, mask=pair < last, other=0.0)
    tl.store(weight_sum_ptr + expert, tl.sum(weight_sum, axis=0))
    tl.store(energy2_ptr + expert, tl.sum(energy2, axis=0))


def accumulate(input_TK: Tensor, token_S: Tensor, weight_S: Tensor, offsets: list[int]) -> Moments:
    """moments.accumulate: rows are loaded through token_S, so no gathered copy of the inputs exists."""
    experts, inputs = len(offsets) - 1, input_TK.shape[1]
    device = input_TK.device
    hessian_EKK = torch.zeros(experts, inputs, inputs, device=device)
    weight_E, energy2_E = torch.zeros(experts, device=device), torch.zeros(experts, device=device)
    offset_E = torch.tensor(offsets, dtype=torch.int32, device=device)
    input_TK, token_S, weight_S = input_TK.contiguous(), token_S.contiguous(), weight_S.contiguous()
    root_S = weight_S.sqrt()
    if offsets[-1] > offsets[0]:
        tiles = blocks(inputs, TILE)
        _second_moments[(tiles, tiles, experts)](
            input_TK, token_S, root_S, offset_E, hessian_EKK, inputs,
            TILE=TILE, STEP=PAIRS_PER_STEP, INTERPRET=INTERPRETED, num_warps=8, **FUSED,
        )  # fmt: skip
        _token_sums[(experts,)](
            input_TK, token_S, weight_S, root_S, offset_E, weight_E, energy2_E, inputs,
            COLUMNS=256, STEP=16, INTERPRET=INTERPRETED, **FUSED,
        )  # fmt: skip
    return Moments(hessian_EKK, weight_E, offset_E.diff().long(), energy2_E)


# ---- column loop

ROWS_PER_PROGRAM = 64
SUB_BLOCK = 16  # columns solved one by one before a GEMM over the block; tl.dot's least


@jit
def _column_loop(
    target_ptr, weight_ptr, feedback_ptr, scale_ptr, codes_ptr, error_ptr, rows, columns,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """All columns of some rows of one expert. The targets stay in registers, feedback passes through shared memory."""
    expert = tl.program_id(1).to(tl.int64)
    row, all_columns, sub = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK), tl.arange(0, SUB)
    row_start = (expert * rows + row)[:, None] * columns
    feedback_ptr += expert * columns * columns
    inside = (row < rows)[:, None]
    target = tl.load(
        target_ptr + row_start + all_columns[None, :], mask=inside & (all_columns < columns)[None, :], other=0.0
    )
    for first in range(0, columns, SUB):
        column = first + sub
        place = row_start + column[None, :]
        held = inside & (column < columns)[None, :]
        # The sub-block's columns out of the block's: the sum has one term that is not 0.
        split = tl.reshape(target, (ROWS, BLOCK // SUB, SUB))
        chosen = (tl.arange(0, BLOCK // SUB) == first // SUB)[None, :, None]
        wanted = tl.sum(tl.where(chosen, split, 0.0), axis=1)
        weight = tl.load(weight_ptr + place, mask=held, other=0.0)
        scale = tl.load(scale_ptr + place, mask=held, other=1.0)
        code = tl.zeros((ROWS, SUB), dtype=tl.float32)
        error = tl.zeros((ROWS, SUB), dtype=tl.float32)
        for j in range(0, SUB):
            here = (sub == j)[None, :]
            wanted_j = tl.sum(tl.where(here, wanted, 0.0), axis=1)
            weight_j = tl.sum(tl.where(here, weight, 0.0), axis=1)
            scale_j = tl.sum(tl.where(here, scale, 0.0), axis=1)
            code_j = code_of(tl.div_rn(wanted_j, scale_j), LOW, HIGH)
            error_j = weight_j - code_j * scale_j
            ahead = tl.load(
                feedback_ptr + (first + j) * columns + column, mask=(sub > j) & (column < columns), other=0.0
            )
            wanted += error_j[:, None] * ahead[None, :]
            code = tl.where(here, code_j[:, None], code)
            error = tl.where(here, error_j[:, None], error)
        tl.store(codes_ptr + place, code.to(tl.int8), mask=held)
        tl.store(error_ptr + place, error, mask=held)
        later = (column < columns)[:, None] & ((all_columns >= first + SUB) & (all_columns < columns))[None, :]
        feedback = tl.load(feedback_ptr + column[:, None] * columns + all_columns[None, :], mask=later, other=0.0)
        target = tl.dot(error, feedback, target, input_precision="ieee")


def inblock(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """gptq.inblock. Sums are in another order, so a code differs where T / S is a tie but for rounding."""
    experts, rows, columns = target_ENB.shape
    codes_ENB = torch.empty(target_ENB.shape, dtype=torch.int8, device=target_ENB.device)
    error_ENB = torch.empty(target_ENB.shape, device=target_ENB.device)
    if codes_ENB.numel():
        block = max(triton.next_power_of_2(columns), SUB_BLOCK)
        _column_loop[(blocks(rows, ROWS_PER_PROGRAM), experts)](
            target_ENB.contiguous(), weight_ENB.contiguous(), feedback_EBB.contiguous(), scale_ENB.contiguous(),
            codes_ENB, error_ENB, rows, columns, **ends(grid), ROWS=ROWS_PER_PROGRAM, BLOCK=block, SUB=SUB_BLOCK,
            num_warps=8, **FUSED,
        )  # fmt: skip
    return codes_ENB, error_ENB


# ---- scales

ROWS_PER_SEARCH = 32
SMALLEST, LARGEST = 2.0**-17, 65280.0  # magnitudes that grid.stored keeps


@jit
def _scale_search(
    weight_ptr, importance_ptr, factor_ptr, scale_ptr, rows, groups, group_size, steps,
    SIGNED: tl.constexpr, FP16: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One group of some rows of one expert: its weights are read once for all candidates."""
    group, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, place = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    inputs = groups * group_size
    column = group * group_size + place
    start = (expert * rows + row)[:, None] * inputs + column[None, :]
    weight = tl.load(weight_ptr + start, mask=(row < rows)[:, None] & (place < group_size)[None, :], other=0.0)
    importance = tl.load(importance_ptr + expert * inputs + column, mask=place < group_size, other=0.0)
    base = tl.max(tl.abs(weight), axis=1) * (-1.0 / LOW)
    best = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    scale = tl.full((ROWS,), LEAST, dtype=tl.float32)
    for step in range(0, steps):
        factor = tl.load(factor_ptr + step)
        for side in tl.static_range(0, 2 if SIGNED else 1):
            candidate = stored(base * (factor if side == 0 else -factor), FP16, LEAST, MOST)
            code = code_of(weight * tl.div_rn(1.0, candidate)[:, None], LOW, HIGH)
            error = code * candidate[:, None] - weight
            cost = tl.sum(error * error * importance[None, :], axis=1)
            scale = tl.where(cost < best, candidate, scale)
            best = tl.where(cost < best, cost, best)
    tl.store(scale_ptr + (expert * rows + row) * groups + group, scale, mask=row < rows)


def search_scales(weight_ENK: Tensor, importance_EK: Tensor, grid: Grid, search: ScaleSearch) -> Tensor:
    """grid.search_scales. Sums are in another order, so of two candidates that cost the same either may win."""
    experts, rows, inputs = weight_ENK.shape
    group_size = grid.group_size
    groups = inputs // group_size
    scale_ENG = torch.empty(experts, rows, groups, device=weight_ENK.device)
    factors = torch.linspace(search.low, search.high, search.steps).to(weight_ENK.device)
    if scale_ENG.numel():
        _scale_search[(blocks(rows, ROWS_PER_SEARCH), groups, experts)](
            weight_ENK.contiguous(), importance_EK.contiguous(), factors, scale_ENG, rows, groups, group_size,
            search.steps, SIGNED=search.signed, FP16=grid.scale_dtype == "fp16", LEAST=SMALLEST, MOST=LARGEST,
            **ends(grid), ROWS=ROWS_PER_SEARCH, SIZE=triton.next_power_of_2(group_size), **FUSED,
        )  # fmt: skip
    return scale_ENG


# ---- packing

WORDS_PER_PROGRAM = 512


@jit
def _pack(codes_ptr, words_ptr, count, WORDS: tl.constexpr):
    word, nibble = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS), tl.arange(0, 8)
    codes = tl.load(codes_ptr + word[:, None] * 8 + nibble[None, :], mask=(word < count)[:, None], other=0)
    # No two terms share a bit, and the top one may reach the sign.
    words = tl.sum((codes.to(tl.int32) + 8) << (4 * nibble)[None, :], axis=1)
    tl.store(words_ptr + word, words, mask=word < count)


def pack_codes(codes_ENK: Tensor) -> Tensor:
    """pack.pack_codes."""
    if codes_ENK.shape[-1] % 8:
        raise ValueError(f"codes have {codes_ENK.shape[-1]} input features; packing needs a multiple of 8")
    experts, outputs, inputs = codes_ENK.shape
    words_ENW = torch.empty(experts, outputs, inputs // 8, dtype=torch.int32, device=codes_ENK.device)
    count = words_ENW.numel()
    if count:
        _pack[(blocks(count, WORDS_PER_PROGRAM),)](codes_ENK.contiguous(), words_ENW, count, WORDS=WORDS_PER_PROGRAM)
    return words_ENW
