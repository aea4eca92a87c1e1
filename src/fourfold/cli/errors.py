"""Exit codes, and what a user reads when a command line is wrong or a command fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cyclopts import CycloptsError, exceptions

from fourfold.cli.console import plain
from fourfold.datatypes import nearest

CHECK_FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # the last two as shells count: 128 and the signal
EXIT_CODES = "Exit codes: 0 done, 1 a check failed, 2 wrong usage or bad input, 130 interrupted, 143 terminated."


class Terminated(KeyboardInterrupt):
    """SIGTERM, as from a scheduler or `kill`: ends as Ctrl-C does, leaves nothing behind."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def when_stopped(advice: str, out: Path | None = None) -> Iterator[None]:
    """Add to Ctrl-C and SIGTERM what a user can do next, and to a bug where its log is: OUT/.fourfold/run.log."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        stopped.add_note(advice)
        raise
    except Exception as error:
        if out is not None and (log := out / ".fourfold" / "run.log").exists():
            error.add_note(f"The log of the run: {plain(log)}")
        raise


def usage_error(error: CycloptsError) -> str:
    """What is wrong with a command line, and where to read what is right."""
    command = " ".join(["fourfold", *(error.command_chain or ())])
    return f"{_problem(error)} Run `{command} --help` for usage."


def _problem(error: CycloptsError) -> str:
    argument = error.argument
    if isinstance(error, exceptions.UnknownCommandError) and error.unused_tokens and error.app:
        word = error.unused_tokens[0]
        return f"No such {'option' if word.startswith('-') else 'command'}: {word!r}.{nearest(word, [*error.app])}"
    if isinstance(error, exceptions.UnknownOptionError):
        word = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for one in error.argument_collection for name in one.names]
        return f"No such option: {word!r}.{nearest(word, known)}"
    if isinstance(error, exceptions.UnusedCliTokensError):
        return f"Unexpected argument: {' '.join(error.unused_tokens or ())!r}."
    if isinstance(error, exceptions.MissingArgumentError) and argument:
        kind = "option" if argument.name.startswith("-") else "argument"
        given = error.keyword or argument.tokens
        return f"{argument.name}: got no value." if given else f"Missing {kind} {argument.name!r}."
    if isinstance(error, exceptions.CoercionError) and argument and error.token:
        text, choices = error.token.value, argument.get_choices()
        if choices:
            return f"{argument.name}: got {text!r}, expected one of {', '.join(choices)}.{nearest(text, choices)}"
        if error.msg:
            return f"{argument.name}: {str(error.msg).removesuffix('.')}{'' if str(error.msg).endswith('?') else '.'}"
    return str(error)
