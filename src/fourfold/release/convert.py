"""A release in another storage: the same codes, without calibration and without its source. docs/releases.md."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs
from torch import Tensor

import fourfold
from fourfold import formats
from fourfold.core import grid
from fourfold.datatypes import FourfoldError, Progress, ignore, shortened
from fourfold.formats.format import Format, MoreModules
from fourfold.model.family import split_stack
from fourfold.model.files import check_new, copy_file, dump, sidecars, write_text
from fourfold.model.headers import INDEX_NAME
from fourfold.model.shards import OutputTensor, WrittenShard, write_shard
from fourfold.model.stored import StoredWeight
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes
from fourfold.quantize.claims import draft_prefixes
from fourfold.quantize.finish import index_json
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import FINISHED, LOG, METRICS, RECIPE, REFERENCE
from fourfold.recipe import Recipe, dump_recipe
from fourfold.records.release import Conversion, File, Output, Scales
from fourfold.release.contents import CONVERSION
from fourfold.release.conversion import Job, group_sizes, open_job, under_temporary_name
from fourfold.release.release import Release
from fourfold.release.verify.rules import config_problems, linear_modules


class ScaleChanges(Scales):
    """Counted as they are written."""

    def add(self, before: Tensor, after: Tensor) -> None:
        moved = (after - before).abs()
        self.total += before.numel()
        self.changed += int((moved != 0).sum())
        self.zero += int((before == 0).sum())
        ratio = moved[before != 0] / before[before != 0].abs()
        self.largest = max(self.largest, float(ratio.max()) if ratio.numel() else 0.0)


class Converted(Conversion, frozen=True, kw_only=True):
    """What a conversion came to. left_out: files of OUT that NEW has not."""

    out: str
    new: str
    bytes_before: int
    bytes_after: int
    seconds: float
    left_out: tuple[str, ...] = ()


def convert(out: Path, new: Path, format: str, *, progress: Progress = ignore) -> Converted:
    """Write the release in `out`, ours or another tool's, into the new folder `new` in another format.

    Codes stay as they are, scales are rounded to BF16 values that FP16 holds too, stacks of draft experts are split.
    Memory does not grow with the release. Raises FourfoldError, before anything is written, if `out` is not read as
    int4, is asymmetric, has groups that the format cannot tell, or `new` is there or does not fit the disk.
    """
    started = time.perf_counter()
    if format not in formats.NAMES:
        raise FourfoldError(f"format {format!r}: wanted one of {', '.join(formats.NAMES)}")
    check_new(new, out)
    job = _Job(**vars(open_job(out, progress)), format=formats.named(format))
    plan = _plan_shards(job)
    settings = _settings(job, [tensor for tensors in plan.values() for tensor in tensors])
    with under_temporary_name(new, job.total_bytes) as folder:
        return _write(job, plan, settings, folder, new, started)


@dataclass(kw_only=True)
class _Job(Job):
    """One conversion, into `format`."""

    format: Format
    scales: ScaleChanges = dataclasses.field(default_factory=ScaleChanges)


# --- writing ------------------------------------------------------------------------------------------------------


def _write(
    job: _Job, plan: Mapping[str, list[OutputTensor]], settings: dict[str, Any], folder: Path, new: Path, started: float
) -> Converted:
    """All files of the converted release; the record of the conversion last."""
    shards = [write_shard(folder, name, tensors) for name, tensors in plan.items()]
    index = TensorIndex.open_shards(folder, [shard.name for shard in shards])
    for path in sidecars(job.out.folder):
        copy_file(path, folder / path.name)
    write_text(folder / INDEX_NAME, index_json(index))
    write_text(folder / "config.json", dump({**job.out.raw, "quantization_config": settings}))
    converted = Converted(
        fourfold=fourfold.__version__,
        out=str(job.out.folder),
        new=str(new),
        before=job.before.name,
        after=job.format.name,
        projections=len(job.out.projections),
        split=sum(name not in index.headers for name in job.out.kept),
        scales=job.scales,
        bytes_before=job.total_bytes,
        bytes_after=sum(header.size_bytes for header in index.headers.values()),
        content=job.content,
        seconds=time.perf_counter() - started,
    )
    if job.release is None:
        converted.part(Conversion).write(folder / CONVERSION)
    else:
        _write_ours(job.release, folder, shards, converted)
    return structs.replace(converted, left_out=_left_out(job.out.folder, folder))


def _left_out(out: Path, folder: Path) -> tuple[str, ...]:
    """Files beside the weights that are only in OUT: they were true of its bytes alone, or are not known."""
    there = {path.name for path in out.iterdir() if not path.name.startswith(".") and path.suffix != ".safetensors"}
    return tuple(sorted(there - {path.name for path in folder.iterdir()}))


def _plan_shards(job: _Job) -> dict[str, list[OutputTensor]]:
    """A shard for each of OUT's, in the same order, numbered; each projection where its codes were."""
    shards: dict[str, list[OutputTensor]] = {}
    for projection in job.out.projections.values():
        shard = job.out.disk.header(projection.name + job.before.codes).shard
        shards.setdefault(shard, []).extend(_projection(job, projection))
    for name, header in job.out.kept.items():
        shards.setdefault(header.shard, []).extend(_kept(job, name))
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return {name: shards[shard] for name, shard in zip(names, sorted(shards), strict=True)}


def _projection(job: _Job, projection: StoredWeight) -> Iterator[OutputTensor]:
    """A projection's tensors in the other format; codes and scales are read when their turn comes."""
    before, form = job.before, job.format
    sizes = projection.outputs, projection.inputs, projection.groups, projection.bits
    stored = form.tensor_shapes(*sizes)
    for suffix, after, read in ((before.codes, form.codes, _codes), (before.scales, form.scales, _scales)):
        dtype, shape = stored[after]
        name = projection.name + suffix
        yield OutputTensor(name=projection.name + after, dtype=dtype, shape=shape, data=partial(read, job, name))
    for suffix, value in form.companions(*sizes).items():
        yield OutputTensor.of(projection.name + suffix, value)


def _codes(job: _Job, name: str) -> Iterator[memoryview]:
    words = job.out.disk.read(name)
    job.tick(words.nbytes)
    yield raw_bytes(job.format.oriented(job.before.oriented(words)).contiguous())


def _scales(job: _Job, name: str) -> Iterator[memoryview]:
    before = job.out.disk.read_finite(name)
    job.tick(before.nbytes)
    after = grid.stored(before.float(), "bf16")
    job.scales.add(before.float(), after)
    yield raw_bytes(job.format.stored_scales(job.before.oriented(after)))


def _kept(job: _Job, name: str) -> Iterator[OutputTensor]:
    """A tensor as it is, or a stack of draft experts as a tensor for each: rows of it, bit for bit."""
    header, prefix = job.out.disk.header(name), job.out.family.mtp_prefix
    if not (prefix and name.startswith(prefix) and len(header.shape) == 3 and ".mlp.experts." in name):
        yield OutputTensor.copied(header, partial(job.chunks, name))
        return
    itemsize = DTYPES[header.dtype].itemsize
    for part, start, shape in split_stack(name, header.shape, itemsize):
        data = partial(_rows, job, name, start, math.prod(shape) * itemsize)
        yield OutputTensor.copied(header, data, part, shape)


def _rows(job: _Job, name: str, start: int, size_bytes: int) -> Iterator[memoryview]:
    content = memoryview(bytearray(size_bytes))
    job.out.disk.read_range(name, start, content)
    job.tick(size_bytes)
    yield content


# --- what is said of it -------------------------------------------------------------------------------------------


def _settings(job: _Job, tensors: Sequence[OutputTensor]) -> dict[str, Any]:
    """quantization_config: as quantize writes it; exclusions one by one where another tool has chosen other modules.

    tensors: all of NEW. Raises FourfoldError for modules that the format cannot tell from each other.
    """
    quantized, shapes = job.out.quantized_modules, {tensor.name: tensor.shape for tensor in tensors}
    drafts, kept = draft_prefixes(job.out, shapes), linear_modules(shapes)

    def problems(settings: Mapping[str, Any]) -> list[str]:
        return config_problems(job.format, settings, job.group_size, quantized=quantized, kept=kept, draft=bool(drafts))

    beside = group_sizes(job.out, experts=False) or [job.group_size]
    more = MoreModules.of({name: bits for name, (bits, _) in quantized.items()}, drafts, beside[0])
    settings = job.format.quantization_config(job.group_size, drafts, more)
    if problems(settings):
        plain = job.format.quantization_config(job.group_size, drafts)
        settings = job.format.excluding(plain, _exclusions(quantized, kept))
        if found := problems(settings):
            raise FourfoldError(
                f"{job.out.folder}: no quantization_config of {job.format} fits what is quantized in it: "
                f"{shortened(found)}. Try another --format"
            )
    return settings


def _exclusions(quantized: Collection[str], kept: Collection[str]) -> list[str]:
    """Patterns, as few as will do, that match every kept module and no quantized one: first those of whole blocks,
    which engines that join projections (q, k and v) match too, then a module of all layers, then of one.
    """
    chosen: list[str] = []
    for module in kept:
        if not any(re.match(pattern, module) for pattern in chosen):
            chosen.append(
                next(
                    pattern for pattern in _patterns(module) if not any(re.match(pattern, other) for other in quantized)
                )
            )
    return chosen


def _patterns(module: str) -> Iterator[str]:
    """Patterns that match a module, the widest first. Engines put other names before a block: those are left open."""
    *blocks, last = module.split(".")
    for block in blocks:
        if not block.isdecimal():
            yield rf".*{re.escape(block)}\..*"
    yield rf".*{_generalized('.'.join([*blocks[-1:], last]))}$"
    yield f"{_generalized(module)}$"
    yield f"{re.escape(module)}$"


def _generalized(module: str) -> str:
    """A regular expression for a module in each layer: numbers between dots are any."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module))


def _write_ours(release: Release, folder: Path, shards: list[WrittenShard], converted: Converted) -> None:
    """What fourfold says of its own release, true of the new bytes. Metrics stay only if no scale has changed."""
    exact = not converted.scales.changed
    recipe = _recipe(release.recipe, formats.named(converted.after))
    write_text(folder / RECIPE, dump_recipe(recipe))
    for name in (LOG, METRICS, REFERENCE) if exact else (LOG,):
        if (release.folder / name).is_file():
            copy_file(release.folder / name, folder / name)
    before = release.state
    parts = {**before.identity.parts, "recipe": recipe.values()}
    output = Output(
        content=joined_digest({shard.name: shard.sha256 for shard in shards}),
        shards={shard.name: File(shard.size_bytes, shard.sha256) for shard in shards},
        tensor_bytes=converted.bytes_after,
    )
    state = structs.replace(
        before,
        format=converted.after,
        identity=structs.replace(before.identity, recipe=recipe.digest(), parts=parts),
        output=output,
        converted=[*before.converted, converted.part(Conversion)],
        metrics=before.metrics if exact else {},
    )
    state.write(folder / FINISHED)


def _recipe(recipe: Recipe, format: Format) -> Recipe:
    scheme = dataclasses.replace(recipe.scheme, scale_dtype="bf16")
    return dataclasses.replace(recipe, format=format.name, scheme=scheme)
