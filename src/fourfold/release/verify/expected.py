"""Every tensor that a release must have, by its config.json and recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fourfold.datatypes import Action
from fourfold.formats.format import EXPERT
from fourfold.quantize.claims import Wanted, wanted_tensors
from fourfold.release.release import Release
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


def expected_tensors(release: Release, names: Mapping[str, Any]) -> dict[str, Expected]:
    """Every tensor that must be there, by name. names: of the release; all of a draft head is wanted or none."""
    # Without the names of stacks each expert is wanted as a tensor of its own, as engines load them.
    single = {name: names[name] for name in names if not name.endswith((".gate_up_proj", ".down_proj"))}
    recipe = dataclasses.replace(release.recipe, format=release.format.name)
    found: dict[str, Expected] = {}
    for name, wanted in wanted_tensors(release, single, recipe):
        found.update(_stored(release, name, wanted))
    if not release.has_mtp:
        for name in release.blueprint.drafts_among(names):
            found[name] = Expected(dtypes=(names[name].dtype,), shape=names[name].shape, projection="")
    return found


def _stored(release: Release, name: str, wanted: Wanted) -> Iterator[tuple[str, Expected]]:
    if wanted.action is not Action.QUANTIZE:
        yield name, Expected(dtypes=wanted.dtypes, shape=wanted.shape, projection="")
        return
    if len(wanted.shape) == 3:  # the source has a stack; the release a tensor for each expert
        assert wanted.layer is not None
        for names in release.stems(wanted.layer):
            for part, stem in names.items():
                one = dataclasses.replace(wanted, shape=release.experts_of(wanted.layer).shape(part))
                yield from _stored(release, f"{stem}weight", one)
        return
    outputs, inputs = wanted.shape
    prefix = name.removesuffix("weight")
    bits, size = wanted.bits, wanted.group_size
    assert bits is not None and size is not None
    for suffix, (dtype, shape) in release.format.tensor_shapes(outputs, inputs, inputs // size, bits).items():
        name = f"{prefix}{suffix}"
        yield name, Expected(dtypes=(dtype,), shape=shape, projection=prefix, bits=bits, group_size=size)
