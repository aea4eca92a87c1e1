"""Every record: what is written reads back equal, and a damaged file is one error that names file, key and fix."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from fourfold import __version__
from fourfold.datatypes import FourfoldError, ProjectionStatistics, ShardRecord
from fourfold.records.bench import Bench
from fourfold.records.log import read_log, write_log
from fourfold.records.record import Record, read_entry, write_entry
from fourfold.records.release import Conversion, CurvatureRecord, Export, Reference, Run, State
from fourfold.records.results import Metrics, Verdict

FILES: tuple[type[Record], ...] = (State, Metrics, Verdict, Bench, Export, Conversion, Run)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
SCALARS: dict[type[inspect.Type], st.SearchStrategy[Any]] = {
    inspect.AnyType: ANY, inspect.NoneType: st.none(), inspect.BoolType: st.booleans(),
    inspect.StrType: st.text(max_size=8),
    inspect.FloatType: st.floats(allow_nan=False, allow_infinity=False),
}  # fmt: skip


def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """All that a type takes, in JSON types."""
    match kind:
        case inspect.IntType():
            return st.integers(-(2**53) if kind.ge is None and kind.gt is None else kind.ge or 1, 2**53)
        case inspect.EnumType():
            return st.sampled_from([one.value for one in kind.cls])
        case inspect.UnionType():
            return st.one_of(*map(values, kind.types))
        case inspect.ListType() | inspect.VarTupleType():
            return st.lists(values(kind.item_type), min_size=kind.min_length or 0, max_size=kind.max_length or 2)
        case inspect.DictType():
            return st.dictionaries(st.text(max_size=5), values(kind.value_type), max_size=2)
        case inspect.StructType() | inspect.DataclassType():
            required = {one.encode_name: values(one.type) for one in kind.fields if one.required}
            return st.fixed_dictionaries(
                required, optional={one.encode_name: values(one.type) for one in kind.fields if not one.required}
            )
    return SCALARS[type(kind)]


def some(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Records of a kind; their version is one that there was."""

    def made(content: dict[str, Any]) -> Any:
        return msgspec.convert(content | ({"fourfold": __version__} if "fourfold" in content else {}), kind)

    return values(inspect.type_info(kind)).map(made)


anyhow = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", FILES)
@anyhow
@given(data=st.data())
def test_what_is_written_reads_back_equal(kind: type[Record], data: st.DataObject, tmp_path: Path) -> None:
    record, path = data.draw(some(kind)), tmp_path / "file.json"
    record.write(path)
    assert kind.read(path) == kind.find(path) == record
    assert json.loads(path.read_text(encoding="utf-8")) == record.to_json()
    record.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@anyhow
@given(data=st.data(), count=st.integers(1, 4))
def test_a_reference_reads_back_equal(data: st.DataObject, count: int, tmp_path: Path) -> None:
    logprob = st.floats(-30, 0)
    record = Reference(
        tokens=data.draw(st.lists(st.integers(0, 99), min_size=count + 1, max_size=count + 1)),
        logprobs=data.draw(st.lists(logprob, min_size=count, max_size=count)),
        likeliest=[[3, 4]] * count,
        likeliest_logprobs=data.draw(st.lists(st.lists(logprob, max_size=2), min_size=count, max_size=count)),
    )
    record.write(tmp_path / "reference.json")
    assert Reference.read(tmp_path / "reference.json") == record
    with pytest.raises(ValueError, match="at least 2"):
        Reference(tokens=[1], logprobs=[], likeliest=[], likeliest_logprobs=[])


@pytest.mark.parametrize("kind", [ShardRecord, CurvatureRecord])
@anyhow
@given(data=st.data())
def test_an_entry_of_a_journal_reads_back_equal_or_counts_as_none(
    kind: type[Any], data: st.DataObject, tmp_path: Path
) -> None:
    entry, path = data.draw(some(kind)), tmp_path / "entry.json"
    write_entry(path, entry)
    assert read_entry(path, kind) == entry
    path.write_bytes(path.read_bytes()[:-1])
    assert read_entry(path, kind) is None and read_entry(tmp_path / "none.json", kind) is None


@anyhow
@given(rows=st.lists(some(ProjectionStatistics), max_size=3))
def test_a_log_reads_back_to_six_digits(rows: list[ProjectionStatistics], tmp_path: Path) -> None:
    rows = [dataclasses.replace(row, projection=f"{place}_proj", layer=place) for place, row in enumerate(rows)]
    write_log(tmp_path / "log.csv", reversed(rows))
    for found, row in zip(read_log(tmp_path / "log.csv"), rows, strict=True):
        for name, value in vars(row).items():
            same = math.isclose(value, vars(found)[name], rel_tol=1e-5) if isinstance(value, float) else False
            assert same or vars(found)[name] == value, name


# --- damage ---------------------------------------------------------------------------------------------------------

SHORT = '{"passed": true, "content": "c", "levels": ["files"], "checks": [], "seconds": {"a": 1.5, "b": 2}}'


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "not JSON (Input data was truncated, after '')"),
        (lambda text: text[:-9], "not JSON (Input data was truncated, after "),
        (lambda text: text.replace("1.5", "NaN"), "not JSON (JSON is malformed: invalid character (byte "),
        (lambda text: "[" * 100_000, "expected object"),
        (lambda text: "[]", "got [], expected object"),
        (lambda text: text.replace('"passed": true, ', ""), "passed: missing"),
        (lambda text: text.replace("true", "1"), "passed: got 1, expected bool"),
        (lambda text: text.replace('["files"]', '["filez"]'), "levels.0: got 'filez', expected a value that is known"),
        (lambda text: text.replace("1.5", '"1.5"'), "seconds.a: got '1.5', expected float"),
        (lambda text: text.replace("[]", '[{"level": "files"}]'), "checks.0.name: missing"),
        (lambda text: text[:-1] + ', "bytes_read": -1}', "bytes_read: got -1, expected int >= 0"),
    ],
)
def test_a_damaged_file_is_one_clear_error(damage: Callable[[str], str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "verify.json"
    path.write_text(SHORT, encoding="utf-8")
    assert Verdict.read(path).levels == ("files",)
    path.write_text(damage(SHORT), encoding="utf-8")
    with pytest.raises(FourfoldError) as raised:
        Verdict.read(path)
    assert str(raised.value).startswith(f"{path}: ") and str(raised.value).endswith(f". {Verdict.FIX}")
    assert said in str(raised.value) and len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 600


@pytest.mark.parametrize("version", ["99.0.0", "1000000000000.0", "next"])
def test_a_file_of_a_newer_version_says_so(version: str, tmp_path: Path) -> None:
    """Whatever else has changed in it."""
    (tmp_path / "fourfold.json").write_text(json.dumps({"fourfold": version}), encoding="utf-8")
    with pytest.raises(FourfoldError, match=f"got '{version}', expected {__version__} or earlier. Update fourfold"):
        State.read(tmp_path / "fourfold.json")
