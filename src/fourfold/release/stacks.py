"""The quantized weights of a release as formats with stacks want them: experts by layer and projection, modules."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model.family import PROJECTIONS
from fourfold.model.stored import StoredWeight
from fourfold.release.conversion import Job

DRAFT_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.")
ROUTED_BITS = 4
SLAB_ROWS = 4096  # of a module that are dequantized at one time


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One projection of all experts of a layer, draft layers among them. parts: by expert."""

    projection: str
    parts: tuple[StoredWeight, ...]

    @property
    def first(self) -> StoredWeight:
        return self.parts[0]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, N, K, G."""
        return len(self.parts), self.first.outputs, self.first.inputs, self.first.groups


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """stacks: routed experts in order of layers, then draft experts; modules: everything else that has codes."""

    stacks: tuple[Stack, ...]
    modules: tuple[StoredWeight, ...]


def sort_projections(job: Job) -> Quantized:
    """Raises FourfoldError unless all routed experts are int4 and the experts of each stack are alike."""
    found: list[Stack] = []
    projections, left = job.out.projections, dict(job.out.projections)
    for layer in job.out.routed:
        stems = job.out.stems(layer)
        for projection in stems[0]:
            names = [one[projection] for one in stems]
            for name in names:
                if left.pop(name, None) is None or projections[name].bits != ROUTED_BITS:
                    raise FourfoldError(
                        f"{job.out.folder}: {name.rstrip('.')} is not int4, expected all routed experts in int4. "
                        "Quantize the model anew"
                    )
            found.append(Stack(projection=projection, parts=tuple(projections[name] for name in names)))
    drafts: dict[tuple[str, str], dict[int, StoredWeight]] = {}
    for name in list(left):
        if (match := DRAFT_EXPERT.fullmatch(name)) and match[3] in PROJECTIONS:
            drafts.setdefault((match[1], match[3]), {})[int(match[2])] = left.pop(name)
    for (_, projection), experts in drafts.items():
        found.append(Stack(projection=projection, parts=tuple(experts[number] for number in sorted(experts))))
    for stack in found:
        _check_alike(job, stack)
    return Quantized(stacks=tuple(found), modules=tuple(left.values()))


def _check_alike(job: Job, stack: Stack) -> None:
    kinds = {(part.bits, part.outputs, part.inputs, part.groups): part.name for part in stack.parts}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise FourfoldError(
            f"{job.out.folder}: {one.rstrip('.')} and {other.rstrip('.')} have other bits or shapes, expected "
            "experts that can be stacked. Quantize the model anew"
        )


def check_scales(job: Job, dtype: torch.dtype, title: str) -> None:
    """Raise FourfoldError unless a dtype holds every scale. Scales are small, so all are read before work begins."""
    for projection in job.out.projections.values():
        name = projection.name + job.before.scales
        scale = job.out.disk.read_finite(name)
        wrong = scale.to(dtype).double() != scale.double()
        if wrong.any():
            kind = str(dtype).removeprefix("torch.")
            raise FourfoldError(
                f"{job.out.folder}: {name}: {int(wrong.sum()):,} of {scale.numel():,} scales are no {kind} values, "
                f"as {float(scale[wrong][0]):.6g}; {title} stores {kind}. `fourfold convert OUT NEW --format "
                "compressed-tensors` rounds them, which changes the weights; convert its NEW then"
            )


def read_part(job: Job, part: StoredWeight, *, codes: bool = True) -> tuple[Tensor, Tensor]:
    """Words int32 [N, K * bits / 32], lowest bits first, empty without `codes`, and scales [N, G]."""
    form = job.before
    scale = form.oriented(job.out.disk.read(part.name + form.scales))
    if not codes:
        return torch.empty(0), scale
    words = job.out.disk.read(part.name + form.codes)
    job.tick(words.nbytes)
    return form.oriented(words).contiguous(), scale


def dequantized(job: Job, part: StoredWeight) -> Iterator[Tensor]:
    """Yield OUT's weights of a projection, fp32 [N, K], in slabs of rows: a head of 248,320 rows is never held whole.

    Zero points and orders of groups are plain, which `open_job` checks.
    """
    form = job.before
    words, scale = (job.out.disk.read(part.name + suffix) for suffix in (form.codes, form.scales))
    axis = 1 - form.inputs_axis
    slabs: Sequence[Sequence[Tensor]] = [words.split(SLAB_ROWS, axis), scale.split(SLAB_ROWS, axis)]
    for word, one in zip(*slabs, strict=True):
        yield form.dequantize({form.codes: word[None], form.scales: one[None]}, part.bits)[0]
