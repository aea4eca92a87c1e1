"""The draft layer past a model's last ("nextn") as a drafter of one token: a decoder layer like the model's own.

Semantics: DeepSeek-V3's report, section 2.2, as vLLM runs it (models/deepseek_mtp.py): the normed embedding of the next
token and the normed hidden state behind the model's last norm are joined by `eh_proj`; what the layer makes of them
goes through a norm of its own and an output head. The embedding at position 0 is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.core import widening
from fourfold.datatypes import Beside
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.head import Head, build_head, output_name, read_ends
from fourfold.model.layer import DecoderLayer, pass_rows
from fourfold.model.mtp import at_positions, read_norm
from fourfold.model.skeleton import Skeleton

JOINED, EMBEDDING, HIDDEN = "eh_proj.weight", "enorm.weight", "hnorm.weight"
NORMS = ("shared_head.norm.weight", "final_layernorm.weight")
OWN_EMBEDDING, OWN_HEAD = "embed_tokens.weight", "shared_head.head.weight"


@dataclass(frozen=True)
class NextnHead:
    """joined_DF [D, 2D]: the embedding first; embedding_VD [V, D]; head: its output head, behind its own norm; steps:
    drafts for each step of the model.
    """

    layer: DecoderLayer
    joined_DF: Tensor
    norm_embedding: nn.Module
    norm_hidden: nn.Module
    norm: nn.Module
    embedding_VD: Tensor
    head: Head
    steps: int = 1

    def drafts(self, hidden_RTD: Tensor, token_RT: Tensor) -> NextnDrafts:
        return NextnDrafts(self, hidden_RTD, token_RT)


def nextn_names(skeleton: Skeleton) -> Mapping[str, str]:
    """Names on disk of the one draft layer past the last, by their name within it; none where there is none that runs
    so: another number of layers, other modules around it, a stream wider than the embedding, a norm of another name.
    """
    blueprint = skeleton.blueprint
    number = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
    found = [match for match in map(number.fullmatch, blueprint.drafts) if match]
    names = {match[2]: match[0] for match in found if int(match[1]) == skeleton.layers}
    whole = len(names) == len(blueprint.drafts) and {JOINED, EMBEDDING, HIDDEN} <= names.keys()
    plain = isinstance(getattr(blueprint.decoder, "norm", None), nn.Module) and skeleton.is_routed(skeleton.layers - 1)
    if not (whole and plain and any(name in names for name in NORMS)):
        return {}
    width = int(blueprint.model.get_input_embeddings().weight.shape[1])
    return names if skeleton.state_width == width else {}


def read_nextn_head(
    checkpoint: Checkpoint, names: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> NextnHead:
    """names: of `nextn_names`. The layer is read as the model's last, whose names it has under another number.

    Raises FourfoldError for a tensor of it that is missing.
    """
    blueprint = checkpoint.blueprint

    def read(name: str) -> Tensor:
        return checkpoint.value(names[name], device).to(dtype)

    def norm(name: str) -> nn.Module:
        return read_norm(checkpoint, names[name], device, dtype)

    last = checkpoint.layers - 1
    layer = checkpoint.layer(last, device, dtype, taken_from=last + 1)
    head_name = names.get(OWN_HEAD) or blueprint.sources[output_name(blueprint)].all_names[0]
    ends = read_ends(blueprint, lambda name: checkpoint.value(name, device))
    return NextnHead(
        layer=layer.owning(layer.owned),
        joined_DF=read(JOINED),
        norm_embedding=norm(EMBEDDING),
        norm_hidden=norm(HIDDEN),
        norm=norm(next(name for name in NORMS if name in names)),
        embedding_VD=read(OWN_EMBEDDING) if OWN_EMBEDDING in names else checkpoint.embedding(device, dtype),
        head=build_head(blueprint, ends, checkpoint.value(head_name, device), device, dtype),
    )


class NextnDrafts:
    """The one step of drafts for a batch of rows, at all positions of the text."""

    def __init__(self, head: NextnHead, hidden_RTD: Tensor, token_RT: Tensor) -> None:
        """hidden_RTD: after the model's last norm; token_RT: the text. What comes after a position is nothing to it."""
        next_RT = token_RT[:, 1:]
        embedded_RTD = head.embedding_VD[next_RT].clone()
        embedded_RTD[:, 0] = 0
        parts = head.norm_embedding(embedded_RTD), head.norm_hidden(hidden_RTD[:, :-1])
        with widening.products(token_RT.device):
            joined_RTD = nn.functional.linear(torch.cat(parts, dim=-1), head.joined_DF)
        output_RTD, *_ = pass_rows(head.layer, joined_RTD, Beside(next_RT, ()))
        self._first_RTD: Tensor = head.norm(output_RTD)

    def first(self, position_RP: Tensor) -> Tensor:
        """The output [R, P, D] at positions t: predicts token t + 2."""
        return at_positions(self._first_RTD, position_RP)
