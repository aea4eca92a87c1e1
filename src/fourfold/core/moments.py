"""Second moments per expert: accumulate, pool, shrink, damp. docs/numerics.md sections 1-3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fourfold.core.kernels import bf16, cuda
from fourfold.datatypes import FourfoldError, Moments

PAIRS_PER_PIECE = 16_384  # pairs whose fp32 inputs exist at one time
PANEL = 256  # rows of a Hessian that one GEMM adds to: of K = 2048 more than two fifths of the work is left out
MIRRORED = 32  # rows that are copied at a time from below the diagonal to above it

AddProducts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # see add_products_torch_


class NotFinite(FourfoldError):
    """Moments that are not finite. expert: its place in the stack."""

    def __init__(self, expert: int) -> None:
        super().__init__(f"expert {expert}: its moments are not finite; a hidden state overflowed")
        self.expert = expert


def accumulate(input_TK: Tensor, token_S: Tensor, weight_S: Tensor, offsets: list[int]) -> Moments:
    """Second moments of the inputs of E experts, fp32 sums.

    input_TK: what the experts are given; token_S: row of each (token, expert) pair, sorted by expert; weight_S: w of
    the pair, fp32, >= 0; offsets: E + 1 ints, expert e owns pairs offsets[e]:offsets[e + 1].
    Hessian sum w x x^T from xs = bf16(sqrt(w) x).
    """
    if input_TK.is_cuda:
        return cuda.accumulate(input_TK, token_S, weight_S, offsets)
    return accumulate_by(_add_products(input_TK), input_TK, token_S, weight_S, offsets)


def accumulate_by(
    add_products_: AddProducts, input_TK: Tensor, token_S: Tensor, weight_S: Tensor, offsets: list[int]
) -> Moments:
    """The same for any device, an expert and piece of its pairs at a time: the CPU's way.

    With `add_products_torch_` it is what the kernels are held against.
    """
    experts, inputs = len(offsets) - 1, input_TK.shape[1]
    device = input_TK.device
    hessian_EKK = torch.zeros(experts, inputs, inputs, device=device)
    weight_E, energy2_E = torch.zeros(experts, device=device), torch.zeros(experts, device=device)
    # A loop over experts, but each step is a GEMM of K x tokens x K; grouped_mm of the same took a quarter longer on a
    # CPU, and one GEMM per expert gives the same bits however experts are chunked.
    for expert in range(experts):
        for first in range(offsets[expert], offsets[expert + 1], PAIRS_PER_PIECE):
            piece = slice(first, min(first + PAIRS_PER_PIECE, offsets[expert + 1]))
            root_S = weight_S[piece].sqrt()
            energy_S = add_products_(hessian_EKK[expert], input_TK, token_S[piece], root_S)
            weight_E[expert] += weight_S[piece].sum()
            energy2_E[expert] += energy_S.square_().sum()
        mirror_(hessian_EKK[expert])
    count_E = torch.tensor(offsets, device=device).diff()
    return Moments(hessian_EKK, weight_E, count_E, energy2_E)


def share_weights(weight_S: Tensor, marked_S: Tensor, offsets: Sequence[int], share: float) -> Tensor:
    """The weights of pairs, changed so that in each expert the marked ones have `share` of its weight; its sum stays.

    weight_S: fp32, >= 0; marked_S: bool; offsets: see accumulate. Where `share` would leave an expert less than half of
    the effective tokens, (sum w)^2 / sum w^2, that another share leaves it at most, the nearest share that does not is
    taken. An expert whose pairs are all of one kind stays as it is. docs/numerics.md section 1.
    """
    found_S = weight_S.clone()
    for first, last in pairwise(offsets):
        own_S, marked = weight_S[first:last].double(), marked_S[first:last]
        kinds = torch.stack([own_S * marked, own_S * ~marked])
        sum_2, square_2 = kinds.sum(dim=1), kinds.square().sum(dim=1)
        effective_2 = (sum_2.square() / square_2).nan_to_num(0.0)  # NaN: there is no such pair
        fair = effective_2[0] / effective_2.sum()  # the share that leaves the most effective tokens
        room = (fair * (1 - fair)).sqrt()
        taken = torch.full_like(fair, share).clamp(fair - room, fair + room)
        factor_2 = (torch.stack([taken, 1 - taken]) * sum_2.sum() / sum_2).nan_to_num(1.0)
        found_S[first:last] = own_S * torch.where(marked, factor_2[0], factor_2[1])
    return found_S


def _add_products(input_TK: Tensor) -> AddProducts:
    return bf16.add_products_ if bf16.fits(input_TK) else add_products_torch_


def add_products_torch_(hessian_KK: Tensor, input_TK: Tensor, token_S: Tensor, root_S: Tensor) -> Tensor:
    """Add xs xs^T of pairs to the lower triangle, in place. Returns |xs|^2, [S].

    What is above the triangle is of no use then. GEMMs in panels of the triangle.
    """
    scaled_SK = scale_rows(input_TK, token_S, root_S)
    for first in range(0, len(hessian_KK), PANEL):
        panel = slice(first, first + PANEL)
        hessian_KK[panel, : panel.stop].addmm_(scaled_SK[:, panel].T, scaled_SK[:, : panel.stop])
    return scaled_SK.square_().sum(dim=1)


def scale_rows(input_TK: Tensor, token_S: Tensor, root_S: Tensor) -> Tensor:
    """bf16(root x) of each pair's token: fp32 [S, K]."""
    return input_TK[token_S].float().mul_(root_S[:, None]).bfloat16().float()


def gap(
    missing: Callable[[int, slice], Tensor], outputs: int, input_SK: Tensor, weight_S: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Sums of w y x^T and of w y^2 for E experts, y what the outputs of their tokens lack: fp32 [E, N, K] and [E, N].

    missing: y of some pairs of an expert, fp32 [S, N]; outputs: N; input_SK: x of each pair; weight_S, offsets: see
    accumulate. fp32 products.
    """
    total_ENK = torch.zeros(len(offsets) - 1, outputs, input_SK.shape[1], device=input_SK.device)
    energy_EN = total_ENK.new_zeros(total_ENK.shape[:2])
    for expert, total_NK in enumerate(total_ENK):  # as in accumulate_by: a GEMM of N x tokens x K each
        for first in range(offsets[expert], offsets[expert + 1], PAIRS_PER_PIECE):
            piece = slice(first, min(first + PAIRS_PER_PIECE, offsets[expert + 1]))
            gap_SN = missing(expert, piece)
            weighted_SN = gap_SN * weight_S[piece, None]
            total_NK.addmm_(weighted_SN.T, input_SK[piece].float())
            energy_EN[expert] += weighted_SN.mul_(gap_SN).sum(dim=0)
    return total_ENK, energy_EN


def pool(input_TK: Tensor, weight_T: Tensor, beat: Callable[[], None] = lambda: None) -> Tensor:
    """Weighted sum of x x^T over tokens, fp32 [K, K]. weight_T: fp32, >= 0; beat: called after each piece of them."""
    total_KK = torch.zeros(input_TK.shape[1], input_TK.shape[1], device=input_TK.device)
    add_products_ = _add_products(input_TK)
    for first in range(0, len(input_TK), PAIRS_PER_PIECE):
        token_S = torch.arange(first, min(first + PAIRS_PER_PIECE, len(input_TK)), device=input_TK.device)
        add_products_(total_KK, input_TK, token_S, weight_T[token_S].sqrt())
        beat()
    return mirror_(total_KK)


def mirror_(hessian_KK: Tensor) -> Tensor:
    """Copy the lower triangle to the upper one, in place."""
    for first in range(0, len(hessian_KK), MIRRORED):
        rows = slice(first, first + MIRRORED)
        hessian_KK[:first, rows] = hessian_KK[rows, :first].T
    return hessian_KK


def trace(matrix_EKK: Tensor) -> Tensor:
    return matrix_EKK.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def effective_tokens(moments: Moments) -> Tensor:
    """tr(H)^2 / energy2 per expert: a few loud tokens count as few. fp32 [E], at most its tokens, 0 without tokens."""
    return (trace(moments.hessian_EKK).square() / moments.energy2_E).nan_to_num(0.0, 0.0, 0.0)


def shrink(
    moments: Moments, pool_EKK: Tensor, n0: float, *, effective: bool, trace_matched: bool
) -> tuple[Tensor, Tensor]:
    """Mean moments, shrunk towards a pool: (m H_e + n0 tau pool) / (m + n0). Returns (hessian_EKK, m_E), new tensors.

    pool_EKK: [K, K] for all experts or [E, K, K]; n0: the pool's weight in tokens; effective: m are effective tokens,
    else the plain count; trace_matched: tau scales the pool to the expert's own trace. An expert without tokens gets
    the pool itself, by the same arithmetic. Raises NotFinite for the first expert whose moments or pool are not finite.
    """
    own_trace_E = trace(moments.hessian_EKK)
    _require_finite(moments, own_trace_E + trace(pool_EKK))
    m_E = effective_tokens(moments) if effective else moments.count_E.float()
    seen_E = moments.weight_E > 0
    weight_E = moments.weight_E.where(seen_E, 1.0)
    tau_E = torch.ones_like(m_E)
    if trace_matched:
        # A pool without energy has nothing to say, however loud the expert: a huge tau times 0 would be NaN.
        pool_trace_E = trace(pool_EKK).expand_as(m_E)
        matched_E = seen_E & (pool_trace_E > 0)
        tau_E = (own_trace_E / weight_E / pool_trace_E.where(matched_E, 1.0)).where(matched_E, 1.0)
    total_E = m_E + n0
    alone_E = total_E <= 0  # no tokens and no pool asked for: the pool is all there is
    own_E = (m_E / total_E.where(~alone_E, 1.0) / weight_E)[:, None, None]
    pooled_E = (n0 * tau_E / total_E.where(~alone_E, 1.0)).where(~alone_E, 1.0)[:, None, None]
    hessian_EKK = moments.hessian_EKK * own_E
    for hessian_KK, pool_KK, share in zip(hessian_EKK, pool_EKK.expand_as(hessian_EKK), pooled_E, strict=True):
        hessian_KK.addcmul_(pool_KK, share)  # one K x K at a time: a temporary as large as the stack is not needed
    return hessian_EKK, m_E


def _require_finite(moments: Moments, trace_E: Tensor) -> None:
    """The diagonal tells for x x^T, whose other entries are never larger; for y x^T the sum of all does."""
    finite_E = trace_E.isfinite()
    if moments.gap_ENK is not None:
        finite_E &= moments.gap_ENK.sum(dim=(1, 2)).isfinite()
    if not finite_E.all():
        raise NotFinite(int((~finite_E).nonzero()[0]))


def own_share(m_E: Tensor, n0: float) -> Tensor:
    """m / (m + n0), the share of an expert's own tokens in its shrunk moments: 0 without tokens. [E]."""
    return m_E / (m_E + n0).clamp(min=1e-30)


def shrink_to_zero(sum_ENK: Tensor, weight_E: Tensor, share_E: Tensor) -> Tensor:
    """Return a mean shrunk to zero: sum_e / weight_e * share_e, [E, N, K]. share_E: see own_share.

    With H' of `shrink`, which adds n0 tokens of the pool to the expert's own, this times H'^-1 is ridge regression.
    """
    return sum_ENK * (share_E / weight_E.where(weight_E > 0, 1.0))[:, None, None]


def damping(hessian_EKK: Tensor, delta_E: Tensor, kind: str, floor: float) -> Tensor:
    """What is added to the diagonal, fp32 [E, K].

    kind "diagonal": delta * H_jj + floor * median_j(H_jj), relative per channel, so that a loud one does not drown the
    others (if the median is 0 the mean, if that is 0, 1); "mean": delta * mean(diag H), as GPTQ. A dead channel with
    neither gets that level itself: any positive number leaves its code plain rounding.
    """
    diagonal_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1)
    mean_E = diagonal_EK.mean(dim=1)
    if kind == "mean":
        mean_E = mean_E.where(mean_E > 0, 1.0)
        return (delta_E * mean_E)[:, None].expand_as(diagonal_EK)
    level_E = diagonal_EK.median(dim=1).values
    level_E = level_E.where(level_E > 0, mean_E)
    level_E = level_E.where(level_E > 0, 1.0 / floor if floor else 1.0)
    added_EK = delta_E[:, None] * diagonal_EK + floor * level_E[:, None]
    return added_EK.where(diagonal_EK + added_EK > 0, level_E[:, None])
