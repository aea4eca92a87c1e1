"""Levels 1 and 2 on releases with int8 modules and quantized draft experts, and each rule of theirs seen failing."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import releases
from broken import Change, Copy
from fourfold.recipe import load_recipe
from fourfold.records.results import Status, Verdict
from fourfold.release.inspect import inspect
from fourfold.release.verify.run import verify

CT, GPTQ = "compressed-tensors", "gptq"
PARTS = ("attention", "linear_attention", "shared_experts", "head", "draft_dense")
QKV = "model.language_model.layers.0.linear_attn.in_proj_qkv."
OUT_PROJ = "model.language_model.layers.0.linear_attn.out_proj."
SHARED = "model.language_model.layers.0.mlp.shared_expert."
DRAFT_SHARED = "mtp.layers.0.mlp.shared_expert.up_proj."
DRAFT_EXPERT = "mtp.layers.0.mlp.experts.1.up_proj."
ROUTER = "model.language_model.layers.0.mlp.gate.weight"
OVER_RTN, ERRORS, NEAREST = "weight errors over RTN's", "weight errors", "int8 codes"
Broken = Callable[[str], Copy]


@pytest.fixture(scope="session")
def compact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`source` in two formats: int8 but for experts, of which the draft head's are int4 too."""
    recipe, folder = str(releases.write_recipe(tmp_path_factory.mktemp("recipe"))), tmp_path_factory.mktemp("compact")
    rest = [f'scheme.rest.{part}="int8"' for part in PARTS] + ['scheme.rest.draft_experts="int4"']
    for form in (CT, GPTQ):
        releases.run(source, folder / form, load_recipe(recipe, [f'format="{form}"', "solver.passes=0", *rest]))
    return {form: folder / form for form in (CT, GPTQ)}


@pytest.fixture
def copy(compact: dict[str, Path], tmp_path: Path) -> Broken:
    return lambda form: Copy(Path(shutil.copytree(compact[form], tmp_path / "release")))


def failing(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if check.status is Status.FAIL}


def evidence(verdict: Verdict, name: str) -> str:
    return next(check.evidence for check in verdict.checks if check.name == name)


@pytest.mark.parametrize("form", [CT, GPTQ])
def test_a_release_passes_beside_its_source(compact: dict[str, Path], source: Path, form: str) -> None:
    verdict = verify(compact[form], model=source)
    assert verdict.passed, [check for check in verdict.checks if check.status is Status.FAIL]
    draft = 4 * 3  # experts' projections; beside them 4 of attention and 3 of the shared expert
    said = evidence(verdict, "tensors")
    assert said.startswith(f"{24 + draft} int4, "), said
    assert f"of {24 + draft} projections" in evidence(verdict, ERRORS)  # the draft head's are logged too
    said = evidence(verdict, NEAREST)
    assert said.startswith("7 rounded projections: every code is the nearest; ") and "none is more than 8 steps" in said
    assert next(check.data["most"] for check in verdict.checks if check.name == NEAREST) < 0.01
    with (compact[form] / "quant_log.csv").open(newline="") as log:
        assert [row["layer"] for row in csv.DictReader(log)].count("2") == draft


def test_inspect_names_each_width(compact: dict[str, Path]) -> None:
    found = inspect(compact[CT])
    assert found.quantized is not None
    assert found.quantized.by_width["int4"] == {"experts": 24, "MTP": 12}
    assert found.quantized.by_width["int8"].keys() == {
        "attention", "linear attention", "shared experts", "embeddings", "MTP",
    }  # fmt: skip
    stored = {row.group: {*row.stored} for row in found.groups}
    assert stored["shared experts"] == {"int8", "BF16"} and stored["MTP"] >= {"int4", "int8", "BF16"}
    assert not [trap for trap in found.traps if "quantization_config" in trap]
    assert [trap for trap in found.traps if "lm_head" in trap and "SGLang" in trap]
    assert [trap for trap in found.traps if "int8 linear layers" in trap]


def on(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: name in tensors and tensors.update({name: change(tensors[name])})


def one_code_up(steps: int) -> Callable[[Tensor], Tensor]:
    """The third code of the second row, or the next of it that stays below the highest."""

    def change(words: Tensor) -> Tensor:
        row = words.view(torch.uint8)[1]
        place = next(place for place in range(2, len(row)) if row[place] < 250 - steps)
        row[place] += steps
        return words

    return change


def exchanged(tensors: dict[str, Tensor]) -> None:
    gate, up = f"{SHARED}gate_proj.weight_scale", f"{SHARED}up_proj.weight_scale"
    if gate in tensors:
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def coarser(tensors: dict[str, Tensor]) -> None:
    """Scales four times as large, codes that fit: less than a solved projection may lose."""
    if f"{OUT_PROJ}weight_scale" in tensors:
        codes = tensors[f"{OUT_PROJ}weight_packed"].view(torch.uint8).int() - 128
        tensors[f"{OUT_PROJ}weight_scale"] *= 4
        tensors[f"{OUT_PROJ}weight_packed"] = ((codes / 4).round() + 128).to(torch.uint8).view(torch.int32)


FAULTS: dict[str, tuple[str, Change, set[str]]] = {
    "a solved code is nine higher": (CT, on(f"{QKV}weight_packed", one_code_up(9)), {NEAREST}),
    "a rounded code is one higher": (CT, on(f"{DRAFT_SHARED}weight_packed", one_code_up(1)), {NEAREST}),
    "two modules have each other's scales": (CT, exchanged, {NEAREST, OVER_RTN}),
    "scales of another group": (CT, on("lm_head.weight_scale", lambda s: s.roll(1, 0)), {NEAREST, OVER_RTN}),
    "scales are too large": (CT, coarser, {OVER_RTN}),
    "a BF16 tensor is another": (CT, on(ROUTER, lambda w: w.roll(1, 0)), {"kept tensors"}),
    "a draft expert's codes": (CT, on(f"{DRAFT_EXPERT}weight_packed", lambda w: w.roll(1, 0)), {ERRORS, OVER_RTN}),
    "zero points of 4 bits": (
        GPTQ, on(f"{QKV}qzeros", lambda z: torch.full_like(z, 0x77777777)), {"zero points and shapes"},
    ),
    "codes in another dtype": (
        CT, on(f"{OUT_PROJ}weight_packed", lambda w: w.to(torch.int64)),
        {"tensors", "codes", "scales", "zero points and shapes"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_tensor_fails_its_checks(copy: Broken, source: Path, fault: str) -> None:
    form, change, wanted = FAULTS[fault]
    assert failing(verify(copy(form).tensors(change).folder, model=source)) == wanted


def in_group(number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["config_groups"][f"group_{number}"].update(values)


def in_weights(number: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda settings: settings["config_groups"][f"group_{number}"]["weights"].update(values)


def without_plus(settings: dict[str, Any]) -> None:
    settings["dynamic"] = {key: value for key, value in settings["dynamic"].items() if key.startswith("-:")}


CONFIG_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "a class beside another group": (CT, in_group(0, targets=["Linear"]), "'Linear' beside another group"),
    "int4 where int8 is stored": (CT, in_weights(1, num_bits=4), "groups of 128, quantization_config says 4 bits"),
    "another group size": (CT, in_weights(1, group_size=64), "bits in groups of 64"),
    "asymmetric": (CT, in_weights(1, symmetric=False), "symmetric is False"),
    "engines' fused modules are ignored": (
        CT, lambda q: q["ignore"].append("re:.*in_proj_qkvz$"), "layers.0.linear_attn.in_proj_qkvz, which is quantized",
    ),
    "a module of no group": (CT, in_group(1, targets=["re:.*lm_head$"]), "targets does not name"),
    "a group without targets": (CT, in_group(1, targets=[]), "targets is []"),
    "dynamic without int8": (GPTQ, without_plus, "says 4 bits"),
    "a key that makes the draft BF16": (
        GPTQ, lambda q: q["dynamic"].update({r"-:.*mtp\.fc": {}}), "draft head in BF16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_rule_of_quantization_config(copy: Broken, fault: str) -> None:
    form, change, said = CONFIG_FAULTS[fault]
    verdict = verify(copy(form).json("config.json", lambda config: change(config["quantization_config"])).folder)
    assert failing(verdict) == {"quantization_config"}
    assert said in evidence(verdict, "quantization_config")


@pytest.mark.parametrize("form", [CT, GPTQ])
def test_a_tied_model_has_no_quantized_head(compact: dict[str, Path], form: str, tmp_path: Path) -> None:
    """As a release that another tool has made of a tied model: the config alone shows it."""
    out = Path(shutil.copytree(compact[form], tmp_path / "tied"))
    config = json.loads((out / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (out / "config.json").write_text(json.dumps(config))
    assert [trap for trap in inspect(out).traps if "tied to its embeddings" in trap]
