"""Small finished releases, and others as other tools write them, that the tests of this folder share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import foreign
import releases
from fourfold.recipe import load_recipe


@pytest.fixture(scope="session")
def shipped_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of qwen3_5_moe; experts and MTP fused, vision, every sidecar."""
    return releases.make_source(tmp_path_factory.mktemp("shipped") / "model")


@pytest.fixture(scope="session")
def shipped(shipped_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`shipped_source` in each format, and as "fp16": gptq with scales that are no BF16 values."""
    recipe = str(releases.write_recipe(tmp_path_factory.mktemp("recipe")))
    outs = {}
    for name in (*releases.FORMATS, "fp16"):
        form = "gptq" if name == "fp16" else name
        scales = ['scheme.scale_dtype="fp16"'] if name == "fp16" else []
        outs[name] = shipped_source.parent / name
        releases.run(shipped_source, outs[name], load_recipe(recipe, [f'format="{form}"', "solver.passes=0", *scales]))
    return outs


REST = ("attention", "linear_attention", "shared_experts", "head", "draft_dense")


@pytest.fixture(scope="session")
def compact(shipped_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shipped_source` with int8 modules and int4 draft experts."""
    folder = tmp_path_factory.mktemp("compact")
    rest = [f'scheme.rest.{part}="int8"' for part in REST]
    settings = [*rest, 'scheme.rest.draft_experts="int4"', "solver.passes=0"]
    releases.run(shipped_source, folder / "out", load_recipe(str(releases.write_recipe(folder)), settings))
    return folder / "out"


@pytest.fixture(scope="session")
def gptqmodel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with GPTQModel's own tensors: "symmetric" (gptq, groups of 64), "asymmetric" (gptq_v2, desc_act)."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    return {kind: foreign.make(folder / kind, kind) for kind in ("symmetric", "asymmetric")}


@pytest.fixture
def altered(tmp_path: Path) -> Callable[[Path], Path]:
    """altered(folder): a copy to change."""

    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "altered"))

    return make
