"""The router of a layer: its matrix, found by whether its logits alone decide which experts a token goes to."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fourfold.core import widening
from fourfold.model import calls, loader
from fourfold.model.layer import DecoderLayer
from fourfold.model.loader import Layer
from fourfold.model.skeleton import Skeleton

TOKENS = 64  # of made-up text, that a router is tried on
ROUNDING = 1e-4  # of the largest logit


def find_router(skeleton: Skeleton) -> str:
    """The name of a router's matrix, beside the experts; empty where its logits alone do not decide.

    They do where the experts with the largest logits are chosen, and a larger logit never has a smaller weight: no
    bias, no groups of experts, another input than the experts', or a scale for each expert. Tried in fp32 with made-up
    weights on the first layer with experts.
    """
    first, host = skeleton.routed[0], torch.device("cpu")
    call = skeleton.calls((1, TOKENS), host, torch.float32)
    layer = loader.made_up_layer(skeleton.blueprint, first, host)
    layer.module.float()
    state = torch.randn(call.state.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), widening.products(host):
        calls.pass_layer(layer, call, first, state)
    assert layer.tap is not None and layer.experts is not None
    input_TD, index_TA, weight_TA = (value.flatten(0, -2) for value in layer.tap.take())
    shape = layer.experts.count, input_TD.shape[1]
    for name, weight in _beside(layer).named_parameters():
        if weight.shape == shape and decides(linear(input_TD, weight), index_TA, weight_TA):
            return name
    return ""


def decides(logits_TE: Tensor, index_TA: Tensor, weight_TA: Tensor) -> bool:
    """Whether a choice is that of the largest logits, with weights in their order, and leaves an expert out."""
    if index_TA.shape[1] >= logits_TE.shape[1]:
        return False
    rounding = ROUNDING * logits_TE.abs().max()
    chosen_TA = logits_TE.gather(1, index_TA)
    others_T = logits_TE.scatter(1, index_TA, -torch.inf).amax(dim=1)
    falling_TA = weight_TA.float().gather(1, chosen_TA.argsort(dim=1, descending=True))
    return bool((chosen_TA.amin(dim=1) >= others_T - rounding).all() and (falling_TA.diff(dim=1) <= ROUNDING).all())


def logits(layer: DecoderLayer, router: str, input_TD: Tensor) -> Tensor:
    """A layer's router logits, fp32 [T, E]. router: see find_router; input_TD: of the routed experts."""
    return linear(input_TD.float(), _beside(layer.own).get_parameter(router).float())


def _beside(layer: Layer) -> nn.Module:
    """The module that holds the experts."""
    assert layer.experts is not None
    return layer.module.get_submodule(layer.experts.module.rpartition(".")[0])
