"""numba's decorator as every kernel takes it, and where compiled code is kept for the next process."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _private_folder() -> Path | None:
    """A folder of temporary files that this user alone can write: numba loads pickles from it. None without one."""
    try:
        folder = Path(tempfile.gettempdir()) / f"fourfold-numba-{os.geteuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return folder if private else None


def _can_keep() -> bool:
    """Whether numba finds a folder to keep compiled code in: beside this file, under HOME, or a temporary one."""
    for _ in range(2):
        try:
            numba.njit(cache=True)(_private_folder)  # is not compiled
            return True
        except RuntimeError:  # a read-only installation without a HOME
            folder = _private_folder()
            if folder is None:
                return False
            numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    return False


_KEPT = _can_keep()


def native(**options: Any) -> Callable[[Kernel], Kernel]:
    """Compile a function on its first call. options: more of numba.njit's."""
    decorate: Callable[[Kernel], Kernel] = numba.njit(nogil=True, cache=_KEPT, error_model="numpy", **options)
    return decorate
