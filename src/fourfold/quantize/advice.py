"""What a user should know before a run: how engines will take the release, what this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fourfold.model.checkpoint import TensorIndex
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.claims import has_draft
from fourfold.quantize.estimate import ROW_DAMPING, DiskPlan, Workload, damping_by_rule
from fourfold.quantize.memory import MemoryPlan
from fourfold.recipe import Recipe

TENSOR_PARALLEL = (2, 4, 8)
HARDLY = 0.95  # of the error is predicted to stay: guidance will not pay


def release_advice(skeleton: Skeleton, index: TensorIndex, recipe: Recipe) -> Iterator[str]:
    """About the release: what engines will make of it (docs/formats.md)."""
    yield from storage_advice(skeleton, has_draft(skeleton, index.headers), recipe.format, recipe.scheme.group_size)


def storage_advice(skeleton: Skeleton, draft: bool, format: str, group_size: int) -> Iterator[str]:
    """What engines will make of a release. draft: whether it has a draft head."""
    text = skeleton.text
    yield from _tensor_parallel(text.moe_intermediate_size, group_size, format)
    if text.hidden_size % 128:
        yield f"hidden_size = {text.hidden_size} is no multiple of 128, as the engines' Marlin kernels need"
    if skeleton.family.mtp_prefix and not draft:
        yield (
            "no MTP tensors in the checkpoint: a release of it cannot draft its own tokens; vLLM loads it with MTP "
            "switched on without an error and accepts 0 drafts"
        )
    if draft and format != "compressed-tensors":
        yield (
            f"format {format} with MTP: SGLang drops the draft head's experts without a word; for "
            "drafts in SGLang take format compressed-tensors (vLLM runs both)"
        )


def _tensor_parallel(width: int, size: int, storage: str) -> Iterator[str]:
    bad = [devices for devices in TENSOR_PARALLEL if width % (devices * size)]
    if not bad:
        return
    effect = "vLLM refuses to load it, SGLang loads empty scales without an error"
    if storage != "compressed-tensors":
        effect = (
            "vLLM falls back from Marlin to the slower moe_wna16 (on CPUs it refuses), SGLang is right with "
            "--quantization moe_wna16 only"
        )
    smaller = [group for group in (64, 32) if group < size and width % (bad[-1] * group) == 0]
    way_out = f" or scheme.group_size = {smaller[0]}" if smaller else ""
    yield (
        f"tensor parallel {', '.join(map(str, bad))}: an expert's {width} columns over so many devices are "
        f"no whole groups of {size}; {effect}. Ways out: expert parallel{way_out}, or fewer devices"
    )


def run_advice(recipe: Recipe, work: Workload, memory: MemoryPlan, disk: DiskPlan) -> Iterator[str]:
    """About this run on this machine."""
    if work.tokens_per_expert < work.hidden / 2:
        yield (
            f"small calibration: {work.calibration_tokens:,} tokens, top {work.topk} of {work.experts} "
            f"experts, are {work.tokens_per_expert:,.0f} tokens per expert, fewer than hidden_size / 2 = "
            f"{work.hidden // 2:,}; more rows in calibration.sources help"
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
        yield f"memory: {problem}; fewer rows or another device help"
    if not disk.enough:
        yield disk.problem


def prediction(share_by_layer: Mapping[int, float]) -> str:
    """What guidance is predicted to leave of the error, by layer, and where it will not pay."""
    if not share_by_layer:
        return "what guidance is predicted to leave of the error is known after the sweep with which quantize begins"
    shares = ", ".join(f"{layer}: {share:.2f}" for layer, share in share_by_layer.items())
    text = f"guidance is predicted to leave this share of down's error, by layer: {shares}"
    idle = [layer for layer, share in share_by_layer.items() if share > HARDLY]
    if idle:
        which = "any layer" if len(idle) == len(share_by_layer) else f"layers {', '.join(map(str, idle))}"
        text += f"; it will not pay in {which}"
    return text
