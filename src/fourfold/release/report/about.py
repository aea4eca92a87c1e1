"""What a card says of itself to the Hub: its front matter, by huggingface_hub's own classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from fourfold.bundled import HELDOUT_TEXTS
from fourfold.model.hub import check_repo_id
from fourfold.records.results import Metrics, TaskResult, TextFacts
from fourfold.release.report.records import Records

TAGS = ("fourfold", "int4", "4-bit", "quantized", "moe")
TITLES = [text.title for text in HELDOUT_TEXTS.values()]  # all are English
UNKNOWN, OTHER = "unknown", "other"  # as the Hub calls a licence that is not known, and one that is not on its list
LICENCES = (  # what the text of a licence holds, and the Hub's name for it
    (("Apache License", "Version 2.0"), "apache-2.0"),
    (("MIT License", "Permission is hereby granted, free of charge"), "mit"),
)
SHOWN_METRICS = (  # of metrics.json's summary: the Hub's type, and what people call it
    ("perplexity_release", "perplexity", "perplexity"),
    ("kl_mean", "kl_divergence", "mean KL divergence from the BF16 model (nats)"),
    ("top1_agreement", "top1_agreement", "top-1 agreement with the BF16 model"),
)


@dataclass(frozen=True, kw_only=True)
class About:
    """What no file of a release says, or may be said otherwise.

    name: of the repository, org/name, or the folder's own; base_model: org/name, None: not known; licence: the Hub's
    name of one, None: as the release's LICENSE has it.
    """

    name: str
    base_model: str | None = None
    licence: str | None = None

    def of(self, hub: str | None) -> About:
        """Return it with the base model that quantize recorded, unless another is given.

        Raises FourfoldError for names that the Hub does not take.
        """
        said = dataclasses.replace(self, base_model=self.base_model or hub)
        for option, value in (("--repo", said.name if "/" in said.name else None), ("--base-model", said.base_model)):
            if value is not None:
                check_repo_id(option, value)
        return said


@dataclass(frozen=True)
class Licence:
    """name: the Hub's; origin: where that is from, for people; more: what the Hub wants of one not on its list."""

    name: str
    origin: str
    more: dict[str, Any] = field(default_factory=dict)


def licence(records: Records, about: About) -> Licence:
    """Of the source, as far as it is known: none is guessed."""
    return find_licence(about, records.state.source.terms, records.licence_text)


def find_licence(about: About, stated: Mapping[str, Any], text: str | None) -> Licence:
    """stated: the terms of the base model's card; text: of LICENSE, if there is one."""
    if about.licence is not None:
        return Licence(about.licence, "as its publisher states")
    if "license" in stated:
        more = {name: stated[name] for name in ("license_name", "license_link") if name in stated}
        return Licence(stated["license"], "as the base model's card states", more)
    if text is None:
        return Licence(UNKNOWN, "neither a card nor a LICENSE file came with the source: see the base model's own page")
    for marks, name in LICENCES:
        if all(mark in text for mark in marks):
            return Licence(name, "as in the source's LICENSE file, which is part of this release")
    more = {"license_name": "license-of-the-base-model", "license_link": "LICENSE"}
    return Licence(OTHER, "see the source's LICENSE file, which is part of this release", more)


def card_data(records: Records, about: About) -> ModelCardData:
    """The front matter. What is not known is left out, but for the licence, which is then named unknown."""
    vision = "vision_config" in records.raw
    found, metrics = licence(records, about), records.metrics
    results = [*eval_results(metrics)] if metrics else []
    english = metrics and (_is_wikitext(metrics.protocol) or metrics.protocol.text in TITLES)
    languages = records.state.source.terms.get("language") or (["en"] if english else None)
    return ModelCardData(
        base_model=about.base_model,
        base_model_relation="quantized" if about.base_model else None,
        license=found.name,
        language=languages,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if vision else "text-generation",
        tags=tags(records),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=about.name.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **found.more,
    )


def tags(records: Records) -> list[str]:
    names = [*TAGS, records.format.method, *(["gptq"] if set(records.state.methods) - {"rtn"} else [])]
    names += ["vllm", "sglang"]
    names += ["conversational"] if (records.folder / "chat_template.jinja").is_file() else []
    return list(dict.fromkeys(names))


def eval_results(metrics: Metrics) -> Iterator[EvalResult]:
    """What was measured, as the Hub's model index has it."""
    protocol, figures = metrics.protocol, metrics.figures
    sizes = {"window": protocol.window, "stride": protocol.stride, "windows": protocol.windows}
    args: dict[str, int] | None = {name: size for name, size in sizes.items() if size is not None}
    kind, text = "wikitext" if _is_wikitext(protocol) else "text", str(protocol.text)
    found = [(kind, text, args, metric, name, getattr(figures, key)) for key, metric, name in SHOWN_METRICS]
    for task, result, metric, value in _task_figures(metrics):
        dataset = result.benchmark.dataset if result.benchmark else task
        found.append((dataset, task, None, metric.partition(",")[0], f"{metric}, {result.shots} shots", value))
    for dataset, name, how, metric, words, value in found:
        yield EvalResult(
            task_type="text-generation", dataset_type=dataset, dataset_name=name, dataset_args=how, metric_type=metric,
            metric_name=words, metric_value=float(f"{value:.6g}"),
        )  # fmt: skip


def _is_wikitext(protocol: TextFacts) -> bool:
    return str(protocol.text).startswith("wikitext-2")


def leaderboard_entries(metrics: Metrics) -> list[EvalResultEntry]:
    """Return what the Hub's leaderboards show, in percent: the first metric of each task that is a benchmark."""
    found: dict[str, EvalResultEntry] = {}
    for task, result, metric, value in _task_figures(metrics):
        if (board := result.benchmark) is not None and task not in found:
            notes = f"lm-eval {metrics.tasks and metrics.tasks.lm_eval}, {metric}, {result.shots} shots; int4 weights"
            found[task] = EvalResultEntry(board.dataset, board.task, round(100 * value, 2), notes=notes)
    return list(found.values())


def _task_figures(metrics: Metrics) -> Iterator[tuple[str, TaskResult, str, float]]:
    """Each figure of lm-eval's but standard errors: task, result, "metric,filter", value."""
    for task, result in (metrics.tasks.tasks if metrics.tasks else {}).items():
        for metric, value in result.figures.items():
            if "stderr" not in metric and isinstance(value, float):
                yield task, result, metric, value
