"""Files of the guidance sweep in OUT: rows on their way, routers' margins, each layer's curvature with its record."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.core import guidance
from fourfold.datatypes import FourfoldError
from fourfold.distributed.workers import Worker
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes
from fourfold.quantize.estimate import damping_by_rule
from fourfold.quantize.journal import sweep_folder
from fourfold.quantize.output import damage
from fourfold.quantize.plan import Plan
from fourfold.records.record import read_entry, write_entry
from fourfold.records.release import CurvatureRecord, MarginRecord

INPUT, ROUNDED, GRADIENT, FIELD = "input", "rounded", "gradient", "routing"  # rows before a layer
CURVATURE, MARGIN = "curvature", "margin"  # of a layer
HIDDEN, MATRIX = "hidden_RTD", "curvature_DD"  # tensors in these files


class Finished(NamedTuple):
    """A layer that the sweep has gone back through. curvature_DD: None where it is not wanted; the rest: rows before
    the layer, field_RTD None where margins have no part.
    """

    number: int
    source_digest: str
    curvature_DD: Tensor | None
    gradient_RTD: Tensor
    field_RTD: Tensor | None


def guided_layers(plan: Plan) -> tuple[int, ...]:
    """Layers whose curvature is wanted: those whose experts are solved. None where the recipe has no guidance."""
    return tuple(layer for layer in plan.solve if plan.layers[layer].routed and plan.work.guidance_tokens)


def row_damping(plan: Plan) -> float:
    """What is added to the diagonal of the rows' metric, of itself."""
    return plan.recipe.guidance.damp or damping_by_rule(plan.work)


# ---- rows


def rows_path(folder: Path, kind: str, place: int) -> Path:
    """A file of the sweep: of rows before layer `place`, or of that layer."""
    return folder / f"{kind}-{place:05d}.safetensors"


def _open(folder: Path, kind: str, place: int) -> TensorIndex:
    return TensorIndex.open_shards(folder, [rows_path(folder, kind, place).name])


def read_rows(folder: Path, kind: str, place: int, own: slice) -> Tensor:
    """Consecutive rows of a file, [R, T, D]."""
    index = _open(folder, kind, place)
    header = index.header(HIDDEN)
    rows_RTD = torch.empty(own.stop - own.start, *header.shape[1:], dtype=DTYPES[header.dtype])
    index.read_range(HIDDEN, own.start * (header.size_bytes // header.shape[0]), raw_bytes(rows_RTD))
    return rows_RTD


def own_rows(worker: Worker, folder: Path, kind: str, place: int) -> Tensor:
    """A worker's rows of a file."""
    count = _open(folder, kind, place).header(HIDDEN).shape[0]
    return read_rows(folder, kind, place, worker.own_samples(count))


def write_rows(folder: Path, kind: str, place: int, hidden_RTD: Tensor) -> None:
    write_shard(folder, rows_path(folder, kind, place).name, [OutputTensor.of(HIDDEN, hidden_RTD)])


def write_forward(
    folder: Path, place: int, hidden_RTD: Tensor, rounded_RTD: Tensor | None, margin: MarginRecord | None
) -> None:
    """Rows before layer `place`, and last, as a sweep resumes where they are, those of the source.

    rounded_RTD: of the source with rounded experts; margin: of the layer before.
    """
    if margin is not None:
        write_entry(_record_path(folder, MARGIN, margin.layer), margin)
    if rounded_RTD is not None:
        write_rows(folder, ROUNDED, place, rounded_RTD)
    write_rows(folder, INPUT, place, hidden_RTD)
    rows_path(folder, ROUNDED, place - 1).unlink(missing_ok=True)


def replace_rows(folder: Path, place: int, gradient_RTD: Tensor, field_RTD: Tensor | None = None) -> None:
    """Write gradients before layer `place`, and delete what they were made from."""
    if field_RTD is not None:
        write_rows(folder, FIELD, place, field_RTD)
    write_rows(folder, GRADIENT, place, gradient_RTD)
    for kind, used in ((INPUT, place), (GRADIENT, place + 1), (FIELD, place + 1)):
        rows_path(folder, kind, used).unlink(missing_ok=True)


def delete_rows(folder: Path) -> None:
    """Delete all but curvatures and their records."""
    for kind in (INPUT, ROUNDED, GRADIENT, FIELD, MARGIN):
        for path in folder.glob(f"{kind}-*"):
            path.unlink()


# ---- records


def _record_path(folder: Path, kind: str, layer: int) -> Path:
    return rows_path(folder, kind, layer).with_suffix(".json")


def curvature_record_path(folder: Path, layer: int) -> Path:
    return _record_path(folder, CURVATURE, layer)


def write_layer(plan: Plan, folder: Path, found: Finished) -> None:
    """On the writer's thread: a layer's curvature, its record when that is durable, then the rows before it."""
    if found.curvature_DD is not None:
        name = rows_path(folder, CURVATURE, found.number).name
        written = write_shard(folder, name, [OutputTensor.of(MATRIX, found.curvature_DD)])
        record = CurvatureRecord(
            layer=found.number,
            sha256=written.sha256,
            source_digest=found.source_digest,
            predicted_share=guidance.predicted_share(found.curvature_DD, row_damping(plan)),
        )
        write_entry(curvature_record_path(folder, found.number), record)
    replace_rows(folder, found.number, found.gradient_RTD, found.field_RTD)


def read_margin(folder: Path, layer: int) -> MarginRecord | None:
    """None where it is missing or cannot be read."""
    return read_entry(_record_path(folder, MARGIN, layer), MarginRecord)


def has_margins(plan: Plan, folder: Path, place: int) -> bool:
    """Whether the margins of all layers before `place` are known, if they have a part at all."""
    routed = [layer.index for layer in plan.layers[:place] if layer.routed] if plan.work.guidance_routing else []
    return all(read_margin(folder, layer) is not None for layer in routed)


def read_records(plan: Plan, out: Path) -> tuple[CurvatureRecord, ...]:
    """Of guided layers whose curvature is finished and whose record can be read."""
    return tuple(filter(None, (_read_record(out, layer) for layer in guided_layers(plan))))


def predicted_shares(plan: Plan, out: Path | None) -> dict[int, float]:
    """By layer, what the sweep of an unfinished run in OUT predicts; nothing before it is done."""
    records = read_records(plan, out) if out else ()
    shares = {record.layer: record.predicted_share for record in records}
    return shares if len(shares) == len(guided_layers(plan)) else {}


def _read_record(out: Path, layer: int) -> CurvatureRecord | None:
    return read_entry(curvature_record_path(sweep_folder(out), layer), CurvatureRecord)


def curvature_damage(out: Path, layer: int) -> str:
    """Return why a layer's curvature is not the one that was recorded; empty if it is."""
    record, folder = _read_record(out, layer), sweep_folder(out)
    if record is None:
        return f"{curvature_record_path(folder, layer).name}: cannot be read"
    return damage(rows_path(folder, CURVATURE, layer), record.sha256)


def read_curvature(out: Path, layer: int, source_digest: str) -> Tensor:
    """A layer's finished curvature, fp32 [D, D]. source_digest: of the layer as it is now.

    Raises FourfoldError if the file or the source is not what it was.
    """
    record, path = _read_record(out, layer), rows_path(sweep_folder(out), CURVATURE, layer)
    if problem := curvature_damage(out, layer):
        raise FourfoldError(f"{path.parent}: {problem}. Rerun the same command: it computes the curvatures again")
    assert record is not None
    if source_digest != record.source_digest:
        raise FourfoldError(
            f"layer {layer}: the source holds not the bytes that its curvature was made from; bring the first source "
            "back, or start over with --restart"
        )
    return _open(path.parent, CURVATURE, layer).read(MATRIX)
