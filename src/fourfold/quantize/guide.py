"""The sweep before the loop: what the rest of the source makes of a layer's outputs, by the gradient of the end loss.

Guidance rows go forward through the source, every layer's input kept in OUT; then, from the last layer to the first,
the gradient rows go back through each layer, recomputed from its kept input; with `guidance.routing` the field of the
routers' margins beside them (margins.py). What stays is a matrix for each layer with routed experts, its curvature:
docs/numerics.md, sections 13 and 15. An interrupted sweep goes on at the layer it reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.core import moments
from fourfold.datatypes import FourfoldError, Tick
from fourfold.distributed.workers import Worker
from fourfold.model.head import build_head, sampled_gradient
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer, pass_rows, push_back
from fourfold.quantize.determinism import repeatable
from fourfold.quantize.journal import Journal, sweep_folder
from fourfold.quantize.margins import (
    Pilot,
    RoutingTerm,
    pass_pilot,
    pilot_places,
    push_back_both,
    random_signs,
)
from fourfold.quantize.output import ReadAhead, Writer
from fourfold.quantize.plan import Plan
from fourfold.quantize.streams import embedded, embeddings, read_head, require_finite_states
from fourfold.quantize.sweep_files import (
    FIELD,
    GRADIENT,
    INPUT,
    ROUNDED,
    Finished,
    curvature_damage,
    curvature_record_path,
    delete_rows,
    guided_layers,
    has_margins,
    own_rows,
    read_margin,
    read_records,
    read_rows,
    replace_rows,
    row_damping,
    rows_path,
    write_forward,
    write_layer,
)
from fourfold.records.release import GuidanceFacts, GuidedLayer

LONGEST = 10.0  # of a row's median: a token's gradient is made no longer

Stage = Callable[[str, int, int, str], AbstractContextManager[Tick]]  # name, layer, how many, of what


@dataclass(frozen=True)
class Left:
    """Layers that are still to be gone through, in this order. A sweep that is done has none.

    from_head: no gradient has left the head yet; problem: why finished curvatures are computed again.
    """

    forward: range
    backward: range
    from_head: bool
    problem: str = ""

    @property
    def layers(self) -> tuple[int, ...]:
        """In the order in which they are read."""
        return *self.forward, *self.backward


@dataclass(frozen=True, kw_only=True)
class Guide:
    """A sweep. token_RT: guidance rows, of all workers; batch_rows: that go through a layer at one time; router: see
    model/router.py, empty where margins have no part.
    """

    plan: Plan
    out: Path
    token_RT: Tensor
    batch_rows: int
    remaining_sweep: Left
    ahead: ReadAhead
    writer: Writer
    router: str = ""

    @property
    def folder(self) -> Path:
        return sweep_folder(self.out)


class Pushed(NamedTuple):
    """Gradients and routing field (or None) at a layer's input; weight_T: what each token weighs in the layer's
    curvature, the sum of its experts' squared router weights, fp32, None of a dense layer.
    """

    gradient_RTD: Tensor
    field_RTD: Tensor | None
    weight_T: Tensor | None


def find_remaining_sweep(plan: Plan, out: Path) -> Left:
    """What an earlier run has left of the sweep, from the files in OUT. Makes their folder.

    A damaged curvature is dropped, and all gradients: the sweep goes back from the head again.
    """
    folder, layers, wanted = sweep_folder(out), len(plan.layers), guided_layers(plan)
    folder.mkdir(exist_ok=True)
    recorded = [layer for layer in wanted if curvature_record_path(folder, layer).is_file()]
    problems = {layer: problem for layer in recorded if (problem := curvature_damage(out, layer))}
    if recorded == list(wanted) and not problems:
        return Left(range(0), range(0), False)
    if problems:
        for path in [*folder.glob(f"{GRADIENT}-*"), *(curvature_record_path(folder, layer) for layer in problems)]:
            path.unlink()  # records last: what is killed in between finds the damage again
    gradients, inputs = (
        [place for place in range(layers + 1) if rows_path(folder, kind, place).is_file()] for kind in (GRADIENT, INPUT)
    )
    margins_known = has_margins(plan, folder, max([*gradients[:1], *inputs[-1:]], default=0))
    if gradients and margins_known:
        return Left(range(0), range(gradients[0] - 1, wanted[0] - 1, -1), False)
    first = max(inputs, default=0) if margins_known else 0
    return Left(range(first, layers), range(layers - 1, wanted[0] - 1, -1), True, "; ".join(problems.values()))


def spread_rows(token_RT: Tensor, tokens: int) -> Tensor:
    """Whole rows of so many tokens in all, evenly from all rows, which lie by source."""
    count = tokens // token_RT.shape[1]
    return token_RT[torch.arange(count) * len(token_RT) // count]


def sweep(worker: Worker, guide: Guide, stage: Stage) -> None:
    """The curvature of every layer that is to be solved, durable in OUT; the work is where `guide.left` says.

    Rows are split over workers, each with all experts of the layer in work. Raises FourfoldError naming the layer
    whose outputs or gradients are NaN or Inf.
    """
    _forward(worker, guide, stage)
    _backward(worker, guide, stage)
    if worker.is_leader:
        guide.writer.join()
        delete_rows(guide.folder)  # what the last layer to be gone through needed
    worker.all_gather_object(None)


def _forward(worker: Worker, guide: Guide, stage: Stage) -> None:
    hidden_RTD, pilot = None, None
    if guide.remaining_sweep.forward:
        hidden_RTD = _inputs(worker, guide, guide.remaining_sweep.forward.start)
        pilot = _pilot(worker, guide, hidden_RTD) if guide.router else None
    for number in guide.remaining_sweep.forward:
        assert hidden_RTD is not None
        output_RTD, margin = torch.empty_like(hidden_RTD), None
        with stage("forward", number, guide.token_RT.numel(), "tokens") as tick:
            layer = _take(worker, guide, number)[0]
            for batch in _batches(guide, hidden_RTD):
                passed_RTD, *_ = pass_rows(layer, hidden_RTD[batch].to(layer.device))
                output_RTD[batch] = passed_RTD.to(output_RTD.device)
                tick(passed_RTD.shape[0] * passed_RTD.shape[1])
            require_finite_states(worker, layer, output_RTD)
            if pilot is not None:
                pilot, margin = pass_pilot(worker, layer, guide.router, guide.plan.recipe, pilot, hidden_RTD)
        hidden_RTD = output_RTD
        all_RTD, _ = worker.all_gather([hidden_RTD])
        rounded_RTD = None if pilot is None else worker.all_gather([pilot.rounded_RTD])[0]
        if worker.is_leader:
            guide.writer.submit(partial(write_forward, guide.folder, number + 1, all_RTD, rounded_RTD, margin))
        del layer, all_RTD, rounded_RTD  # or they lie beside the next ones
    if worker.is_leader:
        guide.writer.join()
    worker.all_gather_object(None)


def _pilot(worker: Worker, guide: Guide, hidden_RTD: Tensor) -> Pilot:
    """A worker's rows of the pilot before the first layer of a sweep forward: the source's, or kept."""
    first, rows = guide.remaining_sweep.forward.start, len(guide.token_RT)
    place_R = pilot_places(worker, rows, guide.token_RT.shape[1])
    if not first:
        return Pilot(place_R, hidden_RTD[place_R])
    counts = worker.all_gather_object(len(place_R))
    before = sum(counts[: worker.rank])
    return Pilot(place_R, read_rows(guide.folder, ROUNDED, first, slice(before, before + len(place_R))))


def _backward(worker: Worker, guide: Guide, stage: Stage) -> None:
    if not guide.remaining_sweep.backward:
        return
    behind = guide.remaining_sweep.backward.start + 1
    if guide.remaining_sweep.from_head:
        gradient_RTD = _from_head(worker, guide, stage)
    else:
        gradient_RTD = own_rows(worker, guide.folder, GRADIENT, behind)
    field_RTD = None
    if guide.router:  # behind the last layer no margin is left
        last = behind == len(guide.plan.layers)
        field_RTD = torch.zeros_like(gradient_RTD) if last else own_rows(worker, guide.folder, FIELD, behind)
    for number in guide.remaining_sweep.backward:
        with stage("backward", number, guide.token_RT.numel(), "tokens") as tick, repeatable(worker):
            layer, tensors = _take(worker, guide, number)
            hidden_RTD = _inputs(worker, guide, number)
            term = _routing_term(worker, guide, layer, gradient_RTD)
            pushed = _through_layer(layer, guide, (hidden_RTD, gradient_RTD, field_RTD), term, tick)
        curvature_DD = None
        if pushed.weight_T is not None and number in guided_layers(guide.plan):
            curvature_DD = _curvature(worker, layer, gradient_RTD, pushed.weight_T, field_RTD)
        gradient_RTD, field_RTD = pushed.gradient_RTD, pushed.field_RTD
        all_RTD, _ = worker.all_gather([gradient_RTD])
        all_field_RTD = None if field_RTD is None else worker.all_gather([field_RTD])[0]
        if worker.is_leader:
            found = Finished(number, tensors.digest, curvature_DD, all_RTD, all_field_RTD)
            guide.writer.submit(partial(write_layer, guide.plan, guide.folder, found))
            del found
        del layer, tensors, hidden_RTD, pushed, all_RTD, all_field_RTD  # or they lie beside the next ones


def _through_layer(
    layer: DecoderLayer, guide: Guide, rows: tuple[Tensor, Tensor, Tensor | None], term: RoutingTerm | None, tick: Tick
) -> Pushed:
    """A worker's rows through a layer, backward. rows: the layer's input, gradients and routing field at its output."""
    hidden_RTD, gradient_RTD, field_RTD = rows
    pushed_RTD, new_RTD = torch.empty_like(gradient_RTD), None if field_RTD is None else torch.empty_like(field_RTD)
    weights = [torch.zeros(0, device=layer.device)]
    for batch in _batches(guide, hidden_RTD):
        input_RTD, output_RTD = hidden_RTD[batch].to(layer.device), gradient_RTD[batch].to(layer.device)
        if field_RTD is None or new_RTD is None:
            batch_RTD, routing = push_back(layer, input_RTD, output_RTD)
        else:
            both = input_RTD, output_RTD, field_RTD[batch].to(layer.device)
            batch_RTD, own_RTD, routing = push_back_both(layer, term, both, batch)
            new_RTD[batch] = own_RTD.to(new_RTD.device)
        pushed_RTD[batch] = clip(batch_RTD).to(pushed_RTD.device)
        if routing is not None:
            weights.append(routing.weight_TA.float().square().sum(dim=1))
        tick(batch_RTD.shape[0] * batch_RTD.shape[1])
    return Pushed(pushed_RTD, new_RTD, torch.cat(weights) if layer.is_routed else None)


def _routing_term(worker: Worker, guide: Guide, layer: DecoderLayer, gradient_RTD: Tensor) -> RoutingTerm | None:
    """What a layer's margins add to the field; None of a dense layer, or without a field. gradient_RTD: at the layer's
    output.
    """
    if not guide.router or not layer.is_routed:
        return None
    margin = worker.run_once(lambda: read_margin(guide.folder, layer.index))
    assert margin is not None, f"layer {layer.index}: its margins were not measured"
    rows, length = guide.token_RT.shape
    one_T = torch.ones(gradient_RTD.shape[0] * length, device=layer.device)
    sign_RT = random_signs(guide.plan.recipe.calibration.seed, layer.index, rows, length)
    curvature_DD = _curvature(worker, layer, gradient_RTD, one_T)
    return RoutingTerm(guide.router, margin, curvature_DD, sign_RT[worker.own_samples(rows)])


def clip(gradient_RTD: Tensor) -> Tensor:
    """Gradients [..., T, D] clipped: one longer than LONGEST times the median of its row's tokens is shortened to that.

    A token whose hidden state is next to nothing, as one that was never trained, is blown up by every norm: a thousand
    times with an epsilon of 1e-6, in every layer again. That is so for errors smaller than the state only, and such a
    token would be all that a curvature knows.
    """
    length_RT1 = gradient_RTD.float().norm(dim=-1, keepdim=True)
    most_R11 = LONGEST * length_RT1.median(dim=-2, keepdim=True).values
    factor_RT1 = torch.where(length_RT1 > most_R11, most_R11 / length_RT1, 1.0)
    return (gradient_RTD.float() * factor_RT1).to(gradient_RTD.dtype)


def _curvature(
    worker: Worker, layer: DecoderLayer, gradient_RTD: Tensor, weight_T: Tensor, field_RTD: Tensor | None = None
) -> Tensor:
    """Weighted mean of delta delta^T over all workers' tokens, and of the routing field's p p^T: fp32 [D, D].

    delta, the gradient at what a MoE block puts out, is the gradient at the layer's output: what comes before the block
    is added to it.
    """
    total_DD = moments.pool(gradient_RTD.flatten(0, 1).to(layer.device), weight_T)
    if field_RTD is not None:
        total_DD += moments.pool(field_RTD.flatten(0, 1).to(layer.device), weight_T)
    curvature_DD = worker.all_reduce(total_DD) / worker.all_reduce(weight_T.sum())
    if not curvature_DD.diagonal().sum().isfinite():
        raise FourfoldError(
            f"layer {layer.index}: gradients of the loss at its output are NaN or Inf, so that it cannot be "
            "guided; take a recipe with guidance.tokens = 0"
        )
    return curvature_DD


def _from_head(worker: Worker, guide: Guide, stage: Stage) -> Tensor:
    """A worker's gradient rows behind the last layer. One random number for each position decides its label."""
    plan, place = guide.plan, len(guide.plan.layers)
    hidden_RTD = _inputs(worker, guide, place)
    gradient_RTD = torch.empty_like(hidden_RTD)
    generator = torch.Generator().manual_seed(plan.recipe.calibration.seed)
    uniform_RT = torch.rand(guide.token_RT.shape, dtype=torch.float64, generator=generator)
    uniform_RT = uniform_RT[worker.own_samples(len(uniform_RT))]
    with stage("backward", -1, guide.token_RT.numel(), "tokens") as tick:
        ends, head_VD = worker.run_once(lambda: read_head(plan.source))
        head = build_head(plan.source.blueprint, ends, head_VD, worker.device)
        for row, uniform_T in enumerate(uniform_RT):
            row_TD = sampled_gradient(head, hidden_RTD[row].to(worker.device), uniform_T.to(worker.device))
            gradient_RTD[row] = clip(row_TD).to(gradient_RTD.device)
            tick(len(row_TD))
    all_RTD, _ = worker.all_gather([gradient_RTD])
    if worker.is_leader:
        guide.writer.submit(partial(replace_rows, guide.folder, place, all_RTD))
    return gradient_RTD


def _take(worker: Worker, guide: Guide, number: int) -> tuple[DecoderLayer, LayerTensors]:
    """The next layer with all its experts, on the worker's device."""
    taken = guide.ahead.take(worker, number)
    layer = build_layer(guide.plan.source, number, taken.at(worker), worker.device)
    if layer.tail is None or not layer.skeleton.is_plain(worker.device):
        raise FourfoldError(
            f"{layer.skeleton.blueprint.path}: guidance is not available for {layer.skeleton.family.model_type}: what "
            "its experts put out is not added to the residual stream as it is; take a recipe without, as best"
        )
    return layer.owning(layer.owned) if layer.is_routed else layer, taken.tensors


def _batches(guide: Guide, hidden_RTD: Tensor) -> Iterator[slice]:
    for first in range(0, len(hidden_RTD), guide.batch_rows):
        yield slice(first, first + guide.batch_rows)


def _inputs(worker: Worker, guide: Guide, place: int) -> Tensor:
    """A worker's rows before layer `place`: embedded, or kept."""
    if place:
        return own_rows(worker, guide.folder, INPUT, place)
    token_RT = guide.token_RT[worker.own_samples(len(guide.token_RT))]
    around = worker.run_once(lambda: embeddings(guide.plan.source))
    return embedded(around, token_RT, torch.empty)


# ---- what is said of it


def facts(plan: Plan, journal: Journal) -> GuidanceFacts | None:
    """What guidance promised and what it came to, by layer; None of a recipe without."""
    if not guided_layers(plan):
        return None
    measured = {record.layer: record.guided for record in journal.records}
    return GuidanceFacts(
        tokens=plan.work.guidance_tokens,
        sites=plan.recipe.guidance.sites,
        damping=row_damping(plan),
        layers=[
            GuidedLayer(layer=one.layer, predicted=one.predicted_share, measured=measured.get(one.layer, {}))
            for one in read_records(plan, journal.out)
        ],
    )
