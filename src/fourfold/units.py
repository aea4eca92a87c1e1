"""Times, sizes and measured figures as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

UNITS = ("B", "kB", "MB", "GB", "TB")
COUNTS = ("", "K", "M", "B", "T")
RATIO = "perplexity_ratio"
FIGURES = {  # key in metrics.json's summary: what it is called, how it is written; KLD: KL divergence from the source
    "perplexity_source": ("perplexity, source", "{:.4f}"),
    "perplexity_release": ("perplexity, release", "{:.4f}"),
    RATIO: ("perplexity ratio", "{:.5f}"),
    "kl_mean": ("mean KLD (nats)", "{:.5f}"),
    "kl_median": ("median KLD (nats)", "{:.6f}"),
    "kl_p90": ("p90 KLD (nats)", "{:.5f}"),
    "kl_p99": ("p99 KLD (nats)", "{:.5f}"),
    "kl_max": ("maximum KLD (nats)", "{:.3f}"),
    "top1_agreement": ("top-1 agreement", "{:.2%}"),
    "top5_agreement": ("top-5 agreement", "{:.2%}"),
}
NO_INTERVAL = "unknown: one window gives no interval"
READY = (
    "Ctrl-C stops it"  # the last line of what `serve` says once the engine has answered; `bench --drafts` waits for it
)


def size(count: int) -> str:
    """Bytes in powers of 1000: 24.4 GB."""
    value, unit = _scaled(count)
    return f"{value:.0f} B" if unit == 0 else f"{value:.3g} {UNITS[unit]}"


def count_text(count: int) -> str:
    """Parameters in powers of 1000: 35.1B."""
    value, unit = _scaled(count)
    return f"{value:.3g}{COUNTS[unit]}"


def _scaled(count: int) -> tuple[float, int]:
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return value, unit


def figure_text(key: str, value: float, ends: Sequence[float] | None) -> str:
    """A figure of metrics.json's summary, with half of its 95 % interval.

    A ratio of perplexities is close to 1 and may fall on either side by chance, so it is never shown without one.
    """
    form = FIGURES[key][1]
    if ends:
        return f"{form.format(value)} ± {form.format((ends[1] - ends[0]) / 2)}"
    return NO_INTERVAL if key == RATIO else form.format(value)


def clock_text(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def stages(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    """Longest first."""
    return sorted(seconds.items(), key=lambda pair: (-pair[1], pair[0]))


def projections_text(count: int, int8: int) -> str:
    """Return how many projections have codes of which bits. int8: of `count`."""
    return f"{count - int8:,} int4 and {int8:,} int8 projections" if int8 else f"{count:,} projections"
