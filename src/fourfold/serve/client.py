"""Requests to a server that speaks OpenAI's protocol: one chat request, streamed and timed; its metrics; its models."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx2

from fourfold.datatypes import FourfoldError
from fourfold.serve.metrics import Scrape

LOOK_SECONDS = 10.0  # for lists of models and metrics
ERROR_CHARACTERS = 300  # shown of an answer that is an error
THOUGHT = ("reasoning", "reasoning_content")  # vLLM's name, SGLang's
BUSY, ATTEMPTS, WAIT_SECONDS, MOST_WAIT_SECONDS = (429, 503), 5, 1.0, 60.0
OK, TIMED_OUT, CUT, UNREACHED = "ok", "timed out", "cut stream", "no connection"


@dataclass(kw_only=True)
class Reply:
    """Result of a chat request. outcome: OK, TIMED_OUT, CUT, UNREACHED or as "HTTP 503"; detail: of a failure.

    first, last: seconds until the first and the last chunk with text; gaps: between chunks. Tokens are the server's own
    count, `usage`: a chunk holds several where drafts were accepted.
    """

    outcome: str = CUT
    detail: str = ""
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int | None = None
    reasoning: str = ""
    content: str = ""
    tool_calls: list[Any] = field(default_factory=list)
    finish: str = ""

    @property
    def ok(self) -> bool:
        return self.outcome == OK

    @property
    def seconds_per_token(self) -> float | None:
        """After the first chunk; None where there was but one token."""
        return (self.last - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else None


class RequestError(Exception):
    """A request that got no answer in full. status: of the answer, 0 without one."""

    def __init__(self, problem: str, status: int = 0) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Session:
    """Requests to one model of a server."""

    connection: httpx2.AsyncClient
    address: str
    model: str
    limit_seconds: float

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the answer's JSON; wait and ask again where the server is busy. Raises RequestError."""
        for last in (False,) * (ATTEMPTS - 1) + (True,):
            try:
                answer = await self.connection.post(
                    f"{self.address}{path}", json={"model": self.model, **body}, timeout=self.limit_seconds
                )
                if answer.status_code == 200:
                    return answer.json()
            except (httpx2.HTTPError, ValueError) as error:
                raise RequestError(f"{type(error).__name__}: {error}") from None
            if last or answer.status_code not in BUSY:
                break
            wait = answer.headers.get("retry-after", "")
            await asyncio.sleep(min(float(wait), MOST_WAIT_SECONDS) if wait.isdecimal() else WAIT_SECONDS)
        problem = f"HTTP {answer.status_code}: {answer.text[:ERROR_CHARACTERS]}"
        raise RequestError(problem, answer.status_code)


def root(url: str) -> str:
    """A server's address, given with or without /v1. Raises FourfoldError for one that is no address."""
    address = url.rstrip("/").removesuffix("/v1")
    if not address.startswith(("http://", "https://")):
        raise FourfoldError(f"URL: got {url!r}, expected the address of a server, as in http://localhost:8000")
    return address


def open_client(connections: int = 2) -> httpx2.AsyncClient:
    """A client without the environment's proxies. Each request sets its own deadline."""
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
    return httpx2.AsyncClient(timeout=None, limits=limits, headers={"accept-encoding": "identity"}, trust_env=False)


def model_name(address: str) -> str:
    """Return the name of the server's first model. Raises FourfoldError if no such server answers."""
    return str(first_model(address)["id"])


def context_length(address: str) -> int | None:
    """Tokens of a request's context, as vLLM and SGLang say it, or llama.cpp; None where neither does."""
    if found := first_model(address).get("max_model_len"):
        return int(found)
    try:
        answer = httpx2.get(f"{address}/props", timeout=LOOK_SECONDS, trust_env=False)
        return int(answer.json()["default_generation_settings"]["n_ctx"])
    except (httpx2.HTTPError, ValueError, LookupError, TypeError):
        return None


def first_model(address: str) -> dict[str, Any]:
    """Return what the server says of its first model. Raises FourfoldError if no such server answers."""
    try:
        answer = httpx2.get(f"{address}/v1/models", timeout=LOOK_SECONDS, trust_env=False)
        answer.raise_for_status()
        found = answer.json()["data"][0]
        return {**found, "id": found["id"]}
    except (httpx2.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise FourfoldError(
            f"{address}: got no list of models at /v1/models ({type(error).__name__}: {error}), expected a running "
            "server with OpenAI's protocol, as vLLM and SGLang have"
        ) from None


async def scrape(client: httpx2.AsyncClient, address: str) -> Scrape | None:
    """The server's counters now; None if it has none to show."""
    try:
        answer = await client.get(f"{address}/metrics", timeout=LOOK_SECONDS)
        found = Scrape.parse(answer.text) if answer.status_code == 200 else None
    except (httpx2.HTTPError, ValueError):
        return None
    return found if found is not None and found.engine else None


async def chat(client: httpx2.AsyncClient, address: str, body: Mapping[str, Any], limit_seconds: float) -> Reply:
    """Send a chat request and follow its stream to the end, for at most so long. What goes wrong is in the reply."""
    reply = Reply()
    sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asyncio.timeout(limit_seconds):
            await _follow(client, f"{address}/v1/chat/completions", sent, reply)
    except TimeoutError:
        reply.outcome, reply.detail = TIMED_OUT, f"not at its end after {limit_seconds:g} s"
    except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        reply.outcome, reply.detail = UNREACHED, str(error)
    except httpx2.HTTPError as error:
        reply.outcome, reply.detail = CUT, f"{type(error).__name__}: {error}"
    return reply


async def _follow(client: httpx2.AsyncClient, url: str, body: Mapping[str, Any], reply: Reply) -> None:
    request = client.build_request("POST", url, json=body)
    begin = time.perf_counter()
    async with aclosing(await client.send(request, stream=True)) as answer:
        if answer.status_code != 200:
            text = (await answer.aread()).decode("utf-8", "replace")
            reply.outcome, reply.detail = f"HTTP {answer.status_code}", text[:ERROR_CHARACTERS]
            return
        async for event in _events(answer):
            if event == b"[DONE]":
                reply.outcome = OK if reply.output_tokens else CUT
                reply.detail = "" if reply.output_tokens else "the server sent no usage, so tokens cannot be counted"
                return
            try:
                chunk = json.loads(event)
            except ValueError:
                reply.detail = f"not JSON: {event[:ERROR_CHARACTERS]!r}"
                return
            if "error" in chunk:
                reply.detail = str(chunk["error"])[:ERROR_CHARACTERS]
                return
            _add_chunk(chunk, time.perf_counter() - begin, reply)
    reply.detail = "the stream ended without [DONE]"


async def _events(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """Data of server-sent events, one line each, as both engines send them."""
    rest = b""
    async for part in answer.aiter_raw():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _add_chunk(chunk: Mapping[str, Any], now: float, reply: Reply) -> None:
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        thought = next((delta[name] for name in THOUGHT if delta.get(name)), "")
        if thought or delta.get("content") or delta.get("tool_calls"):
            if reply.first:
                reply.gaps.append(now - reply.last)
            else:
                reply.first = now
            reply.last = now
        reply.reasoning += thought
        reply.content += delta.get("content") or ""
        reply.tool_calls += delta.get("tool_calls") or ()
        reply.finish = choice.get("finish_reason") or reply.finish
    if usage := chunk.get("usage"):
        reply.prompt_tokens = usage.get("prompt_tokens") or 0
        reply.output_tokens = usage.get("completion_tokens") or 0
        reply.reasoning_tokens = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
