"""Charts of the page, as Vega-Lite specifications with their data in them. Colours of text and axes are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from fourfold.datatypes import ProjectionStatistics
from fourfold.release.report.records import Records

Spec = dict[str, Any]
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"  # a name: nothing is fetched
HEIGHT = 240
DOT: Spec = {"type": "point", "filled": True, "size": 90}
RELEASE: Spec = {"field": "release", "type": "nominal", "title": ""}
COLUMNS = (
    "layer", "expert", "tokens", "effective_tokens", "relative_error", "error_over_rtn", "weight_error", "damping",
    "passes",
)  # fmt: skip
# Quantities of quant_log.csv that an expert x layer map shows: field, words, scale of colours.
MAPS = (
    ("tokens", "calibration tokens", "symlog"),
    ("relative_error", "output error", "log"),
    ("weight_error", "weight error", "linear"),
    ("loss", "loss, as GPTQModel logs it", "log"),
    ("method", "method", "ordinal"),
)
RATIO = ("ratio", "output error over the other release's", "log")


def charts(records: Records, against: Records | None) -> dict[str, Spec]:
    """By the id of the page's element: each has a title and a description for those who do not see it."""
    named = [("this release", records), *([(other_name(records, against), against)] if against else [])]
    found = {"errors": errors(records), "coverage": coverage(records)}
    if records.state.guidance is not None:
        found["guidance"] = guidance(records)
    if any(one.metrics for _, one in named):
        found["drift"] = drift(named)
        found["routers"] = routers(named)
        found["divergence"] = divergence(named)
        found["distribution"] = distribution(named)
        found["entropy"] = entropy(named)
    if records.metrics and records.metrics.rivals:
        found["rivals"] = rivals(records)
    return found | {"seconds": seconds(named), "memory": memory(named)}


def other_name(records: Records, against: Records) -> str:
    """What the second release is called beside the first."""
    name = against.folder.resolve().name
    return f"{name} (the other)" if name == records.folder.resolve().name else name


def _spec(title: str, says: str, values: Sequence[dict[str, Any]], **rest: Any) -> Spec:
    return {
        "$schema": SCHEMA,
        "usermeta": {"title": title},  # above the chart, in the page's own words, where lines can break
        "description": says,
        "width": "container",
        "height": HEIGHT,
        "data": {"values": list(values)},
        **rest,
    }


def _axis(field: str, kind: str, title: str, **rest: Any) -> Spec:
    return {"field": field, "type": kind, "title": title, **rest}


def _lines(x: Spec, y: Spec, colour: Spec, tooltip: Sequence[str], dash: Spec | None = None) -> Spec:
    """dash: what tells lines of one colour apart, with a legend of its own."""
    encoding = {"x": x, "y": y, "color": colour, "tooltip": [{"field": name} for name in tooltip]}
    if dash is None:
        dashed = colour | {"legend": {"symbolType": "stroke", "symbolSize": 400}}
        encoding |= {"color": dashed, "strokeDash": dashed}
        return {"mark": {"type": "line", "point": True}, "encoding": encoding}
    line = {"mark": "line", "encoding": {"strokeDash": dash}}
    return {"encoding": encoding, "layer": [line, {"mark": {"type": "point", "filled": True, "opacity": 1}}]}


def _layer_axis() -> Spec:
    return _axis(
        "layer", "quantitative", "layer", axis={"format": "d", "labelExpr": "datum.value % 1 ? '' : datum.label"}
    )


def errors(records: Records) -> Spec:
    """Median and largest output error of each layer and projection."""
    values = []
    for layer, rows in records.by_layer().items():
        for name in dict.fromkeys(row.projection for row in rows):
            found = [row.relative_error for row in rows if row.projection == name]
            for what, value in (("median", median(found)), ("maximum", max(found))):
                values.append({"layer": layer, "projection": name, "experts": what, "error": value or None})
    y = _axis("error", "quantitative", "relative output error", scale={"type": "log", "nice": False})
    return _spec(
        "Output error by layer and projection",
        "Lines: median and maximum relative output error of each layer's experts, for gate, up and down.",
        values,
        **_lines(
            _layer_axis(), y,
            _axis("projection", "nominal", ""), ("layer", "projection", "experts", "error"),
            _axis("experts", "nominal", "of experts", sort=None),
        ),
    )  # fmt: skip


def coverage(records: Records) -> Spec:
    """How the calibration tokens of a layer are spread over its experts."""
    values = []
    for layer, rows in records.by_layer().items():
        tokens = sorted({row.expert: row.tokens for row in rows}.values())
        for what, share in (("maximum", 1.0), ("90%", 0.9), ("median", 0.5), ("10%", 0.1), ("minimum", 0.0)):
            values.append({"layer": layer, "experts": what, "tokens": tokens[round(share * (len(tokens) - 1))]})
    return _spec(
        "Router coverage: calibration tokens per expert",
        "Lines: minimum, 10%, median, 90% and maximum of the calibration tokens of each layer's experts.",
        values,
        **_lines(
            _layer_axis(), _axis("tokens", "quantitative", "tokens", scale={"type": "symlog"}),
            _axis("experts", "nominal", "of experts", sort=None), ("layer", "experts", "tokens"),
        ),
    )  # fmt: skip


def guidance(records: Records) -> Spec:
    """What guidance was predicted to leave of each layer's error, and what it left."""
    assert records.state.guidance is not None
    values = []
    for row in records.state.guidance.layers:
        shares = {"down, predicted": row.predicted, **row.measured}
        values += [{"layer": row.layer, "series": name, "share": share} for name, share in shares.items()]
    return _spec(
        "Guidance: error with it over error without it",
        "Lines: error with guidance over error without it, weighted by the model's loss, predicted and measured.",
        values,
        **_lines(
            _layer_axis(), _axis("share", "quantitative", "share of the error", scale={"zero": False}),
            _axis("series", "nominal", ""), ("layer", "series", "share"),
        ),
    )  # fmt: skip


Named = Sequence[tuple[str, Records]]


def _by_layer(named: Named, field: str, title: str, says: str, y: Spec) -> Spec:
    values = [
        {"layer": row.layer, "release": name, "value": value}
        for name, records in named
        for row in (records.metrics.layers if records.metrics else ())
        if (value := getattr(row, field)) is not None
    ]
    return _spec(title, says, values, **_lines(_layer_axis(), y, RELEASE, ("layer", "release", "value")))


def drift(named: Named) -> Spec:
    says = "Lines: relative difference of the hidden states after each layer from the BF16 model's."
    y = _axis("value", "quantitative", "drift, share of the norm")
    return _by_layer(named, "hidden_error", "Hidden-state drift by layer", says, y)


def routers(named: Named) -> Spec:
    says = "Lines: share of a token's experts that the BF16 model and the release both select."
    y = _axis("value", "quantitative", "router agreement", axis={"format": ".1%"}, scale={"zero": False})
    return _by_layer(named, "router_agreement", "Router agreement by layer", says, y)


def _bars(x: Spec, y: Spec, tooltip: Sequence[str], mark: str | Spec = DOT) -> Spec:
    encoding = {
        "x": x, "y": y, "yOffset": {"field": "release"}, "color": RELEASE,
        "tooltip": [{"field": name} for name in tooltip],
    }  # fmt: skip
    return {"mark": mark, "encoding": encoding}


def distribution(named: Named) -> Spec:
    values = []
    for name, records in named:
        bins = (records.metrics and records.metrics.kl_histogram) or []
        total = sum(one.positions for one in bins)
        used = [place for place, one in enumerate(bins) if one.positions]
        for one in bins[used[0] : used[-1] + 1] if used else ():
            low, high = one.low or one.high or 0.0, one.high or one.low  # the first begins at 0, the last is open
            values.append({"nats": (low * high) ** 0.5, "release": name, "share": one.positions / total})
    return _spec(
        "Distribution of KLD",
        "Lines: share of the text's positions by KLD from the BF16 model, four bins per decade.",
        values,
        **_lines(
            _axis("nats", "quantitative", "nats", scale={"type": "log"}, axis={"format": "~e"}),
            _axis("share", "quantitative", "share of positions", axis={"format": ".0%"}),
            RELEASE, ("release", "nats", "share"),
        ),
    )  # fmt: skip


def divergence(named: Named) -> Spec:
    values = []
    for name, records in named:
        for key, what in (("median", "median"), ("mean", "mean"), ("p90", "90%"), ("p99", "99%"), ("max", "maximum")):
            if records.metrics and (nats := getattr(records.metrics.figures, f"kl_{key}")):
                values.append({"of positions": what, "release": name, "nats": nats})
    order = ["median", "mean", "90%", "99%", "maximum"]
    return _spec(
        "KLD from the BF16 model",
        "Points: median, mean, 90th and 99th percentile and maximum over all positions of the text.",
        values,
        **_bars(
            _axis("nats", "quantitative", "nats", scale={"type": "log"}),
            _axis("of positions", "nominal", "", sort=order), ("release", "of positions", "nats"),
        ),
    )  # fmt: skip


def entropy(named: Named) -> Spec:
    values = []
    for name, records in named:
        for bucket in (records.metrics and records.metrics.by_entropy) or ():
            if (bucket.kl_mean or 0) > 0:
                end = "" if bucket.high is None else f"{bucket.high:g}"
                where = f"{bucket.low:g}\N{EN DASH}{end}"
                values.append({"entropy": where, "release": name, "nats": bucket.kl_mean, "n": bucket.positions})
    order = list(dict.fromkeys(value["entropy"] for value in values))
    return _spec(
        "Mean KLD by the BF16 model's entropy",
        "Points: mean KLD of the positions in each range of the BF16 model's entropy.",
        values,
        **_bars(
            _axis("nats", "quantitative", "nats", scale={"type": "log"}),
            _axis("entropy", "nominal", "entropy, nats", sort=order), ("release", "entropy", "nats", "n"),
        ),
    )  # fmt: skip


def rivals(records: Records) -> Spec:
    """Mean KLD over size, of this release and of others that were measured by the same protocol."""
    assert records.metrics is not None
    state = records.state
    ours = ("this release", str(records.format), state.output.tensor_bytes, records.metrics.figures.kl_mean)
    theirs = [(one.name, one.format, one.size_bytes, one.kl_mean) for one in records.metrics.rivals]
    values = [
        {"release": f"{name} ({form})", "GB": count / 1e9, "nats": nats or None}
        for name, form, count, nats in (ours, *theirs)
    ]
    x = _axis("GB", "quantitative", "GB", scale={"zero": False, "nice": True, "padding": 40})
    y = _axis("nats", "quantitative", "mean KLD, nats", scale={"type": "log", "nice": True})
    point = {"x": x, "y": y, "tooltip": [{"field": name} for name in ("release", "GB", "nats")]}
    name = {"x": x, "y": y, "text": {"field": "release"}}
    return _spec(
        "Mean KLD by size",
        "Points: mean KLD from the BF16 model over the size of the tensors, of this release and of others.",
        values,
        layer=[{"mark": DOT, "encoding": point}, {"mark": {"type": "text", "dy": -12}, "encoding": name}],
    )


def seconds(named: Named) -> Spec:
    values = [
        {"stage": stage, "release": name, "seconds": took}
        for name, records in named
        for stage, took in records.state.seconds.items()
    ]
    return _spec(
        "Time by stage",
        "Bars: seconds of each stage of quantization since the last start.",
        values,
        **_bars(
            _axis("seconds", "quantitative", "seconds"), _axis("stage", "nominal", "", sort="-x"),
            ("release", "stage", "seconds"), "bar",
        ),
    )  # fmt: skip


def memory(named: Named) -> Spec:
    values = [
        {"place": f"{place}, {what}", "release": name, "GB": count / 1e9}
        for name, records in named
        for what, key in (("peak", "peak_memory_bytes"), ("planned", "planned_memory_bytes"))
        for place, count in getattr(records.state, key).items()
    ]
    return _spec(
        "Memory, planned and used",
        "Bars: planned and peak gigabytes of the host and of each GPU.",
        values,
        **_bars(_axis("GB", "quantitative", "GB"), _axis("place", "nominal", ""), ("release", "place", "GB"), "bar"),
    )


def heat_map(layers: int) -> Spec:
    """Axes, experts across and layers down, and a legend; the page puts domains and the scale of colours in."""
    return {
        "$schema": SCHEMA,
        "width": "container",
        "height": max(160, min(14 * layers, 560)),
        "data": {"values": []},  # cells are drawn by the page: as marks, some 10,000 would take a fifth of a second
        "mark": "rect",
        "encoding": {
            "x": _axis("expert", "ordinal", "expert", axis={"labelOverlap": True, "labelAngle": 0, "ticks": False}),
            "y": _axis("layer", "ordinal", "layer", axis={"labelOverlap": True, "ticks": False}),
            "color": _axis("value", "quantitative", ""),
        },
    }


def heat_values(records: Records) -> list[dict[str, Any]]:
    """Of each expert the tokens it met and the largest output error of its projections, None where it is 0."""
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for row in (row for rows in records.by_layer().values() for row in rows):
        cell = cells.setdefault((row.layer, row.expert), {"layer": row.layer, "expert": row.expert, "error": None})
        cell |= {"tokens": row.tokens, "error": max(row.relative_error, cell["error"] or 0.0) or None}
    return list(cells.values())


def columns(rows: Sequence[ProjectionStatistics], other: Sequence[ProjectionStatistics]) -> dict[str, Any]:
    """quant_log.csv by column. Names are places in `projections` and `methods`; ratio: of another release's error."""
    projections, methods = list(dict.fromkeys(r.projection for r in rows)), list(dict.fromkeys(r.method for r in rows))
    theirs = {(row.layer, row.expert, row.projection): row.relative_error for row in other}
    found: dict[str, Any] = {
        "projections": projections,
        "methods": methods,
        "projection": [projections.index(row.projection) for row in rows],
        "method": [methods.index(row.method) for row in rows],
        "loss": [row.gptqmodel_loss for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in COLUMNS},
    }
    if other:
        found["ratio"] = [_ratio(row, theirs.get((row.layer, row.expert, row.projection))) for row in rows]
    return found


def _ratio(row: ProjectionStatistics, theirs: float | None) -> float | None:
    return float(f"{row.relative_error / theirs:.6g}") if theirs else None
