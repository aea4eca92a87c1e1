"""The model card: a template, filled from the records alone. Whatever the records say is escaped as it goes in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from fourfold.datatypes import FourfoldError
from fourfold.formats import EXPORTS
from fourfold.formats.fixed import unsupported
from fourfold.formats.gguf_names import ARCHITECTURES
from fourfold.formats.mlx import MODEL_TYPES
from fourfold.install import public_install
from fourfold.model.config import has_vision
from fourfold.records.bench import Bench
from fourfold.records.release import State
from fourfold.records.results import Status, Verdict
from fourfold.release.report.about import About, card_data, licence
from fourfold.release.report.escape import Markdown, block, code, finalize, prose, table
from fourfold.release.report.layers import layers_context, method_shares, weakest_text
from fourfold.release.report.quality import quality
from fourfold.release.report.records import EXPERTS, Records
from fourfold.serve.served import sampling
from fourfold.units import clock_text, count_text, size, stages

METHODS = (
    ("Frantar and others 2022, GPTQ", "2210.17323"),
    ("Li and others 2025, GPTAQ: inputs from the quantized layers before", "2504.02692"),
    ("Lin and Wan 2025, LoaQ: targets that correct the residual stream", "2509.06297"),
    ("Leviathan, Kalman and Matias 2023, speculative decoding: acceptance rate", "2211.17192"),
)
DERIVED = "not covered by fourfold's tests; a small copy gave the same outputs layer by layer as in transformers"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A command as `fourfold serve` gives it. machine: what it is for; problems: why it would not run."""

    title: str
    text: str
    machine: str
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def card(records: Records, about: About, commands: Sequence[Serving], figures: Mapping[str, str]) -> str:
    """README.md. figures: path from the release's folder -> what a plot shows. Same inputs, same text.

    Raises FourfoldError if huggingface_hub does not read from it what was written.
    """
    context = _head(records, about) | layers_context(records) | _origin(records, about)
    context |= quality(records.metrics, records.state) | _checks(records.verdict) | _bench(records.bench)
    context |= {
        "figures": [(Markdown(path), prose(words)) for path, words in figures.items()],
        "commands": [_command(command) for command in commands],
        "limits": list(_limits(records)),
    }
    return compose("card.md.jinja", about, card_data(records, about), context)


def compose(template: str, about: About, data: ModelCardData, context: Mapping[str, Any]) -> str:
    """Return a card: front matter and a template of this folder, filled.

    Raises FourfoldError if huggingface_hub does not read from it what was written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        autoescape=False,  # finalize does it, as Markdown wants
    )
    body = environment.get_template(template).render(**context, name=about.name.rpartition("/")[2])
    body = re.sub(r"\n{3,}", "\n\n", body)
    text = f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"
    read = ModelCard(text)
    if str(read.data) != str(data) or read.text.strip() != body.strip():
        raise FourfoldError(f"{about.name}: huggingface_hub does not read the card's front matter as it was written")
    return text


def _command(command: Serving) -> dict[str, Any]:
    return {
        "title": command.title,
        "text": block(command.text, "sh"),
        "machine": command.machine,
        "problems": "; ".join(command.problems),
        "notes": command.notes,
    }


# --- what it is ---------------------------------------------------------------------------------------------------


def _head(records: Records, about: About) -> dict[str, Any]:
    state, scheme = records.state, records.recipe.scheme
    base = base_link(about)
    before, after = state.source_tensor_bytes, state.output.tensor_bytes
    rows: list[tuple[object, ...]] = [
        ("base model", base or "not stated"),
        *_source_weights(state.source.weights),
        ("architecture", f"{records.architecture}, {records.layers} layers"),
        ("parameters", parameters_text(records)),
        ("experts", _experts(records)),
        *([("support", DERIVED)] if records.family.derived else []),
        ("context", f"{records.text.max_position_embeddings:,} tokens"),
        ("quantized", f"{state.projections:,} expert projections, {', '.join(method_shares(state.methods))}"),
        ("format", f"{records.format}, int4, groups of {scheme.group}, symmetric"),
        ("size", f"{size(before)} → {size(after)} ({after / before:.1%})"),
        ("weakest", weakest_text(records)),
        ("verified", _brief_verdict(records)),
    ]
    groups: list[tuple[object, ...]] = [
        (group.name, f"int{group.bits}" if group.bits else "kept", f"{group.tensors:,}", size(group.size_bytes),
         f"matrices: {group.weights:,}" if group.bits else group.reason)
        for group in records.groups()
    ]  # fmt: skip
    return {
        "base": base or "A Mixture-of-Experts checkpoint",
        "version": state.fourfold,
        "glance": table(("", ""), rows),
        "groups": table(("tensors", "format", "count", "size", "reason"), groups),
        "rest": ", ".join(
            f"{one.name} (int{one.bits})" for one in records.groups() if one.bits and one.name != EXPERTS
        ),
        "group_size": scheme.group,
        "signed": ", signed scales" if scheme.signed else "",
        "format": records.format.name,
        "scale_dtype": scheme.scale_dtype.upper(),
        "stale": records.stale,
    }


def parameters_text(records: Records) -> str:
    count, used = map(count_text, records.parameters())
    return f"{count} total, {used} active per token"


def _experts(records: Records) -> str:
    """Counts and widths (intermediate sizes) of experts."""
    one, layers, shared = records.widest, len(records.routed), records.shared_width()
    said = f"{one.count} in each of {layers} layers, {records.topk} active per token, width {one.width:,}"
    return said + (f"; shared expert: width {shared:,}" if shared else "; no shared expert")


def base_link(about: About) -> Markdown | None:
    """The base model with a link to its page; None if it is not known."""
    base = about.base_model
    return Markdown(f"[{prose(base)}](https://huggingface.co/{base})") if base else None


def _source_weights(kind: str | None) -> Iterator[tuple[object, ...]]:
    """The source's format, if it is not BF16. None in releases of versions that did not record it."""
    if kind == "int4":
        yield "source", "int4: its experts are quantized a second time; quality is measured against this source"
    elif kind not in (None, "BF16"):
        yield "source", f"{kind}, dequantized when read; unquantized tensors are BF16 here"


def _brief_verdict(records: Records) -> str:
    verdict = records.verdict
    if verdict is None:
        return "no" if not records.stale else "no: verify.json is for other bytes"
    at_once = max((one.data.get("at_once", 0) for one in verdict.checks), default=0)
    run = Markdown(", ".join(verdict.levels) + (f", {at_once} requests at once" if at_once else ""))
    return f"{'passed' if verdict.passed else 'FAILED'}: {run}"


# --- where it is from ---------------------------------------------------------------------------------------------


def _origin(records: Records, about: About) -> dict[str, Any]:
    state, found = records.state, licence(records, about)
    calibration = state.calibration
    sources: list[tuple[object, ...]] = [
        (one.name, one.licence or "not stated", f"{one.rows:,}", f"{one.documents:,}", f"{one.tokens:,}")
        for one in calibration.sources
    ]
    shards = [(code(name), size(one.bytes), code(one.sha256)) for name, one in state.output.shards.items()]
    digests: list[tuple[object, ...]] = [
        ("recipe", code(state.identity.recipe)),
        ("source: headers, config.json, tokenizer", code(state.identity.source)),
        ("source: all bytes read", code(state.source.content)),
        ("calibration tokens", code(state.identity.calibration)),
        ("held-out tokens", code(state.identity.heldout)),
        ("this release", code(state.output.content)),
    ]
    return {
        "calibration": f"{calibration.rows:,} samples of {calibration.length:,} tokens, seed "
        f"{records.recipe.calibration.seed}.",
        "sources": table(("source", "licence", "samples", "documents", "tokens available"), sources),
        "made": _made(state),
        "reproduce": _reproduce(records, about),
        "digests": Markdown(table(("", "sha256"), digests) + "\n\n" + table(("file", "size", "sha256"), shards)),
        "methods": [Markdown(f"{what}: [arXiv {paper}](https://arxiv.org/abs/{paper})") for what, paper in METHODS],
        "licence": found.name,
        "licence_origin": found.origin,
        "transformers": _transformers(about, "vision_config" in records.raw),
        "transformers_problem": records.transformers_problem,
        "other_formats": _other_formats(records, about),
        "sampling": _sampling(sampling(records.folder)),
    }


def _made(state: State) -> Markdown:
    installed = {place: f", {size(count)}" for place, count in state.device_memory_bytes.items()}
    devices = "; ".join(f"{place}: {name}{installed.get(place, '')}" for place, name in state.devices.items())
    memory = ", ".join(f"{place} {size(peak)}" for place, peak in state.peak_memory_bytes.items())
    versions = ", ".join(f"{name} {found}" for name, found in state.versions.items())
    seconds = state.seconds
    rows: list[tuple[object, ...]] = [
        ("machine", devices),
        ("workers", len(state.workers)),
        ("time since the last start", clock_text(sum(seconds.values()))),
        ("by stage", ", ".join(f"{name} {clock_text(took)}" for name, took in stages(seconds))),
        ("peak memory", memory),
        ("recipe", f"{state.recipe} (recipe.toml)"),
        ("versions", f"fourfold {state.fourfold}, {versions}"),
        ("finished", state.finished_at),
    ]
    return table(("", ""), rows)


def _reproduce(records: Records, about: About) -> Markdown:
    model = about.base_model or "MODEL"
    install = public_install(records.state.fourfold)
    text = f"{install}\nfourfold quantize {shlex.quote(model)} ./release --recipe recipe.toml"
    return Markdown(block(text, "sh") + "\n\n`recipe.toml` is in this repository.")


def _transformers(about: About, vision: bool) -> Markdown:
    model = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    lines = (
        f"from transformers import {model}, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({about.name!r})\n"
        f'model = {model}.from_pretrained({about.name!r}, device_map="auto")'
    )
    return block(lines, "python")


def _other_formats(records: Records, about: About) -> Markdown | None:
    """Commands that make a file for each engine of its own that has this architecture; None if none has."""
    known = {"gguf": ARCHITECTURES, "mlx": MODEL_TYPES}
    lines = [f"hf download {shlex.quote(about.name)} --local-dir ./release"]
    for form, engine in EXPORTS.items():
        model_types: Mapping[str, Any] = known[form]
        one = model_types.get(records.family.model_type)
        if one is not None and not unsupported(records.text, getattr(one, "fixed", one)):
            lines += [
                f"fourfold convert ./release ./release-{form} --format {form}",
                f"fourfold verify ./release-{form} --source ./release --engine {engine}",
                f"fourfold serve ./release-{form} --print",
            ]
    return block("\n".join(lines), "sh") if len(lines) > 1 else None


def _sampling(sampling: Mapping[str, Any]) -> str:
    if not sampling:
        return "generation_config.json sets none; see the base model's page."
    said = ", ".join(f"{name} {value}" for name, value in sampling.items())
    return f"generation_config.json sets the engines' defaults: {said}."


# --- what was verified, and what was not ------------------------------------------------------------------------------


def _checks(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {"verified": None, "engine": None}
    rows = [(one.level, one.name, one.status, one.evidence) for one in verdict.checks]
    engine, said = verdict.engine, "No engine was run."
    if engine:
        said = f"Engine: {engine.engine} on {engine.device}, torch {engine.torch}"
        if engine.decode_tokens_per_second is not None:
            said += f", {engine.decode_tokens_per_second:.1f} tokens/s for one request"
    return {"verified": table(("level", "check", "result", "evidence"), rows), "engine": said}


def _bench(bench: Bench | None) -> dict[str, Any]:
    if bench is None:
        return {"bench": None, "bench_how": None}
    rows: list[tuple[object, ...]] = []
    for level in bench.levels:
        decode, first, accepted = level.decode_tokens_per_second, level.time_to_first_token, level.acceptance
        rows.append((
            level.title, f"{level.requests.ok}/{level.requests.asked}", f"{level.output_tokens_per_second:,.1f}",
            f"{decode.p50:,.1f}" if decode else "",
            f"{first.p50 * 1000:,.0f} / {first.p99 * 1000:,.0f}" if first else "",
            f"{accepted.rate:.1%}" if accepted else "", f"{accepted.mean_length:.2f}" if accepted else "",
        ))  # fmt: skip
    header = (
        "concurrency", "answered", "tokens/s, total", "tokens/s per request, p50", "TTFT (ms), p50 / p99",
        "acceptance rate", "tokens per step",
    )  # fmt: skip
    load, pool = bench.load, ", ".join(f"{name} {value}" for name, value in bench.pool.items())
    how = (
        f"Engine {bench.engine or 'unknown'}, model {bench.model}, {load.output_tokens} output tokens per request, "
        f"temperature {load.temperature:g}, prompts {load.prompts}" + (f"; KV cache: {pool}" if pool else "")
    )
    return {"bench": table(header, rows), "bench_how": how}


def _limits(records: Records) -> Iterator[object]:
    yield from records.state.calibration.notes
    if has_vision(records.raw) and not records.recipe.image_sources:
        yield "Calibrated on text alone: what image tokens need of the experts was not measured."
    if not records.format.sglang_drafts:
        yield (
            f"SGLang skips the draft experts of a {records.format} release without an error. Serve it there "
            "without drafts, or use vLLM."
        )
    if records.verdict and not records.verdict.passed:
        failed = [one.name for one in records.verdict.checks if one.status is Status.FAIL]
        yield f"Verification failed: {', '.join(failed)}."
    yield f"Not quantized: {size(sum(group.size_bytes for group in records.groups() if not group.bits))} of tensors."
    for what, way in records.missing:
        yield Markdown(f"Not measured: {prose(what)} ({code(way)}).")
