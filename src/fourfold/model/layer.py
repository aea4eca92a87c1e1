"""One decoder layer: transformers' own module for everything but the routed experts, which run here as one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fourfold.core import widening
from fourfold.datatypes import ALONE, Beside
from fourfold.model import calls, loader
from fourfold.model.arithmetic import Arithmetic, Stacks
from fourfold.model.calls import Carried
from fourfold.model.grouped import grouped_linear
from fourfold.model.loader import Layer
from fourfold.model.skeleton import Skeleton

PAIRS_PER_BATCH = 65_536  # (token, expert) pairs whose gathered inputs exist at one time


@dataclass(frozen=True)
class Routing:
    """A router's choice for T tokens: index_TA int64 expert ids, weight_TA as the model has them, BF16 or fp32."""

    index_TA: Tensor
    weight_TA: Tensor

    def to(self, device: torch.device) -> Routing:
        return Routing(self.index_TA.to(device), self.weight_TA.to(device))


@dataclass(frozen=True)
class Pairs:
    """The (token, expert) pairs of a routing, sorted by expert; within one expert in token order.

    slot_S: place of the pair in the flattened [T * A] routing; token_S: its token; weight_S: its router weight;
    offsets: E + 1 ints, expert e owns pairs offsets[e]:offsets[e + 1].
    """

    slot_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    offsets: tuple[int, ...]

    def of_experts(self, experts: range) -> Pairs:
        """The pairs of consecutive experts, offsets counted from the first of them."""
        first, last = self.offsets[experts.start], self.offsets[experts.stop]
        return Pairs(
            slot_S=self.slot_S[first:last],
            token_S=self.token_S[first:last],
            weight_S=self.weight_S[first:last],
            offsets=tuple(offset - first for offset in self.offsets[experts.start : experts.stop + 1]),
        )


def sort_pairs(routing: Routing, experts: Sequence[int], total: int) -> Pairs:
    """The pairs of some of a layer's `total` experts, sorted by them: offsets count in the order of `experts`.

    Stable: the order of one expert's tokens never depends on the others.
    """
    device = routing.index_TA.device
    place_E = torch.full((total,), len(experts), device=device)  # those of others come last
    place_E[torch.tensor(experts, dtype=torch.int64, device=device)] = torch.arange(len(experts), device=device)
    place_S, slot_S = torch.sort(place_E[routing.index_TA.flatten()], stable=True)
    counts = torch.bincount(place_S, minlength=len(experts) + 1)[:-1]
    offsets = (0, *counts.cumsum(0).tolist())
    slot_S = slot_S[: offsets[-1]]
    return Pairs(
        slot_S=slot_S,
        token_S=slot_S // routing.index_TA.shape[1],
        weight_S=routing.weight_TA.flatten()[slot_S],
        offsets=offsets,
    )


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer on its device. gate_up_ENK [E, 2I, D] (gate rows, then up; [E, I, D] without gate) and down_ENK
    [E, D, I], or None.

    own: transformers' module, its experts apart; skeleton: whose calls it is run by; tail: what the experts' output is
    multiplied by before it is added to the layer's, None where it comes to it otherwise, so that the layer must be run
    again with it; dtype: of the arithmetic; owned: which of the layer's experts the stacks hold, ascending. A dense
    layer has no stacks: its module does everything.
    """

    index: int
    own: Layer
    skeleton: Skeleton
    tail: float | None
    dtype: torch.dtype
    owned: tuple[int, ...]
    gate_up_ENK: Tensor | None
    down_ENK: Tensor | None

    @property
    def stacks(self) -> tuple[Tensor, Tensor]:
        assert self.gate_up_ENK is not None and self.down_ENK is not None, f"layer {self.index} has no routed experts"
        return self.gate_up_ENK, self.down_ENK

    @property
    def is_routed(self) -> bool:
        return self.gate_up_ENK is not None

    @property
    def experts(self) -> int:
        """How many the layer has, its own or others'."""
        assert self.own.experts is not None, f"layer {self.index} has no routed experts"
        return self.own.experts.count

    @property
    def projections(self) -> tuple[str, ...]:
        """Of an expert: gate and up, or up alone, then down."""
        assert self.own.experts is not None, f"layer {self.index} has no routed experts"
        return self.own.experts.projections

    @property
    def arithmetic(self) -> Arithmetic:
        assert self.own.arithmetic is not None, f"layer {self.index} has no routed experts"
        return self.own.arithmetic

    @property
    def device(self) -> torch.device:
        return next(p.device for p in self.own.module.parameters() if not p.is_meta)

    def with_experts(self, gate_up_ENK: Tensor | None, down_ENK: Tensor | None) -> DecoderLayer:
        """The same layer with other weights of its experts: what the release stream goes through."""
        return dataclasses.replace(self, gate_up_ENK=gate_up_ENK, down_ENK=down_ENK)

    def owning(self, owned: tuple[int, ...], device: torch.device | None = None) -> DecoderLayer:
        """The same layer with these of its experts alone, on `device`, or on its own."""
        gate_up_ENK, down_ENK = (_moved(stack, owned, device or self.device) for stack in self.stacks)
        return dataclasses.replace(self, owned=owned, gate_up_ENK=gate_up_ENK, down_ENK=down_ENK)


def _moved(stack_ENK: Tensor, owned: Sequence[int], device: torch.device) -> Tensor:
    """Some experts of a stack, each copied straight to the device; the whole stack as it is where it lies there."""
    if len(owned) == len(stack_ENK):
        return stack_ENK.to(device, non_blocking=True)
    own_ENK = stack_ENK.new_empty(len(owned), *stack_ENK.shape[1:], device=device)
    for own_NK, expert in zip(own_ENK, owned, strict=True):
        own_NK.copy_(stack_ENK[expert], non_blocking=True)
    return own_ENK


@dataclass(frozen=True)
class LayerTensors:
    """One decoder layer's weights as they lie on disk, on the host.

    kept: by name on disk, everything but routed experts; gate_up_ENK, down_ENK: routed experts stacked as in
    DecoderLayer, or None for a dense layer; digest: one sha256 of all tensors'.
    """

    kept: dict[str, Tensor]
    gate_up_ENK: Tensor | None = None
    down_ENK: Tensor | None = None
    digest: str = ""

    @classmethod
    def of(cls, kept: dict[str, Tensor], stacks: Stacks | None, digest: str = "") -> LayerTensors:
        gate_up_ENK, down_ENK = (None, None) if stacks is None else (stacks.gate_up_ENK, stacks.down_ENK)
        return cls(kept, gate_up_ENK, down_ENK, digest)

    def without_experts(self) -> LayerTensors:
        """What the layer's shard is still made from when its experts are with their owners."""
        return dataclasses.replace(self, gate_up_ENK=None, down_ENK=None)


def build_layer(
    skeleton: Skeleton, index: int, tensors: LayerTensors, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> DecoderLayer:
    """transformers' layer with these weights, each in the dtype that transformers loads it in (in `dtype`, if that is
    not BF16): on a device, but for the routed experts, which stay where they are until it is known whose they are
    (`owning`).
    """
    blueprint = skeleton.blueprint
    loaded = loader.load(blueprint, lambda name, _: tensors.kept[name], blueprint.prefix(index), device, dtype)
    own = loader.build_layer(blueprint, index, loaded, device)
    routed = own.experts is not None and tensors.gate_up_ENK is not None
    return DecoderLayer(
        index=index,
        own=own,
        skeleton=skeleton,
        tail=skeleton.tail(own, index, device, dtype) if routed else 1.0,
        dtype=dtype,
        owned=tuple(range(own.experts.count)) if own.experts is not None and routed else (),
        gate_up_ENK=None if tensors.gate_up_ENK is None else tensors.gate_up_ENK.to(dtype),
        down_ENK=None if tensors.down_ENK is None else tensors.down_ENK.to(dtype),
    )


def with_kept(layer: DecoderLayer, kept: Mapping[str, Tensor]) -> DecoderLayer:
    """The same layer with other weights beside its routed experts, by name on disk, on its device."""
    blueprint = layer.skeleton.blueprint
    prefix, device = blueprint.prefix(layer.index), layer.device
    loaded = loader.load(blueprint, lambda name, _: kept[name], prefix, device, layer.dtype)
    return dataclasses.replace(layer, own=loader.build_layer(blueprint, layer.index, loaded, device))


@dataclass(frozen=True)
class Attended:
    """What a layer makes of a batch of rows without its routed experts.

    output_RTD: in the shape of the input (residual, attention, shared experts); input_TD: of the routed experts
    [R * T, D], None for a layer without; carried: what the layer hands on beside its output, [R, ...] each.
    """

    output_RTD: Tensor
    input_TD: Tensor | None
    routing: Routing | None
    carried: Carried


def attend(layer: DecoderLayer, hidden_RTD: Tensor, beside: Beside = ALONE) -> Attended:
    """Everything of a layer but its routed experts, once.

    hidden_RTD: full rows on the layer's device, no padding; [R, T, ...] where the model's stream is wider.
    """
    output_RTD, handed = _passed(layer, hidden_RTD, beside)
    if not layer.is_routed:
        return Attended(output_RTD, None, None, handed)
    assert layer.own.tap is not None
    input_TD, index_TA, weight_TA = layer.own.tap.take()
    routing = Routing(index_TA.flatten(0, -2), weight_TA.flatten(0, -2))
    return Attended(output_RTD, input_TD.flatten(0, -2), routing, handed)


def _passed(layer: DecoderLayer, hidden_RTD: Tensor, beside: Beside) -> tuple[Tensor, Carried]:
    shape = hidden_RTD.shape[0], hidden_RTD.shape[1]
    call = beside.calls or layer.skeleton.calls(shape, hidden_RTD.device, layer.dtype)
    if beside.token_RT is not None:
        call = dataclasses.replace(call, token_RT=beside.token_RT)
    with widening.products(hidden_RTD.device):
        output_RTD, handed = calls.pass_layer(layer.own, call, layer.index, hidden_RTD, beside.carried)
    return output_RTD, handed if call.carry else ()


def with_output(
    layer: DecoderLayer, hidden_RTD: Tensor, experts_TD: Tensor, beside: Beside = ALONE
) -> tuple[Tensor, Carried]:
    """What a layer without tail makes of its rows [R, T, ...] where its experts put out [R * T, D]; and what it hands
    on.
    """
    assert layer.own.tap is not None
    with layer.own.tap.answering(lambda input_TD, *_: experts_TD.view(*input_TD.shape[:-1], -1)):
        found = _passed(layer, hidden_RTD, beside)
    layer.own.tap.take()
    return found


def add_output_(layer: DecoderLayer, hidden_TD: Tensor, experts_TD: Tensor) -> None:
    """Add the experts' output, in the rows' dtype, to a layer's output without it, in place."""
    hidden_TD += experts_TD if layer.tail in (1.0, None) else experts_TD * layer.tail


def expert_hidden(input_TD: Tensor, pairs: Pairs, gate_up_ENK: Tensor, arithmetic: Arithmetic) -> Tensor:
    """What down is given for each pair, silu(gate) * up of most models: [S, I] in the compute dtype.

    gate_up_ENK: of exactly the experts of `pairs`.
    """
    width = gate_up_ENK.shape[1] // (2 if arithmetic.gated else 1)
    return of_gate_up(input_TD, pairs, gate_up_ENK, width, arithmetic.hidden)


def of_gate_up(
    input_TD: Tensor, pairs: Pairs, gate_up_ENK: Tensor, width: int, make: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `make` gives for gate and up [S, 2I] of each pair, [S, width], for a batch of pairs at a time.

    gate_up_ENK: of exactly the experts of `pairs`.
    """
    count = len(pairs.token_S)
    made_SX = torch.empty(count, width, dtype=input_TD.dtype, device=input_TD.device)
    for first in range(0, count, PAIRS_PER_BATCH):
        last = min(first + PAIRS_PER_BATCH, count)
        offsets = [min(max(offset, first), last) - first for offset in pairs.offsets]
        made_SX[first:last] = make(grouped_linear(input_TD, pairs.token_S[first:last], offsets, gate_up_ENK))
    return made_SX


def run_experts(layer: DecoderLayer, input_TD: Tensor, routing: Routing) -> Tensor:
    """What the layer's own experts put out for a batch of tokens, summed over a token's experts: fp32 [T, D].

    Rounded to the compute dtype it is what transformers gives, where all experts are the layer's own.
    """
    gate_up_ENK, down_ENK = layer.stacks
    pairs = sort_pairs(routing, layer.owned, layer.experts)
    hidden_SI = expert_hidden(input_TD, pairs, gate_up_ENK, layer.arithmetic)
    every_S = torch.arange(len(hidden_SI), device=hidden_SI.device)
    output_SD = grouped_linear(hidden_SI, every_S, pairs.offsets, down_ENK)
    output_SD = layer.arithmetic.weighted(output_SD, pairs.weight_S)
    summed_TD: Tensor = _SumByToken.apply(  # type: ignore[no-untyped-call]
        output_SD, pairs.slot_S, routing.index_TA.shape
    )
    return summed_TD


class _SumByToken(torch.autograd.Function):
    """Outputs [S, D] of pairs, summed by token in the order of its choices: fp32 [T, D], zero where a token has none.

    slot_S: of each pair in the flattened routing, whose shape is (T, A). The gradient is a gather; embedding_bag's own
    is made for pairs that occur more than once, and on a GPU torch knows no repeatable one.
    """

    @staticmethod
    def forward(ctx: Any, output_SD: Tensor, slot_S: Tensor, shape: tuple[int, int]) -> Tensor:
        tokens, choices = shape
        ctx.dtype, ctx.token_S = output_SD.dtype, slot_S // choices
        sorted_S, order_S = torch.sort(slot_S)
        first_T = torch.searchsorted(sorted_S, choices * torch.arange(tokens, device=slot_S.device))
        return embedding_bag(order_S, output_SD.float(), first_T, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        return gradient_TD.to(ctx.dtype)[ctx.token_S], None, None


def pass_rows(
    layer: DecoderLayer, hidden_RTD: Tensor, beside: Beside = ALONE
) -> tuple[Tensor, Routing | None, Carried]:
    """Rows through a layer whose experts are all its own: its output [R, T, D], the routing if it has experts, and what
    it hands on.
    """
    attended = attend(layer, hidden_RTD, beside)
    if attended.input_TD is None or attended.routing is None:
        return attended.output_RTD, None, attended.carried
    experts_TD = run_experts(layer, attended.input_TD, attended.routing)
    if layer.tail is None:
        experts_TD = experts_TD.to(attended.output_RTD.dtype)
        output_RTD, handed = with_output(layer, hidden_RTD, experts_TD, beside)
        return output_RTD, attended.routing, handed
    return plus_experts(layer, attended, experts_TD), attended.routing, attended.carried


def plus_experts(layer: DecoderLayer, attended: Attended, experts_TD: Tensor) -> Tensor:
    """A layer's output [R, T, D] with that of its routed experts, fp32 [T, D]. Of a layer with a tail."""
    assert layer.tail is not None
    experts_TD = experts_TD.to(attended.output_RTD.dtype)
    scaled_TD = experts_TD if layer.tail == 1.0 else experts_TD * layer.tail
    return attended.output_RTD + scaled_TD.view_as(attended.output_RTD)


def push_back(layer: DecoderLayer, hidden_RTD: Tensor, gradient_RTD: Tensor) -> tuple[Tensor, Routing | None]:
    """The gradient of a loss at a layer's input, from that at its output, by autograd: weights are frozen, the choice
    of experts is fixed, its weights are not.

    hidden_RTD: the layer's input, all experts its own. Returns (gradient [R, T, D], the routing if it has experts).
    """
    with torch.enable_grad():
        hidden_RTD = hidden_RTD.detach().requires_grad_()
        output_RTD, routing, _ = pass_rows(layer, hidden_RTD)
        with widening.products(hidden_RTD.device):
            (pushed_RTD,) = torch.autograd.grad(output_RTD, hidden_RTD, gradient_RTD)
    return pushed_RTD, None if routing is None else Routing(routing.index_TA, routing.weight_TA.detach())
