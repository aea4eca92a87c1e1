"""What `convert --format mlx` writes, in MLX on a CPU: bits, numbers beside transformers, verify and its failures."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import exports
import releases
from command_line import invoke
from fourfold.formats.mlx import MODEL_TYPES
from fourfold.release.export import export

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
CT = releases.FORMATS[0]
Made, Find, Rounded = Callable[..., Path], Callable[[str], Path], Callable[[str], tuple[Path, Tensor]]


def widen(folder: Path, new: Path) -> Path:
    """A copy with all floats in fp32, in which MLX's arithmetic on a CPU is exact enough to tell any wrong weight."""
    shutil.copytree(folder, new)
    for path in new.glob("*.safetensors"):
        tensors = {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return new


def logprobs(python: Path, engine: str, folders: list[Path], scratch: Path) -> list[Tensor]:
    outs = [scratch / f"{engine}-{place}.npy" for place in range(len(folders))]
    pairs = [str(path) for pair in zip(folders, outs, strict=True) for path in pair]
    numpy.save(scratch / "tokens.npy", [exports.TOKENS])
    command = [str(python), str(HERE / "mlx_logits.py"), engine, str(scratch / "tokens.npy"), *pairs]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return [torch.from_numpy(numpy.load(out)[0]) for out in outs]


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_weight_by_mlx_itself(python: Find, tmp_path: Path, group_size: int) -> None:
    """Scales of both signs, the largest and smallest among them: 0 differences."""
    out = exports.stretch_scales(exports.release(tmp_path / "out", "qwen3_moe", group_size, compact=True))
    export(out, tmp_path / "new", "mlx")
    target = tmp_path / "weights.safetensors"
    dequantize = [str(python("mlx")), str(HERE / "mlx_dequantize.py"), str(tmp_path / "new"), str(target)]
    subprocess.run(dequantize, check=True, timeout=300)
    found, wanted = load_file(target), exports.dequantized(out)
    modules = [name for name in found if ".switch_mlp." not in name]
    assert len(modules) == 9 and len(found) == 6 + 9
    for name in modules:
        assert torch.equal(found.pop(name), wanted[name])
    for name, stack in found.items():
        before, _, part = name.partition(".switch_mlp.")
        for expert, weight in enumerate(stack):
            assert torch.equal(weight, wanted[f"{before}.experts.{expert}.{part}"])


@pytest.mark.parametrize("family", [*MODEL_TYPES, "compact qwen3_5_moe", "compact glm4_moe"])
def test_numbers_are_those_of_transformers(python: Find, rounded: Rounded, tmp_path: Path, family: str) -> None:
    out, wanted = rounded(family)
    export(out, tmp_path / "new", "mlx")
    folders = [widen(tmp_path / "new", tmp_path / "wide"), tmp_path / "new"]
    wide, shipped = logprobs(python("mlx"), "mlx_lm", folders, tmp_path)
    assert exports.divergence(wanted, wide) < 1e-9
    assert exports.divergence(wanted, shipped) < 1e-2


def test_int8_in_mlx_vlm(python: Find, rounded: Rounded, tmp_path: Path) -> None:
    """It goes by config.json's names of modules; so does the drafter that it makes of the draft head."""
    out, wanted = rounded("compact qwen3_5_moe")
    export(out, tmp_path / "new", "mlx")
    (found,) = logprobs(python("mlx"), "mlx_vlm", [widen(tmp_path / "new", tmp_path / "wide")], tmp_path)
    assert exports.divergence(wanted, found) < 1e-9
    split = [str(python("mlx")), "-m", "mlx_vlm.split_mtp", "--model", str(tmp_path / "new"), "--output"]
    subprocess.run([*split, str(tmp_path / "drafter")], check=True, capture_output=True, timeout=300)
    settings = releases.read_json(tmp_path / "drafter" / "config.json")["quantization"]
    assert settings["layers.0.self_attn.q_proj"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert (settings["bits"], settings["group_size"]) == (4, 32)


def run(*arguments: object) -> int:
    done = invoke(*arguments)
    print(done.output)
    return done.exit_code


def verify(new: Path, out: Path, python: Find) -> tuple[int, dict[str, Any]]:
    code = run("verify", new, "--source", out, "--engine", "mlx", "--python", python("mlx"))
    return code, {check["name"]: check for check in json.loads((new / "verify.json").read_text())["checks"]}


@pytest.fixture(scope="module")
def exported(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    new = tmp_path_factory.mktemp("mlx") / "new"
    assert run("convert", made(CT), new, "--format", "mlx") == 0
    return new


@pytest.fixture(scope="module")
def verified(made: Made, exported: Path, python: Find) -> tuple[int, dict[str, Any]]:
    """Exit code and checks of `verify` in the engine. verify.json then lies in `exported`."""
    return verify(exported, made(CT), python)


def test_the_example(
    made: Made, exported: Path, verified: tuple[int, dict[str, Any]], python: Find, tmp_path: Path
) -> None:
    """One command writes it, another proves it in the engine. mlx-vlm reads it, and the release itself."""
    code, checks = verified
    assert code == 0 and {check["status"] for check in checks.values()} == {"pass"}
    assert checks["KL divergence"]["data"]["mean"] < 1e-3
    wanted = exports.logprobs(made(CT), tmp_path / "fp32")
    for found in logprobs(python("mlx"), "mlx_vlm", [exported, made(CT)], tmp_path):
        assert exports.divergence(wanted, found) < 1e-2


def test_compact(made: Made, python: Find, tmp_path: Path) -> None:
    assert run("convert", made(CT, "compact"), tmp_path / "new", "--format", "mlx") == 0
    code, checks = verify(tmp_path / "new", made(CT, "compact"), python)
    assert code == 0 and {check["status"] for check in checks.values()} == {"pass"}
    assert checks["KL divergence"]["data"]["mean"] < 1e-2


def test_report_and_publish(exported: Path, verified: tuple[int, dict[str, Any]], tmp_path: Path) -> None:
    exports.check_published(Path(shutil.copytree(exported, tmp_path / "new")), verified[1], "mlx")


def exchange(tensors: dict[str, Tensor]) -> None:
    """Gate and up of all experts."""
    gates = [name for name in tensors if ".switch_mlp.gate_proj." in name]
    for gate in gates:
        up = gate.replace("gate_proj", "up_proj")
        tensors[gate], tensors[up] = tensors[up], tensors[gate]


def turn_nibbles(tensors: dict[str, Tensor]) -> None:
    """The high nibble of each byte first."""
    for name in [name for name in tensors if ".switch_mlp." in name and name.endswith(".weight")]:
        byte = tensors[name].view(torch.uint8)
        tensors[name] = (byte >> 4 | byte << 4).view(tensors[name].dtype)


@pytest.mark.parametrize("change", [exchange, turn_nibbles])
def test_what_loads_and_is_wrong(
    made: Made, exported: Path, python: Find, tmp_path: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    """Beside OUT, and in the engine alone."""
    new = Path(shutil.copytree(exported, tmp_path / "new"))
    for path in new.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    code, checks = verify(new, made(CT), python)
    assert code == 1 and checks["starts"]["status"] == "pass"
    failed = {name for name, check in checks.items() if check["status"] == "fail"}
    assert failed == {"sha256", "codes and scales", "KL divergence"}
    assert checks["KL divergence"]["data"]["mean"] > 0.1
