"""Kill the run anywhere, run the same command again: the tree is byte-identical to an undisturbed run's."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoints
import releases
from fourfold.datatypes import Event, FourfoldError
from fourfold.quantize.journal import clear, hold
from fourfold.quantize.run import quantize
from fourfold.quantize.summary import finished_already
from fourfold.recipe import load_recipe

CHILD = Path(__file__).with_name("killed_run.py")
Undisturbed = tuple[Path, Path, int, dict[str, bytes]]


def run_children(model: Path, recipe: Path, jobs: list[tuple[Path, int]]) -> list[tuple[int, str]]:
    """Run jobs (OUT, event to be killed at, 0 for none) one after the other: how each ended, and events seen."""
    command = [sys.executable, str(CHILD), str(model), str(recipe), *(f"{out}={limit}" for out, limit in jobs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    ends = [line.split() for line in done.stdout.splitlines()]
    assert len(ends) == len(jobs), done.stderr
    return [(int(ended), events) for _, ended, events in ends]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A model of two layers, its recipe, the number of events of a run, and the tree that it leaves."""
    return run_undisturbed(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The same with guidance."""
    return run_undisturbed(tmp_path_factory.mktemp("guided"), "[guidance]\ntokens = 512\n")


def run_undisturbed(folder: Path, more: str = "") -> Undisturbed:
    """more: what is added to the recipe."""
    model, recipe, out = folder / "model", releases.write_recipe(folder), folder / "whole"
    recipe.write_text(recipe.read_text(encoding="utf-8") + more, encoding="utf-8")
    checkpoints.tiny(model, layers=2)
    ((ended, events),) = run_children(model, recipe, [(out, 0)])
    assert ended == 0
    return model, recipe, int(events), releases.tree(out)


@pytest.fixture(scope="module")
def killed(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was killed while it wrote its last files, all shards finished."""
    return kill_late(undisturbed, tmp_path_factory.mktemp("killed") / "out")


def kill_late(undisturbed: Undisturbed, out: Path) -> Path:
    model, recipe, events, _ = undisturbed
    assert run_children(model, recipe, [(out, int(events * 0.97))])[0][0] == -signal.SIGKILL
    return out


@pytest.fixture
def begun(killed: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "out")


def kill_and_go_on(undisturbed: Undisturbed, folder: Path, limits: list[int]) -> None:
    """For each limit: a run killed there, and the same command again."""
    model, recipe, events, wanted = undisturbed
    assert all(0 < limit <= events for limit in limits)
    jobs = [job for limit in limits for job in ((folder / str(limit), limit), (folder / str(limit), 0))]
    ends = [ended for ended, _ in run_children(model, recipe, jobs)]
    assert ends == [-signal.SIGKILL, 0] * len(limits)
    for limit in limits:
        assert releases.tree(folder / str(limit)) == wanted, f"killed at event {limit}"


def test_killed_run_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    kill_and_go_on(undisturbed, tmp_path, [int(undisturbed[2] * part) for part in (0.2, 0.4, 0.6, 0.8, 0.97)])


@pytest.mark.slow
def test_killed_sweep_goes_on(guided: Undisturbed, tmp_path: Path) -> None:
    """On the way back: the last layer has been passed; events 4 to 9 are the sweep's."""
    kill_and_go_on(guided, tmp_path, [8])


@pytest.mark.slow
def test_killed_at_every_event_of_a_sweep(guided: Undisturbed, tmp_path: Path) -> None:
    """And of the loop's first layer, which needs what the sweep left."""
    kill_and_go_on(guided, tmp_path, list(range(3, 16)))


@pytest.mark.slow
def test_killed_at_every_event(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Every stage of every layer, of both threads, and every file of the finish."""
    kill_and_go_on(undisturbed, tmp_path, list(range(1, undisturbed[2])))


@pytest.mark.slow
def test_a_killed_run_that_quantizes_the_rest_goes_on(tmp_path: Path) -> None:
    """Also while draft experts are solved and while their shard is written."""
    rest = load_recipe("compact").scheme.rest
    more = "\n".join(["[scheme.rest]", *(f'{name} = "{value}"' for name, value in vars(rest).items()), ""])
    undisturbed = run_undisturbed(tmp_path, more)
    kill_and_go_on(undisturbed, tmp_path / "killed", list(range(9, undisturbed[2], 9)))


def test_changes_are_refused_and_named(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, _, _ = undisturbed
    assert refusal(model, begun, recipe, "solver.damp=0.02", "solver.order=natural", "name=other") == [
        "recipe: solver.damp is 0.02, was 0.05; solver.order is 'natural', was 'activation'"
    ]
    seeded = refusal(model, begun, recipe, "calibration.seed=7")
    assert [line.partition(" is ")[0] for line in seeded] == ["recipe: calibration.seed", "calibration: prose.jsonl"]
    assert re.fullmatch(r"calibration: prose.jsonl is 'sha256 \w{16}', was 'sha256 \w{16}'", seeded[1])
    first = f'{{path="{recipe.parent / "prose.jsonl"}", kind="text", fields=["text"], rows=4}}'
    more = refusal(model, begun, recipe, f'calibration.sources=[{first}, {{builtin="math", rows=4}}]')
    assert "calibration.sources.0.rows is 4, was 8; calibration.sources.1.rows is 4, was absent" in more[0]
    assert refusal(model, begun, recipe, layers=range(1)) == ["layers: is 0-0, was 0-1"]


def test_changes_are_refused_before_text_is_tokenized(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, _, _ = undisturbed
    for layers in (None, range(2)):
        assert finished_already(begun, lambda: model, load_recipe(str(recipe)), layers) is None  # goes on
    with pytest.raises(FourfoldError, match=r"solver\.damp is 0\.02, was 0\.05"):
        finished_already(begun, lambda: model, load_recipe(str(recipe), ["solver.damp=0.02"]), None)


def test_a_changed_source_is_refused_and_named(undisturbed: Undisturbed, begun: Path, tmp_path: Path) -> None:
    model, recipe, _, _ = undisturbed
    other = shutil.copytree(model, tmp_path / "other")
    (other / "generation_config.json").write_text('{"eos_token_id": 3}')
    (other / "LICENSE").write_text("of another kind")
    (line,) = refusal(other, begun, recipe)
    sha = r"'sha256 \w{16}'"
    assert re.fullmatch(rf"source: generation_config.json is {sha}, was {sha}; LICENSE is {sha}, was absent", line)
    checkpoints.edit(other, lambda tensors: tensors.update({"mtp.norm.weight": tensors["mtp.norm.weight"].float()}))
    assert "names, dtypes and shapes of tensors is" in refusal(other, begun, recipe)[0]


FIRST, SECOND, REST = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def record_of(out: Path, shard: str) -> Path:
    return out / ".fourfold" / "shards" / f"{shard}.json"


@pytest.mark.parametrize(
    ("damage", "notes"),
    [
        ({FIRST: releases.damage}, [rf"layer 0: {FIRST}: sha256 \w{{16}}, expected \w{{16}}; quantized again"]),
        (
            {FIRST: truncate, REST: releases.damage},
            ["layer 0: .*; quantized again", rf"{REST}: sha256 .*; written again"],
        ),
        (
            {FIRST: Path.unlink, SECOND: releases.damage, REST: Path.unlink},
            [
                f"layer 0: {FIRST}: No such file or directory; quantized again",
                "layer 1: .*; quantized again",
                f"{REST}: No such file or directory; written again",
            ],
        ),
    ],
    ids=["one layer", "a layer and the rest", "everything"],
)
def test_damaged_shards_are_made_again(
    undisturbed: Undisturbed, begun: Path, damage: dict[str, Callable[[Path], None]], notes: list[str]
) -> None:
    model, recipe, _, wanted = undisturbed
    for shard, harm in damage.items():
        harm(begun / shard)
    assert_lines(repaired(model, begun, recipe), notes)
    assert releases.tree(begun) == wanted


def test_unreadable_records_are_made_again(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, _, wanted = undisturbed
    truncate(record_of(begun, FIRST))
    record_of(begun, REST).write_text('{"shard": "another"}', encoding="utf-8")
    notes = [f"{shard}: its record in .fourfold cannot be read; written again" for shard in (FIRST, REST)]
    assert_lines(repaired(model, begun, recipe), notes)
    assert releases.tree(begun) == wanted


def test_a_damaged_layer_of_a_changed_source_is_refused(undisturbed: Undisturbed, begun: Path, tmp_path: Path) -> None:
    """Its record says what it was made from, whatever became of the shard."""
    _, recipe, _, _ = undisturbed
    checkpoints.tiny(tmp_path / "other", layers=2, seed=5)
    releases.damage(begun / FIRST)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(tmp_path / "other", begun, load_recipe(str(recipe)))


@pytest.mark.slow
def test_damage_of_a_guided_run_is_made_good(guided: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _, wanted = guided
    out = kill_late(guided, tmp_path / "out")
    releases.damage(out / FIRST)
    releases.damage(out / ".fourfold/guidance/curvature-00001.safetensors")
    made = r"guidance: curvature-00001.safetensors: sha256 .*; curvatures are computed again"
    assert_lines(repaired(model, out, recipe), [made, "layer 0: .*; quantized again"])
    assert releases.tree(out) == wanted


def repaired(model: Path, out: Path, recipe: Path) -> list[str]:
    """Finish a run; its notes about shards, sorted."""
    events: list[Event] = []
    releases.run(model, out, load_recipe(str(recipe)), progress=events.append)
    return sorted(event.text for event in events if event.kind == "note" and "again" in event.text)


def assert_lines(found: list[str], wanted: list[str]) -> None:
    assert len(found) == len(wanted), found
    for line, pattern in zip(found, wanted, strict=True):
        assert re.fullmatch(pattern, line), line


def refusal(model: Path, out: Path, recipe: Path, *overrides: str, layers: range | None = None) -> list[str]:
    """What is named as changed where a run is not let go on; nothing is touched."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.name != "run.log"}
    with pytest.raises(FourfoldError, match=r"begun with another .*--restart") as refused:
        quantize(model, out, load_recipe(str(recipe), overrides), layers=layers)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}.items()
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_changed_weights_are_refused(undisturbed: Undisturbed, begun: Path, tmp_path: Path) -> None:
    """Same headers, other bytes: found when the finished layer is read again."""
    _, recipe, _, _ = undisturbed
    checkpoints.tiny(tmp_path / "other", layers=2, seed=5)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(tmp_path / "other", begun, load_recipe(str(recipe)))


def test_restart_starts_over(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, _, wanted = undisturbed
    (begun / "notes.md").write_text("mine")
    quantize(model, begun, load_recipe(str(recipe), ["scheme.signed=false"]), restart=True)
    assert (begun / "notes.md").read_text() == "mine"
    assert releases.tree(begun).keys() - {"notes.md"} == wanted.keys()
    clear(begun)
    assert {path.name for path in begun.iterdir()} == {"notes.md", ".fourfold"}


def test_finished_run_has_nothing_to_do(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _, _ = undisturbed
    out = model.parent / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    summary = quantize(model, out, load_recipe(str(recipe)))
    assert summary.projections == 2 * 4 * 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    assert refusal(model, out, recipe, "solver.passes=1") == ["recipe: solver.passes is 1, was 2"]


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
