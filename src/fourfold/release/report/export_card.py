"""The model card of what `convert` wrote as GGUF or for MLX: from conversion.json, verify.json and LICENSE alone."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from fourfold.formats import EXPORTS, gguf, mlx
from fourfold.model.files import write_text
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import refuse_links
from fourfold.records.release import Export, Terms
from fourfold.records.results import Verdict
from fourfold.release.contents import CARD, LICENCE, VERDICT
from fourfold.release.report.about import TAGS, About, Licence, find_licence
from fourfold.release.report.card import base_link, compose
from fourfold.release.report.escape import Markdown, block, code, table
from fourfold.release.report.quality import protocol_text
from fourfold.serve.local import card_command, has_vision
from fourfold.units import FIGURES, figure_text, size

ENGINES = {gguf.NAME: "llama.cpp, Ollama and LM Studio", mlx.NAME: "mlx-lm, mlx-vlm and LM Studio"}
STORED = {gguf.NAME: "GGUF Q4_0, 4.5 bits per weight", mlx.NAME: "MLX affine, 4 bits"}
STORED_INT8 = {gguf.NAME: "int8 as Q8_0, 8.5 bits per weight", mlx.NAME: "int8 as MLX affine, 8 bits"}
NOTES = {gguf.NAME: "The file has the text model alone: for images llama.cpp needs an mmproj file of the base model."}


def write(folder: Path, record: Export, about: About) -> None:
    """Write README.md. record: conversion.json.

    Raises FourfoldError for a link in the folder, a verify.json that is not as verify writes it, and names that the Hub
    does not take.
    """
    refuse_links(folder)
    about = about.of(record.release.base_model if record.release else None)
    write_text(folder / CARD, export_card(folder, record, about))


def export_card(folder: Path, record: Export, about: About) -> str:
    """README.md. Same inputs, same text; nothing of this machine."""
    licence, shown = _licence(folder, record, about), Path(about.name.rpartition("/")[2])
    download = f"hf download {shlex.quote(about.name)} --local-dir {shlex.quote(str(shown))}"
    place = shlex.quote(f"./{shown}")
    files = [(code(name), size(file.bytes), code(file.sha256)) for name, file in record.files.items()]
    verdict = _verdict(folder, record)
    checks = [(one.level, one.name, one.status, one.evidence) for one in (verdict.checks if verdict else ())]
    context = {
        "repo": Markdown(quote(about.name)),
        "base": base_link(about),
        "engines": ENGINES[record.after],
        "glance": table(("", ""), [*_facts(record, about, verdict)]),
        "commands": block(f"{download}\n{card_command(folder, record, shown)}", "sh"),
        "note": NOTES.get(record.after, ""),
        "serve": code(f"fourfold serve {place} --print"),
        "verify": code(f"fourfold verify {place} --source RELEASE --engine {EXPORTS[record.after]}"),
        "checks": checks and table(("level", "check", "result", "evidence"), checks),
        "files": table(("file", "size", "sha256"), files),
        "licence": licence.name,
        "licence_origin": licence.origin,
        **_quality(record),
    }
    return compose("export.md.jinja", about, _card_data(folder, record, about, licence), context)


def _licence(folder: Path, record: Export, about: About) -> Licence:
    path = folder / LICENCE
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    return find_licence(about, _terms(record), text)


def _terms(record: Export) -> Terms:
    return record.release.terms if record.release else {}


def _card_data(folder: Path, record: Export, about: About, licence: Licence) -> ModelCardData:
    form = record.after
    vision = form == mlx.NAME and has_vision(folder)
    return ModelCardData(
        base_model=about.base_model,
        base_model_relation="quantized" if about.base_model else None,
        license=licence.name,
        language=_terms(record).get("language"),
        library_name=form,
        pipeline_tag="image-text-to-text" if vision else "text-generation",
        tags=[*dict.fromkeys((form, EXPORTS[form])), *TAGS],
        **licence.more,
    )


def _facts(record: Export, about: About, verdict: Verdict | None) -> Iterator[tuple[str, object]]:
    """What it is: (name, fact)."""
    recipe = f", recipe {record.release.recipe}" if record.release else ""
    yield "base model", base_link(about) or "not stated"
    int4 = f"{record.projections - record.int8:,} expert projections, int4, groups of {record.group_size}"
    yield "quantized", f"{int4}{f'; {record.int8:,} others, int8' if record.int8 else ''}{recipe}"
    stored = f"{STORED[record.after]}{f'; {STORED_INT8[record.after]}' if record.int8 else ''}"
    yield "stored as", f"{stored}; codes and scales are copied from the release"
    yield "other tensors", "as in the release" if record.is_exact else f"matrices are rounded to {record.rest}"
    if record.settings:
        yield "draft head (MTP)", "kept" if record.has_drafts else "none"
    yield "converted by", f"fourfold {record.fourfold}, from {record.before}"
    if record.content:
        yield "release", code(record.content)
    yield "size", size(record.bytes_after)
    said = verdict and f"{'passed' if verdict.passed else 'FAILED'}: {', '.join(verdict.levels)}"
    yield "verified", said or "no"


def _quality(record: Export) -> dict[str, Any]:
    """Return the release's figures, if these files have its weights unchanged."""
    found = record.release and record.release.quality
    if not found or not record.is_exact:
        return {"quality": None}
    ends = found.intervals or {}
    rows = [(name, figure_text(key, getattr(found.summary, key), ends.get(key))) for key, (name, _) in FIGURES.items()]
    protocol = protocol_text(found.protocol)
    return {"quality": table(("", "release"), rows), "measured_by": found.measured_by, "protocol": protocol}


def _verdict(folder: Path, record: Export) -> Verdict | None:
    """verify.json; None if there is none of these very files."""
    verdict = Verdict.find(folder / VERDICT)
    content = joined_digest({name: file.sha256 for name, file in record.files.items()})
    return verdict if verdict and verdict.content == content else None
