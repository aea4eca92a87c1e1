"""Router margins in the guidance sweep: measured on the way forward, and on the way back the field of their gradients.

The field is what guidance adds for tokens whose experts a quantized model may choose otherwise: docs/numerics.md, 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fourfold.core import margins, widening
from fourfold.core.margins import Margins
from fourfold.distributed.workers import Worker
from fourfold.model.layer import Attended, DecoderLayer, Routing, attend, plus_experts, run_experts
from fourfold.model.router import logits
from fourfold.quantize.site import round_experts_
from fourfold.recipe import Recipe
from fourfold.records.release import MarginRecord

PILOT_TOKENS = 8_192  # whose margins are measured, in whole rows
SIGNS = 1 << 31  # other numbers than the labels'; torch takes 32 bits of a seed


@dataclass(frozen=True)
class Pilot:
    """A worker's rows in the source with rounded experts (RTN), routed as in the source.

    place_R: which of the worker's guidance rows; rounded_RTD: they before a layer.
    """

    place_R: Tensor
    rounded_RTD: Tensor


def pilot_places(worker: Worker, rows: int, length: int) -> Tensor:
    """Which of a worker's guidance rows are in the pilot, which is spread evenly over all workers' `rows`."""
    count, own = min(max(PILOT_TOKENS // length, 1), rows), worker.own_samples(rows)
    places = [place * rows // count for place in range(count)]
    return torch.tensor([place - own.start for place in places if own.start <= place < own.stop], dtype=torch.int64)


def pass_pilot(
    worker: Worker, layer: DecoderLayer, router: str, recipe: Recipe, pilot: Pilot, hidden_RTD: Tensor
) -> tuple[Pilot, MarginRecord | None]:
    """The pilot behind a layer, and its router's margins over all workers' rows; None of a dense layer.

    hidden_RTD: the worker's guidance rows before the layer, in the source. The layer's experts are rounded in place:
    no worker may need it any more.
    """
    if layer.is_routed:
        rounded = partial(round_experts_, layer, recipe, 1)
        worker.run_once(rounded) if worker.device.type == "cpu" else rounded()  # on a CPU all workers have one copy
    output_RTD, found = torch.empty_like(pilot.rounded_RTD), []
    for row, place in enumerate(pilot.place_R.tolist()):
        attended = attend(layer, pilot.rounded_RTD[row, None].to(layer.device))
        passed_RTD = attended.output_RTD
        if layer.is_routed:
            source = attend(layer, hidden_RTD[place, None].to(layer.device))
            assert source.routing is not None and attended.input_TD is not None
            found.append(_measure(layer, router, source, attended.input_TD))
            experts_TD = run_experts(layer, attended.input_TD, source.routing)
            passed_RTD = plus_experts(layer, attended, experts_TD)
        output_RTD[row] = passed_RTD[0].to(output_RTD.device)
    pilot = Pilot(pilot.place_R, output_RTD)
    if not layer.is_routed:
        return pilot, None
    all_T2, _ = worker.all_gather([torch.cat(found) if found else torch.zeros(0, 2)])
    near, error = margins.near_and_error(all_T2[:, 0], all_T2[:, 1])
    return pilot, MarginRecord(layer=layer.index, near=near, error=error)


def _measure(layer: DecoderLayer, router: str, source: Attended, input_TD: Tensor) -> Tensor:
    """Margin of each token in the source, and its error where the experts are given input_TD: [T, 2] on the host."""
    assert source.input_TD is not None and source.routing is not None
    own = margins.of_logits(logits(layer, router, source.input_TD), source.routing.index_TA)
    logits_TE = logits(layer, router, input_TD)
    last_T1, next_T1 = (logits_TE.gather(1, index_T[:, None]) for index_T in (own.last_T, own.next_T))
    return torch.stack([own.margin_T, (last_T1 - next_T1)[:, 0] - own.margin_T], dim=1).cpu()


# ---- backward


@dataclass(frozen=True)
class RoutingTerm:
    """What a layer's margins add to the field. margin: measured; curvature_DD: mean of the loss's gradients' products
    at the layer's output, fp32; sign_RT: +1 or -1 of each of a worker's tokens.
    """

    router: str
    margin: MarginRecord
    curvature_DD: Tensor
    sign_RT: Tensor


def random_signs(seed: int, layer: int, rows: int, length: int) -> Tensor:
    """+1 or -1 for each token of all workers' rows, fp32: others for each layer, the same in every run."""
    generator = torch.Generator().manual_seed(seed ^ SIGNS)
    return torch.randint(0, 2, (layer + 1, rows, length), generator=generator)[layer].float() * 2 - 1


def push_back_both(
    layer: DecoderLayer, term: RoutingTerm | None, rows: tuple[Tensor, Tensor, Tensor], place: slice
) -> tuple[Tensor, Tensor, Routing | None]:
    """Gradients and field at a layer's input, from those at its output: layer.push_back for both, with the layer's own
    part of the field. The field is clipped, the gradients are not.

    term: None of a dense layer; rows: of a batch, the layer's input, gradients and field; place: of the batch among
    the worker's rows.
    """
    gradient_RTD, field_RTD = rows[1:]
    with torch.enable_grad():
        hidden_RTD = rows[0].detach().requires_grad_()
        attended, found = attend(layer, hidden_RTD), None
        output_RTD, input_TD, routing = attended.output_RTD, attended.input_TD, attended.routing
        if term is not None and input_TD is not None and routing is not None:
            output_RTD = plus_experts(layer, attended, run_experts(layer, input_TD, routing))
            found = margins.of_logits(logits(layer, term.router, input_TD), routing.index_TA)
    with widening.products(hidden_RTD.device):
        (pushed_RTD,) = torch.autograd.grad(output_RTD, hidden_RTD, gradient_RTD, retain_graph=True)
        (behind_RTD,) = torch.autograd.grad(output_RTD, hidden_RTD, field_RTD, retain_graph=found is not None)
        new_RTD = margins.clip(behind_RTD)
        if term is not None and found is not None and input_TD is not None and routing is not None:
            root_T = _root_stiffness(layer, term, found, input_TD.detach(), routing)
            signed_T = root_T * term.sign_RT[place].flatten().to(root_T.device)
            (own_RTD,) = torch.autograd.grad(found.margin_T, hidden_RTD, signed_T)
            new_RTD = margins.clip(new_RTD + margins.clip(own_RTD))
    detached = None if routing is None else Routing(routing.index_TA, routing.weight_TA.detach())
    return pushed_RTD, new_RTD.to(field_RTD.dtype), detached


@torch.no_grad()
def _root_stiffness(
    layer: DecoderLayer, term: RoutingTerm, found: Margins, input_TD: Tensor, routing: Routing
) -> Tensor:
    """sqrt(mu) of each token, fp32 [T]: 0 of those that are not near a tie. Only for the others two experts run."""
    near, error = term.margin.near, term.margin.error
    root_T = torch.zeros_like(found.margin_T)
    near_S = (found.margin_T < near).nonzero().flatten()
    if len(near_S):
        weight_S = routing.weight_TA[near_S, found.place_T[near_S]]
        swap = Routing(
            torch.stack([found.last_T[near_S], found.next_T[near_S]], dim=1), torch.stack([-weight_S, weight_S], dim=1)
        )
        difference_SD = run_experts(layer, input_TD[near_S], swap) * (layer.tail or 1.0)
        cost_S = margins.swap_cost(difference_SD, term.curvature_DD)
        root_T[near_S] = margins.stiffness(cost_S, near, error).clamp(min=0).sqrt()
    return root_T
