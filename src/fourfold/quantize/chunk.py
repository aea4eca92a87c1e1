"""What a chunk of experts is learnt from: second moments of its own tokens, and pools of the layer's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fourfold.core import guidance, moments, widening
from fourfold.datatypes import Moments, Placement
from fourfold.distributed.workers import Worker
from fourfold.model.layer import DecoderLayer, Pairs, expert_hidden, of_gate_up
from fourfold.quantize.estimate import ROW_POOL_ROWS
from fourfold.quantize.heap import give_back_free_memory
from fourfold.quantize.observe import Observed, own_tokens

POOL_PIECE = 2_048  # random tokens that go through all experts of a chunk at one time
GATHERED = 16_384  # tokens that are brought from the host at one time


@dataclass(frozen=True)
class Pool:
    """Random tokens that go through every expert of a layer. input_PD: what they bring; importance_P: see Observed."""

    input_PD: Tensor
    importance_P: Tensor


@dataclass(frozen=True)
class Chunk:
    """A chunk of a worker's experts with its (token, expert) pairs: what its moments are made of.

    input_TD: MoE inputs that the moments use; target_TD, gap_TD: see Observed, of the same tokens; weight_S: w of each
    pair, its token's importance times its router weight; row_weight_S: the importance times that weight squared.
    """

    experts: range  # places among the worker's own
    pairs: Pairs
    weight_S: Tensor
    row_weight_S: Tensor
    input_TD: Tensor
    target_TD: Tensor | None
    gap_TD: Tensor | None

    @property
    def place(self) -> slice:
        """The chunk's experts in a layer's stacks."""
        return slice(self.experts.start, self.experts.stop)


def make_chunk(
    observed: Observed,
    experts: range,
    router_weighted: bool,
    inputs: Placement,
    beat: Callable[[], None] = lambda: None,
) -> Chunk:
    """inputs: see Batches; from the host each pair's own input is brought. beat: called after each piece of these."""
    pairs = observed.pairs.of_experts(experts)
    input_TD, target_TD, gap_TD = observed.input_TD, observed.target_TD, observed.gap_TD
    importance_S, router_S = observed.importance_T[pairs.token_S], pairs.weight_S.float()
    share = partial(observed.share_weights, offsets=pairs.offsets, token_S=pairs.token_S)
    weight_S = share(router_S * importance_S if router_weighted else importance_S)
    row_weight_S = share(router_S.square().mul_(importance_S))
    if inputs != Placement.DEVICE:
        device, token_S = pairs.token_S.device, pairs.token_S.cpu()
        same = target_TD is input_TD
        input_TD = _gathered(input_TD, token_S, beat).to(device)
        if target_TD is not None:
            target_TD = input_TD if same else _gathered(target_TD, token_S, beat).to(device)
        if gap_TD is not None:
            gap_TD = _gathered(gap_TD, token_S, beat).to(device)
        pairs = dataclasses.replace(pairs, token_S=torch.arange(len(token_S), device=device))
    return Chunk(
        experts=experts,
        pairs=pairs,
        weight_S=weight_S,
        row_weight_S=row_weight_S,
        input_TD=input_TD,
        target_TD=target_TD,
        gap_TD=gap_TD,
    )


def _gathered(value_TD: Tensor, token_S: Tensor, beat: Callable[[], None]) -> Tensor:
    """The rows of some tokens, on the host. What lies in a file is then in memory a piece at a time."""
    found_SD = value_TD.new_empty(len(token_S), *value_TD.shape[1:])
    for first in range(0, len(token_S), GATHERED):
        place = slice(first, first + GATHERED)
        torch.index_select(value_TD, 0, token_S[place], out=found_SD[place])
        beat()
    return found_SD


def gate_up_pool(worker: Worker, observed: Observed, router_weighted: bool) -> Tensor:
    """Mean of x x^T over the layer's tokens, each weighted by its importance and the sum of its router weights. fp32
    [K, K], K = D.

    Each worker adds up its own tokens.
    """
    own = own_tokens(worker, observed.counts)
    weight_T = observed.importance_T
    if router_weighted:
        weight_T = weight_T * observed.routing.weight_TA.float().sum(dim=1)
    weight_T = observed.share_weights(weight_T, [0, len(weight_T)])
    own_TD = observed.input_TD[own].to(weight_T.device)
    total_KK = worker.all_reduce(moments.pool(own_TD, weight_T[own], worker.heartbeat))
    return total_KK.div_(weight_T.sum())


def gate_up_moments(chunk: Chunk) -> Moments:
    """Moments of the experts' inputs, K = D."""
    return moments.accumulate(chunk.input_TD, chunk.pairs.token_S, chunk.weight_S, list(chunk.pairs.offsets))


def down_moments(chunk: Chunk, layer: DecoderLayer, gate_up_ENK: Tensor) -> Moments:
    """Moments of the activations silu(gate) * up, K = I.

    gate_up_ENK: of the chunk's experts, the weights that the moments use (dequantized for the release stream).
    With a target, down's output is to make up for what the source's activations have over these, and for the gap
    between the rows that it is added to.
    """
    give_back_free_memory()  # the activations are larger than what is free between tensors
    pairs, offsets = chunk.pairs, list(chunk.pairs.offsets)
    hidden_SI = expert_hidden(chunk.input_TD, pairs, gate_up_ENK, layer.arithmetic)
    own = moments.accumulate(hidden_SI, torch.arange(len(hidden_SI), device=hidden_SI.device), chunk.weight_S, offsets)
    if chunk.target_TD is None:
        return own
    source_ENK, down_ENK = (stack[chunk.place] for stack in layer.stacks)
    target_SI = expert_hidden(chunk.target_TD, pairs, source_ENK, layer.arithmetic)

    def missing(expert: int, piece: slice) -> Tensor:
        lost_SI = (target_SI[piece].float() - hidden_SI[piece].float()).to(hidden_SI.dtype)
        with widening.products(lost_SI.device):
            missing_SD = torch.mm(lost_SI, down_ENK[expert].T).float()
        return missing_SD if chunk.gap_TD is None else missing_SD.add_(chunk.gap_TD[pairs.token_S[piece]])

    give_back_free_memory()
    gap_EDI, gap2_ED = moments.gap(missing, down_ENK.shape[1], hidden_SI, chunk.weight_S, offsets)
    return dataclasses.replace(own, gap_ENK=gap_EDI, gap2_EN=gap2_ED)


def down_pool(layer: DecoderLayer, gate_up_ENK: Tensor, pool: Pool) -> Tensor:
    """Mean of a a^T over the same random tokens for every expert of a chunk: fp32 [E, K, K], K = I.

    gate_up_ENK: of the chunk's experts. Neurons of different experts do not correspond, so each expert has a pool of
    its own.
    """
    return _pool_of_random(gate_up_ENK, pool, layer.arithmetic.hidden)


def row_moments(chunk: Chunk, gate_up_ENK: Tensor) -> Moments:
    """Moments of how gate and up change what an expert puts out (core/guidance.sensitivities), K = 2I, tokens weighted
    by their importance and their router weights squared. gate_up_ENK: of the chunk's experts, the source weights.
    """
    rows = gate_up_ENK.shape[1]
    changed_SN = of_gate_up(chunk.input_TD, chunk.pairs, gate_up_ENK, rows, guidance.sensitivities)
    every_S = torch.arange(len(changed_SN), device=changed_SN.device)
    return moments.accumulate(changed_SN, every_S, chunk.row_weight_S, list(chunk.pairs.offsets))


def row_pool(gate_up_ENK: Tensor, pool: Pool) -> Tensor:
    """The same of random tokens, without their router weights, their mean: fp32 [E, 2I, 2I]. See down_pool.

    At most ROW_POOL_ROWS of the pool, evenly: 2I rows are many, and their metric only shades what the curvature tells.
    """
    rows = len(pool.input_PD)
    few = min(rows, ROW_POOL_ROWS)
    place_P = torch.arange(few, device=pool.input_PD.device) * rows // few
    part = Pool(pool.input_PD[place_P], pool.importance_P[place_P])
    return _pool_of_random(gate_up_ENK, part, guidance.sensitivities)


def _pool_of_random(gate_up_ENK: Tensor, pool: Pool, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of x x^T over random tokens, x what `make` gives for gate and up of a token, of each expert: [E, K, K]."""
    experts, total_EKK = len(gate_up_ENK), None
    for first in range(0, len(pool.input_PD), POOL_PIECE):
        piece = slice(first, first + POOL_PIECE)
        with widening.products(gate_up_ENK.device):
            gate_up_EPN = torch.matmul(pool.input_PD[piece], gate_up_ENK.transpose(1, 2))
        made_EPK = make(gate_up_EPN)
        rows = made_EPK.shape[1]
        pair_S = torch.arange(experts * rows, device=made_EPK.device)  # every row of every expert is one
        offsets, weight_S = list(range(0, len(pair_S) + 1, rows)), pool.importance_P[piece].repeat(experts)
        part_EKK = moments.accumulate(made_EPK.flatten(0, 1), pair_S, weight_S, offsets).hessian_EKK
        total_EKK = part_EKK if total_EKK is None else total_EKK.add_(part_EKK)
    assert total_EKK is not None
    return total_EKK.div_(pool.importance_P.sum())


def random_pool(observed: Observed, wanted: int, seed: int, device: torch.device) -> Pool:
    """The pool of a layer, the same for a seed. wanted: its tokens, at most all."""
    token_P = random_tokens(len(observed.input_TD), wanted, seed)
    importance_T = observed.share_weights(observed.importance_T, [0, len(observed.importance_T)])
    importance_P = importance_T[token_P.to(importance_T.device)]
    input_PD = observed.input_TD[token_P.to(observed.input_TD.device)]
    return Pool(input_PD.to(device), importance_P.to(device))


def random_tokens(count: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of `count` tokens without replacement, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
