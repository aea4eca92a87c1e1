"""What a user should know before a run: how engines will take the release, what this machine lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold import formats
from fourfold.datatypes import Event
from fourfold.distributed.devices import devices_text
from fourfold.formats.format import EXPERT, Format
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.hub import hub_name
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.estimate import ROW_DAMPING, DiskPlan, Workload, damping_by_rule
from fourfold.quantize.identity import layers_text
from fourfold.quantize.memory import MemoryPlan
from fourfold.recipe import Recipe
from fourfold.units import size

if TYPE_CHECKING:
    from fourfold.quantize.plan import Plan

TENSOR_PARALLEL = (2, 4, 8)
MORE_ROOM = "Try: smaller --samples or --sequence-length, or more devices"
HEAD = "lm_head"
QUANTIZED_HEAD = (
    f"the output head ({HEAD}) is quantized: SGLang makes no drafts with it, it stops at its start (AttributeError: "
    "'ParallelLMHead' object has no attribute 'weight'). Try: recipe compact-sglang, or serve without MTP"
)
ENOUGH = 32  # tokens per expert and input of gate and up: the learning curve is flat from here on (docs/measured.md)
HARDLY = 0.95  # of the error is predicted to stay: guidance will not pay


def headline(plan: Plan, out: Path | None) -> list[tuple[str, str]]:
    """What is quantized, by what recipe, on what, into what: (name, fact)."""
    recipe, layers, calibration = plan.recipe, len(plan.layers), plan.recipe.calibration
    model, family = hub_name(plan.source.folder) or str(plan.source.folder), plan.source.family.model_type
    samples = f"{sum(source.rows for source in calibration.sources):,} samples of {calibration.length:,} tokens"
    facts = [
        ("model", f"{model} ({family}, {layers} layers, {plan.projections:,} projections)"),
        ("recipe", f"{recipe.name}: {recipe.format}, group size {recipe.scheme.group}, {samples}"),
        ("tokens", coverage_text(plan.work)),
        ("devices", devices_text(plan.memory.devices)),
    ]
    if recipe.reads_images:
        rows = sum(source.rows for source in recipe.image_sources)
        share = f"{calibration.image_share:.0%} of the weight" if calibration.image_share else "weighed as text"
        tower = f"tower of {size(plan.work.tower_bytes)}, run once in BF16"
        facts.insert(3, ("images", f"{rows:,} of the samples, {share}; {tower}"))
    if plan.partial:
        facts.append(("layers", f"{layers_text(plan.solve)}: a trial, the output is partial"))
    return facts + ([("output", str(out))] if out else [])


def coverage_text(work: Workload) -> str:
    """Calibration tokens of an expert for each of its inputs, on average, and whether more would help."""
    inputs = work.tokens_per_expert / work.hidden, work.tokens_per_expert / work.width
    more = f"; KLD falls with more, up to {ENOUGH}" if inputs[0] < ENOUGH else ""
    return f"{inputs[0]:.3g} per expert and input of gate and up, {inputs[1]:.3g} of down{more}"


def start_event(plan: Plan, out: Path) -> Event:
    """The headline as the first event of a run."""
    facts = headline(plan, out)
    return Event(kind="start", text="\n".join(f"{name:9}{fact}" for name, fact in facts), data=dict(facts))


def release_advice(source: Checkpoint, recipe: Recipe, devices: Sequence[str]) -> Iterator[str]:
    """About the release: what engines will make of it (docs/formats.md). devices: the run's, taken for a server's."""
    in_int4 = recipe.scheme.rest.draft_experts == "int4"
    yield from format_advice(source, source.has_draft_head, formats.named(recipe.format), in_int4)
    width, size = source.widest.width, recipe.scheme.group
    if problem := tensor_parallel_problem(width, size, len({device for device in devices if device != "cpu"})):
        yield problem


def source_advice(source: Checkpoint) -> Iterator[str]:
    """About a source that is not BF16; said before the run."""
    if source.kind == "int4":
        yield (
            "the source is int4: its experts are quantized a second time, which costs quality; meant for models that "
            "are published in nothing else. To change the format, take `fourfold convert`"
        )
    elif source.kind:
        yield f"the source is {source.kind}: dequantized while it is read; what is not quantized is written in BF16"
    if source.kind:
        yield f"in BF16 the source would be {size(source.added_bytes)} larger than it is on disk"


def format_advice(skeleton: Skeleton, draft: bool, format: Format, draft_in_int4: bool = False) -> Iterator[str]:
    """What engines will make of a release. draft: whether it has a draft head; draft_in_int4: its experts are int4."""
    text = skeleton.text
    if text.hidden_size % 128:
        yield f"hidden_size = {text.hidden_size} is no multiple of 128, as the engines' Marlin kernels need"
    if skeleton.family.mtp_prefix and not draft:
        yield (
            "no MTP tensors in the checkpoint: a release of it cannot draft its own tokens; vLLM loads it with MTP "
            "switched on without an error and accepts 0 drafts"
        )
    if draft and not draft_in_int4 and not format.sglang_drafts:
        yield (
            f"format {format} with MTP: SGLang drops the draft head's experts without a word; for "
            f"drafts in SGLang take format {formats.DRAFTS_IN_SGLANG} (vLLM runs both)"
        )


def width_advice(bits: Mapping[str, int]) -> Iterator[str]:
    """What engines make of quantized modules beside experts. bits: by the modules' names."""
    if HEAD in bits:
        yield f"{QUANTIZED_HEAD}. vLLM reads it from 0.20.2 on (0.19.1 does not)"
    if any(width == 8 and not re.match(EXPERT, name) for name, width in bits.items()):
        yield (
            "int8 linear layers: vLLM has a kernel for them on GPUs only, on a CPU it does not start; `fourfold verify "
            "--engine vllm` computes them exactly there"
        )


def tensor_parallel_problem(width: int, size: int, gpus: int) -> str:
    """Say which sizes of tensor parallel on `gpus` cannot split the experts; "" if all can."""
    bad = [ranks for ranks in TENSOR_PARALLEL if ranks <= gpus and width % (ranks * size)]
    if not bad:
        return ""
    return f"tensor parallel {', '.join(map(str, bad))}: width {width} / {bad[0]} not divisible by group size {size}"


def tensor_parallel_advice(width: int, size: int, format: Format) -> Iterator[str]:
    """The same for any server, with what engines do then."""
    if problem := tensor_parallel_problem(width, size, TENSOR_PARALLEL[-1]):
        yield f"{problem}; {format.split_groups}. Try: expert parallel, a smaller group size, or fewer GPUs"


def run_advice(recipe: Recipe, work: Workload, memory: MemoryPlan, disk: DiskPlan) -> Iterator[str]:
    """About this run on this machine."""
    if work.tokens_per_expert < work.hidden / 2:
        yield (
            f"small calibration: {work.calibration_tokens:,} tokens, top {work.topk} of {work.experts} "
            f"experts, are {work.tokens_per_expert:,.0f} tokens per expert, fewer than hidden_size / 2 = "
            f"{work.hidden // 2:,}. Try: more --samples"
        )
    damping = damping_by_rule(work)
    if work.guidance_tokens and not recipe.guidance.damp and damping > ROW_DAMPING[0][1]:
        yield (
            f"few gradients: {work.guidance_tokens:,} guidance tokens are "
            f"{work.guidance_tokens / work.hidden:,.1f} for each of {work.hidden:,} hidden dimensions, fewer than "
            f"{ROW_DAMPING[0][0]}, so that their metric is damped by {damping:g} rather than {ROW_DAMPING[0][1]:g}; "
            "more guidance.tokens help, as far as there are calibration rows"
        )
    for problem in memory.problems:
        yield f"memory: {problem}. {MORE_ROOM}"
    if not disk.enough:
        yield disk.problem


def prediction(share_by_layer: Mapping[int, float]) -> str:
    """What guidance is predicted to leave of the error, and where it will not pay."""
    if not share_by_layer:
        return "what guidance is predicted to leave of the error is known after the sweep with which quantize begins"
    least, most = min(share_by_layer.values()), max(share_by_layer.values())
    text = f"guidance is predicted to leave {least:.2f} to {most:.2f} of down's error, by layer"
    idle = [layer for layer, share in share_by_layer.items() if share > HARDLY]
    if idle:
        which = "any layer" if len(idle) == len(share_by_layer) else f"layers {', '.join(map(str, idle))}"
        text += f"; no gain in {which}"
    return text
