"""Two columns of facts, and warnings. Text from files is never markup."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.terminal import paragraphs, plain, say, show_table


def facts_table() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def show_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and what is said of it."""
    table = facts_table()
    for name, said in facts:
        table.add_row(plain(name), plain(said))
    show_table(console, table)


def show_warnings(console: Console, warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        say(console, Text.assemble(("warning: ", "yellow"), paragraphs(warning)))
