"""Kill the run anywhere, run the same command again: the tree is byte-identical to an undisturbed run's."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

import checkpoints
import faults
import releases
from fourfold.datatypes import Event, FourfoldError
from fourfold.quantize.journal import clear, hold
from fourfold.quantize.run import quantize
from fourfold.quantize.summary import finished_already
from fourfold.recipe import load_recipe

Undisturbed = tuple[Path, Path, dict[str, bytes]]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Suite]:
    """A model of two layers, an undisturbed run, and what a run leaves that was killed before its last files."""
    with faults.suite(tmp_path_factory.mktemp("resume") / "plain") as made:
        yield made


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Suite]:
    """The same with guidance."""
    with faults.suite(tmp_path_factory.mktemp("guided") / "guided", recipe="[guidance]\ntokens = 512\n") as made:
        yield made


@pytest.fixture
def undisturbed(suite: faults.Suite) -> Undisturbed:
    """The model, its recipe, and the tree that an undisturbed run leaves."""
    return suite.model, suite.recipe, suite.wanted


@pytest.fixture
def begun(suite: faults.Suite, tmp_path: Path) -> Path:
    """A copy of what the killed run left, all shards finished."""
    return shutil.copytree(suite.late, tmp_path / "out")


def kill_and_go_on(suite: faults.Suite, places: Iterable[int]) -> None:
    """For each of a run's points: a run killed there, and the same command again."""
    for at in places:
        outcome = suite.attempt(faults.Fault(kind="kill", name=suite.points[0, 0][at - 1], at=at))
        assert outcome.result == "resumed", outcome


def test_killed_run_goes_on(suite: faults.Suite) -> None:
    count = len(suite.points[0, 0])
    kill_and_go_on(suite, [int(count * part) for part in (0.2, 0.5, 0.8)])


@pytest.mark.slow
def test_killed_in_a_sweep(guided: faults.Suite) -> None:
    """Forwards and on the way back, and in the loop's first layer, which needs what the sweep left."""
    kill_and_go_on(guided, range(4, 16, 2))


@pytest.mark.slow
def test_a_killed_run_that_quantizes_the_rest_goes_on(tmp_path: Path) -> None:
    """Also while draft experts are solved and while their shard is written."""
    rest = load_recipe("compact").scheme.rest
    more = "\n".join(["[scheme.rest]", *(f'{name} = "{value}"' for name, value in vars(rest).items()), ""])
    with faults.suite(tmp_path / "suite", recipe=more) as made:
        kill_and_go_on(made, range(9, len(made.points[0, 0]), 9))


def test_changes_are_refused_and_named(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, _ = undisturbed
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
    model, recipe, _ = undisturbed
    for layers in (None, range(2)):
        assert finished_already(begun, lambda: model, load_recipe(str(recipe)), layers) is None  # goes on
    with pytest.raises(FourfoldError, match=r"solver\.damp is 0\.02, was 0\.05"):
        finished_already(begun, lambda: model, load_recipe(str(recipe), ["solver.damp=0.02"]), None)


def test_a_changed_source_is_refused_and_named(undisturbed: Undisturbed, begun: Path, tmp_path: Path) -> None:
    model, recipe, _ = undisturbed
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
    model, recipe, wanted = undisturbed
    for shard, harm in damage.items():
        harm(begun / shard)
    assert_lines(repaired(model, begun, recipe), notes)
    assert releases.tree(begun) == wanted


def test_unreadable_records_are_made_again(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, wanted = undisturbed
    truncate(record_of(begun, FIRST))
    record_of(begun, REST).write_text('{"shard": "another"}', encoding="utf-8")
    notes = [f"{shard}: its record in .fourfold cannot be read; written again" for shard in (FIRST, REST)]
    assert_lines(repaired(model, begun, recipe), notes)
    assert releases.tree(begun) == wanted


def test_a_damaged_layer_of_a_changed_source_is_refused(undisturbed: Undisturbed, begun: Path, tmp_path: Path) -> None:
    """Its record says what it was made from, whatever became of the shard."""
    _, recipe, _ = undisturbed
    checkpoints.tiny(tmp_path / "other", layers=2, seed=5)
    releases.damage(begun / FIRST)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(tmp_path / "other", begun, load_recipe(str(recipe)))


@pytest.mark.slow
def test_damage_of_a_guided_run_is_made_good(guided: faults.Suite, tmp_path: Path) -> None:
    model, recipe, wanted = guided.model, guided.recipe, guided.wanted
    out = shutil.copytree(guided.late, tmp_path / "out")
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
    _, recipe, _ = undisturbed
    checkpoints.tiny(tmp_path / "other", layers=2, seed=5)
    with pytest.raises(FourfoldError, match=r"layer 0.*not the bytes"):
        quantize(tmp_path / "other", begun, load_recipe(str(recipe)))


def test_restart_starts_over(undisturbed: Undisturbed, begun: Path) -> None:
    model, recipe, wanted = undisturbed
    (begun / "notes.md").write_text("mine")
    quantize(model, begun, load_recipe(str(recipe), ["scheme.signed=false"]), restart=True)
    assert (begun / "notes.md").read_text() == "mine"
    assert releases.tree(begun).keys() - {"notes.md"} == wanted.keys()
    clear(begun)
    assert {path.name for path in begun.iterdir()} == {"notes.md", ".fourfold"}


def test_finished_run_has_nothing_to_do(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _ = undisturbed
    out = model.parent / "whole"
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    summary = quantize(model, out, load_recipe(str(recipe)))
    assert summary.projections == 2 * 4 * 3
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    assert refusal(model, out, recipe, "solver.passes=1") == ["recipe: solver.passes is 1, was 2"]


def test_a_held_folder_is_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _ = undisturbed
    with hold(tmp_path / "out"), pytest.raises(FourfoldError, match=r"process \d+ on .* works on this OUT"):
        quantize(model, tmp_path / "out", load_recipe(str(recipe)))


def test_a_strange_folder_is_refused(undisturbed: Undisturbed, tmp_path: Path) -> None:
    model, recipe, _ = undisturbed
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FourfoldError, match="not empty and not an output of fourfold"):
        quantize(model, tmp_path, load_recipe(str(recipe)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]
    with pytest.raises(FourfoldError, match="MODEL folder itself"):
        quantize(model, model, load_recipe(str(recipe)))
