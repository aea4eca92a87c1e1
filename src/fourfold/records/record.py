"""A JSON file between two stages: types, one reader, one writer. Needs no torch.

A field with a default is one that earlier versions did not write; keys that no field has are ignored.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import msgspec
from msgspec import Meta

import fourfold
from fourfold.datatypes import FourfoldError, brief
from fourfold.model.files import dump, write_text
from fourfold.model.json_object import read_bytes

T = TypeVar("T")
R = TypeVar("R", bound=msgspec.Struct)
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Number = int | float  # written as it was read
Ends = Annotated[tuple[float, ...], Meta(min_length=2, max_length=2)]  # of an interval


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A JSON file. FIX: what to do about a damaged one."""

    FIX: ClassVar[str]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raise FourfoldError for a file that is missing, not JSON, of a newer version, or has a wrong key or type."""
        return decode(path, cls, cls.FIX)

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """The same, None if there is no such file."""
        return cls.read(path) if path.is_file() else None

    def part(self, kind: type[R]) -> R:
        """Only what is of `kind`, one of this record's bases."""
        return kind(**{name: getattr(self, name) for name in kind.__struct_fields__})

    def write(self, path: Path) -> None:
        """Write it, durable when this returns. Raises FourfoldError if the disk is full or fails."""
        write_text(path, dump(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return found


class Version(msgspec.Struct, frozen=True):
    """What is read of a file before all else. None: the file has none."""

    fourfold: str | None = None


def decode(path: Path, kind: type[T], fix: str) -> T:
    """Return what a JSON file holds. Raises FourfoldError with the key, the value, what is expected, and `fix`."""
    text = read_bytes(path)[0]
    try:
        version = msgspec.json.decode(text, type=Version).fourfold
        if version and _release(version) > _release(fourfold.__version__):
            known = f"expected {fourfold.__version__} or earlier. Update fourfold to read it"
            raise FourfoldError(f"{path}: fourfold: got {brief(version)}, {known}")
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise FourfoldError(f"{path}: {_problem(str(error), text, kind)}. {fix}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        place = re.search(r"byte (\d+)", str(error))
        before = text[: int(place[1]) + 10][-40:] if place else text[-40:]
        after = brief(before.decode(errors="replace"))
        raise FourfoldError(f"{path}: not JSON ({error}, after {after}). {fix}") from None


def _release(version: str) -> tuple[float, ...]:
    """Major and minor, which formats may differ by."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return tuple(map(int, found.groups())) if found else (float("inf"),)


def _problem(said: str, text: bytes, kind: object) -> str:
    """msgspec's message in the words of ours, with the key and the value.

    It does not say which entry of a dictionary is meant: the one that is refused alone.
    """
    message, _, place = said.replace("`", "").partition(" - at $")
    keys = list[str]()
    try:
        content = value = json.loads(text)
    except RecursionError:  # of what msgspec had no need to read
        content = value = text
    for name, index, _ in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])", place):
        if not name and not index:
            name, value = _refused(said, content, value, kind)
        else:
            value = value[int(index)] if index else value[name]
        keys.append(name or index)
    if missing := re.fullmatch(r"Object missing required field (.+)", message):
        return f"{'.'.join([*keys, missing[1]])}: missing"
    expected = re.fullmatch(r"Expected (.+?)(?:, got .+)?", message)
    where = f"{'.'.join(keys)}: " if keys else ""
    return f"{where}got {brief(value)}, expected {expected[1] if expected else 'a value that is known'}"


def _refused(said: str, content: Any, entries: dict[str, Any], kind: object) -> tuple[str, Any]:
    for name, value in list(entries.items()):
        entries.clear()
        entries[name] = value
        try:
            msgspec.convert(content, kind)
        except msgspec.ValidationError as error:
            if str(error) == said:
                break
    return name, value


def write_entry(path: Path, entry: object) -> None:
    """An entry of a journal, of a file that is durable already."""
    write_text(path, json.dumps(msgspec.to_builtins(entry)))


def read_entry(path: Path, kind: type[T]) -> T | None:
    """None where it cannot be read: the file that it is of counts as not finished."""
    try:
        return decode(path, kind, "")
    except FourfoldError:
        return None
