"""fourfold report: from a release's records to its card, its plots and its page, written beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fourfold.model.files import write_bytes, write_text
from fourfold.quantize.journal import refuse_links
from fourfold.release.contents import CARD, FIGURES, PAGE
from fourfold.release.report.about import About
from fourfold.release.report.card import Serving, card
from fourfold.release.report.page import page
from fourfold.release.report.plots import plots
from fourfold.release.report.records import Records, read_records

Recommend = Callable[[Records, About], Sequence[Serving]]


def write(out: Path, about: About, recommend: Recommend, against: Path | None = None) -> Records:
    """Write OUT/README.md, OUT/report.html and OUT/figures; what was read. recommend: gives serving commands.

    Raises FourfoldError, before anything is written, for folders that are no finished releases, files in them that are
    not as fourfold writes them, and names that the Hub does not take.
    """
    refuse_links(out)
    records = read_records(out)
    other = None if against is None else read_records(against)
    about = about.of(records)
    drawn = list(plots(records))
    text = card(records, about, recommend(records, about), {f"{FIGURES}/{name}": words for name, words, _ in drawn})
    shown = page(records, about, other)
    (out / FIGURES).mkdir(exist_ok=True)
    for name, _, content in drawn:
        write_bytes(out / FIGURES / name, content)
    write_text(out / PAGE, shown)
    write_text(out / CARD, text)
    return records
