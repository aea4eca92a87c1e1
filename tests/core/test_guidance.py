"""The metric of the rows, and the solve and refinement that use it, against float64 and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import problems
import reference
from fourfold.core import gptq, grid, guidance, moments
from fourfold.core.gptq import Damping, Factor, Refit
from fourfold.core.guidance import RowFactor
from grids import grid_for, int4, int8
from problems import GROUP

DAMPING = Damping(delta=0.05, kind="diagonal", floor=1e-4, retries=())
SIGNED, UNSIGNED = Refit(signed=True), Refit(signed=False)
EXPERTS, OUTPUTS, INPUTS = 3, 24, 96
RTN = grid.round_to_nearest
SEARCH = grid.ScaleSearch(low=0.8, high=1.1, steps=8, signed=True)


@pytest.fixture(scope="module")
def weight_ENK() -> Tensor:
    return problems.make(outputs=OUTPUTS, inputs=INPUTS).weight_ENK.double()


@pytest.fixture(scope="module")
def scale_ENG(weight_ENK: Tensor) -> Tensor:
    scale_ENG = grid.absmax_scales(weight_ENK.float(), int4(GROUP)).double()
    scale_ENG[:, ::2] *= -1
    return scale_ENG


@pytest.fixture(scope="module")
def solved() -> tuple[Factor, Tensor]:
    """The factor of the columns, and the damped Hessians that it is of."""
    hessian_EKK = problems.hessians(problems.make(outputs=OUTPUTS, inputs=INPUTS))
    return gptq.factorize_(hessian_EKK, DAMPING, "activation", GROUP), hessian_EKK


def metrics(experts: int = EXPERTS, outputs: int = OUTPUTS, seed: int = 1) -> Tensor:
    """Second moments of correlated gradients, loud and quiet ones, float64 [E, N, N]."""
    generator = torch.Generator().manual_seed(seed)
    mixing_ENN = torch.randn(experts, outputs, outputs // 2, generator=generator, dtype=torch.float64)
    loudness_EN1 = torch.rand(experts, outputs, 1, generator=generator, dtype=torch.float64) + 0.2
    mixing_ENN = mixing_ENN * loudness_EN1
    return mixing_ENN @ mixing_ENN.mT


def identity(outputs: int = OUTPUTS, times: float = 3.0) -> Tensor:
    return times * torch.eye(outputs, dtype=torch.float64)[None]


def single(rows: RowFactor) -> RowFactor:
    return RowFactor(
        rows.metric_ENN.float(), rows.unit_ENN.float(), rows.pivot_EN.float(), rows.order_EN, rows.diagonal_E
    )


def natural_metric(rows: RowFactor, expert: int = 0) -> NDArray[np.float64]:
    """The damped metric in the order of the outputs."""
    place_N = rows.order_EN[expert].argsort()
    return problems.array(rows.metric_ENN[expert][place_N][:, place_N])


def proxy_E(target_ENK: Tensor, codes_ENK: Tensor, scale_ENG: Tensor, hessian_EKK: Tensor, rows: RowFactor) -> Tensor:
    error_ENK = target_ENK.double() - codes_ENK * grid.spread(scale_ENG.double(), GROUP)
    error_ENK = gptq.take(error_ENK, rows.order_EN.expand(error_ENK.shape[:2]))
    metric_ENN = rows.metric_ENN.double()
    return (metric_ENN @ error_ENK @ hessian_EKK.double() * error_ENK).sum(dim=(1, 2))


# ---- the factor


def test_factor_is_of_the_scaled_and_damped_metric() -> None:
    metric_ENN = metrics()
    before = metric_ENN.clone()
    rows = guidance.factorize_rows(metric_ENN, 0.2)
    assert torch.equal(metric_ENN, before) and not rows.diagonal_E.any()
    for expert in range(EXPERTS):
        wanted = reference.row_metric(problems.array(metric_ENN[expert]), 0.2)
        assert np.allclose(natural_metric(rows, expert), wanted, rtol=1e-13)
        order = sorted(range(OUTPUTS), key=lambda row: -float(metric_ENN[expert, row, row]))
        assert rows.order_EN[expert].tolist() == order
        unit, pivot = reference.unit_factor(wanted[np.ix_(order, order)])
        assert np.allclose(problems.array(rows.unit_ENN[expert]), unit, atol=1e-11)
        assert np.allclose(problems.array(rows.pivot_EN[expert]), pivot, rtol=1e-11)


def test_the_loss_is_a_sum_over_rows_and_columns(weight_ENK: Tensor, solved: tuple[Factor, Tensor]) -> None:
    """tr(H_O Err H Err^T) = sum D_O,r D_j ((M_O^T Err M)_rj)^2 of any error."""
    factor, hessian_EKK = solved
    rows = guidance.factorize_rows(metrics(), 0.05)
    error_ENK = gptq.take(gptq.take(weight_ENK, rows.order_EN).mT, factor.order_EK).mT
    step_ENK = rows.unit_ENN.mT @ error_ENK @ factor.unit_EKK
    parts_ENK = rows.pivot_EN[..., None] * factor.pivot_EK[:, None] * step_ENK.square()
    for expert in range(EXPERTS):
        metric_NN, hessian_KK = natural_metric(rows, expert), problems.array(hessian_EKK[expert])
        wanted = reference.two_sided_proxy(problems.array(weight_ENK[expert]), hessian_KK, metric_NN)
        assert parts_ENK[expert].sum().item() == pytest.approx(wanted, rel=1e-12)


def test_a_metric_without_a_factor_is_its_diagonal(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor]
) -> None:
    metric_ENN = metrics()
    metric_ENN[1, 0, 1] = metric_ENN[1, 1, 0] = 100
    rows = guidance.factorize_rows(metric_ENN, 0.05)
    assert rows.diagonal_E.tolist() == [False, True, False]
    assert torch.equal(rows.metric_ENN[1], rows.metric_ENN[1].diagonal().diag())
    factor, hessian_EKK = solved
    plain_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows)
    assert torch.equal(codes_ENK[1], plain_ENK[1]) and not torch.equal(codes_ENK[0], plain_ENK[0])
    given = weight_ENK, plain_ENK, scale_ENG, hessian_EKK, 2, SIGNED, int4()
    (codes_ENK, refined_ENG), wanted = gptq.refine(*given, rows), gptq.refine(*given)
    assert torch.equal(codes_ENK[1], wanted[0][1]) and torch.equal(refined_ENG[1], wanted[1][1])


def test_what_is_not_finite_is_an_error_with_its_expert() -> None:
    metric_ENN = metrics()
    metric_ENN[2, 5, 5] = torch.nan
    with pytest.raises(moments.NotFinite, match="expert 2"):
        guidance.factorize_rows(metric_ENN, 0.05)


def test_the_predicted_share_is_what_the_factor_leaves() -> None:
    metric_NN = metrics(1)[0]
    damped_NN = reference.row_metric(problems.array(metric_NN), 0.2)
    order = sorted(range(OUTPUTS), key=lambda row: -float(metric_NN[row, row]))
    _, pivot_N = reference.unit_factor(damped_NN[np.ix_(order, order)])
    share = guidance.predicted_share(metric_NN, 0.2)
    assert share == pytest.approx(pivot_N.sum() / np.trace(damped_NN), rel=1e-12) and share < 0.8
    assert guidance.predicted_share(identity()[0]) == pytest.approx(1.0)


# ---- codes


def test_two_rows_by_hand() -> None:
    """Scale 1; the second row takes half of the first one's errors off: .6 becomes .45 and is rounded to 0."""
    factor = Factor(
        unit_EKK=torch.tensor([[[1, 0.5, -0.25], [0, 1, 0.5], [0, 0, 1]]]),
        pivot_EK=torch.tensor([[4.0, 2, 1]]),
        order_EK=torch.tensor([[0, 1, 2]]),
        delta_E=torch.zeros(1),
        diagonal_E=torch.tensor([False]),
    )
    unit_ENN, order_EN = torch.tensor([[[1, -0.5], [0, 1]]]), torch.tensor([[0, 1]])
    rows = RowFactor(unit_ENN @ unit_ENN.mT, unit_ENN, torch.ones(1, 2), order_EN, torch.tensor([False]))
    weight_ENK = torch.tensor([[[1.3, -0.6, 2.2], [0.6, 1.6, -1.1]]])
    # row 0: 1.3 -> 1; -.6 + .3/2 = -.45 -> 0; 2.2 - .3/4 - .6/2 = 1.825 -> 2. Its errors are .3, -.6, .2.
    # row 1: .6 - .15 = .45 -> 0; 1.6 + .3 + .45/2 = 2.125 -> 2, short by -.1; -1.1 - .1 - .45/4 - .1/2 = -1.3625 -> -1.
    ones_ENG = torch.ones(1, 2, 1)
    assert gptq.solve_codes(weight_ENK, ones_ENG, factor, int4(), rows).tolist() == [[[1, 0, 2], [0, 2, -1]]]
    assert gptq.solve_codes(weight_ENK, ones_ENG, factor, int4()).tolist() == [[[1, 0, 2], [1, 1, -1]]]


def test_each_code_is_the_best_of_all_for_its_term() -> None:
    """2 x 3: all sixteen codes are tried at each place, given those before it."""
    generator = torch.Generator().manual_seed(3)
    hessian_EKK, metric_ENN = (
        (root := torch.randn(1, size, 5, generator=generator, dtype=torch.float64)) @ root.mT for size in (3, 2)
    )
    factor, rows = gptq.factorize_(hessian_EKK, DAMPING, "natural", 3), guidance.factorize_rows(metric_ENN, 0.05)
    weight_ENK = 3 * torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
    scale_ENG = torch.full((1, 2, 1), 0.75, dtype=torch.float64)
    codes_NK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows)[0][rows.order_EN[0]].double()
    weight_NK = problems.array(weight_ENK[0][rows.order_EN[0]])
    units = problems.array(rows.unit_ENN[0]), problems.array(factor.unit_EKK[0])
    error_NK = weight_NK - 0.75 * problems.array(codes_NK)
    for place in np.ndindex(2, 3):

        def term(code: float, place: tuple[int, ...] = place) -> float:
            tried_NK = error_NK.copy()
            tried_NK[place] = weight_NK[place] - 0.75 * code
            return abs(reference.two_sided_term(tried_NK, *units, *place))

        assert min(range(-8, 8), key=term) == codes_NK[place]


def test_codes_are_those_of_the_definition(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor]
) -> None:
    factor, hessian_EKK = solved
    rows = guidance.factorize_rows(metrics(), 0.05)
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows)
    assert codes_ENK.dtype == torch.int8 and codes_ENK.shape == weight_ENK.shape
    for expert in range(EXPERTS):
        wanted = reference.two_sided_ldlq(
            problems.array(weight_ENK[expert]),
            problems.array(scale_ENG[expert]),
            problems.array(hessian_EKK[expert]),
            natural_metric(rows, expert),
            factor.order_EK[expert].tolist(),
            rows.order_EN[expert].tolist(),
        )
        assert (codes_ENK[expert].numpy() == wanted).all()


@pytest.mark.parametrize("block", [32, 40, 96, 7])
def test_blocks_do_not_matter(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = guidance.factorize_rows(metrics(), 0.05)
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, solved[0], int4(), rows)
    monkeypatch.setattr(gptq, "BLOCK", block)
    assert torch.equal(gptq.solve_codes(weight_ENK, scale_ENG, solved[0], int4(), rows), codes_ENK)


@pytest.mark.parametrize(("dtype", "outputs", "inputs"), [(torch.float32, 150, 160), (torch.float64, 9, 80)])
@pytest.mark.parametrize("refit", [None, SIGNED, UNSIGNED], ids=["codes", "bf16", "fp16"])
def test_the_identity_is_no_metric_to_the_last_bit(
    dtype: torch.dtype, outputs: int, inputs: int, refit: Refit | None
) -> None:
    """In fp32 several tiles of the native kernels, which rows and columns do not fill."""
    problem = problems.make(experts=2, outputs=outputs, inputs=inputs)
    hessian_EKK, weight_ENK = problems.hessians(problem).to(dtype), problem.weight_ENK.to(dtype)
    factor = gptq.factorize_(hessian_EKK, DAMPING, "activation", 40)
    scale_ENG = grid.absmax_scales(weight_ENK.float(), int4(40)).to(dtype) * 0.8
    rows = guidance.factorize_rows(identity(outputs).to(dtype), 0.05)
    plain_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4())
    assert torch.equal(gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows), plain_ENK)
    for codes_ENK in (plain_ENK, RTN(weight_ENK, scale_ENG, int4())):
        given = weight_ENK, codes_ENK, scale_ENG, hessian_EKK, 2, refit, grid_for(refit)
        assert all(torch.equal(*pair) for pair in zip(gptq.refine(*given, rows), gptq.refine(*given), strict=True))


def test_what_must_not_change_the_codes(weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor]) -> None:
    factor, hessian_EKK = solved
    metric_ENN = metrics()
    rows = guidance.factorize_rows(metric_ENN, 0.05)
    codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows)
    louder = guidance.factorize_rows(1e6 * metric_ENN, 0.05)
    assert torch.equal(gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), louder), codes_ENK)
    other_N = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(0))
    moved = guidance.factorize_rows(metric_ENN[:, other_N][:, :, other_N], 0.05)
    given = weight_ENK, codes_ENK, scale_ENG, hessian_EKK, 1, SIGNED, int4()
    wanted = codes_ENK, *gptq.refine(*given, rows)
    given = weight_ENK[:, other_N], codes_ENK[:, other_N], scale_ENG[:, other_N], hessian_EKK, 1, SIGNED, int4()
    found = (
        gptq.solve_codes(weight_ENK[:, other_N], scale_ENG[:, other_N], factor, int4(), moved),
        *gptq.refine(*given, moved),
    )
    assert all(torch.equal(values, old[:, other_N]) for values, old in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shared_metric_is_each_experts_own(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor], dtype: torch.dtype
) -> None:
    factor = gptq.factorize_(solved[1].to(dtype), DAMPING, "activation", GROUP)
    metric_ENN = metrics(1).to(dtype)
    shared, own = (guidance.factorize_rows(metric_ENN.expand(count, -1, -1), 0.05) for count in (1, EXPERTS))
    given = weight_ENK.to(dtype), scale_ENG.to(dtype)
    codes_ENK = gptq.solve_codes(*given, factor, int4(), shared)
    assert torch.equal(codes_ENK, gptq.solve_codes(*given, factor, int4(), own))
    found, wanted = (
        gptq.refine(given[0], codes_ENK, given[1], solved[1].to(dtype), 1, SIGNED, int4(), rows)
        for rows in (shared, own)
    )
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_guidance_leaves_about_the_predicted_share() -> None:
    problem = problems.make(experts=2, outputs=128, inputs=128)
    hessian_EKK, weight_ENK = problems.hessians(problem).float(), problem.weight_ENK
    factor = gptq.factorize_(hessian_EKK, DAMPING, "activation", GROUP)
    metric_ENN = metrics(1, 128).float() + 30 * torch.eye(128)
    rows = guidance.factorize_rows(metric_ENN, 0.05)
    scale_ENG = grid.absmax_scales(weight_ENK, int4(GROUP))
    codes = (
        gptq.solve_codes(weight_ENK, scale_ENG, factor, int4(), rows),
        gptq.solve_codes(weight_ENK, scale_ENG, factor, int4()),
    )
    guided, plain = (proxy_E(weight_ENK, each, scale_ENG, hessian_EKK, rows).sum().item() for each in codes)
    assert guided / plain == pytest.approx(guidance.predicted_share(metric_ENN[0]), rel=0.1)
    assert guided < 0.85 * plain


# ---- refinement


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
def test_refinement_is_coordinate_descent(dtype: str) -> None:
    problem = problems.make(experts=1, outputs=7, inputs=64)
    hessian_EKK, weight_ENK = problems.hessians(problem), problem.weight_ENK.double()
    gptq.factorize_(hessian_EKK, DAMPING, "activation", GROUP)  # damps it
    rows = guidance.factorize_rows(metrics(1, 7), 0.05)
    scale_ENG = grid.absmax_scales(weight_ENK.float(), int4(GROUP)).double()
    scale_ENG[:, ::2] *= -1
    rounded_ENK = RTN(weight_ENK, scale_ENG, int4())
    refit = Refit(signed=True) if dtype else None
    codes_ENK, refined_ENG = gptq.refine(
        weight_ENK, rounded_ENK, scale_ENG, hessian_EKK, 2, refit, int4(dtype=dtype or "bf16"), rows
    )
    wanted = reference.TwoSided(
        problems.array(weight_ENK[0]),
        rounded_ENK[0].long().numpy().copy(),
        problems.array(scale_ENG[0]).copy(),
        problems.array(hessian_EKK[0]),
        natural_metric(rows),
    )
    reference.two_sided_descent(wanted, rows.order_EN[0].tolist(), 2, dtype)
    assert (codes_ENK[0].numpy() == wanted.codes_NK).all() and (problems.array(refined_ENG[0]) == wanted.scale_NG).all()
    assert (wanted.codes_NK != rounded_ENK[0].numpy()).mean() > 0.1


@pytest.mark.parametrize("dtype", ["", "bf16", "fp16"])
@pytest.mark.parametrize("start", ["solved", "rounded", "random"])
@pytest.mark.parametrize("shared", [False, True])
def test_the_proxy_never_rises(dtype: str, start: str, shared: bool) -> None:
    """Rows that are all but one another's multiples among them, for which rows refined side by side diverge."""
    problem = problems.make(experts=2, outputs=100, inputs=96)
    hessian_EKK, target_ENK = problems.hessians(problem).float(), problem.weight_ENK
    factor = gptq.factorize_(hessian_EKK, DAMPING, "activation", GROUP)
    metric_ENN = metrics(2, 100).float()
    metric_ENN[:, :40, :40] += 20
    rows = guidance.factorize_rows(metric_ENN[: 1 if shared else 2], 0.05)
    scale_ENG = grid.absmax_scales(target_ENK, int4(GROUP))
    codes_ENK = {
        "solved": gptq.solve_codes(target_ENK, scale_ENG, factor, int4(), rows),
        "rounded": RTN(target_ENK, scale_ENG, int4()),
        "random": torch.randint(-8, 8, target_ENK.shape, generator=torch.Generator().manual_seed(9)).to(torch.int8),
    }[start]
    refit = Refit(signed=True) if dtype else None
    proxies = [proxy_E(target_ENK, codes_ENK, scale_ENG, hessian_EKK, rows)]
    for _ in range(4):
        codes_ENK, scale_ENG = gptq.refine(
            target_ENK, codes_ENK, scale_ENG, hessian_EKK, 1, refit, int4(dtype=dtype or "bf16"), rows
        )
        proxies.append(proxy_E(target_ENK, codes_ENK, scale_ENG, hessian_EKK, rows))
        assert (proxies[-1] <= proxies[-2] * (1 + 1e-6)).all()
    assert (proxies[1] < proxies[0]).all()


def test_refinement_with_rows_changes_no_input(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor]
) -> None:
    rows = single(guidance.factorize_rows(metrics(), 0.05))
    given = weight_ENK.float(), RTN(weight_ENK, scale_ENG, int4()), scale_ENG.float(), solved[1].float()
    tensors = *given, rows.metric_ENN, rows.unit_ENN, rows.order_EN
    before = [tensor.clone() for tensor in tensors]
    codes_ENK, refined_ENG = gptq.refine(*given, 1, SIGNED, int4(), rows)
    assert codes_ENK.dtype == torch.int8 and refined_ENG.shape == scale_ENG.shape
    assert codes_ENK.min() >= -8 and codes_ENK.max() <= 7 and torch.equal(refined_ENG, grid.stored(refined_ENG, "bf16"))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("rowwise", [False, True])
def test_levels_are_the_grids(rowwise: bool, weight_ENK: Tensor, solved: tuple[Factor, Tensor]) -> None:
    """256 levels: fp32 takes the native kernels, float64 torch's; both use codes that int4 has not."""
    onto, metric_ENN = int8(GROUP), metrics()
    found, errors = [], []
    for dtype in (torch.float32, torch.float64):
        target_ENK, hessian_EKK = weight_ENK.to(dtype), solved[1].to(dtype)
        factor = gptq.factorize_(hessian_EKK.clone(), DAMPING, "activation", GROUP)
        rows = guidance.factorize_rows(metric_ENN.to(dtype), 0.05) if rowwise else None
        scale_ENG = grid.search_scales(weight_ENK.float(), hessian_EKK.diagonal(dim1=1, dim2=2).float(), onto, SEARCH)
        codes_ENK = gptq.solve_codes(target_ENK, scale_ENG.to(dtype), factor, onto, rows)
        refined = gptq.refine(target_ENK, codes_ENK, scale_ENG.to(dtype), hessian_EKK, 1, SIGNED, onto, rows)
        found.append((scale_ENG, codes_ENK, refined[0]))
        errors += [target_ENK - grid.dequantize(codes_ENK, scale_ENG), target_ENK - grid.dequantize(*refined)]
    for native, torchs in zip(*found, strict=True):
        assert (native == torchs).float().mean() > 0.98
    for codes_ENK in (*found[0][1:], *found[1][1:]):
        assert codes_ENK.dtype == torch.int8 and codes_ENK.min() < -100 and codes_ENK.max() > 100
    assert all(error_ENK.abs().mean() < 0.02 * weight_ENK.abs().mean() for error_ENK in errors)
    plain_ENK = RTN(weight_ENK, grid.absmax_scales(weight_ENK.float(), onto), onto)
    assert plain_ENK.min() >= -128 and plain_ENK.abs().max() >= 127


# ---- native kernels


def group_problem(columns: int, rows: int, shared: bool) -> dict[str, Tensor]:
    """Three groups of columns, columns first; two experts."""
    generator = torch.Generator().manual_seed(columns + rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    root_ENN, input_EKT = normal(1 if shared else 2, rows, rows), normal(2, 3 * columns, 400)
    return {
        "weight_EKN": normal(2, 3 * columns, rows),
        "scale_EGN": grid.stored(0.2 + 0.3 * torch.rand(2, 3, rows, generator=generator), "bf16"),
        "metric_ENN": root_ENN @ root_ENN.mT + torch.eye(rows),
        "hessian_EKK": input_EKT @ input_EKT.mT / 400,
        "noise_EKN": 0.1 * normal(2, 3 * columns, rows),
    }


def upper(matrix_ENN: Tensor) -> Tensor:
    """NaN where a kernel must not read."""
    return torch.where(torch.ones(matrix_ENN.shape[1:]).triu(1) > 0, matrix_ENN, torch.nan)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("columns", "rows"), [(128, 70), (40, 9), (1, 33), (3, 1)])
def test_native_solve_by_rows_is_torchs(columns: int, rows: int, threads: int, shared: bool) -> None:
    """Rows and columns that fill no tile, views with strides, what must not be read."""
    made = group_problem(columns, rows, shared)
    weight_ENB = made["weight_EKN"][:, columns : 2 * columns].mT
    target_ENB = weight_ENB + made["noise_EKN"][:, columns : 2 * columns].mT
    scale_ENB = made["scale_EGN"][:, 1, :, None].expand_as(weight_ENB)
    unit_ENN = upper(0.1 * made["metric_ENN"] / rows**0.5)
    given = target_ENB, weight_ENB, upper(made["hessian_EKK"])[:, :columns, :columns], scale_ENB, unit_ENN
    kept = [tensor.clone() for tensor in given]
    wanted_codes, wanted_fed = gptq.inblock_by_rows_torch(*given, int4())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    codes_ENB, fed_ENB = gptq.inblock_by_rows(*given, int4())
    torch.set_num_threads(before)
    assert torch.equal(codes_ENB, wanted_codes) and codes_ENB.any()
    torch.testing.assert_close(fed_ENB, wanted_fed, rtol=1e-4, atol=1e-5)
    for tensor, old in zip(given, kept, strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("refit", [None, SIGNED, UNSIGNED], ids=["codes", "bf16", "fp16"])
@pytest.mark.parametrize(("columns", "rows"), [(128, 70), (40, 9)])
def test_native_refinement_by_rows_is_torchs(
    columns: int, rows: int, refit: Refit | None, threads: int, shared: bool
) -> None:
    """The group in the middle, of three."""
    made = group_problem(columns, rows, shared)
    relative_ENN = made["metric_ENN"] / made["metric_ENN"].diagonal(dim1=1, dim2=2)[:, None]
    target_EKN, scale_EGN = made["weight_EKN"], made["scale_EGN"]
    wide_EKN = scale_EGN.repeat_interleave(columns, dim=1)
    code_EKN = ((target_EKN + 5 * made["noise_EKN"]) / wide_EKN).round()
    code_EKN[..., 0] *= -1  # whose scale would become negative, where it may
    code_EKN.clamp_(-8, 7)
    block = slice(columns, 2 * columns)
    hessian_EBB = made["hessian_EKK"][:, block, block]
    outcomes: list[tuple[Tensor, ...]] = []
    for kernel_, count in ((gptq.refine_by_rows_, threads), (gptq.refine_by_rows_torch_, 1)):
        state = target_EKN, target_EKN - code_EKN * wide_EKN, code_EKN.clone(), scale_EGN.clone()
        gradient_EBN = made["hessian_EKK"][:, block] @ state[1]
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        kernel_(
            1,
            (gradient_EBN, hessian_EBB @ code_EKN[:, block], hessian_EBB),
            relative_ENN,
            state,
            refit,
            grid_for(refit),
        )
        torch.set_num_threads(before)
        outcomes.append((*state[1:], gradient_EBN))
    (error, code, scale, gradient), (error_torch, code_torch, scale_torch, gradient_torch) = outcomes
    # a tie that falls otherwise moves the rows after it
    same, moved = code == code_torch, (code != code_EKN).float().mean()
    assert same.float().mean() > 0.998 and moved > 0.02
    assert (scale == scale_torch).float().mean() > 0.998 and torch.equal(scale, scale_EGN) == (refit is None)
    if same.all():
        torch.testing.assert_close(error, error_torch, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(gradient, gradient_torch, rtol=1e-3, atol=1e-3)
    others = [place for place in range(3 * columns) if not columns <= place < 2 * columns]
    assert torch.equal(code[:, others], code_EKN[:, others])


# ---- degenerate metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_metrics_stay_finite(
    weight_ENK: Tensor, scale_ENG: Tensor, solved: tuple[Factor, Tensor], dtype: torch.dtype
) -> None:
    """Nothing known at all; an output that nothing depends on; one gradient alone."""
    given: tuple[Any, ...] = weight_ENK.to(dtype), scale_ENG.to(dtype)
    hessian_EKK = solved[1].to(dtype)
    factor = gptq.factorize_(hessian_EKK.clone(), DAMPING, "activation", GROUP)
    metric_ENN = metrics().to(dtype)
    metric_ENN[0] = 0
    metric_ENN[1, 5], metric_ENN[1, :, 5] = 0, 0
    metric_ENN[2] = metric_ENN[2, 0, :, None] * metric_ENN[2, 0]
    rows = guidance.factorize_rows(metric_ENN, 0.05)
    assert not rows.diagonal_E.any()
    assert all(values.isfinite().all() for values in (rows.metric_ENN, rows.unit_ENN, rows.pivot_EN))
    plain_ENK, codes_ENK = gptq.solve_codes(*given, factor, int4()), gptq.solve_codes(*given, factor, int4(), rows)
    assert torch.equal(codes_ENK[0], plain_ENK[0]) and torch.equal(codes_ENK[1, 5], plain_ENK[1, 5])
    assert not torch.equal(codes_ENK[1], plain_ENK[1])
    start = given[0], plain_ENK, given[1], hessian_EKK, 2, SIGNED, int4()
    (refined_ENK, scale_refined), (wanted_ENK, scale_wanted) = gptq.refine(*start, rows), gptq.refine(*start)
    assert scale_refined.isfinite().all()
    assert torch.equal(refined_ENK[0], wanted_ENK[0]) and torch.equal(scale_refined[0], scale_wanted[0])
    assert torch.equal(refined_ENK[1, 5], wanted_ENK[1, 5])
    assert np.isfinite(guidance.predicted_share(metric_ENN[0])) and np.isfinite(guidance.predicted_share(metric_ENN[2]))


# ---- gate and up


HIDDEN, WIDTH, TOKENS, DRAWS = 6, 4, 5, 7


def swiglu() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gate and up of each token [T, 2I], weights of the router, W_down, drawn gradients at the layer's output."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, 2 * WIDTH), (TOKENS,), (HIDDEN, WIDTH), (DRAWS, HIDDEN)
    gate_up_T2I, weight_T, down_DI, delta = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)
    return gate_up_T2I, weight_T.abs(), down_DI, delta


def test_the_metric_of_gate_and_up_is_that_of_their_gradients() -> None:
    """Each token with each drawn gradient at the layer's output, by autograd through the expert."""
    gate_up_T2I, weight_T, down_DI, delta = swiglu()
    sampled_NN, moment_NN = torch.zeros(2, 2 * WIDTH, 2 * WIDTH, dtype=torch.float64)
    for row_2I, weight in zip(gate_up_T2I, weight_T, strict=True):
        for gradient_D in delta:
            leaf_2I = row_2I.clone().requires_grad_()
            gate_I, up_I = leaf_2I.chunk(2)
            (weight * down_DI @ (torch.nn.functional.silu(gate_I) * up_I) @ gradient_D).backward()
            assert leaf_2I.grad is not None
            sampled_NN += torch.outer(leaf_2I.grad, leaf_2I.grad) / (TOKENS * DRAWS)
    # in fp32, as the function is
    seen_T2I = guidance.sensitivities(gate_up_T2I).double()
    for s_2I, weight in zip(seen_T2I, weight_T, strict=True):
        moment_NN += weight**2 * torch.outer(s_2I, s_2I) / TOKENS
    curvature_DD = delta.T @ delta / DRAWS
    found = guidance.gate_up_metric(down_DI[None].float(), curvature_DD.float(), moment_NN[None].float())
    torch.testing.assert_close(found[0].double(), sampled_NN, rtol=1e-5, atol=1e-6)


def test_sensitivities_are_inputs_of_a_second_moment_like_any_other() -> None:
    gate_up_T2I, weight_T, _, _ = swiglu()
    seen_T2I = guidance.sensitivities(gate_up_T2I.bfloat16())
    assert seen_T2I.dtype == torch.bfloat16
    square_T = weight_T.float().square()
    sums = moments.accumulate(seen_T2I, torch.arange(TOKENS), square_T, [0, 2, 2, TOKENS])
    mean_ENN, _ = moments.shrink(sums, torch.eye(2 * WIDTH), 0.0, effective=True, trace_matched=True)
    exact_T2I = guidance.sensitivities(gate_up_T2I) * weight_T[:, None]
    wanted_NN = exact_T2I[2:].T @ exact_T2I[2:] / weight_T[2:].square().sum()
    torch.testing.assert_close(mean_ENN[2].double(), wanted_NN, rtol=0.02, atol=0.01)
    down_EDI = torch.randn(3, HIDDEN, WIDTH, generator=torch.Generator().manual_seed(1))
    metric_ENN = guidance.gate_up_metric(down_EDI, torch.zeros(HIDDEN, HIDDEN), mean_ENN)
    assert metric_ENN.shape == mean_ENN.shape and not metric_ENN.any()
    assert guidance.factorize_rows(metric_ENN, 0.05).unit_ENN.isfinite().all()  # an expert without a moment
