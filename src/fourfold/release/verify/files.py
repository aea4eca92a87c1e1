"""Level 1: OUT alone. Index, sizes, hashes, names and shapes, numbers, quantization_config."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from fourfold.core import grid
from fourfold.datatypes import FourfoldError
from fourfold.model.files import SIDECARS
from fourfold.model.headers import INDEX_NAME
from fourfold.model.json_object import read_object
from fourfold.model.tensors import TensorIndex
from fourfold.quantize.claims import known_extra
from fourfold.records.results import Check, Level
from fourfold.release.release import Release
from fourfold.release.verify.byte_checks import FINITE, ByteChecks
from fourfold.release.verify.check import judge, skip
from fourfold.release.verify.expected import Expected
from fourfold.release.verify.projection import CODES, LAYOUT, SCALES
from fourfold.release.verify.rules import config_problems, linear_modules

FILES = Level.FILES
AFTER_INDEX = ("tensors", "sha256", FINITE, CODES, SCALES, LAYOUT)  # checks that need a sound index


def check_index(release: Release) -> tuple[Check, TensorIndex | None]:
    """Index against headers; None where they disagree and nothing more can be read."""
    path = release.folder / INDEX_NAME
    try:
        index = TensorIndex.open(release.folder)
    except FourfoldError as error:
        return judge(FILES, "index", [str(error)], ""), None
    headers = index.headers.values()
    size = sum(header.size_bytes for header in headers)
    problems = [] if path.is_file() else [f"no {INDEX_NAME}; engines find shards by it"]
    if path.is_file():
        metadata = read_object(path).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        if total != size:
            problems.append(f"total_size is {total!r}, the tensors have {size:,} bytes")
    shards = {header.shard for header in headers}
    stray = sorted({file.name for file in release.folder.glob("*.safetensors")} - shards)
    problems += [f"{name} is no shard of the index; engines load every *.safetensors" for name in stray]
    seen = f"{len(index.headers):,} tensors in {len(shards):,} shards, each key once, {size:,} bytes"
    return judge(FILES, "index", problems, seen, tensors=len(index.headers), tensor_bytes=size), index


def check_tensors(release: Release, index: TensorIndex, expected: Mapping[str, Expected]) -> Check:
    """Names, dtypes and shapes against config.json."""
    missing = [f"{name} is missing" for name in expected if name not in index.headers]
    wrong = []
    for name, header in index.headers.items():
        wanted = expected.get(name)
        if wanted is None:
            if known_extra(release, header) is None:
                wrong.append(f"{name} is not wanted by config.json")
        elif header.dtype not in wanted.dtypes or header.shape != wanted.shape:
            expected_text = f"{'/'.join(wanted.dtypes)} {list(wanted.shape)}"
            wrong.append(f"{name} is {header.dtype} {list(header.shape)}, wanted {expected_text}")
    bits = {wanted.projection: wanted.bits for wanted in expected.values() if wanted.projection}
    kinds = ", ".join(f"{count:,} int{width}" for width, count in sorted(Counter(bits.values()).items()))
    prefix = release.family.mtp_prefix
    draft = sum(bool(prefix) and name.startswith(prefix) for name in index.headers)
    seen = f"{kinds} projections, {draft:,} tensors of the draft head, all as config.json wants them"
    return judge(FILES, "tensors", missing + wrong, seen, projections=len(bits), draft_tensors=draft)


def check_bytes(release: Release, expected: Mapping[str, Expected], results: ByteChecks) -> Iterator[Check]:
    """What the pass over all bytes says of OUT alone."""
    recorded = release.state.output.shards
    problems = [f"{shard} is not there" for shard in recorded if shard not in results.sha256]
    for shard, sha256 in results.sha256.items():
        wanted = recorded[shard].sha256 if shard in recorded else "no such file"
        if sha256 != wanted:
            problems.append(f"{shard} is {sha256[:16]}..., fourfold.json has {wanted[:16]}...")
    yield judge(FILES, "sha256", problems, f"{len(results.sha256):,} shards are as they were written")
    floats = f"{len(results.float_tensors):,} kept tensors without NaN or infinity"
    yield judge(FILES, FINITE, results.problems[FINITE], floats)
    yield from _check_projections(expected, results)


def _check_projections(expected: Mapping[str, Expected], results: ByteChecks) -> Iterator[Check]:
    wanted = {part.projection for part in expected.values()} - {""}
    unseen = wanted - {one.name for one in results.inspected}
    missing = [f"{name.rstrip('.')} is not whole" for name in sorted(unseen)]
    if not results.inspected:
        problems = missing or ["there are no projections"]
        yield from (judge(FILES, name, problems, "") for name in (CODES, SCALES, LAYOUT))
        return
    poorest = min(results.inspected, key=lambda one: one.entropy_bits / one.bits)
    int4 = (one.counts for one in results.inspected if one.bits == 4)
    counts = [sum(column) for column in zip(*int4, strict=True)]
    yield judge(
        FILES,
        CODES,
        missing + results.problems[CODES],
        f"{len(results.inspected):,} projections, none dead or constant; least entropy "
        f"{poorest.entropy_bits:.2f} of {poorest.bits} bits, in {poorest.name.rstrip('.')}",
        histogram=dict(zip(map(str, grid.INT4), counts, strict=True)),
        least_entropy_bits=poorest.entropy_bits,
    )
    least, most = min(one.scale_least for one in results.inspected), max(one.scale_most for one in results.inspected)
    seen = f"magnitudes from {least:.3g} to {most:.3g}, exact in FP16 and BF16 where the recipe wants it"
    yield judge(FILES, SCALES, missing + results.problems[SCALES], seen, least=least, most=most)
    yield judge(FILES, LAYOUT, missing + results.problems[LAYOUT], "as the format has them, in every projection")


def check_config(release: Release, expected: Mapping[str, Expected]) -> Check:
    """quantization_config: required keys, exclusions for kept modules and the draft head, agreement with the recipe."""
    problems = []
    if release.format.name != release.recipe.format:
        problems.append(f"config.json: got {release.format}, expected {release.recipe.format} as in recipe.toml")
    prefix = release.family.mtp_prefix
    parts = [part for part in expected.values() if part.projection]
    quantized = {part.projection.rstrip("."): (part.bits, part.group_size) for part in parts}
    kept = linear_modules({name: part.shape for name, part in expected.items() if not part.projection})
    draft = bool(prefix) and any(name.startswith(prefix) for name in expected)
    in_draft = draft and any(name.startswith(prefix) for name in quantized)
    problems += config_problems(
        release.format,
        release.settings,
        release.recipe.scheme.group,
        quantized=quantized,
        kept=kept,
        draft=draft,
        tied=bool(release.blueprint.model.all_tied_weights_keys),
    )
    kinds = sorted({*quantized.values()})
    widths = ", ".join(f"int{bits} in groups of {size}" for bits, size in kinds)
    seen = f"{release.format}, {widths}; {len(kept):,} kept modules are excluded"
    return judge(
        FILES, "quantization_config", problems, seen + (", the draft head too" if draft and not in_draft else "")
    )


def check_sidecars(release: Release, source: Path | None) -> Check:
    """Files beside the weights, against the source's; config.json but for quantization_config."""
    if source is None:
        return skip(FILES, "sidecars", "--source is wanted to compare with")
    problems, equal = [], 0
    for name in SIDECARS:
        ours, theirs = release.folder / name, source / name
        if theirs.is_file() != ours.is_file():
            problems.append(f"{name} is {'missing' if theirs.is_file() else 'not in the source'}")
        elif theirs.is_file():
            equal += 1
            if ours.read_bytes() != theirs.read_bytes():
                problems.append(f"{name} differs from the source's")
    original = read_object(source / "config.json")
    changed = sorted(
        key for key in original.keys() | release.raw.keys()
        if key != "quantization_config" and original.get(key) != release.raw.get(key)
    )  # fmt: skip
    problems += [f"config.json: {key} differs from the source's" for key in changed]
    return judge(FILES, "sidecars", problems, f"{equal:,} files byte for byte, config.json but for quantization_config")
