"""Checks and the verdict over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourfold.datatypes import shortened
from fourfold.records.results import Check, Level, Status, Verdict
from fourfold.release.contents import VERDICT
from fourfold.release.signature import Signer, problems


def judge(level: Level, name: str, problems: Sequence[str], seen: str, **data: Any) -> Check:
    """A check that passes if there are no problems. seen: its evidence then; else the first problems are."""
    if not problems:
        return Check(level=level, name=name, status=Status.PASS, evidence=seen, data=data)
    return Check(level=level, name=name, status=Status.FAIL, evidence=shortened(problems), data=data)


def skip(level: Level, name: str, reason: str) -> Check:
    return Check(level=level, name=name, status=Status.NOT_RUN, evidence=reason)


def passed(levels: Sequence[Level], checks: Sequence[Check]) -> bool:
    """Return whether each requested level was run, and no check failed."""
    run = {check.level for check in checks if check.status is Status.PASS}
    return set(levels) <= run and not any(check.status is Status.FAIL for check in checks)


def check_signature(out: Path, signer: Signer | None) -> list[Check]:
    """The check of a signature that was asked for."""
    if signer is None:
        return []
    seen = f"all files but {VERDICT} are as {signer} signed them"
    return [judge(Level.FILES, "signature", problems(out, signer), seen)]


def write_verdict(folder: Path, source: object, runner: object, checks: Sequence[Check], **facts: Any) -> Verdict:
    """Write verify.json. source, runner: None where that level was not requested; facts: other fields of Verdict."""
    levels = (Level.FILES, *([Level.SOURCE] if source else []), *([Level.ENGINE] if runner else []))
    verdict = Verdict(passed=passed(levels, checks), levels=levels, checks=tuple(checks), **facts)
    verdict.write(folder / VERDICT)
    return verdict


def first_difference(first: Sequence[object], second: Sequence[object]) -> int | None:
    """Return the first place at which two sequences differ, as far as both go; None if there is none."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
