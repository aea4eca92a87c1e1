"""What a running server's most likely tokens tell: whether it serves a release, how far it is from another server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold.core.paired import mean_interval
from fourfold.datatypes import FourfoldError
from fourfold.quantize.journal import REFERENCE
from fourfold.records.release import Reference
from fourfold.records.results import ServerKl
from fourfold.release.verify.load import MOST_MEAN
from fourfold.release.verify.vllm import KERNEL_ERROR
from fourfold.serve.client import RequestError, Session

Logprobs = Mapping[int, float]  # by token id
Read = Callable[[Session, Sequence[int], int], Awaitable[list[Logprobs]]]

MOST = (100, 50, 20, 10, 5)  # tokens asked for at each place: the first number that a server allows
TRIAL = 4  # tokens of the text that finds it
LEAST_REST = 1e-6  # probability outside the named tokens: what rounding leaves of it is not known
AT_ONCE = 4  # windows
MOST_APART = 2 * (KERNEL_ERROR + MOST_MEAN)  # nats, on average, of a server and what quantize stored


@dataclass(frozen=True, kw_only=True, eq=False)
class Scorer:
    """How a server is asked. k: tokens at each place."""

    session: Session
    read: Read
    k: int


async def read_echo(session: Session, tokens: Sequence[int], k: int) -> list[Logprobs]:
    """The k most likely tokens after each of `tokens` but the last, from one request (vLLM). Raises RequestError."""
    body = {
        "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "logprobs": k, "echo": True,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    answer = await session.post("/v1/completions", body)
    try:
        places = answer["choices"][0]["logprobs"]["top_logprobs"][1 : len(tokens)]
        found = [{int(name.removeprefix("token_id:")): float(value) for name, value in one.items()} for one in places]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"got no log-probabilities of a prompt by token id ({type(error).__name__})") from None
    if len(found) != len(tokens) - 1:
        raise RequestError(f"got {len(found)} places with log-probabilities, expected {len(tokens) - 1}")
    return [*found]


async def read_steps(session: Session, tokens: Sequence[int], k: int) -> list[Logprobs]:
    """The same by a request for each place, whose prompt the server keeps (llama.cpp). Raises RequestError."""
    found: list[Logprobs] = []
    for end in range(1, len(tokens)):
        body = {"prompt": list(tokens[:end]), "n_predict": 1, "n_probs": k, "temperature": 0, "cache_prompt": True}
        answer = await session.post("/completion", body)
        try:
            best = answer["completion_probabilities"][0]["top_logprobs"]
            found.append({int(one["id"]): float(one["logprob"]) for one in best})
        except (LookupError, TypeError, ValueError) as error:
            raise RequestError(f"got no n_probs of /completion ({type(error).__name__})") from None
    return found


async def find_scorer(session: Session, tokens: Sequence[int]) -> Scorer:
    """Raises RequestError with what the server said to each way of asking."""
    said: dict[str, str] = {}
    for read in (read_echo, read_steps):
        for k in MOST:
            try:
                await read(session, tokens[:TRIAL], k)
                return Scorer(session=session, read=read, k=k)
            except RequestError as error:
                said[read.__name__] = str(error)
                if error.status not in (400, 422):
                    break
    raise RequestError(f"gives no log-probabilities, expected vLLM or llama.cpp: {'; '.join(said.values())}")


async def require_served(session: Session, release: Path) -> None:
    """Raises FourfoldError for a server whose log-probabilities are not those that quantize stored of the release,
    RequestError where that cannot be found out.
    """
    reference = Reference.find(release / REFERENCE)
    if reference is None:
        raise RequestError(f"{release} has no {REFERENCE}, which says what its server answers")
    scorer = await find_scorer(session, reference.tokens)
    found = await scorer.read(session, reference.tokens, scorer.k)
    apart = list(map(_apart, found, reference.tokens[1:], reference.logprobs))
    for place, tokens, wanted in zip(found, reference.likeliest, reference.likeliest_logprobs, strict=True):
        apart.append(_apart(place, tokens[0], wanted[0]))
    if not (mean := sum(apart) / len(apart)) <= MOST_APART:
        got = f"log-probabilities {mean:.3f} nats from those of {release} on average, expected at most {MOST_APART:.2f}"
        raise FourfoldError(f"{session.address}: got {got}: it serves another model, or computes it wrong")


def _apart(found: Logprobs, token: int, wanted: float) -> float:
    """|difference| of a token's log-probability, at least: of one that the server does not name only the most that it
    can have is known.
    """
    most = min(found.values())
    return abs(found.get(token, most) - max(wanted, most))


async def measure_kl(release: Session, source: Session, windows: Sequence[Sequence[int]]) -> ServerKl:
    """KL(source || release) over windows of a text. Raises RequestError for a server without log-probabilities."""
    scorers = [await find_scorer(session, windows[0]) for session in (source, release)]
    k = min(scorer.k for scorer in scorers)
    # Steps of two windows would push each other's beginning out of a server's cache.
    gates = {scorer: asyncio.Semaphore(AT_ONCE if scorer.read is read_echo else 1) for scorer in scorers}

    async def read(scorer: Scorer, tokens: Sequence[int]) -> list[Logprobs]:
        async with gates[scorer]:
            return await scorer.read(scorer.session, tokens, k)

    pairs = [(scorer, tokens) for tokens in windows for scorer in scorers]
    answers = await asyncio.gather(*(read(*pair) for pair in pairs))
    by_window = [
        [compare(*place) for place in zip(*answers[first : first + 2], strict=True)]
        for first in range(0, len(answers), 2)
    ]
    means = [[sum(column) / len(places) for column in zip(*places, strict=True)] for places in by_window]
    kl, agreement, covered = zip(*means, strict=True)
    return ServerKl(
        kl_mean=sum(kl) / len(kl), interval=tuple(mean_interval(kl)) if len(kl) > 1 else None,
        top1_agreement=sum(agreement) / len(kl), covered=sum(covered) / len(kl), k=k, windows=len(windows),
        window=len(windows[0]),
    )  # fmt: skip


def compare(source: Logprobs, release: Logprobs) -> tuple[float, bool, float]:
    """Return a lower bound of KL(source || release), whether the best tokens are the same, and p of the shared tokens.

    Tokens that both name count one by one, all others together: by the log-sum inequality the KL of such sums is at
    most that of their terms (Cover and Thomas, Elements of Information Theory, theorem 2.7.1).
    """
    shared = source.keys() & release.keys()
    p, q = (math.fsum(math.exp(one[token]) for token in shared) for one in (source, release))
    bound = math.fsum(math.exp(source[token]) * (source[token] - release[token]) for token in shared)
    if p < 1:
        bound += (1 - p) * math.log((1 - p) / max(1 - q, LEAST_REST))
    same = max(source, key=source.__getitem__) == max(release, key=release.__getitem__)
    return max(bound, 0.0), same, min(p, 1.0)
