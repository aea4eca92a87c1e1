"""report.html: one file that needs no network. Tables are Jinja's, charts Vega-Lite's, the rest is page.js."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from fourfold.release.report.about import About
from fourfold.release.report.card import parameters_text
from fourfold.release.report.charts import MAPS, RATIO, charts, columns, heat_map, other_name
from fourfold.release.report.escape import clean, script_json
from fourfold.release.report.layers import cold_text, drift_grid, worst_grid
from fourfold.release.report.quality import (
    draft_grid,
    draft_head,
    figure_grid,
    image_grid,
    image_text,
    protocol_text,
    routing_grid,
    server_lines,
    task_grid,
    verdict,
)
from fourfold.release.report.records import Records
from fourfold.units import clock_text, size

HERE = Path(__file__).parent
LIBRARY = "window.vegaEmbed = vegaEmbed;"  # what the bundle of Vega, Vega-Lite and Vega-Embed leaves to the page


def page(records: Records, about: About, against: Records | None = None) -> str:
    """The page. Same inputs and the same version of vl-convert-python, same text."""
    others = [(other_name(records, against), against.metrics)] if against else []
    rows, other, metrics = records.projections, against.projections if against else (), records.metrics
    maps = [*MAPS, *([RATIO] if against else [])]
    data: dict[str, Any] = {
        "rows": columns(rows, other),
        "charts": charts(records, against),
        "decoder": records.layers,
        "map": heat_map(len(records.by_layer())),
        "maps": {field: {"title": title, "scale": scale} for field, title, scale in maps},
    }
    library, script = vl_convert.javascript_bundle(LIBRARY), (HERE / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        name=clean(about.name.rpartition("/")[2]),
        facts=_facts(records, about),
        verdict=verdict(metrics),
        quality=figure_grid(metrics, others) if metrics or any(found for _, found in others) else None,
        protocol=metrics and protocol_text(metrics.protocol),
        images=metrics and image_grid(metrics),
        routing=metrics and routing_grid(metrics),
        image_text=metrics and image_text(metrics),
        drafts=metrics and draft_grid(metrics),
        draft_head=metrics and draft_head(metrics),
        tasks=metrics and task_grid(metrics.tasks),
        servers=[*server_lines(metrics.tasks)] if metrics else [],
        checks=records.verdict.checks if records.verdict else (),
        stale=records.stale,
        missing=[*records.missing],
        worst=worst_grid(records),
        cold=cold_text(records),
        drift=drift_grid(records),
        charts=[(id, chart["usermeta"]["title"]) for id, chart in data["charts"].items()],
        maps=maps,
        projections=data["rows"]["projections"],
        count=len(rows),
        data=script_json(data),
        library=library,
        script=script,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        hashes=" ".join(_digest(text) for text in (library, script)),
    )


def _digest(text: str) -> str:
    """What a page's policy calls a script that it may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _facts(records: Records, about: About) -> list[tuple[str, str]]:
    state = records.state
    verdict = records.verdict
    return [
        ("base model", about.base_model or "not stated"),
        ("format", f"{records.format}, int4, groups of {records.recipe.scheme.group}"),
        ("size", f"{size(state.source_tensor_bytes)} \N{RIGHTWARDS ARROW} {size(state.output.tensor_bytes)}"),
        ("parameters", parameters_text(records)),
        ("projections", f"{state.projections:,}"),
        ("time", clock_text(sum(state.seconds.values()))),
        ("verified", ("no" if verdict is None else ", ".join(verdict.levels) if verdict.passed else "FAILED")),
    ]
