"""Shards of a checkpoint, written byte for byte as safetensors does."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fourfold.datatypes import TensorHeader
from fourfold.model.files import CHUNK_BYTES, durable, write_all
from fourfold.model.tensors import DTYPE_NAMES, DTYPES, raw_bytes

Chunks = Callable[[], Iterable[bytes | memoryview]]
Shape = tuple[int, ...]
DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to be written.

    dtype: safetensors' name; data: the values, on any device, or a function that gives their bytes in chunks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Tensor | Chunks

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> OutputTensor:
        return cls(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=tensor)

    @classmethod
    def copied(cls, header: TensorHeader, data: Chunks, name: str = "", shape: Shape | None = None) -> OutputTensor:
        """A tensor of another checkpoint, streamed from it when its turn comes, or rows of it under another name."""
        return cls(name=name or header.name, dtype=header.dtype, shape=shape or header.shape, data=data)

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A shard that is durable. sha256: of the whole file; keys: its tensors in the order of their bytes."""

    name: str
    size_bytes: int
    sha256: str
    tensor_bytes: int
    keys: tuple[str, ...]


def write_shard(folder: Path, name: str, tensors: Iterable[OutputTensor]) -> WrittenShard:
    """Write one file, byte for byte as safetensors.torch.save_file with metadata {"format": "pt"} does.

    Tensors are brought to the host and made contiguous one at a time. The file's mode is 0666 & ~umask; when
    this returns, it survives a loss of power. Raises FourfoldError if the disk is full or fails, or if a
    tensor's source does; a shard of that name that was there before stays then, and nothing else is left.
    """
    ordered = sorted(tensors, key=lambda tensor: (DTYPE_ORDER[tensor.dtype], tensor.name))
    header = _header(ordered)
    tensor_bytes = sum(tensor.size_bytes for tensor in ordered)
    sha = hashlib.sha256(header)
    with durable(folder / name, len(header) + tensor_bytes) as descriptor:
        write_all(descriptor, header)
        for tensor in ordered:
            written = 0
            for chunk in _chunks(tensor):
                sha.update(chunk)
                write_all(descriptor, chunk)
                written += len(chunk)
            assert written == tensor.size_bytes, f"{written} bytes for {tensor.name} {tensor.shape}"
    return WrittenShard(
        name=name,
        size_bytes=len(header) + tensor_bytes,
        sha256=sha.hexdigest(),
        tensor_bytes=tensor_bytes,
        keys=tuple(tensor.name for tensor in ordered),
    )


def _header(tensors: list[OutputTensor]) -> bytes:
    """Length and JSON, filled up with spaces to a multiple of 8, tensors packed in the order given."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        assert tensor.name not in entries, f"{tensor.name} is to be written twice"
        end = start + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: OutputTensor) -> Iterator[bytes | memoryview]:
    if not isinstance(tensor.data, Tensor):
        yield from tensor.data()
        return
    stated = (DTYPES[tensor.dtype], tensor.shape)
    assert (tensor.data.dtype, tuple(tensor.data.shape)) == stated, f"{tensor.name}: holds no {stated}"
    content = raw_bytes(tensor.data.detach().cpu().contiguous())
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]
