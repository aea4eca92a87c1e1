"""Regular expressions of a checkpoint's config.json, matched as engines match them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fourfold.confined import Confined, ConfinedError, Limits, answer_requests
from fourfold.datatypes import FourfoldError

if TYPE_CHECKING:
    from fourfold.formats.format import Format

LIMITS = Limits(cpu_seconds=5, memory_bytes=2**30)


def match_patterns(patterns: Sequence[str], names: Collection[str], where: str) -> tuple[set[str], str]:
    """Return the names that a pattern matches from their start, and what is wrong with an invalid pattern.

    Python's own `re`, as in the engines. where: of the patterns, for an error. Raises FourfoldError if they take too
    long or too much memory.
    """
    with Confined(__name__, LIMITS) as child:
        try:
            matched, problem = child.ask((list(patterns), list(names)))
        except ConfinedError as error:
            fix = "An engine would hang on it: remove the pattern, or do not use this checkpoint"
            problem = f"a pattern among {len(patterns)} cannot be matched: {error}"
            raise FourfoldError(f"{where}: {problem}. {fix}") from None
    return set(matched), problem


def check_patterns(format: Format, settings: Mapping[str, Any], names: Collection[str]) -> None:
    """Match what decides the bits of modules once, confined. Raises FourfoldError where `format.bits` would not end."""
    where = "config.json: quantization_config"
    if (patterns := format.patterns(settings)) and (problem := match_patterns(patterns, names, where)[1]):
        raise FourfoldError(f"{where}: a pattern is no regular expression: {problem}. Engines stop at it")


def _match(request: tuple[list[str], list[str]]) -> tuple[list[str], str]:
    patterns, names = request
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except (re.error, RecursionError, OverflowError) as error:
        return [], str(error)
    return [name for name in names if any(pattern.match(name) for pattern in compiled)], ""


if __name__ == "__main__":
    answer_requests(_match, LIMITS)
