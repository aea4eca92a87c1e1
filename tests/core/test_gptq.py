"""The solve and its refinement against textbook GPTQ, LDLQ and coordinate descent in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import problems
import reference
from fourfold.core import gptq, grid
from fourfold.core.gptq import Damping, Factor, Refit
from fourfold.core.kernels import cpu
from grids import grid_for, int4
from problems import GROUP

ORDERS = ["activation", "group-aware", "natural"]
DAMPING = Damping(delta=0.05, kind="diagonal", floor=1e-4, retries=(0.1, 0.2, 0.5, 1.0))
SIGNED, UNSIGNED = Refit(signed=True), Refit(signed=False)
UNDAMPED = Damping(delta=0.0, kind="diagonal", floor=0.0, retries=())

Inblock = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def weight_ENK() -> Tensor:
    return problems.make().weight_ENK.double()


@pytest.fixture(scope="module")
def hessian_EKK() -> Tensor:
    return problems.hessians(problems.make())


@pytest.fixture(scope="module")
def scale_ENG(weight_ENK: Tensor) -> Tensor:
    """Half of them negative; small enough that codes are clamped at either end."""
    scale_ENG = grid.absmax_scales(weight_ENK.float(), int4(GROUP)).double() * 0.75
    sign_ENG = torch.rand(scale_ENG.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    return torch.where(sign_ENG, scale_ENG, -scale_ENG).bfloat16().double()


def factorize(hessian_EKK: Tensor, order: str = "activation", settings: Damping = DAMPING) -> tuple[Factor, Tensor]:
    """The factor, and the damped Hessians that it is of."""
    damped_EKK = hessian_EKK.clone()
    return gptq.factorize_(damped_EKK, settings, order, GROUP), damped_EKK


def refit_of(dtype: str) -> Refit | None:
    return Refit(signed=True) if dtype else None


def damped(hessian_EKK: Tensor, expert: int) -> NDArray[np.float64]:
    return reference.damp(problems.array(hessian_EKK[expert]), 0.05, "diagonal", 1e-4)


def order_of(hessian_EKK: Tensor, expert: int, kind: str) -> list[int]:
    return reference.order_columns(hessian_EKK[expert].diagonal().tolist(), kind, GROUP)


def error_of(weight_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor) -> Tensor:
    return weight_ENK - codes_ENK * grid.spread(scale_ENG, GROUP)


def proxy_E(error_ENK: Tensor, hessian_EKK: Tensor) -> Tensor:
    return torch.einsum("enk,ekl,enl->e", error_ENK.double(), hessian_EKK.double(), error_ENK.double())


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


# ---- order


@pytest.mark.parametrize("kind", ORDERS)
def test_orders_follow_the_definition_with_ties(kind: str) -> None:
    diagonal_EK = integers(0, 12, 5, 256, seed=1)  # many equal columns, many groups with equal largest
    found = gptq.order_columns(diagonal_EK, kind, GROUP)
    assert found.tolist() == [reference.order_columns(row, kind, GROUP) for row in diagonal_EK.tolist()]


def test_group_aware_order_is_of_whole_groups() -> None:
    diagonal_EK = torch.tensor([[1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 9.0, 0.0]])
    assert gptq.order_columns(diagonal_EK, "group-aware", 2).tolist() == [[3, 2, 6, 7, 4, 5, 1, 0]]
    assert gptq.order_columns(diagonal_EK, "activation", 2).tolist() == [[3, 6, 4, 5, 1, 2, 0, 7]]
    assert gptq.order_columns(diagonal_EK, "natural", 2).tolist() == [list(range(8))]


# ---- factor


@pytest.mark.parametrize("order", ORDERS)
def test_factor_is_of_the_damped_hessian(hessian_EKK: Tensor, order: str) -> None:
    factor, damped_EKK = factorize(hessian_EKK, order)
    for expert in range(3):
        wanted = damped(hessian_EKK, expert)
        assert np.allclose(problems.array(damped_EKK[expert]), wanted, rtol=1e-14)
        places = order_of(hessian_EKK, expert, order)
        assert factor.order_EK[expert].tolist() == places
        unit, pivot = problems.array(factor.unit_EKK[expert]), problems.array(factor.pivot_EK[expert])
        assert (unit == np.triu(unit)).all() and (np.diag(unit) == 1).all() and (pivot > 0).all()
        assert np.abs(unit @ np.diag(pivot) @ unit.T - wanted[np.ix_(places, places)]).max() < 1e-12 * wanted.max()
        unit_again, pivot_again = reference.unit_factor(wanted[np.ix_(places, places)])
        assert np.allclose(unit, unit_again, atol=1e-10) and np.allclose(pivot, pivot_again, rtol=1e-10)
        assert [factor.natural_pivot()[expert, j].item() for j in places] == pivot.tolist()
    assert factor.delta_E.tolist() == [0.05] * 3 and not factor.diagonal_E.any()


@pytest.mark.parametrize("panel", [7, 64, 100])
def test_a_factor_in_panels_is_that_of_one(hessian_EKK: Tensor, monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    whole, _ = factorize(hessian_EKK)
    monkeypatch.setattr(gptq, "PANEL", panel)
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        found, _ = factorize(hessian_EKK.to(dtype), "activation")
        assert torch.equal(found.order_EK, whole.order_EK)
        assert torch.allclose(found.unit_EKK.double(), whole.unit_EKK, atol=close)
        assert torch.allclose(found.pivot_EK.double(), whole.pivot_EK, rtol=close)


def pair(correlation: float) -> Tensor:
    """Columns 0 and 1 of eight have this product; the others are alone. Not positive definite from 1 on."""
    matrix = torch.eye(8)
    matrix[0, 1] = matrix[1, 0] = correlation
    return matrix


def test_an_expert_whose_factor_fails_is_tried_again_alone() -> None:
    """1.05 holds .5 and 1.0499, not 1.15: that wants 1.2; 1.8 wants 2; 2.5 is never positive definite."""
    stack = torch.stack([pair(0.5), pair(1.15), pair(1.0499), pair(2.5), pair(1.8)])
    damped_EKK = stack.clone()
    factor = gptq.factorize_(damped_EKK, DAMPING, "natural", 8)
    assert factor.delta_E.tolist() == pytest.approx([0.05, 0.2, 0.05, 1.0, 1.0])
    assert factor.diagonal_E.tolist() == [False, False, False, True, False]
    diagonal_EK = damped_EKK.diagonal(dim1=1, dim2=2)
    assert torch.allclose(diagonal_EK, (1 + factor.delta_E + 1e-4)[:, None].expand(5, 8))
    for expert in (0, 1, 2, 4):
        unit, pivot = factor.unit_EKK[expert], factor.pivot_EK[expert]
        assert torch.allclose(unit @ torch.diag(pivot) @ unit.T, damped_EKK[expert], atol=1e-6)
        assert damped_EKK[expert, 0, 1] == stack[expert, 0, 1]
    assert torch.equal(damped_EKK[3], torch.diag(diagonal_EK[3]))  # refinement then sees the same diagonal
    assert torch.equal(factor.unit_EKK[3], torch.eye(8)) and torch.equal(factor.pivot_EK[3], diagonal_EK[3])
    alone = gptq.factorize_(stack[:1].clone(), DAMPING, "natural", 8)
    assert torch.equal(alone.unit_EKK[0], factor.unit_EKK[0]) and torch.equal(alone.pivot_EK[0], factor.pivot_EK[0])


def test_a_diagonal_in_place_of_the_factor_is_plain_rounding() -> None:
    hessian_EKK = (pair(2.5) + torch.diag(torch.arange(8.0)))[None]
    hessian_EKK[0, 0, 1] = hessian_EKK[0, 1, 0] = 100
    weight_ENK = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    scale_ENG = grid.absmax_scales(weight_ENK, int4(4))
    factor = gptq.factorize_(hessian_EKK, DAMPING, "activation", 4)
    assert factor.diagonal_E.all()
    assert torch.equal(factor.natural_pivot(), hessian_EKK.diagonal(dim1=1, dim2=2))
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    assert torch.equal(codes_ENK, grid.round_to_nearest(weight_ENK, scale_ENG, int4()))
    refined = gptq.refine(weight_ENK, codes_ENK, scale_ENG, hessian_EKK, 2, None, int4())
    assert torch.equal(refined[0], codes_ENK)


def test_a_factor_of_what_is_not_finite_fails_instead_of_raising() -> None:
    stack = torch.stack([pair(0.5), pair(torch.nan)])
    factor = gptq.factorize_(stack, DAMPING, "natural", 8)
    assert factor.diagonal_E.tolist() == [False, True] and factor.unit_EKK.isfinite().all()


# ---- codes


@pytest.mark.parametrize("order", ORDERS)
def test_codes_are_those_of_textbook_gptq(
    weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor, order: str
) -> None:
    factor, _ = factorize(hessian_EKK, order)
    found = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    assert found.dtype == torch.int8 and found.min() == -8 and found.max() == 7
    for expert in range(3):
        inputs = problems.array(weight_ENK[expert]), problems.array(scale_ENG[expert])
        places = order_of(hessian_EKK, expert, order)
        wanted, loss = reference.gptq(*inputs, damped(hessian_EKK, expert), places)
        assert (found[expert].numpy() == wanted).all()
        wanted, step_NK = reference.ldlq(*inputs, damped(hessian_EKK, expert), places)
        assert (found[expert].numpy() == wanted).all()
        error_NK = inputs[0] - reference.dequantize(wanted, inputs[1])
        proxy = reference.proxy(error_NK, damped(hessian_EKK, expert))
        assert proxy == pytest.approx(float((problems.array(factor.pivot_EK[expert]) * step_NK**2).sum()), rel=1e-12)
        assert proxy == pytest.approx(loss, rel=1e-12)  # what GPTQ logs


@pytest.mark.parametrize("block", [32, 256, 40, 1])
def test_blocks_do_not_matter(
    weight_ENK: Tensor,
    hessian_EKK: Tensor,
    scale_ENG: Tensor,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factor, _ = factorize(hessian_EKK)
    wanted = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    monkeypatch.setattr(gptq, "BLOCK", block)
    assert torch.equal(gptq.solve_codes(weight_ENK, scale_ENG, factor, int4()), wanted)


def test_blocks_need_not_divide_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.make(inputs=96, seed=4)
    hessian_EKK, weight_ENK = problems.hessians(problem), problem.weight_ENK.double()
    scale_ENG = grid.absmax_scales(problem.weight_ENK, int4(GROUP)).double()
    monkeypatch.setattr(gptq, "BLOCK", 64)
    found = gptq.solve_codes(weight_ENK, scale_ENG, factorize(hessian_EKK)[0], int4())
    wanted, _ = reference.gptq(
        problems.array(weight_ENK[1]),
        problems.array(scale_ENG[1]),
        damped(hessian_EKK, 1),
        order_of(hessian_EKK, 1, "activation"),
    )
    assert (found[1].numpy() == wanted).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_do_not_see_each_other(
    weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor, dtype: torch.dtype
) -> None:
    stacks = weight_ENK.to(dtype), scale_ENG.to(dtype), hessian_EKK.to(dtype)

    def solve(experts: list[int]) -> Tensor:
        weight, scale, hessian = (stack[experts] for stack in stacks)
        return gptq.solve_codes(weight, scale, factorize(hessian)[0], int4())

    together = solve([0, 1, 2])
    assert torch.equal(solve([2, 0, 1]), together[[2, 0, 1]])
    for expert in range(3):
        assert torch.equal(solve([expert]), together[expert : expert + 1])
    assert torch.equal(solve([0, 1, 2]), together)


def test_what_must_not_change_the_codes(weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor) -> None:
    factor, _ = factorize(hessian_EKK)
    wanted = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    assert torch.equal(gptq.solve_codes(weight_ENK, scale_ENG, factorize(7 * hessian_EKK)[0], int4()), wanted)
    assert torch.equal(gptq.solve_codes(-weight_ENK, -scale_ENG, factor, int4()), wanted)
    assert torch.equal(gptq.solve_codes(3 * weight_ENK, 3 * scale_ENG, factor, int4()), wanted)


def test_fp32_is_enough(weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor) -> None:
    double = gptq.solve_codes(weight_ENK, scale_ENG, factorize(hessian_EKK)[0], int4())
    single = gptq.solve_codes(weight_ENK.float(), scale_ENG.float(), factorize(hessian_EKK.float())[0], int4())
    assert (single == double).float().mean() >= 0.999
    proxies = [proxy_E(error_of(weight_ENK, codes, scale_ENG), factorize(hessian_EKK)[1]) for codes in (single, double)]
    assert torch.allclose(proxies[0], proxies[1], rtol=1e-3)


def test_dead_channels_are_plainly_rounded(weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor) -> None:
    dead = [0, 37, 38, 255]
    hessian_EKK = hessian_EKK.clone()
    hessian_EKK[:, dead], hessian_EKK[:, :, dead] = 0, 0
    factor, _ = factorize(hessian_EKK)
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    rounded_ENK = grid.round_to_nearest(weight_ENK, scale_ENG, int4())
    assert not factor.diagonal_E.any() and factor.delta_E.tolist() == [0.05] * 3
    assert torch.equal(codes_ENK[..., dead], rounded_ENK[..., dead]) and not torch.equal(codes_ENK, rounded_ENK)
    living = [column for column in range(256) if column not in dead]
    moved_ENK = weight_ENK.clone()
    moved_ENK[..., dead] += 1  # a dead channel's error goes nowhere
    assert torch.equal(gptq.solve_codes(moved_ENK, scale_ENG, factor, int4())[..., living], codes_ENK[..., living])


@pytest.mark.parametrize("order", ORDERS)
def test_feedback_pays(weight_ENK: Tensor, hessian_EKK: Tensor, scale_ENG: Tensor, order: str) -> None:
    factor, damped_EKK = factorize(hessian_EKK, order)
    scale_ENG = scale_ENG.abs() / 0.75
    codes = (
        gptq.solve_codes(weight_ENK, scale_ENG, factor, int4()),
        grid.round_to_nearest(weight_ENK, scale_ENG, int4()),
    )
    solved, rounded = (proxy_E(error_of(weight_ENK, c, scale_ENG), damped_EKK) for c in codes)
    assert (solved < 0.8 * rounded).all()


# ---- the serial kernel


@pytest.mark.parametrize("inblock", [gptq.inblock, gptq.inblock_torch], ids=["native", "torch"])
@settings(max_examples=60, deadline=None)
@given(columns=st.integers(1, 40), rows=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_inblock_is_column_by_column_in_exact_arithmetic(inblock: Inblock, columns: int, rows: int, seed: int) -> None:
    """Halves, quarters and few bits: no operation rounds, ties are real ties, so every bit must be equal."""
    scale = 2.0 ** integers(-1, 1, 2, rows, columns, seed=seed) * (1 - 2 * integers(0, 2, 2, rows, columns, seed=1))
    target, weight = integers(-24, 25, 2, 2, rows, columns, seed=seed + 1) / 4
    feedback = integers(-1, 2, 2, columns, columns, seed=seed + 2) / 2
    feedback *= torch.rand(feedback.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    unread = torch.where(torch.ones(columns, columns).triu(1) > 0, feedback, torch.nan)
    codes, error = inblock(target.clone(), weight, unread, scale, int4())
    assert codes.dtype == torch.int8
    for expert in range(2):
        arrays = (problems.array(tensor[expert]) for tensor in (target, weight, feedback, scale))
        wanted_codes, wanted_error = reference.in_block(*arrays)
        assert (codes[expert].numpy() == wanted_codes).all() and (error[expert].numpy() == wanted_error).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_native_inblock_is_torchs_on_any_number_of_threads(threads: int) -> None:
    """Rows that fill no part of the kernel's, views with strides, a scale for the whole row."""
    weight_ENK = problems.make(experts=2, outputs=150, seed=9).weight_ENK
    target_ENB, weight_ENB = weight_ENK[:, :, 32:160] * 1.01, weight_ENK[:, :, 32:160]
    feedback_EBB = 0.1 * torch.randn(2, 200, 200, generator=torch.Generator().manual_seed(1))[:, 7:135, 7:135]
    scale_ENB = (weight_ENB.abs().amax(dim=2, keepdim=True) / 7).expand_as(weight_ENB)
    given = target_ENB, weight_ENB, feedback_EBB, scale_ENB
    wanted = gptq.inblock_torch(*given, int4())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = gptq.inblock(*given, int4())
    torch.set_num_threads(before)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("rows", "columns"), [(5, 40), (1, 40), (5, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_inblock_changes_no_input(rows: int, columns: int, transposed: bool) -> None:
    def filled(seed: int) -> Tensor:
        values = integers(1, 25, 2, rows, columns, seed=seed) / 4
        return values.mT.contiguous().mT if transposed else values

    inputs = [filled(0), filled(1), torch.full((2, columns, columns), 0.25), filled(2)]
    before = [tensor.clone() for tensor in inputs]
    gptq.inblock(*inputs, int4())
    assert all(torch.equal(tensor, old) for tensor, old in zip(inputs, before, strict=True))


def test_inblock_rounds_half_to_even_and_clamps() -> None:
    values = [-8.6, -8.5, -7.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0]
    target = torch.tensor(values)[None, None]
    codes, error = gptq.inblock(target, target, torch.zeros(1, 11, 11), torch.ones_like(target), int4())
    assert codes.flatten().tolist() == [-8, -8, -8, -2, 0, 0, 2, 2, 6, 7, 7]
    assert torch.equal(error, target - codes)
    codes, _ = gptq.inblock(target, target, torch.zeros(1, 11, 11), -torch.ones_like(target), int4())
    assert codes.flatten().tolist() == [7, 7, 7, 2, 0, 0, -2, -2, -6, -8, -8]  # the larger side is the other one


# ---- refinement


def exact_problem(seed: int) -> dict[str, Tensor]:
    """Dyadic numbers of few bits and a power of two on every diagonal: coordinate descent without rounding.

    128 inputs in groups of 32; H is block-sparse enough for a group's gradient to be exact in fp32.
    """
    half_EKK = integers(-1, 2, 2, 128, 128, seed=seed).triu(1) / 8
    half_EKK *= torch.rand(half_EKK.shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    diagonal_EK = 2.0 ** integers(0, 3, 2, 128, seed=seed + 1)
    scale_ENG = 2.0 ** integers(-1, 2, 2, 6, 4, seed=seed + 2) * (1 - 2 * integers(0, 2, 2, 6, 4, seed=seed + 3))
    return {
        "hessian_EKK": half_EKK + half_EKK.mT + torch.diag_embed(diagonal_EK),
        "target_ENK": integers(-40, 41, 2, 6, 128, seed=seed + 4) / 4,
        "codes_ENK": integers(-8, 8, 2, 6, 128, seed=seed + 5).to(torch.int8),
        "scale_ENG": scale_ENG,
    }


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_descend_exactly(seed: int, passes: int) -> None:
    given = exact_problem(seed)
    codes_ENK, scale_ENG = gptq.refine(**given, passes=passes, refit=None, grid=int4())
    assert torch.equal(scale_ENG, given["scale_ENG"]) and not torch.equal(codes_ENK, given["codes_ENK"])
    for expert in range(2):
        wanted = reference.coordinate_descent(
            problems.array(given["target_ENK"][expert]),
            given["codes_ENK"][expert].long().numpy(),
            problems.array(given["scale_ENG"][expert]),
            problems.array(given["hessian_EKK"][expert]),
            passes,
            "",
        )
        assert (codes_ENK[expert].numpy() == wanted[0]).all()


@pytest.fixture(scope="module")
def started(weight_ENK: Tensor, hessian_EKK: Tensor) -> dict[str, Tensor]:
    """What refinement is given: fp32, as `solve_codes` leaves it with absmax scales."""
    weight_ENK = weight_ENK.float()
    factor, damped_EKK = factorize(hessian_EKK.float())
    scale_ENG = grid.absmax_scales(weight_ENK, int4(GROUP))
    scale_ENG[:, ::2] *= -1
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    return {"target_ENK": weight_ENK, "codes_ENK": codes_ENK, "scale_ENG": scale_ENG, "hessian_EKK": damped_EKK}


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_refinement_is_coordinate_descent(started: dict[str, Tensor], dtype: str) -> None:
    rounded_ENK = grid.round_to_nearest(started["target_ENK"], started["scale_ENG"], int4())
    codes_ENK, scale_ENG = gptq.refine(
        **(started | {"codes_ENK": rounded_ENK}), passes=2, refit=refit_of(dtype), grid=int4(dtype=dtype or "bf16")
    )
    codes_before = rounded_ENK.long().numpy()
    for expert in range(2):
        names = ("target_ENK", "scale_ENG", "hessian_EKK")
        target_NK, scale_NG, hessian_KK = (problems.array(started[name][expert]) for name in names)
        wanted_codes, wanted_scales = reference.coordinate_descent(
            target_NK, codes_before[expert], scale_NG, hessian_KK, 2, dtype
        )
        assert (scale_ENG[expert].numpy() == wanted_scales).mean() >= 0.99
        assert (codes_ENK[expert].numpy() == wanted_codes).mean() >= 0.998  # a tie that falls otherwise moves its row
        assert (wanted_codes == codes_before[expert]).mean() < 0.9
        error_NK = target_NK - reference.dequantize(codes_ENK[expert].long().numpy(), problems.array(scale_ENG[expert]))
        wanted_error_NK = target_NK - reference.dequantize(wanted_codes, wanted_scales)
        found, wanted = reference.proxy(error_NK, hessian_KK), reference.proxy(wanted_error_NK, hessian_KK)
        assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
@pytest.mark.parametrize("start", ["solved", "rounded", "random"])
def test_the_proxy_never_rises(started: dict[str, Tensor], dtype: str, start: str) -> None:
    target_ENK, hessian_EKK, scale_ENG = (started[name] for name in ("target_ENK", "hessian_EKK", "scale_ENG"))
    codes_ENK = {
        "solved": started["codes_ENK"],
        "rounded": grid.round_to_nearest(target_ENK, scale_ENG, int4()),
        "random": integers(-8, 8, *target_ENK.shape, seed=9).to(torch.int8),
    }[start]
    proxies = [proxy_E(error_of(target_ENK.double(), codes_ENK, scale_ENG.double()), hessian_EKK)]
    for _ in range(4):
        codes_ENK, scale_ENG = gptq.refine(
            target_ENK, codes_ENK, scale_ENG, hessian_EKK, 1, refit_of(dtype), int4(dtype=dtype or "bf16")
        )
        proxies.append(proxy_E(error_of(target_ENK.double(), codes_ENK, scale_ENG.double()), hessian_EKK))
        assert (proxies[-1] <= proxies[-2] * (1 + 1e-6)).all()
    assert (proxies[1] < proxies[0]).all()


def test_two_passes_are_one_and_one_more(started: dict[str, Tensor]) -> None:
    codes_ENK, scale_ENG = gptq.refine(**started, passes=1, refit=SIGNED, grid=int4())
    again: dict[str, Any] = started | {"codes_ENK": codes_ENK, "scale_ENG": scale_ENG}
    once_more = gptq.refine(**again, passes=1, refit=SIGNED, grid=int4())
    twice = gptq.refine(**started, passes=2, refit=SIGNED, grid=int4())
    # the error is summed up anew between the calls, which may settle a tie otherwise
    assert (once_more[0] == twice[0]).float().mean() > 0.998
    assert torch.equal(gptq.refine(**started, passes=2, refit=SIGNED, grid=int4())[0], twice[0])


def test_refinement_returns_new_tensors(started: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in started.items()}
    codes_ENK, scale_ENG = gptq.refine(**started, passes=0, refit=SIGNED, grid=int4())
    assert torch.equal(codes_ENK, before["codes_ENK"]) and torch.equal(scale_ENG, before["scale_ENG"])
    codes_ENK.zero_()
    scale_ENG.zero_()
    codes_ENK, scale_ENG = gptq.refine(**started, passes=1, refit=SIGNED, grid=int4())
    assert codes_ENK.dtype == torch.int8 and codes_ENK.min() >= -8 and codes_ENK.max() <= 7
    for name, tensor in started.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_refined_scales_are_as_stored(started: dict[str, Tensor], dtype: str) -> None:
    _, scale_ENG = gptq.refine(**started, passes=1, refit=refit_of(dtype), grid=int4(dtype=dtype or "bf16"))
    assert (scale_ENG != started["scale_ENG"]).float().mean() > 0.5
    moved = scale_ENG[scale_ENG != started["scale_ENG"]]
    assert torch.equal(moved, grid.stored(moved, dtype))


def test_codes_of_zero_leave_their_scale(started: dict[str, Tensor]) -> None:
    target_ENK, codes_ENK = started["target_ENK"].clone(), started["codes_ENK"].clone()
    target_ENK[:], codes_ENK[:] = 0, 0
    zeros: dict[str, Any] = started | {"target_ENK": target_ENK, "codes_ENK": codes_ENK}
    codes, scales = gptq.refine(**zeros, passes=2, refit=SIGNED, grid=int4())
    assert not codes.any() and torch.equal(scales, started["scale_ENG"])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("refit", [None, SIGNED, UNSIGNED], ids=["codes", "bf16", "fp16"])
@pytest.mark.parametrize("loudness", [1.0, 2e-4])
def test_native_refinement_step_is_torchs(loudness: float, refit: Refit | None, threads: int) -> None:
    """Parts of rows that are not full, several experts, a group in the middle; the least scales are FP16 subnormals."""
    generator = torch.Generator().manual_seed(7)
    target_EKN = torch.randn(2, 96, 70, generator=generator) * loudness
    code_EKN = torch.randint(-8, 8, target_EKN.shape, generator=generator).float()
    scale_EGN = grid.stored(torch.rand(2, 3, 70, generator=generator) * loudness / 4, "bf16")
    input_EKT = torch.randn(2, 96, 300, generator=generator)
    hessian_EKK = input_EKT @ input_EKT.mT
    error_EKN = target_EKN - code_EKN * scale_EGN.repeat_interleave(32, dim=1)
    block = slice(32, 64)
    given = torch.bmm(hessian_EKK[:, block], error_EKN), torch.bmm(hessian_EKK[:, block, block], code_EKN[:, block])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    states = []
    for step in (cpu.refine_group_, gptq.refine_group_torch_):
        state = target_EKN, error_EKN.clone(), code_EKN.clone(), scale_EGN.clone()
        step(1, given[0].clone(), given[1].clone(), hessian_EKK[:, block, block], state, refit, grid_for(refit))
        states.append(state)
    torch.set_num_threads(before)
    (_, error, code, scale), (_, error_torch, code_torch, scale_torch) = states
    assert torch.equal(scale, scale_torch) and torch.equal(scale, scale_EGN) == (refit is None)
    assert (code != code_torch).float().mean() < 1e-3 and not torch.equal(code, code_EKN)
    same = code == code_torch
    assert torch.allclose(error[same], error_torch[same], rtol=1e-5, atol=1e-6 * loudness)
    others = [place for place in range(96) if not 32 <= place < 64]
    assert torch.equal(code[:, others], code_EKN[:, others]) and torch.equal(error[:, others], error_EKN[:, others])
