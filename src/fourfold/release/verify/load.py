"""Greedy texts alone and many at once: the same up to near ties. What is sent, and how the answers are judged.

A kernel may be right for one request and return fluent nonsense for several. Every text is scored alone as a prompt:
the regret of a token is the best log-probability there less its own. docs/verification.md.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

from msgspec import Struct

from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.datatypes import FourfoldError, shortened
from fourfold.records.results import Check, Level, Status
from fourfold.release.verify.check import first_difference

Part = TypeVar("Part", str, list[int])
MOST_AT_ONCE = 256
SHORTEST, LONGEST = 8, 256  # tokens of a prompt
CHARACTERS, CHARACTERS_EACH = 100_000, 1_000  # of held-out text: in all, or for each request if that is more
# Nats. Clean engines on a CPU stayed below 0.22, with BF16 rounding varied by batch as on a GPU: docs/verification.md.
LEAST_LIMIT, MOST_LIMIT = 0.25, 0.5
MOST_MEAN, LEAST_MEAN = 0.02, 0.01  # mean differences: alone, and allowed under load where less was seen alone
FAR_ONE_IN = 2000  # tokens on a GPU, of which one may have another log-probability: a router that flips


class Text(Struct, frozen=True):
    """A greedy continuation. margins: how far the second best token is behind the best."""

    tokens: list[int | str]
    logprobs: list[float]
    margins: list[float]


class Scores(Struct, frozen=True):
    """The same tokens as parts of a prompt that runs alone: their log-probabilities, and the best ones there."""

    logprobs: list[float]
    best: list[float]


class Reply(Struct, frozen=True):
    """prompt: its number. scores: None where the server scores no prompts, or the text is that of the prompt alone."""

    prompt: int
    text: Text
    scores: Scores | None = None


class Round(Struct, frozen=True):
    """seconds: without scoring."""

    name: str
    seconds: float
    replies: list[Reply]


class Loaded(Struct, frozen=True):
    """What was seen of an engine. alone: a reply for each prompt; on_gpu: None where it is not known."""

    at_once: int
    alone: list[Reply]
    rounds: list[Round]
    on_gpu: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One round. order: numbers of prompts; joining: one at a time, as others answer, or all at once."""

    name: str
    joining: bool
    order: list[int]


def check_size(at_once: int) -> None:
    if at_once % 2 or not 2 <= at_once <= MOST_AT_ONCE:
        expected = f"an even number from 2 to {MOST_AT_ONCE}: each prompt is sent twice at once"
        raise FourfoldError(f"--load: got {at_once}, expected {expected}")


def schedules(at_once: int) -> list[Schedule]:
    """All requests in one step; then twice as many, shuffled, one joining at a time: prefills amid decoding."""
    twice = [*range(at_once // 2)] * 2
    shuffled = twice * 2
    random.Random(at_once).shuffle(shuffled)
    return [
        Schedule(name="all joined at once", joining=False, order=twice),
        Schedule(name="joined one by one", joining=True, order=shuffled),
    ]


def lengths(count: int) -> list[int]:
    """Tokens of each prompt, from LONGEST down to SHORTEST in equal steps."""
    return [LONGEST - number * (LONGEST - SHORTEST) // max(count - 1, 1) for number in range(count)]


def heldout_text(at_once: int = 0) -> str:
    """The beginning of the bundled held-out text, as much as so many requests need."""
    text = (TEXT / HELDOUT_TEXTS["wikitext-2-test"].file).read_text(encoding="utf-8")
    return text[: max(CHARACTERS, CHARACTERS_EACH * at_once)]


def windows(text: Part, sizes: Sequence[int]) -> list[Part]:
    """Windows of a text, one for each size, far from each other. Raises FourfoldError for too short a text."""
    if len(text) < len(sizes) * max(sizes):
        expected = f"{len(sizes) * max(sizes):,} for {len(sizes)} prompts"
        raise FourfoldError(f"held-out text: got {len(text):,} tokens by this tokenizer, expected {expected}")
    starts = (number * len(text) // len(sizes) for number in range(len(sizes)))
    return [text[start : start + size] for start, size in zip(starts, sizes, strict=True)]


# --- the verdict ----------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """Figures over all rounds. Differences are of log-probabilities, in nats."""

    limit: float
    problems: list[tuple[float, str]] = field(default_factory=list)  # with nats, for the worst to come first
    prompts: set[int] = field(default_factory=set)
    tokens: int = 0
    regret: float = 0.0
    parted: list[float] = field(default_factory=list)  # margins, alone, where texts part
    same_text: list[float] = field(default_factory=list)  # under load against alone
    scored: list[float] = field(default_factory=list)  # under load against scored alone
    twins: float = 0.0
    far: dict[tuple[str, int, int], tuple[float, str]] = field(default_factory=dict)  # by round, prompt and token

    def fail(self, prompt: int, nats: float, problem: str) -> None:
        self.prompts.add(prompt)
        self.problems.append((nats, f"prompt {prompt + 1}, {problem}"))

    def note_far(self, name: str, prompt: int, distances: Iterable[float], other: str) -> None:
        for number, nats in enumerate(distances):
            if nats > self.limit:
                problem = f"token {number + 1}, {name}: log-probability {nats:.3f} nats from that {other}"
                self.far.setdefault((name, prompt, number), (nats, problem))


def judge_load(name: str, loaded: Loaded, fixes: Callable[[], Sequence[str]]) -> Check:
    """fixes: known issues of this engine and GPU, looked up where the check fails."""
    if broken := [f"{where}: log-probabilities are NaN or infinite" for where in _not_finite(loaded)]:
        return _check(name, broken, "", fixes, {"at_once": loaded.at_once})
    mean, most, regret = _noise(loaded.alone)
    found = Findings(limit=MOST_LIMIT if most is None else max(LEAST_LIMIT, 2 * min(most, LEAST_LIMIT)))
    for each in loaded.rounds:
        _judge_round(found, each, loaded.alone)
    if len(found.far) > (found.tokens // FAR_ONE_IN if loaded.on_gpu is not False else 0):
        for (_, prompt, _), (nats, problem) in found.far.items():
            found.fail(prompt, nats, problem)
    average, allowed = _mean(found.same_text), max(2 * min(mean or 0.0, MOST_MEAN), LEAST_MEAN)
    problems = [*_alone_problems(mean, most, regret, found.limit)]
    if found.prompts:
        numbers = ", ".join(str(prompt + 1) for prompt in sorted(found.prompts))
        problems.append(f"prompts {numbers} of {len(loaded.alone)} fail, {found.limit:.2f} nats allowed")
    if average > allowed:
        said = f"log-probabilities of the same text are {average:.4f} nats from those alone on average"
        problems.append(f"{said}, {allowed:.4f} allowed")
    problems += [problem for _, problem in sorted(found.problems, key=lambda each: -each[0])]
    data = {
        "at_once": loaded.at_once, "tokens": found.tokens, "limit": found.limit, "mean_limit": allowed,
        "largest_regret": None if most is None else found.regret, "parted": len(found.parted),
        "largest_margin": max(found.parted, default=0.0), "mean": average, "most": max(found.same_text, default=0.0),
        "most_scored": max(found.scored, default=0.0), "twins": found.twins, "far": len(found.far),
        "alone_mean": mean, "alone_most": most, "alone_regret": regret, "failed_prompts": sorted(found.prompts),
        "seconds": {each.name: each.seconds for each in loaded.rounds},
    }  # fmt: skip
    return _check(name, problems, _seen(loaded, data), fixes, data)


def _check(name: str, problems: Sequence[str], seen: str, fixes: Callable[[], Sequence[str]], data: Any) -> Check:
    if not problems:
        return Check(level=Level.ENGINE, name=name, status=Status.PASS, evidence=seen, data=data)
    known = fixes()
    said = "\n".join([shortened(problems), *known, "Try fewer requests at once, and another kernel or engine version"])
    return Check(level=Level.ENGINE, name=name, status=Status.FAIL, evidence=said, data={**data, "known_issues": known})


def _not_finite(loaded: Loaded) -> Iterator[str]:
    named = [("alone", loaded.alone), *((each.name, each.replies) for each in loaded.rounds)]
    for name, replies in named:
        for reply in replies:
            values = [*reply.text.logprobs, *reply.text.margins]
            values += [*reply.scores.logprobs, *reply.scores.best] if reply.scores else []
            if not all(map(math.isfinite, values)):
                yield f"prompt {reply.prompt + 1}, {name}"


def _noise(alone: Sequence[Reply]) -> tuple[float | None, float | None, float | None]:
    """Mean and largest difference of tokens decoded and scored, and the largest regret. None: nothing was scored."""
    apart, regrets = [], []
    for reply in alone:
        if reply.scores is None:
            return None, None, None
        apart += _differences(reply.text.logprobs, reply.scores.logprobs)
        regrets += _regrets(reply.scores)
    return _mean(apart), max(apart), max(regrets)


def _alone_problems(mean: float | None, most: float | None, regret: float | None, limit: float) -> Iterator[str]:
    """The noise seen alone decides what is allowed under load, and faulty prefills raise it: it has a limit too."""
    if mean is None or most is None or regret is None:
        return
    if mean > MOST_MEAN or most > MOST_LIMIT:
        yield (
            f"alone, tokens decoded and scored as a prompt differ by {mean:.4f} on average and {most:.3f} at most; "
            f"{MOST_MEAN} and {MOST_LIMIT} allowed"
        )
    if regret > limit:
        yield f"alone, a token is {regret:.3f} worse than the best when it is scored as a prompt; {limit:.2f} allowed"


def _judge_round(found: Findings, this: Round, alone: Sequence[Reply]) -> None:
    by_prompt: dict[int, list[Text]] = {}
    for reply in this.replies:
        own, text, name = alone[reply.prompt].text, reply.text, this.name
        place = first_difference(own.tokens, text.tokens)
        same = _differences(own.logprobs[:place], text.logprobs[:place])
        found.tokens += len(text.tokens)
        found.same_text += same
        found.note_far(name, reply.prompt, same, "alone")
        if place is not None:
            margin = own.margins[place]
            found.parted.append(margin)
            if margin > found.limit:
                problem = f"other than alone, where the two best are {margin:.3f} nats apart"
                found.fail(reply.prompt, margin, f"token {place + 1}, {name}: {problem}")
        if scores := alone[reply.prompt].scores if place is None else reply.scores:
            scored = _differences(text.logprobs, scores.logprobs)
            found.scored += scored
            found.note_far(name, reply.prompt, scored, "when it is scored alone")
            _judge_regrets(found, reply.prompt, name, _regrets(scores))
        by_prompt.setdefault(reply.prompt, []).append(text)
    for prompt, texts in by_prompt.items():
        _judge_twins(found, prompt, this.name, texts)


def _judge_regrets(found: Findings, prompt: int, name: str, regrets: Sequence[float]) -> None:
    worst = max(regrets)
    found.regret = max(found.regret, worst)
    if worst > found.limit:
        problem = f"scored alone it is {worst:.3f} nats worse than the best"
        found.fail(prompt, worst, f"token {regrets.index(worst) + 1}, {name}: {problem}")


def _judge_twins(found: Findings, prompt: int, name: str, texts: Sequence[Text]) -> None:
    """The same prompt several times in a round: the same text, up to a near tie."""
    for one, other in pairwise(texts):
        place = first_difference(one.tokens, other.tokens)
        apart = _differences(one.logprobs[:place], other.logprobs[:place])
        found.twins = max([found.twins, *apart])
        found.note_far(name, prompt, apart, "of the same prompt beside it")
        margin = 0.0 if place is None else min(one.margins[place], other.margins[place])
        if place is not None and margin > found.limit:
            problem = f"the same prompt twice gives other tokens, where the two best are {margin:.3f} nats apart"
            found.fail(prompt, margin, f"token {place + 1}, {name}: {problem}")


def _seen(loaded: Loaded, data: Mapping[str, Any]) -> str:
    replies, apart = sum(len(each.replies) for each in loaded.rounds), ""
    said = [f"{data['tokens']:,} tokens of {replies} requests, {loaded.at_once} at once"]
    if data["largest_regret"] is None:
        said.append("regret not judged, as the server scores no prompts")
    else:
        worse = f"{data['largest_regret']:.3f} nats worse than the best, scored alone"
        said.append(f"none is more than {worse} ({data['limit']:.2f} allowed)")
    if data["parted"]:
        apart = f", where the two best are at most {data['largest_margin']:.3f} apart"
    said.append(f"{data['parted']} of {replies} texts part from the text alone{apart}")
    far = f"{data['mean']:.4f} from those alone on average, {data['most']:.3f} at most"
    same = f"log-probabilities of the same text are {far}"
    if data["alone_mean"] is not None:
        same += f" (decoded and scored alone: {data['alone_mean']:.4f}, {data['alone_most']:.3f})"
    return "; ".join([*said, same, f"{sum(data['seconds'].values()):.0f} s"])


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [abs(one - other) for one, other in zip(first, second, strict=True)]


def _regrets(scores: Scores) -> list[float]:
    return [best - chosen for best, chosen in zip(scores.best, scores.logprobs, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
