"""GGUF: blocks of ggml's Q4_0 and Q8_0 from codes and scales, and files of them. docs/formats.md.

The `gguf` package serializes; its tables of names are not used, as they are behind llama.cpp's. Imports torch and gguf
only inside of functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.datatypes import FourfoldError
from fourfold.formats.format import Shape

if TYPE_CHECKING:
    from torch import Tensor

NAME, TITLE = "gguf", "GGUF"
BLOCK = 32  # weights that have a scale in fp16, then as many codes of 4 or 8 bits
Q4_0 = "Q4_0"
KINDS = {4: Q4_0, 8: "Q8_0"}  # by bits of a code
MOSTLY_Q4_0, QUANTIZATION_VERSION = 2, 2  # general.file_type, general.quantization_version
RESTS = {"bf16": "", "f16": "F16", "q8_0": "Q8_0"}  # what matrices without codes become; "": as they are


def block_bytes(bits: int) -> int:
    """Return the size of a block with codes of so many bits."""
    return 2 + BLOCK * bits // 8


BITS = 8 * block_bytes(4) / BLOCK  # of a weight in Q4_0


def blocks(word_NW: Tensor, scale_NG: Tensor, bits: int) -> Tensor:
    """Return the rows of one projection as blocks, uint8 [N, K / 32 * (2 + 4 bits)]: bits are moved, none is computed.

    word_NW: int32 [N, K * bits / 32], lowest bits first; scale_NG: exact in fp16; K / G a multiple of 32. A block has
    its scale, then of Q4_0 16 bytes: byte j holds weight j in its low nibble, weight j + 16 in its high one; of Q8_0
    32 codes, int8.
    """
    import torch

    count = word_NW.shape[1] * 32 // bits // BLOCK
    byte_NBJ = word_NW.contiguous().view(torch.uint8).unflatten(1, (count, BLOCK * bits // 8))
    if bits == 8:
        code_NBJ = byte_NBJ ^ 128
    else:
        first, second = byte_NBJ[..., :8], byte_NBJ[..., 8:]
        pairs = torch.stack([(first & 15) | (second << 4), (first >> 4) | (second & 240)], dim=-1)
        code_NBJ = pairs.flatten(2)
    repeated_NB = scale_NG.half().repeat_interleave(count // scale_NG.shape[1], dim=1)
    scale_bytes = repeated_NB.contiguous().view(torch.uint8).unflatten(1, (count, 2))
    return torch.cat([scale_bytes, code_NBJ], dim=2).flatten(1)


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor to be written. shape: outermost first; kind: of ggml; make: its bytes, in any dtype."""

    name: str
    shape: Shape
    kind: str
    make: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        import gguf

        elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // int(elements) * int(size)


def to_kind(value: Tensor, kind: str) -> Tensor:
    """Return a tensor's values as ggml stores them; of Q8_0 the bytes of its blocks."""
    import gguf
    import torch

    if kind == "Q8_0":
        blocks = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(blocks)
    return value.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])


def read_files(paths: Sequence[Path]) -> list[Any]:
    """Return a gguf.GGUFReader of each file, which maps it into memory. Raises FourfoldError for any other file."""
    import gguf

    try:
        return [gguf.GGUFReader(path) for path in paths]
    except (OSError, ValueError, IndexError) as error:
        raise FourfoldError(f"{paths[0].parent}: cannot be read as GGUF ({error}). Convert the release again") from None


def dequantize(tensor: Any, place: int | slice) -> Tensor:
    """Return one of the matrices of a reader's stack, or rows of its matrix, in fp32, by gguf's own arithmetic."""
    import gguf
    import torch

    return torch.from_numpy(gguf.quants.dequantize(tensor.data[place], tensor.tensor_type))


def write_file(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any],
    special: Any,
    tensors: Sequence[GgufTensor],
    shard_bytes: int,
) -> None:
    """Write a file, or files named `NAME-00001-of-0000N.gguf` of at most `shard_bytes` each (0: one file).

    keys: int, float, bool, str or lists of them; special: a gguf.SpecialVocab. One tensor is in memory at a time.
    """
    import gguf
    import numpy
    import torch

    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    writer = gguf.GGUFWriter(path, architecture, split_max_size=shard_bytes)
    try:
        for key, value in keys.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                writer.add_key_value(key, value, gguf.GGUFValueType[types[type(value)]])
        special.add_to_gguf(writer, quiet=True)
        for one in tensors:
            kind = gguf.GGMLQuantizationType[one.kind]
            writer.add_tensor_info(one.name, one.shape, numpy.dtype(numpy.float32), one.size_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:
            value = one.make().contiguous().view(torch.uint8).numpy()
            assert value.nbytes == one.size_bytes, f"{value.nbytes} bytes for {one.name} {one.shape}"
            writer.write_tensor_data(value)
    finally:
        writer.close()
