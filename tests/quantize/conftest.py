"""Finished runs that end-to-end tests share; a test that changes one works on a copy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import releases
from fourfold.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe as a file."""
    return releases.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def small(small_file: Path) -> MakeRecipe:
    """small("solver.passes=0", ...): the small recipe with overrides."""
    return lambda *overrides: load_recipe(str(small_file), overrides)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of qwen3_5_moe, linear and full attention; experts and MTP fused, vision, every sidecar."""
    return releases.make_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="session")
def release(source: Path, small: MakeRecipe) -> Path:
    """`source` quantized by the small recipe."""
    out = source.parent / "release"
    releases.run(source, out, small())
    return out
