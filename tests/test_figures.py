"""Figures in README and docs are what benchmarks/results say, and predictions among them are what the plan predicts."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import ROOT
from deployments import OURS, gpus
from fourfold.formats import named
from fourfold.recipe import CHOICES
from fourfold.serve.command import Deployment, build
from fourfold.serve.engines import ENGINES, version_text

RESULTS = ROOT / "benchmarks" / "results"
UNITS = "[GMK]i?B|s|seconds?|minutes?|hours?|nats|times|tokens|samples"
# A number with a unit, or with a decimal point; not within a name such as Qwen3.6-35B.
FIGURE = re.compile(rf"(?<![\w.-])(?:\d[\d,.]* ?(?:%|(?:{UNITS})\b)|\d+\.\d+(?!\.?\d|\w))")
CARD, PYTHON = {"12 GB": "the card's name"}, {"3.11": "Python's version"}
ALLOWED = {  # page: figures of its prose that no result holds, with what they are
    "README.md": PYTHON | {"24 GB": "the card's name"},
    "docs/index.md": CARD,
    "docs/tutorial.md": CARD | PYTHON | {"2,048 tokens": "a size of the recipe"},
    "docs/measured.md": {},
    "docs/how-to/12-gb-cards.md": CARD,
    "docs/how-to/guided.md": {"32 tokens": "a limit of the code"},
    "docs/scale.md": CARD
    | {
        "64 MB": "a limit of the code",
        "20 times": "a limit of the code",
        "10 minutes": "a goal",
        "1.5": "required of a prediction",
    }
    | dict.fromkeys(("1.8 times", "1.7 times"), "required of a measurement")
    | dict.fromkeys(("1024 tokens", "8.8 GB", "16 samples"), "a size that was chosen"),
}


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """docs/figures.py; what it has read is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    figures = importlib.import_module("figures")
    yield figures
    figures.result.cache_clear()


@pytest.fixture
def page(docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of README and of the results, which `--check` then looks at alone."""
    shutil.copytree(RESULTS, tmp_path / "results")
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    picture, draw = next(iter(docs.PICTURES.items()))
    shutil.copyfile(picture, tmp_path / picture.name)
    pages, pictures = [tmp_path / "README.md"], {tmp_path / picture.name: draw}
    for name, value in (("ROOT", tmp_path), ("PAGES", pages), ("PICTURES", pictures)):
        monkeypatch.setattr(docs, name, value)
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["figures.py", "--check"])
    docs.result.cache_clear()
    return tmp_path / "README.md"


def test_pages_say_what_the_results_say(docs: Any) -> None:
    assert sum(text.count("<!-- figures:") for text in (path.read_text(encoding="utf-8") for path in docs.PAGES)) > 25
    for path in docs.PAGES:
        text = path.read_text(encoding="utf-8")
        assert docs.rewritten(text, path.name) == text, f"{path.name}: run `make figures`"


def test_a_changed_digit_of_a_page_fails(docs: Any, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs.main()
    text = page.read_text(encoding="utf-8")
    changed = re.sub(r"(fourfold `best` \| \d\.\d)(\d)", lambda digit: f"{digit[1]}{(int(digit[2]) + 1) % 10}", text)
    page.write_text(changed, encoding="utf-8")
    with pytest.raises(SystemExit, match="make figures"):
        docs.main()
    assert "-| fourfold `best` |" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8") == changed, "--check writes nothing"


def test_a_changed_result_fails_and_is_written(docs: Any, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = page.parent / "results" / "quality_peers.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    row = next(row for row in result["means"] if (row["method"], row["tokens"]) == ("guided", 65_536))
    row["kl_mean"] = 0.00123
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(SystemExit, match="make figures"):
        docs.main()
    monkeypatch.setattr("sys.argv", ["figures.py"])
    docs.main()
    assert "fourfold `guided` | 1.23 |" in page.read_text(encoding="utf-8")


def test_the_plot_has_what_the_results_say(docs: Any, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots, picture = importlib.import_module("plots"), next(iter(docs.PICTURES))
    points = re.findall(r'aria-label="calibration tokens: (\d+); [^:]+: ([\d.]+); method: ', picture.read_text("utf-8"))
    expected = [by_tokens for name in plots.CURVES for by_tokens in docs.curves(name).values()]
    pairs = {(tokens, round(1e3 * value, 2)) for by_tokens in expected for tokens, value in by_tokens.items()}
    assert len(pairs) > 20 and {(int(tokens), float(value)) for tokens, value in points} == pairs
    path = page.parent / "results" / "quality_256k.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["means"][0]["kl_mean"] *= 2
    path.write_text(json.dumps(result), encoding="utf-8")
    docs.result.cache_clear()
    with pytest.raises(SystemExit, match="make figures"):
        docs.main()
    assert f"{picture.name}: drawn from other results" in capsys.readouterr().out


def test_another_model_is_another_entry(docs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In README's results: with columns of its own, and what its figures hold for."""
    monkeypatch.setattr(docs, "MODELS", {"quality": "example model", "quality_deep": "16 layers"})
    monkeypatch.setattr(docs, "METHODS", {"fast": "fast", "best": "best"})
    header, _, first, *_ = docs.readme().splitlines()
    assert "| 16 layers: mean KLD (x 10^-3 nats) |" in header and header.count("|") == first.count("|") == 8
    assert "16 layers: 16 layers, 8 experts;" in docs.readme()


def test_real_model_has_a_table_for_each_text_that_was_measured(docs: Any, page: Path) -> None:
    results = page.parent / "results"
    for path in results.glob("quality_real*.json"):
        path.unlink()
    assert docs.real() == "Not measured yet: `make bench-real`."
    shutil.copyfile(results / "quality.json", results / "quality_real.json")
    shutil.copyfile(results / "quality_deep.json", results / "quality_real_chat.json")
    prose, measured, chat, _ = docs.real().split("\n\n")
    header, _, *rows = prose.splitlines()
    assert header.startswith("| prose | mean KLD, 4k / 16k / 64k tokens |")
    assert {row.count("|") for row in rows} == {header.count("|")} == {10}
    assert "24,528 held-out predictions" in measured and "`benchmarks/results/quality_real.json`" in measured
    assert chat.startswith("| chat |")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <!-- figures: nothing -->1<!-- end -->", "got 'nothing', expected one of .*readme"),
        ("a <!-- figures: share guided best -->1", "without its pair"),
        ("one\n<!-- figures: share guided best -->1<!-- end --> two", "begins a line"),
        ("a <!-- figures: share guided worst -->1<!-- end -->", "quality.json: got no 'worst' with 65,536 tokens, "),
    ],
)
def test_wrong_markers_are_named(docs: Any, text: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        docs.rewritten(text, "page.md")


@pytest.mark.parametrize("name", ALLOWED)
def test_prose_has_no_figure_of_its_own(docs: Any, name: str) -> None:
    """Outside code, comments and links, a figure stands between markers or in ALLOWED."""
    text = docs.MARKED.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for left_out in (r"^```.*?^```$", r"<!--.*?-->", r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(left_out, "", text, flags=re.MULTILINE | re.DOTALL)
    assert set(FIGURE.findall(text)) == set(ALLOWED[name])


def test_results_are_named_and_made_by_a_command(docs: Any) -> None:
    """docs.commands() fails for a file without a command; here, for a page that names a file that is not there."""
    assert set(docs.commands()) == {path.name for path in RESULTS.glob("*.json")}
    for path in [*docs.PAGES, ROOT / "CONTRIBUTING.md"]:
        named = re.findall(r"results/(\w+\.\w+)", path.read_text(encoding="utf-8"))
        missing = [name for name in named if not (RESULTS / name).exists() and "_cuda" not in name]  # those are to come
        assert not missing, path.name


@pytest.fixture(scope="module")
def predictions() -> Iterator[Any]:
    """benchmarks/predictions.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("predictions")


def test_predictions_are_what_the_plan_predicts(predictions: Any) -> None:
    """benchmarks/results/predictions.json is of this code and of the other committed results."""
    committed = json.loads((RESULTS / "predictions.json").read_text(encoding="utf-8"))
    assert list(predictions.predict()) == committed["predictions"], "run `make figures`"
    assert list(predictions.check()) == committed["checks"], "run `make figures`"


def test_predictions_are_near_the_measurements(predictions: Any) -> None:
    rows = json.loads((RESULTS / "predictions.json").read_text(encoding="utf-8"))["checks"]
    assert {row["file"].removesuffix(".json") for row in rows} == predictions.CHECKS.keys() and len(rows) == 11
    far = {row["what"]: row["ratio"] for row in rows if not 1 / 1.5 <= row["predicted"] / row["measured"] <= 1.5}
    assert not far


def test_pictures_show_the_example_as_measured(docs: Any) -> None:
    run = json.loads((RESULTS / "example.json").read_text(encoding="utf-8"))["runs"][0]
    shown = [(ROOT / "docs/images/quantize.svg").read_text(encoding="utf-8").replace("&#160;", " ")]
    for screen in ("desktop", "phone"):
        shown.append(Image.open(ROOT / "docs" / "images" / f"report-{screen}.png").info.get("Description", ""))
    for figure in importlib.import_module("results").headline(run["metrics"]):
        assert all(figure.removesuffix(" nats") in text for text in shown), figure


def test_formats_of_the_readme_are_those_of_the_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, *rows = text[text.index("| format |") :].partition("\n\n")[0].splitlines()
    for engine in ENGINES.values():
        assert f"| {engine.title} {', '.join(map(version_text, engine.known))} |" in head
    cells = {row.split("`")[1]: [cell.strip() for cell in row.split("|")[2:5]] for row in rows}
    assert tuple(cells) == CHOICES["format"]
    for format, (*marks, transformers) in cells.items():
        for engine, mark in zip(ENGINES, marks, strict=True):
            found = build(replace(OURS, format=named(format)), gpus(1, 141), Deployment(engine=engine))
            drafts = ENGINES[engine].flag("drafts", found.version) in found.text()
            assert not found.problems and mark == ("✅" if drafts else "✅ no drafts"), (format, engine)
        assert transformers == ("✅" if named(format).transformers_loads else "❌")
