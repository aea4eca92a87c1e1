"""What a run is made of: the same when it goes on, or the run is refused and told what has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import to_builtins

from fourfold.datatypes import FourfoldError
from fourfold.model.files import SIDECARS
from fourfold.model.headers import Headers
from fourfold.quantize.documents import text_digests
from fourfold.recipe import Recipe
from fourfold.records.release import Identity

if TYPE_CHECKING:
    from fourfold.quantize.calibrate import CalibrationRows, HeldoutRows
    from fourfold.quantize.plan import Plan

HEADERS = "names, dtypes and shapes of tensors"
DIGITS = 16  # of a sha256 that is only shown
SHOWN = 8  # changes that a message names; the rest is a number


def changes(now: Identity, before: Identity) -> list[str]:
    """A line for each field that is not as before, with the old and the new value of all that is known of it."""
    return [
        _change(name, now, before)
        for name in now.__struct_fields__
        if name != "parts" and getattr(now, name) != getattr(before, name)
    ]


def _change(name: str, now: Identity, before: Identity) -> str:
    old, new = before.parts.get(name, {}), now.parts.get(name, {})
    changed = [
        f"{key} is {_shown(new, key)}, was {_shown(old, key)}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if not changed:
        changed = [f"is {getattr(now, name)}, was {getattr(before, name)}"]
    more = f" and {len(changed) - SHOWN:,} more" if len(changed) > SHOWN else ""
    return f"{name}: {'; '.join(changed[:SHOWN])}{more}"


def _shown(part: Mapping[str, object], key: str) -> str:
    return repr(part[key]) if key in part else "absent"


def identify(plan: Plan, calibration: CalibrationRows, heldout: HeldoutRows) -> Identity:
    parts = {
        "calibration": {name: short(digest) for name, digest in calibration.source_digests().items()},
        "heldout": to_builtins(heldout.protocol) | {"token ids": short(heldout.digest)},
        "texts": text_digests(plan.recipe) or {},
    }
    digests = {"calibration": calibration.digest, "heldout": heldout.digest}
    tokens = Identity(**digests, recipe="", source="", layers="", parts=parts)
    return identify_without_tokens(plan.recipe, plan.source, layers_text(plan.solve), tokens)


def identify_without_tokens(recipe: Recipe, index: Headers, layers: str, tokens: Identity) -> Identity:
    """The identity of a run whose calibration and held-out tokens are those of another."""
    source = {name: short(digest) for name, digest in source_parts(index).items()}
    return Identity(
        recipe=recipe.digest(),
        source=source_digest(index),
        calibration=tokens.calibration,
        heldout=tokens.heldout,
        layers=layers,
        parts={**tokens.parts, "recipe": recipe.values(), "source": source},
    )


def layers_text(layers: range) -> str:
    return f"{layers.start}-{layers.stop - 1}"


def short(digest: str) -> str:
    """A digest as people are shown it."""
    return f"sha256 {digest[:DIGITS]}"


def source_parts(index: Headers) -> dict[str, str]:
    """Digests of what decides the source before a weight is read: headers, config.json, tokenizer, other sidecars."""
    parts = {HEADERS: index.digest}
    for name in ("config.json", *SIDECARS):
        path = index.folder / name
        if path.is_file():
            parts[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return parts


def source_digest(index: Headers) -> str:
    """One digest of source_parts."""
    lines = "".join(f"{name} {digest}\n" for name, digest in source_parts(index).items())
    return hashlib.sha256(lines.encode()).hexdigest()


def joined_digest(digests: Mapping[str, str]) -> str:
    """One digest of those of several shards, in their order."""
    lines = "".join(f"{shard} {digest}\n" for shard, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def refuse_changes(out: Path, identity: Identity, before: Identity) -> None:
    """Raise FourfoldError naming what is not as it was when OUT was begun."""
    found = changes(identity, before)
    if found:
        raise FourfoldError(
            f"{out}: begun with another {' and '.join(change.partition(':')[0] for change in found)} than this "
            "command gives; go on with the first one, name another OUT, or start over with --restart\n"
            + "\n".join(f"  {change}" for change in found)
        )
