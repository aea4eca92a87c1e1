"""What `report` writes for a folder: card, plots and page of a release; of GGUF and MLX the card alone."""

from __future__ import annotations

from pathlib import Path

from fourfold.records.release import Export
from fourfold.release.contents import CARD, FIGURES, PAGE
from fourfold.release.report import export_card
from fourfold.release.report.about import About
from fourfold.release.report.recommend import recommend
from fourfold.release.report.write import write


def make(out: Path, record: Export | None, about: About, against: Path | None) -> tuple[dict[Path, str], list[str]]:
    """record: conversion.json of GGUF and MLX. Return what each path that was written is, and lines on what is missing.

    Raises FourfoldError as `write` does.
    """
    written = {out / CARD: "model card"}
    if record is not None:
        export_card.write(out, record, about)
        return written, []
    records = write(out, about, recommend, against)
    written |= {out / FIGURES: "its plots", out / PAGE: "every projection, for a browser"}
    return written, [f"not measured: {what} ({way})" for what, way in records.missing]
