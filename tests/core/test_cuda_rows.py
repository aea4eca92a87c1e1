"""The Triton kernels for rows that see each other against the torch functions. See test_cuda.py for how they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.core import gptq, grid
from fourfold.core.gptq import Refit
from fourfold.core.kernels import cuda_rows
from grids import grid_for, int4

pytest.importorskip("triton")
SIGNED, UNSIGNED = Refit(signed=True), Refit(signed=False)
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


@pytest.fixture(autouse=True)
def _small_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow: several tiles with few rows."""
    if device == "cpu":
        monkeypatch.setattr(cuda_rows, "ROWS", 4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(12, 9), (16, 3), (1, 5)])
def test_codes_by_rows_are_those_of_torch(columns: int, rows: int, shared: bool, device: str) -> None:
    experts, columns, rows = (EXPERTS, columns, rows) if device == "cpu" else (9, 8 * columns, 30 * rows)
    weight_ENB = normal(experts, rows, columns, seed=0)
    target_ENB = weight_ENB + 0.1 * normal(experts, rows, columns, seed=1)
    scale_ENB = grid.stored(0.1 + 0.1 * normal(experts, rows, columns, seed=2).abs(), "bf16")
    feedback_EBB = upper(0.2 * normal(experts, columns, columns, seed=3) / columns**0.5)
    unit_ENN = upper(0.5 * normal(1 if shared else experts, rows, rows, seed=4) / rows**0.5)
    given = target_ENB, weight_ENB, feedback_EBB, scale_ENB, unit_ENN
    wanted_codes, wanted_fed = gptq.inblock_by_rows_torch(*given, int4())
    codes, fed = (values.cpu() for values in cuda_rows.inblock_by_rows(*(each.to(device) for each in given), int4()))
    assert same(codes, wanted_codes, device) and codes.any() and codes.dtype == torch.int8
    if device == "cpu":
        torch.testing.assert_close(fed, wanted_fed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("refit", [None, SIGNED, UNSIGNED], ids=["codes", "bf16", "fp16"])
@pytest.mark.parametrize(("columns", "rows"), [(12, 9), (16, 3)])
def test_refinement_by_rows_is_that_of_torch(
    columns: int, rows: int, refit: Refit | None, shared: bool, device: str
) -> None:
    columns, rows = (columns, rows) if device == "cpu" else (8 * columns, 30 * rows)
    inputs = GROUPS * columns
    input_EKT = normal(EXPERTS, inputs, 4 * inputs, seed=0)
    root_ENT = normal(1 if shared else EXPERTS, rows, rows, seed=1)
    hessian_EKK, metric_ENN = input_EKT @ input_EKT.mT / inputs, root_ENT @ root_ENT.mT + torch.eye(rows)
    relative_ENN = metric_ENN / metric_ENN.diagonal(dim1=1, dim2=2)[:, None]
    target_EKN = normal(EXPERTS, inputs, rows, seed=2)
    scale_EGN = 0.2 + 0.2 * torch.rand(EXPERTS, GROUPS, rows, generator=torch.Generator().manual_seed(3))
    scale_EGN = grid.stored(scale_EGN, "bf16")
    wide_EKN = scale_EGN.repeat_interleave(columns, dim=1)
    code_EKN = ((target_EKN + 0.3 * normal(EXPERTS, inputs, rows, seed=4)) / wide_EKN).round()
    code_EKN[..., 0] *= -1  # whose scale would become negative, where it may
    code_EKN.clamp_(-8, 7)
    block = slice(columns, 2 * columns)
    outcomes: list[tuple[Tensor, ...]] = []
    for kernel_, place in ((cuda_rows.refine_by_rows_, device), (gptq.refine_by_rows_torch_, "cpu")):
        error_EKN = target_EKN - code_EKN * wide_EKN
        state = tuple(values.clone().to(place) for values in (target_EKN, error_EKN, code_EKN, scale_EGN))
        hessian_EBB = hessian_EKK[:, block, block]
        group = (hessian_EKK[:, block] @ error_EKN, hessian_EBB @ code_EKN[:, block], hessian_EBB)
        on_device = tuple(each.to(place) for each in group)
        kernel_(1, on_device, relative_ENN.to(place), state, refit, grid_for(refit))
        outcomes.append(tuple(values.cpu() for values in (*state, on_device[0])))
    (_, error, code, scale, gradient), (_, error_torch, code_torch, scale_torch, gradient_torch) = outcomes
    assert same(code, code_torch, device) and (code != code_EKN).float().mean() > 0.02
    assert same(scale, scale_torch, device) and torch.equal(scale, scale_EGN) == (refit is None)
    assert torch.equal(code[:, :columns], code_EKN[:, :columns])
    if device == "cpu":
        torch.testing.assert_close(error, error_torch, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, gradient_torch, rtol=1e-4, atol=1e-4)
