"""What earlier stages left in a release: read and checked, nothing measured. A file that is not there is None."""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError, ProjectionStatistics, TensorHeader
from fourfold.model.checkpoint import TensorIndex
from fourfold.quantize.claims import kept_group
from fourfold.release.contents import METRICS, VERDICT
from fourfold.release.schemas import Bench, Metrics, Record, Verdict, read_record
from fourfold.release.verify.folder import Release, open_release

LOG, BENCH = "quant_log.csv", "bench.json"
EXPERTS = "routed experts"
FIX = "Run the command that wrote it again, or remove the file"


@dataclass(frozen=True)
class Projection:
    """A row of quant_log.csv, as far as it is shown: see ProjectionStatistics for what its fields mean."""

    layer: int
    expert: int
    projection: str
    method: str
    weight_error: float
    relative_error: float
    error_over_rtn: float
    target: str
    gptqmodel_loss: float | None
    tokens: int
    effective_tokens: float
    damping: float
    passes: int


@dataclass(frozen=True)
class Group:
    """Tensors of one kind: what was done with them and why, how many there are now and their bytes."""

    name: str
    quantized: bool
    reason: str
    tensors: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Records:
    """release: fourfold.json, config.json, recipe.toml; verdict: of these very bytes, else None and `stale`.

    missing: (what was not measured, the command that does it).
    """

    release: Release
    headers: Mapping[str, TensorHeader]
    projections: tuple[Projection, ...]
    metrics: Mapping[str, Any] | None
    verdict: Mapping[str, Any] | None
    stale: bool
    bench: Mapping[str, Any] | None
    sampling: Mapping[str, Any]
    licence_text: str | None
    missing: tuple[tuple[str, str], ...]

    @property
    def state(self) -> Mapping[str, Any]:
        return self.release.state

    @property
    def guidance(self) -> Mapping[str, Any] | None:
        """By how much it was predicted to gain and did, by layer: guide.to_json. None of a release without."""
        return self.state.get("guidance")

    def groups(self) -> tuple[Group, ...]:
        """All tensors of the release by kind; the routed experts' first."""
        skeleton = self.release.skeleton
        experts = tuple(skeleton.experts_prefix(layer) for layer in skeleton.routed)
        count, size, reasons = Counter[str](), Counter[str](), {EXPERTS: {""}}
        for name, header in self.headers.items():
            group, reason = EXPERTS, ""
            if not name.startswith(experts):
                group, reason = kept_group(name)
            reasons.setdefault(group, set()).add(reason)
            count[group] += 1
            size[group] += header.size_bytes
        named = (name for name in reasons if count[name])
        why = {name: "; ".join(sorted(found)) for name, found in reasons.items()}
        return tuple(Group(name, name == EXPERTS, why[name], count[name], size[name]) for name in named)

    def by_layer(self) -> dict[int, list[Projection]]:
        found = defaultdict(list)
        for row in self.projections:
            found[row.layer].append(row)
        return dict(sorted(found.items()))

    def pool_tokens(self, row: Projection) -> float:
        """How many tokens the layer's statistics count for in this projection's: the recipe's pool times its inputs."""
        experts = self.release.skeleton.widest
        inputs = experts.width if row.projection == "down_proj" else experts.hidden
        return float(self.release.recipe.solver.pool * inputs)

    def cold(self) -> list[Projection]:
        """Projections whose statistics are more the layer's than their own tokens'."""
        return [row for row in self.projections if row.effective_tokens < self.pool_tokens(row)]

    def worst(self) -> list[Projection]:
        """The ten projections with the largest output error over that of RTN, the worst first."""
        return sorted(self.projections, key=lambda row: -row.error_over_rtn)[:10]


def read_records(folder: Path) -> Records:
    """Raises FourfoldError for a folder that is no finished release, or a file that is not as fourfold writes it."""
    release = open_release(folder)
    metrics, verdict = _read(folder / METRICS, Metrics), _read(folder / VERDICT, Verdict)
    bench, sampling = _read(folder / BENCH, Bench), _read(folder / "generation_config.json", Record) or {}
    if metrics is not None and metrics["summary"] is None:
        raise FourfoldError(f"{folder / METRICS}: summary: got null, as of a trial, expected figures. {FIX}")
    stale = verdict is not None and verdict["content"] != release.state["output"]["content"]
    licence = folder / "LICENSE"
    return Records(
        release=release,
        headers=TensorIndex.open(folder).headers,
        projections=tuple(read_log(folder / LOG)),
        metrics=metrics,
        verdict=None if stale else verdict,
        stale=stale,
        bench=bench,
        sampling={name: sampling[name] for name in SAMPLED if name in sampling},
        licence_text=licence.read_text(encoding="utf-8", errors="replace") if licence.is_file() else None,
        missing=tuple(_missing(metrics, None if stale else verdict, bench)),
    )


SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")


def _missing(
    metrics: Mapping[str, Any] | None, verdict: Mapping[str, Any] | None, bench: Mapping[str, Any] | None
) -> Iterable[tuple[str, str]]:
    """What was not measured, and the command that does."""
    if metrics is None or metrics["measured_by"] != "evaluate":
        yield "quality beyond what quantize measured", "fourfold evaluate OUT --source MODEL"
    if metrics is None or not metrics.get("drafts"):
        yield "acceptance of the draft head's tokens", "fourfold evaluate OUT --source MODEL"
    if metrics is None or not metrics.get("tasks"):
        yield "tasks of lm-eval", "fourfold evaluate OUT --source MODEL --tasks NAMES --url URL"
    levels = () if verdict is None else verdict["levels"]
    for level, words in (("files", ""), ("source", " --source MODEL"), ("engine", " --engine vllm")):
        if level not in levels:
            yield f"verification of level {level}", f"fourfold verify OUT{words}"
    if bench is None:
        yield "speed of a server", "fourfold bench URL --out OUT/bench.json"


def read_log(path: Path) -> Iterable[Projection]:
    """Rows of quant_log.csv. Raises FourfoldError naming the line that is not one."""
    names = [field.name for field in fields(ProjectionStatistics)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FourfoldError(f"{path}: cannot be read ({error}); bring back the one that quantize wrote") from None
    rows = csv.reader(text.splitlines())
    header = next(rows, [])
    if header != names:
        raise FourfoldError(f"{path}: its columns are {', '.join(header)[:200]}; wanted {', '.join(names)}")
    for number, row in enumerate(rows, 2):
        try:
            yield _projection(dict(zip(names, row, strict=True)))
        except ValueError as error:
            raise FourfoldError(f"{path}: line {number}: {error}; bring back the one that quantize wrote") from None


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"got {text}, expected a finite number")
    return value


def _projection(row: Mapping[str, str]) -> Projection:
    return Projection(
        layer=int(row["layer"]),
        expert=int(row["expert"]),
        projection=row["projection"],
        method=row["method"],
        weight_error=_number(row["weight_error"]),
        relative_error=_number(row["relative_error"]),
        error_over_rtn=_number(row["error_over_rtn"]),
        target=row["target"],
        gptqmodel_loss=_number(row["gptqmodel_loss"]) if row["gptqmodel_loss"] else None,
        tokens=int(row["tokens"]),
        effective_tokens=_number(row["effective_tokens"]),
        damping=_number(row["damping"]),
        passes=int(row["passes"]),
    )


def _read(path: Path, kind: type[Record]) -> dict[str, Any] | None:
    """None if there is no such file."""
    return read_record(path, kind, FIX) if path.is_file() else None
