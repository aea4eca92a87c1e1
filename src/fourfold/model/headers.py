"""What a checkpoint's files say of its tensors, checked before a weight is read. Needs no torch.

Headers are parsed here and not by safetensors, because tensors are read with pread into memory that is ours,
and for that the offsets must be known and trusted. Pages of a memory map count towards peak memory, and a
file that shrinks under a map kills the process with SIGBUS instead of raising an error.
Format: https://github.com/huggingface/safetensors#format; what is accepted here, safetensors accepts too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fourfold.datatypes import FourfoldError, TensorHeader, brief
from fourfold.model.config import other_contents
from fourfold.model.json_object import parse_object, read_bytes, read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors' name -> (torch's name, bytes of an element), in the order in which safetensors 0.8.0 lays tensors out in
# a file (widest first, so that each is aligned). F4 and F6 are left out: their elements are no whole bytes.
STORED: Mapping[str, tuple[str, int]] = {
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F32": ("float32", 4),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "BF16": ("bfloat16", 2),
    "F16": ("float16", 2),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}

MAX_BYTES = 2**63 - 1
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Headers:
    """Every tensor of a checkpoint and where its bytes lie.

    digest: sha256 of the shards' sizes and the tensors' names, dtypes and shapes, not of the data.
    """

    folder: Path
    headers: Mapping[str, TensorHeader]
    digest: str

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read and check the headers of all shards of a checkpoint folder, as named by its index.

        Raises FourfoldError if the folder holds no safetensors checkpoint, a shard is missing, truncated or
        damaged, or the index and the shards disagree. `total_size` is not compared: no reader uses it, and
        published checkpoints have it wrong.
        """
        weight_map = _read_weight_map(folder)
        if weight_map is None:
            return cls.open_shards(folder, [SINGLE_NAME])
        index = cls.open_shards(folder, sorted(set(weight_map.values())))
        _check_placement(folder / INDEX_NAME, weight_map, index.headers)
        return index

    @classmethod
    def open_shards(cls, folder: Path, shards: Iterable[str]) -> Self:
        """The tensors of these shards alone: an output that is still being written has no index."""
        headers: dict[str, TensorHeader] = {}
        size_bytes: dict[str, int] = {}
        for shard in shards:
            size_bytes[shard], found = _read_shard(folder / shard)
            for header in found:
                if header.name in headers:
                    other = headers[header.name].shard
                    raise FourfoldError(
                        f"{folder}: tensor {brief(header.name)} is in {other} and in "
                        f"{shard}, wanted once; are these shards of two checkpoints?"
                    )
                headers[header.name] = header
        tensors = [(name, headers[name].dtype, headers[name].shape) for name in sorted(headers)]
        facts = json.dumps([sorted(size_bytes.items()), tensors])
        return cls(folder=folder, headers=headers, digest=hashlib.sha256(facts.encode()).hexdigest())

    def header(self, name: str) -> TensorHeader:
        """Raises FourfoldError if the checkpoint has no such tensor."""
        if name not in self.headers:
            raise FourfoldError(f"{self.folder}: no tensor {name!r} among its {len(self.headers):,}")
        return self.headers[name]


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The index's tensor name -> shard, every shard a bare file name; None for a checkpoint in one file."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index.is_file():
        if not single.is_file():
            raise FourfoldError(f"{folder}: {_why_no_checkpoint(folder)}")
        return None
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FourfoldError(f"{index}: weight_map is {brief(weight_map)}; wanted tensors and their shards")
    for name, shard in weight_map.items():
        if not _is_shard_name(shard):
            raise FourfoldError(
                f"{index}: tensor {brief(name)} is placed in {brief(shard)}; wanted the bare "
                "name of a .safetensors file in the same folder"
            )
    if single.is_file() and SINGLE_NAME not in weight_map.values():
        raise FourfoldError(
            f"{folder}: {SINGLE_NAME} lies beside an index that does not name it; readers "
            "differ in which they take, so remove the one that is not meant"
        )
    return weight_map


def _is_shard_name(shard: object) -> bool:
    """Bare names only: an index comes from a stranger and must not point outside its folder."""
    return (
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and shard.isprintable()
        and "/" not in shard
        and "\\" not in shard
    )


def _why_no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder; a checkpoint folder is wanted"
    if any(folder.glob("*.safetensors")):
        return f"there are shards but no {INDEX_NAME}; is the download complete?"
    return other_contents(folder) or f"there is neither {INDEX_NAME} nor {SINGLE_NAME}"


def _check_placement(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    """Each tensor must be where the index says, and the index must name every tensor of its shards."""
    for name, shard in weight_map.items():
        if name not in headers:
            raise FourfoldError(f"{index}: places tensor {brief(name)} in {shard}, which lacks it")
        if headers[name].shard != shard:
            raise FourfoldError(f"{index}: places tensor {brief(name)} in {shard}, but it is in {headers[name].shard}")
    unnamed = sorted(headers.keys() - weight_map.keys())
    if unnamed:
        shard = headers[unnamed[0]].shard
        raise FourfoldError(
            f"{index}: does not name tensor {brief(unnamed[0])} of {shard} ({len(unnamed):,} "
            "such in all); are index and shards of two checkpoints?"
        )


def _read_shard(path: Path) -> tuple[int, list[TensorHeader]]:
    """The file's size in bytes and its tensors in the order of their bytes, which must cover it exactly."""
    text, file_bytes = read_bytes(path, prefixed=True)
    if not text.startswith(b"{"):
        raise FourfoldError(f"{path}: its header starts with {text[:8]!r}; wanted a JSON object")
    entries = parse_object(path, text)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FourfoldError(f"{path}: __metadata__ is {brief(metadata)}; wanted texts by name")
    data_start = 8 + len(text)
    headers = [_parse_entry(path, name, entry, data_start, file_bytes) for name, entry in entries.items()]
    headers.sort(key=lambda header: (header.start_byte, header.end_byte))
    covered, previous = data_start, "__metadata__"
    for header in headers:
        if header.start_byte != covered:
            kind = "overlaps" if header.start_byte < covered else "leaves a hole after"
            raise FourfoldError(
                f"{path}: tensor {brief(header.name)} starts at byte {header.start_byte:,} "
                f"and {kind} {brief(previous)}, which ends at {covered:,}"
            )
        covered, previous = header.end_byte, header.name
    if covered != file_bytes:
        raise FourfoldError(
            f"{path}: {file_bytes:,} bytes, but its last tensor {brief(previous)} ends at "
            f"{covered:,}; wanted no byte more"
        )
    return file_bytes, headers


def _parse_entry(path: Path, name: str, entry: object, data_start: int, file_bytes: int) -> TensorHeader:
    """One tensor. Its offsets count from the end of the header, those of the result from the file's start."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        raise FourfoldError(f"{where}: found {brief(entry)}; wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED:
        raise FourfoldError(f"{where}: dtype {brief(dtype)}; wanted one of {', '.join(STORED)}")
    if not _are_sizes(shape):
        raise FourfoldError(f"{where}: shape {brief(shape)}; wanted whole numbers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FourfoldError(f"{where}: data_offsets {brief(offsets)}; wanted a start and an end, both >= 0")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_bytes:
        raise FourfoldError(f"{where}: ends at byte {end:,}, the file at {file_bytes:,}; is the download complete?")
    size_bytes = _tensor_bytes(shape, STORED[dtype][1])
    if size_bytes != end - start:
        wanted = "more than 2^63" if size_bytes is None else f"{size_bytes:,}"
        raise FourfoldError(
            f"{where}: its data_offsets hold {end - start:,} bytes; wanted {wanted} for {dtype} {brief(shape)}"
        )
    return TensorHeader(name=name, dtype=dtype, shape=tuple(shape), shard=path.name, start_byte=start, end_byte=end)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(size) is int and 0 <= size <= MAX_BYTES for size in values)


def _tensor_bytes(shape: list[int], itemsize: int) -> int | None:
    """Bytes of a tensor; None where its strides would overflow, which a 0 beside huge sizes does too."""
    span = itemsize
    for size in shape:
        span *= max(size, 1)
        if span > MAX_BYTES:
            return None
    return 0 if 0 in shape else span
