"""fourfold report: from a release's records to its card, its plots and its page, written beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import eval_result_entries_to_yaml

from fourfold.model.files import write_bytes, write_text
from fourfold.quantize.journal import refuse_links
from fourfold.release.contents import CARD, EVAL_RESULTS, FIGURES, PAGE
from fourfold.release.report.about import About, leaderboard_entries
from fourfold.release.report.card import Serving, card
from fourfold.release.report.page import page
from fourfold.release.report.plots import plots
from fourfold.release.report.records import Records

Recommend = Callable[[Records, About], Sequence[Serving]]


def write(out: Path, about: About, recommend: Recommend, against: Path | None = None) -> Records:
    """Write OUT/README.md, report.html, figures and .eval_results; return what was read. recommend: gives commands.

    Raises FourfoldError, before anything is written, for folders that are no finished releases, files in them that are
    not as fourfold writes them, and names that the Hub does not take.
    """
    refuse_links(out)
    records = Records.open(out)
    other = None if against is None else Records.open(against)
    about = about.of(records.state.source.hub)
    drawn = list(plots(records))
    text = card(records, about, recommend(records, about), {f"{FIGURES}/{name}": words for name, words, _ in drawn})
    shown = page(records, about, other)
    (out / FIGURES).mkdir(exist_ok=True)
    for name, _, content in drawn:
        write_bytes(out / FIGURES / name, content)
    write_text(out / PAGE, shown)
    write_text(out / CARD, text)
    (out / EVAL_RESULTS).unlink(missing_ok=True)
    if records.metrics and (entries := leaderboard_entries(records.metrics)):
        (out / EVAL_RESULTS).parent.mkdir(exist_ok=True)
        write_text(out / EVAL_RESULTS, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    return records
