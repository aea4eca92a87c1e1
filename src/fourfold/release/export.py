"""A release as a file or folder of llama.cpp or MLX: the same codes and scales, to the last bit. docs/formats.md.

What is written is no release of fourfold: nothing but its engine reads it, and `verify` compares it with OUT.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fourfold
from fourfold.datatypes import FourfoldError, Progress, ignore
from fourfold.formats import gguf, mlx
from fourfold.formats.fixed import unsupported
from fourfold.install import pip_install
from fourfold.model.config import CONFIG
from fourfold.model.files import check_new, copy_file, dump, sidecars, write_text
from fourfold.model.headers import INDEX_NAME
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.stored import StoredWeight
from fourfold.model.tensors import TensorIndex, raw_bytes
from fourfold.quantize.finish import index_json
from fourfold.quantize.journal import METRICS
from fourfold.records.release import Export, File, Origin, Quality
from fourfold.records.results import Metrics
from fourfold.release.contents import CONVERSION, LICENCE, hash_file
from fourfold.release.conversion import Job, open_job, under_temporary_name
from fourfold.release.gguf_plan import GgufPlan
from fourfold.release.release import Release
from fourfold.release.stacks import Quantized, check_scales, read_part, sort_projections


class Exported(Export, frozen=True, kw_only=True):
    """What came of it. notes: what a user has to know of this one."""

    out: str
    new: str
    bytes_before: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "bytes_after": self.bytes_after}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a GGUF. rest: what matrices without codes become, a key of gguf.RESTS; mtp: whether the draft head is
    kept; shard_bytes: of a file at most, 0 for one file.
    """

    rest: str = "bf16"
    mtp: bool = True
    shard_bytes: int = 0


DEFAULTS = Options()


def export(out: Path, new: Path, format: str, *, options: Options = DEFAULTS, progress: Progress = ignore) -> Exported:
    """Write the release in `out`, ours or another tool's, into the new folder `new` as `format`, one of EXPORTS.

    Memory does not grow with the release: a projection of a layer's experts is held at a time. Raises FourfoldError,
    before anything is written, if `out` is not read as int4, is asymmetric, has routed experts that are not int4, has
    scales that the format cannot hold, is of an architecture or has a tokenizer that the engine does not have; if `new`
    is there or does not fit the disk.
    """
    started = time.perf_counter()
    check_new(new, out)
    job = open_job(out, progress)
    quantized = sort_projections(job)
    write: Callable[[Path], None]
    if format == gguf.NAME:
        require_gguf()
        plan = GgufPlan(job, quantized, rest=options.rest, mtp=options.mtp)
        check_scales(job, torch.float16, gguf.TITLE)
        size, rounded = plan.size_bytes, len(plan.rounded)
        notes, settings = plan.notes(), dataclasses.asdict(options) | {"mtp": plan.drafts > 0}
        write = partial(plan.write, shard_bytes=options.shard_bytes)
        parts = {part.name: part for placed in plan.placed.values() for part in placed.parts}
    else:
        check_mlx(job)
        check_scales(job, torch.bfloat16, mlx.TITLE)
        size, rounded, notes, settings = job.total_bytes, 0, (), {}
        write, parts = partial(write_mlx, job, quantized), {**job.out.projections}
    with under_temporary_name(new, size) as folder:
        write(folder)
        if format == gguf.NAME and (out / LICENCE).is_file():  # MLX has it among the sidecars
            copy_file(out / LICENCE, folder / LICENCE)
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
        hashes = {name: hash_file(folder / name) for name in names}
        found = Exported(
            fourfold=fourfold.__version__,
            out=str(out),
            new=str(new),
            before=job.before.name,
            after=format,
            projections=len(parts),
            int8=sum(part.bits == 8 for part in parts.values()),
            rounded=rounded,
            group_size=job.group_size,
            files={name: File(size, sha256) for name, (sha256, size) in hashes.items()},
            content=job.content,
            bytes_before=job.total_bytes,
            seconds=time.perf_counter() - started,
            notes=notes,
            settings=settings,
            release=_origin(job.release),
        )
        found.part(Export).write(folder / CONVERSION)
    return found


def _origin(release: Release | None) -> Origin | None:
    """What stays true of NEW, and nothing of this machine. quality: None of a release without figures."""
    if release is None:
        return None
    source, found = release.state.source, Metrics.find(release.folder / METRICS)
    quality = None
    if found is not None and found.summary is not None:
        quality = Quality(found.measured_by, found.protocol, found.summary, found.intervals)
    base = (source.hub or "").partition("@")[0] or None
    return Origin(recipe=release.state.recipe, base_model=base, terms=source.terms, quality=quality)


def require_gguf() -> None:
    """Raise FourfoldError if the package that serializes GGUF is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise FourfoldError(f"--format gguf: the package gguf is not installed. Install it: {pip_install('gguf')}")


# --- MLX ------------------------------------------------------------------------------------------------------------


def check_mlx(job: Job) -> None:
    """Raise FourfoldError for a model that mlx-lm does not load from this layout, or computes otherwise."""
    folder, model_type = job.out.folder, job.out.family.model_type
    if model_type not in mlx.MODEL_TYPES:
        known = ", ".join(mlx.MODEL_TYPES)
        raise FourfoldError(f"{folder}: model_type: got {model_type!r}, expected one that --format mlx knows: {known}")
    if problem := unsupported(job.out.text, mlx.MODEL_TYPES[model_type]):
        raise FourfoldError(f"{folder / CONFIG}: {problem}: mlx-lm computes {model_type} in this way alone")


def write_mlx(job: Job, quantized: Quantized, folder: Path) -> None:
    """All files of a folder for mlx-lm and mlx-vlm."""
    shards = mlx_shards(job, quantized)
    for name, tensors in shards.items():
        write_shard(folder, name, tensors)
    for path in sidecars(job.out.folder):
        copy_file(path, folder / path.name)
    write_text(folder / INDEX_NAME, index_json(TensorIndex.open_shards(folder, shards)))
    write_text(folder / "config.json", dump(mlx_config(job, quantized)))


def mlx_config(job: Job, quantized: Quantized) -> dict[str, Any]:
    """Return config.json for MLX."""
    parts = {name.rstrip("."): parts[0] for name, parts in mlx_parts(quantized).items()}
    modules = {name: (part.bits, part.group_size) for name, part in parts.items()}
    return mlx.config(job.out.raw, job.out.text, job.group_size, modules)


def mlx_parts(quantized: Quantized) -> dict[str, tuple[StoredWeight, ...]]:
    """Return what has codes in NEW, by name with a dot at its end: experts of a stack, or one module."""
    stacks = {mlx.stack_name(stack.first.name, stack.projection): stack.parts for stack in quantized.stacks}
    return stacks | {part.name: (part,) for part in quantized.modules}


def mlx_shards(job: Job, quantized: Quantized) -> dict[str, list[OutputTensor]]:
    """What the shards of NEW hold, by name: one for each of OUT's, stacks where their first expert was."""
    shards: dict[str, list[OutputTensor]] = {header.shard: [] for header in job.out.disk.headers.values()}
    modules = {part.name for part in quantized.modules}
    for name, parts in mlx_parts(quantized).items():
        one, stacked = parts[0], () if name in modules else (len(parts),)
        for suffix, (dtype, shape) in mlx.tensor_shapes(stacked, one.outputs, one.inputs, one.groups, one.bits).items():
            data = partial(_mlx_values, job, parts, suffix)
            tensor = OutputTensor(name=name + suffix, dtype=dtype, shape=shape, data=data)
            shards[job.out.disk.header(one.name + job.before.codes).shard].append(tensor)
    for name, header in job.out.kept.items():
        shards[header.shard].append(OutputTensor.copied(header, partial(job.chunks, name)))
    full = [shard for shard in sorted(shards) if shards[shard]]
    return {f"model-{number:05d}-of-{len(full):05d}.safetensors": shards[shard] for number, shard in enumerate(full, 1)}


def _mlx_values(job: Job, parts: tuple[StoredWeight, ...], suffix: str) -> Iterator[memoryview]:
    """Expert by expert."""
    for part in parts:
        words, scale = read_part(job, part, codes=suffix == mlx.WORDS)
        value = words if suffix == mlx.WORDS else mlx.biases(scale, part.bits) if suffix == mlx.BIASES else scale
        yield raw_bytes((value if suffix == mlx.WORDS else value.to(torch.bfloat16)).contiguous())
