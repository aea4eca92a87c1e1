"""One chat request that shows whether a server just started does what its command promises."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

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
        "name": "get_weather", "description": "The weather of a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}  # fmt: skip


class Finding(NamedTuple):
    """alive: None where it could not be seen."""

    what: str
    alive: bool | None
    seen: str


class Probed(NamedTuple):
    """findings: in order; pool: of the KV cache by the engine's own metrics, {} without."""

    findings: tuple[Finding, ...]
    pool: dict[str, int]


def probe(address: str, command: Command) -> Probed:
    return asyncio.run(_probe(address, command))


async def _probe(address: str, command: Command) -> Probed:
    body: dict[str, Any] = {
        "model": command.name, "messages": MESSAGES, "tools": [WEATHER], "max_tokens": TOKENS, "temperature": 0,
    }  # fmt: skip
    budget = command.thinking_budget
    if budget is not None and budget >= TOKENS:
        body["thinking_token_budget"] = budget = SMALL_BUDGET
    async with client.open_client() as connection:
        before = await client.scrape(connection, address)
        reply = await client.chat(connection, address, body, LIMIT_SECONDS)
        after = await client.scrape(connection, address)
    findings = _findings(command, reply, before, after, budget)
    scrape = after or before  # a first request may be the end of a server
    return Probed(tuple(findings), scrape.pool() if scrape else {})


def _findings(
    command: Command, reply: Reply, before: Scrape | None, after: Scrape | None, budget: int | None
) -> Iterator[Finding]:
    if not reply.ok:
        yield Finding("chat", False, f"{reply.outcome}: {reply.detail}")
        return
    yield Finding("chat", True, f"{reply.output_tokens} tokens, the first after {reply.first:.1f} s")
    calls = f"{len(reply.tool_calls)} chunks of a call" if reply.tool_calls else "none called"
    yield Finding("tools", True, f"a request with a tool is accepted, {calls}")
    if command.reasoning:
        tokens = "" if reply.reasoning_tokens is None else f", {reply.reasoning_tokens} tokens"
        seen = f"{len(reply.reasoning)} characters apart from the answer{tokens}"
        yield Finding("thinking", bool(reply.reasoning), seen)
    if command.forecast.cache.drafts:
        yield _drafts(before, after)
    if budget is not None:
        yield _budget(reply, budget)


def _drafts(before: Scrape | None, after: Scrape | None) -> Finding:
    if before is None or after is None:
        return Finding("drafts", None, OFF)
    found = acceptance(before, after)
    if found is None:
        return Finding("drafts", False, "no token was drafted")
    return Finding("drafts", found.rate > 0, f"{found.rate:.0%} accepted, {found.mean_length:.2f} tokens a step")


def _budget(reply: Reply, budget: int) -> Finding:
    tokens = reply.reasoning_tokens
    if tokens is None:
        return Finding("thinking budget", None, "the server does not count thinking tokens")
    return Finding("thinking budget", tokens <= budget, f"{tokens} tokens thought, {budget} allowed")
