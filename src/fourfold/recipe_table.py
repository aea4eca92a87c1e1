"""The raw table of a recipe, completed before it is read, and what of its values must fit each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold import formats
from fourfold.bundled import CALIBRATION_TEXTS, HELDOUT_TEXTS
from fourfold.datatypes import FourfoldError, nearest
from fourfold.schema import Schema

if TYPE_CHECKING:
    from fourfold.recipe import Recipe, Source

NEVER_QUANTIZED = {
    "embeddings": "no engine loads quantized embeddings: vLLM stops, SGLang leaves them unwritten without an error",
    "draft_fc": "SGLang leaves a quantized mtp.fc unwritten without an error, and vLLM builds it in BF16",
    "router": "routers decide which experts a token visits and are small: they stay BF16",
    "shared_expert_gate": "it has one output, which no kernel for int8 takes",
    "in_proj_a": "it has one output for each head, which no kernel for int8 takes",
    "in_proj_b": "it has one output for each head, which no kernel for int8 takes",
    "in_proj_ba": "it has two outputs for each head, which no kernel for int8 takes",
}  # parts of scheme.rest that somebody may ask for
ORIGINS = ("builtin", "path", "dataset")
OF_AN_ORIGIN = ("config", "split", "licence")  # dropped when an override names another text
FILE_KINDS = (".jsonl", ".txt", ".parquet")
IMAGE_FILE_KINDS = (".jsonl", ".parquet")
DEFAULT_FIELDS = {"chat": ("messages",), "image": ("image", "messages")}


def canonical(value: Any) -> Any:
    """Numbers as floats, so that 1 and 1.0 give one digest."""
    if isinstance(value, dict):
        return {key: canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value if isinstance(value, bool | str) else float(value)


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        entries = {key: value}
        if isinstance(value, tuple) and any(isinstance(entry, dict) for entry in value):
            entries = {f"{key}.{place}": entry for place, entry in enumerate(value)}
        for name, entry in entries.items():
            if isinstance(entry, dict):
                yield from flat(entry, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", list(entry) if isinstance(entry, tuple) else entry


def _raw_sources(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The raw tables of calibration sources, as far as they are tables: `Schema.read` comes later."""
    calibration = table.get("calibration")
    sources = calibration.get("sources") if isinstance(calibration, dict) else None
    yield from (source for source in sources if isinstance(source, dict)) if isinstance(sources, list) else ()


def anchor_paths(table: dict[str, Any], folder: Path) -> None:
    tables: list[Any] = [*_raw_sources(table), table.get("heldout")]
    for raw, key in product(tables, ("path", "images")):
        path = raw.get(key) if isinstance(raw, dict) else None
        if isinstance(path, str) and path:
            raw[key] = str(folder / Path(path).expanduser())


def complete(table: dict[str, Any]) -> None:
    """Fill in what the origin of a text decides."""
    heldout = table.get("heldout")
    if isinstance(heldout, dict) and heldout.get("path"):
        heldout.setdefault("builtin", "")
    for source in _raw_sources(table):
        text = CALIBRATION_TEXTS.get(str(source.get("builtin")))
        if text:
            for fact in ("kind", "fields", "licence"):
                source.setdefault(fact, getattr(text, fact))
        elif source.get("kind") in DEFAULT_FIELDS:
            source.setdefault("fields", DEFAULT_FIELDS[source["kind"]])


def refuse_never_quantized(table: dict[str, Any], schema: Schema) -> None:
    """Raise FourfoldError for a part of `scheme.rest` that no engine, or no model, takes quantized."""
    scheme = table.get("scheme")
    rest = scheme.get("rest") if isinstance(scheme, dict) else None
    for name, value in rest.items() if isinstance(rest, dict) else ():
        if name in NEVER_QUANTIZED and value != "bf16":
            key = f"scheme.rest.{name}"
            raise FourfoldError(f"{schema.place(key)}: {key}: got {value!r}, but {NEVER_QUANTIZED[name]}. Leave it out")


def check_together(recipe: Recipe, schema: Schema) -> None:
    """Values that must fit each other. Raises FourfoldError."""
    sources, heldout, solver = recipe.calibration.sources, recipe.heldout, recipe.solver
    if not sources:
        raise schema.mismatch("calibration.sources", [], "at least one source")
    for index, source in enumerate(sources):
        problem = _problem_of(source, sources[:index])
        if problem:
            key = f"calibration.sources[{index}]"
            raise FourfoldError(f"{schema.place(key)}: {key}: {problem}")
    if bool(heldout.builtin) == bool(heldout.path):
        found = f"builtin {heldout.builtin!r} and path {heldout.path!r}"
        raise FourfoldError(f"{schema.place('heldout')}: heldout: got {found}, expected one of them")
    if heldout.builtin and heldout.builtin not in HELDOUT_TEXTS:
        raise schema.mismatch(
            "heldout.builtin",
            heldout.builtin,
            f"one of {', '.join(HELDOUT_TEXTS)}",
            nearest(heldout.builtin, HELDOUT_TEXTS),
        )
    if heldout.path and Path(heldout.path).suffix not in FILE_KINDS:
        raise schema.mismatch("heldout.path", heldout.path, f"a file of kind {', '.join(FILE_KINDS)}")
    if heldout.images and Path(heldout.images).suffix not in IMAGE_FILE_KINDS:
        raise schema.mismatch("heldout.images", heldout.images, f"a file of kind {', '.join(IMAGE_FILE_KINDS)}")
    if recipe.calibration.image_share and not recipe.image_sources:
        wanted = "0 without a calibration source of kind 'image'"
        raise schema.mismatch("calibration.image_share", recipe.calibration.image_share, wanted)
    stored_as = formats.named(recipe.format).scale_dtype
    if recipe.scheme.scale_dtype == "fp16" and stored_as != "F16":
        others = " and ".join(one.name for one in formats.FORMATS if one.scale_dtype == "F16")
        hint = f" Its scales are stored as {stored_as}; {others} store FP16"
        raise schema.mismatch("scheme.scale_dtype", "fp16", f"'bf16' with format {recipe.format!r}", hint)
    if solver.scale_low > solver.scale_high:
        wanted = f"at most scale_high = {solver.scale_high}"
        raise schema.mismatch("solver.scale_low", solver.scale_low, wanted)


def _problem_of(source: Source, earlier: Sequence[Source]) -> str:
    """What is wrong with a source; empty if nothing is."""
    given = [origin for origin in ORIGINS if getattr(source, origin)]
    if len(given) != 1:
        return f"got {' and '.join(given) or 'no origin'}, expected one of {', '.join(ORIGINS)}"
    if any(_text_of(source) == _text_of(other) for other in earlier):
        return "reads the same text as a source before it. Give that one more rows"
    if not source.fields or not all(source.fields):
        return f"fields: got {list(source.fields)}, expected at least one name"
    if source.kind == "chat" and len(source.fields) != 1:
        return f"fields: got {list(source.fields)}, expected the one field with the messages, as kind is 'chat'"
    if source.kind == "image" and len(source.fields) != 2:
        return f"fields: got {list(source.fields)}, expected two: the images, and the messages or a caption"
    if source.builtin:
        return _problem_of_builtin(source)
    if source.dataset:
        return "" if source.split else "split: got '', expected the name of a split, as in 'train'"
    if Path(source.path).suffix not in FILE_KINDS:
        return f"path: got {source.path!r}, expected a file of kind {', '.join(FILE_KINDS)}"
    if source.path.endswith(".txt") and source.kind != "text":
        return f"path: got {source.path!r}, expected a .jsonl or .parquet file, as kind is {source.kind!r}"
    return f"config: got {source.config!r} beside a path, expected it with a dataset only" if source.config else ""


def _text_of(source: Source) -> tuple[object, ...]:
    return source.builtin, source.path, source.dataset, source.config, source.split, source.fields


def _problem_of_builtin(source: Source) -> str:
    text = CALIBRATION_TEXTS.get(source.builtin)
    if text is None:
        held = " That text is held out and never calibrated on." if source.builtin in HELDOUT_TEXTS else ""
        return (
            f"builtin: got {source.builtin!r}, expected one of {', '.join(CALIBRATION_TEXTS)}."
            f"{held or nearest(source.builtin, CALIBRATION_TEXTS)}"
        )
    if (source.kind, source.fields) != (text.kind, text.fields):
        return (
            f"got kind {source.kind!r} and fields {list(source.fields)}, expected {text.kind!r} and {list(text.fields)}"
            f", as the text {source.builtin!r} has. Leave both out"
        )
    return ""
