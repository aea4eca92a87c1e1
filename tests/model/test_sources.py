"""Sources that are not BF16: every weight against transformers' own dequantizers, and what does not fit is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fourfold.datatypes import FourfoldError, QuantizedGroup
from fourfold.formats import COMPRESSED_TENSORS
from fourfold.model.sources import SourceIndex, open_source
from fourfold.model.tensors import raw_bytes

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 16]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}}},
}


def source(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> SourceIndex:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return open_source(folder, {"quantization_config": quantization})


def fp8(rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    scale = torch.rand(-(-rows // 32), -(-columns // 16), generator=generator) * 1e-2
    if scale_dtype == torch.uint8:
        scale = torch.randint(110, 130, scale.shape, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * 50
    return {"a.weight": weight.to(torch.float8_e4m3fn), "a.weight_scale_inv": scale.to(scale_dtype)}


def mxfp4(experts: int, rows: int, groups: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    blocks = torch.randint(256, (experts, rows, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 132, (experts, rows, groups), generator=generator, dtype=torch.uint8)
    return {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    tensors = fp8(96, 48, scale_dtype)
    read = source(tmp_path, tensors, FP8).read("a.weight")
    dequantize = Fp8Dequantize(None)._dequantize_one  # type: ignore[no-untyped-call]
    assert torch.equal(read, dequantize(*tensors.values(), torch.bfloat16))


def test_fp8_blocks_may_be_cut_off(tmp_path: Path) -> None:
    """As DeepSeek-V3's kv_a_proj_with_mqa, 576 rows in blocks of 128, which transformers does not take."""
    tensors = fp8(80, 40)
    weight, scale = (value.double() for value in tensors.values())
    wanted = torch.empty_like(weight)
    for row in range(80):
        for column in range(40):
            wanted[row, column] = weight[row, column] * scale[row // 32, column // 16]
    assert torch.equal(source(tmp_path, tensors, FP8).read("a.weight"), wanted.float().to(torch.bfloat16))


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    tensors = mxfp4(3, 20, 2)
    read = source(tmp_path, tensors, {"quant_method": "mxfp4"}).read("e.gate_up_proj")
    assert read.shape == (3, 64, 20)
    assert torch.equal(read, convert_moe_packed_tensors(*tensors.values()))


def test_int4_is_codes_times_scales(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (1, 16, 24), generator=generator).to(torch.int8)
    scales = (torch.rand(1, 16, 3, generator=generator) * 0.1).to(torch.bfloat16)
    packed = COMPRESSED_TENSORS.pack(QuantizedGroup(codes, scales))
    stored = {f"a.{name}": value[0] for name, value in packed.items()}
    index = source(tmp_path, stored, INT4)
    assert list(index.headers) == ["a.weight"]
    wanted = codes[0].double() * scales[0].double().repeat_interleave(8, dim=1)
    sha = hashlib.sha256()
    assert torch.equal(index.read("a.weight", sha=sha), wanted.float().to(torch.bfloat16))
    parts = [stored[f"a.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")]
    assert sha.digest() == of_blocks(parts)  # in every process


def of_blocks(parts: Iterable[Tensor]) -> bytes:
    return hashlib.sha256(b"".join(hashlib.sha256(raw_bytes(part)).digest() for part in parts)).digest()


def test_every_way_of_reading_gives_the_same(tmp_path: Path) -> None:
    """Another tensor keeps its own bytes; the digest is of what lies on disk."""
    tensors = fp8(80, 40) | {"norm.weight": torch.randn(7).to(torch.bfloat16)}
    index = source(tmp_path, tensors, FP8)
    assert {name: (header.dtype, header.shape) for name, header in index.headers.items()} == {
        "a.weight": ("BF16", (80, 40)),
        "norm.weight": ("BF16", (7,)),
    }
    assert index.kind == "FP8" and index.added_bytes == 80 * 40 * 2 - 80 * 40 - 3 * 3 * 4
    weight, sha = index.read("a.weight"), hashlib.sha256()
    content = bytes(raw_bytes(weight))
    assert b"".join(bytes(part) for part in index.chunks("a.weight", 999)) == content
    part, stack = bytearray(77), torch.zeros(2, 80, 40, dtype=torch.bfloat16)
    index.read_range("a.weight", 13, memoryview(part))
    assert bytes(part) == content[13:90]
    index.read("a.weight", out=stack[1], sha=sha)
    assert torch.equal(stack[1], weight)
    assert sha.digest() == of_blocks(fp8(80, 40).values())
    assert torch.equal(index.read("norm.weight"), tensors["norm.weight"])


def test_a_checkpoint_without_quantization_is_as_it_is(tmp_path: Path) -> None:
    index = source(tmp_path, {"a.weight": torch.ones(2, 3)}, {})
    assert index.kind == "" and index.added_bytes == 0 and index.headers["a.weight"].dtype == "F32"


@pytest.mark.parametrize(
    ("tensors", "quantization", "said"),
    [
        ({"a.weight": fp8(32, 16)["a.weight"]}, FP8, "a.weight_scale_inv is missing, wanted [1, 1]"),
        (fp8(64, 16) | {"a.weight_scale_inv": torch.ones(3, 1)}, FP8, "is F32 [3, 1], wanted [2, 1], a scale for each"),
        (fp8(32, 16), FP8 | {"weight_block_size": [0, 1]}, "weight_block_size: got [0, 1], expected two sizes"),
        ({"e.gate_up_proj_blocks": mxfp4(1, 4, 1)["e.gate_up_proj_blocks"]}, {"quant_method": "mxfp4"}, "is missing"),
        ({"a.weight": torch.ones(1)}, {"quant_method": "bitsandbytes"}, "which is not read"),
        (fp8(32, 16) | {"a.weight_scale_inv": torch.tensor([[torch.nan]])}, FP8, "1 NaN"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], quantization: dict[str, Any], said: str
) -> None:
    with pytest.raises(FourfoldError) as raised:
        source(tmp_path, tensors, quantization).read("a.weight")
    assert said in str(raised.value), json.dumps(str(raised.value))
