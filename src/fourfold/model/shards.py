"""Files of a checkpoint, written so that each is there whole or not at all, also after a crash.

Every file is written under a temporary name in its own folder, synced and renamed, then the folder is synced.
A killed run leaves at most hidden `.NAME.tmp` files, which the next writing of NAME replaces.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model.checkpoint import CHUNK_BYTES, DTYPE_NAMES, DTYPES, TensorIndex, raw_bytes

# Copied byte for byte from the source where they are there (docs/formats.md).
SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
)

DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """A tensor to be written.

    dtype: safetensors' name; data: the values, on any device, or a function that gives their bytes in chunks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Tensor | Callable[[], Iterable[bytes | memoryview]]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> OutputTensor:
        return cls(name=name, dtype=DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape), data=tensor)

    @classmethod
    def copied(cls, index: TensorIndex, source: str, name: str | None = None) -> OutputTensor:
        """A tensor of another checkpoint, streamed from it when its turn comes, perhaps under a new name."""
        header = index.header(source)
        return cls(
            name=name or source, dtype=header.dtype, shape=header.shape, data=functools.partial(index.chunks, source)
        )

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
    with _durable(folder / name, len(header) + tensor_bytes) as descriptor:
        _write(descriptor, header)
        for tensor in ordered:
            written = 0
            for chunk in _chunks(tensor):
                sha.update(chunk)
                _write(descriptor, chunk)
                written += len(chunk)
            assert written == tensor.size_bytes, f"{written} bytes for {tensor.name} {tensor.shape}"
    return WrittenShard(
        name=name,
        size_bytes=len(header) + tensor_bytes,
        sha256=sha.hexdigest(),
        tensor_bytes=tensor_bytes,
        keys=tuple(tensor.name for tensor in ordered),
    )


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, durable when this returns. Raises FourfoldError as write_bytes does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, durable when this returns. Raises FourfoldError if the disk is full or fails."""
    with _durable(path, len(content)) as descriptor:
        _write(descriptor, content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte, durable when this returns. A link is followed: Hub caches are made of them.

    Raises FourfoldError if the source cannot be read, or if the disk is full or fails.
    """
    try:
        content = source.open("rb")
    except OSError as error:
        raise FourfoldError(f"{source}: cannot be read: {error.strerror}") from None
    with content, _durable(target, os.fstat(content.fileno()).st_size) as descriptor:
        while chunk := content.read(CHUNK_BYTES):
            _write(descriptor, chunk)


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


@contextmanager
def _durable(path: Path, size_bytes: int) -> Iterator[int]:
    """A descriptor for `path`'s content; the file is there, whole and durable, when the block has ended.

    If the block or the disk fails, what was there before stays and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed run; its mode may be of another umask
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
            temporary.replace(path)
        finally:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)  # renamed already, unless something failed
        _sync_folder(path.parent)
    except OSError as error:
        raise FourfoldError(f"{path}: {_why_unwritten(path, size_bytes, error)}") from None


def _why_unwritten(path: Path, size_bytes: int, error: OSError) -> str:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"could not be written ({size_bytes:,} bytes): {error.strerror}"
    free = shutil.disk_usage(path.parent).free
    return (
        f"the disk is full ({error.strerror}): {size_bytes:,} bytes are wanted, {free:,} are free. Make "
        "room and run the same command again: it goes on from here"
    )


def _write(descriptor: int, content: bytes | memoryview) -> None:
    """Write all of it; one write may take less than was given, 2 GiB at most."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
