"""evaluate against whole models in transformers, against what quantize measured, and on what it must refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

import checkpoints
import releases
import rivals
import whole
from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.datatypes import FourfoldError
from fourfold.recipe import load_recipe
from fourfold.release import drafts
from fourfold.release.evaluate import Protocol, evaluate

WINDOWS, LENGTH = 4, 256
CHEAP = ("solver.passes=0", 'solver.scale="absmax"')
# of quantize's metrics.json
SECTIONS = {"measured_by", "protocol", "summary", "intervals", "by_entropy", "kl_histogram", "layers"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny(tmp_path_factory.mktemp("source") / "model", layers=2)


@pytest.fixture(scope="module")
def release(source: Path, recipe: Path) -> Path:
    """`source` quantized, as it was left by quantize: tests work on copies."""
    releases.run(source, source.parent / "release", load_recipe(str(recipe), CHEAP))
    return source.parent / "release"


@pytest.fixture(scope="module")
def example_release(example_model: Path, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "out"
    releases.run(example_model, out, load_recipe(str(recipe), CHEAP))
    return out


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts, "PROMPTS", 3)
    monkeypatch.setattr(drafts, "WRITTEN_TOKENS", 5)


@pytest.fixture
def out(release: Path, tmp_path: Path) -> Path:
    return shutil.copytree(release, tmp_path / "out")


def protocol(recipe: Path, *, drafts: bool = False) -> Protocol:
    """What the small recipe measured on."""
    return Protocol(text=recipe.parent / "heldout.txt", windows=2, length=128, drafts=drafts)


# ---- the figures


@pytest.mark.parametrize(
    ("dtype", "tight", "loose", "routed"), [(torch.float32, 5e-5, 1e-4, 1e-4), (torch.bfloat16, 2e-3, 5e-2, 0.2)]
)
def test_figures_are_those_of_whole_models(
    example_model: Path, example_release: Path, recipe: Path, dtype: torch.dtype, tight: float, loose: float,
    routed: float,
) -> None:  # fmt: skip
    """routed: of the mean KL, which a token moves by 5 % where BF16 routes it otherwise."""
    out, text = example_release, recipe.parent / "heldout.txt"
    asked = Protocol(text=text, windows=WINDOWS, length=LENGTH, drafts=False)
    found = evaluate(out, example_model, protocol=asked, dtype=dtype).to_json()
    tokens = AutoTokenizer.from_pretrained(example_model)(text.read_text(encoding="utf-8"), add_special_tokens=False)
    token_RT = torch.tensor(tokens.input_ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    model = AutoModelForImageTextToText.from_pretrained(example_model, dtype=dtype)
    before = whole.see(model, token_RT)
    whole.take_experts_(model, releases.tensors(out))
    after, summary = whole.see(model, token_RT), found["summary"]
    assert summary["perplexity_source"] == pytest.approx(before.perplexity, rel=tight)
    assert summary["perplexity_release"] == pytest.approx(after.perplexity, rel=tight)
    kl_P = (before.log_PV.exp() * (before.log_PV - after.log_PV)).sum(dim=1)
    assert summary["kl_mean"] == pytest.approx(kl_P.mean().item(), rel=routed)
    rounding = 3e-7  # of a position's sum in fp32, where the reference is float64
    assert summary["kl_median"] == pytest.approx(kl_P.quantile(0.5).item(), rel=2 * loose, abs=rounding)
    fives = (seen.log_PV.topk(5).indices.tolist() for seen in (before, after))
    shared = [len(set(ours) & set(theirs)) / 5 for ours, theirs in zip(*fives, strict=True)]
    assert summary["top5_agreement"] == pytest.approx(sum(shared) / len(shared), abs=5e-3)
    for row in found["layers"]:
        ours, theirs = (seen.hidden[row["layer"]].double() for seen in (before, after))
        assert row["hidden_error"] == pytest.approx(((theirs - ours).norm() / ours.norm()).item(), rel=loose)
    low, high = found["intervals"]["kl_mean"]
    assert low < summary["kl_mean"] < high
    assert sum(row["positions"] for row in found["by_entropy"]) == WINDOWS * (LENGTH - 1)
    assert sum(row["positions"] for row in found["kl_histogram"]) == WINDOWS * (LENGTH - 1)


def test_it_finds_what_quantize_measured(out: Path, source: Path, recipe: Path) -> None:
    """One sweep for both: the same windows give the same figures."""
    before = releases.read_json(out / "metrics.json")
    found = evaluate(out, source, protocol=protocol(recipe)).to_json()
    assert before["measured_by"] == "quantize" and found["measured_by"] == "evaluate"
    assert set(before) == SECTIONS | {"rtn"} and set(before) <= set(found) and found["rtn"] == before["rtn"]
    assert found["summary"] == pytest.approx(before["summary"], rel=1e-9)
    assert found["intervals"] == {name: pytest.approx(ends) for name, ends in before["intervals"].items()}
    assert found["layers"] == [pytest.approx(row) for row in before["layers"]]
    assert before["protocol"].items() <= found["protocol"].items()
    assert found == releases.read_json(out / "metrics.json")


def test_what_it_does_not_measure_is_kept(out: Path, source: Path, recipe: Path) -> None:
    tasks = {"lm_eval": "0.4", "tasks": {"gsm8k": {"figures": {"exact_match,none": 0.5}, "shots": 5, "samples": 9}}}

    def change(raw: dict[str, Any]) -> None:
        second = {key: raw[key] for key in ("summary", "layers")} | {"name": "old"}
        raw.update(tasks=tasks, against=second)

    checkpoints.edit_json(out / "metrics.json", change)
    found = evaluate(out, source, protocol=protocol(recipe)).to_json()
    assert found["tasks"] == tasks
    assert "against" not in found and found["drafts"] is None


def test_a_larger_measurement_stays(out: Path, source: Path, recipe: Path) -> None:
    """Of as many predictions or more it gives way; drafts that are not run are kept too."""
    rule = {"by_position": [0.5], "mean_length": 1.5, "interval": None}
    drafted = {"protocol": {}, "source": {"greedy": rule, "sampled": rule}, "release": None}
    checkpoints.edit_json(out / "metrics.json", lambda raw: raw.update(drafts=drafted))
    before = (out / "metrics.json").read_bytes()
    small = Protocol(text=recipe.parent / "heldout.txt", windows=3, length=64, drafts=False)
    with pytest.raises(FourfoldError) as raised:
        evaluate(out, source, protocol=small)
    assert str(raised.value).startswith(
        f"{out / 'metrics.json'}: measured on 2 windows of 128 tokens, 254 predictions; got 3 windows of 64, 189"
    )
    assert "--replace" in str(raised.value) and (out / "metrics.json").read_bytes() == before
    found = evaluate(out, source, protocol=replace(small, replace=True)).to_json()
    assert (found["summary"]["positions"], found["drafts"]) == (189, drafted)
    assert evaluate(out, source, protocol=replace(small, windows=4)).figures.positions == 252


def test_drafts_and_a_second_release(out: Path, source: Path, recipe: Path) -> None:
    """The source itself, as a release of another maker, has lost nothing; its draft head drafts the same."""
    found = evaluate(out, source, protocol=protocol(recipe, drafts=True), against=source).to_json()
    second = found["against"]
    assert (second["name"], second["calibration_overlap"]) == ("model", None)
    assert second["summary"]["kl_max"] == 0 and second["summary"]["perplexity_ratio"] == 1
    assert all(row["hidden_error"] == 0 and row["router_agreement"] == 1 for row in second["layers"])
    assert second["drafts"] == found["drafts"]["source"]
    assert found["drafts"]["release"]["positions"] == found["drafts"]["source"]["positions"] > 0
    assert found["drafts"]["protocol"]["steps"] == 3
    assert found["summary"]["kl_mean"] > 0


def test_releases_of_other_makers_are_kept_for_the_plot(out: Path, source: Path, recipe: Path, tmp_path: Path) -> None:
    """Each of the same weights; what was measured on other text is dropped."""
    figures = {}
    for kind in ("fp8-channel", "ct-nvfp4", "awq"):
        rivals.make(tmp_path / kind, kind, layers=2)
        found = evaluate(out, source, protocol=protocol(recipe), against=tmp_path / kind)
        assert found.against is not None and found.against.name == kind
        figures[kind] = found.against.figures.kl_mean
    stored = {path.name: sum(value.nbytes for value in releases.tensors(path).values()) for path in tmp_path.iterdir()}
    expected = [(kind, form, stored[kind], figures[kind]) for kind, form in zip(figures, ("FP8", "NVFP4", "AWQ"))]  # noqa: B905
    assert [(one.name, one.format, one.size_bytes, one.kl_mean) for one in found.rivals] == expected
    assert 0 < figures["fp8-channel"] < min(figures["ct-nvfp4"], figures["awq"])
    assert evaluate(out, source, protocol=protocol(recipe)).rivals == found.rivals
    other = replace(protocol(recipe), windows=1, replace=True)
    assert evaluate(out, source, protocol=other).rivals == []


def test_a_release_without_a_draft_head_is_measured_all_the_same(source: Path, recipe: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare")
    checkpoints.edit(bare, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("mtp.")])
    found = evaluate(bare, source, protocol=protocol(recipe, drafts=True)).to_json()
    assert found["drafts"]["release"] is None and found["drafts"]["source"]["positions"] > 0
    assert found["summary"]["kl_max"] == 0


def test_a_head_of_its_own_is_used(source: Path, recipe: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    checkpoints.edit(other, lambda tensors: tensors["lm_head.weight"].mul_(1.25))
    found = evaluate(other, source, protocol=protocol(recipe)).to_json()
    assert found["summary"]["kl_mean"] > 1e-3
    assert found["layers"][-1]["hidden_error"] == 0


# ---- text


def test_as_many_windows_as_the_text_has(out: Path, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text((TEXT / HELDOUT_TEXTS["wikitext-2-test"].file).read_text(encoding="utf-8")[:2000], encoding="utf-8")
    found = evaluate(out, source, protocol=Protocol(text=text, length=64, drafts=False)).to_json()
    assert 4 < found["protocol"]["windows"] == found["protocol"]["windows_available"] < 64
    with pytest.raises(FourfoldError, match=r"expected 64\. Try: smaller --windows or --length"):
        evaluate(out, source, protocol=Protocol(text=text, windows=64, length=64, drafts=False))


def test_text_that_was_calibrated_on_is_refused_however_it_is_cut(source: Path, recipe: Path, tmp_path: Path) -> None:
    words = (TEXT / "calibration" / "general.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in words]
    (tmp_path / "mine.txt").write_text("".join(texts)[:9000], encoding="utf-8")
    tokens = len(AutoTokenizer.from_pretrained(source)("".join(texts)[:9000]).input_ids)
    rows = tokens // 128
    sources = f'calibration.sources=[{{path="{tmp_path / "mine.txt"}", kind="text", fields=["text"], rows={rows}}}]'
    releases.run(source, tmp_path / "out", load_recipe(str(recipe), [*CHEAP, sources]))
    assert evaluate(tmp_path / "out", source, protocol=protocol(recipe)).calibration_overlap == 0
    before = (tmp_path / "out" / "metrics.json").read_bytes()
    cuts = {"same.txt": "".join(texts)[:9000], "moved.txt": "Some words before. " + "".join(texts)[:7000]}
    for name, text in cuts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        asked = Protocol(text=tmp_path / name, length=100, drafts=False)
        with pytest.raises(FourfoldError, match=rf"{name}: \d+% of this text was calibrated on.*--text"):
            evaluate(tmp_path / "out", source, protocol=asked)
    assert (tmp_path / "out" / "metrics.json").read_bytes() == before


# ---- what is refused


Change = Callable[[Path], object]


def _partial(out: Path) -> None:
    checkpoints.edit_json(out / "fourfold.json", lambda raw: raw.update(partial=True, layers="0-0"))


def _unfinished(out: Path) -> None:
    (out / "fourfold.json").unlink()


def _another_source(out: Path) -> None:
    checkpoints.edit_json(out / "fourfold.json", lambda raw: raw["source"].update(headers="f" * 64))


def _altered_router(out: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.language_model.layers.1.mlp.gate.weight"][0, 0] += 1

    checkpoints.edit(out, change)


def _no_shard(out: Path) -> None:
    next(out.glob("model-00001-of-*")).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_partial, "partial, a trial on layers 0-0"),
        (_unfinished, "not finished. Rerun the same `fourfold quantize` command to resume"),
        (_another_source, r"made from another source than .*ffff.*--source"),
        (_altered_router, r"layers\.1\.mlp\.gate\.weight is not that of .*model"),
        (_no_shard, "missing; is the download complete"),
        (lambda out: (out / "config.json").unlink(), "no config.json"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_what_is_no_release_of_the_source_is_refused(
    out: Path, source: Path, recipe: Path, change: Change, message: str
) -> None:
    change(out)
    with pytest.raises(FourfoldError, match=message):
        evaluate(out, source, protocol=protocol(recipe))


def test_a_second_release_is_checked_too(out: Path, source: Path, recipe: Path, tmp_path: Path) -> None:
    before = (out / "metrics.json").read_bytes()
    second = shutil.copytree(out, tmp_path / "second")
    _partial(second)
    with pytest.raises(FourfoldError, match="second: partial, a trial"):
        evaluate(out, source, protocol=protocol(recipe), against=second)
    assert (out / "metrics.json").read_bytes() == before


def test_a_text_of_another_kind_is_refused(out: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"words\.pdf: a text of kind \.jsonl, \.txt, \.parquet is wanted"):
        evaluate(out, source, protocol=Protocol(text=tmp_path / "words.pdf"))


def test_a_release_is_no_source_of_itself(out: Path, recipe: Path) -> None:
    with pytest.raises(FourfoldError, match="made from another source"):
        evaluate(out, out, protocol=protocol(recipe))
