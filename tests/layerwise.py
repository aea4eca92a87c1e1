"""A model layer by layer in the plainest way: what the product's batched layers and heads are compared with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fourfold.datatypes import FourfoldError, shortened
from fourfold.model import internals, loader
from fourfold.model.arithmetic import Arithmetic, Stacks
from fourfold.model.blueprint import Blueprint
from fourfold.model.calls import Calls, run_out
from fourfold.model.loader import Read


def load_surroundings_(
    blueprint: Blueprint, read: Read, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Load what the blueprint's model has around its layers, in place: embeddings, last norm, output head.

    Its layers stay on the meta device, and other towers (vision, audio) too. dtype: as for `load`.
    """
    model, decoder = blueprint.model, blueprint.decoder
    loaded = {name: value.to(device) for name, value in loader.load_around(blueprint, read, (), dtype).items()}
    model.load_state_dict(loaded, strict=False, assign=True)
    internals.tie(model, set(blueprint.absent))
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    try:
        internals.make_buffers(loader.owner(blueprint), decoder, device)
    finally:
        decoder.layers = layers
    model.requires_grad_(False)


def finish(blueprint: Blueprint, calls: Calls, state: Tensor) -> Tensor:
    """The model's logits [R, T, V] for the state after the last layer: last norm, output head, whatever scales them."""
    with torch.no_grad():
        return run_out(blueprint, calls.token_RT, calls.answers, state)


def run_experts(
    arithmetic: Arithmetic, stacks: Stacks, input_TD: Tensor, index_TA: Tensor, weight_TA: Tensor
) -> Tensor:
    """Experts' output for a batch of tokens, summed over each token's experts: [T, D], the input's dtype.

    One expert after the other: for few tokens, and to compare with.
    """
    tokens, choices = index_TA.shape
    weighted_TAD = input_TD.new_zeros(
        tokens, choices, stacks.down_ENK.shape[1], dtype=torch.promote_types(input_TD.dtype, weight_TA.dtype)
    )
    for expert in index_TA.unique().tolist():
        token_S, choice_S = torch.where(index_TA == expert)
        gate_up_SN = linear(input_TD[token_S], stacks.gate_up_ENK[expert])
        if stacks.gate_up_bias_EN is not None:
            gate_up_SN = gate_up_SN + stacks.gate_up_bias_EN[expert]
        output_SD = linear(arithmetic.hidden(gate_up_SN), stacks.down_ENK[expert])
        if stacks.down_bias_EN is not None:
            output_SD = output_SD + stacks.down_bias_EN[expert]
        weighted_TAD[token_S, choice_S] = arithmetic.weighted(output_SD, weight_TA[token_S, choice_S])
    return weighted_TAD.sum(dim=1).to(input_TD.dtype)


def disk_names(blueprint: Blueprint, prefix: str) -> list[str]:
    """Names on disk of all that makes the names in memory under a prefix."""
    return sorted(name for _, source in blueprint.within(prefix) for name in source.all_names)


def require_whole(blueprint: Blueprint) -> None:
    """Raise FourfoldError for tensors that nothing claims, that are missing or of another shape."""
    problems = [f"{name} is not known to transformers" for name in blueprint.unknown]
    problems += [f"{name} is missing" for name in blueprint.lacking()]
    problems += _misshapen(blueprint)
    if problems:
        raise FourfoldError(
            f"{blueprint.path.parent}: {shortened(problems)}; expected the tensors of "
            f"{type(blueprint.model).__name__}. Download the checkpoint again"
        )


def _misshapen(blueprint: Blueprint) -> Iterator[str]:
    for name, shape in blueprint.shapes():
        if blueprint.headers[name].shape != shape:
            yield f"{name} is {list(blueprint.headers[name].shape)}, expected {list(shape)}"
