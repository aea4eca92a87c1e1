"""Codes of 4 or 8 bits in int32 words, as every format has them. docs/formats.md."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.core.kernels import cuda


def pack_codes(codes_ENK: Tensor, bits: int = 4) -> Tensor:
    """Pack 32 / bits codes along K into an int32 word, lowest bits first; code q is stored as q + 2^(bits - 1).

    codes_ENK: int8, K a multiple of 32 / bits, which is 4 or 8. Returns int32 [E, N, K * bits / 32].
    Layout: compressed-tensors `pack-quantized`, vLLM Marlin. Raises ValueError for another K.
    """
    if codes_ENK.shape[-1] % (32 // bits):
        raise ValueError(f"codes have {codes_ENK.shape[-1]} input features; packing needs a multiple of {32 // bits}")
    if bits == 8:
        return (codes_ENK.contiguous().view(torch.uint8) ^ 128).view(torch.int32)
    if codes_ENK.is_cuda:
        return cuda.pack_codes(codes_ENK)
    # Two nibbles to a byte, and the bytes of a little-endian word are in order already: no int64 stack is needed.
    nibbles = (codes_ENK + 8).view(torch.uint8)
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def unpack_codes(words_ENW: Tensor, bits: int = 4) -> Tensor:
    """Return the inverse of pack_codes: int8 [E, N, K]."""
    pairs = words_ENW.contiguous().view(torch.uint8)
    if bits == 8:
        return (pairs ^ 128).view(torch.int8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2).view(torch.int8) - 8
