"""Checkpoints whose JSON was tampered with: `plan` and `inspect` answer or refuse; no traceback, no hang."""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import foreign
import rivals
from fourfold import api
from fourfold.datatypes import FourfoldError
from fourfold.recipe import load_recipe
from fourfold.release.convert import convert
from fourfold.release.inspect import inspect

CPU_SECONDS = 5
INDEX = "model.safetensors.index.json"
TWICE = "\0twice"  # a key that is written once more without it

VALUES: tuple[Any, ...] = (
    None, True, False, "", "big", -1, 0, 1, 2, 3, 7, 64, 1000, 10**12, -(10**15), 10**40, 0.5, -0.0,
    1e308, math.inf, math.nan, [], {}, [None], ["x", 1], {"x": {"y": []}}, "\x1b]0;x\x07", "x" * 10**5, "../../passwd",
    "float8_e4m3fn", "full_attention", "gptq", "compressed-tensors", ["full_attention"], [[1]] * 3,
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside, by keys and positions; of long lists and objects the first and the last."""
    if not isinstance(value, dict | list) or len(path) > 9:
        return
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    for key in keys if len(keys) <= 40 else [*keys[:5], keys[-1]]:
        yield (*path, key)
        yield from places(value[key], (*path, key))


@st.composite
def tampered(draw: st.DrawFn, content: Any) -> Any:
    """The content with one to three values replaced, taken away, renamed or written twice."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        path = draw(st.sampled_from(found))
        holder = content
        for key in path[:-1]:
            holder = holder[key]
        key, kind = path[-1], draw(st.sampled_from(("replace", "replace", "nest", "drop", "rename", "twice")))
        if kind == "replace":
            holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        elif kind == "nest":
            holder[key] = nested(draw(st.sampled_from((3, 20, 900))))
        elif kind == "drop":
            del holder[key]
        elif isinstance(holder, dict):
            new = TWICE + key if kind == "twice" else draw(st.sampled_from(("x", "__class__", "to_dict", "dtype")))
            holder[new] = holder[key] if kind == "twice" else holder.pop(key)
    return content


def as_text(content: Any) -> str:
    return json.dumps(content).replace(json.dumps(TWICE)[1:-1], "")


class Checkpoint:
    """A checkpoint's JSON, and a folder to write it to, tampered with, beside data that are holes in files."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        self.parts = {name: json.loads((folder / name).read_text()) for name in ("config.json", INDEX)}
        self.data_bytes: dict[str, int] = {}
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self.parts[path.name] = json.loads(file.read(length))
            self.data_bytes[path.name] = path.stat().st_size - 8 - length
        for name in self.parts:
            self.write(name, json.dumps(self.parts[name]))

    def write(self, name: str, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        with (self.folder / name).open("wb") as file:
            if name in self.data_bytes:
                file.write(len(content).to_bytes(8, "little"))
            file.write(content)
            file.truncate(file.tell() + self.data_bytes.get(name, 0))

    @contextmanager
    def with_part(self, name: str, text: str) -> Iterator[Path]:
        self.write(name, text)
        try:
            yield self.folder
        finally:
            self.write(name, json.dumps(self.parts[name]))


@pytest.fixture(scope="module")
def stock(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, ...]:
    """The example, another tool's release, the same in compressed-tensors, and releases in AWQ, FP8, NVFP4."""
    folder = tmp_path_factory.mktemp("fuzz")
    made = foreign.make(folder / "made", "symmetric")
    convert(made, folder / "converted", format="compressed-tensors")
    sources = {"bf16": example_model, "gptq": made, "compressed": folder / "converted"}
    for kind in ("awq", "fp8-block", "ct-nvfp4"):
        sources[kind] = folder / f"made {kind}"
        rivals.make(sources[kind], kind, layers=1, experts=2)
    return tuple(Checkpoint(source, folder / name) for name, source in sources.items())


@contextmanager
def limited() -> Iterator[None]:
    """A case that takes longer than CPU_SECONDS of this process is a hang."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {CPU_SECONDS} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def ask(command: Callable[[], object]) -> None:
    try:
        with limited():
            command()
    except FourfoldError as error:
        assert 0 < len(str(error)) < 5000
        assert len(str(error).splitlines()) <= 6


@pytest.mark.parametrize("cases", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_tampered_json_is_answered_or_refused(stock: tuple[Checkpoint, ...], cases: int) -> None:
    recipe = load_recipe("best")
    for checkpoint in stock:
        inspect(checkpoint.folder)
    api.plan(stock[0].folder, recipe=recipe, machine="4x3060")

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def check(data: st.DataObject) -> None:
        checkpoint = data.draw(st.sampled_from(stock))
        name = data.draw(st.sampled_from(("config.json", "config.json", *sorted(checkpoint.parts))))
        text = as_text(data.draw(tampered(checkpoint.parts[name])))
        with checkpoint.with_part(name, text) as folder:
            ask(lambda: inspect(folder))
            ask(lambda: api.plan(folder, recipe=recipe, machine="4x3060"))

    check()
