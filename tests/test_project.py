"""What is said of the project in files of their own is what pyproject.toml and the package say."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
import types
from typing import Any

import pytest
import yaml

import fourfold
from conftest import ROOT
from fourfold import install

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
    installed = requirements()
    for extra in ("gguf", "report", "sign", "tasks"):
        installed |= requirements(extra)
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
    assert set(PROJECT["optional-dependencies"]) == {"cuda", "dev", "gguf", "report", "sign", "tasks"}


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fourfold.__version__
    assert citation["title"].startswith("fourfold") and citation["message"] and citation["authors"]


@pytest.mark.parametrize("pattern", [*PROJECT["license-files"], "src/fourfold/py.typed", "SECURITY.md", "CITATION.cff"])
def test_files_are_there(pattern: str) -> None:
    assert (ROOT / pattern).is_file()


# --- how it is installed ----------------------------------------------------------------------------------------------

DIRECT = {
    "index": None,
    "folder": {"url": "file:///home/me/fourfold", "dir_info": {"editable": True}},
    "git": {"url": "https://host/us/fourfold", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
}


@pytest.mark.parametrize(
    ("origin", "here", "elsewhere"),
    [
        ("index", "pip install 'fourfold[report]'", "pip install fourfold==1.2"),
        ("folder", "pip install 'fourfold[report] @ file:///home/me/fourfold'", "# fourfold 1.2"),
        ("git", "pip install 'fourfold[report] @ git+https://host/us/fourfold@abc'",
         "pip install git+https://host/us/fourfold@abc"),
    ],
)  # fmt: skip
def test_install_lines_repeat_what_was_done(
    origin: str, here: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = DIRECT[origin] and json.dumps(DIRECT[origin])
    distribution = types.SimpleNamespace(read_text=lambda name: recorded)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    assert install.pip_install("report") == here
    assert install.public_install("1.2") == elsewhere
    assert install.pip_install(option="--no-deps").startswith("pip install --no-deps ")


def test_no_text_names_a_package_that_is_on_no_index() -> None:
    """`pip install fourfold` finds nothing until it is published: then install.py says so, and docs may."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.ipynb")]
    texts += [path for path in (ROOT / "src").rglob("*.py") if path.name != "install.py"]
    named = re.compile(r"pip\s+install[^\n`]*?['\" ]fourfold\b(?!-)")
    found = [path.name for path in texts if named.search(path.read_text(encoding="utf-8"))]
    assert found == []
