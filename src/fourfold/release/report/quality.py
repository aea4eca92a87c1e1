"""Quality on a card: figures with intervals, drafts, tasks, as metrics.json has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold.release.report.escape import Markdown, prose, table
from fourfold.release.report.records import Records
from fourfold.units import FIGURES, figure_text

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
    against = metrics.get("against")
    header = ("", "this release", "95 %", *((str(prose(against["name"])), "95 %") if against else ()))
    rows = [
        (words, *_cells(metrics, key, form), *(_cells(against, key, form) if against else ()))
        for key, (words, form) in FIGURES.items()
    ]
    found["quality"] = table(header, rows)
    found["entropy"] = _entropy(metrics)
    found["measured_by"] = metrics["measured_by"]
    found["protocol"] = protocol_text(metrics["protocol"])
    overlap = metrics.get("calibration_overlap")
    if overlap is not None:
        found["overlap"] = f"{overlap:.2%} of this text's runs of words are in the calibration text too."
    tasks = metrics.get("tasks") or {}
    if tasks:
        found["tasks"] = table(("task", "metric", "value", "shots", "samples"), list(_tasks(tasks["tasks"])))
        found["lm_eval"] = tasks["lm_eval"]
    return found


def _cells(part: Mapping[str, Any], key: str, form: str) -> tuple[str, str]:
    ends = (part.get("intervals") or {}).get(key)
    if not ends:
        return figure_text(part, key), ""
    return form.format(part["summary"][key]), f"{form.format(ends[0])} to {form.format(ends[1])}"


def protocol_text(protocol: Mapping[str, Any]) -> str:
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
    said = [form.format(protocol[name]) for name, form in known.items() if protocol.get(name) is not None]
    return ", ".join(said)


def _entropy(metrics: Mapping[str, Any]) -> Markdown:
    rows: list[tuple[object, ...]] = []
    for bucket in metrics.get("by_entropy") or ():
        end = "more" if bucket["to"] is None else f"{bucket['to']:g}"
        kl, agreement = bucket.get("kl_mean"), bucket.get("top1_agreement")
        cells = ("" if kl is None else f"{kl:.6f}", "" if agreement is None else f"{agreement:.2%}")
        rows.append((f"{bucket['from']:g} to {end}", f"{bucket['positions']:,}", *cells))
    return table(("entropy, nats", "positions", FIGURES["kl_mean"][0], FIGURES["top1_agreement"][0]), rows)


def _drafts(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    drafts = (metrics or {}).get("drafts")
    if not drafts:
        return {"drafts": None, "draft_protocol": None, "no_drafts": "Not measured."}
    named = [("BF16 model", drafts["source"]), ("this release", drafts["release"])]
    if (metrics or {}).get("against") and metrics and metrics["against"].get("drafts"):
        named.append((metrics["against"]["name"], metrics["against"]["drafts"]))
    rows: list[tuple[object, ...]] = []
    for name, found in named:
        for rule in ("greedy", "sampled"):
            if not found:
                continue
            one = found[rule]
            ends = one["interval"]
            places = " / ".join(f"{share:.1%}" for share in one["by_position"])
            sure = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""
            rows.append((name, rule, places, f"{one['mean_length']:.3f}", sure))
    protocol = drafts["protocol"]
    said = f"{protocol.get('prompts')} prompts, {protocol.get('steps')} draft steps; text {protocol.get('text')}"
    header = ("", "decoding", "kept, by position", "tokens a step", "95 %")
    return {"drafts": table(header, rows) if rows else None, "draft_protocol": said, "no_drafts": "Not measured."}


def _tasks(tasks: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    for task, figures in tasks.items():
        for metric, value in figures["figures"].items():
            if isinstance(value, float) and "stderr" not in metric:
                error = figures["figures"].get(metric.replace(",", "_stderr,", 1))
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                yield task, metric, f"{value:.4f}{spread}", figures["shots"], figures["samples"]
