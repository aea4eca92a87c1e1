"""The arithmetic of one layer's routed experts, read from transformers' experts module: flags and gate function.

Stacks have one canonical form, whatever the module's: gate_up_ENK [E, 2I, D], gate rows before up rows ([E, I, D]
where experts have no gate), down_ENK [E, D, I], biases [E, 2I] and [E, D].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fourfold.datatypes import FourfoldError

GATE_UP_NAMES = ("gate_up_proj", "up_proj")
DOWN_NAME = "down_proj"
BIAS = "_bias"


@dataclass(frozen=True)
class Stacks:
    """All experts of a layer in the canonical form; biases None where experts have none."""

    gate_up_ENK: Tensor
    down_ENK: Tensor
    gate_up_bias_EN: Tensor | None = None
    down_bias_EN: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Stacks:
        """The same experts elsewhere, or in another dtype."""
        biases = (
            None if bias_EN is None else bias_EN.to(device, dtype)
            for bias_EN in (self.gate_up_bias_EN, self.down_bias_EN)
        )
        return Stacks(self.gate_up_ENK.to(device, dtype), self.down_ENK.to(device, dtype), *biases)


@dataclass(frozen=True)
class Arithmetic:
    """How experts compute. Holds no expert's weight.

    gated: gate and up, or up alone; interleaved: the module has them row by row; transposed: its stacks are
    [E, K, N]; gate: its own function of gate_up [S, N], in its own order of rows; norm: over each expert's output.
    """

    gated: bool
    interleaved: bool
    transposed: bool
    gate: Callable[[Tensor], Tensor]
    norm: nn.Module | None

    @classmethod
    def of(cls, experts: nn.Module, where: str) -> Arithmetic:
        """The arithmetic of an experts module. where: how an error names it.

        Raises FourfoldError for a module that is not called with (hidden, expert ids, weights), that holds other
        tensors, or whose gate function is not separate from its forward.
        """
        name = f"{where} ({type(experts).__name__})"
        arguments = [
            key
            for key, value in inspect.signature(type(experts).forward).parameters.items()
            if value.kind is value.POSITIONAL_OR_KEYWORD and key != "self"
        ]
        if len(arguments) != 3:
            raise FourfoldError(
                f"{name}: experts are called with ({', '.join(arguments)}), expected hidden states, expert ids and "
                "routing weights. This family needs code of its own, which fourfold does not have"
            )
        known = {*GATE_UP_NAMES, DOWN_NAME, *(f"{key}{BIAS}" for key in (*GATE_UP_NAMES, DOWN_NAME))}
        if strange := sorted(set(dict(experts.named_parameters(recurse=False))) - known):
            raise FourfoldError(f"{name}: experts hold {strange[0]!r}, expected up, gate and down projections alone")
        gated = bool(getattr(experts, "has_gate", hasattr(experts, GATE_UP_NAMES[0])))
        gate = getattr(experts, "_apply_gate" if gated else "act_fn", None)
        if gate is None:
            raise FourfoldError(
                f"{name}: experts apply their gate inside their forward, expected transformers' experts interface. "
                "This family needs code of its own, which fourfold does not have"
            )
        return cls(
            gated=gated,
            interleaved=gated and not getattr(experts, "is_concatenated", True),
            transposed=bool(getattr(experts, "is_transposed", False)),
            gate=gate,
            norm=experts.get_submodule("post_expert_norm") if getattr(experts, "has_post_expert_norm", False) else None,
        )

    def canonical(self, name: str, stack: Tensor) -> Tensor:
        """A tensor of the experts module, by its name there, in the canonical form (a copy if interleaved)."""
        if self.transposed and not name.endswith(BIAS):
            stack = stack.transpose(1, 2)
        if self.interleaved and name.startswith(GATE_UP_NAMES[0]):
            stack = torch.cat((stack[:, 0::2], stack[:, 1::2]), dim=1)
        return stack

    def is_swiglu(self) -> bool:
        """Whether experts compute silu(gate) * up, found by trying."""
        if not self.gated or self.norm is not None:
            return False
        gate_up_SN = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 8
        gate_SI, up_SI = gate_up_SN.chunk(2, dim=-1)
        return torch.allclose(self.hidden(gate_up_SN), silu(gate_SI) * up_SI)

    def hidden(self, gate_up_SN: Tensor) -> Tensor:
        """What the down projection is given, [S, I], exactly as the module computes it. gate_up_SN: with its bias."""
        if self.interleaved:
            gate_up_SN = gate_up_SN.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return self.gate(gate_up_SN)

    def weighted(self, output_SD: Tensor, weight_S: Tensor) -> Tensor:
        """Experts' outputs times their routing weights, [S, D]: fp32 where the model's weights are, as it computes.

        output_SD: with its bias; written over where the dtype stays.
        """
        if self.norm is not None:
            output_SD = self.norm(output_SD)
        if weight_S.dtype == output_SD.dtype:
            return output_SD.mul_(weight_S[:, None])
        return output_SD * weight_S[:, None]
