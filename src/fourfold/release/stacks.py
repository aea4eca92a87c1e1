"""The routed experts of a release, by layer and projection, as formats with stacks want them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model.checkpoint import require_finite
from fourfold.release.conversion import Job
from fourfold.release.stored import Projection


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One projection of all experts of a layer. layer: of the model; parts: by expert."""

    layer: int
    projection: str
    parts: tuple[Projection, ...]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """E, N, K, G."""
        first = self.parts[0]
        return len(self.parts), first.outputs, first.inputs, first.groups


def stacks(job: Job) -> list[Stack]:
    """The routed experts, in order of layers. Raises FourfoldError unless they, and nothing else, are int4."""
    found: list[Stack] = []
    projections, remaining = job.stored.projections, set(job.stored.projections)
    for layer in job.skeleton.routed:
        stems = job.skeleton.stems(layer)
        for projection in stems[0]:
            names = [one[projection] for one in stems]
            if missing := [name for name in names if name not in projections]:
                problem = f"{missing[0].rstrip('.')} is not int4, expected all routed experts in int4"
                raise FourfoldError(f"{job.index.folder}: {problem}. Quantize the model anew")
            found.append(Stack(layer=layer, projection=projection, parts=tuple(projections[name] for name in names)))
            remaining -= {*names}
    if remaining:
        problem = f"{min(remaining).rstrip('.')} is int4 ({len(remaining):,} such), expected routed experts alone"
        raise FourfoldError(f"{job.index.folder}: {problem}. Quantize the model anew with `fourfold quantize`")
    return found


def check_scales(job: Job, dtype: torch.dtype, title: str) -> None:
    """Raise FourfoldError unless a dtype holds every scale. Scales are small, so all are read before work begins."""
    for projection in job.stored.projections.values():
        name = projection.name + job.before.scales
        scale = job.index.read(name)
        require_finite(scale, name)
        wrong = scale.to(dtype).double() != scale.double()
        if wrong.any():
            kind = str(dtype).removeprefix("torch.")
            raise FourfoldError(
                f"{job.index.folder}: {name}: {int(wrong.sum()):,} of {scale.numel():,} scales are no {kind} values, "
                f"as {float(scale[wrong][0]):.6g}; {title} stores {kind}. `fourfold convert OUT NEW --format "
                "compressed-tensors` rounds them, which changes the weights; convert its NEW then"
            )


def read_part(job: Job, part: Projection, *, codes: bool = True) -> tuple[Tensor, Tensor]:
    """Words int32 [N, K / 8], lowest nibble first, empty without `codes`, and scales [N, G] of one expert."""
    form = job.before
    scale = form.oriented(job.index.read(part.name + form.scales))
    if not codes:
        return torch.empty(0), scale
    words = job.index.read(part.name + form.codes)
    job.tick(words.nbytes)
    return form.oriented(words).contiguous(), scale
