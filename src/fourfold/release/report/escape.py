"""Text of unknown origin in Markdown and in a page's scripts. YAML is written by huggingface_hub, HTML by Jinja."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

# What begins a construct of CommonMark or GitHub's dialect: anywhere; at the start of text; and links without brackets.
MARKS = re.compile(r"([\\`*\[\]{}|~$@]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])|:(?=//)|(?<=www)\.)", re.IGNORECASE)
LEADING = re.compile(r"^([#+=:-])|^(\d+)([.)])(?=\s|$)")
NUMBER = re.compile(r"-?\d")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


class Markdown(str):
    """Markdown that we wrote: put into a card as it is. Every other value is escaped."""


def clean(text: object) -> str:
    """On one line; control characters, line breaks and signs that turn the direction of text are replaced."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text))


def prose(text: object) -> Markdown:
    """Text as text, in a paragraph or a cell of a table: no markup, no HTML, no link."""
    escaped = MARKS.sub(r"\\\1", clean(text).strip())  # four spaces would begin a block of code
    escaped = LEADING.sub(r"\2\\\1\3", escaped)
    return Markdown("".join(ENTITIES.get(sign, sign) for sign in escaped))


def finalize(value: object) -> object:
    """What a card's template puts in for a value."""
    return value if isinstance(value, Markdown) else prose(value)


def code(text: object) -> Markdown:
    """Text as code, also in a cell of a table."""
    plain = clean(text).replace("|", "\N{BROKEN BAR}")  # a cell ends at "|", in code too
    fence = _longer(plain, "`")
    pad = " " if plain.startswith("`") or plain.endswith("`") or not plain.strip() else ""
    return Markdown(f"{fence}{pad}{plain}{pad}{fence}")


def block(text: str, language: str) -> Markdown:
    """Lines of code between fences; their breaks are kept."""
    lines = "\n".join(clean(line) for line in text.split("\n"))
    fence = _longer(lines, "`", 3)
    return Markdown(f"{fence}{language}\n{lines}\n{fence}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markdown:
    """A table whose cells are escaped unless they are Markdown. Columns of numbers are aligned right."""
    names, *cells = [[str(finalize(cell)) for cell in row] for row in (header, *rows)]
    columns = list(zip(*cells, strict=True)) if cells else [()] * len(header)
    numbers = (any(column) and all(NUMBER.match(cell) for cell in column if cell) for column in columns)
    rule = ["---:" if right else "---" for right in numbers]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in (names, rule, *cells)))


def script_json(value: Any) -> str:
    """JSON for a <script> element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _longer(text: str, sign: str, least: int = 1) -> str:
    """More of a sign in a row than there are anywhere in the text."""
    return sign * max([least, *(len(run) + 1 for run in re.findall(f"{sign}+", text))])
