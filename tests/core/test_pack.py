"""Storage formats against FORMAT.md's words, an unpacker written from them, and compressed-tensors' own code."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from fourfold.core import grid, pack
from fourfold.datatypes import QuantizedGroup

FORMATS = ["compressed-tensors", "gptq", "gptq_v2"]
DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}
WORKED_EXAMPLE = [0, 7, -8, -1, 1, -7, 4, -5]
NAMES = {
    "model.language_model.layers.3.mlp.experts.17.gate_proj": True,
    "model.language_model.layers.3.mlp.experts.17.down_proj": True,
    "model.layers.0.mlp.experts.0.up_proj": True,
    "lm_head": False,
    "model.visual.blocks.0.attn.qkv": False,
    "model.language_model.layers.3.self_attn.q_proj": False,
    "model.language_model.layers.3.linear_attn.in_proj_qkv": False,
    "model.language_model.layers.3.mlp.shared_expert.gate_proj": False,
    "model.language_model.layers.3.mlp.shared_expert_gate": False,
    "model.language_model.layers.3.mlp.gate": False,
    "mtp.fc": False,
    "mtp.layers.0.self_attn.q_proj": False,
    "mtp.layers.0.mlp.experts.5.up_proj": False,
    "mtp.layers.0.mlp.experts": False,
}  # module -> is quantized


def make_group(experts: int, outputs: int, inputs: int, group_size: int, seed: int = 0) -> QuantizedGroup:
    generator = torch.Generator().manual_seed(seed)
    codes_ENK = torch.randint(-8, 8, (experts, outputs, inputs), generator=generator, dtype=torch.int8)
    scale_ENG = torch.randn(experts, outputs, inputs // group_size, generator=generator).mul(4).exp()
    scale_ENG *= 1 - 2 * torch.randint(0, 2, scale_ENG.shape, generator=generator)
    return QuantizedGroup(codes_ENK, grid.stored(scale_ENG, "bf16"))


# ---- words


def test_the_worked_example() -> None:
    words = pack.pack_codes(torch.tensor(WORKED_EXAMPLE, dtype=torch.int8)[None, None])
    assert words.dtype == torch.int32 and words.flatten().tolist() == [1008300280]
    assert words.view(torch.uint8).flatten().tolist() == [0xF8, 0x70, 0x19, 0x3C]
    assert reference.unpack_word(1008300280) == WORKED_EXAMPLE
    assert pack.unpack_codes(words).flatten().tolist() == WORKED_EXAMPLE


def test_a_top_nibble_of_8_or_more_is_a_negative_word() -> None:
    for top in range(-8, 8):
        codes = [*WORKED_EXAMPLE[:7], top]
        word = pack.pack_codes(torch.tensor(codes, dtype=torch.int8)[None, None]).item()
        assert word == reference.pack_word(codes) and (word < 0) == (top >= 0)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**16), st.booleans())
def test_packing_and_back(experts: int, outputs: int, words: int, seed: int, transposed: bool) -> None:
    codes_ENK = make_group(experts, outputs, 8 * words, 8, seed).codes_ENK
    if transposed:  # the same codes, not contiguous
        codes_ENK = codes_ENK.mT.contiguous().mT
    before = codes_ENK.clone()
    words_ENW = pack.pack_codes(codes_ENK)
    assert words_ENW.shape == (experts, outputs, words) and words_ENW.dtype == torch.int32
    assert [reference.unpack_compressed_tensors(rows) for rows in words_ENW.tolist()] == codes_ENK.tolist()
    found = pack.unpack_codes(words_ENW)
    assert found.dtype == torch.int8 and torch.equal(found, codes_ENK) and torch.equal(codes_ENK, before)
    assert torch.equal(pack.unpack_codes(words_ENW.mT.contiguous().mT), codes_ENK)
    for expert in range(experts):
        theirs = pack_to_int32(codes_ENK[expert].contiguous(), 4)
        assert torch.equal(words_ENW[expert], theirs)
        assert torch.equal(unpack_from_int32(words_ENW[expert], 4, codes_ENK[expert].shape), codes_ENK[expert])


@pytest.mark.parametrize("inputs", [1, 7, 12])
def test_inputs_that_fill_no_word_are_refused(inputs: int) -> None:
    with pytest.raises(ValueError, match=f"{inputs} input features.*multiple of 8"):
        pack.pack_codes(torch.zeros(1, 2, inputs, dtype=torch.int8))


# ---- tensors


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_shapes_are_those_that_pack_gives(format: str, group_size: int) -> None:
    for outputs, inputs in ((16, 128), (24, 384), (8, 256)):
        tensors = pack.pack(make_group(2, outputs, inputs, group_size), format)
        found = {suffix: (DTYPES[stack.dtype], tuple(stack.shape[1:])) for suffix, stack in tensors.items()}
        assert found == pack.tensor_shapes(format, outputs, inputs, group_size)
        assert all(len(stack) == 2 and stack.is_contiguous() for stack in tensors.values())
        assert set(pack.CODES_AND_SCALES[format]) <= set(found)


def test_shapes_are_those_of_the_published_models() -> None:
    """FORMAT.md's tables for gate/up and down of 35B-A3B."""
    for outputs, inputs, groups in ((512, 2048, 16), (2048, 512, 4)):
        for format in ("gptq", "gptq_v2"):
            assert pack.tensor_shapes(format, outputs, inputs, 128) == {
                "qweight": ("I32", (inputs // 8, outputs)),
                "scales": ("F16", (groups, outputs)),
                "qzeros": ("I32", (groups, outputs // 8)),
                "g_idx": ("I32", (inputs,)),
            }
        assert pack.tensor_shapes("compressed-tensors", outputs, inputs, 128) == {
            "weight_packed": ("I32", (outputs, inputs // 8)),
            "weight_scale": ("BF16", (outputs, groups)),
            "weight_shape": ("I64", (2,)),
        }


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("format", FORMATS)
def test_pack_and_back_is_exact(format: str, group_size: int) -> None:
    group = make_group(3, 16, 128, group_size)
    tensors = pack.pack(group, format)
    found = pack.unpack(tensors, format)
    assert torch.equal(found.codes_ENK, group.codes_ENK) and torch.equal(found.scale_ENG, group.scale_ENG)
    assert found.codes_ENK.dtype == torch.int8 and found.scale_ENG.dtype == torch.float32
    needed = {suffix: tensors[suffix] for suffix in pack.CODES_AND_SCALES[format]}
    assert torch.equal(pack.unpack(needed, format).codes_ENK, group.codes_ENK)  # nothing else is looked at


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_is_transposed_with_constant_zeros_and_plain_groups(format: str) -> None:
    group = make_group(2, 16, 128, 32)
    tensors = pack.pack(group, format)
    for expert in range(2):
        assert reference.unpack_gptq(tensors["qweight"][expert].tolist()) == group.codes_ENK[expert].tolist()
        assert torch.equal(tensors["scales"][expert].float(), group.scale_ENG[expert].T)
        assert tensors["g_idx"][expert].tolist() == [k // 32 for k in range(128)]
    word = {"gptq": 0x77777777, "gptq_v2": 0x88888888}[format]
    assert {zero % 2**32 for zero in tensors["qzeros"].flatten().tolist()} == {word}
    stored_zero = {"gptq": 8 - 1, "gptq_v2": 8}[format]  # v1 stores the zero point less one
    assert reference.unpack_word(word) == [stored_zero - 8] * 8


def test_the_gptq_formats_differ_in_their_zeros_only() -> None:
    group = make_group(2, 16, 128, 32)
    first, second = pack.pack(group, "gptq"), pack.pack(group, "gptq_v2")
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["qzeros"]


def test_compressed_tensors_is_gptq_transposed() -> None:
    group = make_group(2, 16, 128, 32)
    ours, gptq = pack.pack(group, "compressed-tensors"), pack.pack(group, "gptq")
    assert torch.equal(ours["weight_packed"], gptq["qweight"].mT)
    assert torch.equal(ours["weight_scale"].float(), gptq["scales"].mT.float())
    assert ours["weight_shape"].tolist() == [[16, 128]] * 2


def test_stacks_share_no_memory_between_experts() -> None:
    """A shard is written expert by expert: safetensors refuses tensors that lie in one another."""
    for format in FORMATS:
        for suffix, stack in pack.pack(make_group(2, 16, 128, 32), format).items():
            before = stack[1].clone()
            stack[0].fill_(1)
            assert torch.equal(stack[1], before), suffix


def their_weights(tensors: dict[str, Tensor], expert: int, group_size: int) -> Tensor:
    """What compressed-tensors makes of a packed projection."""
    shape = torch.Size(tensors["weight_shape"][expert].tolist())
    codes_NK = unpack_from_int32(tensors["weight_packed"][expert], 4, shape)
    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=group_size, symmetric=True)
    return dequantize(codes_NK, tensors["weight_scale"][expert], args=arguments)


@pytest.mark.parametrize("group_size", [32, 128])
def test_compressed_tensors_reads_the_weights_that_we_multiply_by(group_size: int) -> None:
    """Signed scales included; the product is rounded to BF16 once, by both."""
    group = make_group(2, 16, 128, group_size)
    tensors = pack.pack(group, "compressed-tensors")
    ours = grid.dequantize(group.codes_ENK, group.scale_ENG).bfloat16()
    assert (group.scale_ENG < 0).any()
    for expert in range(2):
        assert torch.equal(their_weights(tensors, expert, group_size), ours[expert])


# ---- config.json

PUBLISHED = {
    "compressed-tensors": """{"quant_method": "compressed-tensors", "format": "pack-quantized",
      "quantization_status": "compressed",
      "ignore": ["lm_head", "re:.*visual.*", "re:.*self_attn.*", "re:.*linear_attn.*", "re:.*shared_expert.*",
                 "re:.*mlp\\\\.gate$", "re:.*mtp.*"],
      "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null, "output_activations": null,
        "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
                    "dynamic": false, "actorder": null, "observer": "minmax"}}}}""",
    "gptq": """{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "desc_act": false, "lm_head": false,
      "checkpoint_format": "gptq", "pack_dtype": "int32",
      "dynamic": {"-:^(?!.*\\\\.mlp\\\\.experts).*$": {}, "-:.*mtp.*": {}}}""",
}


@pytest.mark.parametrize("format", FORMATS)
def test_config_is_the_one_that_engines_were_seen_to_take(format: str) -> None:
    """FORMAT.md 2 and 3, word for word."""
    wanted: dict[str, Any] = json.loads(PUBLISHED["compressed-tensors" if format == "compressed-tensors" else "gptq"])
    if format == "gptq_v2":
        wanted["checkpoint_format"] = "gptq_v2"
    assert json.loads(json.dumps(pack.quantization_config(format, 128))) == wanted


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("format", FORMATS)
def test_config_names_the_group_size(format: str, group_size: int) -> None:
    config = pack.quantization_config(format, group_size)
    if format == "compressed-tensors":
        config = config["config_groups"]["group_0"]["weights"]
    assert config["group_size"] == group_size


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_config_quantizes_experts_alone(format: str) -> None:
    """`dynamic` as engines read it: a key that begins with "-:" and matches from the start excludes a module."""
    dynamic = pack.quantization_config(format, 128)["dynamic"]
    assert any(key.startswith("-:") and "mtp" in key for key in dynamic)  # what vLLM's qwen3_5_mtp.py looks for
    for name, quantized in NAMES.items():
        excluded = any(re.match(key.removeprefix("-:"), name) for key in dynamic)
        assert excluded != quantized, name


def test_compressed_tensors_config_quantizes_experts_alone() -> None:
    config = pack.quantization_config("compressed-tensors", 128)
    assert "re:.*mtp.*" in config["ignore"]
    for name, quantized in NAMES.items():
        ignored = any(
            re.match(entry.removeprefix("re:"), name) if entry.startswith("re:") else entry == name
            for entry in config["ignore"]
        )
        assert ignored != quantized, name


def test_compressed_tensors_parses_its_config() -> None:
    parsed = QuantizationConfig.model_validate(pack.quantization_config("compressed-tensors", 64))
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 64, True, "group")
    assert weights.actorder is None and parsed.config_groups["group_0"].input_activations is None


def test_each_call_gives_a_config_of_its_own() -> None:
    for format in FORMATS:
        wanted = json.dumps(pack.quantization_config(format, 128))
        config = pack.quantization_config(format, 128)
        config.get("ignore", []).append("x")
        config.get("dynamic", {})["x"] = {}
        assert json.dumps(pack.quantization_config(format, 128)) == wanted


# ---- of other makers


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_zero_points_and_permuted_groups_of_gptq(format: str) -> None:
    """Against the definition, element by element: (nibble - zero point) * scale of the input's group."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs, groups = 16, 32, 4
    nibble_NK = torch.randint(16, (outputs, inputs), generator=generator)
    zero_GN = torch.randint(1, 16, (groups, outputs), generator=generator)
    scale_GN = torch.rand(groups, outputs, generator=generator).half()
    group_K = torch.arange(inputs)[torch.randperm(inputs, generator=generator)] // 8
    tensors = {
        "qweight": pack.pack_codes((nibble_NK - 8).to(torch.int8)).T[None].contiguous(),
        "qzeros": pack.pack_codes((zero_GN - int(format == "gptq") - 8).to(torch.int8))[None],
        "scales": scale_GN[None],
        "g_idx": group_K.to(torch.int32)[None],
    }
    found_NK = pack.dequantize(tensors, format)[0]
    for row in range(outputs):
        for column in range(inputs):
            group = int(group_K[column])
            wanted = (int(nibble_NK[row, column]) - int(zero_GN[group, row])) * float(scale_GN[group, row])
            assert found_NK[row, column].item() == pytest.approx(wanted, abs=1e-6)


def test_zero_points_and_groups_of_compressed_tensors() -> None:
    """Against its own compressor and decompressor."""
    generator = torch.Generator().manual_seed(1)
    outputs, inputs, groups = 24, 32, 4
    shapes = (outputs, inputs), (outputs, groups)
    code_NK, zero_NG = (torch.randint(-8, 8, shape, generator=generator).to(torch.int8) for shape in shapes)
    scale_NG = torch.rand(outputs, groups, generator=generator).bfloat16()
    group_K = (torch.arange(inputs) // 8)[torch.randperm(inputs, generator=generator)]
    tensors = {
        "weight_packed": pack_to_int32(code_NK, 4)[None],
        "weight_scale": scale_NG[None],
        "weight_zero_point": pack_to_int32(zero_NG, 4, packed_dim=0)[None],
        "weight_g_idx": group_K.to(torch.int32)[None],
    }
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=8)
    theirs_NK = dequantize(code_NK, scale_NG.float(), zero_NG, args, g_idx=group_K.to(torch.int32))
    assert torch.equal(pack.dequantize(tensors, "compressed-tensors")[0], theirs_NK)
    even = {name: value for name, value in tensors.items() if name not in ("weight_g_idx", "weight_zero_point")}
    theirs_NK = dequantize(code_NK, scale_NG.float(), args=args)
    assert torch.equal(pack.dequantize(even, "compressed-tensors")[0], theirs_NK)
