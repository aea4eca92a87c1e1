"""verify of a running server under load, over OpenAI's completions. Nothing is written. docs/verification.md."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.datatypes import Event, FourfoldError, Progress
from fourfold.records.results import Check, Level, Verdict
from fourfold.release.served_kl import require_served
from fourfold.release.verify.check import judge, passed
from fourfold.release.verify.load import (
    Loaded,
    Reply,
    Round,
    Schedule,
    Scores,
    Text,
    heldout_text,
    judge_load,
    lengths,
    schedules,
    windows,
)
from fourfold.release.verify.vllm import UNDER_LOAD
from fourfold.serve import client
from fourfold.serve.client import RequestError, Session
from fourfold.serve.engines import KERNEL_ISSUES

TOKENS = 256  # of each text
CHARACTERS = 4  # about one token, where the server does not tokenize
CANDIDATES = 2
ANSWERS = "answers"


@dataclass(frozen=True, kw_only=True)
class Server(Session):
    """engine: by its metrics, "" where it has none; tokens: of each text."""

    engine: str
    tokens: int

    async def generate(self, prompt: list[int] | str) -> Text:
        """Raises RequestError."""
        options = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        body = {"prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "logprobs": CANDIDATES}
        return read_text(await self.post("/v1/completions", body | options), self.tokens)

    async def score(self, prompt: list[int] | str, text: Text) -> Scores | None:
        """None if the server scores no prompts, or has given no token ids. Raises RequestError."""
        if isinstance(prompt, str) or not all(isinstance(token, int) for token in text.tokens):
            return None
        body = {"prompt": [*prompt, *text.tokens], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        return read_scores(await self.post("/v1/completions", body), len(prompt), len(text.tokens))


def read_text(answer: Any, tokens: int) -> Text:
    """Of a completion by vLLM or SGLang, or by llama.cpp, whose log-probabilities are those of chat.

    Raises RequestError if it is none with so many tokens and log-probabilities.
    """
    try:
        choice = answer["choices"][0]
        found = choice.get("logprobs") or {}
        if "content" in found:
            steps = found["content"]
            ids, logprobs = [step["id"] for step in steps], [step["logprob"] for step in steps]
            candidates = [[each["logprob"] for each in step["top_logprobs"]] for step in steps]
        else:
            ids, logprobs = choice.get("token_ids") or found["tokens"], found["token_logprobs"]
            candidates = [list(each.values()) for each in found["top_logprobs"]]
        best = [sorted(map(float, each), reverse=True) for each in candidates]
        # One candidate alone: two tokens that are the same text. Their distance is not known, so it counts as a tie.
        margins = [each[0] - each[1] if len(each) > 1 else 0.0 for each in best]
        text = Text(list(ids), list(map(float, logprobs)), margins)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"got no log-probabilities ({type(error).__name__}: {error})"
        raise RequestError(f"{problem}, expected those of {CANDIDATES} tokens at each place") from None
    if not len(text.tokens) == len(text.logprobs) == len(margins) == tokens:
        raise RequestError(f"got {len(text.tokens)} tokens, expected {tokens}: the server must know ignore_eos")
    return text


def read_scores(answer: Any, prompt: int, tokens: int) -> Scores | None:
    """Of a completion with `echo`: the last `tokens` of the prompt. None if it is not echoed."""
    try:
        found = answer["choices"][0]["logprobs"]
        logprobs, best = found["token_logprobs"], found["top_logprobs"]
        if len(logprobs) < prompt + tokens:
            return None
        own = list(map(float, logprobs[prompt : prompt + tokens]))
        top = [max(each.values()) for each in best[prompt : prompt + tokens]]
        return Scores(own, list(map(max, own, top)))
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def verify_server(
    url: str, at_once: int, release: Path | None, limit_seconds: float, progress: Progress, tokens: int = TOKENS
) -> Verdict:
    """release: that the server must serve; limit_seconds: for each request; tokens: of each text.

    Raises FourfoldError if no server answers, it has other requests, gives no log-probabilities, or serves another
    model than `release`.
    """
    address = client.root(url)
    model = client.model_name(address)
    begin = time.perf_counter()
    checks = asyncio.run(_checks(address, model, at_once, release, limit_seconds, progress, tokens))
    levels = (Level.ENGINE,)
    seconds = {"engine": time.perf_counter() - begin}
    return Verdict(passed=passed(levels, checks), content="", levels=levels, checks=tuple(checks), seconds=seconds)


async def _checks(
    address: str, model: str, at_once: int, release: Path | None, limit_seconds: float, progress: Progress, tokens: int
) -> list[Check]:
    async with client.open_client(at_once) as connection:
        first = await client.scrape(connection, address)
        if first and (others := int(first.value("running") + first.value("waiting"))):
            raise FourfoldError(f"{address}: got {others} requests of others, expected none: nothing would run alone")
        engine = first.engine if first else ""
        server = Server(
            connection=connection, address=address, model=model, engine=engine, tokens=tokens,
            limit_seconds=limit_seconds,
        )  # fmt: skip
        try:
            if release is not None:
                await require_served(server, release)
            prompts = await _prompts(server, at_once)
            begin = time.perf_counter()
            alone = [await _alone(server, number, prompt) for number, prompt in enumerate(prompts)]
            pause = (time.perf_counter() - begin) / (len(prompts) * tokens)
        except RequestError as error:
            raise FourfoldError(f"{address}: {error}") from None
        how = "token ids" if isinstance(prompts[0], list) else "text"
        scored = "scores prompts" if alone[0].scores else "scores no prompts"
        seen = f"{model} at {address}; {engine or 'no metrics'}; prompts as {how}; {scored}"
        checks = [judge(Level.ENGINE, ANSWERS, [], seen, url=address, model=model, engine=engine)]
        try:
            rounds = []
            for each in schedules(at_once):
                progress(Event(kind="stage", stage=f"{at_once} at once, {each.name}"))
                rounds.append(await _round(server, prompts, each, at_once, pause, alone))
        except RequestError as error:
            problem = "\n".join([f"a request failed that runs alone: {error}", *_known_issues(engine)])
            return [*checks, judge(Level.ENGINE, UNDER_LOAD, [problem], "")]
        loaded = Loaded(at_once=at_once, alone=alone, rounds=rounds)
        return [*checks, judge_load(UNDER_LOAD, loaded, lambda: _known_issues(engine))]


def _known_issues(engine: str) -> list[str]:
    """Of this engine, or of all where it is not known; the GPU is not."""
    return [str(issue) for issue in KERNEL_ISSUES if engine in ("", issue.engine)]


async def _prompts(server: Server, at_once: int) -> Sequence[list[int] | str]:
    """Windows of held-out text: token ids where the server tokenizes, else text."""
    text, sizes = heldout_text(at_once), lengths(at_once // 2)
    try:  # vLLM and SGLang name it `prompt`, llama.cpp `content`
        answer = await server.post("/tokenize", {"prompt": text, "content": text, "add_special_tokens": False})
        ids = [int(token) for token in answer["tokens"]]
    except (RequestError, LookupError, TypeError, ValueError):
        return windows(text, [CHARACTERS * size for size in sizes])
    return windows(ids, sizes)


async def _alone(server: Server, number: int, prompt: list[int] | str) -> Reply:
    text = await server.generate(prompt)
    return Reply(number, text, await server.score(prompt, text))


async def _round(
    server: Server, prompts: Sequence[list[int] | str], schedule: Schedule, at_once: int, pause: float,
    alone: Sequence[Reply],
) -> Round:  # fmt: skip
    """pause: seconds between two that join, about those of a token. Raises RequestError."""
    places: Iterator[int] = iter(range(len(schedule.order)))
    texts: dict[int, Text] = {}

    async def work(number: int) -> None:
        if schedule.joining:
            await asyncio.sleep(number * pause)
        for place in places:
            texts[place] = await server.generate(prompts[schedule.order[place]])

    begin = time.perf_counter()
    results = await asyncio.gather(*map(work, range(at_once)), return_exceptions=True)
    seconds = time.perf_counter() - begin
    for result in results:
        if isinstance(result, BaseException):
            raise result
    replies = []
    for place, number in enumerate(schedule.order):
        text, own = texts[place], alone[number]
        again = own.scores is not None and text.tokens != own.text.tokens
        replies.append(Reply(number, text, await server.score(prompts[number], text) if again else None))
    return Round(schedule.name, seconds, replies)
