"""Sums of products of BF16 values in fp32, on a CPU with AVX-512 BF16: twice as fast as a GEMM of fp32 copies.

torch's own BF16 GEMM rounds its sums to BF16, which moments do not bear. Rows are packed once, two to a 32-bit word
as the instruction wants them, in panels of columns; a tile of the sums then stays in registers for PIECE words.
"""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from fourfold.core.kernels.cpu import SIXTEEN, Floats, Ints, over_rows, round_bits
from fourfold.core.kernels.native import native

FEATURES = binding.get_host_cpu_features()
AVAILABLE = bool(FEATURES.get("avx512bf16"))  # of this file's kernel
# Of the processor: instructions that torch multiplies BF16 by. On x86 torch itself counts AVX-512 without them, too.
NATIVE = (
    AVAILABLE or bool(FEATURES.get("amx-bf16"))
    if platform.machine() in ("x86_64", "AMD64")
    else bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
)
binding.initialize_native_asmparser()  # numba does without one; the instruction is named in _emit_tile
PANEL, TILE, VECTOR = 32, 8, 16  # columns of a panel; rows of a tile, which is a panel wide; fp32 of a register
LOW = np.int32(0xFFFF)
PIECE = 256  # words of 2 rows that a tile adds up by itself: more would lose a digit, fewer load sums more often


def fits(input_TK: Tensor) -> bool:
    """Whether `add_products_` can be had for these inputs."""
    bf16_on_cpu = input_TK.device.type == "cpu" and input_TK.dtype == torch.bfloat16
    return AVAILABLE and bf16_on_cpu and input_TK.shape[1] % PANEL == 0


def add_products_(hessian_KK: Tensor, input_TK: Tensor, token_S: Tensor, root_S: Tensor) -> Tensor:
    """Add x x^T of each pair, x the bf16(root x) of its token, to the lower triangle, in place; returns |x|^2, [S].

    What is above hessian_KK's diagonal is no longer of use.
    """
    energy_S = torch.empty(len(token_S))
    packed = _pack(input_TK, token_S, root_S, energy_S)
    panels = len(packed)
    lower = np.stack(np.tril_indices(panels)[::-1], axis=1)
    order = np.lexsort((lower[:, 1], lower[:, 0]))
    over_rows(_add_tiles, len(lower), [hessian_KK.numpy(), packed, np.ascontiguousarray(lower[order])])
    return energy_S


def energy(weight_NK: Tensor, hessian_KK: Tensor) -> float:
    """tr(W H W^T) as the sum of H times W^T W. weight_NK: BF16; hessian_KK: fp32, symmetric."""
    gram_KK = torch.zeros_like(hessian_KK)
    add_products_(gram_KK, weight_NK, torch.arange(len(weight_NK)), torch.ones(len(weight_NK)))
    partial_K = torch.empty(len(hessian_KK))
    over_rows(_dot_lower, len(hessian_KK), [gram_KK.numpy(), hessian_KK.numpy(), partial_K.numpy()])
    return float(partial_K.sum(dtype=torch.float64))


def _pack(input_TK: Tensor, token_S: Tensor, root_S: Tensor, energy_S: Tensor) -> Ints:
    """[K / PANEL, words, PANEL], a word the values of two pairs; energy_S: where |x|^2 is written."""
    words = -(-len(token_S) // 2)
    packed = np.empty((input_TK.shape[1] // PANEL, words, PANEL), np.int32)
    inputs = input_TK.view(torch.int16).numpy()
    over_rows(_pack_words, words, [inputs, token_S.numpy(), root_S.numpy(), packed, energy_S.numpy()])
    return packed


@native()
def _pack_words(
    first: int, last: int, inputs: NDArray[np.int16], token: NDArray[np.int64], root: Floats, packed: Ints,
    energy: Floats,
) -> None:  # fmt: skip
    columns = inputs.shape[1]
    value = np.zeros((2, columns), np.float32)
    bits = value.view(np.int32)
    for word in range(first, last):
        for half in range(2):
            pair = 2 * word + half
            if pair == len(token):
                value[half] = 0
                continue
            for column in range(columns):
                bits[half, column] = np.int32(inputs[token[pair], column]) << SIXTEEN
            for column in range(columns):
                value[half, column] *= root[pair]
            round_bits(bits[half], SIXTEEN)
            energy[pair] = _sum_of_squares(value[half])
        for panel in range(columns // PANEL):
            for column in range(PANEL):
                low, high = bits[0, panel * PANEL + column], bits[1, panel * PANEL + column]
                packed[panel, word, column] = ((low >> SIXTEEN) & LOW) | high


@native(fastmath={"reassoc"})
def _sum_of_squares(value: Floats) -> Any:
    total = np.float32(0)
    for column in range(len(value)):
        total += value[column] * value[column]
    return total


@native(fastmath={"reassoc"})
def _dot_lower(first: int, last: int, left: Floats, right: Floats, partial: Floats) -> None:
    """Sums of the products of two symmetric matrices, of which the left has its lower triangle alone, by rows."""
    for row in range(first, last):
        total = np.float32(0)
        for column in range(row):
            total += left[row, column] * right[row, column]
        partial[row] = total + total + left[row, row] * right[row, row]


def _add_tile_types(typing: Any, left: Any, right: Any, sums: Any, pitch: Any, words: Any) -> Any:
    """sums[r, c] += sum over words of left[word, r] . right[word, c], each the product of two pairs of BF16 values.

    Addresses, the sums' row pitch in bytes, count of words; r < TILE, c < PANEL. The sums stay in registers.
    """
    return types.void(types.uintp, types.uintp, types.uintp, types.intp, types.intp), _emit_tile


def _emit_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    left, right, sums, pitch, words = arguments
    integer, word = ir.IntType(64), ir.IntType(32)
    packed, floats = ir.VectorType(word, VECTOR), ir.VectorType(ir.FloatType(), VECTOR)
    dot = ir.FunctionType(floats, [floats, packed, packed])

    def at(address: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

    vectors = range(PANEL // VECTOR)
    zero = ir.Constant(floats, None)
    totals: list[list[Any]] = [
        [cgutils.alloca_once_value(builder, zero) for _ in vectors]  # type: ignore[no-untyped-call]
        for _ in range(TILE)
    ]
    with cgutils.for_range(builder, words) as loop:
        here = builder.mul(loop.index, integer(4 * PANEL))
        columns = [builder.load(at(right, builder.add(here, integer(64 * v)), packed), align=4) for v in vectors]
        for row in range(TILE):
            value = builder.load(at(left, builder.add(here, integer(4 * row)), word), align=4)
            single = builder.insert_element(ir.Constant(packed, ir.Undefined), value, word(0))
            spread = builder.shuffle_vector(single, single, ir.Constant(packed, None))
            for v in vectors:
                # By its name, as LLVM's own intrinsic has a type that llvmlite lacks.
                given = [builder.load(totals[row][v]), spread, columns[v]]
                builder.store(builder.asm(dot, "vdpbf16ps $3, $2, $0", "=v,0,v,v", given, False), totals[row][v])
    for row in range(TILE):
        for v in vectors:
            place = at(sums, builder.add(builder.mul(pitch, integer(row)), integer(64 * v)), floats)
            builder.store(builder.fadd(builder.load(place, align=4), builder.load(totals[row][v])), place, align=4)
    return context.get_dummy_value()


_add_tile: Any = intrinsic(_add_tile_types)


@native()
def _add_tiles(first: int, last: int, sums: Floats, packed: Ints, tiles: NDArray[np.int64]) -> None:
    """tiles: [count, 2], panel of columns and panel of rows of each part of the sums that is wanted."""
    pitch = sums.strides[0]
    for start in range(0, packed.shape[1], PIECE):
        words = min(PIECE, packed.shape[1] - start)
        for item in range(first, last):
            column, row = tiles[item, 0], tiles[item, 1]
            for part in range(0, PANEL, TILE):
                _add_tile(
                    packed[row, start:, part:].ctypes.data, packed[column, start:].ctypes.data,
                    sums[row * PANEL + part :, column * PANEL :].ctypes.data, pitch, words,
                )  # fmt: skip
