"""How good a release is: errors of weights and outputs, perplexity, KL divergence, agreement, drafts accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.core.kernels import bf16

PANEL = 256  # columns of a Hessian that one GEMM goes through
VOCABULARY_CHUNK = 8192  # columns of the output head whose logits exist at one time
IMAGE_EXPERT = 4  # times its share of text tokens, or more, an expert has of image tokens
LIKELIEST = 5  # of top-5 agreement
KL_EDGES = (0.0, *(10 ** (step / 4) for step in range(-28, 5)))  # nats; four bins a decade, the last one open
ENTROPY_EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 4.0)  # nats; a bucket from each to the next, the last one open
RESAMPLES, CONFIDENCE, BOOTSTRAP_SEED = 1000, 0.95, 0
BOOTSTRAP_ELEMENTS = 2**20  # of a float64 temporary: 8 MB


@dataclass(frozen=True)
class Statistics:
    """Per predicted position, on the host, in float64 and nats: both models' negative log likelihood of the true token,
    KL(source || release) over the full vocabulary, entropy of the source; agree_T: equal argmax; five_T: share of the
    source's five most likely tokens that are among the release's five.
    """

    nll_source_T: Tensor
    nll_release_T: Tensor
    kl_T: Tensor
    entropy_T: Tensor
    agree_T: Tensor
    five_T: Tensor


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


def energy(weight_EPNK: Tensor, hessian_EKK: Tensor) -> Tensor:
    """tr(W H W^T) of each of P matrices of an expert, [E, P]. weight_EPNK: fp32; a kernel rounds them to BF16."""
    exact_EPNK = weight_EPNK.bfloat16()
    if not bf16.fits(exact_EPNK[0, 0]) or hessian_EKK.dtype != torch.float32:
        energy_EN = proxy_rows(weight_EPNK.flatten(1, 2), hessian_EKK)
        return energy_EN.view(weight_EPNK.shape[:3]).sum(dim=2)
    pairs = zip(exact_EPNK, hessian_EKK, strict=True)
    return torch.tensor([[bf16.energy(w_NK, h_KK) for w_NK in w_PNK] for w_PNK, h_KK in pairs])


def router_agreement(first_TA: Tensor, second_TA: Tensor) -> float:
    """Share of a token's top-k experts that both routings chose, mean over tokens."""
    return shared(first_TA, second_TA).float().mean().item()


def shared(first_TA: Tensor, second_TA: Tensor) -> Tensor:
    """Which of a row's entries are anywhere in the other's row: bool [T, A]."""
    return (first_TA[:, :, None] == second_TA[:, None, :]).any(dim=2)


def routing_by_kind(index_TA: Tensor, image_T: Tensor, experts: int) -> tuple[float, int]:
    """How alike image and other tokens are routed: the overlap of the two histograms over experts (1: alike, 0: no
    expert in common), and how many experts have a share of image tokens over IMAGE_EXPERT times that of the others.
    """
    kinds = [torch.bincount(index_TA[kind_T].flatten(), minlength=experts).double() for kind_T in (image_T, ~image_T)]
    image_E, text_E = (count_E / count_E.sum() for count_E in kinds)
    return torch.minimum(image_E, text_E).sum().item(), int((image_E > IMAGE_EXPERT * text_E).sum())


Finish = Callable[[Tensor, slice], Tensor]  # logits [T, C] of some columns to those that a model gives


def token_statistics(
    source_TD: Tensor, release_TD: Tensor, head_VD: Tensor, next_T: Tensor, release_head_VD: Tensor | None = None,
    finish: tuple[Finish, Finish] | None = None,
) -> Statistics:  # fmt: skip
    """Compare two models' next-token distributions, position by position, the head in chunks of the vocabulary.

    source_TD, release_TD: hidden states after the last norm; head_VD: the output head; release_head_VD: the release's,
    None where both share one; next_T: the true next tokens; finish: what each model does to the product, if anything.
    Logits are fp32, sums of chunks added up in float64; T x V logits never exist.
    KL = E_p[a - b] - lse(a) + lse(b) for logits a (source), b (release), all from one pass with running maxima.
    """
    source_TD, release_TD = source_TD.float(), release_TD.float()
    running = _Running(len(source_TD), source_TD.device)
    true_2T = torch.zeros(2, len(next_T), dtype=torch.float64, device=source_TD.device)
    for first in range(0, len(head_VD), VOCABULARY_CHUNK):
        place = slice(first, first + VOCABULARY_CHUNK)
        head_CD = head_VD[place].float()
        other_CD = head_CD if release_head_VD is None else release_head_VD[place].float()
        logits = source_TD @ head_CD.T, release_TD @ other_CD.T
        if finish is not None:
            logits = finish[0](logits[0], place), finish[1](logits[1], place)
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
        five_T=shared(*running.likeliest).double().mean(dim=1).cpu(),
    )


class _Running:
    """Sums over the vocabulary so far, relative to the running maximum of each model's logits."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.most_2T = torch.full((2, tokens), -torch.inf, dtype=torch.float32, device=device)
        self.best_2T = torch.zeros(2, tokens, dtype=torch.int64, device=device)
        self.likeliest = [torch.empty(tokens, 0, dtype=torch.int64, device=device) for _ in range(2)]
        self._likeliest_logits = [torch.empty(tokens, 0, device=device) for _ in range(2)]
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
            self._keep_likeliest(model, logits_TC, first)
        weight_TC = (source_TC - self.most_2T[0][:, None]).exp_()
        self.sums_4T[0] += weight_TC.sum(dim=1).double()
        self.sums_4T[1] += (release_TC - self.most_2T[1][:, None]).exp_().sum(dim=1).double()
        self.sums_4T[2] += ((source_TC - release_TC) * weight_TC).sum(dim=1).double()
        self.sums_4T[3] += (source_TC * weight_TC).sum(dim=1).double()

    def _keep_likeliest(self, model: int, logits_TC: Tensor, first: int) -> None:
        here_TL, place_TL = logits_TC.topk(min(LIKELIEST, logits_TC.shape[1]), dim=1)
        logits_TL = torch.cat([self._likeliest_logits[model], here_TL], dim=1)
        token_TL = torch.cat([self.likeliest[model], place_TL + first], dim=1)
        self._likeliest_logits[model], best_TL = logits_TL.topk(min(LIKELIEST, logits_TL.shape[1]), dim=1)
        self.likeliest[model] = token_TL.gather(1, best_TL)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-sum-exp of source and release, E_p[a - b], E_p[a]."""
        lse_2T = self.most_2T.double() + self.sums_4T[:2].log()
        return lse_2T[0], lse_2T[1], self.sums_4T[2] / self.sums_4T[0], self.sums_4T[3] / self.sums_4T[0]


def join(parts: list[Statistics]) -> Statistics:
    """Statistics of several stretches of text, one after the other."""
    return Statistics(*(torch.cat([getattr(part, name) for part in parts]) for name in Statistics.__dataclass_fields__))


def every(statistics: Statistics, window: int, step: int) -> Statistics:
    """Statistics of every `step`-th window from the first on. window: predictions of each."""
    fields = (getattr(statistics, name) for name in Statistics.__dataclass_fields__)
    return Statistics(*(value_T.unflatten(0, (-1, window))[::step].flatten() for value_T in fields))


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
        "top5_agreement": statistics.five_T.mean().item(),
        "entropy_source": statistics.entropy_T.mean().item(),
    }


# ---- how sure the figures are, and where they come from


def measurements(statistics: Statistics, window: int) -> dict[str, Any]:
    """What metrics.json says of the text's positions. window: predictions of each window, one after the other."""
    return {
        "summary": summarize(statistics),
        "intervals": intervals(statistics, window),
        "by_entropy": by_entropy(statistics),
        "kl_histogram": kl_histogram(statistics),
    }


def resample(count: int) -> Tensor:
    """How often each of `count` things is drawn in each of RESAMPLES draws with replacement: float64 [B, count]."""
    generator = torch.Generator().manual_seed(BOOTSTRAP_SEED)
    drawn_BW = torch.randint(count, (RESAMPLES, count), generator=generator)
    once_BW = torch.ones(1, 1, dtype=torch.float64).expand_as(drawn_BW)
    return torch.zeros(RESAMPLES, count, dtype=torch.float64).scatter_add_(1, drawn_BW, once_BW)


def interval(values_B: Tensor) -> list[float]:
    """The middle CONFIDENCE of resampled values, both ends."""
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=values_B.dtype)
    return torch.quantile(values_B, ends).tolist()


def intervals(statistics: Statistics, window: int) -> dict[str, list[float]] | None:
    """Bootstrap confidence intervals of summarize's figures: whole windows are drawn, as neighbours are alike.

    None for a single window, which says nothing of how windows differ.
    """
    count = len(statistics.kl_T) // window
    if count < 2:
        return None
    drawn_BW = resample(count)

    def mean(values_T: Tensor) -> Tensor:
        return drawn_BW @ values_T.double().view(count, window).mean(dim=1) / count

    source_B, release_B = mean(statistics.nll_source_T), mean(statistics.nll_release_T)
    middle_B, high_B = _resampled_quantiles(statistics.kl_T, drawn_BW, window, (0.5, 0.99))
    resampled = {
        "perplexity_source": source_B.exp(),
        "perplexity_release": release_B.exp(),
        "perplexity_ratio": (release_B - source_B).exp(),
        "kl_mean": mean(statistics.kl_T),
        "kl_median": middle_B,
        "kl_p99": high_B,
        "top1_agreement": mean(statistics.agree_T),
        "top5_agreement": mean(statistics.five_T),
    }
    return {name: interval(values_B) for name, values_B in resampled.items()}


def _resampled_quantiles(values_T: Tensor, drawn_BW: Tensor, window: int, shares: tuple[float, ...]) -> list[Tensor]:
    """Quantiles (without interpolation) of each draw's positions, from one sort: a draw only weighs them anew."""
    sorted_T, order_T = values_T.sort()
    window_T = order_T // window
    found: list[list[Tensor]] = [[] for _ in shares]
    for part_BW in drawn_BW.split(max(BOOTSTRAP_ELEMENTS // len(values_T), 1)):
        below_BT = part_BW[:, window_T].cumsum(dim=1)
        for place, share in enumerate(shares):
            wanted_B1 = torch.full((len(part_BW), 1), share * len(values_T), dtype=torch.float64)
            found[place].append(sorted_T[torch.searchsorted(below_BT, wanted_B1)[:, 0].clamp(max=len(sorted_T) - 1)])
    return [torch.cat(parts) for parts in found]


def by_entropy(statistics: Statistics) -> list[dict[str, Any]]:
    """KL and agreement by how sure the source is of the next token: a bucket of positions for each step of entropy."""
    edges = torch.tensor(ENTROPY_EDGES[1:], dtype=torch.float64)
    bucket_T = torch.bucketize(statistics.entropy_T, edges, right=True)
    rows = []
    for bucket, low in enumerate(ENTROPY_EDGES):
        here_T = bucket_T == bucket
        kl_T = statistics.kl_T[here_T]
        row: dict[str, Any] = {"from": low, "to": (*ENTROPY_EDGES, None)[bucket + 1], "positions": len(kl_T)}
        if len(kl_T):
            row |= {
                "kl_mean": kl_T.mean().item(),
                "kl_median": kl_T.median().item(),
                "top1_agreement": statistics.agree_T[here_T].double().mean().item(),
            }
        rows.append(row)
    return rows


def kl_histogram(statistics: Statistics) -> list[dict[str, Any]]:
    """Positions by their KL: `from` up to, but not including, `to`. Rounding makes some a little less than 0."""
    edges = torch.tensor(KL_EDGES[1:], dtype=torch.float64)
    bin_T = torch.bucketize(statistics.kl_T.double(), edges, right=True)
    counts = bin_T.bincount(minlength=len(KL_EDGES)).tolist()
    ends = zip(KL_EDGES, (*KL_EDGES[1:], None), counts, strict=True)
    return [{"from": low, "to": high, "positions": count} for low, high, count in ends]


# ---- drafts


def overlap(target_TV: Tensor, draft_TV: Tensor) -> Tensor:
    """sum_v min(p_v, d_v) of two rows of logits: how likely speculative sampling keeps a token drawn from d. [T], fp32.

    Leviathan, Kalman, Matias 2023 (arXiv:2211.17192), theorem 3.5.
    """
    return torch.minimum(target_TV.float().softmax(dim=1), draft_TV.float().softmax(dim=1)).sum(dim=1)


def length_difference(hit_RPS: Tensor, other_RPS: Tensor) -> dict[str, Any]:
    """Mean greedy length of `other` drafts at the same places, and how much longer `hit` ones are: paired by row.

    Arguments as in `acceptance`. Interval: bootstrap over rows, None for a single one.
    """
    first_R, other_R = (1 + hit.double().cumprod(dim=2).sum(dim=2).mean(dim=1) for hit in (hit_RPS, other_RPS))
    rows, difference_R = len(first_R), first_R - other_R
    return {
        "mean_length": other_R.mean().item(),
        "difference": difference_R.mean().item(),
        "interval": interval(resample(rows) @ difference_R / rows) if rows > 1 else None,
    }


def acceptance(hit_RPS: Tensor, overlap_RPS: Tensor) -> dict[str, Any]:
    """Acceptance of S draft steps at P places of each of R rows of text.

    hit_RPS: bool, the step's draft is the target's choice; overlap_RPS: sum min(p, d) of the step. A step counts where
    all steps before it were kept: `by_position`; mean length is 1 (the target's own token) and their sum.
    Intervals: bootstrap over rows, None for a single one.
    """
    kept = {"greedy": hit_RPS.double().cumprod(dim=2), "sampled": overlap_RPS.double().cumprod(dim=2)}
    figures: dict[str, Any] = {"positions": hit_RPS.shape[0] * hit_RPS.shape[1]}
    for rule, kept_RPS in kept.items():
        length_R = 1 + kept_RPS.sum(dim=2).mean(dim=1)
        rows = len(length_R)
        figures[rule] = {
            "by_position": kept_RPS.mean(dim=(0, 1)).tolist(),
            "mean_length": length_R.mean().item(),
            "interval": interval(resample(rows) @ length_R / rows) if rows > 1 else None,
        }
    return figures
