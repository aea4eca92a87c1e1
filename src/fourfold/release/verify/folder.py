"""A finished release on disk, read without its weights: what it says of itself, and what config.json makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.core import pack
from fourfold.datatypes import Action, FourfoldError
from fourfold.model.checkpoint import TensorIndex
from fourfold.model.skeleton import Skeleton
from fourfold.model.weights import read_config, storage_format
from fourfold.quantize.claims import Wanted, wanted_tensors
from fourfold.quantize.journal import FINISHED, STATE, WRITTEN, hold
from fourfold.quantize.reference import Reference, read_reference
from fourfold.recipe import Recipe, load_recipe
from fourfold.release.schemas import State, read_record

SHARD_SUFFIX = ".safetensors"
DOCUMENT_SUFFIXES = (".md", ".html", ".png", ".svg")
DOCUMENTS = ("verify.json", "metrics.json", "bench.json")  # for people: may be made after verify, no engine reads them
CARD, PAGE, FIGURES = "README.md", "report.html", "figures"
PLOTS = ("drift.png", "errors.png", "experts.png")  # in FIGURES
CONVERSION = "conversion.json"  # of a converted release that is not ours; fourfold.json has it of ours


def visible_files(folder: Path) -> list[str]:
    """All files of a release, by paths in it; what is hidden is of no release."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if not any(part.startswith(".") for part in path.parts))


def loaded_files(folder: Path) -> list[str]:
    """Those beside the shards that engines may read or that fourfold goes by."""
    return [
        name
        for name in visible_files(folder)
        if not name.endswith((SHARD_SUFFIX, *DOCUMENT_SUFFIXES)) and name not in DOCUMENTS
    ]


def written_names(folder: Path, state: Mapping[str, Any]) -> set[str]:
    """Every name that fourfold may write into a release, its shards and the source's LICENSE among them.

    state: fourfold.json; empty for another tool's release, whose shards are those that its index names.
    """
    if state:
        shards = set(state["output"]["shards"])
    else:
        shards = {header.shard for header in TensorIndex.open(folder).headers.values()}
    return {*shards, *WRITTEN, *DOCUMENTS, CONVERSION, CARD, PAGE, *(f"{FIGURES}/{name}" for name in PLOTS)}


def hash_file(path: Path) -> tuple[str, int]:
    """sha256 and size of a file. Raises FourfoldError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A tensor that config.json and the recipe want in the release.

    projection: the name of the expert projection that it is a part of, without suffix and with a dot at its end; "" for
    a kept tensor.
    """

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    projection: str


@dataclass(frozen=True, kw_only=True)
class Release:
    """state: fourfold.json; raw: config.json; format: as its quantization_config has it (core/pack.py); reference: None
    in releases of versions that wrote none.
    """

    folder: Path
    state: Mapping[str, Any]
    raw: Mapping[str, Any]
    skeleton: Skeleton
    recipe: Recipe
    format: str
    reference: Reference | None

    @property
    def quantization(self) -> Mapping[str, Any]:
        settings: Mapping[str, Any] = self.raw["quantization_config"]
        return settings

    @property
    def group_size(self) -> int:
        return self.recipe.scheme.group_size

    def expected(self, names: Mapping[str, Any]) -> dict[str, Expected]:
        """Every tensor that must be there, by name. names: of the release; all of a draft head is wanted or none."""
        # Without the names of stacks each expert is wanted as a tensor of its own, as engines load them.
        single = {name: names[name] for name in names if not name.endswith((".gate_up_proj", ".down_proj"))}
        recipe = dataclasses.replace(self.recipe, format=self.format)
        found: dict[str, Expected] = {}
        for name, wanted in wanted_tensors(self.skeleton, single, recipe):
            found.update(self._stored(name, wanted))
        return found

    def _stored(self, name: str, wanted: Wanted) -> Iterator[tuple[str, Expected]]:
        if wanted.action is not Action.QUANTIZE:
            yield name, Expected(dtypes=wanted.dtypes, shape=wanted.shape, projection="")
            return
        outputs, inputs = wanted.shape
        prefix = name.removesuffix("weight")
        for suffix, (dtype, shape) in pack.tensor_shapes(self.format, outputs, inputs, self.group_size).items():
            yield f"{prefix}{suffix}", Expected(dtypes=(dtype,), shape=shape, projection=prefix)


def open_release(folder: Path) -> Release:
    """Read what a finished release says of itself.

    Raises FourfoldError for a folder that holds none: not finished or being written, a trial, another recipe's
    recipe.toml, a quantization that fourfold does not write, a reference.json that is none.
    """
    if not folder.is_dir():
        raise FourfoldError(f"{folder}: no such folder; the OUT of `fourfold quantize` is wanted")
    _require_finished(folder)
    state = read_record(folder / FINISHED, State, "Bring back the one that quantize wrote, or quantize again")
    if state["partial"]:
        raise FourfoldError(
            f"{folder}: partial: a trial on layers {state.get('layers')}, which no engine loads. Quantize the whole "
            "model into another OUT to have a release that can be verified"
        )
    recipe = load_recipe(str(folder / "recipe.toml"))
    recipe_digest = state["identity"]["recipe"]
    if recipe.digest() != recipe_digest:
        raise FourfoldError(
            f"{folder / 'recipe.toml'}: of another recipe: its digest is {recipe.digest()[:16]}..., the release was "
            f"made by {recipe_digest[:16]}...; bring the recipe.toml back that quantize wrote"
        )
    if state["format"] != recipe.format:
        raise FourfoldError(
            f"{folder / FINISHED}: format: got {state['format']!r}, expected {recipe.format!r}, as in recipe.toml. "
            "Bring back the fourfold.json that was written with it"
        )
    raw = read_config(folder)
    format = storage_format(raw, folder)
    if format is None:
        raise FourfoldError(
            f"{folder / 'config.json'}: no quantization_config, so nothing is quantized; the OUT of quantize is wanted"
        )
    return Release(
        folder=folder,
        state=state,
        raw=raw,
        skeleton=Skeleton.of(raw, folder / "config.json"),
        recipe=recipe,
        format=format,
        reference=read_reference(folder),
    )


def _require_finished(folder: Path) -> None:
    if (folder / FINISHED).is_file():
        return
    if not (folder / STATE).is_dir():
        raise FourfoldError(
            f"{folder}: no {FINISHED}, so this is no release of fourfold; the OUT of a finished run is wanted"
        )
    with hold(folder):  # raises if a run is on
        pass
    raise FourfoldError(f"{folder}: partial: its run was interrupted; the same `fourfold quantize` command goes on")
