"""The batched solve over a stack of experts, and its refinement passes. docs/numerics.md sections 4, 6, 7 and 13.

Everything is fp32; callers leave TF32 off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fourfold.core.grid import Grid, stored
from fourfold.core.kernels import cpu, cpu_rows, cuda, cuda_rows
from fourfold.core.moments import damping

if TYPE_CHECKING:
    from fourfold.core.guidance import RowFactor

BLOCK = 128  # columns between two GEMMs over all earlier errors
PANEL = 256  # columns of the Cholesky factor between two GEMMs over all that are behind them


@dataclass(frozen=True, kw_only=True)
class Damping:
    """delta, kind, floor: see moments.damping; retries: deltas tried in turn for an expert whose factor fails."""

    delta: float
    kind: str
    floor: float
    retries: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Refit:
    """How refinement may move scales, to values that the grid stores. signed: they may become negative."""

    signed: bool


@dataclass(frozen=True)
class Factor:
    """H = M diag(D) M^T of a stack of damped Hessians, columns in processing order.

    unit_EKK: M, unit upper triangular; pivot_EK: D; order_EK: natural index of each processed column;
    delta_E: damping that was needed; diagonal_E: experts whose H was replaced by its diagonal, as no damping helped.
    """

    unit_EKK: Tensor
    pivot_EK: Tensor
    order_EK: Tensor
    delta_E: Tensor
    diagonal_E: Tensor

    def natural_pivot(self) -> Tensor:
        """D in natural column order, [E, K]."""
        return torch.empty_like(self.pivot_EK).scatter_(1, self.order_EK, self.pivot_EK)


def order_columns(diagonal_EK: Tensor, kind: str, group_size: int) -> Tensor:
    """Processing order of the columns, int64 [E, K]; stable, so equal columns keep their order.

    kind "activation": descending diagonal; "group-aware": whole groups by their largest, columns of a group by their
    own (GPTQModel's GAR); "natural".
    """
    if kind == "natural":
        return torch.arange(diagonal_EK.shape[1], device=diagonal_EK.device).expand_as(diagonal_EK)
    if kind == "activation":
        return diagonal_EK.argsort(dim=1, descending=True, stable=True)
    grouped_EGK = diagonal_EK.unflatten(1, (-1, group_size))
    inner_EGK = grouped_EGK.argsort(dim=2, descending=True, stable=True)
    outer_EG = grouped_EGK.amax(dim=2).argsort(dim=1, descending=True, stable=True)
    start_EG1 = (outer_EG * group_size)[..., None]
    ordered_EK: Tensor = (inner_EGK.gather(1, outer_EG[..., None].expand_as(inner_EGK)) + start_EG1).flatten(1)
    return ordered_EK


def factorize_(hessian_EKK: Tensor, settings: Damping, order: str, group_size: int) -> Factor:
    """Damp a stack of Hessians, in place, and factorize it: one Cholesky, no inverse.

    An expert whose Cholesky fails is tried again alone with the larger dampings, and in the end with diag(H): a value
    in the result, never an exception.
    Peak: two stacks [E, K, K] above the input.
    """
    diagonal_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1).clone()
    order_EK = order_columns(diagonal_EK, order, group_size)
    delta_E = torch.full_like(diagonal_EK[:, 0], settings.delta)
    factor_EKK, pivot_EK, failed_E = _attempt_(hessian_EKK, diagonal_EK, delta_E, settings, order_EK)
    for delta in settings.retries:
        again = failed_E.nonzero().flatten()
        if not len(again):
            break
        delta_E[again] = delta
        stack = hessian_EKK[again]
        factor_EKK[again], pivot_EK[again], failed_E[again] = _attempt_(
            stack, diagonal_EK[again], delta_E[again], settings, order_EK[again]
        )
        hessian_EKK[again] = stack
    for expert in failed_E.nonzero().flatten().tolist():
        hessian_EKK[expert] = torch.diag(hessian_EKK[expert].diagonal())
        factor_EKK[expert] = torch.eye(hessian_EKK.shape[-1], device=hessian_EKK.device)
        pivot_EK[expert] = hessian_EKK[expert].diagonal()[order_EK[expert]]
    return Factor(factor_EKK, pivot_EK, order_EK, delta_E, failed_E)


def _attempt_(
    hessian_EKK: Tensor, diagonal_EK: Tensor, delta_E: Tensor, settings: Damping, order_EK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Set the damped diagonal, in place, and factorize: (M, D, failed)."""
    hessian_EKK.diagonal(dim1=-2, dim2=-1).copy_(diagonal_EK)
    added_EK = damping(hessian_EKK, delta_E, settings.kind, settings.floor)
    hessian_EKK.diagonal(dim1=-2, dim2=-1).add_(added_EK)
    unit_EKK, pivot_EK, failed_E = _decompose(_permute(hessian_EKK, order_EK))
    failed_E |= ~pivot_EK.isfinite().all(dim=1) | (pivot_EK <= 0).any(dim=1)
    return unit_EKK, pivot_EK, failed_E


def _permute(hessian_EKK: Tensor, order_EK: Tensor) -> Tensor:
    """Rows and columns of each expert in an order."""
    if hessian_EKK.device.type == "cpu" and hessian_EKK.dtype == torch.float32:
        return cpu.permute(hessian_EKK, order_EK)
    return take(hessian_EKK, order_EK).gather(2, order_EK[:, None, :].expand_as(hessian_EKK))


def _decompose(hessian_EKK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, D, failed) with H = M diag(D) M^T, M unit upper, from the last block of columns to the first.

    R = M diag(D)^(1/2) of a block's columns is (H - what the blocks behind it make) times the inverse transpose of its
    own square, which is the flipped Cholesky factor of the flipped square. Left-looking: two GEMMs and a triangular
    solve per block.
    """
    inputs = hessian_EKK.shape[-1]
    unit_EKK, pivot_EK = torch.zeros_like(hessian_EKK), torch.empty_like(hessian_EKK[:, 0])
    failed_E = torch.zeros(len(hessian_EKK), dtype=torch.bool, device=hessian_EKK.device)
    for start in reversed(range(0, inputs, PANEL)):
        end = min(start + PANEL, inputs)
        block = slice(start, end)
        behind_EBK = unit_EKK[:, block, end:] * pivot_EK[:, None, end:]
        left_EKB = torch.baddbmm(hessian_EKK[:, :end, block], unit_EKK[:, :end, end:], behind_EBK.mT, alpha=-1)
        lower_EBB, info_E = torch.linalg.cholesky_ex(left_EKB[:, block].flip(1, 2))
        root_EBB = lower_EBB.flip(1, 2)
        root_E1B = root_EBB.diagonal(dim1=1, dim2=2)[:, None]
        unit_EKK[:, block, block] = root_EBB / root_E1B
        rest_EKB = torch.linalg.solve_triangular(root_EBB.mT, left_EKB[:, :start], upper=False, left=False)
        torch.div(rest_EKB, root_E1B, out=unit_EKK[:, :start, block])
        pivot_EK[:, block] = root_E1B[:, 0].square()
        failed_E |= info_E > 0
    return unit_EKK, pivot_EK, failed_E


def solve_codes(
    target_ENK: Tensor, scale_ENG: Tensor, factor: Factor, grid: Grid, rows: RowFactor | None = None
) -> Tensor:
    """Codes int8 [E, N, K] that minimise tr(H_O Err H Err^T) one column after the other, each step exactly.

    GPTQ (arXiv 2210.17323) without an inverse: t_j = w_j + sum_{i<j} Err_i M_ij is its updated weight at column j.
    rows: a metric H_O of the rows, by which a row also makes up for what earlier rows left over; None is H_O = 1, and
    so are its codes.
    Left-looking: one GEMM over all earlier errors per block of columns. Columns lie one after the other in memory
    (of the result too, and best of the target): a reordered column is then a row that is copied.
    """
    inputs = target_ENK.shape[-1]
    group_EK = factor.order_EK // (inputs // scale_ENG.shape[-1])
    if rows is not None:
        order_EN = rows.order_EN.expand(target_ENK.shape[:2])
        target_ENK, scale_ENG = take(target_ENK, order_EN), take(scale_ENG, order_EN)
    ordered_EKN = take(target_ENK.mT, factor.order_EK)
    error_EKN, codes_EKN = torch.empty_like(ordered_EKN), torch.empty_like(ordered_EKN, dtype=torch.int8)
    for start in range(0, inputs, BLOCK):
        block = slice(start, min(start + BLOCK, inputs))
        weight_EBN = ordered_EKN[:, block]
        scale_EBN = take(scale_ENG.mT, group_EK[:, block])
        target_EBN = torch.baddbmm(weight_EBN, factor.unit_EKK[:, :start, block].mT, error_EKN[:, :start])
        given = target_EBN.mT, weight_EBN.mT, factor.unit_EKK[:, block, block], scale_EBN.mT
        codes_ENB, error_ENB = inblock(*given, grid) if rows is None else inblock_by_rows(*given, rows.unit_ENN, grid)
        codes_EKN[:, block], error_EKN[:, block] = codes_ENB.mT, error_ENB.mT
    codes_ENK = take(codes_EKN, factor.order_EK.argsort(dim=1)).mT
    return codes_ENK if rows is None else take(codes_ENK, order_EN.argsort(dim=1))


def take(values_EKN: Tensor, place_EK: Tensor) -> Tensor:
    """Row place_EK[e, k] of each expert's rows, one after the other; as many as there are places."""
    first_E1 = torch.arange(len(values_EKN), device=place_EK.device)[:, None] * values_EKN.shape[1]
    taken_SN = values_EKN.flatten(0, 1).index_select(0, (place_EK + first_E1).flatten())
    return taken_SN.view(*place_EK.shape, -1)


def inblock_by_rows(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, unit_ENN: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """`inblock` with rows in order, each on its target and weight plus c_r = sum_{i<r} M_ir Err_i of earlier rows.

    unit_ENN: M, of the rows; what is on and below its diagonal is not read. Returns (codes int8, Err + c): the second
    is what later columns are fed. No input is changed.
    """
    kernel = inblock_by_rows_torch
    if target_ENB.dtype == torch.float32:
        kernel = cuda_rows.inblock_by_rows if target_ENB.is_cuda else cpu_rows.inblock_by_rows
    return kernel(target_ENB, weight_ENB, feedback_EBB, scale_ENB, unit_ENN, grid)


def inblock_by_rows_torch(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, unit_ENN: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The same for any device and dtype, a row at a time: what the native kernels are held against."""
    codes_ENB, fed_ENB = torch.empty_like(target_ENB, dtype=torch.int8), torch.empty_like(target_ENB)
    error_ENB = torch.empty_like(target_ENB)
    for row in range(target_ENB.shape[1]):
        here = slice(row, row + 1)
        left_E1B = unit_ENN[:, :row, here].mT @ error_ENB[:, :row]
        codes_ENB[:, here], fed_ENB[:, here] = inblock_torch(
            target_ENB[:, here] + left_E1B, weight_ENB[:, here] + left_E1B, feedback_EBB, scale_ENB[:, here], grid
        )
        error_ENB[:, here] = weight_ENB[:, here] - codes_ENB[:, here] * scale_ENB[:, here]
    return codes_ENB, fed_ENB


def inblock(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The serial kernel: B columns, each rounded and its error fed to the later ones. Returns (codes int8, error).

    For j = 0..B-1: q = clamp(rint(T_j / S_j)); err_j = W_j - S_j q; T_k += err_j feedback_jk for k > j.
    No input is changed; feedback's diagonal and lower triangle are not read.
    """
    kernel = inblock_torch
    if target_ENB.dtype == torch.float32:
        kernel = cuda.inblock if target_ENB.is_cuda else cpu.inblock
    return kernel(target_ENB, weight_ENB, feedback_EBB, scale_ENB, grid)


def inblock_torch(
    target_ENB: Tensor, weight_ENB: Tensor, feedback_EBB: Tensor, scale_ENB: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The same for any device and dtype, a column at a time: what the native kernels are held against."""
    # Columns first: each step then reads and writes contiguous rows.
    target_EBN = target_ENB.mT.clone(memory_format=torch.contiguous_format)  # changed below
    scale_EBN, weight_EBN = scale_ENB.mT.contiguous(), weight_ENB.mT.contiguous()
    codes_EBN, error_EBN = torch.empty_like(target_EBN, dtype=torch.int8), torch.empty_like(target_EBN)
    for j in range(target_EBN.shape[1]):
        code_EN = (target_EBN[:, j] / scale_EBN[:, j]).round_().clamp_(grid.least, grid.most)
        codes_EBN[:, j] = code_EN
        error_EBN[:, j] = weight_EBN[:, j] - code_EN.mul_(scale_EBN[:, j])
        target_EBN[:, j + 1 :].addcmul_(feedback_EBB[:, j, j + 1 :, None], error_EBN[:, j, None, :])
    return codes_EBN.mT, error_EBN.mT


State = tuple[Tensor, Tensor, Tensor, Tensor]  # target_EKN, and what a step changes: error_EKN, code_EKN, scale_EGN


def refine(
    target_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, hessian_EKK: Tensor, passes: int, refit: Refit | None,
    grid: Grid, rows: RowFactor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Coordinate descent on scales and codes, group after group: the proxy tr(H_O Err H Err^T) never rises.

    hessian_EKK: damped, symmetric. refit: how scales may move; None leaves them alone. rows: a metric H_O of the rows,
    which are then refined one after the other in each group; None is H_O = 1, and so is its result.
    Returns new (codes_ENK int8, scale_ENG). Columns lie one after the other here: see solve_codes.
    """
    size = target_ENK.shape[-1] // scale_ENG.shape[-1]
    step = refine_group_torch_
    if target_ENK.device.type == "cpu" and target_ENK.dtype == torch.float32:
        step = cpu.refine_group_
    if rows is not None:
        order_EN = rows.order_EN.expand(target_ENK.shape[:2])
        target_ENK, codes_ENK, scale_ENG = (take(each, order_EN) for each in (target_ENK, codes_ENK, scale_ENG))
        relative_ENN = torch.empty_like(rows.metric_ENN)
        if relative_ENN.device.type == "cpu":
            relative_ENN = relative_ENN.mT  # columns one after the other: a third faster products in cpu_rows
        torch.div(rows.metric_ENN, rows.metric_ENN.diagonal(dim1=-2, dim2=-1)[:, None], out=relative_ENN)
    target_EKN = target_ENK.mT.contiguous()
    code_EKN = torch.empty_like(target_EKN).copy_(codes_ENK.mT)
    scale_EGN = scale_ENG.mT.clone(memory_format=torch.contiguous_format)
    error_EKN = target_EKN - code_EKN * scale_EGN.repeat_interleave(size, dim=1)
    state = target_EKN, error_EKN, code_EKN, scale_EGN
    for _ in range(passes):
        for group in range(scale_EGN.shape[1]):
            block = slice(group * size, (group + 1) * size)
            hessian_EBB = hessian_EKK[:, block, block]
            gradient_EBN = torch.bmm(hessian_EKK[:, block], error_EKN)
            product_EBN = torch.bmm(hessian_EBB, code_EKN[:, block])
            if rows is None:
                step(group, gradient_EBN, product_EBN, hessian_EBB, state, refit, grid)
            else:
                refine_by_rows_(group, (gradient_EBN, product_EBN, hessian_EBB), relative_ENN, state, refit, grid)
    codes_ENK, scale_ENG = code_EKN.to(torch.int8).mT, scale_EGN.mT
    if rows is not None:
        place_EN = order_EN.argsort(dim=1)
        codes_ENK, scale_ENG = take(codes_ENK, place_EN), take(scale_ENG, place_EN)
    return codes_ENK.contiguous(), scale_ENG.contiguous()


def refine_group_torch_(
    group: int, gradient_EBN: Tensor, product_EBN: Tensor, hessian_EBB: Tensor, state: State, refit: Refit | None,
    grid: Grid,
) -> None:  # fmt: skip
    """Scales, then codes of one group, in place: for any device and dtype, and what the native kernel is held against.

    gradient_EBN: H Err, all groups' errors; product_EBN: the group's own block of H times its codes; both are changed.
    """
    target_EKN, error_EKN, code_EKN, scale_EGN = state
    size = hessian_EBB.shape[-1]
    block = slice(group * size, (group + 1) * size)
    diagonal_EB1 = hessian_EBB.diagonal(dim1=-2, dim2=-1)[..., None]
    weight_EBN, error_EBN, code_EBN = target_EKN[:, block], error_EKN[:, block], code_EKN[:, block]
    if refit:
        moved_E1N = _refit(code_EBN, scale_EGN[:, group], gradient_EBN, product_EBN, refit, grid)[:, None]
        error_EBN.addcmul_(code_EBN, moved_E1N, value=-1)
        gradient_EBN.addcmul_(product_EBN, moved_E1N, value=-1)
        scale_EGN[:, group] += moved_E1N[:, 0]
    feedback_EBB = (hessian_EBB / diagonal_EB1.mT).triu(1)
    # W_b + Gr / diag H - Err_b (1 + triu F): the block's own error is taken out of its gradient
    ahead_EBN = gradient_EBN.div_(diagonal_EB1).add_(weight_EBN).sub_(error_EBN)
    ahead_EBN.baddbmm_(feedback_EBB.mT, error_EBN, alpha=-1)
    scale_EBN = scale_EGN[:, group, None].expand_as(ahead_EBN)
    codes_ENB, error_ENB = inblock(ahead_EBN.mT, weight_EBN.mT, feedback_EBB, scale_EBN.mT, grid)
    code_EKN[:, block], error_EKN[:, block] = codes_ENB.mT, error_ENB.mT


Block = tuple[Tensor, Tensor, Tensor]  # of a group: gradient_EBN (H Err), product_EBN (H codes), hessian_EBB


def refine_by_rows_(
    group: int, block: Block, relative_ENN: Tensor, state: State, refit: Refit | None, grid: Grid
) -> None:
    """Scales, then codes of one row after the other in a group, in place, the newest errors in all other rows.

    relative_ENN: H_ir / H_rr of the rows' metric: row r's error in its own units is x = Err_r + sum_{i != r} Err_i H_ir
    / H_rr, and x is refined as a row without a metric is. block's gradient is changed: it follows the errors.
    """
    kernel_ = refine_by_rows_torch_
    if relative_ENN.dtype == torch.float32:
        kernel_ = cuda_rows.refine_by_rows_ if relative_ENN.is_cuda else cpu_rows.refine_by_rows_
    kernel_(group, block, relative_ENN, state, refit, grid)


def refine_by_rows_torch_(
    group: int, block: Block, relative_ENN: Tensor, state: State, refit: Refit | None, grid: Grid
) -> None:
    """The same for any device and dtype: what the native kernels are held against."""
    gradient_EBN, product_EBN, hessian_EBB = block
    target_EKN, error_EKN, code_EKN, scale_EGN = state
    columns = slice(group * hessian_EBB.shape[-1], (group + 1) * hessian_EBB.shape[-1])
    for row in range(gradient_EBN.shape[2]):
        here = slice(row, row + 1)
        before_EB1 = error_EKN[:, columns, here].clone()
        own_state = target_EKN[..., here], error_EKN[..., here], code_EKN[..., here], scale_EGN[..., here]
        own_EB1 = gradient_EBN @ relative_ENN[..., here]
        refine_group_torch_(group, own_EB1, product_EBN[..., here].clone(), hessian_EBB, own_state, refit, grid)
        gradient_EBN[..., here] += hessian_EBB @ (error_EKN[:, columns, here] - before_EB1)


def _refit(
    code_EBN: Tensor, scale_EN: Tensor, gradient_EBN: Tensor, product_EBN: Tensor, refit: Refit, grid: Grid
) -> Tensor:
    """How far each scale moves to reach the stored value next to its least-squares optimum. [E, N].

    scale_EN: stored values, so that none of them is nearer to the optimum.
    """
    curvature_EN = (product_EBN * code_EBN).sum(dim=1)
    optimum_EN = scale_EN + (gradient_EBN * code_EBN).sum(dim=1) / curvature_EN.where(curvature_EN > 0, torch.inf)
    moved_EN = stored(optimum_EN, grid.scale_dtype) - scale_EN
    return moved_EN if refit.signed else moved_EN.where(optimum_EN > 0, 0.0)
