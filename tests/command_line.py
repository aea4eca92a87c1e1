"""The command line of fourfold: run in this process, where torch has been imported once, and listed."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

import make_reference
from cyclopts import App
from cyclopts.argument import ArgumentCollection

from fourfold.cli import main


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a command line gave. exception: a bug of ours, that Python would print with its traceback."""

    exit_code: int
    stdout: str
    stderr: str
    exception: Exception | None = None

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(*words: object, columns: int = 80) -> Answer:
    """Run `fourfold WORDS`, printing to pipes of so many columns."""
    code, exception = 1, None
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), mock.patch.dict(os.environ, COLUMNS=str(columns)):
        try:
            code = main([*map(str, words)])
        except Exception as bug:  # noqa: BLE001  the test looks at it
            exception = bug
    return Answer(exit_code=code, stdout=out.getvalue(), stderr=err.getvalue(), exception=exception)


def commands(*words: str) -> list[tuple[str, App, ArgumentCollection]]:
    """Every command below `fourfold WORDS`, by name: its words, its application, its arguments and options."""
    return sorted(make_reference.commands(*words), key=lambda command: command[0])
