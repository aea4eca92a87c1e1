"""What to do: frozen dataclasses read from TOML. An unknown key is an error with the nearest name."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of calibration text: exactly one of `builtin`, `path` and `dataset`.

    builtin: name of a text that ships with fourfold; path: a .jsonl, .txt or .parquet file; dataset: a Hub dataset id
    with `split` and `config`. kind "text" takes `fields` (joined by a blank line) as plain text, "chat" renders the
    messages of the one field with the model's own chat template. rows: rows of `calibration.length` tokens.
    """

    rows: int
    kind: str = "text"
    fields: tuple[str, ...] = ("text",)
    builtin: str = ""
    path: str = ""
    dataset: str = ""
    config: str = ""
    split: str = "train"
    licence: str = ""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Rows of tokens whose statistics guide the solve. length: tokens per row."""

    length: int = 1024
    seed: int = 0
    allow_test_sets: bool = False
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """Text that rides along in both streams and is never used for calibration. length: tokens per window."""

    builtin: str = "wikitext-2-test"
    path: str = ""
    windows: int = 16
    length: int = 2048


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a weight is stored: int4, symmetric, one scale per `group_size` input features.

    signed: scales may be negative, so that the larger side of [-8, 7] falls where it is needed;
    scale_dtype: "bf16" (exact in BF16 and FP16) or "fp16".
    """

    group_size: int = 128
    signed: bool = True
    scale_dtype: str = "bf16"


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How codes and scales are found; every ingredient is one field (docs/numerics.md).

    asymmetric: solve on the release stream's inputs towards the source stream's outputs;
    router_weighted: tokens weigh by their router weight; pool: n0 = pool * K effective tokens of the layer's
    statistics are mixed into each expert's (0 = none); effective_tokens: count loud tokens as few;
    trace_matched: the pool is scaled to each expert's loudness; pool_rows: random rows for the pool of `down`;
    damp_kind: "diagonal" (relative per channel) or "mean" (of the mean of the diagonal);
    order: "activation" or "group-aware" or "natural"; scale: "search" or "absmax";
    scale_weights: "conditional" (the factor's D) or "diagonal" (diag H);
    passes: refinement passes; refine_scales: they move scales too;
    fallback_share: an expert with fewer than this share of all calibration tokens is rounded (0 = never).
    """

    asymmetric: bool = True
    alpha: float = 1.0
    router_weighted: bool = True
    pool: float = 0.5
    effective_tokens: bool = True
    trace_matched: bool = True
    pool_rows: int = 2048
    damp: float = 0.05
    damp_kind: str = "diagonal"
    damp_floor: float = 1e-4
    order: str = "activation"
    scale: str = "search"
    scale_weights: str = "conditional"
    scale_low: float = 0.45
    scale_high: float = 1.15
    scale_steps: int = 36
    passes: int = 2
    refine_scales: bool = True
    fallback_share: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The whole of what `quantize` is to do. Machine matters (devices, memory) are flags, not recipe."""

    name: str = "best"
    description: str = ""
    format: str = "compressed-tensors"
    scheme: Scheme = field(default_factory=Scheme)
    solver: Solver = field(default_factory=Solver)
    calibration: Calibration = field(default_factory=Calibration)
    heldout: Heldout = field(default_factory=Heldout)
