"""A sample of the faults that benchmarks/faults.py tries, at least one of each kind: each is survived."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

import faults

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler makes the library of faults"),
]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Suite]:
    with faults.suite(tmp_path_factory.mktemp("faults")) as made:
        yield made


def test_stages_and_files_are_found(suite: faults.Suite) -> None:
    names = [fault.name for fault in suite.faults()]
    assert {"read 0", "solve 1", "finish fourfold.json", "small.toml", "OUT/.config.json.tmp"} <= {*names}
    assert len({fault.name for fault in suite.faults() if fault.late}) > 5 and len(names) > 300


@pytest.mark.parametrize("kind", faults.KINDS)
def test_a_fault_is_survived(suite: faults.Suite, kind: str) -> None:
    """The one in the middle of the run, and for I/O errors one of the text, too."""
    found = [fault for fault in suite.faults() if fault.kind == kind]
    chosen = [found[len(found) // 2], *(fault for fault in found if fault.name == "heldout.txt")][:2]
    for fault in chosen:
        outcome = suite.attempt(fault)
        assert outcome.result in ("unharmed", "resumed"), f"{fault}: {outcome.problem}\n{outcome.said}"


def test_a_release_of_other_bytes_is_not_survived(suite: faults.Suite) -> None:
    """The suite's own judgement can fail."""
    suite.wanted["recipe.toml"] += b"#"
    try:
        outcome = suite.attempt(faults.Fault(kind="kill", name="solve 0", at=8))
    finally:
        suite.wanted["recipe.toml"] = suite.wanted["recipe.toml"][:-1]
    assert (outcome.result, outcome.problem) == ("failed", "resumed: other bytes: recipe.toml")
