"""Releases of several makers: their weights against what their makers' own code says, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import checkpoints
import releases
from fourfold.datatypes import FourfoldError
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.sources import weights_kind

CPU = torch.device("cpu")
DATA = Path(__file__).parents[1] / "data"
EXPERTS = "model.language_model.layers.0.mlp.experts."
GPTQ = json.loads((DATA / "gptqmodel.json").read_text(encoding="utf-8"))


def make_release(source: Path, out: Path, kind: str) -> Path:
    """GPTQModel's experts among the source's other tensors. Experts that the fixture lacks are expert 0 again."""
    theirs = load_file(DATA / f"gptqmodel-{kind}.safetensors")
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(EXPERTS)]:
            del tensors[name]
        for name, value in theirs.items():
            expert = name.removeprefix(EXPERTS).partition(".")[0]
            if expert == "0":
                for other in range(4):
                    tensors.setdefault(name.replace(f"{EXPERTS}0.", f"{EXPERTS}{other}."), value.clone())
            if name.startswith(EXPERTS):
                tensors[name] = value

    checkpoints.edit(out, change)
    checkpoints.edit_json(out / "config.json", lambda raw: raw.update(quantization_config=GPTQ[f"gptqmodel-{kind}"]))
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/data/make_gptqmodel.py quantized."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return checkpoints.tiny(folder, layers=1, hidden=256, width=128, experts=4, topk=2, seed=5)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_gptqmodel_is_read_as_it_reads_itself(source: Path, tmp_path: Path, kind: str) -> None:
    """asymmetric: its zero points, and groups of inputs in the order of their activations (desc_act)."""
    weights = Checkpoint.open(make_release(source, tmp_path / "release", kind), Checkpoint.open_source(source))
    theirs = load_file(DATA / f"gptqmodel-{kind}.safetensors")
    layer = weights.layer(0, CPU, torch.float32)
    gate_up_ENK, down_ENK = layer.stacks
    gate, up = gate_up_ENK[0].chunk(2)
    for name, found in (("gate_proj", gate), ("up_proj", up), ("down_proj", down_ENK[0])):
        wanted = theirs[f"reference.{name}"].float()
        assert (found - wanted).abs().max() <= 2**-10 * wanted.abs().max(), name  # theirs is rounded to FP16
        before = releases.source_weight(releases.tensors(source), f"{EXPERTS}0.{name}.")
        assert ((found - before).norm() / before.norm()).item() < 0.2, name
    groups = theirs[f"{EXPERTS}0.gate_proj.g_idx"]
    assert (groups[1:] >= groups[:-1]).all() == (kind == "symmetric")


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
def test_a_source_is_read_from_either_layout(tmp_path: Path, family: str, per_expert: bool) -> None:
    folder = checkpoints.tiny(tmp_path / "model", family=family, per_expert=per_expert)
    weights, tensors = Checkpoint.open(folder), releases.tensors(folder)
    layer, prefix = weights.layer(1, CPU, torch.bfloat16), weights.experts_prefix(1)
    for expert in range(4):
        gate, up = layer.stacks[0][expert].chunk(2)
        for name, found in (("gate_proj", gate), ("up_proj", up), ("down_proj", layer.stacks[1][expert])):
            assert torch.equal(found.double(), releases.source_weight(tensors, f"{prefix}{expert}.{name}."))
    head = weights.head(CPU, torch.bfloat16)
    assert torch.equal(head.weight_VD, tensors["lm_head.weight"])


def test_a_dense_layer_has_no_experts(tmp_path: Path) -> None:
    folder = checkpoints.tiny(tmp_path / "model", family="qwen3_moe", dense_layers=[0])
    weights = Checkpoint.open(folder)
    assert [weights.layer(layer, CPU, torch.bfloat16).is_routed for layer in range(2)] == [False, True]


# ---- what is refused


def compressed(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | changes
    groups = {"group_0": {"weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "quip", "bits": 4}, "quantized by 'quip', which is not read; expected 4 bits by"),
        ({"bits": 4}, "quantized by None"),
        ({"quant_method": "gptq", "bits": 8}, "8 bits packed in 'int32'; expected 4"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "4 bits packed in 'int8'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'gptq' with 'marlin'"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_quip"}, "auto_round:auto_quip"),
        (compressed(num_bits=3), "with 3 bits"),
        (compressed(type="float"), "of type 'float'"),
        (compressed(strategy="tensor"), "by 'tensor'"),
        (compressed() | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors"}, "without config_groups"),
    ],
)
def test_what_is_not_read_is_named(config: object, message: str) -> None:
    with pytest.raises(FourfoldError, match=message):
        weights_kind({"quantization_config": config}, Path("release"))


@pytest.mark.parametrize(
    ("config", "format"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, "gptq_v2"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "gptq"),
        (compressed(), "compressed-tensors"),
        (compressed(strategy="channel"), "compressed-tensors"),
    ],
)
def test_what_is_read(config: dict[str, Any], format: str) -> None:
    assert list(map(str, weights_kind({"quantization_config": config}, Path("release")))) == ["int4", format]
    assert weights_kind({}, Path("release")) == ("", None)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}2.up_proj.qweight"), rf"{EXPERTS}2\.up_proj\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({f"{EXPERTS}1.down_proj.qweight": torch.zeros(32, 256, dtype=torch.int32)}), "for 4 bits"),
        (lambda t: t.update({f"{EXPERTS}1.down_proj.scales": torch.zeros(3, 256).half()}), "3 groups of 128 inputs"),
        (lambda t: t.update({f"{EXPERTS}1.down_proj.scales": torch.zeros(512).half()}), "two dimensions"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.zeros(3)}), r"norm\.weight is \[3\], wanted"),
    ],
)
def test_bad_tensors_are_found_in_the_headers(source: Path, tmp_path: Path, change: Change, message: str) -> None:
    folder = make_release(source, tmp_path / "release", "symmetric")
    checkpoints.edit(folder, change)
    with pytest.raises(FourfoldError, match=message):
        Checkpoint.open(folder, Checkpoint.open_source(source))


def test_scales_that_are_no_numbers_are_named(source: Path, tmp_path: Path) -> None:
    folder = make_release(source, tmp_path / "release", "symmetric")
    name = f"{EXPERTS}1.down_proj.scales"
    checkpoints.edit(folder, lambda tensors: tensors[name].__setitem__((0, 0), torch.nan))
    with pytest.raises(FourfoldError, match=r"experts\.1\.down_proj\.scales.*1 NaN"):
        Checkpoint.open(folder, Checkpoint.open_source(source)).layer(0, CPU, torch.bfloat16)


def test_a_release_of_other_layers_is_refused(source: Path, tmp_path: Path) -> None:
    other = checkpoints.tiny(tmp_path / "other", layers=2)
    with pytest.raises(FourfoldError, match="num_hidden_layers: got 2, expected 1 as the source has"):
        Checkpoint.open(other, Checkpoint.open_source(source))


def test_another_model_is_no_release(source: Path, tmp_path: Path) -> None:
    other = checkpoints.tiny(tmp_path / "other", family="qwen3_moe")
    with pytest.raises(FourfoldError, match="model_type is 'qwen3_moe', the source's is 'qwen3_5_moe'"):
        Checkpoint.open(other, Checkpoint.open_source(source))
