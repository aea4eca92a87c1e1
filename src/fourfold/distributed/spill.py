"""Host memory in unlinked files, for what may be larger than the memory there is."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.units import size


class Spill:
    """Tensors in files of a folder, mapped into memory. The files have no name, so that nothing is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._lock = threading.Lock()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of unknown values. Raises FourfoldError if the disk has no room for it."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # A full disk is seen here: later it would be a signal that ends the process.
                os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
                room = mmap.mmap(file.fileno(), count * dtype.itemsize)
        except OSError as error:
            wanted = size(count * dtype.itemsize)
            raise FourfoldError(f"{self.folder}: no room for {wanted} of hidden states: {error.strerror}") from None
        with self._lock:
            self._maps.add(room)
        return torch.frombuffer(room, dtype=dtype, count=count).view(shape)

    def drop(self) -> None:
        """Take what was read and written out of this process's memory: the system keeps it as long as it has room."""
        with self._lock:
            maps = list(self._maps)
        for room in maps:
            room.madvise(mmap.MADV_DONTNEED)
