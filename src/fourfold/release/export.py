"""A release as a file or folder of llama.cpp or MLX: the same codes and scales, to the last bit. docs/formats.md.

What is written is no release of fourfold: nothing but its engine reads it, and `verify` compares it with OUT.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fourfold
from fourfold.datatypes import FourfoldError, Progress, ignore
from fourfold.formats import EXPORTS, mlx
from fourfold.formats.fixed import unsupported
from fourfold.model.checkpoint import TensorIndex, raw_bytes, require_finite
from fourfold.model.config import CONFIG
from fourfold.model.files import SIDECARS, check_new, copy_file, dump, write_text
from fourfold.model.headers import INDEX_NAME
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.quantize.finish import index_json
from fourfold.release.contents import CONVERSION, hash_file
from fourfold.release.conversion import Job, open_job, under_temporary_name
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


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What came of it. files: bytes and sha256 by name; content: digest of OUT's shards, "" if OUT is not fourfold's;
    notes: what a user has to know of this one.
    """

    out: str
    new: str
    before: str
    after: str
    projections: int
    group_size: int
    files: Mapping[str, Mapping[str, Any]]
    content: str
    bytes_before: int
    seconds: float
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes_after(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())

    @property
    def engine(self) -> str:
        return EXPORTS[self.after]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bytes_after": self.bytes_after}

    def record(self) -> dict[str, Any]:
        """What is kept beside the weights: nothing of this machine."""
        kept = ("before", "after", "projections", "group_size", "content", "settings", "files")
        fields = self.to_json()
        return {"fourfold": fourfold.__version__} | {name: fields[name] for name in kept}


def export(out: Path, new: Path, format: str, *, progress: Progress = ignore) -> Exported:
    """Write the release in `out`, ours or another tool's, into the new folder `new` as `format` ("mlx").

    Memory does not grow with the release. Raises FourfoldError, before anything is written, if `out` is not read as
    int4, is asymmetric, has other than routed experts in int4, is of an architecture that the engine or the table of
    names does not have, or has scales that the format cannot hold; if `new` is there or does not fit the disk.
    """
    started = time.perf_counter()
    check_new(new, out)
    job = open_job(out, progress)
    model_type = job.skeleton.family.model_type
    if model_type not in mlx.MODEL_TYPES:
        raise FourfoldError(
            f"{out}: model_type: got {model_type!r}, expected one that --format mlx knows: {', '.join(mlx.MODEL_TYPES)}"
        )
    if problem := unsupported(job.skeleton.text, mlx.MODEL_TYPES[model_type]):
        raise FourfoldError(f"{out / CONFIG}: {problem}: mlx-lm computes {model_type} in this way alone")
    layers = stacks(job)
    check_scales(job, torch.bfloat16, mlx.TITLE)
    with under_temporary_name(new, job.total_bytes) as folder:
        notes = write_mlx(job, layers, folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        hashes = {name: hash_file(folder / name) for name in names}
        found = Exported(
            out=str(out),
            new=str(new),
            before=job.before.name,
            after=format,
            projections=len(job.stored.projections),
            group_size=job.group_size,
            files={name: {"bytes": size, "sha256": sha256} for name, (sha256, size) in hashes.items()},
            content=job.content,
            bytes_before=job.total_bytes,
            seconds=time.perf_counter() - started,
            notes=notes,
        )
        write_text(folder / CONVERSION, dump(found.record()))
    return found


def stacks(job: Job) -> list[Stack]:
    """The routed experts, in order of layers. Raises FourfoldError unless they, and nothing else, are int4."""
    found: list[Stack] = []
    projections, left = job.stored.projections, set(job.stored.projections)
    for layer in job.skeleton.routed:
        stems = job.skeleton.stems(layer)
        for projection in stems[0]:
            names = [one[projection] for one in stems]
            if missing := [name for name in names if name not in projections]:
                raise FourfoldError(
                    f"{job.index.folder}: {missing[0].rstrip('.')} is not int4, expected all routed experts in int4. "
                    "Quantize the model anew"
                )
            found.append(Stack(layer=layer, projection=projection, parts=tuple(projections[name] for name in names)))
            left -= {*names}
    if left:
        raise FourfoldError(
            f"{job.index.folder}: {min(left).rstrip('.')} is int4 ({len(left):,} such), expected routed experts alone. "
            "Quantize the model anew with `fourfold quantize`"
        )
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


# --- MLX ------------------------------------------------------------------------------------------------------------


def write_mlx(job: Job, layers: list[Stack], folder: Path) -> tuple[str, ...]:
    """All files of a folder for mlx-lm and mlx-vlm. Returns notes."""
    shards = mlx_shards(job, layers)
    for name, tensors in shards.items():
        write_shard(folder, name, tensors)
    for name in SIDECARS:
        if (job.index.folder / name).is_file():
            copy_file(job.index.folder / name, folder / name)
    write_text(folder / INDEX_NAME, index_json(TensorIndex.open_shards(folder, shards)))
    write_text(folder / "config.json", dump(mlx.config(job.skeleton.raw, job.skeleton.text, job.group_size)))
    return ()


def mlx_shards(job: Job, layers: list[Stack]) -> dict[str, list[OutputTensor]]:
    """What the shards of NEW hold, by name: one for each of OUT's, stacks where their first expert was."""
    shards: dict[str, list[OutputTensor]] = {header.shard: [] for header in job.index.headers.values()}
    for stack in layers:
        name = mlx.stack_name(stack.parts[0].name, stack.projection)
        stored = mlx.tensor_shapes(*stack.sizes)
        for suffix, (dtype, shape) in stored.items():
            data = partial(_mlx_values, job, stack, suffix)
            one = OutputTensor(name=name + suffix, dtype=dtype, shape=shape, data=data)
            shards[job.index.header(stack.parts[0].name + job.before.codes).shard].append(one)
    for name, header in job.stored.kept.items():
        shards[header.shard].append(
            OutputTensor(name=name, dtype=header.dtype, shape=header.shape, data=partial(_copied, job, name))
        )
    full = [shard for shard in sorted(shards) if shards[shard]]
    return {f"model-{number:05d}-of-{len(full):05d}.safetensors": shards[shard] for number, shard in enumerate(full, 1)}


def _mlx_values(job: Job, stack: Stack, suffix: str) -> Iterator[memoryview]:
    """Expert by expert."""
    for part in stack.parts:
        words, scale = read_part(job, part, codes=suffix == mlx.WORDS)
        value = words if suffix == mlx.WORDS else mlx.biases(scale) if suffix == mlx.BIASES else scale
        yield raw_bytes((value if suffix == mlx.WORDS else value.to(torch.bfloat16)).contiguous())


def read_part(job: Job, part: Projection, *, codes: bool = True) -> tuple[Tensor, Tensor]:
    """Words int32 [N, K / 8], lowest nibble first, empty without `codes`, and scales [N, G] of one expert."""
    form = job.before
    scale = form.oriented(job.index.read(part.name + form.scales))
    if not codes:
        return torch.empty(0), scale
    words = job.index.read(part.name + form.codes)
    job.tick(words.nbytes)
    return form.oriented(words).contiguous(), scale


def _copied(job: Job, name: str) -> Iterator[memoryview]:
    for chunk in job.index.chunks(name):
        job.tick(len(chunk))
        yield chunk
