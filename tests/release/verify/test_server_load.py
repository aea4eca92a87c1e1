"""A server under load: what each kind of server can give, and what is refused. A toy model answers over HTTP."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import releases
from command_line import invoke
from fourfold.datatypes import Event, FourfoldError, ignore
from fourfold.records.results import Check, Status, Verdict
from fourfold.release.verify import server
from fourfold.serve.engines import KERNEL_ISSUES
from standin import StandIn, counters, serving

VOCABULARY, TOKENS, AT_ONCE = 40, 6, 4
CT = releases.FORMATS[0]


def distribution(context: list[int]) -> list[float]:
    """Log-probabilities of the next token."""
    generator = random.Random(str(context[-2:]))
    raw = [generator.gauss(0, 3) for _ in range(VOCABULARY)]
    whole = math.log(sum(map(math.exp, raw)))
    return [value - whole for value in raw]


@dataclass
class Toy:
    """tokenizes, scores: what it can; wrong: how often it gives a neighbour's token while several are answered; other
    fields: how it fails.
    """

    tokenizes: bool = True
    scores: bool = True
    chat_like: bool = False  # log-probabilities as llama.cpp has them
    logprobs: bool = True
    short: bool = False
    dies: bool = False
    wrong: float = 0.0

    def __post_init__(self) -> None:
        self.random = random.Random(0)

    def __call__(self, path: str, body: Any, at_once: int) -> tuple[int, Any]:
        if path.endswith("/tokenize"):
            ids = [ord(character) % VOCABULARY for character in body["prompt"]]
            return (200, {"tokens": ids}) if self.tokenizes else (404, {})
        time.sleep(0.0 if body.get("echo") else 0.05)  # for others to be there, too
        if self.dies and at_once > 1:
            return 500, {"error": "illegal memory access"}
        prompt = body["prompt"]
        context = [ord(character) % VOCABULARY for character in prompt] if isinstance(prompt, str) else [*prompt]
        if any(not 0 <= token < VOCABULARY for token in context):
            return 400, {"error": "a token id is out of vocabulary"}
        ids, rows = [], []
        if body.get("echo") and self.scores:
            ids, rows = [*context], [None, *(distribution(context[:end]) for end in range(1, len(context)))]
        for _ in range(body["max_tokens"] - self.short):
            row = distribution(context)
            best = max(range(VOCABULARY), key=row.__getitem__)
            if at_once > 1 and self.random.random() < self.wrong:
                best = (best + 1) % VOCABULARY
            ids, rows, context = [*ids, best], [*rows, row], [*context, best]
        return 200, {"choices": [self.choice(ids, rows, body)]}

    def choice(self, ids: list[int], rows: list[Any], body: Any) -> dict[str, Any]:
        if not self.logprobs:
            return {"text": "", "logprobs": None}
        best = [
            None if row is None else sorted(range(VOCABULARY), key=lambda t: -row[t])[: body["logprobs"]]
            for row in rows
        ]
        if self.chat_like:
            steps = [
                {"id": token, "logprob": row[token], "top_logprobs": [{"logprob": row[one]} for one in top]}
                for token, row, top in zip(ids, rows, best, strict=True)
            ]
            return {"text": "", "logprobs": {"content": steps}}
        found = {
            "tokens": [f"token_id:{token}" if self.tokenizes else chr(65 + token) for token in ids],
            "token_logprobs": [None if row is None else row[token] for token, row in zip(ids, rows, strict=True)],
            "top_logprobs": [
                None if row is None else {f"token_id:{one}": row[one] for one in top}
                for row, top in zip(rows, best, strict=True)
            ],
        }
        return {"text": "", "logprobs": found} | ({"token_ids": ids} if self.tokenizes else {})


def run(toy: Toy, release: Path | None = None, metrics: Callable[[int], str] | None = None) -> tuple[Verdict, StandIn]:
    with serving(StandIn(plain=toy, metrics=metrics)) as stand_in:
        return server.verify_server(stand_in.url, AT_ONCE, release, 30, ignore, TOKENS), stand_in


def by_name(verdict: Verdict) -> dict[str, Check]:
    return {check.name: check for check in verdict.checks}


def test_a_server_that_scores_prompts() -> None:
    verdict, stand_in = run(Toy(), metrics=counters)
    assert verdict.passed, verdict.checks
    found = by_name(verdict)
    assert "m at http://127.0.0.1" in found[server.ANSWERS].evidence
    assert "; vllm; prompts as token ids; scores prompts" in found[server.ANSWERS].evidence
    data = found[server.UNDER_LOAD].data
    assert (data["tokens"], data["parted"], data["largest_regret"], data["alone_most"]) == (72, 0, 0.0, 0.0)
    assert stand_in.most_at_once == AT_ONCE
    sent = [body for body in stand_in.seen if "max_tokens" in body and not body.get("echo")]
    assert {len(body["prompt"]) for body in sent} == {256, 8} and len(sent) == 2 + 4 + 8
    assert all(body["ignore_eos"] and body["temperature"] == 0 and body["max_tokens"] == TOKENS for body in sent)


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (Toy(scores=False), "token ids; scores no prompts"),
        (Toy(scores=False, chat_like=True), "token ids; scores no prompts"),
        (Toy(tokenizes=False), "text; scores no prompts"),
    ],
)
def test_a_server_that_can_less_is_judged_by_what_it_can(toy: Toy, said: str) -> None:
    verdict, _ = run(toy)
    found = by_name(verdict)
    assert verdict.passed and f"no metrics; prompts as {said}" in found[server.ANSWERS].evidence
    assert "regret not judged" in found[server.UNDER_LOAD].evidence
    toy.wrong = 0.3
    assert not run(toy)[0].passed


def test_a_server_that_is_wrong_under_load() -> None:
    verdict, _ = run(Toy(wrong=0.3), metrics=counters)
    check = by_name(verdict)[server.UNDER_LOAD]
    assert not verdict.passed and check.status is Status.FAIL
    assert "scored alone it is" in check.evidence and check.data["failed_prompts"]
    known = [str(issue) for issue in KERNEL_ISSUES if issue.engine == "vllm"]
    assert check.data["known_issues"] == known and known[0] in check.evidence


def test_a_server_that_dies_under_load() -> None:
    verdict, _ = run(Toy(dies=True))
    check = by_name(verdict)[server.UNDER_LOAD]
    assert not verdict.passed
    assert 'a request failed that runs alone: HTTP 500: {"error": "illegal memory access"}' in check.evidence


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (Toy(logprobs=False), "got no log-probabilities (KeyError: 'tokens'), expected those of 2 tokens"),
        (Toy(short=True), f"got {TOKENS - 1} tokens, expected {TOKENS}: the server must know ignore_eos"),
    ],
)
def test_servers_that_cannot_be_judged(toy: Toy, said: str) -> None:
    with pytest.raises(FourfoldError) as refused:
        run(toy)
    assert said in str(refused.value)


def test_a_server_that_is_busy() -> None:
    busy = 'vllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_waiting{engine="0"} 1.0\n'
    with pytest.raises(FourfoldError, match="got 3 requests of others, expected none"):
        run(Toy(), metrics=lambda _: busy)


def test_a_server_of_another_model(made: dict[str, Path], tmp_path: Path) -> None:
    release = shutil.copytree(made[CT], tmp_path / "release")
    with pytest.raises(FourfoldError, match=r"gives no log-probabilities, expected .*: HTTP 400: .*out of vocabulary"):
        run(Toy(), release)
    stored = json.loads((release / "reference.json").read_text())
    tokens = stored["tokens"] = [token % VOCABULARY for token in stored["tokens"]]
    (release / "reference.json").write_text(json.dumps(stored))
    with pytest.raises(
        FourfoldError, match=r"nats from those of .*release on average, expected at most 0\.08: it serve"
    ):
        run(Toy(), release)
    rows = [distribution(tokens[:end]) for end in range(1, len(tokens))]
    stored["logprobs"] = [row[token] for row, token in zip(rows, tokens[1:], strict=True)]
    stored["likeliest"] = [[max(range(VOCABULARY), key=row.__getitem__)] for row in rows]
    stored["likeliest_logprobs"] = [[max(row)] for row in rows]
    (release / "reference.json").write_text(json.dumps(stored))
    assert run(Toy(), release)[0].passed
    with pytest.raises(FourfoldError, match=r"gives no log-probabilities, expected vLLM or llama\.cpp"):
        run(Toy(scores=False), release)
    (release / "reference.json").unlink()
    with pytest.raises(FourfoldError, match=r"release has no reference\.json, which says"):
        run(Toy(), release)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server.verify_server, "__defaults__", (TOKENS,))
    monkeypatch.chdir(tmp_path)
    with serving(StandIn(plain=Toy())) as stand_in:
        shown = invoke("verify", f"{stand_in.url}/v1/", "--load", AT_ONCE)
        told = invoke("verify", stand_in.url, "--load", AT_ONCE, "--json")
    assert shown.exit_code == 0 and "all checks passed: engine" in shown.output
    assert json.loads(told.stdout)["checks"][1]["data"]["at_once"] == AT_ONCE
    with serving(StandIn(plain=Toy(wrong=0.3))) as stand_in:
        assert invoke("verify", stand_in.url, "--load", AT_ONCE).exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_progress_names_the_rounds() -> None:
    told: list[Event] = []
    with serving(StandIn(plain=Toy())) as stand_in:
        server.verify_server(stand_in.url, AT_ONCE, None, 30, told.append, TOKENS)
    assert [event.stage for event in told] == ["4 at once, all joined at once", "4 at once, joined one by one"]
