"""A check and what came of it; the verdict over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fourfold.records.results import Check, Level, Status

SHOWN = 3  # problems that a check's evidence names; the rest is a number


def judge(level: Level, name: str, problems: Sequence[str], seen: str, **data: Any) -> Check:
    """A check that passes if there are no problems. seen: its evidence then; else the first problems are."""
    if not problems:
        return Check(level=level, name=name, status=Status.PASS, evidence=seen, data=data)
    return Check(level=level, name=name, status=Status.FAIL, evidence=listed(problems), data=data)


def skip(level: Level, name: str, reason: str) -> Check:
    return Check(level=level, name=name, status=Status.NOT_RUN, evidence=reason)


def listed(problems: Sequence[str]) -> str:
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def passed(levels: Sequence[Level], checks: Sequence[Check]) -> bool:
    """Whether each level that was asked for was run, and no check failed."""
    run = {check.level for check in checks if check.status is Status.PASS}
    return set(levels) <= run and not any(check.status is Status.FAIL for check in checks)
