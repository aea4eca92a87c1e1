"""What is said of the project in files of their own is what pyproject.toml and the package say."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest
import yaml

import fourfold
from conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]


def constraints(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements(group: str | None = None) -> dict[str, str]:
    """Names with what stands behind them, of the dependencies or an extra."""
    listed = PROJECT["dependencies"] if group is None else PROJECT["optional-dependencies"][group]
    return {match[1]: match[2] for line in listed if (match := re.match(r"([\w.-]+)(?:\[.*\])?([^;]*)", line))}


def test_lowest_versions_are_the_lower_bounds() -> None:
    installed = requirements() | requirements("report") | requirements("tasks")
    bounds = {name: match[1] for name, text in installed.items() if (match := re.match(r">=([\d.]+)", text))}
    lowest = constraints("constraints-lowest.txt")
    assert lowest.keys() == bounds.keys()
    for name, bound in bounds.items():
        padded = [int(part) for part in lowest[name].split(".")]
        wanted = [int(part) for part in bound.split(".")]
        if name != "torch":  # the file says why
            assert padded[: len(wanted)] == wanted and not any(padded[len(wanted) :]), name


def test_what_the_tests_run_with_is_pinned() -> None:
    """But for what brings its own version: numba wants one of llvmlite; extras that no test needs."""
    pinned = {name.replace("-", "_") for name in constraints("constraints.txt")}
    named = {*requirements(), *requirements("report"), *requirements("dev")} - {"llvmlite", "fourfold"}
    exact = {name for name, text in requirements("dev").items() if text.startswith("==")}
    assert {name.replace("-", "_") for name in named - exact} <= pinned


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {"cuda", "dev", "report", "tasks"}


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fourfold.__version__
    assert citation["title"].startswith("fourfold") and citation["message"] and citation["authors"]


@pytest.mark.parametrize("pattern", [*PROJECT["license-files"], "src/fourfold/py.typed", "SECURITY.md", "CITATION.cff"])
def test_files_are_there(pattern: str) -> None:
    assert (ROOT / pattern).is_file()
