"""List and show recipes, the settings of quantize.

Examples:
    fourfold recipe show best > mine.toml
"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from fourfold.cli.console import open_console, show_facts


def list_recipes() -> None:
    """List the presets.

    Examples:
        fourfold recipe list
    """
    from fourfold.recipe import load_recipe, recipe_names

    show_facts(open_console(), [(name, load_recipe(name).description) for name in recipe_names()])


def show_recipe(name: Annotated[str, Parameter(name="NAME|FILE")], /) -> None:
    """Print a recipe in full, as TOML.

    Args:
        name: Preset or .toml file.

    Examples:
        fourfold recipe show best > mine.toml
    """
    from fourfold.recipe import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(name)), end="")
