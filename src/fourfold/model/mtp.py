"""The MTP head as a drafter: built from transformers' own decoder layer, which transformers itself leaves out.

Semantics: vLLM, models/qwen3_5_mtp.py, and its proposer. A step takes the hidden state of a position (after the model's
last norm, or what the step before put out) and the token that follows it, and its output, through the model's own
output head, predicts the token after that.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from fourfold.core import widening
from fourfold.model import internals
from fourfold.model.arithmetic import Arithmetic
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.experts import find_experts
from fourfold.model.head import Head
from fourfold.model.layer import DecoderLayer, Routing, run_experts
from fourfold.model.loader import Layer, Tap

Keep = Callable[[Tensor, Routing], None]


@dataclass(frozen=True)
class DraftHead:
    """fc_DF [D, 2D] joins the normed embedding (first) and the normed hidden state; `norm` is on the output."""

    layer: DecoderLayer
    rotary: nn.Module
    fc_DF: Tensor
    norm_embedding: nn.Module
    norm_hidden: nn.Module
    norm: nn.Module
    embedding_VD: Tensor
    head: Head
    steps: int = 3

    def drafts(self, hidden_RTD: Tensor, token_RT: Tensor, keep: Keep | None = None) -> Drafts:
        """keep: called with what each step gives the experts."""
        return Drafts(self, hidden_RTD, token_RT, keep)


def read_draft_head(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, head: Head | None = None
) -> DraftHead:
    """The draft head of a checkpoint that has one, its experts fused or one by one on disk. head: the model's own."""
    prefix, decoder, module = checkpoint.family.mtp_prefix, checkpoint.blueprint.decoder, checkpoint.empty_draft_layer()
    experts = find_experts(module, "the draft head")
    assert experts is not None
    tap = Tap(experts.output)
    names = [name for name in module.state_dict() if not name.startswith(f"{experts.module}.")]
    kept = {name: checkpoint.value(f"{prefix}layers.0.{name}", device).to(dtype) for name in names}
    module.load_state_dict(kept, strict=False, assign=True)
    expert_module = module.get_submodule(experts.module)
    expert_module.__dict__["forward"] = tap
    own = Layer(module.eval().requires_grad_(False), experts, Arithmetic.of(expert_module, "the draft head"), tap)
    gate_up_ENK, down_ENK = checkpoint.draft_experts(device, dtype)
    layer = DecoderLayer(
        index=0,  # its place in the cache of keys, not among the model's layers
        own=own,
        skeleton=checkpoint,
        tail=1.0,
        dtype=dtype,
        owned=tuple(range(experts.count)),
        gate_up_ENK=gate_up_ENK,
        down_ENK=down_ENK,
    )

    def norm(name: str) -> nn.Module:
        return read_norm(checkpoint, f"{prefix}{name}.weight", device, dtype)

    rotary = copy.deepcopy(decoder.rotary_emb)
    internals.make_buffers(decoder, rotary, device)
    return DraftHead(
        layer=layer,
        rotary=rotary,
        fc_DF=checkpoint.value(f"{prefix}fc.weight", device).to(dtype),
        norm_embedding=norm("pre_fc_norm_embedding"),
        norm_hidden=norm("pre_fc_norm_hidden"),
        norm=norm("norm"),
        embedding_VD=checkpoint.embedding(device, dtype),
        head=checkpoint.head(device, dtype) if head is None else head,
    )


def read_norm(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A norm like the decoder's last one, its weight [D] by the name on disk."""
    made: nn.Module = copy.deepcopy(checkpoint.blueprint.decoder.norm)
    made.load_state_dict({"weight": checkpoint.value(name, device).to(dtype)}, assign=True)
    return made.requires_grad_(False)


def at_positions(value_RTD: Tensor, position_RP: Tensor) -> Tensor:
    """Some positions of each row, [R, P, D]."""
    return value_RTD.gather(1, position_RP[:, :, None].expand(-1, -1, value_RTD.shape[2]))


class Drafts:
    """Draft steps for a batch of rows: the first step for all positions of the text, the later ones for some.

    A later step at position t attends to the first step's keys of positions 0..t and to its own earlier steps.
    """

    def __init__(self, head: DraftHead, hidden_RTD: Tensor, token_RT: Tensor, keep: Keep | None = None) -> None:
        """hidden_RTD: after the model's last norm; token_RT: the text. What comes after a position is nothing to it."""
        self._head, self._cache, self._keep = head, DynamicCache(), keep
        takes = inspect.signature(type(head.layer.own.module).forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # its name before transformers 5.24
        rows, self._length = token_RT.shape[0], token_RT.shape[1] - 1
        position_RT = torch.arange(self._length, device=token_RT.device).expand(rows, -1)
        self._first_RTD = self._step(hidden_RTD[:, :-1], token_RT[:, 1:], position_RT, None)
        self._steps = 1

    def first(self, position_RP: Tensor) -> Tensor:
        """The first step's output [R, P, D] at positions t: predicts token t + 2."""
        return at_positions(self._first_RTD, position_RP)

    def later(self, hidden_RPD: Tensor, token_RP: Tensor, position_RP: Tensor) -> Tensor:
        """The next step's output [R, P, D]: step i predicts token t + i + 1.

        hidden_RPD: what the step before put out for the same positions t; token_RP: the text's token t + i, or what was
        drafted for it.
        """
        rows, count = position_RP.shape
        step_T = torch.arange(self._length, device=position_RP.device)
        before_RPT = step_T <= position_RP[:, :, None]
        own_PP = torch.eye(count, dtype=torch.bool, device=position_RP.device)
        own_RPP = own_PP.repeat(1, self._steps).expand(rows, -1, -1)
        mask_R1PT = torch.cat([before_RPT, own_RPP], dim=2)[:, None]
        output_RPD = self._step(hidden_RPD, token_RP, position_RP + self._steps, mask_R1PT)
        self._steps += 1
        return output_RPD

    def _step(self, hidden_RTD: Tensor, token_RT: Tensor, position_RT: Tensor, mask_R1TT: Tensor | None) -> Tensor:
        head, layer = self._head, self._head.layer
        embedded_RTD = head.norm_embedding(head.embedding_VD[token_RT])
        input_RTF = torch.cat([embedded_RTD, head.norm_hidden(hidden_RTD)], dim=-1)
        with widening.products(input_RTF.device):
            joined_RTD = nn.functional.linear(input_RTF, head.fc_DF)
            output_RTD = layer.own.module(
                joined_RTD,
                position_embeddings=head.rotary(joined_RTD, position_RT.expand(3, -1, -1)),
                attention_mask=mask_R1TT,  # None: causal
                position_ids=position_RT,
                **{self._cache_name: self._cache},
            )
        assert layer.own.tap is not None
        input_TD, index_TA, weight_TA = layer.own.tap.take()
        routing = Routing(index_TA=index_TA, weight_TA=weight_TA)
        if self._keep is not None:
            self._keep(input_TD, routing)
        routed_TD = run_experts(layer, input_TD, routing)
        output_RTD = output_RTD + routed_TD.to(output_RTD.dtype).view_as(output_RTD)
        normed_RTD: Tensor = head.norm(output_RTD)
        return normed_RTD
