"""What `convert --format gguf` writes, in llama.cpp on a CPU: bits, numbers, tokens, drafts, verify, its failures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from torch import Tensor

import checkpoints
import exports
import releases
from command_line import invoke
from fourfold.formats.gguf_names import ARCHITECTURES
from fourfold.formats.gguf_tokenizer import PRE
from fourfold.release.export import Options, export
from fourfold.release.verify.engine import Answer, Engine

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
CT = releases.FORMATS[0]
VOCABULARY = checkpoints.VOCABULARY
Made, Find, Rounded = Callable[..., Path], Callable[[str], Path], Callable[[str], tuple[Path, Tensor]]
Change = Callable[[str, numpy.ndarray], numpy.ndarray]
FLOATS = gguf.GGMLQuantizationType.F32


def read(path: Path) -> dict[str, Any]:
    """Tensors of a file by name, through gguf's own reader."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def rewrite(path: Path, new: Path, change: Change | None = None) -> Path:
    """A copy of a file with every tensor changed, or without `change` every one in fp32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(new, reader.fields["general.architecture"].contents())
    for key, value in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = value.types[-1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, value.contents(), value.types[0], sub_type=sub)
    for tensor in reader.tensors:
        if change is None:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, value, raw_dtype=FLOATS)
        else:
            value = change(tensor.name, numpy.array(tensor.data))
            writer.add_tensor(tensor.name, value, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return new


def only(folder: Path) -> Path:
    (path,) = folder.glob("*.gguf")
    return path


def ask(python: Path, model: Path, scratch: Path, **options: Any) -> Answer:
    """The product's own script; log-probabilities of the whole vocabulary after each of exports.TOKENS."""
    engine = Engine(name="llama.cpp", python=python, logs=scratch, limit_seconds=300)
    tokens = [*exports.TOKENS, 0]
    request = {"model": str(model), "tokens": tokens, "likeliest": [list(range(VOCABULARY))] * len(exports.TOKENS)}
    defaults = {"texts": [], "drafts": False, "candidates": VOCABULARY, "wide": True}
    answer = engine.ask("llama_cpp_engine.py", "test", request | defaults | options)
    assert not answer.failure, answer.failure
    return answer


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_weight_by_gguf_itself(tmp_path: Path, group_size: int) -> None:
    """Scales of both signs, the largest and smallest among them: 0 differences."""
    out = exports.stretch_scales(exports.release(tmp_path / "out", "qwen3_moe", group_size, compact=True))
    export(out, tmp_path / "new", "gguf")
    wanted, found = exports.dequantized(out), read(only(tmp_path / "new"))
    modules = {"output": "lm_head", "blk.1.attn_q": "model.layers.1.self_attn.q_proj"}
    for name, module in modules.items():
        tensor = found[f"{name}.weight"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weight, wanted[f"{module}.weight"])
    for layer in range(2):
        for part in ("gate", "up", "down"):
            tensor = found[f"blk.{layer}.ffn_{part}_exps.weight"]
            assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
            for expert, weight in enumerate(gguf.quants.dequantize(tensor.data, tensor.tensor_type)):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                assert torch.equal(torch.from_numpy(weight), wanted[name])


COMPACT = [f"compact {family}" for family in ("qwen3_5_moe", "qwen3_next", "glm4_moe")]


@pytest.mark.parametrize("family", [*ARCHITECTURES, *COMPACT])
def test_numbers_are_those_of_transformers(python: Find, rounded: Rounded, tmp_path: Path, family: str) -> None:
    out, wanted = rounded(family)
    export(out, tmp_path / "new", "gguf")
    shipped = only(tmp_path / "new")
    wide = ask(python("llama.cpp"), rewrite(shipped, tmp_path / "wide.gguf"), tmp_path)
    assert exports.divergence(wanted, torch.tensor(wide.content["logprobs"])) < 1e-9
    found = ask(python("llama.cpp"), shipped, tmp_path)
    assert exports.divergence(wanted, torch.tensor(found.content["logprobs"])) < 5e-3


def test_other_tensors_are_those_of_llama_cpps_converter(python: Find, rounded: Rounded, tmp_path: Path) -> None:
    """Byte for byte, of every architecture; names, shapes and settings too."""
    pairs = []
    for family in ARCHITECTURES:
        out, _ = rounded(family)
        export(out, tmp_path / family, "gguf")
        pairs += [str(out), str(tmp_path / f"{family}.gguf")]
    converter = python("llama.cpp").parents[1] / "converter"
    command = [sys.executable, str(HERE / "gguf_converter.py"), str(converter), *pairs]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    for family in ARCHITECTURES:
        ours, theirs = gguf.GGUFReader(only(tmp_path / family)), gguf.GGUFReader(tmp_path / f"{family}.gguf")
        found, wanted = ({tensor.name: tensor for tensor in reader.tensors} for reader in (ours, theirs))
        assert found.keys() == wanted.keys()
        assert any("nextn" in name for name in found) == (family in exports.DRAFTS or family == "qwen3_5_moe")
        for name, tensor in found.items():
            assert tensor.shape.tolist() == wanted[name].shape.tolist(), name
            if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
                continue
            assert tensor.tensor_type == wanted[name].tensor_type, name
            one, other = tensor.data, wanted[name].data
            assert one.tobytes() == other.tobytes() or numpy.array_equal(numpy.nextafter(one, other), other), name
        settings = {key: value for key, value in theirs.fields.items() if not key.startswith(("GGUF.", "general."))}
        for key, field in settings.items():
            assert ours.fields[key].contents() == field.contents(), key
            assert ours.fields[key].types == field.types, key
        assert {key for key in ours.fields if not key.startswith("fourfold.")} >= settings.keys()


def run(*arguments: object) -> int:
    done = invoke(*arguments)
    print(done.output)
    return done.exit_code


def verify(new: Path, out: Path, python: Find) -> tuple[int, dict[str, Any]]:
    code = run("verify", new, "--source", out, "--engine", "llama.cpp", "--python", python("llama.cpp"))
    return code, {check["name"]: check for check in json.loads((new / "verify.json").read_text())["checks"]}


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    new = tmp_path_factory.mktemp("gguf") / "new"
    assert run("convert", made(CT), new, "--format", "gguf") == 0
    return new


@pytest.fixture(scope="module")
def verified(made: Made, exported: Path, python: Find) -> tuple[int, dict[str, Any]]:
    """Exit code and checks of `verify` in the engine. verify.json then lies in `exported`."""
    return verify(exported, made(CT), python)


def test_the_example(verified: tuple[int, dict[str, Any]]) -> None:
    """One command writes it, another proves it in the engine: numbers, tokens, drafts."""
    code, checks = verified
    assert code == 0 and {check["status"] for check in checks.values()} == {"pass"}
    assert checks["KL divergence"]["data"]["mean"] < 1e-3
    drafts = checks["same tokens with MTP"]["data"]
    assert 0 < drafts["accepted"] <= drafts["drafted"]


def test_compact(made: Made, python: Find, tmp_path: Path) -> None:
    """int8 modules and drafts by int4 experts, in the engine."""
    assert run("convert", made(CT, "compact"), tmp_path / "new", "--format", "gguf") == 0
    code, checks = verify(tmp_path / "new", made(CT, "compact"), python)
    assert code == 0 and {check["status"] for check in checks.values()} == {"pass"}
    assert checks["KL divergence"]["data"]["mean"] < 1e-3 and checks["same tokens with MTP"]["data"]["accepted"]


def test_report_and_publish(exported: Path, verified: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    exports.check_published(Path(shutil.copytree(exported, tmp_path / "new")), verified[1], "llama.cpp")


@pytest.mark.parametrize(
    ("options", "divergence"),
    [
        (Options(mtp=False), 1e-3),
        (Options(shard_bytes=2_000_000), 1e-3),
        (Options(rest="q8_0"), 1e-2),
        (Options(rest="f16"), 1e-3),
    ],
)  # fmt: skip
def test_options(made: Made, python: Find, tmp_path: Path, options: Options, divergence: float) -> None:
    found = export(made(CT), tmp_path / "new", "gguf", options=options)
    assert len(found.files) > 3 if options.shard_bytes else len(found.files) == 1
    code, checks = verify(tmp_path / "new", made(CT), python)
    assert code == 0 and checks["KL divergence"]["data"]["mean"] < divergence
    assert checks["same tokens with MTP"]["status"] == ("pass" if options.mtp else "not run")


@pytest.mark.parametrize("expression", PRE)
def test_tokens_of_each_expression(python: Find, rounded: Rounded, tmp_path: Path, expression: str) -> None:
    out = Path(shutil.copytree(rounded("qwen3_moe")[0], tmp_path / "out"))

    def change(content: dict[str, Any]) -> None:
        content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = expression

    checkpoints.edit_json(out / "tokenizer.json", change)
    export(out, tmp_path / "new", "gguf")
    code, checks = verify(tmp_path / "new", out, python)
    assert code == 0 and checks["tokenizer"]["status"] == "pass"
    field = gguf.GGUFReader(only(tmp_path / "new")).fields["tokenizer.ggml.pre"]
    assert field.contents() == PRE[expression]


# --- what loads without an error and is wrong -------------------------------------------------------------------------


def grouped_heads(name: str, value: numpy.ndarray) -> numpy.ndarray:
    """V heads as they lie in the release: the inverse of tiling, for two K heads with two V heads each."""

    def back(rows: numpy.ndarray) -> numpy.ndarray:
        shape = rows.shape
        return rows.reshape(2, 2, shape[0] // 4, *shape[1:]).swapaxes(0, 1).reshape(shape)

    below = name.split(".", 2)[-1]
    if below in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return numpy.concatenate([value[: len(value) // 2], back(value[len(value) // 2 :])])
    if below in ("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"):
        return back(value)
    if below == "ssm_out.weight":
        width = value.shape[1] // 4
        return value.reshape(-1, 2, 2, width).swapaxes(1, 2).reshape(value.shape)
    return value


def no_one_in_norms(name: str, value: numpy.ndarray) -> numpy.ndarray:
    return value - 1 if name.endswith("norm.weight") and "ssm_norm" not in name else value


def nibbles_side_by_side(name: str, value: numpy.ndarray) -> numpy.ndarray:
    """Weights 2 j and 2 j + 1 in byte j of a block, as a release has them."""
    if not name.endswith("_exps.weight") or name.startswith("blk.4."):
        return value
    block = value.reshape(-1, 18)
    nibbles = numpy.concatenate([block[:, 2:] & 15, block[:, 2:] >> 4], axis=1)
    block[:, 2:] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return value


def positive_decay(name: str, value: numpy.ndarray) -> numpy.ndarray:
    return -value if name.endswith("ssm_a") else value


def exchanged(stored: Mapping[str, Any]) -> Change:
    def change(name: str, value: numpy.ndarray) -> numpy.ndarray:
        other = name.replace("gate_exps", "#").replace("up_exps", "gate_exps").replace("#", "up_exps")
        return numpy.array(stored[other].data) if other != name and "_exps" in name else value

    return change


@pytest.mark.parametrize(
    "change", [grouped_heads, no_one_in_norms, nibbles_side_by_side, positive_decay, exchanged]
)  # fmt: skip
def test_what_loads_and_is_wrong(made: Made, exported: Path, python: Find, tmp_path: Path, change: Any) -> None:
    """Beside OUT, and in the engine alone."""
    new = Path(shutil.copytree(exported, tmp_path / "new"))
    path = only(exported)
    rewrite(path, only(new), exchanged(read(path)) if change is exchanged else change)
    code, checks = verify(new, made(CT), python)
    assert code == 1 and checks["starts"]["status"] == "pass"
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    where = "codes and scales" if change in (nibbles_side_by_side, exchanged) else "other tensors"
    assert failed >= {"sha256", where, "KL divergence"}
    assert change is positive_decay or checks["KL divergence"]["data"]["mean"] > 0.1
