"""The documentation as a site: pages of docs/, and reference pages that are made of the code, by Zensical.

    python docs/make_site.py            # build/site; a warning, such as a broken link, is an error
    python docs/make_site.py --pages    # the pages alone, into build/docs

Reference pages are never committed: what they say stands in Typer's app, in the dataclasses of recipes and in
docstrings. docs/reference/ has a few words in the place of each, where links lead outside the site.
"""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from results import table

import fourfold
from fourfold import bundled, cli, options
from fourfold import recipe as recipes
from fourfold.datatypes import Event
from fourfold.quantize.plan import LayerPlan, Plan
from fourfold.quantize.summary import Summary
from fourfold.release.verify.check import Check, Verdict

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"
CONFIG = ROOT / "zensical.toml"
SECTIONS = ("Args", "Returns", "Raises")  # of a docstring
TABLES = {  # of a recipe: TOML name of each table, and what reads it
    "": recipes.Recipe,
    "scheme": recipes.Scheme,
    "solver": recipes.Solver,
    "guidance": recipes.Guidance,
    "calibration": recipes.Calibration,
    "calibration.sources": recipes.Source,
    "heldout": recipes.Heldout,
}


def cell(text: object) -> str:
    """Text as text, in a cell of a table."""
    return html.escape(" ".join(str(text).split()), quote=False).replace("|", "\\|")


# --- the command line --------------------------------------------------------------------------------------------


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A command and those below it, each with the words that call it."""
    yield name, command
    for child, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {child}")


def cli_page() -> str:
    """Every command with its help, its arguments and options, as Typer has them."""
    parts = ["# Command line", f"{options.EXIT_CODES} [More about them](../exit-codes.md)."]
    for name, command in commands(typer.main.get_command(cli.app), "fourfold"):
        parts += [f"## {name}", "\n\n".join(map(cell, inspect.cleandoc(command.help).split("\n\n")))]
        if rows := [parameter_row(parameter) for parameter in command.params]:
            parts.append(table(("", "", "left out"), rows))
        examples = (command.epilog or "").replace("\b", "").partition(options.EXIT_CODES)[0]
        lines = [line.strip() for line in re.sub("Examples?:", "", examples).splitlines() if line.strip()]
        parts.append("\n".join(["```bash", *lines, "```"]))
    return "\n\n".join(parts) + "\n"


def parameter_row(parameter: Any) -> tuple[str, str, str]:
    """Names, help and default of an argument or option."""
    flag = getattr(parameter, "is_flag", False)
    if parameter.param_type_name == "argument":
        names = f"`{parameter.metavar}`"
    else:
        value = "" if flag else f" {parameter.metavar}"
        names = ", ".join(f"`{name}{value}`" for name in (*parameter.opts, *parameter.secondary_opts))
    shown = not flag and parameter.default not in (None, "")
    default = "must be given" if parameter.required else f"`{parameter.default}`" if shown else ""
    return names.replace("|", "\\|"), cell(parameter.help), default


# --- recipes -----------------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe with its default, the values that it takes and what it means; the presets."""
    parts = [
        "# Recipes",
        "What `quantize` does to a model, as TOML. Keys that a file leaves out are those of the preset `best`; an "
        "unknown key or value is an error that names the nearest. `--set solver.damp=0.02` changes one value.",
        "## Presets",
        table(("name", ""), [(f"`{name}`", recipes.load_recipe(name).description) for name in recipes.recipe_names()]),
    ]
    best = recipes.load_recipe("best")
    for name, kind in TABLES.items():
        brackets = f"[[{name}]]" if name.endswith("sources") else f"[{name}]"
        parts.append(f"## `{brackets}`" if name else "## At the top")
        introduction, meanings = split_docstring(kind)
        parts.append(introduction)
        values = dict[str, object]() if name.endswith("sources") else vars(getattr(best, name) if name else best)
        rows = [
            (f"`{field.name}`", default(field, values), wanted(f"{name}.{field.name}".lstrip("."), field),
             meanings.get(field.name, ""))
            for field in dataclasses.fields(kind)
            if field.name not in TABLES and f"{name}.{field.name}" not in TABLES
        ]  # fmt: skip
        parts.append(table(("key", "`best`" if values else "left out", "values", ""), rows))
    texts = {"calibration": bundled.CALIBRATION_TEXTS, "held-out": bundled.HELDOUT_TEXTS}
    rows = [
        (f"`{name}`", use, text.title, text.licence) for use, bundle in texts.items() for name, text in bundle.items()
    ]
    parts += ["## Texts that ship with fourfold", table(("`builtin`", "for", "text", "licence"), rows)]
    return "\n\n".join(parts) + "\n"


def split_docstring(kind: type) -> tuple[str, dict[str, str]]:
    """What a dataclass's docstring says of the whole, and of each field: `name: meaning; other: meaning.`"""
    names = "|".join(field.name for field in dataclasses.fields(kind))
    text = " ".join(inspect.getdoc(kind).split())
    head, *rest = re.split(rf"(?:^|(?<=[;.)] ))({names}): ", text)
    return cell(head), {name: cell(meaning.rstrip(" ;.")) for name, meaning in zip(rest[::2], rest[1::2], strict=True)}


def default(field: dataclasses.Field[Any], values: dict[str, object]) -> str:
    if field.name in values:
        return f"`{toml(values[field.name])}`"
    return "must be given" if field.default is dataclasses.MISSING else f"`{toml(field.default)}`"


def toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def wanted(key: str, field: dataclasses.Field[Any]) -> str:
    """The values that a key takes: a list of them, a range, or a type."""
    if key in recipes.CHOICES:
        return ", ".join(f"`{toml(choice)}`" for choice in recipes.CHOICES[key])
    if key in recipes.RANGES:
        low, high = recipes.RANGES[key]
        return f"{low:,} to {high:,}"
    return {"str": "text", "bool": "`true`, `false`", "tuple[str, ...]": "list of text"}[str(field.type)]


# --- Python ------------------------------------------------------------------------------------------------------


def python_page() -> str:
    """The functions of `import fourfold`, and what they give."""
    parts = ["# Python", cell(inspect.getdoc(fourfold.api).partition("\n\n")[2].partition("\n\n")[0])]
    for name in ("plan", "quantize", "evaluate", "verify"):
        stage = getattr(fourfold, name)
        parts += [f"## fourfold.{name}", signature(name, stage), *docstring(stage)]
    parts.append("## What they give and raise")
    for kind in (Plan, LayerPlan, Summary, Verdict, Check, Event, fourfold.FourfoldError):
        parts += [f"### {kind.__name__}", f"`{kind.__module__}.{kind.__name__}`", *docstring(kind)]
        if dataclasses.is_dataclass(kind):
            rows = [(f"`{field.name}`", f"`{cell(field.type)}`") for field in dataclasses.fields(kind)]
            parts.append(table(("field", "type"), rows))
    return "\n\n".join(parts) + "\n"


def signature(name: str, stage: Any) -> str:
    lines, starred = [], False
    for parameter in inspect.signature(stage).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines, starred = [*lines, "    *,"], True
        given = "" if parameter.default is parameter.empty else f" = {shown(parameter.default)}"
        lines.append(f"    {parameter.name}: {parameter.annotation}{given},")
    return "\n".join(["```python", f"def {name}(", *lines, f") -> {stage.__annotations__['return']}", "```"])


def shown(value: Any) -> str:
    return value.__name__ if callable(value) else repr(value)


def docstring(thing: Any) -> Iterator[str]:
    """Paragraphs of a docstring; what stands below Args, Returns and Raises becomes a list."""
    for paragraph in inspect.getdoc(thing).split("\n\n"):
        title, _, body = paragraph.partition("\n")
        if title.rstrip(":") not in SECTIONS:
            yield cell(paragraph)
            continue
        yield f"**{title.rstrip(':')}**"
        body = textwrap.dedent(body)
        entries = (item.partition(": ") for item in re.split(r"\n(?! )", body))
        named = "\n".join(f"- `{name}`: {cell(text)}" for name, _, text in entries)
        yield cell(body) if title == "Returns:" else named


# --- the site ----------------------------------------------------------------------------------------------------


def make_pages() -> None:
    """docs/ with the reference, in build/docs."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, page in (("cli", cli_page), ("recipe", recipe_page), ("python", python_page)):
        (PAGES / "reference" / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    make_pages()
    if "--pages" not in sys.argv:
        command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(CONFIG)]
        sys.exit(subprocess.run(command, check=False).returncode)
