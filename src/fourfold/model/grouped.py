"""Each row of a batch through the matrix of its own expert, all experts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from fourfold.core import widening


def grouped_linear(input_TK: Tensor, token_S: Tensor, offsets: Sequence[int], weight_ENK: Tensor) -> Tensor:
    """Each pair's input through its own expert's matrix, [S, N]. offsets: E + 1 ints, pairs of each expert in order.

    Each expert's rows are filled up to one of few sizes, at most an eighth more. oneDNN compiles a kernel for every
    size it has not met, which takes longer than a small product, and keeps it: 0.4 MB each, 0.4 GB in the end.
    """
    if not len(token_S):
        return input_TK.new_empty(0, weight_ENK.shape[1])
    if input_TK.device.type == "cpu" and not torch.is_grad_enabled() and not widening.widens(input_TK.device):
        return _multiply_in_place(input_TK, token_S, offsets, weight_ENK)
    counts = [last - first for first, last in pairwise(offsets)]
    starts = (0, *accumulate(_filled(count) for count in counts))
    shifts = [start - first for start, first in zip(starts, offsets, strict=False)][: len(counts)]
    shift_E, count_E = torch.tensor([shifts, counts], device=input_TK.device)
    # Of a known size, so that a GPU need not be waited for.
    shift_S = shift_E.repeat_interleave(count_E, output_size=len(token_S))
    place_S = torch.arange(len(token_S), device=input_TK.device) + shift_S
    token_F = token_S.new_zeros(starts[-1]).scatter_(0, place_S, token_S)  # filled with token 0, which nobody reads
    ends_E = torch.tensor(starts[1:], dtype=torch.int32, device=input_TK.device)
    with widening.products(input_TK.device):
        output_FN = grouped_mm(input_TK.index_select(0, token_F), weight_ENK.transpose(1, 2), offs=ends_E)
    return output_FN[: len(token_S)] if len(counts) == 1 else output_FN.index_select(0, place_S)


def _multiply_in_place(input_TK: Tensor, token_S: Tensor, offsets: Sequence[int], weight_ENK: Tensor) -> Tensor:
    """grouped_linear without a gradient, [S, N]: an expert's rows are filled up with those of the next expert, whose
    product is written over them.
    """
    spans = [(first, first + _filled(last - first)) for first, last in pairwise(offsets)]
    behind = max(last for _, last in spans) - len(token_S)
    input_FK = input_TK.index_select(0, torch.cat([token_S, token_S.new_zeros(behind)]))
    output_FN = input_TK.new_empty(len(input_FK), weight_ENK.shape[1])
    for (first, last), weight_NK in zip(spans, weight_ENK, strict=True):
        torch.mm(input_FK[first:last], weight_NK.T, out=output_FN[first:last])
    return output_FN[: len(token_S)]


def _filled(count: int) -> int:
    """`count` rounded up to a multiple of 32, or of an eighth of its power of two where that is more."""
    step = max(32, 1 << max(count.bit_length() - 4, 0))
    return -(-count // step) * step
