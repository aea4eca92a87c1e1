"""fourfold.json and conversion.json (docs/formats.md), the journal of a run that is not finished, reference.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, field

from fourfold.datatypes import Batches
from fourfold.model.files import write_text
from fourfold.records.record import Count, Ends, Number, Record
from fourfold.records.results import Figures, TextFacts

Terms = dict[str, str | list[str]]  # of the model's card: license, license_name, license_link, language


class Identity(Struct, frozen=True, kw_only=True):
    """Digests (sha256 in hex) and layers. parts: what each digest is of, by field and name, to say what has changed."""

    recipe: str
    source: str
    calibration: str
    heldout: str
    layers: str
    parts: dict[str, dict[str, Any]]


class Settings(Struct, frozen=True):
    """Sizes that decide the order of sums, fixed at the first start. threads: of each worker; devices: of all."""

    batches: Batches
    threads: int
    devices: tuple[str, ...]


class Run(Record, frozen=True, kw_only=True):
    """OUT/.fourfold/run.json, until the run is finished."""

    FIX = "Start over with --restart"

    identity: Identity
    settings: Settings


class CurvatureRecord(Struct, frozen=True):
    """A finished layer of curvature. sha256: of its file; predicted_share: of the error of down under guidance."""

    layer: int
    sha256: str
    source_digest: str
    predicted_share: float


class MarginRecord(Struct, frozen=True):
    """A router's margins, in logits: which are near a tie, and their error after a solve (core/margins)."""

    layer: int
    near: float
    error: float


class SourceFacts(Struct, frozen=True, kw_only=True):
    """hub: the model ID, None for a folder; weights: their format; headers, content: sha256 of headers, of all read."""

    hub: str | None = None
    weights: str | None = None
    terms: Terms = {}
    headers: str
    content: str


class SourceRows(Struct, frozen=True, kw_only=True):
    """What one source gave. documents, tokens: as read; rows: as taken, of rows_wanted by the recipe."""

    name: str
    licence: str | None
    documents: Count
    tokens: Count
    rows_wanted: Count = 0
    rows: Count


class CalibrationFacts(Struct, frozen=True, kw_only=True):
    """The text, but for its tokens. shingles: see quantize/contamination.py."""

    digest: str = ""
    rows: Count
    length: Count
    shingles: list[str] | None = None
    sources: list[SourceRows]
    notes: list[str]


class HeldoutFacts(Struct, frozen=True):
    digest: str = ""
    protocol: TextFacts = TextFacts()


class File(Struct, frozen=True):
    bytes: Count
    sha256: str


class Output(Struct, frozen=True):
    """content: sha256 of the shards' digests; tensor_bytes: without headers."""

    content: str
    shards: dict[str, File]
    tensor_bytes: Count


class GuidedLayer(Struct, frozen=True):
    """Shares of the error that remain under guidance: as predicted, and as measured by input site."""

    layer: Count
    predicted: float
    measured: dict[str, float]


class GuidanceFacts(Struct, frozen=True, kw_only=True):
    tokens: Count
    sites: str = ""
    damping: float = 0.0
    layers: list[GuidedLayer]


class Worker(Struct, frozen=True, kw_only=True):
    """waited_for: whom, in seconds; of_seconds: the time it was there."""

    device: str
    waited_seconds: float
    waited_for: dict[str, float] = field(default_factory=dict)
    of_seconds: float


class Scales(Struct):
    """What became of the scales: changed of total, by at most `largest` of the value before; zero: there were."""

    total: Count = 0
    changed: Count = 0
    zero: Count = 0
    largest: float = 0.0


class Conversion(Record, frozen=True, kw_only=True):
    """before, after: formats; split: stacks of draft experts; content: digest of OUT's shards, "" if not fourfold's."""

    FIX = "Convert the release again"

    fourfold: str = ""
    before: str = ""
    after: str = ""
    projections: Count = 0
    split: Count = 0
    scales: Scales
    content: str = ""


class Quality(Struct, frozen=True, omit_defaults=True):
    """What metrics.json of a release says that is true of an export, too."""

    measured_by: str
    protocol: TextFacts
    summary: Figures
    intervals: dict[str, Ends] | None = None


class Origin(Struct, frozen=True, kw_only=True):
    """What a card says of the release that an export was made of. quality: None of a release without figures."""

    recipe: str
    base_model: str | None = None
    terms: Terms
    quality: Quality | None = None


class Export(Record, frozen=True, kw_only=True):
    """conversion.json of what engines of their own read. int8: of the projections, int4 all others; rounded: modules
    with codes in OUT that could not keep them; group_size: of experts; release: None if OUT is not fourfold's.
    """

    FIX = "Convert the release again"

    fourfold: str
    before: str
    after: str
    projections: Count
    int8: Count = 0
    rounded: Count = 0
    group_size: Count
    content: str
    settings: dict[str, bool | int | str]
    release: Origin | None = None
    files: dict[str, File]

    @property
    def bytes_after(self) -> int:
        return sum(file.bytes for file in self.files.values())

    @property
    def rest(self) -> str:
        """What matrices without codes are stored as: "bf16" as in OUT."""
        return str(self.settings.get("rest", "bf16"))

    @property
    def is_exact(self) -> bool:
        """Whether every weight is OUT's."""
        return self.rest == "bf16" and not self.rounded

    @property
    def has_drafts(self) -> bool:
        return bool(self.settings.get("mtp"))


class State(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Everything about a finished run. partial: a trial on some layers."""

    FIX = "Bring back the one that quantize wrote, or quantize again with --restart"

    fourfold: str
    partial: bool
    layers: str = ""
    identity: Identity
    recipe: str
    format: str
    model_type: str = ""
    source: SourceFacts
    calibration: CalibrationFacts
    heldout: HeldoutFacts = HeldoutFacts()
    output: Output
    guidance: GuidanceFacts | None = None
    source_tensor_bytes: Annotated[int, Meta(gt=0, le=2**63 - 1)]
    metrics: dict[str, Number]
    devices: dict[str, str]
    device_memory_bytes: dict[str, Count] = field(default_factory=dict)
    settings: Settings | None = None
    versions: dict[str, str]
    projections: Count
    methods: dict[str, Count]
    tokens_per_input: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float]
    layer_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, Count]
    planned_memory_bytes: dict[str, Count] = field(default_factory=dict)
    workers: list[Worker]
    finished_at: str
    converted: list[Conversion] = field(default_factory=list)


class Reference(Record, frozen=True, kw_only=True):
    """What a release with the written codes makes of the start of the first held-out window. Nats, best first.

    tokens: T ids; for each of the T - 1 positions that have a next token: logprobs: of that token; likeliest: ids of
    the most likely tokens; likeliest_logprobs: theirs.
    """

    FIX = "Quantize again, or remove the file"

    tokens: list[int]
    logprobs: list[float]
    likeliest: list[Annotated[list[int], Meta(min_length=1)]]
    likeliest_logprobs: list[list[float]]

    def __post_init__(self) -> None:
        entries = [len(self.logprobs), len(self.likeliest), len(self.likeliest_logprobs)]
        if len(self.tokens) < 2 or set(entries) != {len(self.tokens) - 1}:
            raise ValueError("Expected T tokens, at least 2, and T - 1 entries of each other list")

    def write(self, path: Path) -> None:
        """On one line: some thousand numbers that nobody reads one by one."""
        write_text(path, json.dumps(self.to_json()) + "\n")
