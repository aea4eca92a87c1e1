"""What lands in OUT, unpacked by code written from docs/formats.md alone, and loaded by transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

import checkpoints
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe

SMALL = [
    "calibration.length=128",
    "calibration.sources.0.rows=4",
    "calibration.sources.1.rows=2",
    "calibration.sources.2.rows=2",
    "calibration.sources.3.rows=2",
    "heldout.windows=2",
    "heldout.length=128",
    "solver.pool_rows=128",
]
PREFIX = "model.language_model.layers.{}.mlp.experts.{}.{}_proj."


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] to codes [..., 8 W], lowest nibble first."""
    return torch.stack([(words >> (4 * place)) & 15 for place in range(8)], dim=-1).flatten(-2) - 8


def weight(found: dict[str, Tensor], name: str) -> Tensor:
    """A projection's weight, by the storage it is in."""
    if name + "weight_packed" in found:
        codes, scales = nibbles(found[name + "weight_packed"]), found[name + "weight_scale"].float()
    else:
        codes, scales = nibbles(found[name + "qweight"].T), found[name + "scales"].T.float()
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny(tmp_path_factory.mktemp("formats") / "model", layers=2)


@pytest.fixture(scope="module")
def releases(source: Path) -> dict[str, Path]:
    outs = {}
    for form in ("compressed-tensors", "gptq", "gptq_v2"):
        outs[form] = source.parent / form
        quantize(source, outs[form], load_recipe("best", [*SMALL, f'format="{form}"']))
    return outs


def test_all_formats_hold_the_same_weights(releases: dict[str, Path]) -> None:
    found = {form: tensors_of(out) for form, out in releases.items()}
    for layer in range(2):
        for expert in range(4):
            for part in ("gate", "up", "down"):
                name = PREFIX.format(layer, expert, part)
                first = weight(found["compressed-tensors"], name)
                assert torch.equal(first, weight(found["gptq"], name))
                assert torch.equal(first, weight(found["gptq_v2"], name))
                assert (found["gptq"][name + "qzeros"] == 0x77777777).all()
                assert (found["gptq_v2"][name + "qzeros"] == 0x88888888 - 2**32).all()


def test_kept_tensors_are_the_source_bit_for_bit(source: Path, releases: dict[str, Path]) -> None:
    before = tensors_of(source)
    for out in releases.values():
        after = tensors_of(out)
        for name, value in before.items():
            if ".mlp.experts." not in name:
                assert torch.equal(value, after[name]), name
        gate_up = before["mtp.layers.0.mlp.experts.gate_up_proj"]
        width = gate_up.shape[1] // 2
        for expert in range(len(gate_up)):
            prefix = f"mtp.layers.0.mlp.experts.{expert}."
            assert torch.equal(after[prefix + "gate_proj.weight"], gate_up[expert, :width])
            assert torch.equal(after[prefix + "up_proj.weight"], gate_up[expert, width:])
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == after.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in after.values())
        config = json.loads((out / "config.json").read_text())
        quantization = config.pop("quantization_config")
        assert config == json.loads((source / "config.json").read_text())
        assert any("mtp" in rule for rule in quantization.get("ignore", quantization.get("dynamic")))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (source / name).read_bytes()


def test_transformers_gives_the_logits_of_the_dequantized_model(source: Path, releases: dict[str, Path]) -> None:
    out = releases["compressed-tensors"]
    found = tensors_of(out)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    for layer in range(2):
        experts = model.model.language_model.layers[layer].mlp.experts
        for expert in range(4):
            gate, up, down = (weight(found, PREFIX.format(layer, expert, part)) for part in ("gate", "up", "down"))
            experts.gate_up_proj.data[expert] = torch.cat([gate, up]).bfloat16()
            experts.down_proj.data[expert] = down.bfloat16()
    release = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.bfloat16)
    tokens = torch.arange(10, 74)[None]
    with torch.no_grad():
        assert torch.equal(release(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [("qwen3_5_moe", {"per_expert": True, "mtp": "split"}), ("qwen3_moe", {"dense_layers": [0], "tied": True})],
)
def test_layouts_and_families(tmp_path: Path, family: str, options: dict[str, object]) -> None:
    model = checkpoints.tiny(tmp_path / "model", family=family, layers=2, **options)
    summary = quantize(model, tmp_path / "out", load_recipe("fast", [*SMALL, "scheme.group_size=64"]))
    assert summary.methods == {"gptq": summary.projections}
    assert summary.projections == (24 if family == "qwen3_5_moe" else 12)
    assert 0 < summary.metrics["kl_mean"] < 0.5


def test_chunks_of_experts_give_the_same_codes(source: Path, releases: dict[str, Path], tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", load_recipe("best", SMALL), memory_bytes=1)
    first, second = tensors_of(releases["compressed-tensors"]), tensors_of(tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "fourfold.json").read_text())["settings"]
    assert settings["batches"]["experts"] == 1
    equal = [torch.equal(first[name], second[name]) for name in first if "layers.0." in name and "packed" in name]
    assert sum(equal) == len(equal) == 12


def test_a_trial_is_partial(source: Path, tmp_path: Path) -> None:
    summary = quantize(source, tmp_path / "out", load_recipe("best", SMALL), layers=range(0, 1))
    assert summary.partial and not summary.metrics and summary.projections == 12
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
