"""Run one layer over the streams: attention, MoE inputs, routing; moments of a chunk of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fourfold.core import guidance, metrics, moments, widening
from fourfold.datatypes import Batches, Moments, Rows, StreamDrift, Tick
from fourfold.model.layer import (
    DecoderLayer,
    Pairs,
    Routing,
    activate,
    attend,
    expert_hidden,
    of_gate_up,
    run_experts,
    sort_pairs,
)
from fourfold.quantize.workers import Worker


@dataclass(frozen=True)
class Traffic:
    """What one stream's calibration rows bring to the experts of one layer; kept until the layer is solved.

    rows: this worker's, whose hidden states hold the layer's output without its routed experts; counts: tokens of each
    worker. input_TD: the experts' input, of all workers' tokens, where Batches.inputs says; routing: likewise. The last
    two are None for a layer without routed experts.
    """

    rows: Rows
    counts: tuple[int, ...]
    input_TD: Tensor | None
    routing: Routing | None


@dataclass(frozen=True)
class Observed:
    """What a layer's moments come from: the release stream (asymmetric) or the source stream.

    input_TD: the experts' inputs, of all workers' tokens, on the layer's device or on the host; counts: tokens of each
    worker; routing: of all; pairs: of the worker's own experts; target_TD: the source stream's inputs where the target
    is asymmetric, or None. In the first layer both streams' inputs are one tensor; those of down differ there all the
    same. gap_TD: what the source's rows have over the release's before the experts' output is added, over the sum of
    the token's router weights, where down is to make up for it; None in the first layer, where it is nothing.
    """

    input_TD: Tensor
    counts: tuple[int, ...]
    routing: Routing
    pairs: Pairs
    target_TD: Tensor | None
    gap_TD: Tensor | None


def observe(
    worker: Worker, layer: DecoderLayer, source: Traffic, release: Traffic | None, residual: bool
) -> Observed:
    """What a layer's own experts are learnt from; one tensor stays one. residual: with the gap between both rows."""
    traffic = source if release is None else release
    assert traffic.input_TD is not None and traffic.routing is not None
    routing = traffic.routing.to(layer.stacks[0].device)
    pairs = sort_pairs(routing, layer.owned, layer.experts)
    target_TD = None if release is None else source.input_TD
    gap_TD = None
    if release is not None and residual and target_TD is not traffic.input_TD:
        gap_TD = _gap(worker, source, release).to(traffic.input_TD.device, non_blocking=True)
    return Observed(traffic.input_TD, traffic.counts, routing, pairs, target_TD, gap_TD)


def _gap(worker: Worker, source: Traffic, release: Traffic) -> Tensor:
    """Source less release at all workers' tokens, on the host. Divided by the sum of a token's router weights, so that
    what each of its experts adds comes to all of it.
    """
    assert release.routing is not None
    source_RTD, release_RTD = source.rows.hidden_RTD, release.rows.hidden_RTD
    room = worker.room(source.rows.token_RT.numel(), source_RTD.shape[2:], source_RTD.dtype)
    torch.sub(source_RTD, release_RTD, out=room.own_TX.view(source_RTD.shape))
    weight_TA = release.routing.weight_TA[own_tokens(worker, release.counts)]
    room.own_TX.div_(weight_TA.sum(dim=1, keepdim=True, dtype=torch.float32).cpu())
    return worker.gathered(room)[0]


def own_tokens(worker: Worker, counts: Sequence[int]) -> slice:
    """Where a worker's tokens lie among all workers'. counts: tokens of each."""
    first = sum(counts[: worker.rank])
    return slice(first, first + counts[worker.rank])


def attend_(worker: Worker, layer: DecoderLayer, rows: Rows, batches: Batches, tick: Tick) -> Traffic:
    """Attention, shared experts and router over a worker's rows. In place: `rows` then holds the output without
    experts. What the experts are given is gathered from all workers.
    """
    hidden_RTD, link = rows.hidden_RTD, worker.link
    # All workers' in one piece from the start: pieces that are put together later lie twice in memory then.
    room = worker.room(rows.token_RT.numel(), hidden_RTD.shape[2:], hidden_RTD.dtype) if layer.is_routed else None
    choices: list[Routing] = []
    places = list(_batches(len(hidden_RTD), batches.rows))
    brought = link.bring(hidden_RTD[place] for place in places)
    for place, batch_RTD in zip(places, brought, strict=True):
        output_RTD, input_TD, routing = attend(layer, batch_RTD)
        link.put_(hidden_RTD[place], output_RTD)
        if room is not None and input_TD is not None and routing is not None:
            link.put_(room.own_TX.view(hidden_RTD.shape)[place], input_TD.view(output_RTD.shape))
            choices.append(routing)
        tick(output_RTD.shape[0] * output_RTD.shape[1])
    link.settle()
    if room is None:
        return Traffic(rows, (), None, None)
    input_TD, counts = worker.gathered(room)
    device = layer.device if batches.inputs == "device" else torch.device("cpu")
    return Traffic(rows, counts, input_TD.to(device, non_blocking=True), _gather_routing(worker, choices).to(device))


def _gather_routing(worker: Worker, choices: list[Routing]) -> Routing:
    """Of all workers' rows, which is given in pieces."""
    index_TA, _ = worker.gather([choice.index_TA for choice in choices])
    weight_TA, _ = worker.gather([choice.weight_TA for choice in choices])
    return Routing(index_TA=index_TA, weight_TA=weight_TA)


def advance_(worker: Worker, layer: DecoderLayer, traffic: Traffic, batches: Batches, tick: Tick) -> Rows:
    """Add the routed experts' output to a worker's rows of a stream, in place, and hand the rows on."""
    hidden_TD = traffic.rows.hidden_RTD.flatten(0, 1)
    if traffic.input_TD is None or traffic.routing is None:
        tick(len(hidden_TD))
        return traffic.rows
    _add_experts_(worker, layer, hidden_TD, traffic, batches, tick)
    return traffic.rows


def _add_experts_(
    worker: Worker, layer: DecoderLayer, hidden_TD: Tensor, traffic: Traffic, batches: Batches, tick: Tick
) -> None:
    """Add what all workers' experts put out to this worker's rows, in place, some tokens of every worker at a time.

    hidden_TD: on the host. While it adds, the device works on the next tokens.
    """
    all_TD, chosen = traffic.input_TD, traffic.routing
    assert all_TD is not None and chosen is not None
    starts = [0, *accumulate(traffic.counts)]
    size = _ceil_div(batches.tokens, worker.size)
    firsts = range(0, max(traffic.counts), size)
    sizes = [[min(max(count - first, 0), size) for count in traffic.counts] for first in firsts]

    def put_out(first: int, counts: Sequence[int]) -> Tensor:
        places = [slice(start + first, start + first + count) for start, count in zip(starts, counts, strict=False)]
        routing = Routing(_pick(chosen.index_TA, places), _pick(chosen.weight_TA, places))
        input_TD = _pick(all_TD, places).to(layer.device, non_blocking=True)
        partial_TD = run_experts(layer, input_TD, routing.to(layer.device))
        return partial_TD.to(hidden_TD.dtype) if worker.size == 1 else partial_TD  # alone, it is the sum

    partials = worker.link.take(map(put_out, firsts, sizes))
    for first, counts, partial_TD in zip(firsts, sizes, partials, strict=True):
        output_TD = worker.sum(partial_TD, counts).to(hidden_TD.dtype)
        hidden_TD[first : first + len(output_TD)] += output_TD
        tick(len(output_TD))


def _pick(values_TX: Tensor, places: Sequence[slice]) -> Tensor:
    return values_TX[places[0]] if len(places) == 1 else torch.cat([values_TX[place] for place in places])


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def pass_heldout_(
    worker: Worker,
    layers: Sequence[DecoderLayer],
    rows: Sequence[Rows],
    batches: Batches,
    tick: Tick,
) -> tuple[StreamDrift, ...]:
    """Take a worker's held-out rows of all streams through a layer, in place, a batch of rows at a time, nothing kept.

    layers, rows: the source's, then one for each release. Returns each release's drift from the source, over the rows
    of all workers.
    """
    drifts = [_Drift() for _ in layers[1:]]
    for first in range(0, max(worker.everyone(len(rows[0].hidden_RTD))), batches.rows):
        batch = slice(first, first + batches.rows)
        source_RTD, source_routing = pass_batch(worker, layers[0], rows[0].hidden_RTD[batch], batches)
        rows[0].hidden_RTD[batch] = source_RTD
        tick(source_RTD.shape[0] * source_RTD.shape[1])
        for layer, stream, drift in zip(layers[1:], rows[1:], drifts, strict=True):
            release_RTD, release_routing = pass_batch(worker, layer, stream.hidden_RTD[batch], batches)
            stream.hidden_RTD[batch] = release_RTD
            drift.add(source_RTD, release_RTD)
            if source_routing is not None and release_routing is not None:
                share = metrics.router_agreement(source_routing.index_TA, release_routing.index_TA)
                drift.agreement += [share] * len(source_RTD)
            tick(release_RTD.shape[0] * release_RTD.shape[1])
    return tuple(_Drift.join(worker.everyone(drift)).finish(layers[0].index) for drift in drifts)


class _Drift:
    """Sums over the batches of one release."""

    def __init__(self) -> None:
        self.error = self.norm = 0.0
        self.agreement: list[float] = []  # of each row

    def add(self, source_RTD: Tensor, release_RTD: Tensor) -> None:
        self.error += (release_RTD.float() - source_RTD.float()).square().sum(dtype=torch.float64).item()
        self.norm += source_RTD.float().square().sum(dtype=torch.float64).item()

    @classmethod
    def join(cls, parts: Sequence[_Drift]) -> _Drift:
        whole = cls()
        for part in parts:
            whole.error += part.error
            whole.norm += part.norm
            whole.agreement += part.agreement
        return whole

    def finish(self, layer: int) -> StreamDrift:
        return StreamDrift(
            layer=layer,
            hidden_error=(self.error / self.norm) ** 0.5,
            router_agreement=sum(self.agreement) / len(self.agreement) if self.agreement else None,
        )


def pass_batch(
    worker: Worker, layer: DecoderLayer, hidden_RTD: Tensor, batches: Batches
) -> tuple[Tensor, Routing | None]:
    """One batch of a worker's rows through a layer and its experts: the output, where the rows lie, and the routing if
    any. A worker whose rows are through takes part with none: the others need its experts.
    """
    output_RTD, inputs, choices = hidden_RTD, [], []
    if len(hidden_RTD):
        output_RTD, input_TD, routing = attend(layer, hidden_RTD.to(layer.device))
        if input_TD is not None and routing is not None:
            inputs, choices = [input_TD], [routing]
    output_RTD = output_RTD.to(hidden_RTD.device)
    if not layer.is_routed:
        return output_RTD, None
    own = choices[0] if choices else None
    input_TD, counts = worker.gather(inputs)
    traffic = Traffic(Rows(torch.empty(0), output_RTD), counts, input_TD, _gather_routing(worker, choices))
    _add_experts_(worker, layer, output_RTD.flatten(0, 1), traffic, batches, lambda count: None)
    return output_RTD, own


def _batches(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


@dataclass(frozen=True)
class Chunk:
    """A chunk of a worker's experts with its (token, expert) pairs: what its moments are made of.

    input_TD: MoE inputs that the moments use; target_TD, gap_TD: see Observed, of the same tokens; weight_S: w of each
    pair (router weight, or one).
    """

    experts: range  # places among the worker's own
    pairs: Pairs
    weight_S: Tensor
    input_TD: Tensor
    target_TD: Tensor | None
    gap_TD: Tensor | None


def make_chunk(observed: Observed, experts: range, router_weighted: bool, inputs: str) -> Chunk:
    """inputs: see Batches; from the host each pair's own input is brought."""
    pairs = observed.pairs.of_experts(experts)
    input_TD, target_TD, gap_TD = observed.input_TD, observed.target_TD, observed.gap_TD
    if inputs != "device":
        device, token_S = pairs.token_S.device, pairs.token_S.cpu()
        same = target_TD is input_TD
        input_TD = input_TD[token_S].to(device)
        if target_TD is not None:
            target_TD = input_TD if same else target_TD[token_S].to(device)
        if gap_TD is not None:
            gap_TD = gap_TD[token_S].to(device)
        pairs = dataclasses.replace(pairs, token_S=torch.arange(len(token_S), device=device))
    weight_S = pairs.weight_S.float()
    return Chunk(
        experts=experts,
        pairs=pairs,
        weight_S=weight_S if router_weighted else torch.ones_like(weight_S),
        input_TD=input_TD,
        target_TD=target_TD,
        gap_TD=gap_TD,
    )


def gate_up_pool(worker: Worker, observed: Observed, router_weighted: bool) -> Tensor:
    """Mean of x x^T over the layer's tokens, each weighted by the sum of its router weights. fp32 [K, K], K = D.

    Each worker adds up its own tokens.
    """
    own = own_tokens(worker, observed.counts)
    weight_T = observed.routing.weight_TA.float().sum(dim=1)
    if not router_weighted:
        weight_T = torch.ones_like(weight_T)
    total_KK = worker.total(moments.pool(observed.input_TD[own].to(weight_T.device), weight_T[own]))
    return total_KK.div_(weight_T.sum())


def gate_up_moments(chunk: Chunk) -> Moments:
    """Moments of the experts' inputs, K = D. Without a cross moment where both streams' inputs are one tensor."""
    target_TD = None if chunk.target_TD is chunk.input_TD else chunk.target_TD
    return moments.accumulate(
        chunk.input_TD, target_TD, chunk.pairs.token_S, chunk.weight_S, list(chunk.pairs.offsets)
    )


def down_moments(chunk: Chunk, layer: DecoderLayer, gate_up_ENK: Tensor) -> Moments:
    """Moments of the activations silu(gate) * up, K = I.

    gate_up_ENK: of the chunk's experts, the weights that the moments use (dequantized for the release stream).
    With a target, its activations come from the source stream's inputs and the source weights, same pairs. What down
    puts out is added to the rows, so that it can make up for their gap too.
    """
    hidden_SI = expert_hidden(chunk.input_TD, chunk.pairs, gate_up_ENK, layer.activation)
    target_SI = None
    if chunk.target_TD is not None:
        source_ENK = layer.stacks[0][chunk.experts.start : chunk.experts.stop]
        target_SI = expert_hidden(chunk.target_TD, chunk.pairs, source_ENK, layer.activation)
    every_S, offsets = torch.arange(len(hidden_SI), device=hidden_SI.device), list(chunk.pairs.offsets)
    own = moments.accumulate(hidden_SI, target_SI, every_S, chunk.weight_S, offsets)
    if chunk.gap_TD is None:
        return own
    gap_EDI, gap2_ED = moments.gap(chunk.gap_TD, chunk.pairs.token_S, hidden_SI, chunk.weight_S, offsets)
    return dataclasses.replace(own, gap_ENK=gap_EDI, gap2_EN=gap2_ED)


def down_pool(layer: DecoderLayer, gate_up_ENK: Tensor, input_PD: Tensor) -> Tensor:
    """Mean of a a^T over the same random tokens for every expert of a chunk: fp32 [E, K, K], K = I.

    gate_up_ENK: of the chunk's experts; input_PD: what the tokens bring to any expert. Neurons of different experts do
    not correspond, so each expert has a pool of its own.
    """
    return _pool_of_random(gate_up_ENK, input_PD, lambda gate_up_EPN: activate(gate_up_EPN, layer.activation))


def row_moments(chunk: Chunk, gate_up_ENK: Tensor) -> Moments:
    """Moments of how gate and up change what an expert puts out (core/guidance.sensitivities), K = 2I, tokens weighted
    by their router weights squared. gate_up_ENK: of the chunk's experts, the source weights.
    """
    rows = gate_up_ENK.shape[1]
    changed_SN = of_gate_up(chunk.input_TD, chunk.pairs, gate_up_ENK, rows, guidance.sensitivities)
    every_S = torch.arange(len(changed_SN), device=changed_SN.device)
    weight_S = chunk.pairs.weight_S.float().square()
    return moments.accumulate(changed_SN, None, every_S, weight_S, list(chunk.pairs.offsets))


def row_pool(gate_up_ENK: Tensor, input_PD: Tensor) -> Tensor:
    """The same of random tokens that all weigh the same, their mean: fp32 [E, 2I, 2I]. See down_pool."""
    return _pool_of_random(gate_up_ENK, input_PD, guidance.sensitivities)


def _pool_of_random(gate_up_ENK: Tensor, input_PD: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean of x x^T over random tokens, x what `make` gives for gate and up of a token, of each expert: [E, K, K]."""
    with widening.products(input_PD.device):
        gate_up_EPN = torch.matmul(input_PD, gate_up_ENK.transpose(1, 2))
    made_EPK = make(gate_up_EPN)
    experts, rows = made_EPK.shape[:2]
    # Every row of every expert is a pair, and all weigh the same.
    own = moments.accumulate(
        made_EPK.flatten(0, 1), None, torch.arange(experts * rows, device=made_EPK.device),
        torch.ones(experts * rows, device=made_EPK.device), [rows * expert for expert in range(experts + 1)],
    )  # fmt: skip
    return own.hessian_EKK.div_(rows)


def random_tokens(count: int, wanted: int, seed: int) -> Tensor:
    """`wanted` of `count` tokens without replacement, ascending, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values
