"""Quality on a card: figures with intervals, drafts, tasks, as metrics.json has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fourfold.records.results import Measured, Metrics, TaskResults, TextFacts
from fourfold.release.report.escape import Markdown, prose, table
from fourfold.release.report.records import Records
from fourfold.units import FIGURES

UNMEASURED = "not measured"


def quality(records: Records) -> dict[str, Any]:
    """What the card's template says of quality, drafts and tasks; None for what was not measured."""
    metrics = records.metrics
    found: dict[str, Any] = dict.fromkeys(
        ("quality", "entropy", "protocol", "measured_by", "overlap", "tasks", "lm_eval")
    )
    found |= _drafts(metrics)
    if metrics is None:
        return found
    against = metrics.against
    header = ("", "this release", "95 %", *((str(prose(against.name)), "95 %") if against else ()))
    rows = [
        (words, *_cells(metrics, key, form), *(_cells(against, key, form) if against else ()))
        for key, (words, form) in FIGURES.items()
    ]
    found["quality"] = table(header, rows)
    found["entropy"] = _entropy(metrics)
    found["measured_by"] = metrics.measured_by
    found["protocol"] = protocol_text(metrics.protocol)
    if metrics.calibration_overlap is not None:
        found["overlap"] = (
            f"{metrics.calibration_overlap:.2%} of this text's runs of words are in the calibration text too."
        )
    if metrics.tasks:
        found["tasks"] = table(("task", "metric", "value", "shots", "samples"), list(_tasks(metrics.tasks)))
        found["lm_eval"] = metrics.tasks.lm_eval
    return found


def _cells(part: Measured, key: str, form: str) -> tuple[str, str]:
    ends = part.interval(key)
    if not ends:
        return part.text(key), ""
    return form.format(getattr(part.figures, key)), f"{form.format(ends[0])} to {form.format(ends[1])}"


def protocol_text(protocol: TextFacts) -> str:
    """Text, windows and arithmetic of a measurement, as far as they are known."""
    known = {
        "text": "{}",
        "windows": "{:,} windows",
        "window": "of {:,} tokens",
        "stride": "stride {:,}",
        "bos": "BOS {}",
        "dtype": "computed in {}",
        "digest": "token ids sha256 {:.16}...",
    }
    values = ((form, getattr(protocol, name)) for name, form in known.items())
    return ", ".join(form.format(value) for form, value in values if value is not None)


def _entropy(metrics: Metrics) -> Markdown:
    rows: list[tuple[object, ...]] = []
    for bucket in metrics.by_entropy or ():
        end = "more" if bucket.high is None else f"{bucket.high:g}"
        kl, agreement = bucket.kl_mean, bucket.top1_agreement
        cells = ("" if kl is None else f"{kl:.6f}", "" if agreement is None else f"{agreement:.2%}")
        rows.append((f"{bucket.low:g} to {end}", f"{bucket.positions:,}", *cells))
    return table(("entropy, nats", "positions", FIGURES["kl_mean"][0], FIGURES["top1_agreement"][0]), rows)


def _drafts(metrics: Metrics | None) -> dict[str, Any]:
    if metrics is None or metrics.drafts is None:
        return {"drafts": None, "draft_protocol": None, "no_drafts": "Not measured."}
    drafts, against = metrics.drafts, metrics.against
    named = [("BF16 model", drafts.source), ("this release", drafts.release)]
    named += [(against.name, against.drafts)] if against else []
    rows: list[tuple[object, ...]] = []
    for name, found in named:
        for rule, one in (("greedy", found.greedy), ("sampled", found.sampled)) if found else ():
            ends = one.interval
            places = " / ".join(f"{share:.1%}" for share in one.by_position)
            sure = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
            rows.append((name, rule, places, f"{one.mean_length:.3f}", sure))
    protocol = drafts.protocol
    said = f"{protocol.get('prompts')} prompts, {protocol.get('steps')} draft steps; text {protocol.get('text')}"
    header = ("", "decoding", "kept, by position", "tokens a step", "95 %")
    return {"drafts": table(header, rows) if rows else None, "draft_protocol": said, "no_drafts": "Not measured."}


def _tasks(results: TaskResults) -> Iterator[tuple[object, ...]]:
    for task, found in results.tasks.items():
        for metric, value in found.figures.items():
            if isinstance(value, float) and "stderr" not in metric:
                error = found.figures.get(metric.replace(",", "_stderr,", 1))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                yield task, metric, f"{value:.4f}{spread}", found.shots, found.samples
