"""fourfold from Python: what `import fourfold` offers, and that it is what the command line does."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

import fourfold
import releases
from command_line import commands
from fourfold import api
from fourfold.datatypes import ignore
from fourfold.quantize.plan import Plan
from fourfold.quantize.summary import Summary, finished_already
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.results import Metrics, Verdict
from test_cli import answers

STAGES = ("plan", "quantize", "evaluate", "verify")
SHOWN = {"json", "quiet", "dry_run"}  # flags of what a terminal shows
OF_THE_RECIPE = ("format", "overrides", "calibration", "tensor_parallel")
CALLED = {"memory": ["memory_bytes", "host_bytes"], **dict.fromkeys(OF_THE_RECIPE, ())}


def test_import_brings_no_other_package() -> None:
    """Of vLLM's environment, too, where the plugin is and none of the dependencies."""
    code = "import fourfold, sys; print(json.dumps([name for name in sys.modules if '.' not in name]))"
    child = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    loaded = set(json.loads(child.stdout)) - {"fourfold"}
    before = subprocess.run(
        [sys.executable, "-c", "import json, sys; print(json.dumps(list(sys.modules)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert loaded - set(json.loads(before.stdout)) <= sys.stdlib_module_names


def test_a_run_leaves_the_log_level_of_transformers_alone() -> None:
    code = """
from transformers.utils import logging
before = logging.get_verbosity()
import fourfold.quantize.run, fourfold.release.evaluate
print(before, logging.get_verbosity())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = child.stdout.split()
    assert before == after


def test_a_function_keeps_its_name_when_the_room_of_that_name_is_loaded() -> None:
    from fourfold.quantize import journal  # noqa: PLC0415  # what would take the name

    assert journal.STATE
    assert fourfold.quantize is api.quantize


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_typed_documented_and_watched(name: str) -> None:
    stage = getattr(fourfold, name)
    known = {"Recipe": Recipe, "Summary": Summary, "Plan": Plan, "Verdict": Verdict, "Metrics": Metrics}
    hints = typing.get_type_hints(stage, localns=known)
    parameters = inspect.signature(stage).parameters
    assert set(hints) == {*parameters, "return"}
    assert parameters["progress"].default is ignore
    text = inspect.getdoc(stage) or ""
    assert "Raises:\n    FourfoldError: " in text
    ((_, _, options),) = commands(name)
    by_help = {option.field_info.name for option in options if option.parameter.help} | {"progress"}  # the module's
    assert [parameter for parameter in parameters if parameter not in text and parameter not in by_help] == []


@pytest.mark.parametrize("name", STAGES)
def test_arguments_are_the_flags(name: str) -> None:
    ((_, _, arguments),) = commands(name)
    flags = [argument.field_info.name for argument in arguments if argument.field_info.name not in SHOWN]
    wanted = {argument for flag in flags for argument in CALLED.get(flag, [flag])}
    found = set(inspect.signature(getattr(fourfold, name)).parameters)
    assert found - wanted == {"progress"}
    assert wanted <= found


def test_plan_for_another_machine(example_model: Path) -> None:
    """Nothing is measured, so nothing is told."""
    told: list[fourfold.Event] = []
    planned = fourfold.plan(example_model, recipe="fast", machine="4x3060", layers=range(2), progress=told.append)
    assert (planned.recipe.name, planned.solve, planned.partial) == ("fast", range(2), True)
    assert len(planned.memory.devices) == 4
    assert told == []


def test_plan_takes_a_recipe_of_ones_own(example_model: Path) -> None:
    told: list[fourfold.Event] = []
    recipe = load_recipe("best", ["solver.passes=0", "scheme.group_size=64"])
    planned = fourfold.plan(str(example_model), recipe=recipe, devices="cpu", progress=told.append)
    assert planned.recipe == recipe
    assert "measured here" in planned.time.basis
    assert [event.stage for event in told] == ["gauge"]


def test_stages_one_after_another(tmp_path: Path) -> None:
    """Small, but real: two layers of random weights."""
    model, out, told = releases.make_source(tmp_path / "model"), tmp_path / "out", list[fourfold.Event]()
    recipe = releases.write_recipe(tmp_path)
    summary = fourfold.quantize(model, str(out), recipe=recipe, devices="cpu", progress=told.append)
    assert (summary.partial, set(summary.methods)) == (False, {"gptq"})
    assert [event.layer for event in told if event.kind == "layer"] == [0, 1]
    (start,) = (event for event in told if event.kind == "start")
    assert told.index(start) == 0 and start.data["output"] == str(out)
    solved = [(event.done, event.total) for event in told if event.stage == "solve" and event.layer == 0]
    assert len(solved) > 3 and solved[-1][0] == solved[-1][1]  # the bar moves within a layer
    nothing_to_do(model, out, recipe)
    verdict = fourfold.verify(str(out), source=str(model))
    assert verdict.passed
    (out / "README.md").write_text("# A card\n")
    ((code, said, loaded),) = answers([["publish", str(out), "me/small", "--dry-run"]], tmp_path)
    assert (code, loaded) == (0, []) and "would be sent to me/small" in said
    found = fourfold.evaluate(out, source=model, windows=1, length=32, drafts=False, replace=True, devices="cpu")
    assert found.measured_by == "evaluate"
    assert json.loads((out / "metrics.json").read_text()) == found.to_json()


def nothing_to_do(model: Path, out: Path, recipe: Path) -> None:
    """The same command again, or another one, costs neither torch nor transformers, and touches nothing."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    command = ["quantize", str(model), str(out), "--recipe", str(recipe), "--devices", "cpu"]
    changes = ["--set", "solver.damp=0.02", "--samples", "4"]
    same, changed, trial = answers([command, command + changes, [*command, "--layers", "0-0"]], model.parent)
    assert (same[0], same[2]) == (0, []), same[1]
    assert f"note: {out} is finished already; nothing to do" in same[1]
    assert f"Next: fourfold verify {out} --source {model}" in same[1]
    assert (changed[0], changed[2]) == (trial[0], trial[2]) == (2, [])
    for words in ("solver.damp is 0.02, was 0.05", "calibration.sources.0.rows is 4, was 8"):
        assert words in changed[1]
    assert "layers: is 0-0, was 0-1" in trial[1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    text = model.parent / "heldout.txt"
    text.write_text(text.read_text() + "more")
    assert finished_already(out, lambda: model, load_recipe(str(recipe)), None) is None  # its tokens tell


def test_a_budget_that_cannot_be_kept_is_refused(example_model: Path, tmp_path: Path) -> None:
    for run in (fourfold.plan, lambda model, **options: fourfold.quantize(model, tmp_path / "out", **options)):
        with pytest.raises(fourfold.FourfoldError, match=r"^--memory: got 1\.05 MB on cpu, expected at least .*\. Try"):
            run(example_model, recipe="fast", devices="cpu", memory_bytes=2**20)
    with pytest.raises(fourfold.FourfoldError, match="8 B on the host"):
        fourfold.plan(example_model, recipe="fast", devices="cpu*2", memory_bytes=2**33, host_bytes=8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fourfold.plan("m", samples=0), "samples: got 0, expected 1 to"),
        (lambda: fourfold.plan("m", machine="h200", devices="cpu"), "exclude each other"),
        (lambda: fourfold.plan("m", recipe="bset"), "Did you mean 'best'?"),
        (lambda: fourfold.quantize("nowhere", "out", devices="cpu"), "no such folder"),
        (lambda: fourfold.evaluate("out", source="m", tasks=["gsm8k"]), "got no --url, expected the server"),
        (lambda: fourfold.evaluate("nowhere", source="m"), "expected the folder of a finished release"),
        (lambda: fourfold.verify("nowhere"), "nowhere"),
        (lambda: fourfold.verify("out", python=Path("python")), "wanted both, or neither"),
        (lambda: fourfold.verify("out", engine="vllm", load=3), "--load: got 3, expected an even number from 2 to 256"),
        (lambda: fourfold.verify("http://localhost:1"), "http://localhost:1: got no --load, expected --load N alone"),
        (lambda: fourfold.verify("http://localhost:1", engine="vllm", load=2), "got --engine, --python or --signature"),
        (lambda: fourfold.verify("http://localhost:1", source="nowhere", load=2), "nowhere: no such folder"),
    ],
)
def test_mistakes(call: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fourfold.FourfoldError) as refused:
        call()
    assert said in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "rank", "follows"), [("2", "1", True), ("2", "0", False), ("1", "1", False)])
def test_the_first_rank_tells_for_all(monkeypatch: pytest.MonkeyPatch, size: str, rank: str, follows: bool) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert api.follows() is follows
