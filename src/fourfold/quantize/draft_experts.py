"""Experts of the draft head (MTP) in int4 or int8: int4 solved on what the draft head itself gives them.

Inputs come from the release: its stream behind the last layer, the draft head's dense weights as they are stored, draft
steps 1 and 2. Step 2 matters: on inputs of step 1 alone later drafts are accepted less often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from fourfold.datatypes import Batches, LayerResult, Placement, Rows, Tick
from fourfold.distributed.workers import Worker
from fourfold.formats import named
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.head import Head
from fourfold.model.layer import Routing, sort_pairs
from fourfold.model.mtp import DraftHead, read_draft_head
from fourfold.quantize.dense import round_weight, round_weights
from fourfold.quantize.estimate import DRAFT_TOKENS
from fourfold.quantize.observe import Observed
from fourfold.quantize.plan import Plan
from fourfold.quantize.solve import Chunking, join_results, solve_layer
from fourfold.recipe import Guidance

STEP_2 = 4  # every so many positions go through step 2


def quantize_draft_experts(
    plan: Plan, worker: Worker, rows: Rows | None, head: Head, batches: Batches, tick: Tick
) -> LayerResult:
    """Return codes and scales of all draft experts, to worker 0, by their final names; log rows where they are solved.

    rows: this worker's calibration rows of the release behind the last layer, which int4 is solved on; head: of the
    release.
    """

    def as_stored(name: str, value: Tensor) -> Tensor:
        return round_weights({name: value}, plan.dense, plan.recipe).weights.get(name, value)

    source = dataclasses.replace(plan.source, change=as_stored)
    if plan.dense.draft_experts == 8:
        tensors = _rounded(plan, source.draft_experts(worker.device, torch.bfloat16)) if worker.is_leader else {}
        return LayerResult(tensors, None, None, (), {}, 0)
    assert rows is not None, "the loop keeps calibration rows for int4 draft experts"
    draft = worker.run_once(lambda: read_draft_head(source, torch.device("cpu"), torch.bfloat16, head))
    layer = dataclasses.replace(draft.layer, index=plan.source.layers)
    parts = draft_inputs(_on(draft, worker.device), rows, tick) if worker.is_leader else ([], [], [])
    input_TD, counts = worker.all_gather(parts[0])
    routing = Routing(worker.all_gather(parts[1])[0], worker.all_gather(parts[2])[0]).to(worker.device)
    owned = worker.assigned_experts(torch.bincount(routing.index_TA.flatten().cpu(), minlength=layer.experts))
    place = worker.device if batches.inputs == Placement.DEVICE else torch.device("cpu")
    observed = Observed(
        input_TD=input_TD.to(place),
        counts=counts,
        routing=routing,
        pairs=sort_pairs(routing, owned, layer.experts),
        target_TD=None,
        gap_TD=None,
        importance_T=torch.ones(len(input_TD), device=worker.device),
    )
    recipe = dataclasses.replace(plan.recipe, guidance=Guidance())
    chunking = Chunking(batches.experts, batches.inputs, stems(plan), tick)
    result = solve_layer(worker, layer.owning(owned, worker.device), observed, recipe, chunking)
    return join_results(worker.gather_object(dataclasses.replace(result, gate_up_ENK=None, down_ENK=None)) or [result])


def _on(draft: DraftHead, device: torch.device) -> DraftHead:
    """The draft head with all its experts on a device."""
    if device.type == "cpu":
        return draft
    for module in (draft.layer.own.module, draft.rotary, draft.norm_embedding, draft.norm_hidden, draft.norm):
        for value in (*module.parameters(), *module.buffers()):
            if not value.is_meta:  # the experts' own lie in the layer's stacks
                value.data = value.data.to(device)
    layer = draft.layer.owning(draft.layer.owned, device)
    fc_DF, embedding_VD = draft.fc_DF.to(device), draft.embedding_VD.to(device)
    return dataclasses.replace(draft, layer=layer, fc_DF=fc_DF, embedding_VD=embedding_VD)


def stems(plan: Plan) -> tuple[Mapping[str, str], ...]:
    """Prefixes of the draft experts' tensors in the release, by expert and projection."""
    prefix = plan.source.family.mtp_experts_prefix
    return tuple(
        {projection: f"{prefix}{expert}.{projection}." for projection in (GATE, UP, DOWN)}
        for expert in range(plan.source.widest.count)
    )


def draft_inputs(draft: DraftHead, rows: Rows, tick: Tick) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return what draft steps 1 and 2 over the text give the experts, a piece for each step of a row: inputs [T, D],
    expert ids and weights [T, A].
    """
    inputs: list[Tensor] = []
    choices: list[Tensor] = []
    weights: list[Tensor] = []

    def keep(input_TD: Tensor, routing: Routing) -> None:
        inputs.append(input_TD.cpu())
        choices.append(routing.index_TA.cpu())
        weights.append(routing.weight_TA.cpu())

    device = draft.fc_DF.device
    length = rows.token_RT.shape[1]
    text = [row for row in range(len(rows.token_RT)) if row not in rows.calls]  # drafts of images are not run
    for row in text[: max(DRAFT_TOKENS // length, 1)]:
        token_1T = rows.token_RT[row : row + 1].to(device)
        hidden_1TD = draft.head.norm(rows.hidden_RTD[row : row + 1].to(draft.head.weight_VD.device)).to(device)
        drafts = draft.drafts(hidden_1TD, token_1T, keep)
        position_1P = torch.arange(0, length - 2, STEP_2, device=device)[None]
        if position_1P.numel():
            drafts.later(drafts.first(position_1P), token_1T.gather(1, position_1P + 2), position_1P)
        tick(0)  # a heartbeat
    return inputs, choices, weights


def _rounded(plan: Plan, stacks: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Draft experts rounded to int8, by their final names."""
    tensors: dict[str, Tensor] = {}
    format, size = named(plan.recipe.format), plan.recipe.scheme.group
    for expert, names in enumerate(stems(plan)):
        gate_NK, up_NK = stacks[0][expert].chunk(2)
        for projection, weight_NK in zip(names, (gate_NK, up_NK, stacks[1][expert]), strict=True):
            stored = format.pack(round_weight(weight_NK, 8, size, plan.recipe))
            tensors |= {names[projection] + suffix: value[0].cpu() for suffix, value in stored.items()}
    return tensors
