"""What stands beside the product for people elsewhere: the GitHub Action, the job, the container, the workflow."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import ROOT


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """`fourfold` on PATH is this source."""
    script = tmp_path / "fourfold"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m fourfold "$@"\n')
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return found


def steps(release: Path, environment: dict[str, str]) -> list[int]:
    """Exit codes of the action's steps but for the first, which installs."""
    install, *others = read("action.yml")["runs"]["steps"]
    assert install["run"].startswith("python -m pip install")
    codes = []
    for step in others:
        assert step["env"] == {"RELEASE": "${{ inputs.release }}"}
        words = ["bash", "-e", "-c", step["run"]]
        codes.append(subprocess.run(words, env={**environment, "RELEASE": str(release)}, check=False).returncode)
    return codes


def test_the_action_passes_a_release_and_fails_a_damaged_one(
    shipped: dict[str, Path], altered: Any, environment: dict[str, str]
) -> None:
    assert steps(shipped["gptq"], environment) == [0, 0]
    copy = altered(shipped["gptq"])
    (copy / "model.safetensors.index.json").unlink()
    assert 0 not in steps(copy, environment)


def test_the_job_makes_a_plan(shipped_source: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    words = [sys.executable, str(ROOT / "examples/hf_job.py")]
    assert "hf jobs uv run" in subprocess.run(words, capture_output=True, text=True, check=False).stderr
    done = subprocess.run(
        [*words, str(shipped_source), "me/model", "--recipe", "fast", "--dry-run"],
        env={**environment, "OUT_FOLDER": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "publish" in done.stdout, done.stderr


def test_the_container_has_files_and_extras_that_are_there() -> None:
    """It was not built here: there is no docker."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    extras = re.findall(r"'\.\[([\w,]+)\]'", text)
    assert extras == ["report,gguf"] and "USER fourfold" in text.split("FROM")[-1]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert set((ROOT / ".gitignore").read_text(encoding="utf-8").split()) | {".git"} == set(ignored)


def test_the_workflow_calls_what_make_has() -> None:
    workflow = read(".github/workflows/release.yml")
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.findall(r"make ([\w-]+)", " ".join(runs)) == ["test-package"] and "test-package" in targets
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
