"""Exact linear layers of int8 weights inside vLLM 0.32 for CPUs, which has no kernel of its own for them.

Only the matrix product is replaced; reading the config, loading and joining of modules stay vLLM's own. Symmetric
weights only: zero points are not read, as in vLLM's GPU kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.model_executor.layers.quantization import auto_gptq
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types
from vllm_reference_experts import dequantize

SAID = "[fourfold] Using an exact int8 linear kernel of fourfold's: vLLM has none for a CPU"


@functools.cache
def say() -> None:
    print(SAID, flush=True)


class ReferenceLinear(MPLinearKernel):  # type: ignore[misc]  # vLLM is not there for mypy
    """Dequantizes once, after loading, and multiplies in the model's dtype. The parameters stay as they were loaded."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        if config.weight_type != scalar_types.uint8b128:
            return False, "it is for int8 weights"
        say()
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        words, scales = (getattr(layer, name).data for name in (self.w_q_name, self.w_s_name))
        if getattr(layer, self.w_q_name).input_dim == 0:  # gptq: a column for each output
            words, scales = words.T.contiguous(), scales.T.contiguous()
        layer.reference_NK = dequantize(words, scales, self.config.partition_weight_shape[0], self.config.act_type)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.reference_NK, bias)


def install() -> None:
    """Offer the kernel after vLLM's own, and let gptq's layers ask for one: they ask for a GPU's Marlin before."""
    linear._POSSIBLE_KERNELS[PlatformEnum.CPU].append(ReferenceLinear)
    check = auto_gptq.verify_marlin_supported

    def checked(quant_type: Any, *arguments: Any, **options: Any) -> None:
        if quant_type != scalar_types.uint8b128:
            check(quant_type, *arguments, **options)

    auto_gptq.verify_marlin_supported = checked
