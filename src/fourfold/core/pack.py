"""Nibbles of int4 codes in int32 words, as every format has them. docs/formats.md."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.kernels import cuda


def pack_codes(codes_ENK: Tensor) -> Tensor:
    """Eight 4-bit codes along K to an int32 word, lowest nibble first; the nibble of code q is q + 8.

    codes_ENK: int8 in [-8, 7], K a multiple of 8. Returns int32 [E, N, K // 8].
    Layout: compressed-tensors `pack-quantized`, vLLM Marlin. Raises ValueError if K is not a multiple of 8.
    """
    if codes_ENK.is_cuda:
        return cuda.pack_codes(codes_ENK)
    if codes_ENK.shape[-1] % 8:
        raise ValueError(f"codes have {codes_ENK.shape[-1]} input features; packing needs a multiple of 8")
    # Two nibbles to a byte, and the bytes of a little-endian word are in order already: no int64 stack is needed.
    nibbles = (codes_ENK + 8).view(torch.uint8)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack_codes(words_ENW: Tensor) -> Tensor:
    """The inverse of pack_codes: int32 [E, N, K // 8] to int8 [E, N, K]."""
    pairs = words_ENW.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8
