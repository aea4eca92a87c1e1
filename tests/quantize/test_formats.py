"""What lands in OUT, by docs/formats.md: every name, dtype and shape, the weights of each storage, both layouts."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import checkpoints
import releases
from fourfold.datatypes import FourfoldError
from fourfold.recipe import Recipe

TEXT = "model.language_model."
LAYERS, EXPERTS, HIDDEN, WIDTH = range(2), 4, 128, 128  # of the `source` fixture
MakeRecipe = Callable[..., Recipe]
Layout = dict[str, tuple[str, list[int]]]


def layout(folder: Path) -> Layout:
    """Every tensor's dtype and shape, as the shards' headers have it."""
    found: Layout = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                assert name not in found, f"{name} is in two shards"
                part = file.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    return found


def stored(form: str, outputs: int, inputs: int, group: int) -> Layout:
    """FORMAT.md, tables of 2 and 3: what one projection [N, K] becomes."""
    if form == "compressed-tensors":
        return {
            "weight_packed": ("I32", [outputs, inputs // 8]),
            "weight_scale": ("BF16", [outputs, inputs // group]),
            "weight_shape": ("I64", [2]),
        }
    return {
        "qweight": ("I32", [inputs // 8, outputs]),
        "scales": ("F16", [inputs // group, outputs]),
        "qzeros": ("I32", [inputs // group, outputs // 8]),
        "g_idx": ("I32", [inputs]),
    }


def experts_layout(form: str, sizes: tuple[int, int, int], group: int, prefix: str, layers: range) -> Layout:
    """All routed experts. sizes: experts, hidden, width."""
    experts, hidden, width = sizes
    found: Layout = {}
    for _, _, projection, name in releases.expert_names(prefix, layers, experts):
        shape = (hidden, width) if projection == "down_proj" else (width, hidden)
        found |= {name + suffix: tensor for suffix, tensor in stored(form, *shape, group).items()}
    return found


def kept_layout(model: Path) -> Layout:
    """Everything but experts, as the source has it."""
    return {name: tensor for name, tensor in layout(model).items() if ".mlp.experts." not in name}


def quantization_config(form: str, group: int) -> dict[str, Any]:
    """As docs/formats.md has it."""
    if form == "compressed-tensors":
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group,
                   "dynamic": False, "actorder": None, "observer": "minmax"}  # fmt: skip
        ignore = [r"re:^(?!.*\.experts\.\d+\.).*$", "re:.*mtp.*", r"re:.*decoder\..*"]
        group_0 = {"targets": ["Linear"], "input_activations": None, "output_activations": None,
                   "weights": weights}  # fmt: skip
        return {"quant_method": "compressed-tensors", "format": "pack-quantized",
                "quantization_status": "compressed", "ignore": ignore,
                "config_groups": {"group_0": group_0}}  # fmt: skip
    return {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False, "lm_head": False,
            "checkpoint_format": form, "pack_dtype": "int32",
            "dynamic": {r"-:^(?!.*\.experts\.\d+\.|.*\.experts$).*$": {}, "-:.*mtp.*": {}}}  # fmt: skip


@pytest.fixture(scope="module")
def outs(source: Path, release: Path, small: MakeRecipe) -> dict[str, Path]:
    """`source` in each format."""
    found = {"compressed-tensors": release}
    for form in ("gptq", "gptq_v2"):
        found[form] = source.parent / form
        releases.run(source, found[form], small(f'format="{form}"'))
    return found


@pytest.fixture(scope="module")
def contents(outs: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    return {form: releases.tensors(out) for form, out in outs.items()}


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", releases.FORMATS)
def test_every_name_dtype_and_shape(source: Path, outs: dict[str, Path], form: str) -> None:
    wanted = experts_layout(form, (EXPERTS, HIDDEN, WIDTH), 128, TEXT, LAYERS) | kept_layout(source)
    for expert in range(EXPERTS):  # FORMAT.md 6
        prefix = f"mtp.layers.0.mlp.experts.{expert}."
        wanted |= {f"{prefix}{name}.weight": ("BF16", [WIDTH, HIDDEN]) for name in ("gate_proj", "up_proj")}
        wanted[f"{prefix}down_proj.weight"] = "BF16", [HIDDEN, WIDTH]
    assert layout(outs[form]) == wanted
    assert sum(name.startswith("mtp.") for name in wanted) == 17 + 3 * EXPERTS


@pytest.mark.parametrize("form", releases.FORMATS)
def test_index_names_every_tensor_and_its_shard(outs: dict[str, Path], form: str) -> None:
    index = releases.read_json(outs[form] / "model.safetensors.index.json")
    found = releases.shards(outs[form])
    assert list(found) == [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert index["weight_map"] == {name: shard for shard, part in found.items() for name in part}
    assert index["metadata"] == {"total_size": sum(value.nbytes for part in found.values() for value in part.values())}
    for layer, shard in enumerate(list(found)[:2]):
        assert all(name.startswith(f"{TEXT}layers.{layer}.") for name in found[shard])
    for shard in found:
        with safe_open(outs[form] / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("form", releases.FORMATS)
def test_config_is_the_source_with_one_key_more(source: Path, outs: dict[str, Path], form: str) -> None:
    config, wanted = releases.read_json(outs[form] / "config.json"), quantization_config(form, 128)
    found = config.pop("quantization_config")
    assert found == wanted
    assert config == releases.read_json(source / "config.json")


def test_sidecars_are_copied_and_nothing_else_lies_there(source: Path, release: Path) -> None:
    sidecars = {*checkpoints.TOKENIZER_FILES, *releases.SIDECARS}
    for name in sidecars:
        assert (release / name).read_bytes() == (source / name).read_bytes(), name
    ours = {"config.json", "model.safetensors.index.json", "quant_log.csv", "metrics.json", "recipe.toml",
            "reference.json", "fourfold.json", ".fourfold/run.log", ".fourfold/lock"}  # fmt: skip
    ours |= {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    files = {str(path.relative_to(release)) for path in release.rglob("*") if path.is_file()}
    assert files == ours | sidecars


def test_kept_tensors_are_the_source_bit_for_bit(source: Path, contents: dict[str, dict[str, Tensor]]) -> None:
    before = releases.tensors(source)
    kept = [name for name in before if ".mlp.experts." not in name]
    assert {before[name].dtype for name in kept} == {torch.bfloat16, torch.float32}
    for after in contents.values():
        for name in kept:
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
        gate_up, down = (before[f"mtp.layers.0.mlp.experts.{stack}_proj"] for stack in ("gate_up", "down"))
        for expert in range(EXPERTS):
            gate, up, last = (after[f"mtp.layers.0.mlp.experts.{expert}.{part}.weight"]
                              for part in releases.PROJECTIONS)  # fmt: skip
            assert torch.equal(torch.cat([gate, up]), gate_up[expert])
            assert torch.equal(last, down[expert])


def test_modes_follow_the_umask(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        releases.run(source, tmp_path / "out", small("solver.passes=0", 'solver.scale="absmax"'))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes.pop(".fourfold") == 0o750
    assert set(modes.values()) == {0o640}, modes


# --- numbers --------------------------------------------------------------------------------------


def test_unpacker_reads_the_example_of_the_format() -> None:
    word = torch.tensor([[0x3C1970F8]], dtype=torch.int32)
    assert releases.unpack_words(word).tolist() == [[0, 7, -8, -1, 1, -7, 4, -5]]
    assert releases.unpack_words(torch.tensor([[-1]], dtype=torch.int32)).tolist() == [[7] * 8]


def test_all_formats_hold_the_same_weights(contents: dict[str, dict[str, Tensor]]) -> None:
    first = contents["compressed-tensors"]
    for _, _, _, name in releases.expert_names(TEXT, LAYERS, EXPERTS):
        for form in ("gptq", "gptq_v2"):
            found = contents[form]
            assert torch.equal(releases.dequantize(first, name), releases.dequantize(found, name))
            assert torch.equal(found[f"{name}qweight"].T, first[f"{name}weight_packed"])
            zero = {"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32}[form]
            assert (found[f"{name}qzeros"] == zero).all()
            assert found[f"{name}g_idx"].tolist() == [k // 128 for k in range(len(found[f"{name}g_idx"]))]
        assert first[f"{name}weight_shape"].tolist() == list(releases.dequantize(first, name).shape)


def test_codes_use_the_grid_and_scales_are_exact_in_both_float_formats(contents: dict[str, dict[str, Tensor]]) -> None:
    used: set[int] = set()
    for name in (name for _, _, _, name in releases.expert_names(TEXT, LAYERS, EXPERTS)):
        for found in contents.values():
            codes, scales = releases.codes_and_scales(found, name)
            used |= set(codes.unique().tolist())
            assert ((scales.abs() >= 2**-17) & (scales.abs() <= 65280)).all()
            assert torch.equal(scales, scales.bfloat16().double()) and torch.equal(scales, scales.half().double())
            assert (scales < 0).any() and (scales > 0).any()  # signed
    assert used == set(range(-8, 8))


def test_weights_are_the_source_rounded(source: Path, contents: dict[str, dict[str, Tensor]]) -> None:
    """Every projection in its place: its nearest relative is its own source, by far."""
    before = releases.tensors(source)
    for _, _, _, name in releases.expert_names(TEXT, LAYERS, EXPERTS):
        weight = releases.source_weight(before, name)
        error = releases.dequantize(contents["compressed-tensors"], name) - weight
        assert error.norm() < 0.15 * weight.norm(), name


# --- transformers ---------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(10, 202).view(2, 96)).logits
    assert found.isfinite().all()
    return found


def fill_experts(model: Any, prefix: str, found: dict[str, Tensor]) -> None:
    """Replace the routed experts of transformers' model by those of a release, in BF16."""
    for name, module in model.named_modules():
        if not name.endswith(".mlp.experts"):
            continue
        for expert in range(len(module.down_proj)):
            gate, up, down = (releases.dequantize(found, f"{prefix(name)}.{expert}.{part}.").bfloat16()
                              for part in releases.PROJECTIONS)  # fmt: skip
            module.gate_up_proj.data[expert], module.down_proj.data[expert] = torch.cat([gate, up]), down


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
def test_transformers_gives_the_logits_of_the_dequantized_model(
    source: Path, release: Path, contents: dict[str, dict[str, Tensor]], auto: Any
) -> None:
    model = auto.from_pretrained(source, dtype=torch.bfloat16)
    plain = logits(model)
    nested = auto is AutoModelForImageTextToText
    fill_experts(model, str if nested else lambda name: name.replace("model.", TEXT, 1), contents["compressed-tensors"])
    loaded, info = auto.from_pretrained(release, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not [name for name in info["unexpected_keys"] if not name.startswith(("mtp.", "model.visual."))]
    found = logits(loaded)
    assert torch.equal(found, logits(model))
    assert not torch.equal(found, plain)


# --- layouts, families, widths --------------------------------------------------------------------


@pytest.mark.parametrize(("per_expert", "mtp"), [(True, "fused"), (True, "split"), (False, "split")])
def test_every_layout_gives_the_same_release(
    release: Path, small: MakeRecipe, tmp_path: Path, per_expert: bool, mtp: str
) -> None:
    model = releases.make_source(tmp_path / "model", per_expert=per_expert, mtp=mtp)
    assert layout(model).keys() != layout(release).keys()
    releases.run(model, tmp_path / "out", small())
    found, wanted = releases.tree(tmp_path / "out"), releases.tree(release)
    differ = {name for name in wanted if found.get(name) != wanted[name]}
    assert differ == {"fourfold.json"}, "only the digest of the source's own headers"
    assert found.keys() == wanted.keys()


FAMILIES = {
    "qwen3_5_moe, 64": ({"hidden": 192, "width": 64}, 64, "gptq"),
    "qwen3_5_moe, 32, no MTP, tied": ({"hidden": 160, "width": 96, "mtp": None, "tied": True}, 32, "gptq_v2"),
    "qwen3_moe, 64, tied": ({"hidden": 192, "width": 64, "tied": True}, 64, "compressed-tensors"),
    "qwen2_moe, 64, dense": ({"hidden": 192, "width": 64, "dense_layers": (1,)}, 64, "gptq"),
    "qwen3_moe, 32, dense, fused": (
        {"hidden": 160, "width": 96, "layers": 3, "dense_layers": (1,), "per_expert": False}, 32, "compressed-tensors"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_families_and_group_sizes(small: MakeRecipe, tmp_path: Path, case: str) -> None:
    options, group, form = FAMILIES[case]
    family = case.partition(",")[0]
    model = releases.make_source(tmp_path / "model", family=family, experts=3, **options)
    out = tmp_path / "out"
    summary = releases.run(model, out, small(f"scheme.group_size={group}", f'format="{form}"'))
    prefix = TEXT if family == "qwen3_5_moe" else "model."
    layers = [layer for layer in range(options.get("layers", 2)) if layer not in options.get("dense_layers", ())]
    sizes = 3, options["hidden"], options["width"]
    wanted = kept_layout(model)
    for layer in layers:
        wanted |= experts_layout(form, sizes, group, prefix, range(layer, layer + 1))
    found = {name: tensor for name, tensor in layout(out).items() if not name.startswith("mtp.layers.0.mlp.experts.")}
    assert found == wanted
    config = releases.read_json(out / "config.json")["quantization_config"]
    groups = config["config_groups"]["group_0"]["weights"] if form == "compressed-tensors" else config
    assert groups["group_size"] == group
    assert summary.methods == {"gptq": 3 * 3 * len(layers)}
    assert 0 < summary.metrics["kl_mean"] < 0.1
    drifts = releases.read_json(out / "metrics.json")["layers"]
    assert [drift["layer"] for drift in drifts if drift["router_agreement"] is not None] == layers


@pytest.mark.parametrize("dense_layers", [(), (0,)])
def test_transformers_runs_the_text_family(small: MakeRecipe, tmp_path: Path, dense_layers: tuple[int, ...]) -> None:
    """The dense layers are BF16 in the shards, so config.json must not call them quantized."""
    model = checkpoints.tiny(tmp_path / "model", family="qwen3_moe", dense_layers=dense_layers, tied=True)
    releases.run(model, tmp_path / "out", small())
    wanted = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    fill_experts(wanted, str, releases.tensors(tmp_path / "out"))
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(wanted))


@pytest.mark.parametrize("sizes", [{"hidden": 192}, {"width": 64}])
def test_widths_that_groups_do_not_divide_are_refused(small: MakeRecipe, tmp_path: Path, sizes: dict[str, int]) -> None:
    model = checkpoints.tiny(tmp_path / "model", **sizes)
    with pytest.raises(FourfoldError, match="group_size = 128 does not divide"):
        releases.run(model, tmp_path / "out", small("scheme.group_size=128"))
    assert not (tmp_path / "out").exists()


# --- the example ----------------------------------------------------------------------------------


def summary_of(out: Path) -> dict[str, Any]:
    """Names with their numbers taken out, how many of each, dtypes, shapes; files and quantization_config."""
    rows = Counter(
        f"{re.sub(r'[.][0-9]+[.]', '.N.', name)} {dtype} {shape}" for name, (dtype, shape) in layout(out).items()
    )
    return {
        "files": sorted(path.name for path in out.iterdir() if path.is_file()),
        "quantization_config": releases.read_json(out / "config.json")["quantization_config"],
        "tensors": dict(sorted(rows.items())),
    }


@pytest.mark.parametrize(
    "form", ["compressed-tensors", *(pytest.param(form, marks=pytest.mark.slow) for form in ("gptq", "gptq_v2"))]
)
def test_the_examples_release(
    example_model: Path, small: MakeRecipe, tmp_path: Path, golden: Callable[[str, str], None], form: str
) -> None:
    releases.run(example_model, tmp_path, small(f'format="{form}"', "solver.passes=0", 'solver.scale="absmax"'))
    golden(f"example-{form}.json", json.dumps(summary_of(tmp_path), indent=1) + "\n")
