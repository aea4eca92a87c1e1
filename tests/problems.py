"""Made-up experts and the tokens routed to them, the same for the same seed; nothing here imports fourfold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUP = 32


@dataclass(frozen=True)
class Problem:
    """weight_ENK fp32; input_TK, target_TK BF16: what the release and the source stream give for the same tokens;

    token_S, weight_S: token and router weight (fp32) of each pair, sorted by expert; offsets: of each expert's pairs.
    """

    weight_ENK: Tensor
    input_TK: Tensor
    target_TK: Tensor
    token_S: Tensor
    weight_S: Tensor
    offsets: list[int]

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, targets and weights of one expert's pairs, fp32."""
        pairs = slice(self.offsets[expert], self.offsets[expert + 1])
        token_S = self.token_S[pairs]
        return self.input_TK[token_S].float(), self.target_TK[token_S].float(), self.weight_S[pairs]


def make(*, seed: int = 0, experts: int = 3, outputs: int = 24, inputs: int = 256, tokens: int = 480) -> Problem:
    """Correlated inputs whose loudness falls by a power law; each token goes to two experts, weights sum to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing_KK = 0.5 * torch.eye(inputs) + normal(inputs, 16) @ normal(16, inputs) / inputs**0.5 / 4
    loudness_K = torch.arange(1, inputs + 1)[torch.randperm(inputs, generator=generator)] ** -0.6
    input_TK = (normal(tokens, inputs) @ mixing_KK) * loudness_K * normal(tokens, 1).abs()
    target_TK = input_TK + 0.04 * input_TK @ mixing_KK.T + 0.01 * normal(tokens, inputs) * loudness_K
    return Problem(
        weight_ENK=0.02 * normal(experts, outputs, inputs),
        input_TK=input_TK.bfloat16(),
        target_TK=target_TK.bfloat16(),
        **_route(tokens, experts, generator),
    )


def _route(tokens: int, experts: int, generator: torch.Generator) -> dict[str, Tensor | list[int]]:
    index_TA = torch.rand(tokens, experts, generator=generator).topk(min(2, experts), dim=1).indices
    weight_TA = torch.rand(tokens, index_TA.shape[1], generator=generator) + 0.1
    weight_TA /= weight_TA.sum(dim=1, keepdim=True)
    expert_S, place_S = index_TA.flatten().sort(stable=True)
    counts = torch.bincount(expert_S, minlength=experts)
    return {
        "token_S": place_S // index_TA.shape[1],
        "weight_S": weight_TA.flatten()[place_S],
        "offsets": [0, *counts.cumsum(0).tolist()],
    }


def hessians(problem: Problem) -> Tensor:
    """Mean of w x x^T of each expert, float64 [E, K, K], from unrounded inputs."""
    means = []
    for expert in range(len(problem.offsets) - 1):
        input_SK, _, weight_S = problem.tokens_of(expert)
        scaled_SK = input_SK.double() * weight_S.double().sqrt()[:, None]
        means.append(scaled_SK.T @ scaled_SK / weight_S.double().sum())
    return torch.stack(means)


def crosses(problem: Problem) -> Tensor:
    """Mean of w (target - x) x^T of each expert, float64 [E, K, K]."""
    means = []
    for expert in range(len(problem.offsets) - 1):
        input_SK, target_SK, weight_S = (values.double() for values in problem.tokens_of(expert))
        means.append(((target_SK - input_SK) * weight_S[:, None]).T @ input_SK / weight_S.sum())
    return torch.stack(means)


def array(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor as the reference takes it."""
    result: NDArray[np.float64] = tensor.double().numpy()
    return result
