"""Run one layer over the streams: attention, MoE inputs, routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fourfold.core import metrics, moments
from fourfold.datatypes import Batches, Placement, Rows, StreamDrift, Tick
from fourfold.distributed.workers import Worker
from fourfold.model.layer import (
    DecoderLayer,
    Pairs,
    Routing,
    add_output_,
    attend,
    run_experts,
    sort_pairs,
    with_output,
)

EVERY = slice(None)
MOST_IMPORTANT = 4.0  # cap relative to the median token: near-zero hidden states would dominate otherwise


@dataclass(frozen=True)
class MoeInputs:
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
    worker; routing: of all; pairs: of the worker's own experts; target_TD: the source stream's inputs where down is to
    bring the residual stream to the source's, or None. In the first layer both streams' inputs are one tensor.
    gap_TD: source minus release hidden states before the experts' output is added, divided by the layer's tail times
    the sum of the token's router weights; None in the first layer, where it is zero, and in a layer without a tail.
    importance_T: weight of an error at each token (token_importance), on the layer's device; image_T: which tokens are
    of an image, where images are to have `image_share` of the weight in each expert, else None.
    """

    input_TD: Tensor
    counts: tuple[int, ...]
    routing: Routing
    pairs: Pairs
    target_TD: Tensor | None
    gap_TD: Tensor | None
    importance_T: Tensor
    image_T: Tensor | None = None
    image_share: float = 0.0

    def share_weights(self, weight_S: Tensor, offsets: Sequence[int], token_S: Tensor | slice = EVERY) -> Tensor:
        """Weights of tokens, or of the pairs of experts with them, after the images have got their share."""
        if self.image_T is None:
            return weight_S
        return moments.share_weights(weight_S, self.image_T[token_S], offsets, self.image_share)


def observe(worker: Worker, layer: DecoderLayer, source: MoeInputs, release: MoeInputs | None) -> Observed:
    """Collect the inputs of this worker's experts before their output is added. Streams that share a tensor still share
    it; all token weights are 1.
    """
    moe_inputs = source if release is None else release
    assert moe_inputs.input_TD is not None and moe_inputs.routing is not None
    routing = moe_inputs.routing.to(layer.stacks[0].device)
    pairs = sort_pairs(routing, layer.owned, layer.experts)
    target_TD = None if release is None else source.input_TD
    gap_TD = None
    if release is not None and target_TD is not moe_inputs.input_TD and layer.tail is not None:
        gap_TD = _gap(worker, layer.tail, source, release).to(moe_inputs.input_TD.device, non_blocking=True)
    importance_T = torch.ones(len(moe_inputs.input_TD), device=routing.weight_TA.device)
    return Observed(moe_inputs.input_TD, moe_inputs.counts, routing, pairs, target_TD, gap_TD, importance_T)


def _gap(worker: Worker, tail: float, source: MoeInputs, release: MoeInputs) -> Tensor:
    """Source minus release at all workers' tokens, on the host, divided by `tail` times the sum of the token's router
    weights: the token's experts together then add exactly this difference.
    """
    assert release.routing is not None
    source_RTD, release_RTD = source.rows.hidden_RTD, release.rows.hidden_RTD
    room = worker.gather_buffer(source.rows.token_RT.numel(), source_RTD.shape[2:], source_RTD.dtype)
    weight_TA = release.routing.weight_TA[own_tokens(worker, release.counts)]
    weight_RT1 = weight_TA.sum(dim=1, keepdim=True, dtype=torch.float32).cpu().view(*source_RTD.shape[:2], 1)
    gap_RTD = room.own_TX.view(source_RTD.shape)
    for row, gap_TD in enumerate(gap_RTD):  # BF16 by fp32 takes two fp32 copies
        torch.sub(source_RTD[row], release_RTD[row], out=gap_TD).div_(tail * weight_RT1[row])
        worker.heartbeat()
    return worker.finish_gather(room)[0]


def token_importance(worker: Worker, rows: Rows, power: float) -> Tensor:
    """What an error at each token weighs, of all workers' tokens: (median |x| / |x|)^power, at most MOST_IMPORTANT.

    rows: of the source behind the layer. The norm before the next layer divides by |x|, so that an error beside a long
    state matters less; but all later tokens may attend to one whose state is very long, so that it matters more than
    1 / |x|^2 (docs/numerics.md section 1). fp32 [T].
    """
    length_RT = torch.empty(rows.hidden_RTD.shape[:2])
    for length_T, hidden_TD in zip(length_RT, rows.hidden_RTD, strict=True):  # fp32 of all rows at once may be 2 GB
        torch.norm(hidden_TD.flatten(1).float(), dim=-1, out=length_T)
        worker.heartbeat()
    length_T, _ = worker.all_gather([length_RT.flatten()])
    return (length_T.median() / length_T).pow_(power).nan_to_num_(1.0).clamp_(max=MOST_IMPORTANT)


def own_tokens(worker: Worker, counts: Sequence[int]) -> slice:
    """Where a worker's tokens lie among all workers'. counts: tokens of each."""
    first = sum(counts[: worker.rank])
    return slice(first, first + counts[worker.rank])


def attend_(worker: Worker, layer: DecoderLayer, rows: Rows, batches: Batches, tick: Tick) -> MoeInputs:
    """Attention, shared experts and router over a worker's rows, and the expert inputs gathered from all workers.

    Updates `rows` in place with the output without routed experts, unless layer.tail is None: those rows stay unchanged
    for a second pass with the experts' output.
    """
    hidden_RTD, link, room = rows.hidden_RTD, worker.transfer, None
    if layer.is_routed:
        # All workers' in one piece from the start: pieces that are put together later lie twice in memory then.
        room = worker.gather_buffer(rows.token_RT.numel(), (layer.stacks[0].shape[2],), layer.dtype)
    choices: list[Routing] = []
    places = rows.batches(batches.rows)
    brought = link.prefetch(hidden_RTD[place] for place in places)
    for place, batch_RTD in zip(places, brought, strict=True):
        found = attend(layer, batch_RTD, rows.beside(place, layer.device))
        if layer.tail is not None:  # else these rows go through the layer again
            link.copy_to_host_(hidden_RTD[place], found.output_RTD)
            rows.carry_(place, found.carried)
        if room is not None and found.input_TD is not None and found.routing is not None:
            link.copy_to_host_(room.own_TX.unflatten(0, rows.token_RT.shape)[place].flatten(0, 1), found.input_TD)
            choices.append(found.routing)
        tick(found.output_RTD.shape[0] * found.output_RTD.shape[1])
    link.synchronize()
    if room is None:
        return MoeInputs(rows, (), None, None)
    input_TD, counts = worker.finish_gather(room)
    device = layer.device if batches.inputs == Placement.DEVICE else torch.device("cpu")
    return MoeInputs(rows, counts, input_TD.to(device, non_blocking=True), _gather_routing(worker, choices).to(device))


def _gather_routing(worker: Worker, choices: list[Routing]) -> Routing:
    """Of all workers' rows, which is given in pieces."""
    index_TA, _ = worker.all_gather([choice.index_TA for choice in choices])
    weight_TA, _ = worker.all_gather([choice.weight_TA for choice in choices])
    return Routing(index_TA=index_TA, weight_TA=weight_TA)


def advance_(worker: Worker, layer: DecoderLayer, moe_inputs: MoeInputs, batches: Batches, tick: Tick) -> Rows:
    """Add the routed experts' output to a worker's rows of a stream, in place, and hand the rows on."""
    rows = moe_inputs.rows
    if moe_inputs.input_TD is None or moe_inputs.routing is None:
        tick(rows.token_RT.numel())
        return rows
    if layer.tail is not None:
        _add_experts_(worker, layer, rows.hidden_RTD.flatten(0, 1), moe_inputs, batches, tick)
        return rows
    experts_TD = torch.zeros(rows.token_RT.numel(), layer.stacks[1].shape[1], dtype=layer.dtype)
    _add_experts_(worker, layer, experts_TD, moe_inputs, batches, tick)
    _run_again_(layer, rows, experts_TD, batches)
    return rows


def _run_again_(layer: DecoderLayer, rows: Rows, experts_TD: Tensor, batches: Batches) -> None:
    """A worker's rows through a layer whose experts put out `experts_TD`, in place."""
    hidden_RTD = rows.hidden_RTD
    experts_RTD = experts_TD.unflatten(0, hidden_RTD.shape[:2])
    for place in rows.batches(batches.rows):
        given = hidden_RTD[place].to(layer.device), experts_RTD[place].flatten(0, 1).to(layer.device)
        output_RTD, handed = with_output(layer, *given, rows.beside(place, layer.device))
        hidden_RTD[place] = output_RTD.to(hidden_RTD.device)
        rows.carry_(place, handed)


def _add_experts_(
    worker: Worker, layer: DecoderLayer, hidden_TD: Tensor, moe_inputs: MoeInputs, batches: Batches, tick: Tick
) -> None:
    """Add all workers' expert outputs to this worker's rows, in place, in batches of tokens of every worker.

    hidden_TD: on the host; zeros for a layer that is run again. The host adds one batch while the device computes the
    next.
    """
    all_TD, chosen = moe_inputs.input_TD, moe_inputs.routing
    assert all_TD is not None and chosen is not None
    starts = [0, *accumulate(moe_inputs.counts)]
    size = _ceil_div(batches.tokens, worker.size)
    firsts = range(0, max(moe_inputs.counts), size)
    sizes = [[min(max(count - first, 0), size) for count in moe_inputs.counts] for first in firsts]

    def put_out(first: int, counts: Sequence[int]) -> Tensor:
        places = [slice(start + first, start + first + count) for start, count in zip(starts, counts, strict=False)]
        routing = Routing(_pick(chosen.index_TA, places), _pick(chosen.weight_TA, places))
        input_TD = _pick(all_TD, places).to(layer.device, non_blocking=True)
        partial_TD = run_experts(layer, input_TD, routing.to(layer.device))
        return partial_TD.to(hidden_TD.dtype) if worker.size == 1 else partial_TD  # alone, it is the sum

    partials = worker.transfer.drain(map(put_out, firsts, sizes))
    for first, counts, partial_TD in zip(firsts, sizes, partials, strict=True):
        output_TD = worker.reduce_scatter(partial_TD, counts).to(hidden_TD.dtype)
        add_output_(layer, hidden_TD[first : first + len(output_TD)], output_TD)
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
    places, none = rows[0].batches(batches.rows), slice(len(rows[0].hidden_RTD), None)
    for number in range(max(worker.all_gather_object(len(places)))):
        batch = places[number] if number < len(places) else none
        source_RTD, source_routing = pass_batch(worker, layers[0], rows[0], batch, batches)
        tick(source_RTD.shape[0] * source_RTD.shape[1])
        for layer, stream, drift in zip(layers[1:], rows[1:], drifts, strict=True):
            release_RTD, release_routing = pass_batch(worker, layer, stream, batch, batches)
            drift.add(source_RTD, release_RTD)
            if source_routing is not None and release_routing is not None:
                share = metrics.router_agreement(source_routing.index_TA, release_routing.index_TA)
                drift.agreement += [share] * len(source_RTD)
            tick(release_RTD.shape[0] * release_RTD.shape[1])
    return tuple(_Drift.join(worker.all_gather_object(drift)).finish(layers[0].index) for drift in drifts)


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
    worker: Worker, layer: DecoderLayer, rows: Rows, place: slice, batches: Batches
) -> tuple[Tensor, Routing | None]:
    """Pass one batch of a worker's rows through a layer and its experts, in place; return them and their routing.

    A worker with no rows left still participates, because the others need its experts.
    """
    hidden_RTD, found, inputs, choices = rows.hidden_RTD[place], None, [], []
    if len(hidden_RTD):
        found = attend(layer, hidden_RTD.to(layer.device), rows.beside(place, layer.device))
        if found.input_TD is not None and found.routing is not None:
            inputs, choices = [found.input_TD], [found.routing]
        if layer.tail is not None:
            hidden_RTD.copy_(found.output_RTD)
            rows.carry_(place, found.carried)
    if not layer.is_routed:
        return hidden_RTD, None
    input_TD, counts = worker.all_gather(inputs)
    moe_inputs = MoeInputs(Rows(torch.empty(0), hidden_RTD), counts, input_TD, _gather_routing(worker, choices))
    if layer.tail is not None:
        _add_experts_(worker, layer, hidden_RTD.flatten(0, 1), moe_inputs, batches, lambda count: None)
        return hidden_RTD, choices[0] if choices else None
    experts_TD = torch.zeros(len(hidden_RTD) * hidden_RTD.shape[1], layer.stacks[1].shape[1], dtype=layer.dtype)
    _add_experts_(worker, layer, experts_TD, moe_inputs, batches, lambda count: None)
    if found is not None:
        given = hidden_RTD.to(layer.device), experts_TD.to(layer.device)
        output_RTD, handed = with_output(layer, *given, rows.beside(place, layer.device))
        hidden_RTD.copy_(output_RTD)
        rows.carry_(place, handed)
    return hidden_RTD, choices[0] if choices else None
