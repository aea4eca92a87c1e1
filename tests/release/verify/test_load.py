"""Texts alone and under load, made by hand: each rule seen holding and broken once."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import convert

import releases
from fourfold.datatypes import FourfoldError
from fourfold.records.results import Check, Status
from fourfold.release.verify import load, vllm
from fourfold.release.verify.engine import Answer

TOKENS = [3, 1, 4, 1]
CT = releases.FORMATS[0]


def reply(prompt: int, scored: bool = True) -> dict[str, Any]:
    """Decoded 0.05 nats from what it is scored as, its last token 0.1 worse than the best."""
    scores = {"logprobs": [-0.2, -1.0, -0.5, -1.1], "best": [-0.2, -1.0, -0.5, -1.0]}
    text = {"tokens": [*TOKENS], "logprobs": [-0.25, -1.0, -0.5, -1.1], "margins": [1.0, 0.03, 0.9, 0.2]}
    return {"prompt": prompt, "text": text, "scores": scores if scored else None}


def observed(*, scored: bool = True, on_gpu: bool | None = False) -> dict[str, Any]:
    """Two prompts, each twice at once, then each four times."""
    names = [(each.name, each.order) for each in load.schedules(4)]
    rounds = [
        {"name": name, "seconds": 1.0, "replies": [reply(prompt, False) for prompt in order]} for name, order in names
    ]
    return {"at_once": 4, "alone": [reply(0, scored), reply(1, scored)], "rounds": rounds, "on_gpu": on_gpu}


def judged(seen: dict[str, Any], known: list[str] | None = None) -> Check:
    return load.judge_load("under load", convert(seen, load.Loaded), lambda: known or [])


def part(seen: dict[str, Any], place: int, regret: float = 0.0) -> None:
    """The first request of the first round gets another token."""
    first = seen["rounds"][0]["replies"][0]
    first["text"]["tokens"][place] = 9
    scores = copy.deepcopy(seen["alone"][0]["scores"])
    if scores is not None:
        scores["logprobs"][place] = scores["best"][place] - regret
        first["text"]["logprobs"][place] = scores["logprobs"][place]
    first["scores"] = scores


def move(seen: dict[str, Any], nats: float, requests: int = 1, tokens: tuple[int, ...] = (2,)) -> None:
    """Log-probabilities of the same text."""
    replies = [one for each in seen["rounds"] for one in each["replies"]]
    for one in replies[:requests]:
        for token in tokens:
            one["text"]["logprobs"][token] -= nats


def test_the_same_texts_pass_with_figures() -> None:
    check = judged(observed())
    assert check.status is Status.PASS
    assert "48 tokens of 12 requests, 4 at once; none is more than 0.100 nats worse than the best" in check.evidence
    assert "0 of 12 texts part" in check.evidence and "2 s" in check.evidence
    data = check.data
    assert (data["tokens"], data["parted"], data["twins"], data["failed_prompts"]) == (48, 0, 0.0, [])
    assert (data["limit"], data["alone_most"], data["alone_regret"]) == pytest.approx((0.25, 0.05, 0.1))
    assert (data["alone_mean"], data["mean_limit"]) == pytest.approx((0.0125, 0.025))


def test_a_near_tie_may_part() -> None:
    seen = observed()
    part(seen, 1, regret=0.03)
    check = judged(seen)
    assert (check.status, check.data["parted"]) == (Status.PASS, 1)
    assert check.data["largest_margin"] == pytest.approx(0.03)
    assert "1 of 12 texts part from the text alone, where the two best are at most 0.030 apart" in check.evidence


Change = Callable[[dict[str, Any]], None]


def alone_mean(seen: dict[str, Any]) -> None:
    for one in seen["alone"]:
        one["text"]["logprobs"] = [value - 0.03 for value in one["text"]["logprobs"]]
    for each in seen["rounds"]:
        for one in each["replies"]:
            one["text"]["logprobs"] = [value - 0.03 for value in one["text"]["logprobs"]]


def alone_most(seen: dict[str, Any]) -> None:
    """One of 4,000 tokens: the mean stays small."""
    for one in seen["alone"]:
        one["text"] = {"tokens": [1] * 2000, "logprobs": [-1.0] * 2000, "margins": [1.0] * 2000}
        one["scores"] = {"logprobs": [-1.0] * 2000, "best": [-1.0] * 2000}
    seen["rounds"] = []
    seen["alone"][0]["scores"] = {"logprobs": [-1.6] + [-1.0] * 1999, "best": [-1.6] + [-1.0] * 1999}


def alone_regret(seen: dict[str, Any]) -> None:
    seen["alone"][1]["scores"]["best"][3] = -0.7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (alone_mean, "alone, tokens decoded and scored as a prompt differ by 0.0"),
        (alone_most, "and 0.600 at most"),
        (alone_regret, "alone, a token is 0.400 worse than the best"),
        (lambda seen: part(seen, 1, regret=0.4), "token 2, all joined at once: scored alone it is 0.400 nats worse"),
        (lambda seen: part(seen, 2), "token 3, all joined at once: other than alone, where the two best are 0.900"),
        (lambda seen: move(seen, 0.3), "token 3, all joined at once: log-probability 0.300 nats from that"),
        (lambda seen: move(seen, 0.08, 12, (0, 1, 2, 3)), "same text are 0.0800 nats from those alone on average"),
        (lambda seen: seen["rounds"][1]["replies"][0]["text"]["logprobs"].__setitem__(0, math.nan), "NaN or infinite"),
    ],
)
def test_each_rule_broken(change: Change, said: str) -> None:
    seen = observed()
    change(seen)
    check = judged(seen, ["known issue on a GPU"])
    assert check.status is Status.FAIL
    assert said in check.evidence, check.evidence
    assert "known issue on a GPU\nTry " in check.evidence
    assert check.data["known_issues"] == ["known issue on a GPU"]


def test_twins_that_differ() -> None:
    """The margin alone says a tie; under load both say that it is none."""
    seen = observed()
    part(seen, 1)
    for one in seen["rounds"][0]["replies"]:
        one["text"]["margins"][1] = 0.6
    check = judged(seen)
    assert check.status is Status.FAIL
    assert "the same prompt twice gives other tokens, where the two best are 0.600 nats apart" in check.evidence


def test_which_prompts_fail_and_the_worst_first() -> None:
    seen = observed()
    part(seen, 1, regret=0.4)
    seen["rounds"][0]["replies"][1]["text"]["logprobs"][0] -= 0.9
    check = judged(seen)
    assert check.data["failed_prompts"] == [0, 1]
    assert check.evidence.startswith("prompts 1, 2 of 2 fail, 0.25 nats allowed; prompt 2, token 1, all joined")


@pytest.mark.parametrize(("on_gpu", "status"), [(True, Status.PASS), (None, Status.PASS), (False, Status.FAIL)])
def test_a_gpu_may_flip_a_router_once_in_2000_tokens(on_gpu: bool | None, status: Status) -> None:
    """Of log-probabilities alone: regret and margins have no such allowance."""
    seen = observed(on_gpu=on_gpu)
    seen["rounds"][1]["replies"] *= load.FAR_ONE_IN // 32
    move(seen, 0.3)
    assert judged(seen).status is status
    part(seen, 1, regret=0.4)
    assert judged(seen).status is Status.FAIL


def test_without_scores_margins_and_differences_are_judged() -> None:
    check = judged(observed(scored=False))
    assert check.status is Status.PASS
    assert "regret not judged, as the server scores no prompts" in check.evidence
    assert (check.data["limit"], check.data["alone_mean"], check.data["largest_regret"]) == (0.5, None, None)
    seen = observed(scored=False)
    part(seen, 2)
    assert judged(seen).status is Status.FAIL
    seen = observed(scored=False)
    move(seen, 0.6, requests=12)
    assert "log-probability 0.600 nats from that alone" in judged(seen).evidence


def test_noise_widens_the_limit_up_to_a_cap() -> None:
    for most, limit in ((0.1, 0.25), (0.2, 0.4), (0.45, 0.5)):
        seen = observed()
        seen["alone"][0]["scores"]["logprobs"][2] = seen["alone"][0]["scores"]["best"][2] = -0.5 - most
        seen["alone"][0]["text"]["logprobs"][2] = -0.5
        assert judged(seen).data["limit"] == pytest.approx(limit)


def test_what_is_sent() -> None:
    first, second = load.schedules(16)
    assert (first.order, first.joining) == ([*range(8)] * 2, False)
    assert (sorted(second.order), second.joining) == (sorted([*range(8)] * 4), True)
    assert second.order != sorted(second.order) and load.schedules(16) == [first, second]
    assert load.lengths(8)[0] == 256 and load.lengths(8)[-1] == 8 and load.lengths(1) == [256]
    assert load.windows([*range(20)], [3, 2]) == [[0, 1, 2], [10, 11]]
    with pytest.raises(FourfoldError, match="held-out text: got 20 tokens by this tokenizer, expected 22 for 2"):
        load.windows([*range(20)], [11, 2])
    most = load.MOST_AT_ONCE
    assert len(load.heldout_text(most)) == 1000 * most > len(load.heldout_text(16))


@pytest.mark.parametrize("at_once", [1, 0, -2, 3, 258])
def test_sizes_that_are_none(at_once: int) -> None:
    with pytest.raises(FourfoldError, match=rf"^--load: got {at_once}, expected an even number from 2 to 256"):
        load.check_size(at_once)


@pytest.mark.parametrize("drafting", [True, False])
def test_an_engine_that_ends_under_load(tmp_path: Path, drafting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the load that fails then, not the start, and an image is not tried without."""
    monkeypatch.setattr(vllm, "kernel_issues", lambda *_: ["known issue on this GPU"])
    log = tmp_path / "log"
    log.write_text(f"{vllm.LOAD_BEGINS}: 16 requests at once\nCUDA error: an illegal memory access")
    died = Answer(log=log, failure="ended by SIGABRT")
    runs = vllm.Runs(plain=died, drafting=died if drafting else None, source=None)
    found = {check.name: check for check in vllm.checks(runs, 0.001, None)}
    failed = found.pop(vllm.UNDER_LOAD)
    assert (failed.status, failed.evidence) == (Status.FAIL, "ended by SIGABRT\nknown issue on this GPU")
    assert {check.status for check in found.values()} == {Status.NOT_RUN} and vllm.LOADS in found


def test_requests_of_a_release(made: dict[str, Path]) -> None:
    from fourfold.release.verify import run  # noqa: PLC0415

    asked = run.load_request(made[CT], 4, tokens=5)
    assert [len(prompt) for prompt in asked["prompts"]] == [256, 8]
    assert (asked["at_once"], asked["tokens"]) == (4, 5)
    assert asked["rounds"][0] == {"name": "all joined at once", "joining": False, "order": [0, 1, 0, 1]}
