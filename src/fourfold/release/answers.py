"""Answers of a server to the questions of a task: how each ended, how much of it is thought, whether it loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.records.results import Usage
from fourfold.serve.client import THOUGHT, RequestError

THOUGHT_END = "</think>"
PERIODS, LEAST_REPEATS, LEAST_CHARACTERS = 500, 4, 100  # of a loop


@dataclass(frozen=True, kw_only=True)
class Answer:
    """finish: stop, length, tool_calls; thought_tokens: None where the server does not count them; calls: of tools."""

    finish: str
    prompt_tokens: int
    output_tokens: int
    thought_tokens: int | None
    reasoning: str
    text: str
    calls: tuple[Any, ...] = ()


def read_answer(answer: Any) -> Answer:
    """Read a chat or text completion. Raises RequestError for anything else."""
    try:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        message = choice.get("message") or {"content": choice["text"]}
        text, reasoning = message.get("content") or "", next(filter(None, map(message.get, THOUGHT)), "")
        if not reasoning and THOUGHT_END in text:  # no reasoning parser
            reasoning, _, text = text.partition(THOUGHT_END)
        return Answer(
            finish=choice.get("finish_reason") or "", prompt_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=usage.get("completion_tokens") or 0, reasoning=reasoning, text=text,
            thought_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens"),
            calls=tuple(message.get("tool_calls") or ()),
        )  # fmt: skip
    except (LookupError, TypeError, AttributeError) as error:
        raise RequestError(f"got no answer ({type(error).__name__}: {error}): {str(answer)[:200]}") from None


def count_usage(answers: Sequence[Answer], count: Callable[[str], int]) -> Usage | None:
    """Return lengths, cut-offs and loops of answers, None without any. count: the tokens of a text."""
    if not answers:
        return None
    thought = [
        count(one.reasoning) if one.thought_tokens is None or (one.reasoning and not one.thought_tokens)
        else one.thought_tokens for one in answers
    ]  # fmt: skip
    return Usage(
        answers=len(answers), output_tokens=sum(one.output_tokens for one in answers) / len(answers),
        thought_tokens=sum(thought) / len(answers), cut_offs=sum(one.finish == "length" for one in answers),
        loops=sum(loops(one.reasoning + one.text) for one in answers),
    )  # fmt: skip


def loops(text: str) -> bool:
    """Whether a text ends in a stretch that is repeated, LEAST_REPEATS times and over LEAST_CHARACTERS at least."""
    for period in range(1, min(PERIODS, len(text) // LEAST_REPEATS) + 1):
        wanted = max(LEAST_CHARACTERS, LEAST_REPEATS * period)
        if len(text) >= wanted and text[-wanted:-period] == text[-wanted + period :]:
            return True
    return False
