"""metrics.json (docs/evaluation.md) and verify.json (docs/verification.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any, Self

import msgspec
from msgspec import Struct, field, structs

from fourfold.datatypes import StreamDrift
from fourfold.records.record import Count, Ends, Number, Record
from fourfold.units import figure_text


class Figures(Struct, frozen=True):
    """core/metrics.summarize, over all positions of the text."""

    positions: Count
    perplexity_source: float
    perplexity_release: float
    perplexity_ratio: float
    kl_mean: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top5_agreement: float
    entropy_source: float


class Bin(Struct, frozen=True, omit_defaults=True):
    """Positions with a value from `low` up to, but not including, `high`; None: no end."""

    low: float = field(name="from")
    high: float | None = field(name="to")
    positions: Count
    kl_mean: float | None = None
    kl_median: float | None = None
    top1_agreement: float | None = None


class TextFacts(Struct, frozen=True, omit_defaults=True):
    """A held-out text and how it was cut; digest: of the token ids; dtype: of the arithmetic between layers."""

    text: str | None = None
    joining: str | None = None
    tokens: Count | None = None
    windows: Count | None = None
    windows_available: Count | None = None
    window: Count | None = None
    stride: Count | None = None
    predictions_per_window: Count | None = None
    bos: bool | None = None
    special_tokens: bool | None = None
    tail: str | None = None
    digest: str | None = None
    dtype: str | None = None

    def same_windows(self, other: TextFacts) -> bool:
        own, others = (structs.replace(one, digest=None, dtype=None) for one in (self, other))
        return own == others


class Rule(Struct, frozen=True):
    by_position: list[float]
    mean_length: float
    interval: Ends | None


class LengthDifference(Struct, frozen=True):
    """core/metrics.length_difference."""

    mean_length: float
    difference: float
    interval: Ends | None


class Drafted(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """core/metrics.acceptance of a checkpoint's draft head, and what release/drafts.py counts.

    source_head: of a release whose draft head is quantized, the source's draft head in its place, on the same text.
    """

    positions: Count = 0
    greedy: Rule
    sampled: Rule
    consistent: float | None = None
    sweeps: Count = 0
    source_head: LengthDifference | None = None


class Drafts(Struct, frozen=True):
    """source, release: None without a draft head."""

    protocol: dict[str, Any]
    source: Drafted | None = None
    release: Drafted | None = None


class Measured(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A release's figures. summary: None of a trial; intervals: None for a single window."""

    calibration_overlap: float | None = None
    summary: Figures | None
    intervals: dict[str, Ends] | None = None
    by_entropy: list[Bin] | None = None
    kl_histogram: list[Bin] | None = None
    layers: list[StreamDrift]

    @classmethod
    def of(cls, measurements: Mapping[str, Any], layers: Iterable[StreamDrift], **more: Any) -> Self:
        """measurements: core/metrics.measurements; more: fields of this class in JSON types or as they are."""
        return msgspec.convert({**measurements, "layers": list(layers), **more}, cls)

    @property
    def figures(self) -> Figures:
        assert self.summary is not None, "a trial's are not shown"
        return self.summary

    def interval(self, key: str) -> Ends | None:
        return (self.intervals or {}).get(key)

    def text(self, key: str) -> str:
        return figure_text(key, getattr(self.figures, key), self.interval(key))


class RoundToNearest(Struct, frozen=True):
    """The source with its experts rounded to nearest (RTN), on some of the windows. release: on the same windows."""

    windows: Count
    summary: Figures
    intervals: dict[str, Ends] | None
    release: Figures


class RoutedImages(Struct, frozen=True, kw_only=True):
    """core/metrics.routing_by_kind of a layer, over the calibration rows in the source."""

    layer: Count
    overlap: float
    image_experts: Count


class ImageFigures(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """On held-out rows of images: figures of the release and of RTN, over positions whose next token is none of an
    image. routing: of calibration rows with images.
    """

    windows: Count
    window: Count
    samples: Count
    summary: Figures
    rtn: Figures | None = None
    routing: list[RoutedImages] = field(default_factory=list)


class Against(Measured, frozen=True, kw_only=True, omit_defaults=True):
    """A second release, measured in the same pass."""

    name: str
    drafts: Drafted | None = None


class Rival(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Another release of the same source, measured by the same protocol. size_bytes: of its tensors."""

    name: str
    format: str
    size_bytes: Count
    kl_mean: float


class Benchmark(Struct, frozen=True):
    """A dataset of the Hub with a leaderboard, and the task in its eval.yaml."""

    dataset: str
    task: str


class Usage(Struct, frozen=True):
    """Answers of a server to a task. Tokens: means; cut_offs: at the token limit; loops: end in a repeated stretch."""

    answers: Count
    output_tokens: float
    thought_tokens: float
    cut_offs: Count
    loops: Count


class Paired(Struct, frozen=True):
    """A figure of release and source on the same questions. lost, gained: right by one alone; p_value: of McNemar's
    exact test, None for scores between 0 and 1; difference: release less source, with its bootstrap interval.
    """

    questions: Count
    lost: Count
    gained: Count
    p_value: float | None
    difference: float
    interval: Ends


class TaskResult(Struct, frozen=True, omit_defaults=True):
    """figures: by "metric,filter", as lm-eval has them; benchmark: whose whole split was measured, if any;
    prompt_tokens: of the longest question; source_*, paired: the source beside it.
    """

    figures: dict[str, Number | str | None]
    shots: int | None = None
    samples: int | None = None
    prompt_tokens: Count | None = None
    version: Number | str | None = None
    benchmark: Benchmark | None = None
    usage: Usage | None = None
    source_figures: dict[str, Number | str | None] | None = None
    source_usage: Usage | None = None
    paired: dict[str, Paired] | None = None


class ServerKl(Struct, frozen=True, kw_only=True):
    """KL from the `k` most likely tokens that both servers give: a lower bound of the KL over the vocabulary.

    covered: the source's mean probability of tokens that both name; interval: None for a single window.
    """

    kl_mean: float
    interval: Ends | None
    top1_agreement: float
    covered: float
    k: Count
    windows: Count
    window: Count


class TaskResults(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What servers answered. kl: None without a source; unmeasured: parts of the suite, and why."""

    lm_eval: str
    model: str | None = None
    api: str | None = None
    chat_template: bool | None = None
    tasks: dict[str, TaskResult]
    url: str | None = None
    suite: str | None = None
    source_url: str | None = None
    source_model: str | None = None
    kl: ServerKl | None = None
    unmeasured: dict[str, str] = {}


class Metrics(Measured, Record, frozen=True, kw_only=True, omit_defaults=True):
    """measured_by: a command's name; source: its name and headers' digest; the others: if measured.

    rivals: all second releases so far, by the same protocol.
    """

    FIX = "Remove the file and measure again: fourfold evaluate OUT --source MODEL"

    measured_by: str
    source: dict[str, str] | None = None
    protocol: TextFacts
    drafts: Drafts | None = None
    against: Against | None = None
    tasks: TaskResults | None = None
    rtn: RoundToNearest | None = None
    rivals: list[Rival] = []
    images: ImageFigures | None = None

    def to_json(self) -> dict[str, Any]:
        """What could not be measured is null; what `quantize` does not measure, or a trial, is not there."""
        found = super().to_json()
        evaluated = self.measured_by == "evaluate"
        always = ("calibration_overlap", "intervals", "drafts") if evaluated else ("intervals", "rtn")
        for part in filter(None, [found, found.get("against")] if self.summary else []):
            part.update({name: part.get(name) for name in always})
        return found


class Status(StrEnum):
    PASS = "pass"
    FAIL = "fail"
    NOT_RUN = "not run"


class Level(StrEnum):
    """What a check looks at: OUT alone, OUT beside its source, OUT in an engine."""

    FILES = "files"
    SOURCE = "source"
    ENGINE = "engine"


class Check(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One named check. evidence: what was seen, for people; data: the same for machines (JSON types)."""

    level: Level
    name: str
    status: Status
    evidence: str
    data: dict[str, Any] = field(default_factory=dict)


class EngineFacts(Struct, frozen=True):
    """What an engine says of itself, and what it did. decode_tokens_per_second_mtp: None without a draft head."""

    engine: str
    torch: str
    device: str
    kernels: list[str] = field(default_factory=list)
    start_seconds: float = 0.0
    load_seconds: float = 0.0
    kv_cache_tokens: Count = 0
    decode_tokens_per_second: float | None = None
    decode_tokens_per_second_mtp: float | None = None


class Verdict(Record, frozen=True, kw_only=True):
    """All checks of one call, in order. passed: each requested level was run, and no check failed.

    content: of fourfold.json; files: sha256 of each file beside the shards; levels, engine: those requested.
    """

    FIX = "Verify again: fourfold verify OUT"

    passed: bool
    content: str
    files: dict[str, str] | None = None
    levels: tuple[Level, ...]
    checks: tuple[Check, ...]
    engine: EngineFacts | None = None
    bytes_read: Count = 0
    seconds: dict[str, float] = field(default_factory=dict)
