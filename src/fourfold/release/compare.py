"""Two checkpoints beside each other: tensors, codes, scales and metrics, whatever their storage. docs/releases.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from msgspec import structs, to_builtins

from fourfold.core.pack import unpack_codes
from fourfold.datatypes import Event, Progress, ignore
from fourfold.model.config import read_config
from fourfold.model.family import split_stack
from fourfold.model.files import CHUNK_BYTES
from fourfold.model.sources import SourceIndex, layout_problems, open_source
from fourfold.model.stored import StoredWeight
from fourfold.model.tensors import DTYPES, raw_bytes
from fourfold.quantize.journal import FINISHED, METRICS
from fourfold.records.record import Ends
from fourfold.records.release import Export
from fourfold.records.results import Metrics
from fourfold.release.contents import read_export
from fourfold.release.conversion import open_job
from fourfold.release.convert import ScaleChanges
from fourfold.release.peer_faults import (
    DRAFT,
    NORMS,
    index_faults,
    is_norm,
    is_rounded_norm,
    is_rtn,
    quantized_draft,
)
from fourfold.release.verify.reading import count_changes, open_reading

STACKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Values of a tensor without codes, or rows of a stack of experts: bytes of `tensor` from `start` on."""

    tensor: str
    start: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(kw_only=True)
class WeightErrors:
    """|W - Wq|_F / |W|_F of projections that have codes in one checkpoint and not in the other, over all of them.

    worst_name: of the projection with the largest error, "" without one.
    """

    projections: int = 0
    mean: float = 0.0
    median: float = 0.0
    worst: float = 0.0
    worst_name: str = ""

    @classmethod
    def of(cls, errors: Mapping[str, float]) -> WeightErrors:
        """errors: by name."""
        if not errors:
            return cls()
        name, values = max(errors, key=lambda one: errors[one]), errors.values()
        return cls(
            projections=len(errors), mean=fmean(values), median=median(values), worst=errors[name], worst_name=name
        )


@dataclass(kw_only=True)
class Comparison:
    """What two checkpoints have in common. formats: None where nothing is quantized.

    equal: tensors without codes that are the same to the bit, stacks of experts counted as a tensor for each;
    different: those that are not, and those with codes that cannot be compared code by code; only_first, only_second:
    by name; projections: with codes in both, int8 of them with 8 bits; codes, codes_changed, projections_changed,
    scales: of them; errors: of projections that have codes in one alone; metrics: a figure of metrics.json in both, by
    name, intervals: its confidence intervals; same_protocol: both were measured alike, None where one was not.
    experts: projections of experts that have codes in one alone; of these, zero_experts, and rtn_experts: rounded to
    nearest; rounded_norms: see peer_faults.py; faults: known ones of quantizers, in words.
    """

    first: str
    second: str
    formats: tuple[str | None, str | None]
    equal: int = 0
    different: list[str] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    projections: int = 0
    int8: int = 0
    codes: int = 0
    codes_changed: int = 0
    projections_changed: int = 0
    scales: ScaleChanges = field(default_factory=ScaleChanges)
    errors: WeightErrors = field(default_factory=WeightErrors)
    metrics: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    intervals: dict[str, tuple[Ends | None, Ends | None]] = field(default_factory=dict)
    same_protocol: bool | None = None
    experts: int = 0
    zero_experts: int = 0
    rtn_experts: int = 0
    rounded_norms: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every weight is the same. How it is stored, and what is said of it beside, may differ."""
        lists = self.different or self.only_first or self.only_second
        return not (lists or self.codes_changed or self.scales.changed or self.errors.worst)

    def to_json(self) -> dict[str, Any]:
        return {"same": self.same, **to_builtins(self)}


def compare(first: Path, second: Path, *, progress: Progress = ignore) -> Comparison:
    """Compare every weight of two checkpoints, quantized or not, by any maker.

    Memory does not grow with them. Raises FourfoldError for a folder that is no checkpoint, or one that is quantized in
    a way that is not read.
    """
    for new, out in ((first, second), (second, first)):
        if (record := read_export(new)) is not None:
            return _compare_export(
                Comparison(first=str(first), second=str(second), formats=(None, None)), new, record, out
            )
    stocks = _open(first), _open(second)
    found = Comparison(first=str(first), second=str(second), formats=_names(stocks))
    pieces = _pieces(stocks[0]), _pieces(stocks[1])
    names = [
        {*piece, *(f"{name}weight" for name in stock.projections)} for piece, stock in zip(pieces, stocks, strict=True)
    ]
    found.only_first, found.only_second = sorted(names[0] - names[1]), sorted(names[1] - names[0])
    common, errors = sorted(names[0] & names[1]), dict[str, float]()
    for place, name in enumerate(common):
        stem = name.removesuffix("weight")
        if name in pieces[0] and name in pieces[1]:
            _compare_pieces(found, name, stocks, (pieces[0][name], pieces[1][name]))
        elif name in pieces[0] or name in pieces[1]:
            source, release = (0, 1) if name in pieces[0] else (1, 0)
            error = _weight_error(found, stocks[source], pieces[source][name], stocks[release], stem)
            if error is None:
                found.different.append(name)
            else:
                errors[stem.rstrip(".")] = error
        else:
            _compare_projections(found, stocks, (stocks[0].projections[stem], stocks[1].projections[stem]))
        progress(Event(kind="stage", stage="compare", done=place + 1, total=len(common), unit="tensors"))
    found.errors = WeightErrors.of(errors)
    found.faults = [*_faults(found, stocks)]
    _compare_metrics(found, first, second)
    return found


def _compare_export(found: Comparison, new: Path, record: Export, out: Path) -> Comparison:
    """What `convert` wrote for an engine of its own beside a release: every weight by its format's own arithmetic.

    Changed codes are changed weights; scales have no count of their own.
    """
    job = open_job(out, ignore)
    reading = open_reading(new, job, record)
    wanted, names = reading.wanted(), reading.names()
    formats = {str(new): record.after, str(out): job.before.name}
    found.formats = (formats[found.first], formats[found.second])
    missing, extra = sorted(wanted.keys() - names), sorted(names - wanted.keys())
    found.only_first, found.only_second = (extra, missing) if found.first == str(new) else (missing, extra)
    if missing:
        return found
    for one in count_changes(reading).values():
        found.projections += 1
        found.int8 += one.bits == 8
        found.codes += one.weights
        found.codes_changed += one.changed
        found.projections_changed += one.changed > 0
    for name in sorted(name for name, has_codes in wanted.items() if not has_codes):
        if reading.differs(name):
            found.different.append(name)
        else:
            found.equal += 1
    return found


def _names(stocks: tuple[SourceIndex, SourceIndex]) -> tuple[str | None, str | None]:
    one, other = (stock.format.name if stock.format else stock.kind or None for stock in stocks)
    return one, other


def _open(folder: Path) -> SourceIndex:
    return open_source(folder, read_config(folder))


def _pieces(stored: SourceIndex) -> dict[str, Piece]:
    """Everything without codes, stacks of experts as a piece for each, so that both layouts have the same names."""
    found: dict[str, Piece] = {}
    for name, header in stored.kept.items():
        if not name.endswith(STACKS) or len(header.shape) != 3:
            found[name] = Piece(tensor=name, start=0, shape=header.shape, dtype=header.dtype)
            continue
        for part, start, shape in split_stack(name, header.shape, DTYPES[header.dtype].itemsize):
            found[part] = Piece(tensor=name, start=start, shape=shape, dtype=header.dtype)
    return found


def _compare_pieces(
    found: Comparison, name: str, stocks: tuple[SourceIndex, SourceIndex], pieces: tuple[Piece, Piece]
) -> None:
    one, other = pieces
    same = (one.shape, one.dtype) == (other.shape, other.dtype)
    size = torch.Size(one.shape).numel() * DTYPES[one.dtype].itemsize
    for start in range(0, size if same else 0, CHUNK_BYTES):
        count = min(CHUNK_BYTES, size - start)
        parts = [torch.empty(count, dtype=torch.uint8) for _ in stocks]
        for stock, piece, part in zip(stocks, pieces, parts, strict=True):
            stock.disk.read_range(piece.tensor, piece.start + start, raw_bytes(part))
        same = same and torch.equal(*parts)
    if same:
        found.equal += 1
    else:
        found.different.append(name)
        if one.shape == other.shape and is_norm(name, one.shape):
            values = [stock.disk.read(piece.tensor) for stock, piece in zip(stocks, pieces, strict=True)]
            found.rounded_norms += is_rounded_norm(*values) or is_rounded_norm(*reversed(values))


def _weight_error(
    found: Comparison, source: SourceIndex, piece: Piece, release: SourceIndex, stem: str
) -> float | None:
    """Of a projection against weights without codes; None if these are of another shape or no floats."""
    projection, dtype = release.projections[stem], DTYPES[piece.dtype]
    if piece.shape != (projection.outputs, projection.inputs) or not dtype.is_floating_point:
        return None
    weight_NK = torch.empty(piece.shape, dtype=dtype)
    source.disk.read_range(piece.tensor, piece.start, raw_bytes(weight_NK))
    wanted_NK, parts = weight_NK.float(), release.read_parts(projection)
    stored_NK = projection.dequantize(parts)
    if ".experts." in stem:
        found.experts += 1
        found.zero_experts += not stored_NK.any() and bool(wanted_NK.any())
        found.rtn_experts += release.format is not None and is_rtn(
            wanted_NK, stored_NK, parts, projection, release.format
        )
    error, size = float((wanted_NK - stored_NK).norm()), float(wanted_NK.norm())
    return error / size if size else float(error > 0)


def _compare_projections(
    found: Comparison, stocks: tuple[SourceIndex, SourceIndex], projections: tuple[StoredWeight, StoredWeight]
) -> None:
    tensors = [stock.read_parts(projection) for stock, projection in zip(stocks, projections, strict=True)]
    (one, other), name = projections, f"{projections[0].name}weight"
    found.projections += 1
    found.int8 += one.bits == 8 == other.bits
    if (one.bits, one.outputs, one.inputs, one.groups) != (other.bits, other.outputs, other.inputs, other.groups):
        found.different.append(name)
        return
    formats = [stock.format for stock in stocks if stock.format]
    stored = list(zip(tensors, projections, formats, strict=False))
    plain = [not any(layout_problems(*each)) for each in stored]
    if len(formats) < 2 or not all(
        plain
    ):  # floats, zero points or an order of groups: the weights themselves say whether it is the same
        weights = [one.dequantize(parts) for one, parts in zip(projections, tensors, strict=True)]
        if not torch.equal(*weights):
            found.different.append(name)
        return
    words = [format.oriented(part[format.codes]) for part, _, format in stored]
    scales = [format.oriented(part[format.scales]).float() for part, _, format in stored]
    changed = 0
    if not torch.equal(*words):
        changed = int((unpack_codes(words[0], one.bits) != unpack_codes(words[1], one.bits)).sum())
    found.codes += one.outputs * one.inputs
    found.codes_changed += changed
    found.projections_changed += changed > 0
    found.scales.add(*scales)


def _faults(found: Comparison, stocks: tuple[SourceIndex, SourceIndex]) -> Iterator[str]:
    """Known faults of quantizers. Of two checkpoints one without codes is the source of the other."""
    of = f"of {found.experts:,} projections of experts"
    if found.rounded_norms:
        yield f"{found.rounded_norms:,} {NORMS}"
    if found.zero_experts:
        yield f"{found.zero_experts:,} {of} are zeros: these experts answer nothing"
    if found.rtn_experts:
        yield f"{found.rtn_experts:,} {of} are the source's weights rounded to nearest (RTN): they were not calibrated"
    for stock, lost in zip(stocks, (found.only_second, found.only_first), strict=True):
        yield from index_faults(stock.folder)
        if not stock.projections:
            continue
        drafts = [name for name in lost if name.startswith(DRAFT)]
        if drafts and not any(name.startswith(DRAFT) for name in stock.disk.headers):
            yield f"draft head: dropped, {len(drafts):,} tensors ({drafts[0]}): no speculative decoding"
        if not (stock.folder / FINISHED).is_file() and (said := quantized_draft(stock)):
            yield said


def _compare_metrics(found: Comparison, first: Path, second: Path) -> None:
    """metrics.json of both, where they have one."""
    pair = one, other = Metrics.find(first / METRICS), Metrics.find(second / METRICS)
    summaries = [structs.asdict(each.summary) if each and each.summary else {} for each in pair]
    intervals = [(each.intervals if each else None) or {} for each in pair]
    for name in dict.fromkeys([*summaries[0], *summaries[1]]):
        found.metrics[name] = (summaries[0].get(name), summaries[1].get(name))
        found.intervals[name] = (intervals[0].get(name), intervals[1].get(name))
    if one and other:
        found.same_protocol = one.protocol == other.protocol
