"""Whole models in transformers, all of it in memory: what a sweep layer by layer must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import releases


@dataclass(frozen=True)
class Seen:
    """A whole model on the held-out windows.

    log_PV: log-probabilities at each predicted position, in float64; next_P: the true next tokens;
    hidden: by layer, the states after it; chosen: by layer, the experts of each token [T, A].
    """

    log_PV: Tensor
    next_P: Tensor
    hidden: list[Tensor]
    chosen: list[Tensor]

    @property
    def perplexity(self) -> float:
        return (-self.log_PV.gather(1, self.next_P[:, None])).mean().exp().item()


@torch.no_grad()
def see(model: Any, token_RT: Tensor) -> Seen:
    """One forward pass. The head is applied again, in float64: BF16 logits are rounded by more than KL may be off."""
    hidden: list[Tensor] = []
    chosen: list[Tensor] = []
    last: list[Tensor] = []
    layers = model.model.language_model.layers
    handles = [model.lm_head.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))]
    handles += [layer.register_forward_hook(lambda _, __, output: hidden.append(output)) for layer in layers]
    handles += [layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[-1])) for layer in layers]
    model(input_ids=token_RT)
    for handle in handles:
        handle.remove()
    logits_PV = last[0][:, :-1].flatten(0, 1).double() @ model.lm_head.weight.double().T
    return Seen(logits_PV.log_softmax(dim=1), token_RT[:, 1:].flatten(), hidden, chosen)


@torch.no_grad()
def take_experts_(model: Any, found: dict[str, Tensor]) -> None:
    """Give a whole model the experts of a release, dequantized, in the model's own dtype. found: its tensors."""
    for index, layer in enumerate(model.model.language_model.layers):
        experts = layer.mlp.experts
        for expert in range(len(experts.down_proj)):
            stem = f"model.language_model.layers.{index}.mlp.experts.{expert}."
            gate, up, down = (releases.dequantize(found, f"{stem}{part}.") for part in releases.PROJECTIONS)
            experts.gate_up_proj[expert], experts.down_proj[expert] = torch.cat([gate, up]), down
