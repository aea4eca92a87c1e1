"""Run one layer over the streams: attention, MoE inputs, routing; moments of a chunk of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.core import metrics, moments
from fourfold.datatypes import Moments, Rows, StreamDrift, Tick
from fourfold.model.layer import (
    DecoderLayer,
    Pairs,
    Routing,
    attend,
    expert_hidden,
    run_experts,
    sort_pairs,
)


@dataclass(frozen=True)
class Batches:
    """Sizes fixed at a run's first start, so that a resumed run repeats them.

    rows: rows per attention batch; tokens: tokens per expert batch; experts: experts whose moments exist at one time.
    """

    rows: int
    tokens: int
    experts: int


@dataclass(frozen=True)
class Traffic:
    """What one stream's calibration rows bring to the experts of one layer; kept on the host until the layer is solved.

    rows: hidden states hold the layer's output without its routed experts; input_TD: the experts' input;
    routing, pairs: who gets which token. The last three are None for a layer without routed experts.
    """

    rows: Rows
    input_TD: Tensor | None
    routing: Routing | None
    pairs: Pairs | None


@dataclass(frozen=True)
class Observed:
    """The traffic that a layer's moments come from, and the source stream's where the target is asymmetric.

    traffic: of the release stream (asymmetric) or the source stream; target_TD: the source stream's inputs, or None.
    In the first layer both streams' inputs are one tensor; those of down differ there all the same.
    """

    traffic: Traffic
    target_TD: Tensor | None

    def to(self, device: torch.device) -> Observed:
        """With the experts' inputs on a device, for as long as a layer is solved; one tensor stays one."""
        assert self.traffic.input_TD is not None
        input_TD = self.traffic.input_TD.to(device)
        target_TD = self.target_TD
        if target_TD is not None:
            target_TD = input_TD if target_TD is self.traffic.input_TD else target_TD.to(device)
        return Observed(dataclasses.replace(self.traffic, input_TD=input_TD), target_TD)


def attend_(layer: DecoderLayer, rows: Rows, batches: Batches, tick: Tick) -> Traffic:
    """Attention, shared experts and router over all rows. In place: `rows` then holds the output without experts."""
    hidden_RTD = rows.hidden_RTD
    inputs: list[Tensor] = []
    choices: list[Routing] = []
    for batch in _batches(len(hidden_RTD), batches.rows):
        output_RTD, input_TD, routing = attend(layer, hidden_RTD[batch].to(layer.device))
        hidden_RTD[batch] = output_RTD.to(hidden_RTD.device)
        if input_TD is not None and routing is not None:
            inputs.append(input_TD.to(hidden_RTD.device))
            choices.append(routing)
        tick(output_RTD.shape[0] * output_RTD.shape[1])
    if not choices:
        return Traffic(rows=rows, input_TD=None, routing=None, pairs=None)
    input_TD = _joined(inputs)
    routing = Routing(
        index_TA=torch.cat([choice.index_TA for choice in choices]),
        weight_TA=torch.cat([choice.weight_TA for choice in choices]),
    )
    return Traffic(rows=rows, input_TD=input_TD, routing=routing, pairs=sort_pairs(routing, layer.stacks[0].shape[0]))


def _joined(parts: list[Tensor]) -> Tensor:
    """Concatenate and let each part go as soon as it is copied: peak is one part above the whole."""
    joined = torch.empty(sum(len(part) for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype)
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[start : start + len(part)] = part
        start += len(part)
    return joined


def advance_(layer: DecoderLayer, traffic: Traffic, batches: Batches, tick: Tick) -> Rows:
    """Add the routed experts' output to a stream's rows, in place, and hand the rows on."""
    hidden_TD = traffic.rows.hidden_RTD.flatten(0, 1)
    if traffic.input_TD is None or traffic.routing is None:
        tick(len(hidden_TD))
        return traffic.rows
    for batch in _batches(len(hidden_TD), batches.tokens):
        routing = Routing(index_TA=traffic.routing.index_TA[batch], weight_TA=traffic.routing.weight_TA[batch])
        output_TD = run_experts(layer, traffic.input_TD[batch].to(layer.device), routing)
        hidden_TD[batch] += output_TD.to(hidden_TD.device)
        tick(len(output_TD))
    return traffic.rows


def pass_heldout_(
    layers: Sequence[DecoderLayer], rows: Sequence[Rows], batches: Batches, tick: Tick
) -> tuple[StreamDrift, ...]:
    """Take the held-out rows of all streams through a layer, in place, one batch of rows at a time, nothing kept.

    layers, rows: the source's, then one for each release. Returns each release's drift from the source.
    """
    drifts = [_Drift() for _ in layers[1:]]
    for batch in _batches(len(rows[0].hidden_RTD), batches.rows):
        source_RTD, source_routing = pass_batch(layers[0], rows[0].hidden_RTD[batch], batches)
        rows[0].hidden_RTD[batch] = source_RTD
        tick(source_RTD.shape[0] * source_RTD.shape[1])
        for layer, stream, drift in zip(layers[1:], rows[1:], drifts, strict=True):
            release_RTD, release_routing = pass_batch(layer, stream.hidden_RTD[batch], batches)
            stream.hidden_RTD[batch] = release_RTD
            drift.add(source_RTD, release_RTD)
            if source_routing is not None and release_routing is not None:
                share = metrics.router_agreement(source_routing.index_TA, release_routing.index_TA)
                drift.agreement += [share] * len(source_RTD)
            tick(release_RTD.shape[0] * release_RTD.shape[1])
    return tuple(drift.finish(layers[0].index) for drift in drifts)


class _Drift:
    """Sums over the batches of one release."""

    def __init__(self) -> None:
        self.error = self.norm = 0.0
        self.agreement: list[float] = []  # of each row

    def add(self, source_RTD: Tensor, release_RTD: Tensor) -> None:
        self.error += (release_RTD.float() - source_RTD.float()).square().sum(dtype=torch.float64).item()
        self.norm += source_RTD.float().square().sum(dtype=torch.float64).item()

    def finish(self, layer: int) -> StreamDrift:
        return StreamDrift(
            layer=layer,
            hidden_error=(self.error / self.norm) ** 0.5,
            router_agreement=sum(self.agreement) / len(self.agreement) if self.agreement else None,
        )


def pass_batch(layer: DecoderLayer, hidden_RTD: Tensor, batches: Batches) -> tuple[Tensor, Routing | None]:
    """One batch of rows through a layer and its experts: the output, where the rows lie, and the routing if any."""
    output_RTD, input_TD, routing = attend(layer, hidden_RTD.to(layer.device))
    if input_TD is not None and routing is not None:
        output_TD = output_RTD.flatten(0, 1)
        for batch in _batches(len(input_TD), batches.tokens):
            part = Routing(index_TA=routing.index_TA[batch], weight_TA=routing.weight_TA[batch])
            output_TD[batch] += run_experts(layer, input_TD[batch], part)
    return output_RTD.to(hidden_RTD.device), routing


def _batches(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def chunks(experts: int, size: int) -> Iterator[range]:
    """Consecutive ranges of experts, `size` at a time."""
    for first in range(0, experts, size):
        yield range(first, min(first + size, experts))


@dataclass(frozen=True)
class Chunk:
    """A chunk of experts with its (token, expert) pairs: what its moments are made of.

    input_TD: MoE inputs that the moments use; target_TD: the source stream's inputs of the same tokens, or None;
    weight_S: w of each pair (router weight, or one).
    """

    experts: range
    pairs: Pairs
    weight_S: Tensor
    input_TD: Tensor
    target_TD: Tensor | None


def make_chunk(observed: Observed, experts: range, router_weighted: bool) -> Chunk:
    traffic = observed.traffic
    assert traffic.input_TD is not None and traffic.pairs is not None
    pairs = traffic.pairs.of_experts(experts)
    weight_S = pairs.weight_S.float()
    return Chunk(
        experts=experts,
        pairs=pairs,
        weight_S=weight_S if router_weighted else torch.ones_like(weight_S),
        input_TD=traffic.input_TD,
        target_TD=observed.target_TD,
    )


def gate_up_pool(observed: Observed, router_weighted: bool) -> Tensor:
    """Mean of x x^T over the layer's tokens, each weighted by the sum of its router weights. fp32 [K, K], K = D."""
    traffic = observed.traffic
    assert traffic.input_TD is not None and traffic.routing is not None
    weight_T = traffic.routing.weight_TA.float().sum(dim=1)
    return moments.pool(traffic.input_TD, weight_T if router_weighted else torch.ones_like(weight_T))


def gate_up_moments(chunk: Chunk) -> Moments:
    """Moments of the experts' inputs, K = D. Without a cross moment where both streams' inputs are one tensor."""
    target_TD = None if chunk.target_TD is chunk.input_TD else chunk.target_TD
    return moments.accumulate(
        chunk.input_TD, target_TD, chunk.pairs.token_S, chunk.weight_S, list(chunk.pairs.offsets)
    )


def down_moments(chunk: Chunk, layer: DecoderLayer, gate_up_ENK: Tensor) -> Moments:
    """Moments of the activations silu(gate) * up, K = I.

    gate_up_ENK: of the chunk's experts, the weights that the moments use (dequantized for the release stream).
    With a target, its activations come from the source stream's inputs and the source weights, same pairs.
    """
    hidden_SI = expert_hidden(chunk.input_TD, chunk.pairs, gate_up_ENK, layer.activation)
    target_SI = None
    if chunk.target_TD is not None:
        source_ENK = layer.stacks[0][chunk.experts.start : chunk.experts.stop]
        target_SI = expert_hidden(chunk.target_TD, chunk.pairs, source_ENK, layer.activation)
    every_S = torch.arange(len(hidden_SI), device=hidden_SI.device)
    return moments.accumulate(hidden_SI, target_SI, every_S, chunk.weight_S, list(chunk.pairs.offsets))


def down_pool(chunk: Chunk, layer: DecoderLayer, gate_up_ENK: Tensor, token_P: Tensor) -> Tensor:
    """Mean of a a^T over the same random tokens for every expert of the chunk: fp32 [E, K, K], K = I.

    Neurons of different experts do not correspond, so each expert has a pool of its own.
    """
    width = gate_up_ENK.shape[1] // 2
    gate_up_EPN = torch.matmul(chunk.input_TD[token_P], gate_up_ENK.transpose(1, 2))
    hidden_EPI = layer.activation(gate_up_EPN[..., :width]) * gate_up_EPN[..., width:]
    experts, rows = hidden_EPI.shape[:2]
    # Every row of every expert is a pair, and all weigh the same.
    own = moments.accumulate(
        hidden_EPI.flatten(0, 1), None, torch.arange(experts * rows, device=hidden_EPI.device),
        torch.ones(experts * rows, device=hidden_EPI.device), [rows * expert for expert in range(experts + 1)],
    )  # fmt: skip
    return own.hessian_EKK.div_(rows)


def random_tokens(count: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of `count` tokens without replacement, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
