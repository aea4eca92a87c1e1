"""Read every byte of a release once: hashed in file order, yielded in pieces of tensors."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.model.tensors import DTYPES, TensorIndex, fill, raw_bytes

BLOCK_BYTES = 8 * 2**20  # read and hashed at a time
AHEAD_BLOCKS = 8


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor. start: of the first of them in the tensor; data: uint8, not a copy of the block."""

    header: TensorHeader
    start: int
    data: Tensor

    @property
    def values(self) -> Tensor:
        """The bytes as the tensor's dtype, flat."""
        dtype = DTYPES[self.header.dtype]
        aligned = self.data.storage_offset() % dtype.itemsize == 0
        return (self.data if aligned else self.data.clone()).view(dtype)


@dataclass(frozen=True)
class Block:
    """A range of a shard's bytes. pieces: of kept tensors a part each, of others whole; sha256: with the last block."""

    shard: str
    size_bytes: int
    pieces: tuple[Piece, ...]
    sha256: str = ""


def read_blocks(index: TensorIndex, whole: Container[str]) -> Iterator[Block]:
    """All shards of an index, each from its first to its last byte; read and hashed on a thread of its own, ahead.

    whole: tensors that are wanted in one piece. Raises FourfoldError for a file that cannot be read to its end.
    """
    shards: dict[str, list[TensorHeader]] = {}
    for header in sorted(index.headers.values(), key=lambda h: (h.shard, h.start_byte, h.end_byte)):
        shards.setdefault(header.shard, []).append(header)
    parts = (_shard_blocks(index.folder / shard, headers, whole) for shard, headers in shards.items())
    blocks = itertools.chain.from_iterable(parts)

    def read() -> Block | None:
        return next(blocks, None)

    reader = ThreadPoolExecutor(1, thread_name_prefix="verify-reader")
    try:
        ahead = deque(reader.submit(read) for _ in range(AHEAD_BLOCKS))
        while (block := ahead.popleft().result()) is not None:
            ahead.append(reader.submit(read))
            yield block
    finally:
        reader.shutdown(cancel_futures=True)


def _shard_blocks(path: Path, headers: list[TensorHeader], whole: Container[str]) -> Iterator[Block]:
    sha = hashlib.sha256()
    ranges = [(0, headers[0].start_byte, []), *_ranges(headers, whole)]
    with path.open("rb", buffering=0) as file:
        for place, (start, end, parts) in enumerate(ranges):
            buffer = torch.empty(end - start, dtype=torch.uint8)
            memory = raw_bytes(buffer)
            try:
                filled = fill(file.fileno(), memory, start)
            except OSError as error:
                raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None
            if filled < len(memory):
                raise FourfoldError(f"{path}: ends before its header says; is someone writing it?")
            sha.update(memory)
            pieces = tuple(Piece(one, a - one.start_byte, buffer[a - start : b - start]) for one, a, b in parts)
            final = place == len(ranges) - 1
            yield Block(path.name, end - start, pieces, sha.hexdigest() if final else "")


Part = tuple[TensorHeader, int, int]  # a tensor, first and last byte of it in the file


def _ranges(headers: list[TensorHeader], whole: Container[str]) -> Iterator[tuple[int, int, list[Part]]]:
    """The file after its header in ranges of about BLOCK_BYTES, with what is in each; they cover it exactly."""
    start, parts = headers[0].start_byte, list[Part]()
    for header in headers:
        first = header.start_byte
        while True:
            room = start + BLOCK_BYTES - first
            last = header.end_byte if header.name in whole else min(header.end_byte, first + room // 8 * 8)
            if last > first or first == header.end_byte:
                parts.append((header, first, last))
            if last >= start + BLOCK_BYTES - 8:
                yield start, last, parts
                start, parts = last, []
            first = last
            if first == header.end_byte:
                break
    if parts:
        yield start, headers[-1].end_byte, parts
