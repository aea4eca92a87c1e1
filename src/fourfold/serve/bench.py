"""fourfold bench: load a live server at several concurrencies; latency, speed, draft acceptance and cache of each."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import httpx2
from msgspec import structs

from fourfold import __version__
from fourfold.bundled import TEXT
from fourfold.datatypes import Event, FourfoldError, Progress
from fourfold.records.bench import Bench, BenchLevel, BenchLoad, Quantiles, Requests
from fourfold.serve import client
from fourfold.serve.client import Reply
from fourfold.serve.metrics import OFF, acceptance, changes
from fourfold.serve.served import REFERENCE

Messages = list[dict[str, Any]]

BUILT_IN = TEXT / "heldout" / "chat.jsonl"  # questions that fourfold never calibrates on
LONG = TEXT / "heldout" / "wikitext-2-test.txt"  # what prompts of a given length are cut from
TRIAL_CHARACTERS = 4000  # whose tokens the server counts
WATCH_SECONDS = 1.0  # between looks at the gauges while a load runs
QUANTILES = (0.5, 0.9, 0.99)
WARMUP = 1  # requests that are not counted
# The card of the reference release, measured by its publisher on 4 x RTX 3060, one request at a time.
CARD: dict[str, dict[str, Any]] = {
    "vllm": {
        "engine": "vLLM 0.19.1, 2 draft tokens", "decode_tokens_per_second": [56, 82], "acceptance_rate": [0.70, 0.89],
        "acceptance_by_position": [0.93, 0.85], "acceptance_length": [2.4, 2.8], "pool_tokens": 160_800,
    },
    "sglang": {
        "engine": "SGLang 0.5.10, 4 draft tokens", "decode_tokens_per_second": [52, 141],
        "acceptance_rate": [0.34, 0.70], "acceptance_length": [1.4, 2.8],
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Load:
    """requests: of a level, None for 4 times its concurrency, at least 8; prompts: a file, None for built-in ones;
    contexts: tokens of each prompt, of held-out text, each a level for each concurrency.
    """

    concurrency: tuple[int, ...]
    requests: int | None
    output_tokens: int
    temperature: float
    prompts: Path | None
    request_seconds: float
    level_seconds: float
    contexts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.contexts and self.prompts:
            raise FourfoldError("--context and --prompts exclude each other: prompts by length, or as a file has them")


def bench(url: str, load: Load, progress: Progress) -> Bench:
    """Measure a server. Raises FourfoldError if none answers, or for prompts that cannot be read."""
    prompts = read_prompts(load.prompts)
    return asyncio.run(_bench(client.root(url), load, prompts, progress))


async def _bench(address: str, load: Load, prompts: Sequence[Messages], progress: Progress) -> Bench:
    name, levels = client.model_name(address), []
    _check_contexts(address, load)
    async with client.open_client(max(load.concurrency) + 1) as connection:
        first = await client.scrape(connection, address)
        for context, concurrency in product(load.contexts or (None,), load.concurrency):
            run = _Level(connection, address, name, load, concurrency, progress)
            given = prompts if context is None else await run.long_prompts(context)
            levels.append(structs.replace(await run.measure(given), context=context))
            if not levels[-1].requests.ok:
                text = f"concurrency {levels[-1].title}: no request came through; stopped there"
                progress(Event(kind="note", text=text))
                break
    engine = first.engine if first else ""
    return Bench(
        url=address, model=name, fourfold=__version__, engine=engine,
        metrics="read before and after each level" if first else OFF, pool=first.pool() if first else {},
        load=BenchLoad(load.output_tokens, load.temperature, str(load.prompts or "built-in")), levels=levels,
        card=CARD.get(engine) if REFERENCE.lower() in name.lower() else None,
    )  # fmt: skip


def _check_contexts(address: str, load: Load) -> None:
    """Raise FourfoldError for prompts longer than the server takes."""
    longest = client.context_length(address) if load.contexts else None
    if longest is not None and (most := max(load.contexts)) + load.output_tokens > longest:
        fix = f"and {load.output_tokens} of the answer, expected at most {longest:,}, the server's context"
        raise FourfoldError(f"--context: got {most:,} tokens {fix}")


@dataclass
class _Level:
    """One concurrency: its requests, bounded in number and time, and the server's counters around them."""

    connection: httpx2.AsyncClient
    address: str
    model: str
    load: Load
    concurrency: int
    progress: Progress
    replies: list[Reply] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)

    async def measure(self, prompts: Sequence[Messages]) -> BenchLevel:
        for _ in range(WARMUP):
            await self._send(prompts[-1])
        count = self.load.requests or max(8, 4 * self.concurrency)
        bodies = islice(cycle(prompts), count)
        before = await client.scrape(self.connection, self.address)
        watcher = asyncio.create_task(self._watch()) if before else None
        begin, spent = time.perf_counter(), time.process_time()
        try:
            async with asyncio.timeout(self.load.level_seconds):
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.concurrency):
                        workers.create_task(self._work(bodies, count))
        except TimeoutError:
            text = f"concurrency {self.concurrency}: stopped after {self.load.level_seconds:g} s, not all was answered"
            self.progress(Event(kind="note", text=text))
        seconds, spent = time.perf_counter() - begin, time.process_time() - spent
        if watcher:
            watcher.cancel()
        after = await client.scrape(self.connection, self.address) if before else None
        level = summarize(self.concurrency, count, self.replies, seconds, spent)
        if before is None or after is None:
            return level
        peak = {"cache_usage_peak": max(self.usage)} if self.usage else {}
        return structs.replace(level, acceptance=acceptance(before, after), server=changes(before, after) | peak)

    async def long_prompts(self, context: int) -> list[Messages]:
        """Prompts of about so many tokens by the server's own count, each from another place of the text.

        Raises FourfoldError if the server does not answer to a first one.
        """
        text = LONG.read_text(encoding="utf-8")
        trial = await self._send([{"role": "user", "content": text[:TRIAL_CHARACTERS]}], output_tokens=1)
        if not trial.ok or not trial.prompt_tokens:
            raise FourfoldError(f"{self.address}: got no count of a prompt's tokens ({trial.outcome}: {trial.detail})")
        length = max(1, context * TRIAL_CHARACTERS // trial.prompt_tokens)
        count = self.load.requests or max(8, 4 * self.concurrency)
        text *= -(-2 * length // len(text))
        starts = [number * (len(text) - length) // (count + WARMUP) for number in range(count + WARMUP)]
        return [[{"role": "user", "content": text[start : start + length]}] for start in starts]

    async def _work(self, bodies: Iterator[Messages], count: int) -> None:
        for messages in bodies:
            self.replies.append(await self._send(messages))
            done, stage = len(self.replies), f"concurrency {self.concurrency}"
            self.progress(Event(kind="stage", stage=stage, done=done, total=count, unit="requests"))

    async def _send(self, messages: Messages, output_tokens: int | None = None) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens or self.load.output_tokens,
            "temperature": self.load.temperature,
            "ignore_eos": True,  # as many tokens from each, or levels could not be compared
        }
        return await client.chat(self.connection, self.address, body, self.load.request_seconds)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if now := await client.scrape(self.connection, self.address):
                self.usage.append(now.value("cache_usage"))


def summarize(concurrency: int, sent: int, replies: Sequence[Reply], seconds: float, spent: float) -> BenchLevel:
    """Figures of a level, but for the server's own. seconds: it took; spent: of this process's CPU."""
    good = [reply for reply in replies if reply.ok]
    output = sum(reply.output_tokens for reply in good)
    per_token = [each for reply in good if (each := reply.seconds_per_token) is not None]
    failures = Counter(reply.outcome for reply in replies if not reply.ok)
    if sent > len(replies):
        failures["not answered in time"] = sent - len(replies)
    details = {reply.outcome: reply.detail for reply in replies if not reply.ok}
    return BenchLevel(
        concurrency=concurrency, seconds=seconds, requests=Requests(sent, len(good), dict(failures), details),
        prompt_tokens=sum(reply.prompt_tokens for reply in good), output_tokens=output,
        output_tokens_per_second=output / seconds, time_to_first_token=quantiles([reply.first for reply in good]),
        time_per_output_token=quantiles(per_token),
        time_between_chunks=quantiles([gap for reply in good for gap in reply.gaps]),
        latency=quantiles([reply.last for reply in good]),
        decode_tokens_per_second=quantiles([1 / each for each in per_token if each]),
        client_core_share_at_100_tokens_per_second=spent / output * 100 if output else None,
    )  # fmt: skip


def quantiles(values: Sequence[float]) -> Quantiles | None:
    """Return mean, p50, p90 and p99, each a value that was seen; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    found = (ordered[max(0, math.ceil(q * len(ordered)) - 1)] for q in QUANTILES)
    return Quantiles(sum(ordered) / len(ordered), *found)


def read_prompts(path: Path | None) -> list[Messages]:
    """Read a .jsonl with `messages` (without a last answer) or `text`, or lines of a .txt. Raises FourfoldError."""
    place = path or BUILT_IN
    try:
        lines = [line for line in place.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FourfoldError(f"{place}: cannot be read as text: {error}") from None
    prompts = [_prompt(f"{place}: record {number}", line, place.suffix) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise FourfoldError(f"{place}: holds no prompt")
    return prompts


def _prompt(where: str, line: str, suffix: str) -> Messages:
    if suffix != ".jsonl":
        return [{"role": "user", "content": line}]
    try:
        record = json.loads(line)
        messages: Messages = record.get("messages") or [{"role": "user", "content": record["text"]}]
        while messages[-1]["role"] == "assistant":
            messages = messages[:-1]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        expected = '{"messages": [{"role": ..., "content": ...}]} or {"text": ...}'
        raise FourfoldError(f"{where}: not a prompt ({type(error).__name__}: {error}), expected {expected}") from None
    return messages
