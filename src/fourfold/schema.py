"""Raw TOML tables to frozen dataclasses: overrides, and errors that name the key. A rule stands at its field."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from fourfold.datatypes import FourfoldError, nearest

WANTED = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text in quotes",
          "object": "a table", "array": "an array"}  # fmt: skip


def keys(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key, without indices, and annotated type of every field of a dataclass and of the tables in it."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = get_args(hint)[0] if get_origin(hint) is tuple else hint
        yield f"{prefix}{name}", hint
        if is_dataclass(inner):
            yield from keys(inner, f"{prefix}{name}.")  # type: ignore[arg-type]


def choices(kind: type[Any]) -> dict[str, tuple[Any, ...]]:
    """By dotted key, the values that it takes, of keys that take only some."""
    return {key: get_args(hint) for key, hint in keys(kind) if get_origin(hint) is Literal}


def ranges(kind: type[Any]) -> dict[str, tuple[float, float]]:
    """By dotted key, the smallest and the largest number that it takes."""
    rules = ((key, rule) for key, hint in keys(kind) for rule in getattr(hint, "__metadata__", ()))
    return {key: (rule.ge, rule.le) for key, rule in rules}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a file may hold. kind: its dataclass; where: names the file in errors ("recipe mine.toml"); typed: by dotted
    key, what set it on the command line, which errors name in the file's place.
    """

    kind: type[Any]
    where: str
    typed: Mapping[str, str] = field(default_factory=dict)

    def read(self, table: dict[str, Any]) -> Any:
        """A `kind` from a raw table. Left-out keys take the dataclass defaults.

        Raises FourfoldError for an unknown key, with the nearest known one, and for a wrong type or value.
        """
        self._refuse_unknown(table, dict(keys(self.kind)), "")
        try:
            return msgspec.convert(table, self.kind)
        except msgspec.ValidationError as error:
            raise self._problem(str(error), table) from None

    def place(self, key: str) -> str:
        """What set this key, or a table around it: for the start of an error."""
        dotted = re.sub(r"\[(\d+)\]", r".\1", key)
        return next((typed for name, typed in self.typed.items() if f"{dotted}.".startswith(f"{name}.")), self.where)

    def mismatch(self, key: str, found: object, expected: str, hint: str = "") -> FourfoldError:
        shown = str(found).lower() if isinstance(found, bool) else repr(found)
        return FourfoldError(f"{self.place(key)}: {key}: got {shown}, expected {expected}.{hint}")

    def _refuse_unknown(self, table: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
        for name, value in table.items():
            key, rule = f"{prefix}{name}", _rule(f"{prefix}{name}")
            if rule not in known:
                beside = [one for one in known if one.rpartition(".")[0] == _rule(prefix).rstrip(".")]
                elsewhere = [one for one in known if one.rpartition(".")[2] == name]
                meant = f" Did you mean {elsewhere[0]!r}?" if elsewhere else nearest(key, beside)
                raise FourfoldError(f"{self.place(key)}: unknown key {key!r}.{meant}")
            has_keys = any(one.startswith(f"{rule}.") for one in known)
            for place, inner in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if has_keys and isinstance(inner, dict):
                    self._refuse_unknown(inner, known, f"{key}." if place is None else f"{key}[{place}].")

    def _problem(self, said: str, table: Any) -> FourfoldError:
        """msgspec's message in the words of ours."""
        message, _, key = said.replace("`", "").partition(" - at $.")
        for part in re.findall(r"[^.\[\]]+", key):
            table = table[int(part) if isinstance(table, list) else part]
        if message.startswith("Invalid enum value"):
            known = choices(self.kind)[_rule(key)]
            return self.mismatch(key, table, f"one of {', '.join(map(repr, known))}", nearest(table, known))
        kinds, _, got = message.removeprefix("Expected ").partition(", got ")
        whole = type(table) is int and abs(table) < 2**53
        found = float(table) if whole and kinds.startswith("float") else table
        if got:
            return self.mismatch(key, found, " or ".join(WANTED.get(kind, kind) for kind in kinds.split(" | ")))
        low, high = ranges(self.kind)[_rule(key)]
        return self.mismatch(key, found, f"a number from {low:.12g} to {high:.12g}")


def _rule(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def apply_override(table: dict[str, Any], override: str, displaced: Mapping[str, Sequence[str]]) -> None:
    """Set one "a.b.0.c=value" in a raw table; the right side is TOML, or else plain text.

    displaced: by key, the keys beside it that mean nothing any more once it is set, and are taken away.
    Raises FourfoldError for text that is no assignment, or that goes through something that is no table.
    """
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise FourfoldError(f"--set {override}: expected KEY=VALUE, as in solver.damp=0.02")
    target: Any = table
    for depth, part in enumerate(parts[:-1]):
        if isinstance(target, dict):
            target = target.setdefault(part, {})
        elif isinstance(target, list) and part.isdecimal() and int(part) < len(target):
            target = target[int(part)]
        else:
            raise FourfoldError(f"--set {override}: the recipe has no {'.'.join(parts[: depth + 1])}")
    if not isinstance(target, dict):
        raise FourfoldError(f"--set {override}: {'.'.join(parts[:-1])} is not a table of the recipe")
    for other in displaced.get(parts[-1], ()):
        target.pop(other, None)
    target[parts[-1]] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
