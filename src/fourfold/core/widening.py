"""BF16 products on a processor without BF16 instructions: inputs widened to fp32, results rounded back to BF16.

There torch multiplies BF16 ten times slower than fp32. A dispatch mode sees every operator below autograd, so it covers
what transformers' modules call and every backward pass. Autograd keeps BF16: a tensor is wide for one product only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fourfold.core.kernels import bf16

required = not bf16.NATIVE  # tests and benchmarks set it
PIECE_TOKENS = 4096  # of one expert, widened at one time

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
PRODUCTS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten._grouped_mm,
    aten.convolution, aten.convolution_backward, ATTENTION, aten._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip


def widens(device: torch.device | str) -> bool:
    """Return whether BF16 products on this device are computed in fp32."""
    return required and torch.device(device).type == "cpu"


def named(device: str) -> str:
    """Return a device's name; a CPU that `widens` is another device than one that does not, with other bytes."""
    return f"{device} without BF16 instructions" if widens(device) else device


def products(device: torch.device) -> AbstractContextManager[object]:
    """Within this context, on this thread, compute BF16 products in fp32 if the device `widens`."""
    return _Widened() if widens(device) else nullcontext()  # type: ignore[no-untyped-call]


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, product = kwargs or {}, func.overloadpacket
        if product not in PRODUCTS or func._schema.is_mutable or not any(map(_is_bf16, args)):
            return func(*args, **kwargs)
        if product is aten._grouped_mm and args[0].dim() == 2 and args[1].dim() == 3:
            return _multiply_grouped(*args, **kwargs)
        if product is aten.bmm:
            return _multiply_batch(*args)
        result = func(*tree_map_only(Tensor, _widen, args), **tree_map_only(Tensor, _widen, kwargs))
        if product is ATTENTION:  # whose log-sum-exp is fp32 in any case
            return result[0].bfloat16(), result[1]
        return tree_map_only(Tensor, Tensor.bfloat16, result)


def _is_bf16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def _multiply_batch(left_EPK: Tensor, right_EKN: Tensor) -> Tensor:
    """[E, P, N], one pair of matrices widened at a time: an input that all experts share stays one until then."""
    output_EPN = left_EPK.new_empty(*left_EPK.shape[:2], right_EKN.shape[2])
    for output_PN, left_PK, right_KN in zip(output_EPN, left_EPK, right_EKN, strict=True):
        output_PN.copy_(left_PK.float() @ right_KN.float())
    return output_EPN


def _multiply_grouped(input_SK: Tensor, weight_EKN: Tensor, offs: Tensor) -> Tensor:
    """Rows offs[e - 1]:offs[e] times weight_EKN[e], [S, N]; one expert's matrix widened at a time."""
    output_SN = input_SK.new_empty(len(input_SK), weight_EKN.shape[2])
    first = 0
    for last, weight_KN in zip(offs.tolist(), weight_EKN, strict=True):
        wide_KN = weight_KN.float() if first < last else weight_KN
        for start in range(first, last, PIECE_TOKENS):
            piece = slice(start, min(start + PIECE_TOKENS, last))
            output_SN[piece] = input_SK[piece].float() @ wide_KN
        first = last
    return output_SN
