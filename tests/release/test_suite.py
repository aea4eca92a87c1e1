"""The suite's own questions and the KL, on toy servers that answer well, badly or not at all; paired statistics."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from command_line import invoke
from fourfold.core.paired import mcnemar, mean_interval
from fourfold.datatypes import FourfoldError, ignore
from fourfold.quantize.journal import REFERENCE
from fourfold.records.release import Reference
from fourfold.records.results import TaskResult, TaskResults
from fourfold.release import suite
from fourfold.release.answers import Answer, count_usage, loops, read_answer
from fourfold.release.questions import TOOLS, Needles, ask_tools, same_calls
from fourfold.release.report.quality import server_lines, task_grid
from fourfold.release.served_kl import compare, measure_kl, require_served
from fourfold.release.suite import SUITES, Servers, measure_servers, pair
from fourfold.release.tasks import TaskRun
from fourfold.serve import client
from fourfold.serve.client import RequestError, Session
from standin import StandIn, serving

VOCABULARY = 40
WINDOWS = [[(7 * window + place) % VOCABULARY for place in range(12)] for window in range(3)]
Found = TypeVar("Found")


def distribution(context: list[int], noise: float) -> list[float]:
    """Log-probabilities of the next token, which `noise` changes a little."""
    generator, other = random.Random(str(context[-2:])), random.Random(f"{context[-2:]} again")
    raw = [generator.gauss(0, 2) + noise * other.gauss(0, 1) for _ in range(VOCABULARY)]
    whole = math.log(sum(map(math.exp, raw)))
    return [value - whole for value in raw]


@dataclass
class Toy:
    """noise: of its log-probabilities; most: of them that it gives; llama: asked as llama.cpp; busy: answers 429 to so
    many requests first; chat: what answers a chat request.
    """

    noise: float = 0.0
    most: int = VOCABULARY
    llama: bool = False
    logprobs: bool = True
    busy: int = 0
    chat: Callable[[Any], dict[str, Any]] = lambda body: {"content": "no"}

    def __call__(self, path: str, body: Any, at_once: int) -> tuple[int, Any]:
        if self.busy > 0:
            self.busy -= 1
            return 429, {"error": "too many requests"}
        if path == "/v1/chat/completions":
            message = {"finish": "stop", **self.chat(body)}
            choice = {"message": message, "finish_reason": message.pop("finish")}
            return 200, {"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}
        if path == "/completion" and self.llama and self.logprobs:
            best = self.best(body["prompt"], body["n_probs"])
            listed = [{"id": token, "logprob": value} for token, value in best.items()]
            return 200, {"completion_probabilities": [{"top_logprobs": listed}]}
        if path != "/v1/completions" or self.llama or not self.logprobs:
            return 404, {"error": "not here"}
        if body["logprobs"] > self.most:
            return 400, {"error": f"greater than max allowed: {self.most}"}
        places: list[Any] = [None]
        for end in range(1, len(body["prompt"]) + 1):
            best = self.best(body["prompt"][:end], body["logprobs"])
            places.append({f"token_id:{token}": value for token, value in best.items()})
        return 200, {"choices": [{"text": "", "logprobs": {"top_logprobs": places}}]}

    def best(self, context: list[int], count: int) -> dict[int, float]:
        values = distribution(context, self.noise)
        order = sorted(range(VOCABULARY), key=lambda token: -values[token])[:count]
        return {token: values[token] for token in order}


def on_servers(toys: list[Toy], ask: Callable[..., Awaitable[Found]], seconds: float = 5.0) -> Found:
    """Run `ask` on a session of each."""
    stands = [StandIn(plain=toy) for toy in toys]

    async def run() -> Found:
        async with client.open_client(8) as connection:
            return await ask(*(
                Session(connection=connection, address=one.url, model="m", limit_seconds=seconds) for one in stands
            ))  # fmt: skip

    with serving(stands[0]), serving(stands[-1] if len(stands) > 1 else StandIn()):
        return asyncio.run(run())


# --- KL -------------------------------------------------------------------------------------------------------------


def whole_kl(noise: float) -> float:
    """Over the whole vocabulary, the source without noise."""
    found = []
    for tokens, end in itertools.product(WINDOWS, range(1, 12)):
        p, q = distribution(tokens[:end], 0.0), distribution(tokens[:end], noise)
        found.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return sum(found) / len(found)


@pytest.mark.parametrize("llama", [False, True], ids=["echo", "step by step"])
def test_kl_is_exact_with_all_tokens_and_a_lower_bound_with_few(llama: bool) -> None:
    """k is what both allow, of 50, 20, 10 and 5; the vocabulary has 40 tokens."""
    measure = lambda most: on_servers(  # noqa: E731
        [Toy(noise=0.3, most=most, llama=llama), Toy(llama=llama)],
        lambda release, source: measure_kl(release, source, WINDOWS),
    )
    exact = whole_kl(0.3)
    if llama:
        assert measure(40).kl_mean == pytest.approx(exact, rel=1e-6)
        return
    found, few = measure(50), measure(5)
    assert (found.k, few.k) == (20, 5)
    assert few.kl_mean < found.kl_mean <= exact * (1 + 1e-9)
    assert few.covered < found.covered <= 1
    assert found.interval and found.interval[0] < found.kl_mean < found.interval[1]


def test_bucket_of_the_rest_by_hand() -> None:
    """Source 0.5, 0.3, rest 0.2; release names the first and a third: 0.3 falls into the rest of 0.5."""
    log = math.log
    bound, same, covered = compare({1: log(0.5), 2: log(0.3)}, {1: log(0.4), 3: log(0.45)})
    assert bound == pytest.approx(0.5 * log(0.5 / 0.4) + 0.5 * log(0.5 / 0.6))
    assert (same, covered) == (False, pytest.approx(0.5))
    assert compare({1: 0.0}, {1: 0.0}) == (0.0, True, 1.0)
    assert compare({1: log(0.5)}, {1: 1e-7})[0] > 0  # rounded above 1: no logarithm of nothing


def test_a_server_without_log_probabilities_is_named() -> None:
    with pytest.raises(RequestError, match=r"gives no log-probabilities, expected vLLM or llama\.cpp: HTTP 404"):
        on_servers([Toy(logprobs=False), Toy()], lambda release, source: measure_kl(release, source, WINDOWS))


# --- requests -------------------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WAIT_SECONDS", 0.01)
    ask = lambda session: session.post("/v1/chat/completions", {})  # noqa: E731
    assert read_answer(on_servers([Toy(busy=client.ATTEMPTS - 1)], ask)).text == "no"
    with pytest.raises(RequestError, match=r"HTTP 429: .*too many requests"):
        on_servers([Toy(busy=client.ATTEMPTS)], ask)


def test_what_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(body: Any) -> dict[str, Any]:
        time.sleep(0.5)
        return {"content": "late"}

    ask = lambda session: session.post("/v1/chat/completions", {})  # noqa: E731
    with pytest.raises(RequestError, match="ReadTimeout"):
        on_servers([Toy(chat=late)], ask, seconds=0.1)
    with pytest.raises(RequestError, match="HTTP 404"):  # as for the name of another model
        on_servers([Toy()], lambda session: session.post("/v1/other", {}))
    with pytest.raises(RequestError, match="got no answer"):
        read_answer({"choices": []})


# --- tools ----------------------------------------------------------------------------------------------------------


def called(*calls: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]


def test_calls_are_checked_exactly() -> None:
    wanted = [{"name": "f", "arguments": {"a": 5, "on": True}}, {"name": "g", "arguments": {}}]
    right = [("g", "{}"), ("f", '{"on": true, "a": 5.0}')]
    assert same_calls(called(*right), wanted)
    one, two = right
    other_type, more = ("f", '{"on": 1, "a": 5}'), ("f", '{"on": true, "a": 5, "b": 1}')
    for wrong in ([one], [one, two, one], [one, other_type], [one, more], [("g", ""), two], [("h", "{}"), two]):
        assert not same_calls(called(*wrong), wanted), wrong
    assert same_calls((), []) and not same_calls((), wanted)


def test_every_bundled_question_has_calls_that_its_tools_allow() -> None:
    content = json.loads(TOOLS.read_text(encoding="utf-8"))
    known = {one["function"]["name"]: one["function"]["parameters"] for one in content["tools"]}
    for question in content["questions"]:
        for call in question["calls"]:
            schema = known[call["name"]]
            assert {*schema["required"]} <= call["arguments"].keys() <= schema["properties"].keys(), question
    assert {call["name"] for question in content["questions"] for call in question["calls"]} == known.keys()


def test_a_perfect_server_and_a_silent_one() -> None:
    questions = {one["ask"]: one["calls"] for one in json.loads(TOOLS.read_text(encoding="utf-8"))["questions"]}

    def perfect(body: Any) -> dict[str, Any]:
        calls = questions[body["messages"][0]["content"]]
        found = called(*((call["name"], json.dumps(call["arguments"])) for call in calls))
        return {"content": None if calls else "Yes.", "tool_calls": found, "finish": "tool_calls" if calls else "stop"}

    right, silent, cut = (
        on_servers([Toy(chat=chat)], ask_tools(64))
        for chat in (perfect, lambda body: {"content": "No."}, lambda body: {"content": "No", "finish": "length"})
    )
    no_calls = sum(not calls for calls in questions.values())
    assert (sum(right.scores.values()), sum(silent.scores.values())) == (len(questions), no_calls)
    assert sum(cut.scores.values()) == 0  # a thought without end is no decision against a call


# --- needles --------------------------------------------------------------------------------------------------------


def test_needles_lie_at_their_depth_within_the_context() -> None:
    encode, decode = lambda text: [*text.encode()], lambda tokens: bytes(tokens).decode(errors="replace")
    needles = Needles(encode=encode, decode=decode, context=4000, depths=(0.1, 0.9))
    prompts: list[str] = []

    def find(body: Any) -> dict[str, Any]:
        prompts.append(body["messages"][0]["content"])
        return {"content": prompts[-1].partition("archive is ")[2][:6]}

    found = on_servers([Toy(chat=find)], needles.ask(0.5))
    assert found.scores == {"0": 1.0, "1": 1.0}
    assert all(1700 < len(encode(prompt)) < 2100 for prompt in prompts)
    places = sorted(prompt.index("access code") / 2000 for prompt in prompts)
    assert places == [pytest.approx(0.1, abs=0.05), pytest.approx(0.9, abs=0.1)]
    assert not any(on_servers([Toy()], needles.ask(0.5)).scores.values())
    short = Needles(encode=encode, decode=decode, context=200, depths=(0.5,))
    with pytest.raises(RequestError, match="a context of 200 tokens is too short for a question at 25% of it"):
        short.ask(0.25)


# --- what is counted ------------------------------------------------------------------------------------------------


def test_p_values_by_hand_and_an_interval() -> None:
    """McNemar's exact test: 2 * P(X <= min) of a fair coin; scipy.stats.binomtest(2, 10) is 0.109375, too."""
    assert mcnemar(8, 2) == mcnemar(2, 8) == 112 / 1024
    assert (mcnemar(0, 0), mcnemar(5, 5), mcnemar(6, 0)) == (1.0, 1.0, 2 / 64)
    low, high = mean_interval([1.0] * 50 + [-1.0] * 50)
    assert (low, high) == (pytest.approx(-0.196, abs=0.03), pytest.approx(0.196, abs=0.03))  # 1.96 / sqrt(100)


def test_pairs_are_of_the_same_questions() -> None:
    found = pair({"a": 1.0, "b": 0.0, "c": 0.0, "x": 1.0}, {"a": 0.0, "b": 1.0, "c": 1.0, "y": 1.0})
    assert (found.questions, found.lost, found.gained, found.p_value) == (3, 2, 1, 1.0)
    assert found.difference == pytest.approx(-1 / 3)
    assert pair({"a": 0.5}, {"a": 0.0}).p_value is None
    assert pair({}, {"a": 1.0}).questions == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [("so " * 40, True), ("x" * 100, True), ("x" * 99, False), ("wait, no. " * 9, False), ("long stretch " * 3, False),
     ("".join(map(str, range(200))), False), ("so " * 40 + "the end", False), ("", False)],
)  # fmt: skip
def test_loops(text: str, found: bool) -> None:
    assert loops(text) == found


def test_thought_is_counted_where_the_server_does_not() -> None:
    message = {"content": "<think>one two three</think>four"}
    plain = read_answer(
        {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 6}}
    )
    assert (plain.reasoning, plain.text) == ("<think>one two three", "four")
    told = Answer(finish="stop", prompt_tokens=1, output_tokens=4, thought_tokens=2, reasoning="a b c d", text="")
    found = count_usage([plain, told], lambda text: len(text.split()))
    assert found and (found.thought_tokens, found.output_tokens, found.cut_offs) == (2.5, 5.0, 1)
    assert count_usage([], len) is None


# --- the whole ------------------------------------------------------------------------------------------------------


def lm_eval(tasks: object, name: str, address: str, model: str, tokenizer: Path) -> TaskRun:
    """A run of lm-eval in which the source is right twice and the release once."""
    scores = {"0": 1.0, "1": float(model == "bf16")}
    result = TaskResult(figures={"exact_match,none": sum(scores.values()) / 2}, shots=0, samples=2)
    results = TaskResults(lm_eval="0", model=model, tasks={"t": result}, url=address)
    answer = Answer(finish="stop", prompt_tokens=1, output_tokens=4, thought_tokens=2, reasoning="a b", text="c")
    return TaskRun(results=results, members=frozenset(), samples={"t": {"exact_match,none": scores}}, answers=[answer])


def test_both_servers_are_set_beside_each_other(example_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without log-probabilities the rest is measured, and the table says what is missing."""
    monkeypatch.setattr(suite, "run_task", lm_eval)
    release = StandIn(plain=Toy(logprobs=False), context=512)
    with serving(release), serving(StandIn(plain=Toy(), model="bf16", context=1024)) as source:
        servers = Servers(url=release.url, source_url=source.url, suite="quick")
        found = measure_servers(example_model, servers, ignore)
        with pytest.raises(FourfoldError, match="expected another server than --url"):
            Servers(url=release.url, source_url=f"{release.url}/v1", suite="quick").sides()
    paired = (found.tasks["t"].paired or {})["exact_match,none"]
    assert (paired.lost, paired.gained, paired.difference) == (1, 0, -0.5)
    assert found.source_model == "bf16" and found.suite == "quick" and found.kl is None
    assert found.unmeasured.keys() == {"KL", "whether the server serves this release"}
    assert "HTTP 404" in found.unmeasured["KL"]
    assert {"tool calls", "needle at 90% of the context"} < found.tasks.keys()
    grid = task_grid(found)
    assert grid and dict(zip(grid.header, grid.rows[0], strict=True))["lost / gained"] == "1 / 0"
    assert any(line.startswith("Not measured: KL") for line in server_lines(found))
    assert any(body.get("max_tokens") == 256 for body in release.seen)  # half of the shorter context


@pytest.mark.parametrize(
    ("toy", "said"),
    [
        (Toy(noise=0.02, most=5), ""),
        (Toy(llama=True), ""),
        (Toy(noise=0.6, most=5), "it serves another model, or computes it wrong"),
        (Toy(noise=0.6, llama=True), "it serves another model"),
    ],
)  # fmt: skip
def test_the_server_must_serve_the_release(tmp_path: Path, toy: Toy, said: str) -> None:
    tokens = WINDOWS[0]
    values = [distribution(tokens[:end], 0.0) for end in range(1, len(tokens))]
    likeliest = [max(range(VOCABULARY), key=one.__getitem__) for one in values]
    Reference(
        tokens=tokens, logprobs=[one[token] for one, token in zip(values, tokens[1:], strict=True)],
        likeliest=[[best] for best in likeliest],
        likeliest_logprobs=[[one[best]] for one, best in zip(values, likeliest, strict=True)],
    ).write(tmp_path / REFERENCE)  # fmt: skip
    if said:
        with pytest.raises(FourfoldError, match=said):
            on_servers([toy], lambda session: require_served(session, tmp_path))
    else:
        on_servers([toy], lambda session: require_served(session, tmp_path))
    with pytest.raises(RequestError, match="has no reference"):
        on_servers([toy], lambda session: require_served(session, tmp_path.parent))


def test_suites_name_tasks_and_fit() -> None:
    assert all(one.tasks.names and one.tasks.chat and one.tasks.tokens for one in SUITES.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "quick"], "--tasks, --suite, --source-url: got no --url"),
        (["--source-url", "http://h:1", "--source", "m"], "got no --url"),
        ([], "--source: got none"),
        (["--suite", "some", "--url", "http://h:1"], "quick"),
        (["--url", "http://127.0.0.1:1"], "got no metrics.json, expected one"),
    ],
)
def test_bad_input(example_model: Path, words: list[str], said: str) -> None:
    done = invoke("evaluate", example_model, *words)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.stderr
