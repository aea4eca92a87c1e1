"""A finished release of fourfold's by its records and config.json, its tensors read when they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from fourfold.datatypes import FourfoldError
from fourfold.formats.format import Format
from fourfold.model.config import CONFIG, quantization, read_config
from fourfold.model.skeleton import Skeleton
from fourfold.model.sources import SourceIndex, open_source, storage_format
from fourfold.quantize.journal import FINISHED, RECIPE, REFERENCE, require_release
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.release import Reference, State


@dataclass(frozen=True, kw_only=True)
class Release(Skeleton):
    """A release as its records and config.json have it, sound or not: names and shapes are those that config.json
    wants, whatever the headers say.

    state: fourfold.json; settings: quantization_config; format: of these; reference: None in old releases.
    """

    folder: Path
    state: State
    settings: Mapping[str, Any]
    recipe: Recipe
    format: Format
    reference: Reference | None

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read all but headers and weights. Raises FourfoldError for any other folder, and damaged files."""
        state = require_release(folder)
        recipe = load_recipe(str(folder / RECIPE))
        recipe_digest = state.identity.recipe
        if recipe.digest() != recipe_digest:
            digests = f"got digest {recipe.digest()[:16]}..., expected {recipe_digest[:16]}..., which made the release"
            raise FourfoldError(f"{folder / RECIPE}: {digests}. Bring back the recipe.toml that quantize wrote")
        if state.format != recipe.format:
            formats = f"got {state.format!r}, expected {recipe.format!r}, as in recipe.toml"
            raise FourfoldError(f"{folder / FINISHED}: format: {formats}. Bring back the one that was written with it")
        raw = read_config(folder)
        format = storage_format(raw, folder)
        if format is None:
            expected = "expected that of a release of quantize"
            raise FourfoldError(f"{folder / CONFIG}: got no quantization_config, {expected}")
        skeleton, reference = Skeleton.of(raw, folder / CONFIG), Reference.find(folder / REFERENCE)
        return cls(
            **vars(skeleton), folder=folder, state=state, settings=quantization(raw), recipe=recipe, format=format,
            reference=reference,
        )  # fmt: skip

    @cached_property
    def tensors(self) -> SourceIndex:
        """Headers and bytes. Raises FourfoldError for those that are damaged."""
        return open_source(self.folder, {"quantization_config": self.settings})

    @property
    def transformers_problem(self) -> str:
        """Why transformers does not load the release; "" if it does."""
        if not self.format.transformers_loads:
            return f"transformers does not run the format {self.format}: it {self.format.transformers_note}"
        if any(one is not None and one.stacked for one in self.blueprint.experts):
            return "transformers reads experts of this architecture as stacks alone and would leave a release's random"
        why = self.family.refuse.get("transformers")
        return f"transformers {why}" if why else ""
