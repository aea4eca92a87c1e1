"""Kill the run anywhere, run the same command again: the tree is byte-identical to an undisturbed run's."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
from fourfold.datatypes import FourfoldError
from fourfold.quantize.journal import hold
from fourfold.quantize.run import quantize
from fourfold.recipe import load_recipe

RECIPE = """
name = "small"
[calibration]
length = 128
[[calibration.sources]]
builtin = "general"
rows = 8
[heldout]
windows = 2
length = 128
[solver]
pool_rows = 256
"""
CHILD = Path(__file__).with_name("killed_run.py")
Undisturbed = tuple[Path, Path, int, dict[str, bytes]]
# Not of the result.
RECORDED = ("seconds", "layer_seconds", "peak_memory_bytes", "planned_memory_bytes", "workers", "finished_at")


def run_children(model: Path, recipe: Path, jobs: list[tuple[Path, int]]) -> list[tuple[int, str]]:
    """Run jobs (OUT, event to be killed at, 0 for none) one after the other: how each ended, and events seen."""
    command = [sys.executable, str(CHILD), str(model), str(recipe), *(f"{out}={limit}" for out, limit in jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ends = [line.split() for line in done.stdout.splitlines()]
    assert len(ends) == len(jobs), done.stderr
    return [(int(ended), events) for _, ended, events in ends]


def tree(out: Path) -> dict[str, bytes]:
    """Every file's bytes, what is recorded of time and memory taken out."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    del found[".fourfold/run.log"], found[".fourfold/lock"]
    state = json.loads(found["fourfold.json"])
    found["fourfold.json"] = json.dumps({key: value for key, value in state.items() if key not in RECORDED}).encode()
    table = [line.rsplit(b",", 1)[0] for line in found["quant_log.csv"].splitlines()]
    assert table[0].endswith(b"scale_negative_share"), "the last column is `seconds`"
    found["quant_log.csv"] = b"\n".join(table)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A model of two layers, its recipe, the number of events of a run, and the tree that it leaves."""
    folder = tmp_path_factory.mktemp("resume")
    model, recipe, out = folder / "model", folder / "small.toml", folder / "whole"
    checkpoints.tiny(model, layers=2)
    recipe.write_text(RECIPE)
    ((ended, events),) = run_children(model, recipe, [(out, 0)])
    assert ended == 0
    return model, recipe, int(events), tree(out)


def kill_and_go_on(undisturbed: Undisturbed, folder: Path, limits: list[int]) -> None:
    """For each limit: a run killed there, and the same command again."""
    model, recipe, events, wanted = undisturbed
    assert all(0 < limit <= events for limit in limits)
    jobs = [job for limit in limits for job in ((folder / str(limit), limit), (folder / str(limit), 0))]
    ends = [ended for ended, _ in run_children(model, recipe, jobs)]
    assert ends == [-signal.SIGKILL, 0] * len(limits)
    for limit in limits:
        assert tree(folder / str(limit)) == wanted, f"killed at event {limit}"


def test_killed_run_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_and_go_on(undisturbed, tmp_path, [int(undisturbed[2] * part) for part in (0.2, 0.4, 0.6, 0.8, 0.97)])


@pytest.mark.slow
def test_killed_at_every_event(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Every stage of every layer, of both threads, and every file of the finish."""
    kill_and_go_on(undisturbed, tmp_path, list(range(1, undisturbed[2])))


def test_changed_recipe_and_source_are_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, events, _ = undisturbed
    out = tmp_path / "out"
    run_children(model, recipe, [(out, events // 2)])
    with pytest.raises(FourfoldError, match="another recipe than"):
        quantize(model, out, load_recipe(str(recipe), ["solver.damp=0.02"]))
    with pytest.raises(FourfoldError, match="calibration"):
        quantize(model, out, load_recipe(str(recipe), ["calibration.seed=7"]))
    other = tmp_path / "other"
    checkpoints.tiny(other, layers=2, seed=5)
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(FourfoldError, match="another source than"):
        quantize(other, out, load_recipe(str(recipe)))


def test_changed_weights_are_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Same headers, other bytes: found when the finished layer is read again."""
    model, recipe, events, _ = undisturbed
    out, other = tmp_path / "out", tmp_path / "other"
    run_children(model, recipe, [(out, int(events * 0.8))])
    checkpoints.tiny(other, layers=2, seed=5)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(other, out, load_recipe(str(recipe)))


def test_restart_starts_over(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, events, wanted = undisturbed
    out = tmp_path / "out"
    run_children(model, recipe, [(out, events // 2)])
    (out / "notes.md").write_text("mine")
    quantize(model, out, load_recipe(str(recipe), ["scheme.signed=false"]), restart=True)
    assert (out / "notes.md").read_text() == "mine"
    assert tree(out).keys() - {"notes.md"} == wanted.keys()


def test_finished_run_has_nothing_to_do(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _, _ = undisturbed
    out = model.parent / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    summary = quantize(model, out, load_recipe(str(recipe)))
    assert summary.projections == 2 * 4 * 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    with pytest.raises(FourfoldError, match="another recipe than"):
        quantize(model, out, load_recipe(str(recipe), ["solver.passes=1"]))


def test_a_held_folder_is_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _, _ = undisturbed
    with hold(tmp_path / "out"), pytest.raises(FourfoldError, match=r"process \d+ on .* works on this OUT"):
        quantize(model, tmp_path / "out", load_recipe(str(recipe)))


def test_a_strange_folder_is_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _, _ = undisturbed
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FourfoldError, match="not empty and not an output of fourfold"):
        quantize(model, tmp_path, load_recipe(str(recipe)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(FourfoldError, match="MODEL folder itself"):
        quantize(model, model, load_recipe(str(recipe)))
