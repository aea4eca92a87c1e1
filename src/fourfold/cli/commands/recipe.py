"""The commands that list and show recipes."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from fourfold import recipe
from fourfold.cli.console import open_console, show_facts


def list_recipes() -> None:
    """List the presets.

    Examples:
        fourfold recipe list
    """
    show_facts(open_console(), [(name, recipe.load_recipe(name).description) for name in recipe.recipe_names()])


def show_recipe(name: Annotated[str, Parameter(name="NAME|FILE")], /) -> None:
    """Print a recipe in full, as TOML.

    Args:
        name: Preset or .toml file.

    Examples:
        fourfold recipe show best > mine.toml
    """
    print(recipe.dump_recipe(recipe.load_recipe(name)), end="")
