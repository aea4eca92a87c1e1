"""A check and what came of it; the verdict over all of them, as verify.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SHOWN = 3  # problems that a check's evidence names; the rest is a number


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_RUN = "not run"


class Level(StrEnum):
    """What a check looks at: OUT alone, OUT beside its source, OUT in an engine."""

    FILES = "files"
    SOURCE = "source"
    ENGINE = "engine"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One named check. evidence: what was seen, for people; data: the same for machines (JSON types)."""

    level: Level
    name: str
    status: Status
    evidence: str
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        fields = {"level": str(self.level), "name": self.name, "status": str(self.status), "evidence": self.evidence}
        return fields | ({"data": self.data} if self.data else {})


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


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All checks of one call, in order.

    asked: levels that the command asked for; engine: what an engine said of itself, None if none was asked for;
    content: of fourfold.json, files: sha256 of each file beside the shards, so that a reader can tell whether OUT is
    still what was verified.
    """

    out: str
    content: str
    asked: tuple[Level, ...]
    checks: tuple[Check, ...]
    engine: dict[str, Any] | None
    bytes_read: int
    seconds: dict[str, float]
    files: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether each level that was asked for was run, and no check failed."""
        run = {check.level for check in self.checks if check.status is Status.PASS}
        return set(self.asked) <= run and not any(check.status is Status.FAIL for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "content": self.content,
            "files": self.files,
            "levels": [str(level) for level in self.asked],
            "checks": [check.to_json() for check in self.checks],
            "engine": self.engine,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
