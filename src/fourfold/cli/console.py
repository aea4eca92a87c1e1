"""Consoles, text of unknown origin, tables and JSON. Text from files is never markup."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 10_000  # columns: longer than any line of a table


def open_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no emoji codes, no guessed colours."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def plain(text: object) -> str:
    """Text of unknown origin on one line; control characters, and so terminal sequences, are replaced."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text))


def paragraphs(text: object) -> str:
    """The same with line breaks kept."""
    return "\n".join(map(plain, str(text).splitlines()))


def say(console: Console, text: str | Text, style: str | None = None) -> None:
    """Print a paragraph: wrapped between words on a terminal, on one line in a pipe."""
    console.print(text, style=style, soft_wrap=not console.is_terminal)


def warn(console: Console, label: str, text: object, style: str = "yellow") -> None:
    """Print "label: text" with a coloured label."""
    say(console, Text.assemble((f"{label}: ", style), paragraphs(text)))


def print_json(console: Console, value: Mapping[str, object]) -> None:
    """Print one JSON object on one line, and flush."""
    console.file.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
    console.file.flush()


def grid(*columns: str, right: int | None = None, header: bool = True) -> Table:
    """A table without lines. right: number of the first column that is aligned to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=header)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if right is None or number < right else "right")
    return table


def facts_table(columns: int = 2) -> Table:
    """A table of facts: a bold name, then its value."""
    table = grid(*[""] * columns, header=False)
    table.columns[0].style, table.columns[0].no_wrap = "bold", True
    return table


def show_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    table = facts_table()
    for name, value in facts:
        table.add_row(plain(name), plain(value))
    show_table(console, table)


def show_table(console: Console, table: Table) -> None:
    """Print a table: within a terminal's width; in a pipe at its full width, without trailing blanks."""
    if console.is_terminal:
        console.print(table)
        return
    for line in console.render_lines(table, console.options.update(width=PIPE_WIDTH), pad=False):
        console.print("".join(segment.text for segment in line).rstrip(), soft_wrap=True)
