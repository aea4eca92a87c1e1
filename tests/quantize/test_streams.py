"""What a run measures on its way is what transformers' whole models give, and what it logs is what it wrote."""

from __future__ import annotations

import csv
import gc
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

import checkpoints
import releases
import whole
from fourfold.bundled import CALIBRATION_TEXTS
from fourfold.distributed.devices import Machine
from fourfold.distributed.team import Team, alone
from fourfold.distributed.workers import Worker
from fourfold.model.checkpoint import Checkpoint
from fourfold.quantize.streams import embed, embedded, embeddings
from fourfold.recipe import Recipe, load_recipe
from fourfold.records.release import Reference
from fourfold.records.results import Status
from fourfold.release.verify.vllm import check_reference

PREFIX = "model.language_model."
WINDOWS, LENGTH = 8, 256
BUILTINS = range(len(CALIBRATION_TEXTS))
COLUMNS = ["layer", "expert", "projection", "method", "weight_error", "relative_error", "error_over_rtn", "target",
           "gptqmodel_loss", "tokens",
           "effective_tokens", "damping", "passes", "scale_min", "scale_max", "scale_negative_share",
           "seconds"]  # fmt: skip
MakeRecipe = Callable[..., Recipe]
Log = list[dict[str, str]]


# --- the example, against whole models ------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    metrics: dict[str, Any]
    reference: Reference
    source: whole.Seen
    release: whole.Seen
    misread: whole.Seen


@pytest.fixture(scope="module")
def compared(example_model: Path, small: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """metrics.json and reference.json of the example's release, and both whole models in transformers on the same
    windows; misread: the release with zero points read one too low, on the reference's text.
    """
    out = tmp_path_factory.mktemp("example") / "out"
    recipe = small(f"heldout.windows={WINDOWS}", f"heldout.length={LENGTH}", "solver.passes=0", 'solver.scale="absmax"')
    releases.run(example_model, out, recipe)
    text = Path(recipe.heldout.path).read_text(encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(example_model)(text, add_special_tokens=False).input_ids
    token_RT = torch.tensor(tokens[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    model = AutoModelForImageTextToText.from_pretrained(example_model, dtype=torch.bfloat16)
    source = whole.see(model, token_RT)
    found, figures = releases.tensors(out), releases.read_json(out / "metrics.json")
    reference = Reference.find(out / "reference.json")
    assert reference is not None
    whole.take_experts_(model, found)
    release = whole.see(model, token_RT)
    raised = {name: releases.raise_codes(value) for name, value in found.items() if name.endswith("weight_packed")}
    whole.take_experts_(model, found | raised)
    return Compared(figures, reference, source, release, whole.see(model, torch.tensor([reference.tokens])))


def test_perplexities_are_those_of_the_whole_models(compared: Compared) -> None:
    summary = compared.metrics["summary"]
    assert summary["positions"] == WINDOWS * (LENGTH - 1)
    assert summary["perplexity_source"] == pytest.approx(compared.source.perplexity, rel=0.002)
    assert summary["perplexity_release"] == pytest.approx(compared.release.perplexity, rel=0.002)
    assert summary["perplexity_ratio"] == summary["perplexity_release"] / summary["perplexity_source"]


def test_divergence_is_that_of_the_whole_models(compared: Compared) -> None:
    summary, source_PV, release_PV = compared.metrics["summary"], compared.source.log_PV, compared.release.log_PV
    kl_P = (source_PV.exp() * (source_PV - release_PV)).sum(dim=1)
    assert summary["kl_mean"] == pytest.approx(kl_P.mean().item(), rel=0.1)  # a token routed otherwise is 5 % of it
    assert summary["kl_median"] == pytest.approx(kl_P.median().item(), rel=0.1)
    same_P = source_PV.argmax(dim=1) == release_PV.argmax(dim=1)
    assert summary["top1_agreement"] == pytest.approx(same_P.double().mean().item(), abs=0.01)
    entropy = -(source_PV.exp() * source_PV).sum(dim=1).mean().item()
    assert summary["entropy_source"] == pytest.approx(entropy, rel=0.002)


def test_drift_of_each_layer_is_that_of_the_whole_models(compared: Compared) -> None:
    drifts = compared.metrics["layers"]
    assert [drift["layer"] for drift in drifts] == [0, 1, 2, 3]
    assert drifts[0]["router_agreement"] == 1, "both streams are one until the first layer's experts"
    for drift in drifts:
        layer = drift["layer"]
        source, release = (seen.hidden[layer].double() for seen in (compared.source, compared.release))
        assert drift["hidden_error"] == pytest.approx(((release - source).norm() / source.norm()).item(), rel=0.05)
        source, release = (seen.chosen[layer] for seen in (compared.source, compared.release))
        shared = (source[:, :, None] == release[:, None, :]).any(dim=2).double().mean().item()
        assert drift["router_agreement"] == pytest.approx(shared, abs=0.01)
        assert 0 < drift["hidden_error"] < 0.2 and drift["router_agreement"] > 0.9


def test_protocol_says_how_it_was_measured(compared: Compared) -> None:
    protocol = compared.metrics["protocol"]
    assert (protocol["windows"], protocol["window"], protocol["predictions_per_window"]) == (WINDOWS, LENGTH, 255)
    assert not protocol["bos"] and protocol["windows_available"] >= WINDOWS


# --- what engines are compared with ---------------------------------------------------------------


def test_reference_is_what_the_whole_release_gives(compared: Compared) -> None:
    """The windows are longer than the reference: what comes after a token does not reach back."""
    reference, last = compared.reference, 63
    text_P = compared.release.next_P[:last]
    assert reference.tokens[1:] == text_P.tolist() and len(reference.tokens) == 64
    log_PV = compared.release.log_PV[:last]
    found_P = torch.tensor(reference.logprobs, dtype=torch.float64)
    error_P = (found_P - log_PV.gather(1, text_P[:, None])[:, 0]).abs()
    assert error_P.mean() < 0.01 and error_P.max() < 0.1  # BF16, in batches of other shapes
    token_PL, value_PL = torch.tensor(reference.likeliest), torch.tensor(reference.likeliest_logprobs)
    assert token_PL.shape == value_PL.shape == (last, 20)
    assert (value_PL.diff(dim=1) <= 0).all() and (value_PL.double().exp().sum(dim=1) < 1).all()
    assert (value_PL - log_PV.gather(1, token_PL)).abs().mean() < 0.01
    best_PL = log_PV.topk(20, dim=1).indices
    assert (best_PL[:, 0] == token_PL[:, 0]).double().mean() > 0.95
    assert (best_PL[:, :, None] == token_PL[:, None, :]).any(dim=2).double().mean() > 0.95
    # It is the release's, not the source's.
    away_P = (found_P - compared.source.log_PV[:last].gather(1, text_P[:, None])[:, 0]).abs()
    assert away_P.mean() > 3 * error_P.mean()


def answer(seen: whole.Seen, reference: Reference) -> dict[str, Any]:
    """As an engine without noise would say what a whole model makes of the reference's text."""
    log_PV = seen.log_PV[: len(reference.logprobs)]
    scored = log_PV.gather(1, torch.tensor(reference.tokens[1:])[:, None])[:, 0].tolist()
    best = log_PV.topk(20, dim=1).indices.tolist()
    quiet = {"logprobs": [[-1.0]], "logprobs_again": [[-1.0]]}
    return {"prompt_logprobs": [[-1.0], scored], "prompt_likeliest": [[[0]], best]} | quiet


def test_an_engine_that_reads_zero_points_as_another_format_fails(compared: Compared) -> None:
    """By the stored reference alone, without the source; one that reads them right passes."""
    sound = check_reference(answer(compared.release, compared.reference), compared.reference)
    assert sound.status is Status.PASS and sound.data["mean"] < 0.01
    wrong = check_reference(answer(compared.misread, compared.reference), compared.reference)
    assert wrong.status is Status.FAIL and wrong.data["mean"] > 2 * wrong.data["limit"], wrong


# --- rows before the first layer ------------------------------------------------------------------


def test_workers_embed_by_one_matrix_at_the_same_time(source: Path) -> None:
    """A forward puts stubs in the place of layers: those of two workers at once would meet."""
    checkpoint, token_RT = Checkpoint.open_source(source), torch.randint(100, 2000, (64, 8))

    def job(worker: Worker) -> Tensor:
        around = worker.run_once(lambda: embeddings(checkpoint))
        own_RTD = embedded(around, token_RT[worker.own_samples(len(token_RT))], torch.empty)
        return worker.all_gather([own_RTD])[0]

    expected_RTD = checkpoint.read(f"{PREFIX}embed_tokens.weight")[token_RT]
    assert torch.equal(Team([torch.device("cpu")] * 4).run(job), expected_RTD)


def test_the_embedding_matrix_is_gone_before_the_first_layer(source: Path) -> None:
    """With the last reference to it: it is large, and garbage is collected late."""
    checkpoint, token_RT = Checkpoint.open_source(source), torch.randint(100, 2000, (2, 8))
    shape = checkpoint.headers[f"{PREFIX}embed_tokens.weight"].shape

    def matrices() -> int:
        tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
        return sum(each.shape == shape and not each.is_meta for each in tensors)

    gc.collect()
    gc.disable()
    try:
        before = matrices()
        streams = embed(alone(torch.device("cpu")), checkpoint, (token_RT, token_RT), asymmetric=True, rtn=True)
        assert matrices() == before and streams.source.heldout.hidden_RTD.shape == (2, 8, shape[1])
    finally:
        gc.enable()


# --- round-to-nearest as the yardstick ------------------------------------------------------------


@pytest.mark.parametrize("devices", ["cpu", "cpu*2"])
def test_the_yardstick_is_a_release_of_rounded_experts(source: Path, tmp_path: Path, devices: str) -> None:
    """A release whose experts are all rounded has RTN's figures on every second window; three windows, two of them."""
    windows = ("heldout.windows=3", "heldout.length=64")
    for name, share in (("rounded", 1), ("solved", 0)):
        recipe = preset("card", f"solver.fallback_share={share}", *windows)
        releases.run(source, tmp_path / name, recipe, machine=Machine(devices=devices))
    rounded, solved = (releases.read_json(tmp_path / name / "metrics.json")["rtn"] for name in ("rounded", "solved"))
    assert rounded["windows"] == 2 and rounded["summary"]["positions"] == 2 * 63
    assert rounded["summary"] == rounded["release"] == solved["summary"] and rounded["intervals"] == solved["intervals"]
    assert solved["release"]["kl_mean"] != solved["summary"]["kl_mean"]


def test_a_release_is_the_same_without_a_yardstick(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    recipe, out = small("heldout.yardstick=false"), tmp_path / "out"
    releases.run(source, out, recipe)
    assert releases.read_json(out / "metrics.json")["rtn"] is None
    found, before = releases.tensors(out), releases.tensors(release)
    assert found.keys() == before.keys() and all(torch.equal(found[name], before[name]) for name in before)
    assert recipe.digest() == small().digest()


# --- the log, against the shards ------------------------------------------------------------------


def read_log(out: Path) -> Log:
    with (out / "quant_log.csv").open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        assert list(table.fieldnames or ()) == COLUMNS
        return list(table)


def check_log(out: Path, source: Path, experts: int, pairs: int) -> Log:
    """A row per projection, in order, and in each what the shards hold. pairs: (token, expert) pairs of a layer."""
    log, found, before = read_log(out), releases.tensors(out), releases.tensors(source)
    layers = sorted({int(row["layer"]) for row in log})
    wanted = [(layer, expert, projection) for layer in layers for expert in range(experts)
              for projection in sorted(releases.PROJECTIONS)]  # fmt: skip
    assert [(int(row["layer"]), int(row["expert"]), row["projection"]) for row in log] == wanted
    for row in log:
        name = f"{PREFIX}layers.{row['layer']}.mlp.experts.{row['expert']}.{row['projection']}."
        weight = releases.source_weight(before, name)
        error = (releases.dequantize(found, name) - weight).norm() / weight.norm()
        assert float(row["weight_error"]) == pytest.approx(error.item(), rel=1e-4), name
        _, scales = releases.codes_and_scales(found, name)
        assert float(row["scale_min"]) == pytest.approx(scales.abs().min().item(), rel=1e-5)
        assert float(row["scale_max"]) == pytest.approx(scales.abs().max().item(), rel=1e-5)
        assert float(row["scale_negative_share"]) == pytest.approx((scales < 0).double().mean().item(), abs=1e-5)
        assert 0 < float(row["relative_error"]) < 0.1
        assert 0 < float(row["gptqmodel_loss"])
        assert 0 < float(row["effective_tokens"]) <= int(row["tokens"]) * (1 + 1e-5)
    for layer in layers:
        for projection in releases.PROJECTIONS:
            own = [row for row in log if (row["layer"], row["projection"]) == (str(layer), projection)]
            assert sum(int(row["tokens"]) for row in own) == pairs
    return log


def test_log_is_what_the_shards_hold(source: Path, release: Path) -> None:
    log = check_log(release, source, experts=4, pairs=8 * 128 * 2)
    assert len(log) == 2 * 4 * 3
    assert Counter(row["method"] for row in log) == {"gptq": len(log)}
    assert releases.read_json(release / "fourfold.json")["methods"] == {"gptq": len(log)}
    assert {row["passes"] for row in log} == {"2"}


def preset(name: str, *overrides: str) -> Recipe:
    """A preset as it ships, on 16 rows of 128 tokens from the built-in texts."""
    rows = [f"calibration.sources.{number}.rows=4" for number in BUILTINS]
    return load_recipe(name, ["calibration.length=128", *rows, "heldout.windows=2", "heldout.length=128", *overrides])


@pytest.mark.parametrize("storage", ["compressed-tensors", pytest.param("gptq", marks=pytest.mark.slow)])
def test_fast_is_best_on_one_stream(source: Path, release: Path, tmp_path: Path, storage: str) -> None:
    summary = releases.run(source, tmp_path / "out", preset("fast", f'format="{storage}"'))
    log = check_log(tmp_path / "out", source, experts=4, pairs=16 * 128 * 2)
    assert summary.methods == {"gptq": len(log)} == {"gptq": 24}
    assert 0 < summary.metrics["kl_mean"] < 0.05


@pytest.mark.slow
def test_card_rounds_what_is_below_its_share_and_best_nothing(source: Path, tmp_path: Path) -> None:
    share = 0.5  # about half of the experts of this model get fewer
    releases.run(source, tmp_path / "out", preset("card", f"solver.fallback_share={share}"))
    log, found = check_log(tmp_path / "out", source, experts=4, pairs=16 * 128 * 2), releases.tensors(tmp_path / "out")
    assert set(Counter(row["method"] for row in log)) == {"gptq", "rtn"}
    before = releases.tensors(source)
    for row in log:
        name = f"{PREFIX}layers.{row['layer']}.mlp.experts.{row['expert']}.{row['projection']}."
        assert row["method"] == ("rtn" if int(row["tokens"]) < share * 16 * 128 else "gptq"), row
        assert (row["passes"], row["scale_negative_share"]) == ("0", "0")
        codes, scales = releases.codes_and_scales(found, name)
        ratio = releases.source_weight(before, name) / scales.repeat_interleave(128, dim=1)
        rounded = codes == ratio.round().clamp(-8, 7)
        assert rounded.double().mean() > 0.9999 if row["method"] == "rtn" else rounded.double().mean() < 0.95
        assert (found[f"{name}qzeros"] == 0x88888888 - 2**32).all()  # gptq_v2


def test_an_expert_without_tokens_is_solved_all_the_same(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    """Expert 3's router row is the mean of the others', so that it is never the best of four."""
    model = shutil.copytree(source, tmp_path / "model")

    def starve(tensors: dict[str, Tensor]) -> None:
        gate_ED = tensors[f"{PREFIX}layers.1.mlp.gate.weight"]
        gate_ED[3] = gate_ED[:3].mean(dim=0)

    checkpoints.edit(model, starve)
    checkpoints.edit_json(model / "config.json", lambda config: config["text_config"].update(num_experts_per_tok=1))
    releases.run(model, tmp_path / "out", small())
    log = read_log(tmp_path / "out")
    starved = [row for row in log if row["tokens"] == "0"]
    assert {(row["layer"], row["expert"]) for row in starved} == {("1", "3")}
    assert [row["method"] for row in starved] == ["gptq"] * 3
    assert [row["gptqmodel_loss"] for row in starved] == [""] * 3
    errors = {row["projection"]: float(row["weight_error"]) for row in log if row["layer"] == "1"}
    for row in starved:
        assert float(row["weight_error"]) < 1.5 * errors[row["projection"]]
