"""What is said of checkpoints of several makers, by what is known of the files that were written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import foreign
from command_line import invoke
from fourfold.datatypes import FourfoldError
from fourfold.release.inspect import Inspection, inspect
from fourfold.serve.engines import DRAFTS_BY_NAME, KERNEL_ISSUES

Altered = Callable[[Path], Path]


def engines(found: Inspection) -> dict[str, bool]:
    return {row.engine.partition(" ")[0]: row.takes for row in found.engines}


def trapped(found: Inspection, word: str) -> bool:
    return any(word in trap for trap in found.traps)


def test_our_release(shipped: dict[str, Path]) -> None:
    found = inspect(shipped["compressed-tensors"])
    assert found.quantized is not None
    assert (found.made_by, found.quantized.format, found.quantized.projections) == (
        "fourfold",
        "compressed-tensors",
        24,
    )
    assert found.quantized.by_group == {"experts": 24}
    assert (found.quantized.group_sizes, found.quantized.scale_dtypes) == ((128,), ("BF16",))
    assert (found.quantized.looked_at, found.quantized.rounded) == (6, 0)
    assert 0.2 < found.quantized.negative < 0.8
    assert found.draft == "per expert"
    assert engines(found) == {"vLLM": True, "SGLang": True, "transformers": True}
    commands = {row.engine.partition(" ")[0]: row.command for row in found.engines}
    assert "--speculative-config" in commands["vLLM"] and "EAGLE" in commands["SGLang"]
    assert {row.gpus for row in found.engines[:2]} == {"1 x 12 GiB"}
    assert not trapped(found, "quantization_config")
    issues = {
        row.engine.partition(" ")[0]: [note for note in row.notes if "known issue on" in note] for row in found.engines
    }
    assert len(issues["vLLM"]) == len(KERNEL_ISSUES) and not issues["SGLang"]
    rows = {row.group: row for row in found.groups}
    assert (rows["experts"].stored, rows["experts"].tensors, rows["experts"].projections) == (("int4",), 72, 24)
    assert rows["MTP"].tensors == 17 + 3 * 4 and rows["MTP"].size_bytes == found.draft_bytes
    assert sum(row.size_bytes for row in found.groups) == found.size_bytes
    index = json.loads((shipped["compressed-tensors"] / "model.safetensors.index.json").read_text())
    assert found.size_bytes == index["metadata"]["total_size"]
    json.dumps(found.to_json())


def test_drafts_that_are_excluded_by_name(shipped: dict[str, Path], altered: Altered) -> None:
    folder = altered(shipped["compressed-tensors"])
    config = json.loads((folder / "config.json").read_text())
    settings, head = config["quantization_config"], "mtp.layers.0.self_attn."
    patterns = settings["ignore"]
    listed = [f"{head}{part}_proj" for part in "qkv"]
    for ignored, trap in (
        (listed, True),
        ([*listed, "re:.*mtp.*"], False),
        ([*listed, f"{head}qkv_proj"], False),
        (listed[:2], False),  # these are not fused by name
        (patterns, False),
    ):
        settings["ignore"] = ignored
        (folder / "config.json").write_text(json.dumps(config))
        assert (DRAFTS_BY_NAME in inspect(folder).traps) == trap, ignored


def test_a_release_of_gptqmodel(tmp_path: Path) -> None:
    found = inspect(foreign.to_v2(foreign.make(tmp_path / "old", "symmetric")))
    assert found.quantized is not None
    assert (found.quantized.format, found.quantized.group_sizes, found.draft) == ("gptq_v2", (64,), "fused")
    assert found.quantized.rounded > 0.5 and trapped(found, "of the scales are no BF16 values")
    assert engines(found)["transformers"] is False
    (sglang,) = (row for row in found.engines if row.engine.startswith("SGLang"))
    assert "--quantization moe_wna16" in sglang.command and "EAGLE" not in sglang.command
    for word in ("w2_weight", "Intel AMX", "--format compressed-tensors", "dynamic does not exclude"):
        assert trapped(found, word), word


def test_zero_points_and_order(gptqmodel: dict[str, Path]) -> None:
    assert trapped(inspect(gptqmodel["asymmetric"]), "quantized asymmetrically")


def test_bf16(example_model: Path, tmp_path: Path) -> None:
    found = inspect(example_model)
    assert (found.quantized, found.draft, found.unknown) == (None, "fused", "")
    assert engines(found) == {"vLLM": True, "SGLang": True, "transformers": True}
    without = checkpoints.tiny(tmp_path / "lost", mtp=None)
    checkpoints.edit_json(without / "config.json", lambda raw: raw["text_config"].update(mtp_num_hidden_layers=1))
    assert trapped(inspect(without), "config.json names a draft head that is not there")


def test_what_is_not_known(tmp_path: Path) -> None:
    """Another quantization, another model: what can be seen is still said."""
    model = checkpoints.tiny(tmp_path / "model")
    settings = {"quant_method": "bitsandbytes", "bits": 4}
    checkpoints.edit_json(model / "config.json", lambda raw: raw.update(quantization_config=settings))
    found = inspect(model)
    assert "'bitsandbytes'" in found.unknown and found.engines == ()
    assert found.groups[0].group == "experts"
    checkpoints.edit_json(model / "config.json", lambda raw: raw.update(model_type="unheard", quantization_config=None))
    found = inspect(model)
    assert found.model_type == "unheard" and "expected one that transformers" in found.unknown
    (model / "adapter.bin").touch()
    (model / "tokenizer.json").unlink()
    assert trapped(inspect(model), "adapter.bin") and trapped(inspect(model), "no tokenizer")
    with pytest.raises(FourfoldError, match=r"no config\.json"):
        inspect(tmp_path)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("size", [0, -7, 10**30, 64])
def test_a_group_size_that_the_scales_do_not_have(
    shipped: dict[str, Path], shipped_source: Path, altered: Altered, tmp_path: Path, form: str, size: int
) -> None:
    """No command goes on with it as if all were well."""

    def change(raw: dict[str, Any]) -> None:
        settings = raw["quantization_config"]
        if "config_groups" in settings:
            settings = settings["config_groups"]["group_0"]["weights"]
        settings["group_size"] = size

    out = altered(shipped[form])
    checkpoints.edit_json(out / "config.json", change)

    def run(*words: object) -> tuple[int, str]:
        done = invoke(*words)
        return done.exit_code, " ".join(done.output.split())

    code, said = run("inspect", out)
    assert code == 2 or "loads it" not in said
    assert re.search(rf"group_size: got {size}\b", said.replace("...", "")) or size == 10**30
    if size == 64:
        assert code == 0 and "known issue: quantization_config.group_size: got 64, expected 128, as" in said
    for words in (
        ("convert", out, tmp_path / "new", "--format", "gptq_v2"),
        ("evaluate", out, "--source", shipped_source, "--windows", "2", "--length", "64", "--no-drafts", "--replace"),
        ("serve", out, "--engine", "vllm", "--print"),
    ):
        code, said = run(*words)
        assert code == 2 and "group_size: got" in said, said
    assert not (tmp_path / "new").exists()


def test_a_group_size_of_some_modules_alone(shipped: dict[str, Path], altered: Altered) -> None:
    """As GPTQModel's `dynamic` names one."""
    out = altered(shipped["gptq"])

    def change(raw: dict[str, Any]) -> None:
        settings = raw["quantization_config"]
        settings["group_size"] = 64
        settings["dynamic"]["+:.*experts.*"] = {"group_size": 128}

    checkpoints.edit_json(out / "config.json", change)
    assert not trapped(inspect(out), "group_size: got")


@pytest.mark.parametrize("hostile", [{"-:(.*.){25}!": {}}, {"+:(.*.){25}!": {"bits": 8}}])
def test_a_pattern_that_would_match_for_ever(
    shipped: dict[str, Path], altered: Altered, hostile: dict[str, object]
) -> None:
    out = altered(shipped["gptq"])
    checkpoints.edit_json(out / "config.json", lambda raw: raw["quantization_config"].update(dynamic=hostile))
    answered = invoke("inspect", str(out))
    assert answered.exit_code == 2, answered.output
    said = " ".join(answered.stderr.split())
    assert re.search(r"quantization_config(\.dynamic)?: a pattern", said) and "more than 5 s of CPU time" in said


def test_a_release_that_is_not_whole(shipped: dict[str, Path], tmp_path: Path) -> None:
    old = foreign.make(tmp_path / "old", "symmetric")
    checkpoints.edit(old, lambda tensors: tensors.pop("model.language_model.layers.0.mlp.gate.weight"))
    found = inspect(old)
    assert "layers.0.mlp.gate.weight is missing" in found.unknown
    assert found.quantized is not None and found.engines == ()
