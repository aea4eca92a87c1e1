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
    """weight_ENK fp32; input_TK: what the experts are given, BF16;

    token_S, weight_S: token and router weight (fp32) of each pair, sorted by expert; offsets: of each expert's pairs;
    missing_SN: what each pair's output lacks, fp32.
    """

    weight_ENK: Tensor
    input_TK: Tensor
    token_S: Tensor
    weight_S: Tensor
    offsets: list[int]
    missing_SN: Tensor

    def tokens_of(self, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs, weights and what is missing of one expert's pairs, fp32."""
        pairs = slice(self.offsets[expert], self.offsets[expert + 1])
        return self.input_TK[self.token_S[pairs]].float(), self.weight_S[pairs], self.missing_SN[pairs]

    def missing(self, expert: int, pairs: slice) -> Tensor:
        """As `moments.gap` asks for it: a copy."""
        assert self.offsets[expert] <= pairs.start <= pairs.stop <= self.offsets[expert + 1]
        return self.missing_SN[pairs].clone()


def make(*, seed: int = 0, experts: int = 3, outputs: int = 24, inputs: int = 256, tokens: int = 480) -> Problem:
    """Correlated inputs whose loudness falls by a power law; each token goes to two experts, weights sum to 1.

    Outputs lack what a shift of the inputs would add, and noise: none in the first row, several times the rest in the
    last.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mixing_KK = 0.5 * torch.eye(inputs) + normal(inputs, 16) @ normal(16, inputs) / inputs**0.5 / 4
    loudness_K = torch.arange(1, inputs + 1)[torch.randperm(inputs, generator=generator)] ** -0.6
    input_TK = (normal(tokens, inputs) @ mixing_KK) * loudness_K * normal(tokens, 1).abs()
    shift_TK = 0.04 * input_TK @ mixing_KK.T + 0.01 * normal(tokens, inputs) * loudness_K
    weight_ENK = 0.02 * normal(experts, outputs, inputs)
    token_S, weight_S, offsets = _route(tokens, experts, generator)
    tokens_E = token_S.tensor_split(offsets[1:-1])
    shifted = [shift_TK[own_S] @ weight_NK.T for own_S, weight_NK in zip(tokens_E, weight_ENK, strict=True)]
    missing_SN = torch.cat(shifted)
    noise_SN = normal(len(token_S), outputs) * missing_SN.std(dim=0) * torch.linspace(0, 4, outputs)
    return Problem(weight_ENK, input_TK.bfloat16(), token_S, weight_S, offsets, missing_SN + noise_SN)


def _route(tokens: int, experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor, list[int]]:
    index_TA = torch.rand(tokens, experts, generator=generator).topk(min(2, experts), dim=1).indices
    weight_TA = torch.rand(tokens, index_TA.shape[1], generator=generator) + 0.1
    weight_TA /= weight_TA.sum(dim=1, keepdim=True)
    expert_S, place_S = index_TA.flatten().sort(stable=True)
    counts = torch.bincount(expert_S, minlength=experts)
    return place_S // index_TA.shape[1], weight_TA.flatten()[place_S], [0, *counts.cumsum(0).tolist()]


def hessians(problem: Problem) -> Tensor:
    """Mean of w x x^T of each expert, float64 [E, K, K], from unrounded inputs."""
    means = []
    for expert in range(len(problem.offsets) - 1):
        input_SK, weight_S, _ = problem.tokens_of(expert)
        scaled_SK = input_SK.double() * weight_S.double().sqrt()[:, None]
        means.append(scaled_SK.T @ scaled_SK / weight_S.double().sum())
    return torch.stack(means)


def gaps(problem: Problem) -> Tensor:
    """Mean of w y x^T of each expert, float64 [E, N, K]."""
    means = []
    for expert in range(len(problem.offsets) - 1):
        input_SK, weight_S, missing_SN = (values.double() for values in problem.tokens_of(expert))
        means.append((missing_SN * weight_S[:, None]).T @ input_SK / weight_S.sum())
    return torch.stack(means)


def array(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor as the reference takes it."""
    result: NDArray[np.float64] = tensor.double().numpy()
    return result
