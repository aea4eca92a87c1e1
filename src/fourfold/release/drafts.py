"""Draft acceptance without an engine: the MTP head proposes, on text that the model itself writes, greedily.

The text is written by speculative decoding in sweeps over the layers, many rows at a time: each sweep checks the drafts
of all rows and adds to each what was kept and one token more, so that no layer is read once a token. On such text the
model's own choice is the text, and each position is a draft that an engine could have made. docs/evaluation.md.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from msgspec import convert
from torch import Tensor

from fourfold.core import metrics
from fourfold.datatypes import Tick
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.head import Head, logits
from fourfold.model.mtp import DraftHead, Drafts, at_positions, read_draft_head
from fourfold.model.nextn import NextnHead, nextn_names, read_nextn_head
from fourfold.quantize.progress import ProgressReporter
from fourfold.records.results import Drafted
from fourfold.release.sweep import Compute, embed, sweep_

PROMPTS, PROMPT_TOKENS, WRITTEN_TOKENS = 128, 49, 12  # with three drafts 64 tokens: a chunk of linear attention's
HEAD_ROWS = 256  # positions whose logits over the whole vocabulary exist at one time


@dataclass(frozen=True)
class Speaker:
    """A checkpoint that writes and drafts."""

    checkpoint: Checkpoint
    head: Head
    draft: DraftHead | NextnHead
    compute: Compute


@dataclass(frozen=True)
class Written:
    """token_RT: prompts and what the model wrote after them; hidden_RTD: after the last norm (of the last token,
    whatever was there); sweeps: over all layers that it took.
    """

    token_RT: Tensor
    hidden_RTD: Tensor
    prompt_tokens: int
    sweeps: int


def protocol(checkpoint: Checkpoint, token_RT: Tensor) -> dict[str, Any]:
    """How acceptance of a checkpoint's drafts was measured on prompts from this text, for metrics.json."""
    rows, length = cut_prompts(token_RT).shape
    return {
        "text": "written by each model itself, greedily, after prompts from the held-out text; EOS not suppressed",
        "prompts": rows,
        "prompt_tokens": length,
        "written_tokens": WRITTEN_TOKENS,
        "steps": NextnHead.steps if nextn_names(checkpoint) else DraftHead.steps,
        "sampled": "sum min(p, d) at temperature 1 on the same text",
    }


def cut_prompts(token_RT: Tensor) -> Tensor:
    """Up to PROMPTS stretches of PROMPT_TOKENS, evenly spaced over the text, none over the border of two windows."""
    length = min(PROMPT_TOKENS, token_RT.shape[1])
    stretch_RT = token_RT[:, : token_RT.shape[1] // length * length].reshape(-1, length)
    count = min(PROMPTS, len(stretch_RT))
    return stretch_RT[torch.arange(count) * len(stretch_RT) // count]


def measure_drafts(
    checkpoint: Checkpoint, source: Checkpoint, prompt_RT: Tensor, compute: Compute, watch: ProgressReporter
) -> Drafted | None:
    """Acceptance of a checkpoint's drafts (core/metrics.acceptance), None if it has no draft head.

    source: whose draft head is put in the place of one that is quantized, for a paired comparison.

    `consistent` is the share of written tokens that the model chooses again when it reads the finished text: below 1
    where two tokens were as good as equal and another batch of rows rounded otherwise.
    """
    names = nextn_names(checkpoint)
    if not checkpoint.has_draft_head and not names:
        return None
    with watch.stage("draft") as tick:
        head, where = checkpoint.head(compute.device, compute.dtype), (compute.device, compute.dtype)
        draft = read_nextn_head(checkpoint, names, *where) if names else read_draft_head(checkpoint, *where, head)
        speaker = Speaker(checkpoint, head, draft, compute)
        written = write(speaker, prompt_RT, tick)
        hit_RPS, overlap_RPS, chosen_RPS = judge(speaker, written)
        more: dict[str, Any] = {"consistent": chosen_RPS.double().mean().item(), "sweeps": written.sweeps}
        if any(name.startswith(checkpoint.family.mtp_prefix or "?") for name in checkpoint.stored):
            other = replace(speaker, draft=read_draft_head(source, *where, head))
            more["source_head"] = metrics.length_difference(hit_RPS, judge(other, written)[0])
    return convert(metrics.acceptance(hit_RPS, overlap_RPS) | more, Drafted)


def write(speaker: Speaker, prompt_RT: Tensor, tick: Tick) -> Written:
    """Continue each prompt greedily by at least WRITTEN_TOKENS. EOS is a token like others."""
    rows, prompt = prompt_RT.shape
    wanted = prompt + WRITTEN_TOKENS
    token_RT = torch.zeros(rows, wanted + speaker.draft.steps, dtype=torch.int64)
    token_RT[:, :prompt] = prompt_RT
    known_R = torch.full((rows,), prompt)
    hidden_RTD = torch.zeros(*token_RT.shape, speaker.head.weight_VD.shape[1], dtype=speaker.compute.dtype)
    busy_R, sweeps = torch.arange(rows), 0
    while len(busy_R):
        found_RTD = _read(speaker, token_RT[busy_R], tick)
        kept_RT, count_R = _check(speaker, found_RTD, token_RT[busy_R], known_R[busy_R])
        hidden_RTD[busy_R], token_RT[busy_R], known_R[busy_R] = found_RTD, kept_RT, count_R
        sweeps += 1
        busy_R = busy_R[known_R[busy_R] < wanted]
        if len(busy_R):
            token_RT[busy_R] = _propose(speaker, hidden_RTD[busy_R], token_RT[busy_R], known_R[busy_R])
    return Written(token_RT[:, :wanted], hidden_RTD[:, :wanted], prompt, sweeps)


def _read(speaker: Speaker, token_RT: Tensor, tick: Tick) -> Tensor:
    """States after the last norm, on the host. What comes after a position does not matter to it."""
    rows = embed(speaker.checkpoint, token_RT, speaker.compute)
    sweep_((speaker.checkpoint,), (rows,), speaker.compute, lambda layer: nullcontext(tick))
    for part_TD in rows.hidden_RTD:
        part_TD.copy_(speaker.head.norm(part_TD.to(speaker.compute.device)))
    return rows.hidden_RTD


def _check(speaker: Speaker, hidden_RTD: Tensor, token_RT: Tensor, known_R: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own tokens after the known ones, as far as drafts agree and one further; how many are known now."""
    steps = speaker.draft.steps
    place_RS = known_R[:, None] + torch.arange(steps + 1)
    choice_RS = _choices(speaker.head, at_positions(hidden_RTD, place_RS - 1))
    kept_RS = (token_RT.gather(1, place_RS) == choice_RS)[:, :steps].long().cumprod(dim=1)
    return token_RT.scatter(1, place_RS, choice_RS), known_R + kept_RS.sum(dim=1) + 1


def _propose(speaker: Speaker, hidden_RTD: Tensor, token_RT: Tensor, known_R: Tensor) -> Tensor:
    """The text with drafts in the places after the known tokens."""
    device = speaker.compute.device
    position_R1 = (known_R - 2)[:, None].to(device)
    drafts = speaker.draft.drafts(hidden_RTD.to(device), token_RT.to(device))
    output_R1D = drafts.first(position_R1)
    for step in range(speaker.draft.steps):
        draft_R1 = _choices(speaker.draft.head, output_R1D)
        token_RT = token_RT.scatter(1, known_R[:, None] + step, draft_R1)
        if isinstance(drafts, Drafts) and step + 1 < speaker.draft.steps:
            output_R1D = drafts.later(output_R1D, draft_R1.to(device), position_R1)
    return token_RT


def judge(speaker: Speaker, written: Written) -> tuple[Tensor, Tensor, Tensor]:
    """Of all drafts at each position whose drafts all fall on written tokens, [R, P, S]: whether the draft is the
    text; sum min(p, d) of model and draft head; whether the text is what the model chooses, now that it is read whole.
    """
    device, wanted, steps = speaker.compute.device, written.token_RT.shape[1], speaker.draft.steps
    places = torch.arange(written.prompt_tokens - 1, wanted - 1 - steps)
    position_RP = places.expand(len(written.token_RT), -1)
    drafts = speaker.draft.drafts(written.hidden_RTD.to(device), written.token_RT.to(device))
    output_RPD = drafts.first(position_RP.to(device))
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(1, steps + 1):
        if isinstance(drafts, Drafts) and step > 1:
            token_RP = written.token_RT.gather(1, position_RP + step)
            output_RPD = drafts.later(output_RPD, token_RP.to(device), position_RP.to(device))
        text_RP = written.token_RT.gather(1, position_RP + step + 1)
        target_RPD = at_positions(written.hidden_RTD, position_RP + step)
        columns.append(_judge_step(speaker, target_RPD, output_RPD, text_RP))
    hit, kept, chosen = (torch.stack(parts, dim=2) for parts in zip(*columns, strict=True))
    return hit, kept, chosen


def _judge_step(
    speaker: Speaker, target_RPD: Tensor, draft_RPD: Tensor, text_RP: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    device, text_N = speaker.compute.device, text_RP.flatten()
    hits, overlaps, chosen = [], [], []
    parts = (states.flatten(0, 1).split(HEAD_ROWS) for states in (target_RPD, draft_RPD))
    for target_ND, draft_ND, part_N in zip(*parts, text_N.split(HEAD_ROWS), strict=True):
        target_NV, draft_NV = logits(speaker.head, target_ND.to(device)), logits(speaker.draft.head, draft_ND)
        hits.append(draft_NV.argmax(dim=1).cpu() == part_N)
        chosen.append(target_NV.argmax(dim=1).cpu() == part_N)
        overlaps.append(metrics.overlap(target_NV, draft_NV).cpu())
    hit_N, overlap_N, chosen_N = torch.cat(hits), torch.cat(overlaps), torch.cat(chosen)
    return hit_N.view_as(text_RP), overlap_N.view_as(text_RP), chosen_N.view_as(text_RP)


def _choices(head: Head, hidden_RPD: Tensor) -> Tensor:
    """The most likely tokens [R, P], on the host."""
    parts = hidden_RPD.flatten(0, 1).split(HEAD_ROWS)
    token_N = torch.cat([logits(head, part_ND.to(head.weight_VD.device)).argmax(dim=1).cpu() for part_ND in parts])
    return token_N.view(hidden_RPD.shape[:2])
