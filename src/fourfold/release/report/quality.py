"""Quality on a card and a page: the verdict, figures with intervals, drafts, tasks, as metrics.json has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from msgspec import structs

from fourfold.records.release import State
from fourfold.records.results import Measured, Metrics, Paired, RoundToNearest, TaskResult, TaskResults, TextFacts
from fourfold.release.report.escape import table
from fourfold.units import FIGURES, figure_text

UNMEASURED = "not measured"
USAGE = {  # column: field of Usage, form; release / source
    "tokens": ("output_tokens", "{:,.0f}"), "of thought": ("thought_tokens", "{:,.0f}"),
    "cut off": ("cut_offs", "{:,}"), "loops": ("loops", "{:,}"),
}  # fmt: skip


class Grid(NamedTuple):
    """A table: names of columns, and rows of cells."""

    header: tuple[str, ...]
    rows: list[tuple[object, ...]]


def verdict(metrics: Metrics | None) -> str:
    """Return mean KLD (nats) and top-1 agreement in words, beside round-to-nearest (RTN) where it was measured."""
    if metrics is None or metrics.summary is None:
        return "Not measured."
    rtn, agreement = metrics.rtn, "top-1 agreement"
    if rtn is None:
        windows = f", on {_windows(metrics.protocol.windows)}" if metrics.protocol.windows else ""
        kld = _figure(metrics, "kl_mean", " nats")
        return f"Mean KLD {kld}, {agreement} {_figure(metrics, 'top1_agreement')}{windows}."
    ours, theirs, ends = rtn.release, rtn.summary, (rtn.intervals or {}).get("kl_mean")
    share = f"{ours.kl_mean / theirs.kl_mean:.0%} of " if theirs.kl_mean else ""
    said = f"Mean KLD {ours.kl_mean:.5f} nats ({_windows(rtn.windows)}), {share}round-to-nearest's "
    said += f"{_figure(rtn, 'kl_mean')}; {agreement} {ours.top1_agreement:.2%}, RTN {theirs.top1_agreement:.2%}."
    if ours.kl_mean >= (ends[0] if ends else theirs.kl_mean):
        below = "RTN's 95% interval" if ends else "RTN's"
        said += f" Not better than RTN on this text: the release's mean KLD is not below {below}."
    return said


def _windows(count: int) -> str:
    return f"{count:,} window{'' if count == 1 else 's'}"


def _figure(part: Measured | RoundToNearest, key: str, unit: str = "") -> str:
    form, ends = FIGURES[key][1], (part.intervals or {}).get(key)
    said = form.format(getattr(part.summary, key)) + unit
    return f"{said} (95%: {form.format(ends[0])} to {form.format(ends[1])})" if ends else said


def figure_grid(metrics: Metrics | None, others: Iterable[tuple[str, Measured | None]] = ()) -> Grid:
    """Return the figures of a release, of RTN where it was measured, and of others, with half of the 95% interval."""
    named: list[tuple[str, Measured | RoundToNearest | None]] = [("this release", metrics)]
    if metrics and metrics.rtn:
        named.append((f"RTN ({_windows(metrics.rtn.windows)})", metrics.rtn))
    named += others
    rows = [(words, *(_cell(part, key) for _, part in named)) for key, (words, _) in FIGURES.items()]
    return Grid(("", *(name for name, _ in named)), [*rows])


def _cell(part: Measured | RoundToNearest | None, key: str) -> str:
    return figure_text(key, getattr(part.summary, key), (part.intervals or {}).get(key)) if part else UNMEASURED


def quality(metrics: Metrics | None, state: State) -> dict[str, Any]:
    """What the card's template says of quality, drafts and tasks. Without metrics: the verdict alone."""
    if metrics is None:
        return {"verdict": verdict(None), "metrics": None}
    against, drafts, tasks = metrics.against, draft_grid(metrics), task_grid(metrics.tasks)
    images, routing = image_grid(metrics), routing_grid(metrics)
    return {
        "verdict": verdict(metrics),
        "metrics": metrics,
        "quality": table(*figure_grid(metrics, [(against.name, against)] if against else [])),
        "protocol": protocol_text(metrics.protocol),
        "perplexity": [*perplexity_lines(metrics, state)],
        "entropy": table(*_entropy(metrics)),
        "images": images and table(*images),
        "routing": routing and table(*routing),
        "image_text": image_text(metrics),
        "drafts": drafts and table(*drafts),
        "draft_head": draft_head(metrics),
        "tasks": tasks and table(*tasks),
        "servers": [*server_lines(metrics.tasks)],
    }


def perplexity_lines(metrics: Metrics, state: State) -> Iterator[str]:
    """Yield perplexity with its text and windows: as in metrics.json, and of `quantize` where it had another text."""
    measured = [(metrics.protocol, structs.asdict(metrics.figures))]
    measured += [(state.heldout.protocol, state.metrics)] if metrics.measured_by != "quantize" else []
    for text, found in measured:
        release, source = found.get("perplexity_release"), found.get("perplexity_source")
        if release and source and text.windows and text.window:
            apart = "not overlapping" if text.stride == text.window else f"stride {text.stride}"
            windows = f"{_windows(text.windows)} of {text.window:,} tokens, {apart}"
            yield f"Perplexity {release:.4f}, source {source:.4f}: {text.text or 'text unknown'}, {windows}."


def protocol_text(protocol: TextFacts) -> str:
    """Text, windows and arithmetic of a measurement, as far as they are known."""
    known = {
        "text": "{}",
        "windows": "{:,} windows",
        "window": "{:,} tokens per window",
        "stride": "stride {:,}",
        "bos": "BOS {}",
        "dtype": "computed in {}",
        "digest": "token ids sha256 {:.16}...",
    }
    values = ((form, getattr(protocol, name)) for name, form in known.items())
    return ", ".join(form.format(value) for form, value in values if value is not None)


def _entropy(metrics: Metrics) -> Grid:
    rows: list[tuple[object, ...]] = []
    for bucket in metrics.by_entropy or ():
        end = "more" if bucket.high is None else f"{bucket.high:g}"
        kl, agreement = bucket.kl_mean, bucket.top1_agreement
        cells = ("" if kl is None else f"{kl:.5f}", "" if agreement is None else f"{agreement:.2%}")
        rows.append((f"{bucket.low:g} to {end}", f"{bucket.positions:,}", *cells))
    return Grid(("entropy (nats)", "positions", FIGURES["kl_mean"][0], FIGURES["top1_agreement"][0]), rows)


def image_grid(metrics: Metrics) -> Grid | None:
    """Return KLD and top-1 agreement on held-out images beside those on text; None if they were not measured."""
    images = metrics.images
    if images is None:
        return None
    named = [("text", metrics.summary, metrics.rtn and metrics.rtn.summary), ("images", images.summary, images.rtn)]
    keys = ("kl_mean", "kl_median", "top1_agreement")
    rows: list[tuple[object, ...]] = []
    for name, release, rtn in named:
        for title, found in (("this release", release), ("RTN", rtn)):
            if found:
                cells = [figure_text(key, getattr(found, key), None) for key in keys]
                rows.append((name, title, f"{found.positions:,}", *cells))
    return Grid(("held-out", "", "positions", *(FIGURES[key][0] for key in keys)), rows)


def routing_grid(metrics: Metrics) -> Grid | None:
    """Return how each layer's router treats image tokens; None without images among the calibration samples."""
    if metrics.images is None or not metrics.images.routing:
        return None
    rows = [(one.layer, f"{one.overlap:.2f}", one.image_experts) for one in metrics.images.routing]
    return Grid(("layer", "overlap with text's routing", "image experts"), [*rows])


def image_text(metrics: Metrics) -> str:
    """Return what was measured on images, in a sentence; "" if nothing was."""
    found = metrics.images
    if found is None:
        return ""
    windows = f"{found.samples:,} samples of images in {_windows(found.windows)} of {found.window:,} tokens"
    return (
        f"{windows}; positions whose next token is part of an image are left out. Overlap: of the histograms of image "
        "and text tokens over the experts, 1 where they are the same. Image experts: their share of image tokens is "
        "over four times their share of text tokens."
    )


def draft_grid(metrics: Metrics) -> Grid | None:
    """Return the acceptance rates of the draft heads; None if they were not measured."""
    drafts, against = metrics.drafts, metrics.against
    if drafts is None:
        return None
    named = [("BF16 model", drafts.source), ("this release", drafts.release)]
    named += [(against.name, against.drafts)] if against else []
    rows: list[tuple[object, ...]] = []
    for name, found in named:
        for rule, one in (("greedy", found.greedy), ("sampled", found.sampled)) if found else ():
            ends = one.interval
            places = " / ".join(f"{share:.1%}" for share in one.by_position)
            interval = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
            rows.append((name, rule, places, f"{one.mean_length:.3f}", interval))
    header = ("", "decoding", "acceptance rate by position", "tokens per step", "95% interval")
    return Grid(header, rows) if rows else None


def draft_head(metrics: Metrics) -> str:
    """Return what quantizing the draft head changes in tokens per step, in pairs; "" if it was not measured."""
    other = metrics.drafts and metrics.drafts.release and metrics.drafts.release.source_head
    if not other:
        return ""
    ends = [f"{end / other.mean_length:+.1%}" for end in other.interval or ()]
    said = f"{other.difference / other.mean_length:+.1%}" + (f" (95%: {' to '.join(ends)})" if ends else "")
    return f"Quantized draft head: {said} tokens per step against the BF16 head on the same text."


def task_grid(results: TaskResults | None) -> Grid | None:
    """Return scores of servers, the source's beside the release's; None if there are none."""
    rows: list[list[object]] = []
    for task, found in results.tasks.items() if results else ():
        for metric, value in found.figures.items():
            if isinstance(value, float) and "stderr" not in metric:
                beside = found.source_figures and _score(found.source_figures, metric)
                row = [task, metric, _score(found.figures, metric), beside, *_flips((found.paired or {}).get(metric))]
                row += [_of_both(found, name, form) for name, form in USAGE.values()]
                rows.append([*row, found.shots, found.samples])
    header = ("task", "metric", "this release", "BF16", "lost / gained", "p", "difference", *USAGE, "shots", "samples")
    shown = [number for number in range(len(header)) if any(row[number] not in (None, "") for row in rows)]
    cells = [tuple("" if row[number] is None else row[number] for number in shown) for row in rows]
    return Grid(tuple(header[number] for number in shown), cells) if rows else None


def _score(figures: Mapping[str, object], metric: str) -> str:
    value, error = figures.get(metric), figures.get(metric.replace(",", "_stderr,", 1))
    spread = f" ± {error:.4f}" if isinstance(error, float) else ""
    return f"{value:.4f}{spread}" if isinstance(value, float) else ""


def _flips(paired: Paired | None) -> tuple[str, str, str]:
    """Answers that changed, the p-value of McNemar's test, the difference with its interval."""
    if paired is None:
        return "", "", ""
    p_value = "" if paired.p_value is None else f"{paired.p_value:.3f}"
    ends = " to ".join(f"{end:+.4f}" for end in paired.interval)
    return f"{paired.lost} / {paired.gained}", p_value, f"{paired.difference:+.4f} ({ends})"


def _of_both(found: TaskResult, name: str, form: str) -> str:
    sides = [form.format(getattr(usage, name)) for usage in (found.usage, found.source_usage) if usage]
    return " / ".join(sides)


def server_lines(results: TaskResults | None) -> Iterator[str]:
    """Yield what servers told beside scores: KL divergence, and parts of the suite that were not measured."""
    if results and (kl := results.kl):
        ends = f" (95%: {kl.interval[0]:.5f} to {kl.interval[1]:.5f})" if kl.interval else ""
        yield (
            f"KLD between the servers: at least {kl.kl_mean:.5f} nats{ends}, top-1 agreement {kl.top1_agreement:.2%}; "
            f"{_windows(kl.windows)} of {kl.window:,} tokens. Lower bound from the {kl.k} most likely tokens of each, "
            f"which hold {kl.covered:.1%} of the source's probability."
        )
    for part, why in results.unmeasured.items() if results else ():
        yield f"Not measured: {part} ({why})."
