"""Tensors of safetensors files: every header is checked before a weight is read (headers.py), then one by one."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, TensorHeader
from fourfold.model.files import CHUNK_BYTES
from fourfold.model.headers import STORED, Headers

DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, stored) for name, (stored, _) in STORED.items()}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
SLAB_ELEMENTS = 2**20
BLOCK_BYTES = 16 * 2**20  # of a tensor, that one thread reads and hashes
READERS = 4  # threads
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorIndex(Headers):
    """Headers whose tensors are read. Holds no open file; may be shared by threads."""

    def read(self, name: str, *, out: Tensor | None = None, sha: hashlib._Hash | None = None) -> Tensor:
        """The tensor's values, read straight into `out` (returned) or into new memory on the host.

        out: contiguous, on the CPU, the tensor's dtype and byte size; its shape may differ (a slice of a
        stack, say). sha: is updated with the sha256 of each block of BLOCK_BYTES, as it is on disk. Blocks are read and
        hashed side by side.
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

            def read_block(start: int) -> bytes:
                part = target[start : start + BLOCK_BYTES]
                self._fill(part, descriptor, header.start_byte + start, header)
                return b"" if sha is None else hashlib.sha256(part).digest()

            for digest in side_by_side(read_block, range(0, len(target), BLOCK_BYTES)):
                if sha is not None:
                    sha.update(digest)
        return out

    def read_finite(self, name: str, *, out: Tensor | None = None, sha: hashlib._Hash | None = None) -> Tensor:
        """As `read`. Raises FourfoldError for NaN or Inf, too."""
        value = self.read(name, out=out, sha=sha)
        require_finite(value, name)
        return value

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
        try:
            filled = fill(descriptor, part, start)
        except OSError as error:
            raise self._lost(header, error.strerror) from None
        if filled < len(part):
            raise self._lost(header, f"the file ends at byte {start + filled:,} instead of after {header.end_byte:,}")

    def _lost(self, header: TensorHeader, reason: str | None) -> FourfoldError:
        return FourfoldError(
            f"{self.folder / header.shard}: tensor {header.name!r} could not be read: "
            f"{reason}. Was the file truncated or the disk lost?"
        )


def fill(descriptor: int, part: memoryview, start: int) -> int:
    """Fill `part` with a file's bytes from `start` on; return how many there were, fewer only at the file's end."""
    filled = 0
    while filled < len(part) and (count := os.preadv(descriptor, [part[filled:]], start + filled)):
        filled += count
    return filled


def side_by_side(read: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """What `read` gives for each, in their order, of READERS at one time."""
    if len(items) == 1:
        yield read(items[0])
        return
    with ThreadPoolExecutor(READERS, thread_name_prefix="reader") as pool:
        yield from pool.map(read, items)


def join_digests(digests: Mapping[str, str]) -> str:
    """One sha256 of those of tensors by name, in whatever order they were read."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()


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
