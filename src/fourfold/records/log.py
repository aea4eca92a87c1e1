"""quant_log.csv: a row per expert projection."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from fourfold.datatypes import FourfoldError, ProjectionStatistics
from fourfold.model.files import write_text
from fourfold.model.json_object import read_bytes

COLUMNS = [column.name for column in dataclasses.fields(ProjectionStatistics)]
FIX = "Bring back the one that quantize wrote"


def write_log(path: Path, projections: Iterable[ProjectionStatistics]) -> None:
    """In order of layer, expert, projection."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in sorted(projections, key=lambda row: (row.layer, row.expert, row.projection)):
        values = [getattr(row, name) for name in COLUMNS]
        table.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    write_text(path, text.getvalue())


def read_log(path: Path) -> tuple[ProjectionStatistics, ...]:
    """Raises FourfoldError naming the line that is not as it should be."""
    try:
        rows: list[list[str]] = [*csv.reader(read_bytes(path)[0].decode().splitlines()), []]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FourfoldError(f"{path}: not CSV ({error}). {FIX}") from None
    header, *lines = rows
    if header != COLUMNS:
        raise FourfoldError(f"{path}: columns: got {','.join(header)[:200]}, expected {','.join(COLUMNS)}. {FIX}")
    return tuple(_row(path, number, line) for number, line in enumerate(lines[:-1], 2))


def _row(path: Path, number: int, line: list[str]) -> ProjectionStatistics:
    try:
        values = {name: text or None for name, text in zip(COLUMNS, line, strict=True)}
        row = msgspec.convert(values, ProjectionStatistics, strict=False)
        for name, value in vars(row).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: got {value}, expected a finite number")
    except ValueError as error:
        raise FourfoldError(f"{path}: line {number}: {error}. {FIX}") from None
    return row
