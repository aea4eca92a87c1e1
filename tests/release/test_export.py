"""What `convert` writes for engines of their own, without the engines: layouts, refusals, verify but for its runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

import checkpoints
import exports
import foreign
import releases
from command_line import invoke
from fourfold.api import verify
from fourfold.datatypes import FourfoldError
from fourfold.release.export import Options, export

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
        assert (found.projections, found.group_size, found.after) == (24, 128, "mlx")
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
    assert verdict.passed and verdict.levels == ("files", "source")
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


# --- GGUF -----------------------------------------------------------------------------------------------------------


def blocks(data: Any) -> Tensor:
    """Q4_0 rows in bytes as weights in float64, by docs/formats.md: a scale in fp16, 16 bytes of two nibbles."""
    block = torch.from_numpy(data.copy()).unflatten(-1, (-1, 18))
    scale = block[..., :2].contiguous().view(torch.float16).double()
    nibbles = torch.cat([block[..., 2:] & 15, block[..., 2:] >> 4], dim=-1)
    return ((nibbles.double() - 8) * scale).flatten(-2)


@pytest.mark.parametrize("form", [CT, GPTQ, "fp16"])
def test_gguf_from_each_format(shipped: dict[str, Path], tmp_path: Path, form: str) -> None:
    """Every expert's weights; scales that FP16 holds and BF16 does not, too. What is no expert is there."""
    found = export(shipped[form], tmp_path / "new", "gguf")
    assert found.settings == {"rest": "bf16", "mtp": True, "shard_bytes": 0} and "text only" in found.notes[0]
    assert found.notes[1].startswith("a GGUF is no larger with groups of 32 than with these of 128: `fourfold quantize")
    old = releases.tensors(shipped[form])
    reader = gguf.GGUFReader(tmp_path / "new" / f"{form}-Q4_0.gguf")
    new = {tensor.name: tensor for tensor in reader.tensors}
    for layer, expert, part, name in releases.expert_names("model.language_model.", range(2), 4):
        stack = new[f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight"]
        assert torch.equal(blocks(stack.data[expert]), releases.dequantize(old, name))
    embedding = new["token_embd.weight"].data.view("int16")
    assert torch.equal(
        torch.from_numpy(embedding.copy()), old["model.language_model.embed_tokens.weight"].view(torch.int16)
    )
    assert new["blk.2.nextn.eh_proj.weight"].tensor_type == gguf.GGMLQuantizationType.BF16
    content = releases.read_json(shipped[form] / "fourfold.json")["output"]["content"]
    assert reader.fields["fourfold.content"].contents() == content
    assert reader.fields["qwen35moe.block_count"].contents() == 3
    verdict = verify(tmp_path / "new", source=shipped[form])
    assert verdict.passed and len(verdict.checks) == 5


def test_gguf_without_drafts_in_shards(shipped: dict[str, Path], tmp_path: Path) -> None:
    found = export(shipped[CT], tmp_path / "new", "gguf", options=Options(mtp=False, shard_bytes=200_000, rest="q8_0"))
    assert "rounded to q8_0: not exact" in found.notes[1] and found.rest == "q8_0"
    *names, licence = sorted(found.files, key=lambda name: (name == "LICENSE", name))
    assert (
        licence == "LICENSE"
        and names[0] == f"compressed-tensors-Q4_0-00001-of-{len(names):05d}.gguf"
        and len(names) > 2
    )
    stored = [tensor for name in names for tensor in gguf.GGUFReader(tmp_path / "new" / name).tensors]
    assert not [tensor.name for tensor in stored if "nextn" in tensor.name or tensor.name.startswith("blk.2.")]
    kinds = {tensor.tensor_type.name for tensor in stored}
    assert kinds == {"F32", "Q4_0", "Q8_0"}
    assert verify(tmp_path / "new", source=shipped[CT]).passed


def test_verify_gguf_beside_its_release(shipped: dict[str, Path], tmp_path: Path) -> None:
    new = tmp_path / "new"
    export(shipped[CT], new, "gguf")
    reader = gguf.GGUFReader(next(new.glob("*.gguf")), "r+")
    for tensor in reader.tensors:
        if tensor.name in ("blk.1.ffn_down_exps.weight", "output_norm.weight"):
            tensor.data.reshape(-1)[40:44] = 0
    reader.fields["qwen35moe.expert_used_count"].parts[-1][0] = 3
    reader.data.flush()
    failed = {
        check.name: check.evidence for check in verify(new, source=shipped[CT]).checks if str(check.status) == "fail"
    }
    assert failed.keys() == {"sha256", "settings", "codes and scales", "other tensors"}
    assert failed["settings"] == "qwen35moe.expert_used_count is 3, expected 2"
    next(new.glob("*.gguf")).write_bytes(b"GGUF")
    failed = {
        check.name: check.evidence for check in verify(new, source=shipped[CT]).checks if str(check.status) == "fail"
    }
    assert failed.keys() == {"sha256", "complete"} and "cannot be read as GGUF" in failed["complete"]


def test_what_llama_cpp_has_no_code_for(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(shutil.copytree(qwen3, tmp_path / "out"))

    def split(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"

    checkpoints.edit_json(out / "tokenizer.json", split)
    assert "expected byte-level BPE with a regular expression that llama.cpp has (qwen2" in refused(
        out, tmp_path / "new", "gguf"
    )
    dense = exports.release(tmp_path / "dense", "qwen3_moe", dense_layers=[1])
    assert "layer 1 has no routed experts" in refused(dense, tmp_path / "new", "gguf")
    mixtral = exports.release(tmp_path / "mixtral", "mixtral")
    assert "model_type: got 'mixtral', expected one that --format gguf has" in refused(
        mixtral, tmp_path / "new", "gguf"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "the package gguf is not installed" in refused(qwen3, tmp_path / "new", "gguf")


# --- int8 beside int4 -----------------------------------------------------------------------------------------------

QKV, Z, OUT_PROJ = (
    f"model.language_model.layers.0.linear_attn.{name}." for name in ("in_proj_qkv", "in_proj_z", "out_proj")
)


def dequantized(folder: Path) -> dict[str, Tensor]:
    """Every weight with codes, by name with a dot at its end, in float64."""
    found = releases.tensors(folder)
    stems = [name.removesuffix("weight_packed") for name in found if name.endswith("weight_packed")]
    return {stem: releases.dequantize(found, stem) for stem in stems}


def q8_0(data: Any) -> Tensor:
    """Q8_0 rows in bytes as weights in float64, by docs/formats.md: a scale in fp16, 32 codes in int8."""
    block = torch.from_numpy(data.copy()).unflatten(-1, (-1, 34))
    scale = block[..., :2].contiguous().view(torch.float16).double()
    return (block[..., 2:].contiguous().view(torch.int8).double() * scale).flatten(-2)


def tiled(value: Tensor, axis: int = 0) -> Tensor:
    """Rows or columns of 2 K heads with 2 V heads of 32 each, by V head first."""
    return value.unflatten(axis, (2, 2, -1)).transpose(axis, axis + 1).flatten(axis, axis + 2)


def gguf_tensors(new: Path) -> dict[str, Any]:
    (path,) = new.glob("*.gguf")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_mlx_of_compact(compact: Path, tmp_path: Path) -> None:
    """Words of 8 bits as they are, biases of -128 scales; config.json names each module by its path in MLX."""
    found = export(compact, tmp_path / "new", "mlx")
    old, new = releases.tensors(compact), releases.tensors(tmp_path / "new")
    modules = [stem for stem in dequantized(compact) if ".experts." not in stem]
    assert (found.int8, found.projections) == (len(modules), len(dequantized(compact)))
    for stem in modules:
        assert torch.equal(new[f"{stem}weight"].view(torch.int32), old[f"{stem}weight_packed"])
        assert torch.equal(new[f"{stem}scales"], old[f"{stem}weight_scale"])
        assert torch.equal(new[f"{stem}biases"].double(), -128 * old[f"{stem}weight_scale"].double())
    stem = "mtp.layers.0.mlp.experts.3.up_proj.weight_packed"
    assert torch.equal(new["mtp.layers.0.mlp.switch_mlp.up_proj.weight"][3].view(torch.int32), old[stem])
    settings = releases.read_json(tmp_path / "new" / "config.json")["quantization"]
    paths = {stem.rstrip(".").replace("model.language_model", "language_model.model") for stem in modules}
    paths = {path.replace("lm_head", "language_model.lm_head") for path in paths}
    eight = {"group_size": 128, "bits": 8, "mode": "affine"}
    assert settings == {"group_size": 128, "bits": 4, "mode": "affine"} | dict.fromkeys(paths, eight)


@pytest.mark.parametrize("rest", ["bf16", "q8_0"])
def test_gguf_of_compact(compact: Path, tmp_path: Path, rest: str) -> None:
    """int8 as Q8_0 without rounding, V heads in llama.cpp's order, whatever becomes of matrices without codes."""
    found = export(compact, tmp_path / "new", "gguf", options=Options(rest=rest))
    wanted, new = dequantized(compact), gguf_tensors(tmp_path / "new")
    assert not any("dequantized" in note for note in found.notes)
    qkv = torch.cat([wanted[QKV][:128], tiled(wanted[QKV][128:])])
    names = {
        "blk.0.attn_qkv": qkv, "blk.0.attn_gate": tiled(wanted[Z]), "blk.0.ssm_out": tiled(wanted[OUT_PROJ], axis=1),
        "output": wanted["lm_head."], "blk.2.attn_q": wanted["mtp.layers.0.self_attn.q_proj."],
        "blk.1.ffn_down_shexp": wanted["model.language_model.layers.1.mlp.shared_expert.down_proj."],
    }  # fmt: skip
    for name, weight in names.items():
        tensor = new[f"{name}.weight"]
        assert tensor.tensor_type.name == "Q8_0" and torch.equal(q8_0(tensor.data), weight), name
    stack = new["blk.2.ffn_gate_exps.weight"]
    for expert in range(4):
        weight = wanted[f"mtp.layers.0.mlp.experts.{expert}.gate_proj."]
        assert stack.tensor_type.name == "Q4_0" and torch.equal(blocks(stack.data[expert]), weight)
    assert new["token_embd.weight"].tensor_type.name == ("Q8_0" if rest == "q8_0" else "BF16")
    assert verify(tmp_path / "new", source=compact).passed


def test_gguf_of_compact_without_drafts(compact: Path, tmp_path: Path) -> None:
    found = export(compact, tmp_path / "new", "gguf", options=Options(mtp=False))
    drafts = [stem for stem in dequantized(compact) if stem.startswith("mtp.")]
    assert found.projections == len(dequantized(compact)) - len(drafts)
    assert not any(name.startswith("blk.2.") for name in gguf_tensors(tmp_path / "new"))
    assert verify(tmp_path / "new", source=compact).passed


def test_heads_that_divide_groups(tmp_path: Path) -> None:
    """Columns of V heads of 16 leave their groups of 32, which cannot be done with codes and scales."""
    out = exports.release(tmp_path / "out", "qwen3_5_moe", 32, compact=True)
    shape = {"linear_value_head_dim": 16, "linear_num_value_heads": 8}
    checkpoints.edit_json(out / "config.json", lambda raw: raw["text_config"].update(shape))

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "linear_attn." in name]:
            below = name.partition("linear_attn.")[2]
            if below in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight"):
                tensors[name] = tensors[name].repeat_interleave(2, dim=0)
            elif below == "norm.weight":
                tensors[name] = tensors[name][:16]

    checkpoints.edit(out, narrow)
    found = export(out, tmp_path / "new", "gguf")
    (note,) = (note for note in found.notes if "dequantized" in note)
    assert "1 modules with codes were dequantized and rounded to bf16" in note and note.endswith(OUT_PROJ.rstrip("."))
    tensor = gguf_tensors(tmp_path / "new")["blk.0.ssm_out.weight"]
    heads = dequantized(out)[OUT_PROJ].unflatten(1, (2, 4, 16)).transpose(1, 2).flatten(1)
    assert tensor.tensor_type.name == "BF16"
    assert torch.equal(torch.from_numpy(tensor.data.copy()).view(torch.bfloat16), heads.float().bfloat16())
    assert verify(tmp_path / "new", source=out).passed


def exchange_scales(block: Any) -> None:
    block[[0, 4], :2] = block[[4, 0], :2]  # of two rows: the four blocks of a group have one


def shift_a_code(block: Any) -> None:
    block[5, 2 + 7] += 1


def untile_codes(block: Any) -> None:
    """V heads of attn_gate as they lie in the release, their scales in llama.cpp's order."""
    codes = block[:, 2:].reshape(2, 2, -1)
    block[:, 2:] = codes.swapaxes(0, 1).reshape(block[:, 2:].shape)


@pytest.mark.parametrize("change", [exchange_scales, shift_a_code, untile_codes])
def test_verify_sees_a_wrong_q8_0(compact: Path, tmp_path: Path, change: Callable[[Any], None]) -> None:
    export(compact, tmp_path / "new", "gguf")
    (path,) = (tmp_path / "new").glob("*.gguf")
    reader = gguf.GGUFReader(path, "r+")
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_gate.weight")
    change(tensor.data.reshape(-1, 34))
    reader.data.flush()
    checks = verify(tmp_path / "new", source=compact).checks
    failed = {check.name: check.evidence for check in checks if str(check.status) == "fail"}
    assert failed.keys() == {"sha256", "codes and scales"}
    assert Z.rstrip(".") in failed["codes and scales"]
    assert ("in_proj_z: 1 of" in failed["codes and scales"]) == (change is shift_a_code)


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_verify_sees_a_wrong_module_for_mlx(compact: Path, tmp_path: Path, part: str) -> None:
    export(compact, tmp_path / "new", "mlx")

    def change(tensors: dict[str, Tensor]) -> None:
        value = tensors[f"{Z}{part}"].view(torch.int32 if part == "weight" else torch.bfloat16)
        value[3] = value[4]

    checkpoints.edit(tmp_path / "new", change)
    settings = lambda raw: raw["quantization"].pop("language_model.lm_head")  # noqa: E731
    checkpoints.edit_json(tmp_path / "new" / "config.json", settings)
    checks = verify(tmp_path / "new", source=compact).checks
    failed = {check.name: check.evidence for check in checks if str(check.status) == "fail"}
    assert failed.keys() == {"sha256", "settings", "codes and scales"}
    differing = re.search(r"in_proj_z: (\d+) of 16,384 weights are not OUT's", failed["codes and scales"])
    assert differing is not None and int(differing[1]) > 120, failed  # of a row of 128, but for equal codes


# --- inspect, compare -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_compared_and_inspected(shipped: dict[str, Path], tmp_path: Path, form: str) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = invoke(*arguments, columns=300)
        return done.exit_code, done.output

    new = tmp_path / "new"
    export(shipped[CT], new, form)
    code, said = run("compare", new, shipped[GPTQ], "--equal", "--json")
    found = json.loads(said)
    assert code == 0 and found["same"] and found["formats"] == [form, GPTQ]
    assert (found["projections"], found["codes_changed"], found["codes"]) == (24, 0, 24 * 128 * 128)
    assert run("compare", shipped["fp16"], new, "--equal")[0] == 1
    code, said = run("inspect", new)
    assert code == 0 and "24 projections, one scale for 128 inputs" in said
    assert f"fourfold serve {new} --print" in said
    assert json.loads(run("inspect", new, "--json")[1])["after"] == form


# --- what is refused ------------------------------------------------------------------------------------------------


def test_releases_that_say_something_else(gptqmodel: dict[str, Path], tmp_path: Path) -> None:
    assert "was quantized asymmetrically" in refused(gptqmodel["asymmetric"], tmp_path / "new")
    old = foreign.make(tmp_path / "old", "symmetric")
    name = "model.language_model.layers.0.mlp.experts.1.up_proj.g_idx"
    checkpoints.edit(old, lambda tensors: tensors.update({name: tensors[name].flip(0)}))
    assert "in an order of its own" in refused(old, tmp_path / "new")


def test_scales_that_the_format_cannot_hold(shipped: dict[str, Path], tmp_path: Path) -> None:
    assert "scales are no bfloat16 values" in refused(shipped["fp16"], tmp_path / "new")


def test_experts_that_are_not_int4(qwen3: Path, tmp_path: Path) -> None:
    stem = "model.layers.1.mlp.experts.2.down_proj."

    def less(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}weight"] = releases.dequantize(tensors, stem).bfloat16()
        for suffix in ("packed", "scale", "shape"):
            del tensors[f"{stem}weight_{suffix}"]

    out = edited(qwen3, tmp_path / "out", less)
    assert f"{stem.rstrip('.')} is not int4" in refused(out, tmp_path / "new")


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
        done = invoke(*arguments, columns=300)
        return done.exit_code, done.output

    code, said = run("convert", example_model, tmp_path / "new", "--format", "mlx")
    assert code == 2 and "nothing in it is int4" in said
    code, said = run("convert", qwen3, tmp_path / "new", "--format", "gptq", "--no-mtp")
    assert code == 2 and "got --format gptq, expected --format gguf" in said
    code, said = run("convert", qwen3, tmp_path / "gguf", "--format", "gguf", "--rest", "f16", "--shard-size", "1MB")
    assert code == 0 and "--engine llama.cpp" in said and "rounded to f16" in said
    code, said = run("convert", qwen3, tmp_path / "new", "--format", "mlx")
    assert code == 0 and f"fourfold verify {tmp_path / 'new'} --source {qwen3} --engine mlx" in said
    code, said = run("verify", tmp_path / "new", "--json")
    assert code == 0 and json.loads(said)["passed"]
    code, said = run("verify", tmp_path / "new", "--engine", "mlx", "--python", shutil.which("python3"))
    assert code == 2 and "mlx: not installed in" in said
