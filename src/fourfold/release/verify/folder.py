"""A finished release on disk, read without its weights: what it says of itself, and what config.json makes of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.datatypes import Action, FourfoldError
from fourfold.formats.format import EXPERT, Format
from fourfold.model.config import read_config
from fourfold.model.skeleton import Skeleton
from fourfold.model.sources import storage_format
from fourfold.quantize.claims import Wanted, wanted_tensors
from fourfold.quantize.journal import FINISHED, REFERENCE, require_release
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.release import Reference, State
from fourfold.release.verify.projection import Codes


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A tensor that config.json and the recipe require.

    projection: of which it is a part, by its name with a dot at its end, "" for a kept tensor; bits, group_size: of its
    codes.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    projection: str
    bits: int = 16
    group_size: int = 0


def codes_of(projection: str, bits: int, draft_prefix: str) -> Codes:
    """Return how a projection's codes came to be. draft_prefix: of the draft head's names, "" where there is none."""
    if re.match(EXPERT, projection) is not None:
        return Codes.EXPERT if bits == 4 else Codes.ROUNDED
    return Codes.ROUNDED if draft_prefix and projection.startswith(draft_prefix) else Codes.LINEAR


@dataclass(frozen=True, kw_only=True)
class Release:
    """state: fourfold.json; raw: config.json; format: of its quantization_config; reference: None in old releases."""

    folder: Path
    state: State
    raw: Mapping[str, Any]
    skeleton: Skeleton
    recipe: Recipe
    format: Format
    reference: Reference | None

    @property
    def quantization(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.raw["quantization_config"]
        return settings

    @property
    def group_size(self) -> int:
        return self.recipe.scheme.group

    @property
    def transformers_problem(self) -> str:
        """Why transformers does not load the release; "" if it does."""
        if not self.format.transformers_loads:
            return f"transformers does not run the format {self.format}: it {self.format.transformers_note}"
        if any(one is not None and one.stacked for one in self.skeleton.blueprint.experts):
            return "transformers reads experts of this architecture as stacks alone and would leave a release's random"
        why = self.skeleton.family.refuse.get("transformers")
        return f"transformers {why}" if why else ""

    def expected(self, names: Mapping[str, Any]) -> dict[str, Expected]:
        """Every tensor that must be there, by name. names: of the release; all of a draft head is wanted or none."""
        # Without the names of stacks each expert is wanted as a tensor of its own, as engines load them.
        single = {name: names[name] for name in names if not name.endswith((".gate_up_proj", ".down_proj"))}
        recipe = dataclasses.replace(self.recipe, format=self.format.name)
        found: dict[str, Expected] = {}
        for name, wanted in wanted_tensors(self.skeleton, single, recipe):
            found.update(self._stored(name, wanted))
        if not self.skeleton.has_mtp:
            for name in self.skeleton.blueprint.drafts_among(names):
                found[name] = Expected(dtypes=(names[name].dtype,), shape=names[name].shape, projection="")
        return found

    def _stored(self, name: str, wanted: Wanted) -> Iterator[tuple[str, Expected]]:
        if wanted.action is not Action.QUANTIZE:
            yield name, Expected(dtypes=wanted.dtypes, shape=wanted.shape, projection="")
            return
        if len(wanted.shape) == 3:  # the source has a stack; the release a tensor for each expert
            assert wanted.layer is not None
            experts = self.skeleton.blueprint.experts[wanted.layer]
            assert experts is not None
            for names in self.skeleton.stems(wanted.layer):
                for part, stem in names.items():
                    one = dataclasses.replace(wanted, shape=experts.shape(part))
                    yield from self._stored(f"{stem}weight", one)
            return
        outputs, inputs = wanted.shape
        prefix = name.removesuffix("weight")
        bits, size = wanted.bits, wanted.group_size
        assert bits is not None and size is not None
        for suffix, (dtype, shape) in self.format.tensor_shapes(outputs, inputs, inputs // size, bits).items():
            name = f"{prefix}{suffix}"
            yield name, Expected(dtypes=(dtype,), shape=shape, projection=prefix, bits=bits, group_size=size)


def open_release(folder: Path) -> Release:
    """Read a finished release but for its weights. Raises FourfoldError for any other folder, and damaged files."""
    state = require_release(folder)
    recipe = load_recipe(str(folder / "recipe.toml"))
    recipe_digest = state.identity.recipe
    if recipe.digest() != recipe_digest:
        digests = f"got digest {recipe.digest()[:16]}..., expected {recipe_digest[:16]}..., which made the release"
        raise FourfoldError(f"{folder / 'recipe.toml'}: {digests}. Bring back the recipe.toml that quantize wrote")
    if state.format != recipe.format:
        formats = f"got {state.format!r}, expected {recipe.format!r}, as in recipe.toml"
        raise FourfoldError(f"{folder / FINISHED}: format: {formats}. Bring back the one that was written with it")
    raw = read_config(folder)
    format = storage_format(raw, folder)
    if format is None:
        expected = "expected that of a release of quantize"
        raise FourfoldError(f"{folder / 'config.json'}: got no quantization_config, {expected}")
    skeleton, reference = Skeleton.of(raw, folder / "config.json"), Reference.find(folder / REFERENCE)
    return Release(
        folder=folder, state=state, raw=raw, skeleton=skeleton, recipe=recipe, format=format, reference=reference
    )
