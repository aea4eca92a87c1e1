"""config.json of strangers, and folders that hold something else: one message each, before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from fourfold.datatypes import FourfoldError
from fourfold.model.config import LIMITS, check_model, read_config
from fourfold.model.skeleton import Skeleton

Raw = dict[str, Any]


@pytest.fixture
def model(example_model: Path, tmp_path: Path) -> Path:
    """config.json and an empty shard: all that is looked at."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(example_model / "config.json", folder)
    (folder / "model.safetensors").touch()
    return folder


def write(folder: Path, change: Callable[[Raw], object]) -> None:
    checkpoints.edit_json(folder / "config.json", change)


def text(**values: object) -> Callable[[Raw], object]:
    return lambda raw: raw["text_config"].update(values)


def top(**values: object) -> Callable[[Raw], object]:
    return lambda raw: raw.update(values)


def settings(**values: object) -> Callable[[Raw], object]:
    return top(quantization_config={"quant_method": "compressed-tensors"} | values)


VALUES: dict[str, tuple[Callable[[Raw], object], str]] = {
    "text": (text(hidden_size="big"), "text_config.hidden_size: got 'big', expected a whole number from 1 to 1,048"),
    "many layers": (text(num_hidden_layers=10**12), "num_hidden_layers: got 1000000000000, expected"),
    "negative layers": (text(num_hidden_layers=-4), "num_hidden_layers: got -4, expected"),
    "many experts": (text(num_experts=10**15), "num_experts: got 1000000000000000, expected"),
    "negative heads": (text(num_key_value_heads=-2), "num_key_value_heads: got -2, expected"),
    "no heads": (text(num_key_value_heads=0), "num_key_value_heads: got 0, expected"),
    "top-k": (text(num_experts_per_tok=999), "num_experts_per_tok: got 999, expected at most num_experts = 16"),
    "heads": (text(num_key_value_heads=3), "num_attention_heads: got 4, expected a multiple of num_key_value"),
    "context": (text(max_position_embeddings=10**40), "max_position_embeddings: got 1000000"),
    "not a number": (text(rms_norm_eps=float("nan")), "rms_norm_eps: got nan, expected a number"),
    "true": (text(num_experts=True), "num_experts: got True, expected"),
    "half": (text(num_experts=7.5), "num_experts: got 7.5, expected"),
    "list": (top(text_config=[]), r"text_config: got \[\], expected an object"),
    "layer types": (text(layer_types="full_attention"), "layer_types: got 'full_attention', expected a list of texts"),
    "vision": (lambda raw: raw["vision_config"].update(depth=-1), "vision_config.depth: got -1, expected"),
    "quantization": (top(quantization_config="gptq"), "quantization_config: got 'gptq', expected an object"),
    "group size 0": (settings(group_size=0), "group_size: got 0, expected a whole number from -1 to 1,048,576, not 0"),
    "group size -7": (settings(group_size=-7), "group_size: got -7, expected"),
    "group size of a group": (
        settings(config_groups={"group_0": {"weights": {"group_size": 10**30}}}),
        r"config_groups\.group_0\.weights\.group_size: got 1000",
    ),
    "groups": (settings(config_groups=[]), r"quantization_config\.config_groups: got \[\], expected an object"),
    "ignore": (settings(ignore=7), r"quantization_config\.ignore: got 7, expected a list of texts"),
    "ignored number": (settings(ignore=["lm_head", 7]), r"ignore: got \['lm_head', 7\], expected a list of texts"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_of_another_type_or_out_of_bounds_is_named(model: Path, case: str) -> None:
    change, message = VALUES[case]
    write(model, change)
    with pytest.raises(FourfoldError, match=rf"config\.json: .*{message}"):
        read_config(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["text_config"].update(num_experts=None), "num_experts"),
        (lambda raw: raw["text_config"].pop("num_experts") and text(num_experts_per_tok=300)(raw), "num_experts = 256"),
        (text(layer_types=["unheard"] * 4), "transformers does not accept it as qwen3_5_moe"),
        (text(hidden_act="unheard"), "transformers does not accept it as qwen3_5_moe: KeyError"),
        (text(dtype="unheard"), "transformers does not accept it as qwen3_5_moe"),
        (text(rope_parameters={"rope_type": "unheard"}), "transformers does not accept it as qwen3_5_moe"),
    ],
)
def test_values_that_transformers_cannot_use(model: Path, change: Callable[[Raw], object], message: str) -> None:
    write(model, change)
    with pytest.raises(FourfoldError, match=message) as error:
        Skeleton.of(read_config(model), model / "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 16 deep"),
        ("[]", r"got \[\], expected a JSON object"),
        ('{"model_type": "a", "model_type": "b"}', "'model_type' is there 2 times"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_file_that_is_no_object(model: Path, content: str, message: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(FourfoldError, match=message):
        read_config(model)


def test_every_limit_is_one_that_honest_models_pass(example_model: Path) -> None:
    """The bounds name keys that models have, and hold the sizes of the largest that are published."""
    read_config(example_model)
    largest = {"num_hidden_layers": 126, "num_experts": 2048, "hidden_size": 28_672, "vocab_size": 262_208,
               "max_position_embeddings": 10_485_760, "intermediate_size": 98_304}  # fmt: skip
    assert all(LIMITS[key][0] <= value * 4 <= LIMITS[key][1] for key, value in largest.items())


def test_a_value_for_each_layer_is_checked_one_by_one(model: Path) -> None:
    write(model, text(moe_intermediate_size=[64, 128], moe_topk=[2, 2]))
    read_config(model)
    write(model, text(moe_intermediate_size=[64, -1]))
    with pytest.raises(FourfoldError, match=r"text_config\.moe_intermediate_size: got -1, expected a whole number"):
        read_config(model)


def test_another_makers_settings_are_left_to_whoever_reads_them(model: Path) -> None:
    write(model, top(quantization_config={"quant_method": "awq", "ignore": 7, "group_size": 0}))
    read_config(model)
    write(model, top(model_type="unheard", quantization_config=None, num_attention_heads=[4, 8]))
    read_config(model)


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"}))


def gguf(folder: Path, *, config: bool) -> None:
    (folder / "model.safetensors").rename(folder / "model-Q4_K_M.gguf")
    if not config:
        (folder / "config.json").unlink()


def dense(raw: Raw) -> None:
    raw.clear()
    raw.update(model_type="llama", hidden_size=4096, num_hidden_layers=32)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda model: (model / "config.json").unlink(), r"no config\.json: expected a checkpoint as"),
    "adapter": (adapter, "a LoRA adapter of 'Qwen/Qwen3-30B-A3B', expected a whole model. Merge it"),
    "GGUF": (lambda model: gguf(model, config=False), "GGUF, expected a safetensors checkpoint"),
    "GGUF with config.json": (lambda model: gguf(model, config=True), "GGUF, expected a safetensors checkpoint"),
    "pipeline": (
        lambda model: (model / "config.json").rename(model / "model_index.json"),
        "a diffusers pipeline, expected a language model",
    ),
    "pickles": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        r"its weights are pickles \(pytorch_model.bin\)",
    ),
    "quantized": (
        lambda model: write(model, top(quantization_config={"quant_method": "awq"})),
        r"already quantized \('awq'\), expected BF16, FP8 with block scales, .* Start from the original",
    ),
    "dense": (
        lambda model: write(model, dense),
        "model_type: got 'llama', a dense model: .* for dense models use llm-compressor or GPTQModel",
    ),
    "no type": (
        lambda model: write(model, lambda raw: raw.pop("model_type")),
        "model_type: got None, expected the name of an architecture",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_model_to_quantize_is_called_by_its_name(model: Path, case: str) -> None:
    change, message = OTHERS[case]
    change(model)
    with pytest.raises(FourfoldError, match=message):
        check_model(model)


def test_paths(model: Path) -> None:
    check_model(model)
    check_model("org/name")
    check_model("org/name@main")
    (model / "x.gguf").touch()
    for path, message in (
        (model / "x.gguf", "GGUF, expected"),
        (model / "config.json", "a file; expected the folder"),
        (model / "nowhere", "no such folder"),
        ("./org/name", "no such folder"),
        ("name", "no such folder"),
        ("org/name@", "no such folder"),
    ):
        with pytest.raises(FourfoldError, match=message):
            check_model(path)


def test_the_check_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, fourfold.model.config; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
