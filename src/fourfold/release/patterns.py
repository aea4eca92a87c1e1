"""Regular expressions of a checkpoint's config.json, matched as engines match them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from fourfold.confined import Confined, ConfinedError, Limits, answer_requests
from fourfold.datatypes import FourfoldError

LIMITS = Limits(cpu_seconds=5, memory_bytes=2**30)


def match_patterns(patterns: Sequence[str], names: Collection[str], where: str) -> tuple[set[str], str]:
    """Return which names a pattern matches, from their start, and what is wrong with a pattern that is none.

    Python's own `re`, as in the engines, so that lookaheads work and nothing matches that would not match there.
    where: names the patterns in an error. Raises FourfoldError if they take too long or too much memory.
    """
    with Confined(__name__, LIMITS) as child:
        try:
            matched, problem = child.ask((list(patterns), list(names)))
        except ConfinedError as error:
            raise FourfoldError(
                f"{where}: a pattern among {len(patterns)} cannot be matched: {error}. An engine would hang on it: "
                "remove the pattern, or do not use this checkpoint"
            ) from None
    return set(matched), problem


def _match(request: tuple[list[str], list[str]]) -> tuple[list[str], str]:
    patterns, names = request
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except (re.error, RecursionError, OverflowError) as error:
        return [], str(error)
    return [name for name in names if any(pattern.match(name) for pattern in compiled)], ""


if __name__ == "__main__":
    answer_requests(_match, LIMITS)
