"""Layers and experts on a card and a page: drift, errors, tokens, and the weakest of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from fourfold.datatypes import ProjectionStatistics, StreamDrift
from fourfold.release.report.escape import Markdown, table
from fourfold.release.report.quality import Grid
from fourfold.release.report.records import Records

METHOD_WORDS = {
    "gptq": "GPTQ",
    "diag": "GPTQ with the diagonal of a Hessian that could not be factored",
    "row-diag": "GPTQ without guidance, as its row metric could not be factored",
    "rtn": "RTN fallback",
}


def layers_context(records: Records) -> dict[str, Any]:
    """What the card's template says of layers, weak spots and guidance."""
    drift = {row.layer: row for row in records.metrics.layers} if records.metrics else {}
    by_layer = records.by_layer()
    layers = sorted(by_layer.keys() | drift.keys())
    rows = [_layer_row(layer, by_layer.get(layer, []), drift.get(layer)) for layer in layers]
    rows += [_layer_row("draft head", drafts, None)] if (drafts := records.drafts()) else []
    header = (
        "layer", "drift", "router agreement", "output error, median", "maximum", "loss, mean",
        "tokens per expert, minimum", "median", "not GPTQ",
    )  # fmt: skip
    return {
        "layers": len(layers), "by_layer": table(header, rows), "cold": cold_text(records),
        "guidance": _guidance(records), "worst": table(*worst_grid(records)),
    }  # fmt: skip


def worst_grid(records: Records) -> Grid:
    """Return a row for each of the ten worst projections, the worst first."""
    header = ("layer", "expert", "projection", "over RTN's", "output error", "tokens", "effective tokens", "target")
    rows: list[tuple[object, ...]] = [
        (records.layer_name(row).removeprefix("layer "), row.expert, row.projection,
         f"{row.error_over_rtn:.2f}", f"{row.relative_error:#.3g}", f"{row.tokens:,}",
         f"{row.effective_tokens:,.0f}", row.target)
        for row in records.worst()
    ]  # fmt: skip
    return Grid(header, rows)


def weakest_text(records: Records) -> str:
    """Return the projection with the largest output error over that of RTN, in one line."""
    row = records.worst()[0]
    where = f"{records.layer_name(row)} expert {row.expert} {row.projection}"
    return f"{where}, {row.error_over_rtn:.2f} of RTN's output error"


def drift_grid(records: Records) -> Grid | None:
    """Return the five layers with the largest hidden-state drift, the largest first; None if it was not measured."""
    layers = records.metrics.layers if records.metrics else []
    found = sorted(layers, key=lambda row: -row.hidden_error)[:5]
    header = ("layer", "drift", "router agreement")
    return Grid(header, [(row.layer, *_drift_cells(row)) for row in found]) if found else None


def _drift_cells(row: StreamDrift) -> tuple[str, str]:
    agreement = row.router_agreement
    return f"{row.hidden_error:.4f}", "" if agreement is None else f"{agreement:.2%}"


def _guidance(records: Records) -> Markdown | None:
    """Error with guidance over error without it, by layer."""
    guidance = records.state.guidance
    if guidance is None:
        return None
    rows = []
    for row in guidance.layers:
        shares = (row.predicted, row.measured.get("down"), row.measured.get("gate_up"))
        rows.append((row.layer, *("" if share is None else f"{share:.2f}" for share in shares)))
    return table(("layer", "down, predicted", "down", "gate and up"), rows)


def _layer_row(layer: int | str, rows: Sequence[ProjectionStatistics], drift: StreamDrift | None) -> tuple[object, ...]:
    cells = _drift_cells(drift) if drift else ("", "")
    if not rows:
        return (layer, *cells, "no routed experts", "", "", "", "", "")
    errors = [row.relative_error for row in rows]
    losses = [row.gptqmodel_loss for row in rows if row.gptqmodel_loss is not None]
    tokens = list({row.expert: row.tokens for row in rows}.values())
    other = sum(row.method != "gptq" for row in rows)
    return (
        layer, *cells, f"{median(errors):#.3g}", f"{max(errors):#.3g}",
        f"{sum(losses) / len(losses):#.3g}" if losses else "",
        f"{min(tokens):,}", f"{median(tokens):,.0f}", other or "",
    )  # fmt: skip


def cold_text(records: Records) -> str:
    """Return how many experts had few calibration tokens, and how those were quantized."""
    experts = {(row.layer, row.expert): row.tokens for row in records.projections}
    never = sum(tokens == 0 for tokens in experts.values())
    solver = records.recipe.solver
    said = (
        f"{never:,} of {len(experts):,} experts received no calibration token; the median received "
        f"{median(experts.values()):,.0f}. "
    )
    if solver.pool:
        said += (
            f"Each projection uses the statistics of its own tokens and, with the weight of {solver.pool:g} x its "
            f"input features in tokens, those of its layer. The layer's outweigh its own in {len(records.cold()):,} of "
            f"{len(records.projections):,} projections. "
        )
    if solver.fallback_share:
        said += f"Experts with under {solver.fallback_share:.2%} of the calibration tokens use the RTN fallback. "
    return said + "Methods: " + ", ".join(method_shares(records.state.methods)) + "."


def method_shares(methods: Mapping[str, int]) -> Iterator[str]:
    """Yield the share of each method, in words. methods: projections by method."""
    total = sum(methods.values())
    for name, count in methods.items():
        yield f"{count / total:.2%} {METHOD_WORDS.get(name, name)}"
