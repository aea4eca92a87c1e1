"""Recipes: presets, files, overrides, and the message for everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold import formats
from fourfold import recipe as module
from fourfold.datatypes import FourfoldError
from fourfold.recipe import (
    AUTO,
    CHOICES,
    GROUP_SIZES,
    RANGES,
    Calibration,
    Guidance,
    Heldout,
    Recipe,
    Rest,
    Scheme,
    Solver,
    Source,
    dump_recipe,
    load_recipe,
    recipe_names,
    recipe_path,
    resize_calibration,
)
from fourfold.schema import keys

FOUR_SOURCES = (("general", 102), ("chat", 77), ("code", 51), ("math", 26))


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- presets


def test_presets_are_these() -> None:
    assert recipe_names() == ("best", "card", "compact", "compact-sglang", "fast", "gguf", "guided", "release")
    for name in recipe_names():
        assert load_recipe(name).name == recipe_path(name).stem == name
        assert load_recipe(name).description


def test_best_is_what_the_dataclasses_say_and_the_card_calibrates_on() -> None:
    best = load_recipe("best")
    assert (best.scheme, best.solver, best.guidance, best.heldout) == (Scheme(), Solver(), Guidance(), Heldout())
    assert best.format == Recipe().format == "compressed-tensors"
    assert [(source.builtin, source.rows) for source in best.calibration.sources] == [*FOUR_SOURCES]
    assert dataclasses.replace(best.calibration, sources=()) == Calibration()
    # NUMERICS.md, section 12, once more by hand: the defaults above must not drift along with the file
    assert Solver() == Solver(
        asymmetric=True, router_weighted=True, norm_power=0.5, pool=0.5, effective_tokens=True, trace_matched=True,
        pool_rows=2048, damp=0.05, damp_kind="diagonal", damp_floor=1e-4, order="activation", scale="search",
        scale_weights="conditional", scale_low=0.45, scale_high=1.15, scale_steps=36, passes=2, refine_scales=True,
        fallback_share=0.0,
    )  # fmt: skip
    assert Scheme() == Scheme(group_size="auto", signed=True, scale_dtype="bf16", tensor_parallel=1)


def test_fast_differs_from_best_in_one_field() -> None:
    best, fast = load_recipe("best"), load_recipe("fast")
    solver = dataclasses.replace(best.solver, asymmetric=False)
    assert fast == dataclasses.replace(best, solver=solver, name=fast.name, description=fast.description)


def test_guided_differs_from_best_in_guidance() -> None:
    best, guided = load_recipe("best"), load_recipe("guided")
    assert guided.guidance == Guidance(tokens=65_536, sites="both", damp=0.0)
    same = dataclasses.replace(best, guidance=guided.guidance, name=guided.name, description=guided.description)
    assert guided == same and guided.digest() != best.digest()


def test_guidance_that_is_off_is_no_part_of_a_recipe() -> None:
    """A change of guidance's keys leaves other runs their digest, by which they resume and are verified."""
    best = load_recipe("best", ["guidance.sites=down", "guidance.damp=0.1"])
    assert best.digest() == load_recipe("best").digest()
    assert not any(key.startswith("guidance") for key in best.values())
    assert "guidance" not in tomllib.loads(dump_recipe(load_recipe("best")))
    assert tomllib.loads(dump_recipe(load_recipe("guided")))["guidance"] == dataclasses.asdict(
        load_recipe("guided").guidance
    )
    assert (
        load_recipe("best", ["scheme.group_size=128"]).digest()
        == "43d9c7f42e1d5a9e4e173eec1c2456f75993de747bf928dd07fdb8e7fee6ed9c"
    )


def test_routing_is_part_of_a_recipe_where_it_is_on() -> None:
    """Runs without it keep the digest that they were started with."""
    plain, routing = (load_recipe("guided", [f"guidance.routing={value}"]) for value in ("false", "true"))
    assert "guidance.routing" not in plain.values() and routing.values()["guidance.routing"] is True
    assert plain.digest() != routing.digest()
    assert load_recipe("best", ["guidance.routing=true"]).digest() == load_recipe("best").digest()


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("guidance.sites=up", r"guidance.sites.*'up'.*one of 'both', 'down'"),
        ("guidance.tokens=-1", r"guidance.tokens.*a number from 0"),
        ("guidance.damp=2", r"guidance.damp.*a number from 0 to 1"),
        ("guidance.tokens=many", r"guidance.tokens.*many"),
        ("guidance.token=1", r"guidance.tokens"),
        ("guidance.routing=maybe", r"guidance.routing.*'maybe'.*true or false"),
        ("guidance.routing=1", r"guidance.routing.*1.*true or false"),
    ],
)
def test_guidance_that_is_wrong(override: str, wanted: str) -> None:
    with pytest.raises(FourfoldError, match=wanted):
        load_recipe("guided", [override])


def test_card_is_the_reference() -> None:
    card = load_recipe("card")
    assert (card.format, card.scheme) == ("gptq_v2", Scheme(group_size=128, signed=False, scale_dtype="fp16"))
    solver = card.solver
    assert not (solver.asymmetric or solver.router_weighted or solver.effective_tokens or solver.refine_scales)
    assert (solver.pool, solver.norm_power, solver.passes, solver.fallback_share) == (0, 0, 0, 0.005)
    assert (solver.damp, solver.damp_kind, solver.order, solver.scale) == (0.05, "mean", "group-aware", "absmax")
    assert card.calibration == load_recipe("best").calibration


def test_release_is_best_on_licensed_training_splits_of_many_languages() -> None:
    best, release = load_recipe("best"), load_recipe("release")
    same = ("format", "scheme", "solver", "heldout")
    assert all(getattr(best, name) == getattr(release, name) for name in same)
    sources = release.calibration.sources
    tokens = sum(source.rows for source in sources) * release.calibration.length
    assert tokens * 8 / 256 / 2048 >= 16  # per expert and input of gate and up: top 8 of 256 experts, hidden size 2,048
    assert all(source.licence and source.split.startswith("train") for source in sources)
    assert not release.calibration.allow_test_sets
    languages = {source.config.removeprefix("20231101.") for source in sources if "wikipedia" in source.dataset}
    assert len(languages) >= 10


def test_presets_write_every_key_out() -> None:
    for name in recipe_names():
        table = tomllib.loads(recipe_path(name).read_text(encoding="utf-8"))
        assert set(table) == {field.name for field in dataclasses.fields(Recipe)}
        assert set(table["solver"]) == {field.name for field in dataclasses.fields(Solver)}
        assert set(table["scheme"]) == {field.name for field in dataclasses.fields(Scheme)}
        assert set(table["scheme"]["rest"]) == {field.name for field in dataclasses.fields(Rest)}


def test_reading_recipes_needs_no_torch() -> None:
    code = (
        "import sys; from fourfold.recipe import load_recipe; load_recipe('release');"
        "print([name for name in ('torch', 'transformers', 'datasets', 'numpy') if name in sys.modules])"
    )
    source = str(Path(module.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


# ---- files


def test_what_a_file_leaves_out_is_as_in_best(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "solver.damp = 0.1"))
    best = load_recipe("best")
    changed = dataclasses.replace(best.solver, damp=0.1)
    assert recipe == dataclasses.replace(best, name="mine", description="", solver=changed)


def test_relative_paths_count_from_the_files_folder_and_in_overrides_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = '[heldout]\npath = "held.txt"\n[[calibration.sources]]\npath = "texts/a.jsonl"\nrows = 1\n'
    path = written(tmp_path, text + '[[calibration.sources]]\npath = "/texts/b.txt"\nrows = 1\n')
    recipe = load_recipe(path)
    assert [source.path for source in recipe.calibration.sources] == [f"{tmp_path}/texts/a.jsonl", "/texts/b.txt"]
    assert (recipe.heldout.path, recipe.heldout.builtin) == (f"{tmp_path}/held.txt", "")
    moved = load_recipe(path, ["calibration.sources.0.path=c.jsonl"])
    assert moved.calibration.sources[0].path == f"{tmp_path}/elsewhere/c.jsonl"


def test_chat_without_fields_reads_messages(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, '[[calibration.sources]]\npath = "a.jsonl"\nkind = "chat"\nrows = 1'))
    assert recipe.calibration.sources[0].fields == ("messages",)


def test_builtin_sources_take_their_facts_from_the_text() -> None:
    by_name = {source.builtin: source for source in load_recipe("best").calibration.sources}
    assert (by_name["chat"].kind, by_name["chat"].fields, by_name["chat"].licence) == ("chat", ("messages",), "MIT")
    assert by_name["math"].fields == ("problem", "solution")


# ---- overrides


def test_overrides_are_toml_or_plain_text() -> None:
    recipe = load_recipe(
        "best",
        ["solver.damp=0.02", "solver.order = group-aware", 'format="gptq"', "scheme.signed=false",
         "calibration.sources.3.rows=2", "calibration.sources.0.builtin=code",
         "calibration.sources.2.path=/a.jsonl", "heldout.path=/held.txt"],
    )  # fmt: skip
    assert (recipe.solver.damp, recipe.solver.order, recipe.format) == (0.02, "group-aware", "gptq")
    assert not recipe.scheme.signed
    sources = recipe.calibration.sources
    assert (sources[3].rows, sources[0].builtin, sources[2].builtin, sources[2].path) == (2, "code", "", "/a.jsonl")
    assert recipe.heldout == Heldout(builtin="", path="/held.txt")


def test_another_text_does_not_keep_the_licence_of_the_one_before() -> None:
    source = load_recipe("release", ["calibration.sources.1.dataset=a/b"]).calibration.sources[1]
    assert source == Source(rows=8, dataset="a/b")


def test_an_override_can_replace_all_sources() -> None:
    recipe = load_recipe("best", ["calibration.sources = [{ path = '/a.txt', rows = 3 }]"])
    assert recipe.calibration.sources == (Source(path="/a.txt", rows=3),)


# ---- what can be wrong

SOURCE = "[[calibration.sources]]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("solver.dmap = 0.1", "unknown key 'solver.dmap'. Did you mean 'solver.damp'?"),
        ("dmap = 0.1", "unknown key 'dmap'"),
        ("solver.alpha = 1.0", "unknown key 'solver.alpha'"),
        ("solver.residual = true", "unknown key 'solver.residual'"),
        ("damp = 0.1", "unknown key 'damp'. Did you mean 'solver.damp'?"),
        ("solver.group_size = 64", "unknown key 'solver.group_size'. Did you mean 'scheme.group_size'?"),
        ("[sovler]\ndamp = 0.1", "unknown key 'sovler'. Did you mean 'solver'?"),
        (SOURCE + 'builtin = "math"\nrow = 1', "unknown key 'calibration.sources[0].row'. Did you mean"),
        ("solver = 3", "solver: got 3, expected a table"),
        ("solver.damp.a = 3", "solver.damp: got {'a': 3}, expected a number"),
        ("calibration = 3", "calibration: got 3, expected a table"),
        ("calibration.sources = 3", "calibration.sources: got 3, expected an array"),
        ("calibration.sources = [3]", "calibration.sources[0]: got 3, expected a table"),
        ('solver.damp = "much"', "solver.damp: got 'much', expected a number"),
        ("solver.passes = 1.5", "solver.passes: got 1.5, expected a whole number"),
        ("solver.passes = true", "solver.passes: got true, expected a whole number"),
        ("solver.asymmetric = 1", "solver.asymmetric: got 1, expected true or false"),
        ("format = 4", "format: got 4, expected text in quotes"),
        ("solver.damp = nan", "solver.damp: got nan, expected a number from 0 to 1"),
        ("solver.damp = -0.1", "solver.damp: got -0.1, expected a number from 0 to 1"),
        ("solver.norm_power = 1" + "0" * 400, "solver.norm_power: got 10000"),
        ("solver.norm_power = 3", "solver.norm_power: got 3.0, expected a number from 0 to 2"),
        ("calibration.length = 1", "calibration.length: got 1, expected a number from 2 to 1048576"),
        ("scheme.group_size = 48", "scheme.group_size: got 48, expected one of 'auto', 128, 64, 32"),
        ('format = "gptqv2"', "expected one of 'compressed-tensors', 'gptq', 'gptq_v2'. Did you mean 'gptq_v2'?"),
        ("solver.scale_low = 2", "solver.scale_low: got 2.0, expected at most scale_high = 1.15"),
        ("calibration.sources = []", "calibration.sources: got [], expected at least one source"),
        (SOURCE + "rows = 1", "calibration.sources[0]: got no origin, expected one of builtin, path, dataset"),
        (SOURCE + 'rows = 1\nbuiltin = "math"\npath = "a.txt"', "got builtin and path, expected one of"),
        (SOURCE + 'rows = 0\nbuiltin = "math"', "calibration.sources[0].rows: got 0, expected a number from 1 to"),
        (
            SOURCE + 'rows = 1\nbuiltin = "maths"',
            "builtin: got 'maths', expected one of general, chat, code, math. Did you mean 'math'?",
        ),
        (SOURCE + 'rows = 1\nbuiltin = "wikitext-2-test"', "That text is held out and never calibrated on"),
        (SOURCE + 'rows = 1\nbuiltin = "code"\nfields = ["text"]', "expected 'text' and ['content'], as"),
        (2 * (SOURCE + 'rows = 1\nbuiltin = "code"\n'), "calibration.sources[1]: reads the same text as"),
        (SOURCE + 'rows = 1\npath = "a.csv"', "expected a file of kind .jsonl, .txt, .parquet"),
        (SOURCE + 'rows = 1\npath = "a.txt"\nkind = "chat"', "expected a .jsonl or .parquet file, as kind is 'chat'"),
        (SOURCE + 'rows = 1\npath = "a.jsonl"\nconfig = "en"', "expected it with a dataset only"),
        (SOURCE + 'rows = 1\npath = "a.jsonl"\nfields = []', "fields: got [], expected at least one name"),
        (SOURCE + 'rows = 1\npath = "a.jsonl"\nfields = ["a", "b"]\nkind = "chat"', "expected the one field"),
        (SOURCE + 'rows = 1\npath = "a.jsonl"\nkind = "chats"', "kind: got 'chats', expected one of 'text', 'chat'"),
        (SOURCE + 'rows = 1\ndataset = "a/b"\nsplit = ""', "split: got ''"),
        ('[heldout]\nbuiltin = "wikitext"', "heldout.builtin: got 'wikitext', expected one of wikitext-2-test, chat"),
        ('[heldout]\nbuiltin = ""', "heldout: got builtin '' and path '', expected one of them"),
        ('[heldout]\npath = "a.csv"', "expected a file of kind .jsonl, .txt, .parquet"),
        ("solver.damp =", "not TOML: Invalid value (at end of document)"),
    ],
)
def test_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FourfoldError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"recipe {path}: ")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("solver.damp", "--set solver.damp: expected KEY=VALUE"),
        ("solver..damp=1", "expected KEY=VALUE"),
        ("=1", "expected KEY=VALUE"),
        ("solver.dmap=0.1", "--set solver.dmap=0.1: unknown key 'solver.dmap'. Did you mean 'solver.damp'?"),
        ("solver.damp.more=1", "--set solver.damp.more=1: solver.damp is not a table of the recipe"),
        ("solver.damp.even.more=1", "--set solver.damp.even.more=1: the recipe has no solver.damp.even"),
        ("calibration.sources.7.rows=1", "the recipe has no calibration.sources.7"),
        ("calibration.sources.first.rows=1", "the recipe has no calibration.sources.first"),
        ("solver.damp=1\nname=2", "solver.damp: got '1\\nname=2', expected a number"),
    ],
)
def test_one_clear_error_for_an_override(override: str, said: str) -> None:
    with pytest.raises(FourfoldError) as caught:
        load_recipe("best", [override])
    assert said in str(caught.value)


def test_what_was_typed_is_named_not_a_file_of_the_package() -> None:
    for preset, override in (("best", "solver.pases=3"), ("fast", "heldout.windows=0"), ("card", "format=4")):
        with pytest.raises(FourfoldError) as caught:
            load_recipe(preset, ["solver.damp=0.1", override])
        assert str(caught.value).startswith(f"--set {override}: ")
        assert "fourfold/recipes" not in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "rows"),
    [
        (256, [102, 77, 51, 26]),
        (128, [51, 39, 25, 13]),  # 51, 38.5, 25.5, 13: of equal remainders the first
        (512, [204, 154, 102, 52]),
        (3, [1, 1, 1]),
        (1, [1]),
    ],
)
def test_samples_keep_the_proportions_of_the_sources(tmp_path: Path, samples: int, rows: list[int]) -> None:
    best = load_recipe("best")
    recipe = resize_calibration(best, samples, 2048)
    assert [source.rows for source in recipe.calibration.sources] == rows
    assert sum(rows) == samples
    assert recipe.calibration.length == 2048
    assert recipe.digest() != best.digest()
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe  # as OUT/recipe.toml has it
    assert resize_calibration(best, None, None) == best


@pytest.mark.parametrize(
    ("samples", "length", "said"),
    [(0, None, "samples: got 0, expected 1 to 16,777,216"), (None, 1, "sequence_length: got 1, expected 2 to ")],
)
def test_sizes_out_of_range(samples: int | None, length: int | None, said: str) -> None:
    with pytest.raises(FourfoldError, match=said):
        resize_calibration(load_recipe("best"), samples, length)


def test_unknown_names_get_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"'bset', expected a preset \(best, .* file\. Did you mean 'best'\?"):
        load_recipe("bset")
    with pytest.raises(FourfoldError, match=r"none\.toml', expected a preset \(best, card, .*\.toml file\.$"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(FourfoldError, match=r"latin\.toml: not TOML"):
        load_recipe(str(tmp_path / "latin.toml"))


def test_every_rule_names_a_field() -> None:
    homes = {"scheme": Scheme, "scheme.rest": Rest, "solver": Solver, "calibration": Calibration,
             "calibration.sources": Source, "guidance": Guidance, "heldout": Heldout, "": Recipe}  # fmt: skip
    for rule in (*CHOICES, *RANGES):
        home, _, name = rule.rpartition(".")
        assert name in {field.name for field in dataclasses.fields(homes[home])}, rule
    for key, hint in keys(Recipe):  # a number without a range would let nonsense through
        assert hint not in (int, float), key
    assert CHOICES["format"] == formats.NAMES
    assert CHOICES["scheme.group_size"] == (AUTO, *GROUP_SIZES)


# ---- writing and naming


@pytest.mark.parametrize("name", ["best", "card", "fast", "guided", "release"])
def test_dump_reads_back_equal(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, ["heldout.path=held.txt", "calibration.sources.1.path=b.parquet"])
    text = dump_recipe(recipe)
    again = load_recipe(written(tmp_path, text))
    assert again == recipe and again.digest() == recipe.digest() and dump_recipe(again) == text
    assert text.count("[[calibration.sources]]") == len(recipe.calibration.sources)
    assert set(tomllib.loads(text)["solver"]) == {field.name for field in dataclasses.fields(Solver)}


numbers = {name: st.floats(low, high) for name, (low, high) in RANGES.items()}
solvers = st.builds(
    Solver,
    asymmetric=st.booleans(), norm_power=numbers["solver.norm_power"], pool=numbers["solver.pool"],
    damp=numbers["solver.damp"], damp_floor=numbers["solver.damp_floor"], passes=st.integers(0, 64),
    order=st.sampled_from(CHOICES["solver.order"]), fallback_share=numbers["solver.fallback_share"],
)  # fmt: skip
printable = st.text(st.characters(codec="utf-8"), max_size=30)
sources = st.lists(
    st.builds(Source, rows=st.integers(1, 9), dataset=printable.filter(bool), config=printable, split=st.just("train"),
              licence=printable, fields=st.lists(printable.filter(bool), min_size=1, max_size=3).map(tuple)),
    min_size=1, max_size=4, unique_by=lambda source: (source.dataset, source.config, source.fields),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(solver=solvers, sources=sources, name=printable, description=printable)
def test_any_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, solver: Solver, sources: list[Source], name: str, description: str
) -> None:
    recipe = Recipe(name=name, description=description, solver=solver, calibration=Calibration(sources=tuple(sources)))
    path = written(tmp_path_factory.mktemp("any"), dump_recipe(recipe))
    assert load_recipe(path) == recipe and load_recipe(path).digest() == recipe.digest()


def test_digest_names_the_work_not_the_recipe() -> None:
    best = load_recipe("best")
    assert best.digest() == dataclasses.replace(best, name="other", description="other").digest()
    whole = dataclasses.replace(best.solver, fallback_share=0)  # not 0.0
    assert best.digest() == dataclasses.replace(best, solver=whole).digest()
    digests = {load_recipe(name).digest() for name in recipe_names()}
    for override in ("solver.damp=0.06", "scheme.signed=false", "calibration.seed=1", "heldout.windows=8",
                     "calibration.sources.0.rows=103", "format=gptq", "scheme.rest.head=int8"):  # fmt: skip
        digests.add(load_recipe("best", [override]).digest())
    assert len(digests) == len(recipe_names()) + 7
    assert all(len(digest) == 64 for digest in digests)
