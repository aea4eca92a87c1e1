"""JSON files of unknown origin: one object, in UTF-8, bounded in size, with no key twice. Needs no torch."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError, brief

MAX_BYTES = 100_000_000  # safetensors' own limit for a header; 31,000 tensors take 4 MB


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises FourfoldError if there is none."""
    return parse_object(path, read_bytes(path)[0])


def read_bytes(path: Path, prefixed: bool = False) -> tuple[bytes, int]:
    """Return (JSON, bytes of the file): the whole file, or a shard's header, which has its length in front.

    Raises FourfoldError if the file is missing, too long, truncated or not a regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise FourfoldError(f"{path}: not a regular file")
        with path.open("rb") as file:
            length = room = file_bytes = os.fstat(file.fileno()).st_size
            if prefixed:
                length, room = int.from_bytes(file.read(8), "little"), file_bytes - 8
            if length > MAX_BYTES or length > room:
                raise FourfoldError(
                    f"{path}: a header of {length:,} bytes in a file of {file_bytes:,}; "
                    f"wanted in it and <= {MAX_BYTES:,}. Is the download complete?"
                )
            return file.read(length), file_bytes
    except FileNotFoundError:
        raise FourfoldError(f"{path}: missing; is the download complete?") from None
    except OSError as error:
        raise FourfoldError(f"{path}: cannot be read: {error.strerror}") from None


def parse_object(path: Path, text: bytes) -> dict[str, Any]:
    """Return the object in `text`. Raises FourfoldError, also for a key that is there twice: readers differ."""

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
        raise FourfoldError(f"{path}: got {brief(content)}, expected a JSON object")
    return content
