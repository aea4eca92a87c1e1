"""Plots of the card, by matplotlib: the page's data, as PNGs at the width that the Hub shows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from fourfold.datatypes import StreamDrift
from fourfold.release.contents import PLOTS
from fourfold.release.report.records import Records

INCHES, DPI = 8.0, 200  # 1,600 pixels: twice the width of a card's text
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 11, "axes.grid": True, "grid.alpha": 0.35}
COLOURS = ("#0b57d0", "#b06000", "#146c2e")
DRIFT, ERRORS, EXPERTS = PLOTS
LEAST_ERROR = 1e-12  # where a log scale begins for an error of nothing


def plots(records: Records) -> Iterator[tuple[str, str, bytes]]:
    """(file name, what it shows, PNG). A plot whose data was not measured is not there.

    The same records and the same version of matplotlib give the same bytes.
    """
    if records.metrics and (layers := records.metrics.layers):
        yield DRIFT, _drift_words(layers), _png(lambda figure: _drift(figure, layers), 3.2)
    words = "Output error of each layer's experts: median and maximum"
    yield ERRORS, words, _png(lambda figure: _errors(figure, records), 3.4)
    height = 1.6 + 0.07 * max(12, len(records.by_layer()))
    words = "Calibration tokens of each expert and its maximum output error"
    yield EXPERTS, words, _png(lambda figure: _experts(figure, records), height)


def _png(draw: Callable[[Figure], None], height: float) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(INCHES, height), dpi=DPI, layout="constrained", facecolor="white")
        draw(figure)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _drift_words(layers: Sequence[StreamDrift]) -> str:
    return f"Hidden-state drift and router agreement by layer; drift after the last is {layers[-1].hidden_error:.4f}"


def _drift(figure: Figure, layers: Sequence[StreamDrift]) -> None:
    left, right = figure.subplots(1, 2)
    left.plot([row.layer for row in layers], [row.hidden_error for row in layers], "o-", ms=3, color=COLOURS[0])
    left.set(xlabel="layer", ylabel="drift of hidden states", ylim=(0, None))
    routed = {row.layer: 100 * row.router_agreement for row in layers if row.router_agreement is not None}
    right.plot([*routed], [*routed.values()], "o-", ms=3, color=COLOURS[1])
    right.set(xlabel="layer", ylabel="router agreement, %")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _errors(figure: Figure, records: Records) -> None:
    axes: Axes = figure.subplots()
    layers = records.by_layer()
    for colour, name in zip(COLOURS, dict.fromkeys(row.projection for row in records.projections), strict=False):
        found = [[row.relative_error for row in rows if row.projection == name] for rows in layers.values()]
        for of, style, words in ((median, "o-", "median"), (max, "^:", "maximum")):
            heights = [max(of(errors), LEAST_ERROR) for errors in found]
            axes.plot(list(layers), heights, style, ms=3, color=colour, label=f"{name}, {words}")
    axes.set(xlabel="layer", ylabel="relative output error", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(ncols=3, fontsize=9)


def _experts(figure: Figure, records: Records) -> None:
    layers = records.by_layer()
    width = 1 + max(row.expert for row in records.projections)
    tokens = [[float("nan")] * width for _ in layers]
    errors = [[float("nan")] * width for _ in layers]
    for place, rows in enumerate(layers.values()):
        for row in rows:
            tokens[place][row.expert] = row.tokens
            known = errors[place][row.expert]
            errors[place][row.expert] = max(row.relative_error, LEAST_ERROR, known if known == known else 0)
    names = list(layers)
    extent = (-0.5, width - 0.5, names[-1] + 0.5, names[0] - 0.5)
    least = min(row.tokens for row in records.projections)
    scales = (SymLogNorm(linthresh=1, vmin=least), LogNorm())
    both = zip(figure.subplots(1, 2, sharey=True), (tokens, errors), ("tokens", "output error"), scales, strict=True)
    for axes, values, title, scale in both:
        image = axes.imshow(values, aspect="auto", interpolation="nearest", norm=scale, extent=extent)
        axes.set(xlabel="expert", title=title)
        axes.grid(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes).ax.yaxis.set_minor_formatter(NullFormatter())
        axes.label_outer()
    figure.axes[0].set_ylabel("layer")
