"""reference.json: log-probabilities that the release gives to a text, for engines that cannot run its source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model.head import Head, logits
from fourfold.quantize.journal import REFERENCE

TOKENS = 64
LIKELIEST = 20  # as many as vLLM gives unless it is started to give more
POSITIONS = 8  # whose logits exist at one time: 16 MB with a vocabulary of 250,000, within what a held-out row takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What a release with the written codes makes of the start of the first held-out window. Nats, best first.

    tokens: T ids; for each of the T - 1 positions that have a next token: logprobs: of that token; likeliest: ids of
    the LIKELIEST most likely tokens; likeliest_logprobs: theirs.
    """

    tokens: list[int]
    logprobs: list[float]
    likeliest: list[list[int]]
    likeliest_logprobs: list[list[float]]

    def to_json(self) -> str:
        """On one line: some thousand numbers that nobody reads one by one."""
        return json.dumps(dataclasses.asdict(self)) + "\n"


def make_reference(head: Head, token_T: Tensor, hidden_TD: Tensor) -> Reference:
    """Log-softmax in fp32. token_T: a row's ids; hidden_TD: its states behind the last layer, before the norm."""
    token_T = token_T[:TOKENS]
    hidden_ND = head.norm(hidden_TD[: len(token_T) - 1].to(head.weight_VD.device))
    parts = zip(hidden_ND.split(POSITIONS), token_T[1:].split(POSITIONS), strict=True)
    found = Reference(tokens=token_T.tolist(), logprobs=[], likeliest=[], likeliest_logprobs=[])
    for part_ND, next_N in parts:
        logprob_NV = logits(head, part_ND).log_softmax(dim=1)
        best_NL, token_NL = logprob_NV.topk(min(LIKELIEST, logprob_NV.shape[1]), dim=1)
        found.logprobs.extend(_rounded(logprob_NV.gather(1, next_N[:, None].to(logprob_NV.device))[:, 0]))
        found.likeliest.extend(token_NL.tolist())
        found.likeliest_logprobs.extend(_rounded(row_L) for row_L in best_NL)
    return found


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def read_reference(out: Path) -> Reference | None:
    """OUT/reference.json, None where there is none. Raises FourfoldError for a file of another kind."""
    path = out / REFERENCE
    if not path.exists():
        return None
    try:
        found = Reference(**json.loads(path.read_text(encoding="utf-8")))
        sound = 0 < len(found.logprobs) == len(found.likeliest) == len(found.tokens) - 1
        sound = sound and all(isinstance(token, int) for token in found.tokens)
        sound = sound and all(isinstance(value, float) for value in found.logprobs)
        sound = sound and all(isinstance(row, list) and row for row in found.likeliest)
    except (OSError, ValueError, TypeError) as error:
        raise FourfoldError(f"{path}: cannot be read ({error}); quantize again, or remove it") from None
    if not sound:
        raise FourfoldError(f"{path}: not as quantize writes it; quantize again, or remove it")
    return found
