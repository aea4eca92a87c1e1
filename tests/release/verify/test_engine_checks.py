"""What an engine's answers come to: each check of level 3 seen passing and failing, without an engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from fourfold.formats import COMPRESSED_TENSORS, GPTQ
from fourfold.records.release import Reference
from fourfold.records.results import Check, Level, Status
from fourfold.release.verify import image, sglang, vllm
from fourfold.release.verify.check import judge, passed, skip
from fourfold.release.verify.engine import Answer

LOAD = {"parameters": 3, "elements": 30, "unwritten": {}, "zero_scales": {}, "seconds_of_two_loads": 2.0}
CONTENT: dict[str, Any] = {
    "engine": "vLLM 0.32.0", "torch": "2.13.0+cpu", "device": "cpu", "start_seconds": 4.0, "kv_cache_tokens": 1000,
    "loads": {"Target": LOAD, "Draft": LOAD}, "decode_tokens_per_second": 100.0,
    "tokens": [[5, 6, 7], [8, 9, 10]], "margins": [[1.0, 0.05, 2.0], [1.0, 1.0, 1.0]],
    "logprobs": [[-1.0, -2.0, -1.0], [-1.0, -1.0, -1.0]], "logprobs_again": [[-1.0, -2.03, -1.0], [-1.0, -1.0, -1.0]],
    "prompt_logprobs": [[-3.0, -2.0], [-1.0, -4.0]], "prompt_likeliest": [[[1, 2], [3, 4]], [[2, 9], [7, 3]]],
    "image": {"tokens": [1, 2], "margins": [1.0, 1.0]},
    "drafts": {"drafts": 40, "draft_tokens": 80, "accepted_tokens": 50, "accepted_by_position": [30, 20]},
}  # fmt: skip
REFERENCE = Reference(
    tokens=[1, 2, 3],
    logprobs=[-1.0, -4.0],
    likeliest=[[2, 9], [3, 9]],
    likeliest_logprobs=[[-1.0, -1.5], [-1.0, -2.0]],
)
LOG = """(MainProcess pid=1) INFO 11-25 15:42:28 [model.py:2152] Using max model len 128
(MainProcess pid=1) INFO 11-25 15:43:07 [int_wna16.py:356] Using 'ZEN_CPU' WNA16 MoE backend.
(MainProcess pid=1) INFO 11-25 15:43:07 [int_wna16.py:356] Using 'ZEN_CPU' WNA16 MoE backend.
(MainProcess pid=1) INFO 11-25 15:43:10 [int_wna16.py:472] Using ZentorchExpertsInt4
"""


def content(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CONTENT) | changes


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").write_text(LOG)
    return tmp_path / "log"


def answer(log: Path, **changes: Any) -> Answer:
    return Answer(log=log, content=content(**changes))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_is_well(log: Path) -> None:
    runs = vllm.Runs(plain=answer(log), drafting=answer(log), source=answer(log))
    found = by_name(list(vllm.checks(runs, 0.001, REFERENCE)))
    assert {check.status for check in found.values()} == {Status.PASS}
    facts = found[vllm.LOADS].data
    assert facts["kernels"] == ["Using 'ZEN_CPU' WNA16 MoE backend.", "Using ZentorchExpertsInt4"]
    assert (facts["load_seconds"], facts["kv_cache_tokens"]) == (2.0, 1000)
    assert "by position 75.0%, 50.0%" in found[vllm.ACCEPTED].evidence


def test_an_image_that_gives_other_tokens_than_the_source(log: Path) -> None:
    other = answer(log, image={"tokens": [1, 9], "margins": [1.0, 1.0]})
    found = by_name(list(vllm.checks(vllm.Runs(plain=answer(log), drafting=None, source=other), 0.001, REFERENCE)))
    assert found[vllm.IMAGE].status is Status.FAIL
    runs = vllm.Runs(plain=answer(log), drafting=None, source=other, no_image="no vision here")
    found = by_name(list(vllm.checks(runs, 0.001, REFERENCE)))
    assert (found[vllm.IMAGE].status, found[vllm.IMAGE].evidence) == (Status.NOT_RUN, "no vision here")


def test_without_draft_and_source(log: Path) -> None:
    found = by_name(list(vllm.checks(vllm.Runs(plain=answer(log), drafting=None, source=None), 0.001, REFERENCE)))
    assert {name for name, check in found.items() if check.status is Status.NOT_RUN} == {
        vllm.TIES, vllm.ACCEPTED, vllm.SCORES, vllm.IMAGE,
    }  # fmt: skip
    assert found[vllm.LOADS].data["decode_tokens_per_second_mtp"] is None


def test_an_engine_that_does_not_start(log: Path) -> None:
    failed = Answer(log=log, failure="exit code 1\nlast lines")
    for runs in (
        vllm.Runs(plain=failed, drafting=failed, source=None),
        vllm.Runs(plain=failed, drafting=answer(log), source=None),
    ):
        found = by_name(list(vllm.checks(runs, 0.001, REFERENCE)))
        assert found.pop(vllm.LOADS).status is Status.FAIL
        assert {check.status for check in found.values()} == {Status.NOT_RUN}


def test_a_source_that_does_not_run_fails_with_the_way_out(log: Path) -> None:
    runs = vllm.Runs(plain=answer(log), drafting=None, source=Answer(log=log, failure="ended by SIGKILL"))
    found = by_name(list(vllm.checks(runs, 0.001, REFERENCE)))
    check = found[vllm.SCORES]
    assert check.status is Status.FAIL
    assert "verify without --source" in check.evidence and vllm.STORED in check.evidence
    assert found[vllm.STORED].status is Status.PASS


@pytest.mark.parametrize("model", ["Target", "Draft"])
@pytest.mark.parametrize("what", ["unwritten", "zero_scales"])
def test_a_parameter_that_was_not_written(log: Path, model: str, what: str) -> None:
    loads = copy.deepcopy(CONTENT["loads"])
    loads[model][what] = {"w13": "4 of 8"}
    check = vllm.check_written(answer(log, loads=loads))
    assert check.status is Status.FAIL
    assert f"{model}: w13: 4 of 8" in check.evidence


@pytest.mark.parametrize(
    ("tokens", "status", "ties"),
    [
        ([[5, 6, 7], [8, 9, 10]], Status.PASS, 0),
        ([[5, 1, 1], [8, 9, 10]], Status.PASS, 1),  # 0.05 apart, noise 0.03 on either side
        ([[5, 6, 1], [8, 9, 10]], Status.FAIL, 1),
        ([[5, 6, 7], [1, 9, 10]], Status.FAIL, 1),
    ],
)
def test_tokens_with_and_without_mtp(tokens: list[list[int]], status: Status, ties: int) -> None:
    check = vllm.check_ties(content(), content(tokens=tokens))
    assert (check.status, check.data["near_ties"]) == (status, ties)


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        ({"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0, "accepted_by_position": [0, 0]}, "no token was"),
        ({"drafts": 9, "draft_tokens": 18, "accepted_tokens": 0, "accepted_by_position": [0, 0]}, "0 of 18 draft"),
    ],
)
def test_drafts_that_are_not_accepted(counters: dict[str, Any], said: str) -> None:
    check = vllm.check_accepted(content(drafts=counters))
    assert check.status is Status.FAIL
    assert said in check.evidence


def test_log_probabilities_far_from_the_source() -> None:
    limit = vllm.score_limit(0.001, 0.03 / 6)
    assert limit == pytest.approx(2 * (4 * 0.001 / 3.141592653589793) ** 0.5 + 0.01)
    for distance, status in ((0.9 * limit, Status.PASS), (1.1 * limit, Status.FAIL)):
        moved = [[value + distance for value in row] for row in CONTENT["prompt_logprobs"]]
        check = vllm.check_scores(content(), content(prompt_logprobs=moved), 0.001)
        assert check.status is status
        assert check.data["mean"] == pytest.approx(distance)
    assert vllm.check_scores(content(), content(), None).status is Status.NOT_RUN


@pytest.mark.parametrize("sign", [1, -1])
def test_log_probabilities_far_from_the_stored_ones(sign: int) -> None:
    limit = 2 * (0.02 + 0.03 / 6)
    for distance, status in ((0.9 * limit, Status.PASS), (1.1 * limit, Status.FAIL)):
        moved = [[-99.0, -99.0], [value + sign * distance for value in REFERENCE.logprobs]]
        check = vllm.check_reference(content(prompt_logprobs=moved), REFERENCE)
        assert check.status is status
        assert f"differ by {distance:.4f} on average" in check.evidence
        assert (check.data["same_best"], check.data["shared_best"]) == (1, 0.75)
    one = vllm.check_reference(content(prompt_logprobs=[[-1.0, -4.0 + 1.8 * limit]]), REFERENCE)
    assert (one.status, one.data["mean"]) == (Status.PASS, pytest.approx(0.9 * limit))
    assert one.data["most"] == pytest.approx(1.8 * limit)
    none = vllm.check_reference(content(), None)
    assert none.status is Status.NOT_RUN and "no reference.json" in none.evidence


@pytest.mark.parametrize(
    ("found", "status"), [([1, 2, 3], Status.PASS), ([1, 9, 9], Status.PASS), ([9, 2, 3], Status.FAIL)]
)
def test_tokens_after_an_image(found: list[int], status: Status) -> None:
    margins = [0.5, 0.1, 0.5]
    source, release = {"tokens": [1, 2, 3], "margins": margins}, {"tokens": found, "margins": margins}
    assert image.compare("image", source, release, limit=0.06).status is status


@pytest.mark.parametrize(("model", "trap"), [("Qwen3_5ForCausalLMMTP", True), ("Target", False)])
def test_sglang_trap(model: str, trap: bool) -> None:
    load = LOAD | {"unwritten": {"w13_qweight": "8 of 8"}}
    loads = {"engine": "SGLang 0.5.23", "loads": {model: load}}
    check = sglang.check_loads(loads, GPTQ)
    assert check.status is Status.FAIL
    assert ("format compressed-tensors" in check.evidence) is trap
    assert "format compressed-tensors" not in sglang.check_loads(loads, COMPRESSED_TENSORS).evidence


# --- the verdict --------------------------------------------------------------------------------------------------


def test_a_verdict_needs_every_level_that_was_asked_for() -> None:
    files, both = (Level.FILES,), (Level.FILES, Level.ENGINE)
    good, bad = judge(Level.FILES, "index", [], "seen"), judge(Level.FILES, "sha256", ["other"], "")
    left = skip(Level.FILES, "sidecars", "no source")
    assert passed(files, [good, left])
    assert not passed(files, [good, bad, left])
    assert not passed(files, [left])
    assert not passed(both, [good, skip(Level.ENGINE, "starts", "why")])
    assert passed(both, [good, judge(Level.ENGINE, "starts", [], "seen")])


def test_evidence_names_five_problems_and_counts_the_rest() -> None:
    assert judge(Level.FILES, "index", list("abcdefg"), "").evidence == "a; b; c; d; e and 2 more"
