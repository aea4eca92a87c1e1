"""bench.json (docs/serving.md)."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from fourfold.records.record import Count, Number, Record


class Quantiles(Struct, frozen=True):
    mean: float
    p50: float
    p90: float
    p99: float


class Requests(Struct, frozen=True):
    """failed: how many by outcome; said: what the server answered then."""

    asked: Count
    ok: Count
    failed: dict[str, Count] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)


class Acceptance(Struct, frozen=True, omit_defaults=True):
    """Of a server's drafts. mean_length: tokens of a step, with the one that needs no draft."""

    rate: float
    mean_length: float
    by_position: list[float] | None = None
    basis: str = ""
    drafts: Count | None = None
    draft_tokens: Count | None = None
    accepted_tokens: Count | None = None


class BenchLevel(Struct, frozen=True, kw_only=True):
    """A load of one concurrency. Quantiles: in seconds, None where no request came through. context: tokens of each
    prompt, None where prompts are as they come; drafts: tokens that were drafted at a time, None where that is unknown.
    """

    concurrency: Count
    seconds: float
    requests: Requests
    prompt_tokens: Count
    output_tokens: Count
    output_tokens_per_second: float
    time_to_first_token: Quantiles | None
    time_per_output_token: Quantiles | None
    time_between_chunks: Quantiles | None
    latency: Quantiles | None
    decode_tokens_per_second: Quantiles | None
    client_core_share_at_100_tokens_per_second: float | None
    acceptance: Acceptance | None = None
    server: dict[str, Number] = field(default_factory=dict)
    context: Count | None = None
    drafts: Count | None = None

    @property
    def title(self) -> str:
        parts = {"": self.concurrency, " x ": self.context, " d": self.drafts}
        return "".join(f"{mark}{value}" for mark, value in parts.items() if value is not None)


class BenchLoad(Struct, frozen=True):
    output_tokens: Count
    temperature: Number
    prompts: str
    ignore_eos: bool = True


class Bench(Record, frozen=True, kw_only=True):
    """metrics: whether the server's counters were read; card: the reference's figures, beside those of its model."""

    FIX = "Run `fourfold bench` again, or remove the file"

    url: str
    model: str
    fourfold: str
    engine: str
    metrics: str
    pool: dict[str, int]
    load: BenchLoad
    levels: list[BenchLevel]
    card: dict[str, Any] | None

    @property
    def fastest_drafts(self) -> dict[int, int]:
        """By concurrency, the number of drafts with the most tokens a second; {} where one number was measured."""
        if len({level.drafts for level in self.levels}) < 2:
            return {}
        by: dict[int, list[BenchLevel]] = {}
        for level in self.levels:
            by.setdefault(level.concurrency, []).append(level)
        return {
            concurrency: max(levels, key=lambda one: one.output_tokens_per_second).drafts or 0
            for concurrency, levels in by.items()
        }
