"""The Triton kernels for rows that see each other against the torch functions. See test_cuda.py for how they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.core import gptq, grid
from fourfold.core.gptq import Refit
from fourfold.core.kernels import cuda_rows

pytest.importorskip("triton")
SIGNED = Refit(dtype="bf16", signed=True)
EXPERTS, GROUPS = 2, 3


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def upper(matrix_ENN: Tensor) -> Tensor:
    """NaN where a kernel must not read."""
    return torch.where(torch.ones(matrix_ENN.shape[1:]).triu(1) > 0, matrix_ENN, torch.nan)


def same(found: Tensor, wanted: Tensor, device: str) -> bool:
    """All codes, but for ties on a GPU, where there are many more of them: what follows a tie in its tile is free."""
    differing = (found.cpu() != wanted).float().mean().item()
    return differing == 0 if device == "cpu" else differing < 5e-3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("columns", "rows", "start", "count"), [(12, 9, 3, 5), (16, 17, 0, 17), (1, 3, 1, 1)])
def test_solved_tiles_are_those_of_torch(
    columns: int, rows: int, start: int, count: int, shared: bool, device: str
) -> None:
    experts = EXPERTS
    if device == "cuda":
        experts, columns, rows, start, count = 9, 8 * columns, 20 * rows, 20 * start, min(4 * count, gptq.ROWS)
    weight_EBN = normal(experts, columns, rows, seed=0)
    target_EBN = weight_EBN + 0.1 * normal(experts, columns, rows, seed=1)
    scale_EBN = grid.stored(0.1 + 0.1 * normal(experts, columns, rows, seed=2).abs(), "bf16")
    given = target_EBN, weight_EBN, scale_EBN
    feedback_EBB = upper(0.2 * normal(experts, columns, columns, seed=3))
    unit_ENN = upper(0.2 * normal(1 if shared else experts, rows, rows, seed=4))
    carried_EBR = 0.1 * normal(experts, columns, count, seed=5)
    wanted = torch.zeros_like(target_EBN, dtype=torch.int8), torch.zeros_like(target_EBN), torch.zeros_like(target_EBN)
    found = tuple(values.clone().to(device) for values in wanted)
    gptq.solve_tile_torch_(start, carried_EBR, given, feedback_EBB, unit_ENN, wanted)
    on_device = tuple(values.to(device) for values in given)
    matrices = feedback_EBB.to(device), unit_ENN.to(device)
    cuda_rows.solve_tile_(start, carried_EBR.to(device), on_device, *matrices, found)
    assert same(found[0], wanted[0], device) and wanted[0].any() and not found[0][..., start + count :].any()
    alike = found[0].cpu() == wanted[0]
    error_EBN = (weight_EBN - found[0].cpu() * scale_EBN)[..., start : start + count]
    torch.testing.assert_close(found[2].cpu()[..., start : start + count], error_EBN, rtol=1e-5, atol=1e-6)
    if device == "cpu":
        torch.testing.assert_close(found[1][alike], wanted[1][alike], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refit", [None, SIGNED, Refit(dtype="fp16", signed=False)], ids=["codes", "bf16", "fp16"])
@pytest.mark.parametrize(("columns", "rows", "start", "count"), [(12, 9, 3, 5), (16, 6, 0, 6)])
def test_refined_tiles_are_those_of_torch(
    columns: int, rows: int, start: int, count: int, refit: Refit | None, device: str
) -> None:
    if device == "cuda":
        columns, rows, start, count = 8 * columns, 20 * rows, 20 * start, 8 * count
    inputs = GROUPS * columns
    input_EKT, root_ENT = normal(EXPERTS, inputs, 4 * inputs, seed=0), normal(1, rows, rows, seed=1)
    hessian_EKK, metric_ENN = input_EKT @ input_EKT.mT / inputs, root_ENT @ root_ENT.mT + torch.eye(rows)
    relative_ENN = metric_ENN / metric_ENN.diagonal(dim1=1, dim2=2)[:, None]
    target_EKN = normal(EXPERTS, inputs, rows, seed=2)
    scale_EGN = 0.2 + 0.2 * torch.rand(EXPERTS, GROUPS, rows, generator=torch.Generator().manual_seed(3))
    scale_EGN = grid.stored(scale_EGN, "bf16")
    wide_EKN = scale_EGN.repeat_interleave(columns, dim=1)
    code_EKN = ((target_EKN + 0.3 * normal(EXPERTS, inputs, rows, seed=4)) / wide_EKN).round().clamp(-8, 7)
    block = slice(columns, 2 * columns)
    hessian_EBB = hessian_EKK[:, block, block].contiguous()
    outcomes: list[tuple[Tensor, ...]] = []
    for step_, place in ((cuda_rows.refine_tile_, device), (gptq.refine_tile_torch_, "cpu")):
        error_EKN = target_EKN - code_EKN * wide_EKN
        state = tuple(values.clone().to(place) for values in (target_EKN, error_EKN, code_EKN, scale_EGN))
        gradient_EBN = hessian_EKK[:, block] @ error_EKN
        carried_EBR = gradient_EBN @ relative_ENN[..., start : start + count]
        group = tuple(each.to(place) for each in (gradient_EBN, hessian_EBB @ code_EKN[:, block], hessian_EBB))
        step_(1, start, carried_EBR.to(place), group, relative_ENN.to(place), state, refit)
        outcomes.append(tuple(values.cpu() for values in (*state, group[0])))
    (_, error, code, scale, gradient), (_, error_torch, code_torch, scale_torch, gradient_torch) = outcomes
    assert same(code, code_torch, device) and (code != code_EKN).float().mean() > 0.02
    assert same(scale, scale_torch, device) and torch.equal(scale, scale_EGN) == (refit is None)
    outside = [row for row in range(rows) if not start <= row < start + count]
    assert torch.equal(code[..., outside], code_EKN[..., outside])
    assert torch.equal(code[:, :columns], code_EKN[:, :columns])
    if device == "cpu":
        torch.testing.assert_close(error, error_torch, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, gradient_torch, rtol=1e-4, atol=1e-4)
