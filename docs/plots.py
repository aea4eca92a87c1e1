"""Plots of the documentation, from benchmarks/results/*.json: `make figures` draws them, `make check` compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vl_convert
from results import ROOT, curves, label

from fourfold.release.report.plots import CONFIG

IMAGES = ROOT / "docs" / "images"
CURVES = {  # result of benchmarks/quality.py: title
    "quality": "example model",
    "quality_deep": "16 layers",
    "quality_real": "outliers of a real LLM",
}
TOKENS_AXIS = {"values": [2**power for power in range(12, 22)], "labelExpr": "datum.value / 1024 + 'k'", "grid": False}


def learning_curves() -> str:
    """SVG: mean KLD with free routing by calibration tokens, a panel for each model."""
    panels = [_panel(name, title) for name, title in CURVES.items()]
    chart = {"hconcat": panels, "spacing": 30, "config": CONFIG}
    return f"{vl_convert.vegalite_to_svg(json.dumps(chart)).rstrip()}\n"


def _panel(name: str, title: str) -> dict[str, Any]:
    found = curves(name)
    values = [
        {"method": label(method).replace("`", ""), "tokens": tokens, "kld": round(1e3 * value, 2)}
        for method, by_tokens in found.items()
        for tokens, value in sorted(by_tokens.items())
    ]
    colour = {"field": "method", "type": "nominal", "title": None, "sort": None, "legend": {"orient": "bottom"}}
    x = {"field": "tokens", "type": "quantitative", "scale": {"type": "log", "base": 2, "nice": False}}
    y = {"field": "kld", "type": "quantitative", "scale": {"zero": True}}
    return {
        "title": title,
        "width": 200,
        "height": 220,
        "data": {"values": values},
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": x | {"title": "calibration tokens", "axis": TOKENS_AXIS},
            "y": y | {"title": "mean KLD (x 10^-3 nats)"},
            "color": colour,
        },
    }


PICTURES: dict[Path, Callable[[], str]] = {IMAGES / "learning-curves.svg": learning_curves}
