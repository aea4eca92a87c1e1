"""A checkpoint on disk: every header is checked before a weight is read, then tensors are read one by one.

Headers are parsed here and not by safetensors, because tensors are read with pread into memory that is ours,
and for that the offsets must be known and trusted. Pages of a memory map count towards peak memory, and a
file that shrinks under a map kills the process with SIGBUS instead of raising an error.
Format: https://github.com/huggingface/safetensors#format; what is accepted here, safetensors accepts too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, TensorHeader

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors' name -> torch's dtype, in the order in which safetensors 0.8.0 lays tensors out in a file
# (widest first, so that each is aligned). F4 and F6 are left out, as their elements are no whole bytes.
DTYPES: Mapping[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 16 * 2**20
MAX_JSON_BYTES = 100_000_000  # safetensors' own limit for a header; 31,000 tensors take 4 MB
MAX_BYTES = 2**63 - 1
SLAB_ELEMENTS = 2**20
ENTRY_KEYS = {"dtype", "shape", "data_offsets"}

_brief = Repr()  # what strangers wrote goes into messages, but not at any length
_brief.maxstring = _brief.maxother = 200
brief = _brief.repr


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor of a checkpoint and where its bytes lie. Holds no open file; may be shared by threads.

    digest: sha256 of the shards' sizes and the tensors' names, dtypes and shapes, not of the data.
    """

    folder: Path
    headers: Mapping[str, TensorHeader]
    digest: str

    @classmethod
    def open(cls, folder: Path) -> TensorIndex:
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
    def open_shards(cls, folder: Path, shards: Iterable[str]) -> TensorIndex:
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

    def read(self, name: str, *, out: Tensor | None = None, sha: hashlib._Hash | None = None) -> Tensor:
        """The tensor's values, read straight into `out` (returned) or into new memory on the host.

        out: contiguous, on the CPU, the tensor's dtype and byte size; its shape may differ (a slice of a
        stack, say). sha: is updated with the bytes as they are on disk.
        Raises FourfoldError if the file cannot give all bytes or `out` does not fit.
        """
        header = self.header(name)
        dtype = DTYPES[header.dtype]
        if out is None:
            out = torch.empty(header.shape, dtype=dtype)
        elif (out.dtype, out.nbytes) != (dtype, header.size_bytes) or not out.is_contiguous() or not out.is_cpu:
            raise FourfoldError(
                f"{self.folder / header.shard}: tensor {name!r} is {header.dtype} "
                f"{list(header.shape)}; wanted for a place of {out.dtype} {list(out.shape)}, "
                f"strides {out.stride()}, on {out.device}"
            )
        target = raw_bytes(out)
        with self._opened(header) as descriptor:
            for start in range(0, len(target), CHUNK_BYTES):
                part = target[start : start + CHUNK_BYTES]
                self._fill(part, descriptor, header.start_byte + start, header)
                if sha is not None:
                    sha.update(part)
        return out

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The tensor's bytes in order, for copies that must not hold it. A chunk is valid until the next one.

        Raises FourfoldError if the file cannot give all bytes.
        """
        header = self.header(name)
        buffer = memoryview(bytearray(min(chunk_bytes, header.size_bytes)))
        with self._opened(header) as descriptor:
            for start in range(header.start_byte, header.end_byte, chunk_bytes):
                part = buffer[: header.end_byte - start]
                self._fill(part, descriptor, start, header)
                yield part

    def read_range(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from byte `start` of its data on.

        Raises FourfoldError if the file cannot give all of them.
        """
        header = self.header(name)
        with self._opened(header) as descriptor:
            self._fill(out, descriptor, header.start_byte + start, header)

    @contextmanager
    def _opened(self, header: TensorHeader) -> Iterator[int]:
        try:
            descriptor = os.open(self.folder / header.shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._lost(header, error.strerror) from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, part: memoryview, descriptor: int, start: int, header: TensorHeader) -> None:
        """Fill `part` with the file's bytes from `start` on; one pread may give fewer than were asked for."""
        filled = 0
        while filled < len(part):
            try:
                count = os.preadv(descriptor, [part[filled:]], start + filled)
            except OSError as error:
                raise self._lost(header, error.strerror) from None
            if count == 0:
                raise self._lost(
                    header, f"the file ends at byte {start + filled:,} instead of after {header.end_byte:,}"
                )
            filled += count

    def _lost(self, header: TensorHeader, reason: str | None) -> FourfoldError:
        return FourfoldError(
            f"{self.folder / header.shard}: tensor {header.name!r} could not be read: "
            f"{reason}. Was the file truncated or the disk lost?"
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, not a copy."""
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def require_finite(tensor: Tensor, name: str) -> None:
    """Raise FourfoldError, with counts, if a tensor of floats holds NaN or infinity.

    Makes no big temporary of a contiguous tensor.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # NaN passes through a minimum, so one pass without temporaries clears a good tensor: 40 GB/s of BF16 on
    # two cores, where isfinite makes 1 GB/s. torch has no aminmax of one-byte floats.
    if tensor.itemsize > 1 and all(math.isfinite(extreme) for extreme in tensor.aminmax()):
        return
    nan = infinite = 0
    for slab in tensor.reshape(-1).split(SLAB_ELEMENTS):
        values = slab.float() if slab.itemsize == 1 else slab
        nan += int(values.isnan().sum())
        infinite += int(values.isinf().sum())
    if nan or infinite:
        raise FourfoldError(
            f"tensor {name!r}: {nan:,} NaN and {infinite:,} infinite values among "
            f"{tensor.numel():,}, wanted none; the checkpoint is damaged, download it again"
        )


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The index's tensor name -> shard, every shard a bare file name; None for a checkpoint in one file."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if not index.is_file():
        if not single.is_file():
            raise FourfoldError(f"{folder}: {_why_no_checkpoint(folder)}")
        return None
    text, _ = _read_json(index)
    weight_map = _parse_json(index, text).get("weight_map")
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
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth"})
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which are never read, as loading one can run any "
            "code; save the model again as safetensors"
        )
    if any(folder.glob("*.safetensors")):
        return f"there are shards but no {INDEX_NAME}; is the download complete?"
    return f"there is neither {INDEX_NAME} nor {SINGLE_NAME}"


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
    text, file_bytes = _read_json(path, prefixed=True)
    if not text.startswith(b"{"):
        raise FourfoldError(f"{path}: its header starts with {text[:8]!r}; wanted a JSON object")
    entries = _parse_json(path, text)
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


def _read_json(path: Path, prefixed: bool = False) -> tuple[bytes, int]:
    """(JSON, bytes of the file): all of an index, or a shard's header, which has its length in front."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise FourfoldError(f"{path}: not a regular file")
        with path.open("rb") as file:
            length = room = file_bytes = os.fstat(file.fileno()).st_size
            if prefixed:
                length, room = int.from_bytes(file.read(8), "little"), file_bytes - 8
            if length > MAX_JSON_BYTES or length > room:
                raise FourfoldError(
                    f"{path}: a header of {length:,} bytes in a file of {file_bytes:,}; "
                    f"wanted in it and <= {MAX_JSON_BYTES:,}. Is the download complete?"
                )
            return file.read(length), file_bytes
    except FileNotFoundError:
        raise FourfoldError(f"{path}: missing; is the download complete?") from None
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8 in which no key is there twice: which of the two is meant would be a guess."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
            raise FourfoldError(f"{path}: key {brief(key)} is there {count} times; wanted once")
        "".join(content).encode()  # half a surrogate pair is no text
        return content

    try:
        content = json.loads(text.decode(), object_pairs_hook=unique)
    except FourfoldError:
        raise
    except (ValueError, RecursionError) as error:
        raise FourfoldError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise FourfoldError(f"{path}: found {brief(content)}; wanted a JSON object")
    return content


def _parse_entry(path: Path, name: str, entry: object, data_start: int, file_bytes: int) -> TensorHeader:
    """One tensor. Its offsets count from the end of the header, those of the result from the file's start."""
    where = f"{path}: tensor {brief(name)}"
    if not isinstance(entry, dict) or entry.keys() != ENTRY_KEYS:
        raise FourfoldError(f"{where}: found {brief(entry)}; wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FourfoldError(f"{where}: dtype {brief(dtype)}; wanted one of {', '.join(DTYPES)}")
    if not _are_sizes(shape):
        raise FourfoldError(f"{where}: shape {brief(shape)}; wanted whole numbers >= 0")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FourfoldError(f"{where}: data_offsets {brief(offsets)}; wanted a start and an end, both >= 0")
    start, end = data_start + offsets[0], data_start + offsets[1]
    if end > file_bytes:
        raise FourfoldError(f"{where}: ends at byte {end:,}, the file at {file_bytes:,}; is the download complete?")
    size_bytes = _tensor_bytes(shape, DTYPES[dtype].itemsize)
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
