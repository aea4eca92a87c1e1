"""An exact int4 expert kernel inside vLLM 0.32 for CPUs that none of its own kernels runs on.

Only the expert matrix products are replaced; reading the config, loading, routing, attention and the draft head stay
vLLM's own. Symmetric weights only: zero points are not read, as in vLLM's GPU kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts import cpu_moe, zentorch_moe
from vllm.model_executor.layers.fused_moe.oracle import int_wna16


def is_needed() -> bool:
    """Whether vLLM has no int4 expert kernel of its own for this CPU (AMX, or AMD's AVX-512 with zentorch)."""
    own = (cpu_moe.CPUExpertsInt4, zentorch_moe.ZentorchExpertsInt4)
    return not any(kernel._supports_current_device() for kernel in own)


def dequantize(packed_NW: Tensor, scale_NG: Tensor, dtype: torch.dtype) -> Tensor:
    nibbles_NK = (packed_NW[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)).bitwise_and(15).flatten(-2)
    grouped = (nibbles_NK - 8).unflatten(-1, (scale_NG.shape[-1], -1)).float() * scale_NG[..., None].float()
    weight_NK: Tensor = grouped.flatten(-2).to(dtype)
    return weight_NK


class ReferenceExperts(cpu_moe.CPUExpertsInt4):  # type: ignore[misc]  # vLLM is not there for mypy
    """Dequantizes the experts that a batch needs and multiplies in the model's dtype."""

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    def apply(
        self, output: Tensor, hidden_states: Tensor, w1: Tensor, w2: Tensor,
        topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any,
    ) -> None:  # fmt: skip
        total_TD = torch.zeros(hidden_states.shape)
        for expert in topk_ids.unique().tolist():
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            gate_up = dequantize(w1[expert], self.w1_scale[expert], hidden_states.dtype)
            down = dequantize(w2[expert], self.w2_scale[expert], hidden_states.dtype)
            gate, up = F.linear(hidden_states[token], gate_up).chunk(2, -1)
            product = F.linear(F.silu(gate) * up, down).float()
            total_TD.index_add_(0, token, product * topk_weights[token, slot, None].float())
        output.copy_(total_TD)


def _keep_packed(
    quant_config: Any, w13: Tensor, w2: Tensor, w13_scale: Tensor, w2_scale: Tensor, *_: Any, **biases: Any
) -> tuple[Any, ...]:
    """In place of the repacking for AMX. The caller insists on zero points for this backend; they are not read."""
    unused = torch.zeros(1, dtype=torch.int32)
    bias = biases.get("w13_bias"), biases.get("w2_bias")
    return w13, w2, w13_scale, w2_scale, unused, unused.clone(), None, None, *bias


def install() -> None:
    cpu_moe.CPUExpertsInt4 = ReferenceExperts
    int_wna16._process_weights_cpu = _keep_packed
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.CPU]
