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
