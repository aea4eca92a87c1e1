"""Every format of the registry: tensors against the format's definition and compressed-tensors' own code, the modules
that its quantization_config selects against the engines' ways of matching.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.utils.match import is_match
from torch import Tensor

import reference
from fourfold import formats
from fourfold.core import grid, pack
from fourfold.datatypes import QuantizedGroup
from fourfold.formats.format import Format, MoreModules
from fourfold.model.family import split_stack
from fourfold.model.tensors import TensorIndex

FORMATS, (CT, *GPTQ_FORMATS) = formats.FORMATS, formats.FORMATS
DTYPES = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float16: "F16"}
DRAFTS = ("mtp.",)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
each_gptq = pytest.mark.parametrize("format", GPTQ_FORMATS, ids=str)


def make_group(experts: int, outputs: int, inputs: int, group_size: int, seed: int = 0) -> QuantizedGroup:
    generator = torch.Generator().manual_seed(seed)
    codes_ENK = torch.randint(-8, 8, (experts, outputs, inputs), generator=generator, dtype=torch.int8)
    scale_ENG = torch.randn(experts, outputs, inputs // group_size, generator=generator).mul(4).exp()
    scale_ENG *= 1 - 2 * torch.randint(0, 2, scale_ENG.shape, generator=generator)
    return QuantizedGroup(codes_ENK, grid.stored(scale_ENG, "bf16"))


# ---- tensors


@pytest.mark.parametrize("group_size", [32, 64, 128])
@every_format
def test_shapes_are_those_that_pack_gives(format: Format, group_size: int) -> None:
    for outputs, inputs in ((16, 128), (24, 384), (8, 256)):
        tensors = format.pack(make_group(2, outputs, inputs, group_size))
        found = {suffix: (DTYPES[stack.dtype], tuple(stack.shape[1:])) for suffix, stack in tensors.items()}
        assert found == format.tensor_shapes(outputs, inputs, inputs // group_size)
        assert all(len(stack) == 2 and stack.is_contiguous() for stack in tensors.values())
        assert {format.codes, format.scales} <= set(found)


def test_shapes_are_those_of_the_published_models() -> None:
    """FORMAT.md's tables for gate/up and down of 35B-A3B."""
    for outputs, inputs, groups in ((512, 2048, 16), (2048, 512, 4)):
        for format in GPTQ_FORMATS:
            assert format.tensor_shapes(outputs, inputs, inputs // 128) == {
                "qweight": ("I32", (inputs // 8, outputs)),
                "scales": ("F16", (groups, outputs)),
                "qzeros": ("I32", (groups, outputs // 8)),
                "g_idx": ("I32", (inputs,)),
            }
        assert CT.tensor_shapes(outputs, inputs, inputs // 128) == {
            "weight_packed": ("I32", (outputs, inputs // 8)),
            "weight_scale": ("BF16", (outputs, groups)),
            "weight_shape": ("I64", (2,)),
        }


@pytest.mark.parametrize("group_size", [32, 64])
@every_format
def test_pack_and_back_is_exact(format: Format, group_size: int) -> None:
    group = make_group(3, 16, 128, group_size)
    tensors = format.pack(group)
    found = format.unpack(tensors)
    assert torch.equal(found.codes_ENK, group.codes_ENK) and torch.equal(found.scale_ENG, group.scale_ENG)
    assert found.codes_ENK.dtype == torch.int8 and found.scale_ENG.dtype == torch.float32
    needed = {suffix: tensors[suffix] for suffix in (format.codes, format.scales)}
    assert torch.equal(format.unpack(needed).codes_ENK, group.codes_ENK)  # nothing else is looked at


@each_gptq
def test_gptq_is_transposed_with_constant_zeros_and_plain_groups(format: Format) -> None:
    group = make_group(2, 16, 128, 32)
    tensors = format.pack(group)
    for expert in range(2):
        assert reference.unpack_gptq(tensors["qweight"][expert].tolist()) == group.codes_ENK[expert].tolist()
        assert torch.equal(tensors["scales"][expert].float(), group.scale_ENG[expert].T)
        assert tensors["g_idx"][expert].tolist() == [k // 32 for k in range(128)]
    word = {"gptq": 0x77777777, "gptq_v2": 0x88888888}[format.name]
    assert {zero % 2**32 for zero in tensors["qzeros"].flatten().tolist()} == {word}
    stored_zero = {"gptq": 8 - 1, "gptq_v2": 8}[format.name]  # v1 stores the zero point less one
    assert reference.unpack_word(word) == [stored_zero - 8] * 8


def test_the_gptq_formats_differ_in_their_zeros_only() -> None:
    group = make_group(2, 16, 128, 32)
    first, second = (format.pack(group) for format in GPTQ_FORMATS)
    assert [name for name in first if not torch.equal(first[name], second[name])] == ["qzeros"]


def test_compressed_tensors_is_gptq_transposed() -> None:
    group = make_group(2, 16, 128, 32)
    ours, gptq = CT.pack(group), formats.GPTQ.pack(group)
    assert torch.equal(ours["weight_packed"], gptq["qweight"].mT)
    assert torch.equal(ours["weight_scale"].float(), gptq["scales"].mT.float())
    assert ours["weight_shape"].tolist() == [[16, 128]] * 2


def test_stacks_share_no_memory_between_experts() -> None:
    """A shard is written expert by expert: safetensors refuses tensors that lie in one another."""
    for format in FORMATS:
        for suffix, stack in format.pack(make_group(2, 16, 128, 32)).items():
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
    tensors = CT.pack(group)
    ours = grid.dequantize(group.codes_ENK, group.scale_ENG).bfloat16()
    assert (group.scale_ENG < 0).any()
    for expert in range(2):
        assert torch.equal(their_weights(tensors, expert, group_size), ours[expert])


# ---- config.json

PUBLISHED = {
    "compressed-tensors": r"""{"quant_method": "compressed-tensors", "format": "pack-quantized",
      "quantization_status": "compressed",
      "ignore": ["re:^(?!.*\\.experts\\.\\d+\\.).*$", "re:.*mtp.*", "re:.*decoder\\..*"],
      "config_groups": {"group_0": {"targets": ["Linear"],
        "input_activations": null, "output_activations": null,
        "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
                    "dynamic": false, "actorder": null, "observer": "minmax"}}}}""",
    "gptq": r"""{"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": true, "desc_act": false, "lm_head": false,
      "checkpoint_format": "gptq", "pack_dtype": "int32",
      "dynamic": {"-:^(?!.*\\.experts\\.\\d+\\.|.*\\.experts$).*$": {}, "-:.*mtp.*": {}}}""",
}
# As vLLM and SGLang call modules, beside the names on disk: module -> is quantized.
ENGINE_NAMES = {
    "model.layers.0.mlp.experts.0.up_proj": True,
    "language_model.model.layers.3.mlp.experts.17.down_proj": True,
    "model.layers.3.self_attn.qkv_proj": False,
    "language_model.model.layers.3.mlp.shared_expert.gate_up_proj": False,
    "model.layers.3.mlp.shared_experts.gate_proj": False,
    "model.layers.3.mlp.gate_up_proj": False,
    "visual.blocks.0.attn.qkv": False,
    "language_model.lm_head": False,
    "mtp.fc": False,
    "mtp.layers.0.mlp.experts.5.up_proj": False,
}
STACKED_NAMES = {"language_model.model.layers.3.mlp.experts": True, "mtp.layers.0.mlp.experts": False}


@every_format
def test_config_is_the_documented_one(format: Format) -> None:
    wanted: dict[str, Any] = json.loads(PUBLISHED[format.method])
    if "checkpoint_format" in wanted:
        wanted["checkpoint_format"] = format.name
    assert json.loads(json.dumps(format.quantization_config(128, DRAFTS))) == wanted


@pytest.mark.parametrize("group_size", [32, 64, 128])
@every_format
def test_config_names_the_group_size(format: Format, group_size: int) -> None:
    config = format.quantization_config(group_size, ())
    assert (config.get("config_groups", {}).get("group_0", {}).get("weights") or config)["group_size"] == group_size


@every_format
def test_a_release_without_draft_head_names_none(format: Format) -> None:
    text = json.dumps(format.quantization_config(128, ()))
    assert "mtp" not in text and "decoder" not in text


@every_format
def test_each_call_gives_a_config_of_its_own(format: Format) -> None:
    config = format.quantization_config(128, DRAFTS)
    wanted = json.dumps(config)
    config.get("ignore", []).append("x")
    config.get("dynamic", {})["x"] = {}
    assert json.dumps(format.quantization_config(128, DRAFTS)) == wanted


def test_compressed_tensors_parses_its_config() -> None:
    parsed = QuantizationConfig.model_validate(CT.quantization_config(64, DRAFTS))
    weights = parsed.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric, weights.strategy) == (4, 64, True, "group")
    assert weights.actorder is None and parsed.config_groups["group_0"].input_activations is None


def selected(config: dict[str, Any]) -> Callable[[str], bool]:
    """Whether an engine takes a module for int4: by compressed-tensors' code, or by `dynamic` as GPTQModel, vLLM and
    SGLang read it: a key that starts with "-:" excludes what it matches from the start.
    """
    if "config_groups" in config:
        linear, (group,) = torch.nn.Linear(1, 1), config["config_groups"].values()
        return lambda name: is_match(name, linear, group["targets"], config["ignore"])
    return lambda name: not any(re.match(key.removeprefix("-:"), name) for key in config["dynamic"])


@every_format
def test_config_selects_routed_experts_alone(format: Format, example_model: Path) -> None:
    """Of the example's modules, and of the same as engines call them."""
    index, quantizes = TensorIndex.open(example_model), selected(format.quantization_config(128, DRAFTS))
    names = {name.removesuffix(".weight") for name in index.headers}
    for stack in [name for name in names if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        names.remove(stack)
        names |= {part.removesuffix(".weight") for part, *_ in split_stack(stack, index.headers[stack].shape)}
    routed = {name for name in names if name.startswith("model.language_model.layers.") and ".mlp.experts." in name}
    kept = ("self_attn", "linear_attn", "shared_expert.", "mlp.gate", "lm_head", "visual", "mtp.layers.0.mlp.experts")
    for part in kept:
        assert any(part in name for name in names - routed), part
    assert len(routed) == 4 * 16 * 3 and {name for name in names if quantizes(name)} == routed
    stacked = {} if "config_groups" in format.quantization_config(128, ()) else STACKED_NAMES
    for name, wanted in (ENGINE_NAMES | stacked).items():
        assert quantizes(name) is wanted, name


def test_the_one_layer_of_sglangs_draft_classes_is_ignored() -> None:
    """In SGLang a linear module that is neither a target nor ignored is an error: all but experts must be ignored."""
    ignore = CT.quantization_config(128, DRAFTS)["ignore"]
    linear = torch.nn.Linear(1, 1)
    for name in ("model.decoder.mlp.experts.3.up_proj", "model.decoder.self_attn.qkv_proj", "model.eh_proj", "lm_head"):
        assert is_match(name, linear, ignore), name


@every_format
def test_config_is_read_as_the_format_that_wrote_it(format: Format) -> None:
    config = format.quantization_config(128, DRAFTS)
    assert [one for one in FORMATS if one.named_by(config)] == [format]
    assert format.unreadable(config) == "" and not list(format.config_problems(config, 128, True))
    assert formats.named(format.name) is format


MORE = MoreModules(
    group_size=64,
    dense={
        **dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), 8),
        **dict.fromkeys((f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")), 8),
        **dict.fromkeys((f"linear_attn.{part}" for part in ("in_proj_qkv", "in_proj_z", "out_proj")), 8),
    },
    draft={"self_attn.q_proj": 8, "self_attn.k_proj": 8, "self_attn.v_proj": 8},
    draft_experts=4,
)
LAYER = "language_model.model.layers.0."
WIDTHS = {  # of modules as vLLM and SGLang name them, joined ones too; 16: not quantized
    f"{LAYER}self_attn.qkv_proj": 8,
    f"{LAYER}self_attn.o_proj": 8,
    f"{LAYER}linear_attn.in_proj_qkvz": 8,
    f"{LAYER}linear_attn.in_proj_ba": 16,
    f"{LAYER}mlp.shared_expert.gate_up_proj": 8,
    f"{LAYER}mlp.shared_expert_gate": 16,
    f"{LAYER}mlp.gate": 16,
    f"{LAYER}mlp.experts.3.gate_proj": 4,
    "mtp.layers.0.self_attn.qkv_proj": 8,
    "mtp.layers.0.mlp.experts.3.gate_proj": 4,
    "mtp.fc": 16,
    "language_model.lm_head": 16,
}


@every_format
def test_config_of_more_modules_by_the_names_of_engines(format: Format) -> None:
    """vLLM asks for `qkv_proj` before its parts: where that is ignored the layer is built in BF16, and loading dies."""
    config = format.quantization_config(128, DRAFTS, MORE)
    selection = format.selection(config)
    assert selection is not None
    for name, bits in WIDTHS.items():
        ignored = any(re.match(pattern, name) for pattern in selection.excluded)
        assert ignored is (bits == 16), name
        if bits < 16:
            assert selection.targets is None or any(re.match(pattern, name) for pattern in selection.targets), name
            assert (format.bits(config, name), format.settings(config, name)["group_size"]) == (
                (4, 128) if bits == 4 else (8, 64)
            )


@every_format
def test_a_pattern_that_is_none_is_no_crash(format: Format) -> None:
    config = format.quantization_config(128, DRAFTS, MORE)
    if "dynamic" in config:
        config["dynamic"] = {"+:(": {"bits": 8}} | config["dynamic"]
    else:
        config["config_groups"]["group_1"]["targets"].insert(0, "re:(")
    assert format.bits(config, f"{LAYER}self_attn.qkv_proj") == 8


# ---- stored beside codes and scales


@every_format
def test_what_is_packed_has_no_problems(format: Format) -> None:
    tensors = {suffix: stack[1] for suffix, stack in format.pack(make_group(2, 16, 128, 32)).items()}
    assert not list(format.companion_problems(tensors, 32))
    zero_NG = format.zero_points(tensors, 16)
    assert zero_NG is None or (zero_NG.shape == (16, 4) and not zero_NG.any())
    for suffix in format.companions(16, 128, 4):
        assert list(format.companion_problems(tensors | {suffix: tensors[suffix] + 1}, 32)), suffix


# ---- of other makers


@each_gptq
def test_zero_points_and_permuted_groups_of_gptq(format: Format) -> None:
    """Against the definition, element by element: (nibble - zero point) * scale of the input's group."""
    generator = torch.Generator().manual_seed(0)
    outputs, inputs, groups = 16, 32, 4
    nibble_NK = torch.randint(16, (outputs, inputs), generator=generator)
    zero_GN = torch.randint(1, 16, (groups, outputs), generator=generator)
    scale_GN = torch.rand(groups, outputs, generator=generator).half()
    group_K = torch.arange(inputs)[torch.randperm(inputs, generator=generator)] // 8
    tensors = {
        "qweight": pack.pack_codes((nibble_NK - 8).to(torch.int8)).T[None].contiguous(),
        "qzeros": pack.pack_codes((zero_GN - int(format is formats.GPTQ) - 8).to(torch.int8))[None],
        "scales": scale_GN[None],
        "g_idx": group_K.to(torch.int32)[None],
    }
    found_NK = format.dequantize(tensors)[0]
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
    assert torch.equal(CT.dequantize(tensors)[0], theirs_NK)
    even = {name: value for name, value in tensors.items() if name not in ("weight_g_idx", "weight_zero_point")}
    theirs_NK = dequantize(code_NK, scale_NG.float(), args=args)
    assert torch.equal(CT.dequantize(even)[0], theirs_NK)
