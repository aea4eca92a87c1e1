"""report.html: one file that needs no network. Tables are Jinja's, charts Vega-Lite's, the rest is page.js."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2
import vl_convert

from fourfold.release.report.about import About
from fourfold.release.report.card import WORST, worst_rows
from fourfold.release.report.charts import MAPS, RATIO, charts, columns, heat_map, other_name
from fourfold.release.report.escape import clean, script_json
from fourfold.release.report.quality import UNMEASURED
from fourfold.release.report.records import Records
from fourfold.units import FIGURES, clock_text, size

HERE = Path(__file__).parent
LIBRARY = "window.vegaEmbed = vegaEmbed;"  # what the bundle of Vega, Vega-Lite and Vega-Embed leaves to the page


def page(records: Records, about: About, against: Records | None = None) -> str:
    """The page. Same inputs and the same version of vl-convert-python, same text."""
    rows, other = records.projections, against.projections if against else ()
    maps = [*MAPS, *([RATIO] if against else [])]
    data: dict[str, Any] = {
        "rows": columns(rows, other),
        "charts": charts(records, against),
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
        named=["this release", *([other_name(records, against)] if against else [])],
        quality=_quality(records, against),
        checks=records.verdict.checks if records.verdict else (),
        stale=records.stale,
        missing=records.missing,
        worst_header=WORST,
        worst=worst_rows(records),
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
        ("format", f"{records.release.format}, int4, groups of {records.release.group_size}"),
        ("size", f"{size(state.source_tensor_bytes)} \N{RIGHTWARDS ARROW} {size(state.output.tensor_bytes)}"),
        ("projections", f"{state.projections:,}"),
        *((FIGURES[key][0], _figure(records, key)) for key in ("kl_mean", "perplexity_ratio")),
        ("time", clock_text(sum(state.seconds.values()))),
        ("verified", ("no" if verdict is None else ", ".join(verdict.levels) if verdict.passed else "FAILED")),
    ]


def _quality(records: Records, against: Records | None) -> list[tuple[str, list[str]]]:
    """Rows of the table of metrics: words, and a cell for each release."""
    both = [records] if against is None else [records, against]
    return [(words, [_figure(one, key) for one in both]) for key, (words, _) in FIGURES.items()]


def _figure(records: Records, key: str) -> str:
    return records.metrics.text(key) if records.metrics else UNMEASURED
