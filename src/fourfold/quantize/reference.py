"""reference.json: log-probabilities that the release gives to a text, for engines that cannot run its source."""

from __future__ import annotations

from torch import Tensor

from fourfold.model.head import Head, logits
from fourfold.records.release import Reference

TOKENS = 64
LIKELIEST = 20  # as many as vLLM gives unless it is started to give more
POSITIONS = 8  # whose logits exist at one time: 16 MB with a vocabulary of 250,000, within what a held-out row takes


def make_reference(head: Head, token_T: Tensor, hidden_TD: Tensor) -> Reference:
    """Log-softmax in fp32. token_T: a row's ids; hidden_TD: its states behind the last layer, before the norm."""
    token_T = token_T[:TOKENS]
    hidden_ND = head.norm(hidden_TD[: len(token_T) - 1].to(head.weight_VD.device))
    parts = zip(hidden_ND.split(POSITIONS), token_T[1:].split(POSITIONS), strict=True)
    logprobs: list[float] = []
    likeliest: list[list[int]] = []
    likeliest_logprobs: list[list[float]] = []
    for part_ND, next_N in parts:
        logprob_NV = logits(head, part_ND).log_softmax(dim=1)
        best_NL, token_NL = logprob_NV.topk(min(LIKELIEST, logprob_NV.shape[1]), dim=1)
        logprobs.extend(_rounded(logprob_NV.gather(1, next_N[:, None].to(logprob_NV.device))[:, 0]))
        likeliest.extend(token_NL.tolist())
        likeliest_logprobs.extend(_rounded(row_L) for row_L in best_NL)
    return Reference(
        tokens=token_T.tolist(), logprobs=logprobs, likeliest=likeliest, likeliest_logprobs=likeliest_logprobs
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]
