"""The JSON files of a release, as far as they are read: types and bounds of what is shown or computed with."""

from __future__ import annotations

import json
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from fourfold.datatypes import FourfoldError, brief
from fourfold.formats import NAMES
from fourfold.units import FIGURES

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[float, Field(ge=0)]
Ends = Annotated[list[float], Field(min_length=2, max_length=2)]  # of an interval
Anything = dict[str, Any]


class Record(BaseModel):
    """A JSON object. No value is converted, no number is NaN or infinite; other keys may be there."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


def record(optional: Anything | None = None, /, **required: Any) -> type[Record]:
    """A record by its keys and their types. optional: keys that may be absent or null."""
    fields: Anything = {key: (kind, ...) for key, kind in required.items()}
    fields |= {key: (kind | None, None) for key, kind in (optional or {}).items()}
    return create_model("Record", __base__=Record, **fields)


def each(kind: Any) -> Any:
    """A list of a kind."""
    return GenericAlias(list, (kind,))


def by_name(kind: Any) -> Any:
    """Values of a kind, by names that are not known before."""
    return GenericAlias(dict, (str, kind))


# --- metrics.json: docs/evaluation.md -----------------------------------------------------------------------------

BIN = {"from": Size, "to": Size | None, "positions": Count}
Bucket = record({"kl_mean": float, "top1_agreement": float}, **BIN)
Rule = record(by_position=each(float), mean_length=float, interval=Ends | None)
Drafted = record(greedy=Rule, sampled=Rule)
Task = record({"shots": int, "samples": int}, figures=by_name(float | str | None))
PROTOCOL = {"text": str, "windows": Count, "window": Count, "stride": Count, "bos": bool, "dtype": str, "digest": str}
MEASURED = {
    "summary": record(positions=Count, entropy_source=float, **dict.fromkeys(FIGURES, float)) | None,  # None of a trial
    "layers": each(record(layer=Count, hidden_error=float, router_agreement=float | None)),
}
DETAILS = {"intervals": by_name(Ends), "by_entropy": each(Bucket), "kl_histogram": each(record(**BIN))}
Metrics = record(
    {
        **DETAILS,
        "calibration_overlap": float,
        "drafts": record({"source": Drafted, "release": Drafted}, protocol=Anything),
        "against": record({**DETAILS, "drafts": Drafted}, name=str, **MEASURED),
        "tasks": record(lm_eval=str, tasks=by_name(Task)),
    },
    measured_by=str,
    protocol=record(PROTOCOL),
    **MEASURED,
)

# --- verify.json: docs/verification.md; bench.json: docs/serving.md -------------------------------------------------

Verdict = record(
    {"files": by_name(str), "engine": record({"decode_tokens_per_second": float}, engine=str, device=str, torch=str)},
    passed=bool,
    content=str,
    levels=each(str),
    checks=each(record(level=str, name=str, status=str, evidence=str)),
)
BenchLevel = record(
    concurrency=Count,
    requests=record(asked=Count, ok=Count),
    output_tokens_per_second=float,
    decode_tokens_per_second=record(p50=float) | None,
    time_to_first_token=record(p50=float, p99=float) | None,
    acceptance=record(rate=float, mean_length=float) | None,
)
Bench = record(
    {"pool": by_name(int)},
    model=str,
    engine=str | None,
    load=record(output_tokens=Count, temperature=float, prompts=str),
    levels=each(BenchLevel),
)

# --- fourfold.json: docs/formats.md -------------------------------------------------------------------------------

Text = record(name=str, licence=str | None, rows=Count, documents=Count, tokens=Count)
Guided = record(layer=Count, predicted=float, measured=by_name(float))
State = record(
    {
        "planned_memory_bytes": by_name(Count),
        "guidance": record(tokens=Count, layers=each(Guided)),
        "converted": each(record(scales=record(changed=Count))),
    },
    fourfold=str,
    partial=bool,
    identity=record(recipe=str, source=str, calibration=str, heldout=str, parts=record(source=Anything)),
    recipe=str,
    format=Literal.__getitem__(NAMES),
    source=record({"hub": str, "weights": str, "terms": by_name(str | list[str])}, headers=str, content=str),
    calibration=record({"shingles": each(str)}, rows=Count, length=Count, sources=each(Text), notes=each(str)),
    output=record(content=str, shards=by_name(record(bytes=Count, sha256=str)), tensor_bytes=Count),
    source_tensor_bytes=Annotated[int, Field(gt=0, lt=2**63)],
    metrics=by_name(float),
    devices=by_name(str),
    versions=by_name(str),
    projections=Count,
    methods=by_name(Count),
    seconds=by_name(float),
    peak_memory_bytes=by_name(Count),
    workers=each(Anything),
    finished_at=str,
)


# --- conversion.json of what engines of their own read: docs/formats.md ---------------------------------------------

Measured = record({"intervals": by_name(Ends)}, measured_by=str, protocol=record(PROTOCOL), summary=by_name(float))
Origin = record(
    {"base_model": str, "quality": Measured},
    recipe=str, terms=by_name(str | list[str]),
)  # fmt: skip
Export = record(
    {"release": Origin},
    fourfold=str, after=str, before=str, content=str, projections=Count, group_size=Count, settings=Anything,
    files=by_name(record(bytes=Count, sha256=str)),
)  # fmt: skip


def read_record(path: Path, kind: type[Record], fix: str) -> dict[str, Any]:
    """Return a file's JSON object once it is checked against `kind`.

    Raises FourfoldError, naming the first key that is not as it should be, with the value. fix: what to do then.
    """
    try:
        text = path.read_bytes()
        kind.model_validate_json(text)
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}. {fix}") from None
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
        more = f" ({len(others):,} more such)" if others else ""
        raise FourfoldError(f"{path}: {where}{_problem(first)}{more}. {fix}") from None
    content: dict[str, Any] = json.loads(text)
    return content


def _problem(error: Any) -> str:
    """What pydantic says, in the words of our errors."""
    if error["type"] == "missing":
        return "missing"
    if error["type"] == "json_invalid":
        return f"not JSON ({error['ctx']['error']})"
    return f"got {brief(error['input'])}, expected {error['msg'].removeprefix('Input should be ')}"
