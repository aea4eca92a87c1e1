"""Exact experts of int4 or int8 weights inside vLLM 0.32 for CPUs, for layers that none of its own kernels takes.

vLLM's own kernels need AMX, or AMD's AVX-512 with zentorch, and refuse gates other than SiLU and routers other than
softmax. Only expert matrix products are replaced; reading the config, loading, routing, gates, attention and the draft
head stay vLLM's own. Symmetric weights only: zero points are not read, as in vLLM's GPU kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.activation import SiluAndMulWithClamp
from vllm.model_executor.layers.fused_moe import config
from vllm.model_executor.layers.fused_moe.experts import cpu_moe, int4_emulation_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.router import cpu_router

SAID = "[fourfold] Using an exact expert kernel of fourfold's: vLLM has none for this CPU and these experts"


def dequantize(packed_NW: Tensor, scale_NG: Tensor, inputs: int, dtype: torch.dtype) -> Tensor:
    """inputs: K, which tells how many bits a code has."""
    bits = 32 * packed_NW.shape[-1] // inputs
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    code_NK = (packed_NW[..., None] >> shifts).bitwise_and(2**bits - 1).flatten(-2) - 2 ** (bits - 1)
    grouped = code_NK.unflatten(-1, (scale_NG.shape[-1], -1)).float() * scale_NG[..., None].float()
    weight_NK: Tensor = grouped.flatten(-2).to(dtype)
    return weight_NK


class ReferenceExperts(cpu_moe.CPUExpertsInt4):  # type: ignore[misc]  # vLLM is not there for mypy
    """Dequantizes the experts that a batch needs and multiplies in the model's dtype."""

    @staticmethod
    def is_supported_config(_: Any, moe_config: Any, *__: Any) -> tuple[bool, str | None]:
        """Any router and any gate. vLLM calls this last, so it has nothing of its own."""
        if moe_config.has_bias:
            return False, "experts have biases"
        print(SAID, flush=True)
        return True, None

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
        activation: Any, *_: Any, apply_router_weight_on_input: bool = False, **__: Any,
    ) -> None:  # fmt: skip
        total_TD = torch.zeros(hidden_states.shape)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            first = dequantize(w1[expert], self.w1_scale[expert], hidden_states.shape[1], hidden_states.dtype)
            gated = self._gate(activation, F.linear(hidden_states[token], first))
            down = dequantize(w2[expert], self.w2_scale[expert], gated.shape[1], hidden_states.dtype)
            product = F.linear(gated, down).float()
            if not apply_router_weight_on_input:  # or the input was multiplied before
                product *= topk_weights[token, slot, None].float()
            total_TD.index_add_(0, token, product)
        output.copy_(total_TD)

    def _gate(self, activation: Any, inner: Tensor) -> Tensor:
        """vLLM's own function; clamped gates have an operator on GPUs only, and its definition in torch beside it."""
        found = self.activation_config
        if found.clamp_limit is not None:
            clamped = SiluAndMulWithClamp(found.clamp_limit, found.alpha, found.beta, compile_native=False)
            gated: Tensor = clamped.forward_native(inner)
            return gated
        gated = inner.new_empty(len(inner), inner.shape[1] // (2 if activation.is_gated else 1))
        self.activation(activation, gated, inner)
        return gated


def _keep_packed(w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor, *_: Any) -> tuple[Any, ...]:
    """In place of dequantizing all of a layer."""
    return w13, w2, w13_scale, w2_scale, None, None, None, None, None, None


def install(only: bool) -> None:
    """Offer the experts after vLLM's own kernels, in the place of its emulation. only: not after them but alone."""
    own = int_wna16._get_priority_backends
    ours = int_wna16.WNA16MoEBackend.EMULATION
    int_wna16._get_priority_backends = lambda: [ours] if only else [*own(), ours]
    int4_emulation_moe.Int4EmulationTritonExperts = ReferenceExperts
    int_wna16._process_weights_emulation_gptq = _keep_packed
    _allow_experts_without_gates()
    _route_by_any_score()


def _allow_experts_without_gates() -> None:
    """vLLM checks last of all that the platform has kernels for them."""
    check = config.FusedMoEConfig.__post_init__

    def checked(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError as error:
            if "is_act_and_mul=False" not in str(error):
                raise

    config.FusedMoEConfig.__post_init__ = checked


def _route_by_any_score() -> None:
    """vLLM's router for CPUs knows sigmoid scores and selection biases in groups only: no groups are one group."""
    route = cpu_router.CPURouter._compute_routing

    def routed(self: Any, hidden_states: Tensor, router_logits: Tensor, *arguments: Any, **options: Any) -> Any:
        plain = self.scoring_func == "softmax" and self.e_score_correction_bias is None
        if plain or self.use_grouped_topk or self.custom_routing_function or self.scoring_func == "sqrtsoftplus":
            return route(self, hidden_states, router_logits, *arguments, **options)
        return cpu_router._grouped_topk(
            router_logits, self.top_k, self.renormalize, 1, 1, self.scoring_func, self.routed_scaling_factor,
            self.e_score_correction_bias,
        )  # fmt: skip

    cpu_router.CPURouter._compute_routing = routed
