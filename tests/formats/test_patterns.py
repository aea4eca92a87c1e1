"""Patterns of strangers are matched as `re` matches them; what takes for ever is in the tests of the commands."""

from __future__ import annotations

import pytest

from fourfold.formats.patterns import match_patterns

NAMES = ["model.layers.0.mlp.gate", "model.layers.0.mlp.experts.7.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("patterns", "matched"),
    [
        (["^(?!.*\\.experts\\.\\d+\\.).*$"], {NAMES[0], NAMES[2]}),
        (["mlp"], set()),  # from the start
        (["lm_head", r".*gate$"], {NAMES[0], NAMES[2]}),
        ([], set()),
    ],
)
def test_what_is_matched(patterns: list[str], matched: set[str]) -> None:
    assert match_patterns(patterns, NAMES, "ignore") == (matched, "")


@pytest.mark.parametrize("pattern", ["(", "(" * 5000 + ")" * 5000, "a{99999999999}"])
def test_what_is_no_pattern(pattern: str) -> None:
    found, problem = match_patterns([pattern], NAMES, "ignore")
    assert not found and problem
