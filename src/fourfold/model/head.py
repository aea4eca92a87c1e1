"""What follows the last decoder layer: its norm and the output head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.core.metrics import VOCABULARY_CHUNK
from fourfold.model.skeleton import Skeleton


@dataclass(frozen=True)
class Head:
    """On one device, in the compute dtype: logits are norm(hidden) @ weight_VD.T, in fp32 where they are compared."""

    norm: nn.Module
    weight_VD: Tensor


def build_head(
    skeleton: Skeleton, norm_D: Tensor, weight_VD: Tensor, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Head:
    """The head with these weights, cast to `dtype` as transformers does."""
    return Head(norm=build_norm(skeleton, norm_D, device, dtype), weight_VD=weight_VD.to(device, dtype))


def build_norm(skeleton: Skeleton, weight_D: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The family's norm over hidden states."""
    norm = skeleton.empty_norm()
    norm.load_state_dict({"weight": weight_D.to(device, dtype)}, assign=True)
    return norm.requires_grad_(False)


def logits(head: Head, hidden_ND: Tensor) -> Tensor:
    """fp32 logits [N, V] of states that the norm is behind already; the head is widened in chunks of the vocabulary."""
    weight_VD, hidden_ND = head.weight_VD, hidden_ND.float()
    logits_NV = torch.empty(len(hidden_ND), len(weight_VD), device=hidden_ND.device)
    for first in range(0, len(weight_VD), VOCABULARY_CHUNK):
        place = slice(first, first + VOCABULARY_CHUNK)
        logits_NV[:, place] = hidden_ND @ weight_VD[place].float().T
    return logits_NV


def sampled_gradient(head: Head, hidden_ND: Tensor, uniform_N: Tensor) -> Tensor:
    """dL/d hidden of L = -sum log p(label), each position's label drawn from the head's own softmax. [N, D].

    hidden_ND: before the norm; uniform_N: float64 in [0, 1), where each position's label lies among the tokens in
    order. Logits in chunks of the vocabulary, twice: for their sums, then for the labels and (p - label) W.
    """
    with torch.enable_grad():
        hidden_ND = hidden_ND.detach().requires_grad_()
        normed_ND = head.norm(hidden_ND)
    state_ND = normed_ND.detach().float()
    parts = [slice(first, first + VOCABULARY_CHUNK) for first in range(0, len(head.weight_VD), VOCABULARY_CHUNK)]
    sums = [(state_ND @ head.weight_VD[part].float().T).logsumexp(dim=1) for part in parts]
    total_N1 = torch.stack(sums).logsumexp(dim=0)[:, None]
    gradient_ND = torch.zeros_like(state_ND)
    label_N = torch.zeros_like(uniform_N, dtype=torch.int64)
    below_N1 = torch.zeros_like(uniform_N)[:, None]
    for part in parts:
        weight_CD = head.weight_VD[part].float()
        share_NC = (state_ND @ weight_CD.T).sub_(total_N1).exp_()
        gradient_ND.addmm_(share_NC, weight_CD)
        below_NC = share_NC.double().cumsum(dim=1).add_(below_N1)
        label_N += (below_NC <= uniform_N[:, None]).sum(dim=1)
        below_N1 = below_NC[:, -1:]
    label_N.clamp_(max=len(head.weight_VD) - 1)  # shares add up to 1 but for rounding
    gradient_ND -= head.weight_VD[label_N].float()
    (pushed_ND,) = torch.autograd.grad(normed_ND, hidden_ND, gradient_ND.to(normed_ND.dtype))
    return pushed_ND
