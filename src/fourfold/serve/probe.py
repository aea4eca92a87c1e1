"""One chat request that shows whether a server just started does what its command promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fourfold.serve import client
from fourfold.serve.client import Reply
from fourfold.serve.command import Command
from fourfold.serve.metrics import OFF, Scrape, acceptance

LIMIT_SECONDS = 300.0  # the first request compiles kernels
TOKENS = 96
SMALL_BUDGET = 16  # thinking tokens to ask for where the server's own budget is too long to wait for
MESSAGES = [
    {"role": "system", "content": "You are a helpful assistant. Use a tool where one helps."},
    {"role": "user", "content": "What is the weather in Paris, and what is 6 times 7?"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """alive: None where it could not be seen."""

    what: str
    alive: bool | None
    seen: str


@dataclass(frozen=True, kw_only=True)
class Probed:
    """findings: in order; pool: of the KV cache, as the engine tells, {} if it does not."""

    findings: tuple[Finding, ...]
    pool: dict[str, Any]


def probe(address: str, command: Command) -> Probed:
    return asyncio.run(_probe(address, command))


async def _probe(address: str, command: Command) -> Probed:
    async with client.open_client() as asking:
        before = await client.scrape(asking, address)
        body: dict[str, Any] = {
            "model": command.name,
            "messages": MESSAGES,
            "tools": [WEATHER],
            "max_tokens": TOKENS,
            "temperature": 0,
        }
        budget = command.thinking_budget
        if budget is not None and budget >= TOKENS:
            body["thinking_token_budget"] = budget = SMALL_BUDGET
        reply = await client.chat(asking, address, body, LIMIT_SECONDS)
        after = await client.scrape(asking, address)
    findings = _findings(command, reply, before, after, budget)
    known = after or before  # a first request may be the end of a server
    return Probed(findings=tuple(findings), pool=known.pool() if known else {})


def _findings(
    command: Command, reply: Reply, before: Scrape | None, after: Scrape | None, budget: int | None
) -> Iterator[Finding]:
    yield Finding(
        what="chat",
        alive=reply.ok,
        seen=f"{reply.output_tokens} tokens, the first after {reply.first:.1f} s"
        if reply.ok
        else f"{reply.outcome}: {reply.detail}",
    )
    if not reply.ok:
        return
    calls = f"{len(reply.tool_calls)} chunks of a call" if reply.tool_calls else "none called"
    yield Finding(what="tools", alive=True, seen=f"a request with a tool is accepted, {calls}")
    if command.reasoning:
        yield Finding(
            what="thinking",
            alive=bool(reply.reasoning),
            seen=f"{len(reply.reasoning)} characters apart from the answer"
            + ("" if reply.reasoning_tokens is None else f", {reply.reasoning_tokens} tokens"),
        )
    if command.forecast.cache.drafts:
        yield _drafts(before, after)
    if budget is not None:
        yield _budget(reply, budget)


def _drafts(before: Scrape | None, after: Scrape | None) -> Finding:
    if before is None or after is None:
        return Finding(what="drafts", alive=None, seen=OFF)
    found = acceptance(before, after)
    if found is None:
        return Finding(what="drafts", alive=False, seen="no token was drafted")
    return Finding(
        what="drafts",
        alive=found.rate > 0,
        seen=f"{found.rate:.0%} accepted, {found.mean_length:.2f} tokens a step",
    )


def _budget(reply: Reply, budget: int) -> Finding:
    if reply.reasoning_tokens is None:
        return Finding(what="thinking budget", alive=None, seen="the server does not count thinking tokens")
    return Finding(
        what="thinking budget",
        alive=reply.reasoning_tokens <= budget,
        seen=f"{reply.reasoning_tokens} tokens thought, {budget} allowed",
    )
