"""Levels 1 and 2 on real releases: what passes, and each check seen failing on a release that has just that fault."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checkpoints
import releases
from broken import Change, Copy
from fourfold.recipe import load_recipe
from fourfold.records.results import Level, Status, Verdict
from fourfold.release.verify.run import verify

EXPERT = "model.language_model.layers.1.mlp.experts.2.up_proj."
NORM = "model.language_model.layers.0.input_layernorm.weight"
MTP_EXPERT = "mtp.layers.0.mlp.experts.3.down_proj.weight"
Broken = Callable[[str], Copy]
CT, GPTQ, V2 = releases.FORMATS


def failing(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if check.status is Status.FAIL}


def evidence(verdict: Verdict, name: str) -> str:
    return next(check.evidence for check in verdict.checks if check.name == name)


def on(suffix: str, change: Callable[[Tensor], Tensor], name: str = EXPERT) -> Change:
    """A change of one tensor, in whichever shard it is."""

    def edit(tensors: dict[str, Tensor]) -> None:
        if name + suffix in tensors:
            tensors[name + suffix] = change(tensors[name + suffix])

    return edit


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name, None)


def put(value: float, place: int = 5) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return change


# --- what is right passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", releases.FORMATS)
def test_a_release_passes_beside_its_source(made: dict[str, Path], source: Path, form: str) -> None:
    verdict = verify(made[form], model=source)
    assert failing(verdict) == set()
    assert verdict.passed
    assert {check.status for check in verdict.checks} == {Status.PASS}
    written = json.loads((made[form] / "verify.json").read_text())
    assert written == verdict.to_json()
    assert written["content"] == json.loads((made[form] / "fourfold.json").read_text())["output"]["content"]
    assert written["levels"] == ["files", "source"]


SHAPES: dict[str, dict[str, Any]] = {
    "text model": {"family": "qwen3_moe"},
    "dense layer": {"family": "qwen3_moe", "dense_layers": [0], "per_expert": False},
    "a tensor per expert": {"per_expert": True, "mtp": "split"},
    "no draft head, tied": {"mtp": None, "tied": True},
    "groups of 32": {"hidden": 96, "width": 32, "layers": 1},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_releases_of_other_sources_pass(tmp_path: Path, shape: str) -> None:
    model = checkpoints.tiny(tmp_path / "model", **SHAPES[shape])
    recipe = load_recipe(str(releases.write_recipe(tmp_path)), ["solver.passes=0", "scheme.group_size=32"])
    releases.run(model, tmp_path / "out", recipe)
    verdict = verify(tmp_path / "out", model=model)
    assert verdict.passed, [check for check in verdict.checks if check.status is Status.FAIL]
    assert all(check.status is Status.PASS for check in verdict.checks if check.name != "MTP split")


def test_each_byte_is_read_once(made: dict[str, Path], source: Path) -> None:
    shards = sum(path.stat().st_size for path in made[CT].glob("*.safetensors"))
    assert verify(made[CT]).bytes_read == shards
    values = sum(value.nbytes for value in releases.tensors(source).values())
    assert verify(made[CT], model=source).bytes_read == shards + values


def test_without_a_source_sidecars_are_not_run_and_the_rest_passes(made: dict[str, Path]) -> None:
    verdict = verify(made[GPTQ])
    assert verdict.passed
    assert [check.name for check in verdict.checks if check.status is Status.NOT_RUN] == ["sidecars"]
    assert {check.level for check in verdict.checks} == {Level.FILES}


def test_the_histogram_is_of_all_codes(made: dict[str, Path]) -> None:
    data = next(check.data for check in verify(made[CT]).checks if check.name == "codes")
    found = releases.tensors(made[CT])
    codes = torch.cat([releases.unpack_words(value).flatten() for name, value in found.items() if "packed" in name])
    assert data["histogram"] == {str(code): int((codes == code).sum()) for code in range(-8, 8)}


# --- one fault each: tensors --------------------------------------------------------------------------------------

OVER_RTN = "weight errors over RTN's"
NIBBLES_OF_3 = 0xBBBBBBBB - 2**32
TENSOR_FAULTS: dict[str, tuple[str, Change, set[str]]] = {
    "MTP tensor removed": (CT, without(MTP_EXPERT), {"tensors", "complete"}),
    "kept tensor removed": (CT, without(NORM), {"tensors", "complete"}),
    "expert's scales removed": (
        CT,
        without(EXPERT + "weight_scale"),
        {"tensors", "codes", "scales", "zero points and shapes", "complete", "weight errors"},
    ),
    "tensor added": (
        CT, lambda tensors: NORM in tensors and tensors.update({"surplus": torch.zeros(2)}), {"tensors", "complete"},
    ),
    "scales in another dtype": (
        CT,
        on("weight_scale", lambda scale: scale.float()),
        {"tensors", "codes", "scales", "zero points and shapes", "weight errors"},
    ),
    "kept tensor in another dtype": (CT, on("", lambda norm: norm.half(), NORM), {"complete"}),
    "NaN in a kept tensor": (CT, on("", put(torch.nan), NORM), {"finite", "kept tensors"}),
    "infinity in the draft head": (CT, on("", put(torch.inf), MTP_EXPERT), {"finite", "MTP split"}),
    "constant codes": (CT, on("weight_packed", lambda w: w.fill_(NIBBLES_OF_3)), {"codes", "weight errors", OVER_RTN}),
    "dead projection": (
        GPTQ, on("qweight", lambda w: w.fill_(0x88888888 - 2**32)), {"codes", "weight errors", OVER_RTN},
    ),
    "one expert's scales zeroed": (CT, on("weight_scale", lambda s: s.zero_()), {"scales", "weight errors", OVER_RTN}),
    "a scale too small": (GPTQ, on("scales", put(2.0**-18)), {"scales", "weight errors"}),
    "a scale too large": (CT, on("weight_scale", put(2.0**17)), {"scales", "weight errors", OVER_RTN}),
    "a scale that is NaN": (CT, on("weight_scale", put(torch.nan)), {"scales", "weight errors"}),
    "scales that are no BF16 values": (GPTQ, on("scales", lambda s: s * 1.001), {"scales", "weight errors"}),
    "v1 zero points under gptq_v2": (
        V2, on("qzeros", lambda z: z.fill_(0x77777777)), {"zero points and shapes"},
    ),
    "v2 zero points under gptq": (GPTQ, on("qzeros", put(0x88888888 - 2**32)), {"zero points and shapes"}),
    "groups out of order": (GPTQ, on("g_idx", lambda g: (g + 1) % 2), {"zero points and shapes"}),
    "another weight_shape": (CT, on("weight_shape", lambda s: s.flip(0) + 1), {"zero points and shapes"}),
    "kept tensor changed": (CT, on("", put(0.5), NORM), {"kept tensors"}),
    "MTP expert changed": (CT, on("", put(0.5), MTP_EXPERT), {"MTP split"}),
    "codes changed": (CT, on("weight_packed", lambda w: w.roll(1, 0)), {"weight errors", OVER_RTN}),
    "signs of scales changed": (CT, on("weight_scale", lambda s: -s), {"weight errors", OVER_RTN}),
}  # fmt: skip


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_fault_of_a_tensor_fails_its_checks(copy: Broken, source: Path, fault: str) -> None:
    form, change, wanted = TENSOR_FAULTS[fault]
    out = copy(form).tensors(change).folder
    verdict = verify(out, model=source)
    assert failing(verdict) == wanted
    assert not verdict.passed
    assert json.loads((out / "verify.json").read_text())["passed"] is False


def test_a_destroyed_projection_fails_though_its_log_is_true(copy: Broken, source: Path) -> None:
    out = copy(CT).tensors(on("weight_packed", lambda w: w.roll(1, 0))).folder
    said = evidence(verify(out, model=source), "weight errors")
    found = re.search(r"weight error is (\S+), quant_log.csv has (\S+)", said)
    assert found
    log = out / "quant_log.csv"
    log.write_text(log.read_text(encoding="utf-8").replace(f",{found[2]},", f",{found[1]},"), encoding="utf-8")
    verdict = verify(out, model=source)
    assert failing(verdict) == {OVER_RTN}
    wanted = rf"{EXPERT.rstrip('.')}: weight error is \d+\.\d times RTN's, expected at most 6"
    assert re.search(wanted, evidence(verdict, OVER_RTN))


# --- one fault each: files ----------------------------------------------------------------------------------------


def test_a_changed_byte_fails_its_hash(copy: Broken) -> None:
    """Of the last tensor of a shard: a value, not the header."""
    out = copy(CT).folder
    path = out / "model-00003-of-00003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    verdict = verify(out)
    assert failing(verdict) == {"sha256"}
    assert path.name in evidence(verdict, "sha256")


def test_a_truncated_shard_fails_and_the_rest_is_not_run(copy: Broken, source: Path) -> None:
    out = copy(CT).folder
    with (out / "model-00002-of-00003.safetensors").open("rb+") as shard:
        shard.truncate(100_000)
    verdict = verify(out, model=source)
    assert failing(verdict) == {"index"}
    not_run = {check.name for check in verdict.checks if check.status is Status.NOT_RUN}
    assert {"sha256", "codes", "kept tensors", "weight errors"} <= not_run
    assert not verdict.passed


def test_a_missing_shard(copy: Broken) -> None:
    out = copy(CT).folder
    (out / "model-00001-of-00003.safetensors").unlink()
    assert failing(verify(out)) == {"index"}


def test_no_index(copy: Broken) -> None:
    out = copy(CT).folder
    (out / "model.safetensors.index.json").unlink()
    assert failing(verify(out)) == {"index"}


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["weight_map"].pop(NORM),
        lambda index: index["weight_map"].update({NORM: "model-00003-of-00003.safetensors"}),
        lambda index: index["weight_map"].update(surplus="model-00001-of-00003.safetensors"),
        lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + 1),
        lambda index: index.pop("metadata"),
        lambda index: index.update(metadata="none"),
    ],
)
def test_an_index_that_does_not_fit(copy: Broken, change: Callable[[dict[str, Any]], object]) -> None:
    assert failing(verify(copy(CT).json("model.safetensors.index.json", change).folder)) == {"index"}


def test_a_stray_shard(copy: Broken) -> None:
    out = copy(CT).folder
    (out / "stray.safetensors").write_bytes(b"")
    verdict = verify(out)
    assert failing(verdict) == {"index"}
    assert "stray.safetensors" in evidence(verdict, "index")


def test_a_changed_sidecar(copy: Broken, source: Path) -> None:
    out = copy(CT).folder
    with (out / "chat_template.jinja").open("a") as file:
        file.write(" ")
    (out / "LICENSE").unlink()
    verdict = verify(out, model=source)
    assert failing(verdict) == {"sidecars"}
    assert "chat_template.jinja differs" in evidence(verdict, "sidecars")
    assert "LICENSE is missing" in evidence(verdict, "sidecars")


def test_a_changed_setting_of_the_model(copy: Broken, source: Path) -> None:
    out = copy(CT).json("config.json", lambda config: config["text_config"].update(rms_norm_eps=1e-5)).folder
    verdict = verify(out, model=source)
    assert failing(verdict) == {"sidecars"}
    assert "text_config" in evidence(verdict, "sidecars")


def quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda config: change(config["quantization_config"])


CONFIG_FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "dynamic without the MTP rule": (GPTQ, lambda q: q["dynamic"].pop("-:.*mtp.*"), "names mtp"),
    "dynamic is null": (GPTQ, lambda q: q.update(dynamic=None), "dynamic is None"),
    "kept modules not excluded": (GPTQ, lambda q: q["dynamic"].pop(next(iter(q["dynamic"]))), "does not exclude"),
    "sym is missing": (GPTQ, lambda q: q.pop("sym"), "sym is missing"),
    "sym is no boolean": (GPTQ, lambda q: q.update(sym=1), "sym is 1"),
    "desc_act": (GPTQ, lambda q: q.update(desc_act=True), "desc_act is True"),
    "bits": (GPTQ, lambda q: q.update(bits=8), "bits is 8"),
    "group size": (GPTQ, lambda q: q.update(group_size=64), "group_size is 64"),
    "bad pattern": (GPTQ, lambda q: q["dynamic"].update({"-:(mtp": {}}), "no regular expression"),
    "experts excluded": (GPTQ, lambda q: q["dynamic"].update({"-:.*experts.*": {}}), "which is quantized"),
    "ignore without MTP": (CT, lambda q: q["ignore"].remove("re:.*mtp.*"), "does not exclude mtp."),
    "ignore without the router": (
        CT, lambda q: q["ignore"].__setitem__(0, "re:^(?!.*\\.(experts|gate)).*$"), "mlp.gate, which is not",
    ),
    "targets without down": (
        CT, lambda q: q["config_groups"]["group_0"].update(targets=["re:.*(gate|up)_proj"]), "targets does not name",
    ),
    "targets is null": (CT, lambda q: q["config_groups"]["group_0"].update(targets=None), "targets is None"),
    "bad target": (CT, lambda q: q["config_groups"]["group_0"].update(targets=["re:(x"]), "no regular expression"),
    "ignore is null": (CT, lambda q: q.update(ignore=None), "ignore is None"),
    "format": (CT, lambda q: q.update(format="marlin-24"), "format is 'marlin-24'"),
    "group size of weights": (
        CT, lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32), "group_size is 32",
    ),
    "asymmetric": (
        CT, lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False), "symmetric is False",
    ),
    "activations": (
        CT, lambda q: q["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "activations",
    ),
    "two groups": (CT, lambda q: q["config_groups"].update(group_1={}), "expected groups with weights"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_rule_of_quantization_config(copy: Broken, fault: str) -> None:
    form, change, said = CONFIG_FAULTS[fault]
    verdict = verify(copy(form).json("config.json", quantization(change)).folder)
    assert failing(verdict) == {"quantization_config"}
    assert said in evidence(verdict, "quantization_config")


def test_checkpoint_format_that_the_zero_points_deny(copy: Broken) -> None:
    """As in a release that someone renamed from gptq to gptq_v2: the config is well-formed, the numbers are wrong."""
    change = quantization(lambda config: config.update(checkpoint_format="gptq_v2"))
    verdict = verify(copy(GPTQ).json("config.json", change).folder)
    assert failing(verdict) == {"quantization_config", "zero points and shapes"}
    assert "expected gptq as in recipe.toml" in evidence(verdict, "quantization_config")


# --- one fault each: the log --------------------------------------------------------------------------------------


def edit_log(out: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    with (out / "quant_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])
    change(rows)
    with (out / "quant_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(("factor", "fails"), [(1 + 5e-5, False), (1 + 3e-4, True)])
def test_a_logged_error_may_be_off_by_a_ten_thousandth(copy: Broken, source: Path, factor: float, fails: bool) -> None:
    out = copy(CT).folder
    edit_log(out, lambda rows: rows[7].update(weight_error=str(float(rows[7]["weight_error"]) * factor)))
    assert failing(verify(out, model=source)) == ({"weight errors"} if fails else set())


def test_a_projection_that_is_not_in_the_log(copy: Broken, source: Path) -> None:
    out = copy(CT).folder
    edit_log(out, lambda rows: rows.pop())
    verdict = verify(out, model=source)
    assert failing(verdict) == {"weight errors"}
    assert "is not in quant_log.csv" in evidence(verdict, "weight errors")


def test_a_log_of_a_projection_that_is_not_there(copy: Broken, source: Path) -> None:
    out = copy(CT).folder
    edit_log(out, lambda rows: rows.append(rows[0] | {"expert": "99"}))
    assert failing(verify(out, model=source)) == {"weight errors"}
