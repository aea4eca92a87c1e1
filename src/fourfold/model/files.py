"""Files of a checkpoint, written so that each is there whole or not at all, also after a crash.

Every file is written under a temporary name in its own folder, synced and renamed, then the folder is synced.
A killed run leaves at most hidden `.NAME.tmp` files, which the next writing of NAME replaces.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError

CHUNK_BYTES = 16 * 2**20
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
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE",
)


def sidecars(folder: Path) -> list[Path]:
    """Those of SIDECARS that a folder has."""
    return [folder / name for name in SIDECARS if (folder / name).is_file()]


def check_place(folder: Path, name: str, source: Path | None, source_name: str) -> None:
    """Raise FourfoldError unless `folder` is one, or can be made, that may be written and is not in `source`.

    name, source_name: what the command line calls them.
    """
    where = folder.resolve()
    if source is not None and where.is_relative_to(outer := source.resolve()):
        place = f"the {source_name} folder itself" if where == outer else f"inside {source_name} ({outer})"
        raise FourfoldError(f"{folder}: {name} is {place}. Name a folder outside of it")
    if folder.exists() and not folder.is_dir():
        raise FourfoldError(f"{folder}: {name} is a file, expected a folder. Name another")
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise unwritable(folder, name, os.strerror(errno.ENOTDIR))
    if not os.access(there, os.W_OK | os.X_OK) or not shutil.disk_usage(there).total:  # 0: no disk, as in /sys
        raise unwritable(folder, name, os.strerror(errno.EACCES))


def check_new(folder: Path, source: Path | None) -> None:
    """The same of a folder NEW that must be new or empty, made of what is in OUT."""
    check_place(folder, "NEW", source, "OUT")
    if folder.exists() and any(folder.iterdir()):
        raise FourfoldError(f"{folder}: NEW is not empty. Name a new folder")


def unwritable(folder: Path, name: str, reason: str | None) -> FourfoldError:
    return FourfoldError(f"{folder}: {name} cannot be written ({reason}). Name a folder you may write to")


def dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, durable when this returns. Raises FourfoldError as write_bytes does."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, durable when this returns. Raises FourfoldError if the disk is full or fails."""
    with durable(path, len(content)) as descriptor:
        write_all(descriptor, content)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file byte for byte, durable when this returns. A link is followed: Hub caches are made of them.

    Raises FourfoldError if the source cannot be read, or if the disk is full or fails.
    """
    try:
        content = source.open("rb")
    except OSError as error:
        raise FourfoldError(f"{source}: cannot be read: {error.strerror}") from None
    with content, durable(target, os.fstat(content.fileno()).st_size) as descriptor:
        while chunk := content.read(CHUNK_BYTES):
            write_all(descriptor, chunk)


@contextmanager
def durable(path: Path, size_bytes: int) -> Iterator[int]:
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


def write_all(descriptor: int, content: bytes | memoryview) -> None:
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
