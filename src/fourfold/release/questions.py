"""Questions that fourfold asks a server itself: which tools to call, and needles in long prompts. Checked exactly."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.release.answers import Answer, read_answer
from fourfold.serve.client import RequestError, Session

TOOLS = TEXT / "heldout" / "tools.json"
AT_ONCE = 8
SHARES = (0.25, 0.5, 0.9)  # of the context, for prompts with a needle
NEEDLE = " The access code of the {place} archive is {code}. "
QUESTION = "\n\nWhat is the access code of the {place} archive? Answer with the number alone."
PLACES = ("Amber", "Cedar", "Granite", "Harbour", "Juniper", "Meadow", "Orchard", "Willow")
NEEDLE_TOKENS, TEMPLATE_TOKENS, ANSWER_TOKENS = 40, 64, 32


@dataclass(frozen=True, kw_only=True)
class Answered:
    """scores: by question, 1 for a right answer."""

    answers: list[Answer] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


Ask = Callable[[Session], Awaitable[Answered]]


async def _ask(session: Session, bodies: Sequence[dict[str, Any]], right: Callable[[int, Answer], bool]) -> Answered:
    """Send chat requests, AT_ONCE at a time. right: of a question's number and its answer. Raises RequestError."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(body: dict[str, Any]) -> Answer:
        async with gate:
            return read_answer(await session.post("/v1/chat/completions", {"temperature": 0, **body}))

    answers = await asyncio.gather(*map(ask, bodies))
    return Answered(
        answers=answers, scores={str(number): float(right(number, one)) for number, one in enumerate(answers)}
    )


# --- tools ----------------------------------------------------------------------------------------------------------


def ask_tools(tokens: int) -> Ask:
    """tokens: of an answer with its thought."""
    content = json.loads(TOOLS.read_text(encoding="utf-8"))
    tools, questions = content["tools"], content["questions"]
    bodies = [
        {"messages": [{"role": "user", "content": one["ask"]}], "tools": tools, "max_tokens": tokens}
        for one in questions
    ]

    def right(number: int, answer: Answer) -> bool:
        return answer.finish != "length" and same_calls(answer.calls, questions[number]["calls"])

    async def ask(session: Session) -> Answered:
        return await _ask(session, bodies, right)

    return ask


def same_calls(calls: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether a server's calls are those wanted, in any order: names, arguments and their types, nothing more."""
    try:
        found = [(one["function"]["name"], _arguments(one["function"]["arguments"])) for one in calls]
    except (LookupError, TypeError, ValueError):
        return False
    expected = [(one["name"], one["arguments"]) for one in wanted]
    return sorted(map(_spelled, found)) == sorted(map(_spelled, expected))


def _arguments(text: str) -> Any:
    """JSON has one type of number: 5.0 is 5."""
    return json.loads(text, parse_float=lambda found: int(value) if (value := float(found)).is_integer() else value)


def _spelled(call: object) -> str:
    return json.dumps(call, sort_keys=True)


# --- needles --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Prompts with one fact among held-out text. encode, decode: of the release's tokenizer; depths: of the fact."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    context: int
    depths: Sequence[float]

    def ask(self, share: float) -> Ask:
        """Raises RequestError if the question alone does not fit that share of the context."""
        size = min(int(share * self.context), self.context - ANSWER_TOKENS) - NEEDLE_TOKENS - TEMPLATE_TOKENS
        if size <= 0:
            raise RequestError(f"a context of {self.context} tokens is too short for a question at {share:.0%} of it")
        text = (TEXT / HELDOUT_TEXTS["wikitext-2-test"].file).read_text(encoding="utf-8")
        hay = self.encode(text[: 16 * size])
        hay = (hay * (size // len(hay) + 1))[:size]
        draw, bodies, codes = random.Random(self.context), list[dict[str, Any]](), list[str]()
        for number, depth in enumerate(self.depths):
            place, code = PLACES[number % len(PLACES)], str(draw.randint(100_000, 999_999))
            cut = int(depth * size)
            words = [self.decode(hay[:cut]), NEEDLE.format(place=place, code=code), self.decode(hay[cut:])]
            content = "".join([*words, QUESTION.format(place=place)])
            codes.append(code)
            bodies.append({
                "messages": [{"role": "user", "content": content}], "max_tokens": ANSWER_TOKENS,
                "chat_template_kwargs": {"enable_thinking": False},
            })  # fmt: skip

        async def ask(session: Session) -> Answered:
            return await _ask(session, bodies, lambda number, answer: codes[number] in answer.text)

        return ask
