"""What `convert` writes for engines of their own, without the engines: layouts, refusals, verify but for its runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import checkpoints
import exports
import foreign
import releases
from fourfold import cli
from fourfold.api import verify
from fourfold.datatypes import FourfoldError
from fourfold.release.export import export

CT, GPTQ, V2 = releases.FORMATS


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exports.release(tmp_path_factory.mktemp("qwen3") / "out", "qwen3_moe", 64)


def edited(folder: Path, new: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, new)
    checkpoints.edit(new, change)
    return new


def refused(out: Path, new: Path, form: str = "mlx", **options: Any) -> str:
    with pytest.raises(FourfoldError) as raised:
        export(out, new, form, **options)
    assert not new.exists() and not new.with_name(f".{new.name}.converting").exists()
    return str(raised.value)


# --- MLX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", releases.FORMATS)
def test_mlx_from_each_format(shipped: dict[str, Path], tmp_path: Path, form: str) -> None:
    """The same words, stacked; scales as they are, biases of -8 scales; nothing else is touched."""
    if form == CT:
        found = export(shipped[form], tmp_path / "new", "mlx")
        assert (found.projections, found.group_size, found.engine) == (24, 128, "mlx")
    else:
        export(shipped[form], tmp_path / "new", "mlx")
    old, new = releases.tensors(shipped[CT]), releases.tensors(tmp_path / "new")
    for layer in range(2):
        for part in releases.PROJECTIONS:
            prefix = f"model.language_model.layers.{layer}.mlp."
            stack = {
                suffix: new.pop(f"{prefix}switch_mlp.{part}.{suffix}") for suffix in ("weight", "scales", "biases")
            }
            assert (stack["weight"].dtype, stack["scales"].dtype) == (torch.uint32, torch.bfloat16)
            for expert in range(4):
                stem = f"{prefix}experts.{expert}.{part}.weight_"
                words, scale = old.pop(f"{stem}packed"), old.pop(f"{stem}scale")
                del old[f"{stem}shape"]
                assert torch.equal(stack["weight"][expert].view(torch.int32), words)
                assert torch.equal(stack["scales"][expert], scale)
                assert torch.equal(stack["biases"][expert].double(), -8 * scale.double())
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    config = releases.read_json(tmp_path / "new" / "config.json")
    assert config["quantization"] == config["quantization_config"] == {"group_size": 128, "bits": 4, "mode": "affine"}


def test_keys_that_mlx_lm_wants(qwen3: Path, tmp_path: Path) -> None:
    export(qwen3, tmp_path / "new", "mlx")
    before, after = (releases.read_json(folder / "config.json") for folder in (qwen3, tmp_path / "new"))
    assert "rope_theta" not in before
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"] and after["num_experts"] == 4


def test_verify_mlx_beside_its_release(shipped: dict[str, Path], tmp_path: Path) -> None:
    out, new = shipped[CT], tmp_path / "new"
    export(out, new, "mlx")
    assert verify(new).passed
    verdict = verify(new, source=out)
    assert verdict.passed and [str(level) for level in verdict.asked] == ["files", "source"]
    with pytest.raises(FourfoldError, match="was not made from this release"):
        verify(new, source=shipped["fp16"])
    with pytest.raises(FourfoldError, match="--engine: got vllm, expected mlx"):
        verify(new, source=out, engine="vllm")
    with pytest.raises(FourfoldError, match="--engine: got mlx, expected vllm or sglang"):
        verify(out, engine="mlx")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.language_model.layers.0.mlp.switch_mlp.up_proj.biases"][1, 2, 0] *= -1
        tensors["model.language_model.norm.weight"][3] += 1
        tensors["extra"] = torch.zeros(1)

    checkpoints.edit(new, change)
    failed = {check.name: check.evidence for check in verify(new, source=out).checks if str(check.status) == "fail"}
    assert failed.keys() == {"sha256", "complete", "codes and scales", "other tensors"}
    assert "extra is extra" in failed["complete"]
    assert "experts.1.up_proj: 128 of 16,384 weights are not OUT's" in failed["codes and scales"]
    assert "model-00001" in failed["sha256"]
    assert failed["other tensors"] == "model.language_model.norm.weight is not what OUT makes"
    next(new.glob("*.safetensors")).write_bytes(b"no header")
    failed = {check.name: check.evidence for check in verify(new, source=out).checks if str(check.status) == "fail"}
    assert failed.keys() == {"sha256", "complete"}


# --- what is refused ------------------------------------------------------------------------------------------------


def test_releases_that_say_something_else(gptqmodel: dict[str, Path], tmp_path: Path) -> None:
    assert "was quantized asymmetrically" in refused(gptqmodel["asymmetric"], tmp_path / "new")
    old = foreign.make(tmp_path / "old", "symmetric")
    name = "model.language_model.layers.0.mlp.experts.1.up_proj.g_idx"
    checkpoints.edit(old, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    assert "in an order of its own" in refused(old, tmp_path / "new")


def test_scales_that_the_format_cannot_hold(shipped: dict[str, Path], tmp_path: Path) -> None:
    assert "scales are no bfloat16 values" in refused(shipped["fp16"], tmp_path / "new")


def test_more_or_less_than_experts(qwen3: Path, tmp_path: Path) -> None:
    stem = "model.layers.1.mlp.experts.2.down_proj."

    def attention(tensors: dict[str, Tensor]) -> None:
        for suffix in ("packed", "scale", "shape"):
            tensors[f"model.layers.0.self_attn.o_proj.weight_{suffix}"] = tensors[f"{stem}weight_{suffix}"].clone()
        rows = tensors.pop("model.layers.0.self_attn.o_proj.weight").shape[0]
        assert rows == 256

    one = edited(qwen3, tmp_path / "one", attention)
    assert "model.layers.0.self_attn.o_proj is int4" in refused(one, tmp_path / "new")

    def less(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}weight"] = releases.dequantize(tensors, stem).bfloat16()
        for suffix in ("packed", "scale", "shape"):
            del tensors[f"{stem}weight_{suffix}"]

    two = edited(qwen3, tmp_path / "two", less)
    assert f"{stem.rstrip('.')} is not int4" in refused(two, tmp_path / "new")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_type: got 'yarn'"),
        ({"sliding_window": 16, "use_sliding_window": True}, "sliding_window: got 16"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ],
)
def test_what_the_engine_computes_in_one_way(qwen3: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    out = Path(shutil.copytree(qwen3, tmp_path / "out"))
    checkpoints.edit_json(out / "config.json", lambda raw: raw.update(change))
    assert said in refused(out, tmp_path / "new")


def test_on_the_command_line(qwen3: Path, example_model: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, [str(one) for one in arguments], env={"COLUMNS": "300"})
        return done.exit_code, done.output

    code, said = run("convert", example_model, tmp_path / "new", "--format", "mlx")
    assert code == 2 and "nothing in it is int4" in said
    code, said = run("convert", qwen3, tmp_path / "new", "--format", "mlx")
    assert code == 0 and f"fourfold verify {tmp_path / 'new'} --source {qwen3} --engine mlx" in said
    code, said = run("verify", tmp_path / "new", "--json")
    assert code == 0 and json.loads(said)["passed"]
    code, said = run("verify", tmp_path / "new", "--engine", "mlx", "--python", shutil.which("python3"))
    assert code == 2 and "mlx: not installed in" in said
