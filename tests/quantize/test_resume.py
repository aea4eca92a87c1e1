"""Kill the run anywhere, run the same command again: the tree is byte-identical to an undisturbed run's."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest

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
RECORDED = ("seconds", "peak_memory_bytes", "finished_at")  # of the machine and the day, not of the result


def run_child(model: Path, out: Path, recipe: Path, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHILD), str(model), str(out), str(recipe), str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, int, dict[str, bytes]]:
    """A model of two layers, its recipe, the number of events of a run, and the tree that it leaves."""
    folder = tmp_path_factory.mktemp("resume")
    model, recipe, out = folder / "model", folder / "small.toml", folder / "whole"
    checkpoints.tiny(model, layers=2)
    recipe.write_text(RECIPE)
    done = run_child(model, out, recipe, 0)
    assert done.returncode == 0, done.stderr
    return model, recipe, int(done.stdout.split()[-1]), tree(out)


def kill_and_go_on(undisturbed: tuple[Path, Path, int, dict[str, bytes]], out: Path, limit: int) -> None:
    model, recipe, _, wanted = undisturbed
    killed = run_child(model, out, recipe, limit)
    assert killed.returncode == -signal.SIGKILL, (limit, killed.stderr)
    assert not (out / "fourfold.json").exists() or limit == undisturbed[2]
    done = run_child(model, out, recipe, 0)
    assert done.returncode == 0, (limit, done.stderr)
    assert tree(out) == wanted, f"killed at event {limit}"


@pytest.mark.parametrize("part", [0.3, 0.55, 0.8, 0.97])
def test_killed_run_goes_on(undisturbed, tmp_path, part):
    kill_and_go_on(undisturbed, tmp_path / "out", max(int(undisturbed[2] * part), 1))


@pytest.mark.slow
def test_killed_at_every_event(undisturbed, tmp_path):
    for limit in range(1, undisturbed[2]):
        kill_and_go_on(undisturbed, tmp_path / f"out{limit}", limit)


def test_changed_recipe_and_source_are_refused(undisturbed, tmp_path):
    model, recipe, events, _ = undisturbed
    out = tmp_path / "out"
    run_child(model, out, recipe, events // 2)
    with pytest.raises(FourfoldError, match="another recipe than"):
        quantize(model, out, load_recipe(str(recipe), ["solver.damp=0.02"]))
    with pytest.raises(FourfoldError, match="calibration"):
        quantize(model, out, load_recipe(str(recipe), ["calibration.seed=7"]))
    other = tmp_path / "other"
    checkpoints.tiny(other, layers=2, seed=5)
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(FourfoldError, match="another source than"):
        quantize(other, out, load_recipe(str(recipe)))


def test_changed_weights_are_refused(undisturbed, tmp_path):
    """Same headers, other bytes: found when the finished layer is read again."""
    model, recipe, events, _ = undisturbed
    out, other = tmp_path / "out", tmp_path / "other"
    run_child(model, out, recipe, int(events * 0.8))
    checkpoints.tiny(other, layers=2, seed=5)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(other, out, load_recipe(str(recipe)))


def test_restart_starts_over(undisturbed, tmp_path):
    model, recipe, events, wanted = undisturbed
    out = tmp_path / "out"
    run_child(model, out, recipe, events // 2)
    (out / "notes.md").write_text("mine")
    quantize(model, out, load_recipe(str(recipe), ["scheme.signed=false"]), restart=True)
    assert (out / "notes.md").read_text() == "mine"
    assert tree(out).keys() - {"notes.md"} == wanted.keys()


def test_finished_run_has_nothing_to_do(undisturbed, tmp_path):
    model, recipe, _, wanted = undisturbed
    out = model.parent / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    summary = quantize(model, out, load_recipe(str(recipe)))
    assert summary.projections == 2 * 4 * 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    with pytest.raises(FourfoldError, match="another recipe than"):
        quantize(model, out, load_recipe(str(recipe), ["solver.passes=1"]))


def test_a_held_folder_is_refused(undisturbed, tmp_path):
    model, recipe, _, _ = undisturbed
    with hold(tmp_path / "out"), pytest.raises(FourfoldError, match=r"process \d+ on .* works on this OUT"):
        quantize(model, tmp_path / "out", load_recipe(str(recipe)))


def test_a_strange_folder_is_refused(undisturbed, tmp_path):
    model, recipe, _, _ = undisturbed
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FourfoldError, match="not empty and not an output of fourfold"):
        quantize(model, tmp_path, load_recipe(str(recipe)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(FourfoldError, match="MODEL folder itself"):
        quantize(model, model, load_recipe(str(recipe)))
