"""How good a release is: errors of weights and outputs, perplexity, KL divergence, top-1 and router agreement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 256  # columns of a Hessian that one GEMM goes through
VOCABULARY_CHUNK = 8192  # columns of the output head whose logits exist at one time


@dataclass(frozen=True)
class Statistics:
    """Per predicted position, on the host, in float64 and nats: both models' negative log likelihood of the true token,
    KL(source || release) over the full vocabulary, entropy of the source; agree_T: equal argmax.
    """

    nll_source_T: Tensor
    nll_release_T: Tensor
    kl_T: Tensor
    entropy_T: Tensor
    agree_T: Tensor


def proxy_rows(error_ENK: Tensor, hessian_EKK: Tensor) -> Tensor:
    """Each row's share of tr(Err H Err^T), [E, N]. H is symmetric, so panels of one triangle do: half a GEMM."""
    total_EN = torch.zeros_like(error_ENK[..., 0])
    for first in range(0, error_ENK.shape[-1], PANEL):
        panel = slice(first, first + PANEL)
        error_ENP = error_ENK[..., panel]
        product_ENP = torch.bmm(error_ENP, hessian_EKK[:, panel, panel])
        product_ENP.baddbmm_(error_ENK[..., :first], hessian_EKK[:, :first, panel], alpha=2)
        total_EN += product_ENP.mul_(error_ENP).sum(dim=-1)
    return total_EN


def router_agreement(first_TA: Tensor, second_TA: Tensor) -> float:
    """Share of a token's top-k experts that both routings chose, mean over tokens."""
    return (first_TA[:, :, None] == second_TA[:, None, :]).any(dim=2).float().mean().item()


def token_statistics(source_TD: Tensor, release_TD: Tensor, head_VD: Tensor, next_T: Tensor) -> Statistics:
    """Compare two models' next-token distributions, position by position, the head in chunks of the vocabulary.

    source_TD, release_TD: hidden states after the last norm; head_VD: the output head both share;
    next_T: the true next tokens. Logits are fp32, sums of chunks added up in float64; T x V logits never exist.
    KL = E_p[a - b] - lse(a) + lse(b) for logits a (source), b (release), all from one pass with running maxima.
    """
    source_TD, release_TD = source_TD.float(), release_TD.float()
    running = _Running(len(source_TD), source_TD.device)
    true_2T = torch.zeros(2, len(next_T), dtype=torch.float64, device=source_TD.device)
    for first in range(0, len(head_VD), VOCABULARY_CHUNK):
        head_CD = head_VD[first : first + VOCABULARY_CHUNK].float()
        logits = source_TD @ head_CD.T, release_TD @ head_CD.T
        running.add(*logits, first)
        here_T = (next_T >= first) & (next_T < first + len(head_CD))
        column_T1 = (next_T - first).clamp(0, len(head_CD) - 1)[:, None]
        for model, logits_TC in enumerate(logits):
            true_2T[model] += torch.where(here_T, logits_TC.gather(1, column_T1)[:, 0].double(), 0.0)
    lse_source_T, lse_release_T, mean_difference_T, mean_T = running.finish()
    return Statistics(
        nll_source_T=(lse_source_T - true_2T[0]).cpu(),
        nll_release_T=(lse_release_T - true_2T[1]).cpu(),
        kl_T=(mean_difference_T - lse_source_T + lse_release_T).clamp_(min=0).cpu(),
        entropy_T=(lse_source_T - mean_T).cpu(),
        agree_T=(running.best_2T[0] == running.best_2T[1]).cpu(),
    )


class _Running:
    """Sums over the vocabulary so far, relative to the running maximum of each model's logits."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.most_2T = torch.full((2, tokens), -torch.inf, dtype=torch.float32, device=device)
        self.best_2T = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        # exp(a), exp(b), exp(a) (a - b), exp(a) a; each over the vocabulary so far
        self.sums_4T = torch.zeros(4, tokens, dtype=torch.float64, device=device)

    def add(self, source_TC: Tensor, release_TC: Tensor, first: int) -> None:
        for model, logits_TC in enumerate((source_TC, release_TC)):
            most_T, place_T = logits_TC.max(dim=1)
            higher_T = most_T > self.most_2T[model]
            self.best_2T[model] = torch.where(higher_T, place_T + first, self.best_2T[model])
            updated_T = torch.maximum(most_T, self.most_2T[model])
            shrink_T = (self.most_2T[model] - updated_T).double().exp()
            for row in ((0, 2, 3), (1,))[model]:
                self.sums_4T[row] *= shrink_T
            self.most_2T[model] = updated_T
        weight_TC = (source_TC - self.most_2T[0][:, None]).exp_()
        self.sums_4T[0] += weight_TC.sum(dim=1).double()
        self.sums_4T[1] += (release_TC - self.most_2T[1][:, None]).exp_().sum(dim=1).double()
        self.sums_4T[2] += ((source_TC - release_TC) * weight_TC).sum(dim=1).double()
        self.sums_4T[3] += (source_TC * weight_TC).sum(dim=1).double()

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-sum-exp of source and release, E_p[a - b], E_p[a]."""
        lse_2T = self.most_2T.double() + self.sums_4T[:2].log()
        return lse_2T[0], lse_2T[1], self.sums_4T[2] / self.sums_4T[0], self.sums_4T[3] / self.sums_4T[0]


def join(parts: list[Statistics]) -> Statistics:
    """Statistics of several stretches of text, one after the other."""
    return Statistics(*(torch.cat([getattr(part, name) for part in parts]) for name in Statistics.__dataclass_fields__))


def summarize(statistics: Statistics) -> dict[str, float]:
    """Perplexities and their ratio, KL mean / median / p90 / p99 / max (nats), share of equal argmax, positions."""
    kl_T = statistics.kl_T
    p50, p90, p99 = torch.quantile(kl_T, torch.tensor([0.5, 0.9, 0.99], dtype=kl_T.dtype)).tolist()
    perplexity_source = statistics.nll_source_T.mean().exp().item()
    perplexity_release = statistics.nll_release_T.mean().exp().item()
    return {
        "positions": len(kl_T),
        "perplexity_source": perplexity_source,
        "perplexity_release": perplexity_release,
        "perplexity_ratio": perplexity_release / perplexity_source,
        "kl_mean": kl_T.mean().item(),
        "kl_median": p50,
        "kl_p90": p90,
        "kl_p99": p99,
        "kl_max": kl_T.max().item(),
        "top1_agreement": statistics.agree_T.double().mean().item(),
        "entropy_source": statistics.entropy_T.mean().item(),
    }
