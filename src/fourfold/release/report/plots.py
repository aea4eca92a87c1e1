"""Plots of the card: charts of the page as PNGs, at twice the width that the Hub shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import vl_convert

from fourfold.release.contents import PLOTS
from fourfold.release.report.charts import Spec, drift, errors, heat_values, rivals, routers
from fourfold.release.report.records import Records

WIDTH, MAP_WIDTH, SCALE = 640, 256, 2  # of what is plotted, without axes and legends; device pixels of each
DRIFT, ERRORS, EXPERTS, RIVALS = PLOTS
CONFIG: Spec = {
    "background": "white",
    "padding": 10,
    "font": "Liberation Sans",  # which vl-convert brings
    "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "gridColor": "#e4e4e4"},
    "legend": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "symbolStrokeWidth": 2},
    "title": {"fontSize": 14, "fontWeight": "normal"},
    "mark": {"color": "#0b57d0"},
    "range": {"category": ["#0b57d0", "#b06000", "#146c2e", "#b3261e", "#7b1fa2", "#00696d"]},
}


def plots(records: Records) -> Iterator[tuple[str, str, bytes]]:
    """(file name, what it shows, PNG). A plot whose data was not measured is not there.

    The same records and the same version of vl-convert-python give the same bytes.
    """
    if records.metrics and (layers := records.metrics.layers):
        found = [make([("", records)]) | {"width": WIDTH // 2} for make in (drift, routers)]
        for chart in found:  # of one release: a legend would say nothing
            del chart["encoding"]["color"], chart["encoding"]["strokeDash"]
        last = f"{layers[-1].hidden_error:.4f}"
        words = f"Hidden-state drift and router agreement by layer; drift after the last is {last}"
        yield DRIFT, words, _png({"hconcat": found, "spacing": 40})
    if records.metrics and (others := records.metrics.rivals):
        words = f"Mean KLD by size: this release and {', '.join(one.name for one in others)}"
        yield RIVALS, words, _png(rivals(records) | {"width": WIDTH})
    words = "Output error of each layer's experts: median and maximum"
    yield ERRORS, words, _png(errors(records) | {"width": WIDTH})
    titles = {"tokens": "calibration tokens", "error": "relative output error"}
    maps = [_map(records, field, title) for field, title in titles.items()]
    words = "Calibration tokens of each expert and its maximum output error"
    yield EXPERTS, words, _png({"hconcat": maps, "resolve": {"scale": {"color": "independent"}}, "spacing": 30})


def _map(records: Records, field: str, title: str) -> Spec:
    """A quantity of every expert: experts across, layers down."""
    values, layers = heat_values(records), len(records.by_layer())
    experts = len({cell["expert"] for cell in values})
    axis = {"labelOverlap": True, "labelAngle": 0, "ticks": False}
    scale = {"type": "log" if field == "error" else "symlog", "scheme": "viridis"}
    found = [cell[field] for cell in values if cell[field] is not None]
    legend = {"values": _marks(min(found, default=1), max(found, default=1))}
    return {
        "width": experts * max(1, MAP_WIDTH // experts),  # whole pixels for each cell
        "height": layers * max(6, 120 // layers),
        "title": title,
        "data": {"values": values},
        "mark": "rect",
        "encoding": {
            "x": {"field": "expert", "type": "ordinal", "axis": axis},
            "y": {"field": "layer", "type": "ordinal", "axis": axis},
            "color": {"field": field, "type": "quantitative", "title": None, "scale": scale, "legend": legend},
        },
    }


def _marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two values; the powers alone where these are many."""
    powers = [10.0**exponent for exponent in range(-12, 10)]
    marks = [mark for power in powers for mark in (power, 2 * power, 5 * power) if low <= mark <= high]
    return marks if len(marks) < 8 else [power for power in powers if low <= power <= high]


def _png(chart: dict[str, Any]) -> bytes:
    return bytes(vl_convert.vegalite_to_png(json.dumps(chart | {"config": CONFIG}), scale=SCALE))
