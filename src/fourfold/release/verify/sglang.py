"""Level 3 with SGLang: what its loader leaves unwritten. Loading alone; no kernel is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fourfold import formats
from fourfold.formats.format import Format
from fourfold.quantize.advice import HEAD, QUANTIZED_HEAD
from fourfold.records.results import Check, Level
from fourfold.release.release import Release
from fourfold.release.verify.check import judge, skip
from fourfold.release.verify.engine import Engine, load_problems

SCRIPT = "sglang_loader.py"
FAMILIES = ("qwen3_5_moe",)  # whose classes the script builds
DRAFT_CLASS = "Qwen3_5ForCausalLMMTP"
LOADER, DRAFTS, SERVED = "loader", "draft head", "runs"
DRAFTS_LOST = (
    "SGLang does not load this format's draft experts: it takes them for int4 and skips their BF16 weights without an "
    f"error, so every draft is wrong. Try: a release in format {formats.DRAFTS_IN_SGLANG}, or serve without MTP"
)


def checks(engine: Engine, release: Release) -> Iterator[Check]:
    """Target and draft are built and loaded by SGLang's own classes, as for one GPU."""
    model_type = release.family.model_type
    if model_type not in FAMILIES:
        yield skip(Level.ENGINE, LOADER, f"SGLang's loader is watched for {', '.join(FAMILIES)}, this is {model_type}")
        return
    draft = release.has_draft(release.tensors.headers)
    quantized_head = f"{HEAD}.weight" in release.tensors.stored
    request = {"model": str(release.folder.resolve()), "method": release.format.sglang_method}
    answer = engine.ask(SCRIPT, "loader", request | {"draft": draft and not quantized_head})
    if answer.failure:
        yield judge(Level.ENGINE, LOADER, [answer.failure], "")
    else:
        yield check_loads(answer.content, release.format)
    if draft and quantized_head:
        yield judge(Level.ENGINE, DRAFTS, [QUANTIZED_HEAD], "")
    yield skip(Level.ENGINE, SERVED, "with SGLang no kernel is run, only its loader is watched")


def check_loads(content: Mapping[str, Any], format: Format) -> Check:
    """content: the loader's answer; format: of the release."""
    problems, loads, method = [], content["loads"], format.sglang_method
    for model, load in loads.items():
        found = load_problems(load)
        problems += [f"{model}: {problem}" for problem in found]
        if model == DRAFT_CLASS and found and not format.sglang_drafts:
            problems.insert(0, DRAFTS_LOST)
    wrote = ", ".join(f"{load['parameters']:,} parameters of {model}" for model, load in loads.items())
    seen = f"{content['engine']}, {method}: every element written, {wrote}"
    return judge(Level.ENGINE, LOADER, problems, seen, engine=content["engine"], method=method, loads=dict(loads))
