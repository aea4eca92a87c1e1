"""Small finished releases that the tests of verify share; a test that changes one works on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import releases
from broken import Copy
from fourfold.recipe import load_recipe


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of qwen3_5_moe; experts and MTP fused, vision, every sidecar."""
    return releases.make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`source` in each format."""
    recipe = releases.write_recipe(tmp_path_factory.mktemp("recipe"))
    outs = {}
    for form in releases.FORMATS:
        outs[form] = source.parent / form
        releases.run(source, outs[form], load_recipe(str(recipe), [f'format="{form}"', "solver.passes=0"]))
    return outs


@pytest.fixture
def copy(made: dict[str, Path], tmp_path: Path) -> Callable[[str], Copy]:
    """copy(format): a release to break."""

    def make(form: str) -> Copy:
        shutil.copytree(made[form], tmp_path / "release", ignore=shutil.ignore_patterns("verify.json"))
        return Copy(tmp_path / "release")

    return make
