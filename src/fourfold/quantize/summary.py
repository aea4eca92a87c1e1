"""What a finished run came to, from its fourfold.json; and whether a command would only repeat it. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import to_builtins

from fourfold.model.headers import Headers
from fourfold.quantize.documents import text_digests
from fourfold.quantize.identity import identify_without_tokens, layers_text, refuse_changes
from fourfold.quantize.journal import FINISHED, RUN, started_identity
from fourfold.recipe import AUTO, Recipe
from fourfold.records.release import State, Worker

SAME = ("partial", "projections", "methods", "tokens_per_input", "metrics", "seconds")
MEMORY = ("peak_memory_bytes", "planned_memory_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run came to. methods: projections by method; tokens_per_input: calibration tokens per expert and input of
    gate and up, "mean" and "coldest_tenth" of experts; metrics: empty for a partial output; seconds: by stage.
    """

    out: str
    partial: bool
    projections: int
    methods: dict[str, int]
    tokens_per_input: dict[str, float]
    bytes_before: int
    bytes_after: int
    metrics: dict[str, int | float]
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    planned_memory_bytes: dict[str, int]
    workers: tuple[Worker, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_builtins(self)
        return found


def read_summary(out: Path) -> Summary:
    """The summary of a finished output, from its fourfold.json."""
    state = State.read(out / FINISHED)
    return Summary(
        out=str(out),
        bytes_before=state.source_tensor_bytes,
        bytes_after=state.output.tensor_bytes,
        workers=tuple(state.workers),
        notes=tuple(state.calibration.notes),
        **{name: getattr(state, name) for name in (*SAME, *MEMORY)},
    )


def finished_already(out: Path, model: Callable[[], Path], recipe: Recipe, layers: range | None) -> Summary | None:
    """The summary of `out` if the command that finished it is given again; None if there is something to do.

    model: gives the source's folder, where it is needed. Texts are compared by their files; with a dataset among them,
    which only its tokens tell from another, None. Raises FourfoldError for another recipe, source or layers than the
    run in `out` was started with, finished or not.
    """
    before = started_identity(out)
    if before is None:
        return None
    finished = (out / FINISHED).exists() and not (out / RUN).exists()
    summary = read_summary(out) if finished else None
    asked = layers_text(layers) if layers else "all" if summary and summary.partial else before.layers
    if recipe.scheme.group_size == AUTO:
        chosen = before.parts.get("recipe", {}).get("scheme.group_size", AUTO)
        recipe = dataclasses.replace(recipe, scheme=dataclasses.replace(recipe.scheme, group_size=chosen))
    refuse_changes(out, identify_without_tokens(recipe, Headers.open(model()), asked, before), before)
    texts = before.parts.get("texts")
    return summary if texts and texts == text_digests(recipe) else None
