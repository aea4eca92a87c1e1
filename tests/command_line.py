"""The command line of fourfold: run in this process, where torch has been imported once, and listed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from cyclopts import App
from cyclopts.argument import ArgumentCollection

from fourfold.cli import main
from fourfold.cli.app import app


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


def commands(*words: str) -> Iterator[tuple[str, App, ArgumentCollection]]:
    """Every command below `fourfold WORDS`: its words, its application, its arguments and options."""
    with app.app_stack(words):
        command = app
        for word in words:
            command = command[word]
        arguments = ArgumentCollection()
        if command.default_command:
            arguments = command.assemble_argument_collection(parse_docstring=True).filter_by(show=True)
        yield " ".join(["fourfold", *words]), command, arguments
    for word in sorted(child for child in command if not child.startswith("-")):
        yield from commands(*words, word)
