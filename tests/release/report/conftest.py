"""A small finished and verified release; a test that changes something works on a copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import releases
from fourfold.recipe import load_recipe
from fourfold.release.verify.run import verify
from hostile import Change


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    source = releases.make_source(folder / "models--Qwen--FromTheHub" / "snapshots" / "b")
    older = source.parent / "a"
    older.mkdir()
    (older / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n", encoding="utf-8")
    out = folder / "release"
    overrides = ["solver.passes=0", 'calibration.sources=[{builtin="general", rows=8}]']  # whose licence is known
    releases.run(source, out, load_recipe(str(releases.write_recipe(folder)), overrides))
    assert verify(out, model=source).passed
    return out


@pytest.fixture
def release(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "release"))


@pytest.fixture
def change(release: Path) -> Change:
    """change(file, function): a JSON file of `release`, changed in place."""

    def edit(name: str, edit: Callable[[Any], None]) -> None:
        content = json.loads((release / name).read_text(encoding="utf-8"))
        edit(content)
        (release / name).write_text(json.dumps(content), encoding="utf-8")

    return edit
