"""Raw TOML tables to frozen dataclasses: overrides, types, allowed values, and errors that name the key."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from fourfold.datatypes import FourfoldError

_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """What a file may hold. choices, ranges (both ends included): by dotted key without indices.

    where: names the file in errors ("recipe mine.toml"); typed: by dotted key, what set it on the command line, which
    errors name in the file's place.
    """

    where: str
    choices: Mapping[str, tuple[object, ...]]
    ranges: Mapping[str, tuple[float, float]]
    typed: Mapping[str, str] = field(default_factory=dict)

    def read(self, cls: type[Any], table: object, key: str = "") -> Any:
        """A `cls` from a raw table of dotted name `key`. Left-out keys take the dataclass defaults.

        Raises FourfoldError for an unknown key, with the nearest known one, and for a wrong type or value.
        """
        if not isinstance(table, dict):
            raise self.mismatch(key, table, "a table")
        hints = get_type_hints(cls)
        for name in table:
            if name not in hints:
                unknown, meant = _join(key, name), self._nearest_key(cls, key, name)
                raise FourfoldError(f"{self.place(unknown)}: unknown key {unknown!r}.{meant}")
        values = {name: self._value(hints[name], value, _join(key, name)) for name, value in table.items()}
        return cls(**values)

    def place(self, key: str) -> str:
        """What set this key, or a table around it: for the start of an error."""
        dotted = re.sub(r"\[(\d+)\]", r".\1", key)
        return next((typed for name, typed in self.typed.items() if f"{dotted}.".startswith(f"{name}.")), self.where)

    def mismatch(self, key: str, found: object, expected: str, hint: str = "") -> FourfoldError:
        shown = str(found).lower() if isinstance(found, bool) else repr(found)
        return FourfoldError(f"{self.place(key)}: {key}: got {shown}, expected {expected}.{hint}")

    def _value(self, hint: Any, value: object, key: str) -> Any:
        if is_dataclass(hint):
            return self.read(hint, value, key)  # type: ignore[arg-type]
        if get_origin(hint) is tuple:
            if not isinstance(value, list | tuple):
                raise self.mismatch(key, value, "an array")
            item = get_args(hint)[0]
            return tuple(self._value(item, entry, f"{key}[{index}]") for index, entry in enumerate(value))
        return self._scalar(hint, value, key)

    def _scalar(self, hint: Any, value: Any, key: str) -> Any:
        if hint is float and type(value) is int:
            value = float(value)
        kinds = get_args(hint) or (hint,)
        if type(value) not in kinds:  # not isinstance: true is no whole number
            raise self.mismatch(key, value, " or ".join(_WANTED[kind] for kind in kinds))
        rule = re.sub(r"\[\d+\]", "", key)
        choices = self.choices.get(rule)
        if choices and value not in choices:
            raise self.mismatch(key, value, f"one of {', '.join(map(repr, choices))}", nearest(value, choices))
        low, high = self.ranges.get(rule, (-math.inf, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:  # nan is in no range
            raise self.mismatch(key, value, f"a number from {low:.12g} to {high:.12g}")
        return value

    def _nearest_key(self, cls: type[Any], key: str, name: str) -> str:
        """The key that was probably meant: the same name in another table, else a similar one in this."""
        known = {rule.rpartition(".")[2]: rule for rule in (*self.choices, *self.ranges)}
        if name in known:
            return f" Did you mean {known[name]!r}?"
        return nearest(_join(key, name), [_join(key, item.name) for item in fields(cls)])


def nearest(word: object, known: Collection[object]) -> str:
    """The last sentence of an error: the known word that `word` looks like, or nothing."""
    match = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match and isinstance(word, str) else ""


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


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
