"""int8 linear modules: moments of what they are given, and codes for them, against float64."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from fourfold.core import gptq
from fourfold.datatypes import QuantizedGroup
from fourfold.distributed.team import Team, alone
from fourfold.distributed.workers import Worker
from fourfold.quantize import dense, linear
from fourfold.quantize.linear import InputMoments, LinearInputs, solve_weight
from fourfold.quantize.site import damping
from fourfold.recipe import load_recipe

CPU = torch.device("cpu")
INPUTS, OUTPUTS, GROUP = 96, 24, 32
RECIPE = load_recipe("compact")


def inputs(tokens: int, seed: int = 0) -> Tensor:
    """Correlated, with one loud channel, BF16 [T, K]."""
    generator = torch.Generator().manual_seed(seed)
    mixing_KK = torch.randn(INPUTS, INPUTS, generator=generator) * 0.2 + torch.eye(INPUTS)
    input_TK = torch.randn(tokens, INPUTS, generator=generator) @ mixing_KK
    input_TK[:, 7] *= 30
    return input_TK.bfloat16()


def weight(seed: int = 1) -> Tensor:
    return (torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(seed)) * 0.05).bfloat16()


def summed(*parts: Tensor) -> InputMoments:
    sums = InputMoments.zeros(INPUTS, CPU)
    for part in parts:
        sums.add_(part)
    return sums


def solved(weight_NK: Tensor, sums: InputMoments) -> tuple[QuantizedGroup, Tensor]:
    """Codes, and the damped moments that they were solved with."""
    hessian_1KK = sums.mean(RECIPE.solver.pool * INPUTS)
    factor = gptq.factorize_(hessian_1KK, damping(RECIPE.solver), RECIPE.solver.order, GROUP)
    return solve_weight(weight_NK, hessian_1KK, factor, GROUP, RECIPE), hessian_1KK


def error(weight_NK: Tensor, group: QuantizedGroup, hessian_KK: Tensor) -> Tensor:
    """tr(Err H Err^T) of each row, float64."""
    scale_NK = group.scale_ENG[0].double().repeat_interleave(GROUP, dim=1)
    error_NK = group.codes_ENK[0].double() * scale_NK - weight_NK.double()
    return ((error_NK @ hessian_KK.double()) * error_NK).sum(dim=1)


def test_moments_are_the_mean_shrunk_to_its_diagonal() -> None:
    input_TK, n0 = inputs(200), 48.0
    exact_TK = input_TK.double()
    mean_KK = exact_TK.T @ exact_TK / 200
    energy_T = exact_TK.square().sum(dim=1)
    effective = float(energy_T.sum() ** 2 / energy_T.square().sum())
    wanted_KK = mean_KK * effective / (effective + n0)
    wanted_KK.diagonal().copy_(mean_KK.diagonal())
    found_1KK = summed(input_TK[:70], input_TK[70:]).mean(n0)
    assert torch.allclose(found_1KK[0].double(), wanted_KK, rtol=1e-4, atol=1e-5 * float(mean_KK.abs().max()))


def test_codes_are_those_of_the_float64_column_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every block and slab size; levels are int8's."""
    monkeypatch.setattr(gptq, "BLOCK", 17)
    monkeypatch.setattr(linear, "SLAB_ROWS", 7)
    monkeypatch.setattr(reference, "code_of", lambda value_N, scale_N: np.clip(np.rint(value_N / scale_N), -128, 127))
    weight_NK = weight()
    group, hessian_1KK = solved(weight_NK, summed(inputs(400)))
    diagonal = hessian_1KK[0].diagonal().tolist()
    order = reference.order_columns(diagonal, RECIPE.solver.order, GROUP)
    exact = (weight_NK.double().numpy(), group.scale_ENG[0].double().numpy(), hessian_1KK[0].double().numpy())
    codes_NK, _ = reference.gptq(*exact, order)
    assert np.mean(np.asarray(codes_NK) != group.codes_ENK[0].numpy()) < 0.002  # a tie, in fp32
    assert int(group.codes_ENK.abs().max()) > 100


@pytest.mark.parametrize("tokens", [1, 5, 60, 400])
def test_no_row_is_worse_than_rounded(tokens: int) -> None:
    """By the inputs that it is solved on, and on others of their kind not much: a few tokens say little."""
    weight_NK = weight()
    group, hessian_1KK = solved(weight_NK, summed(inputs(tokens)))
    rounded = dense.round_weight(weight_NK, 8, GROUP, RECIPE)
    own = error(weight_NK, group, hessian_1KK[0]) / error(weight_NK, rounded, hessian_1KK[0])
    assert float(own.max()) <= 1.0 + 1e-5
    other_TK = inputs(4000)[-3000:].double()  # of the same mixing, none of them seen
    held_out = error(weight_NK, group, other_TK.T @ other_TK) / error(weight_NK, rounded, other_TK.T @ other_TK)
    assert float(held_out.mean()) < {1: 1.02, 5: 1.0, 60: 0.8, 400: 0.65}[tokens]


def test_modules_that_share_an_input_share_its_moments() -> None:
    first, second, third = (nn.Linear(INPUTS, 8, bias=False, dtype=torch.bfloat16) for _ in range(3))
    found = LinearInputs({"q": first, "k": second, "o": third})
    with found.watched():
        for batch_TK in (inputs(30), inputs(50, 3)):
            row_1TK = batch_TK[None]
            first(row_1TK), second(row_1TK), third(row_1TK.clone())
    first(inputs(9))  # not watched any more
    assert found.first == {"q": "q", "k": "q", "o": "o"}
    assert set(found.found) == {"q", "o"}
    wanted = summed(inputs(30), inputs(50, 3))
    for sums in found.found.values():
        assert torch.equal(sums.hessian_KK, wanted.hessian_KK) and float(sums.tokens) == 80


def test_workers_add_up_what_they_saw_also_one_without_rows() -> None:
    team = Team((CPU, CPU, CPU))
    parts = [[inputs(30), inputs(50, 3)], [inputs(20, 4)], []]

    def work(worker: Worker) -> LinearInputs:
        module = nn.Linear(INPUTS, 8, bias=False, dtype=torch.bfloat16)
        own = LinearInputs({"q": module})
        with own.watched():
            for part in parts[worker.rank]:
                module(part)
        return own.of_all(worker, {"q": INPUTS})

    found = every_worker(team, work)
    wanted = summed(*(part for own in parts for part in own))
    for one in found:
        assert one.first == {"q": "q"} and float(one.found["q"].tokens) == 100
        assert torch.allclose(one.found["q"].hessian_KK, wanted.hessian_KK, rtol=1e-5, atol=1e-3)
        assert torch.equal(one.found["q"].hessian_KK, found[0].found["q"].hessian_KK)


def every_worker(team: Team, work: object) -> list[LinearInputs]:
    found: list[LinearInputs] = []
    lock = threading.Lock()

    def keep(worker: Worker) -> None:
        made = work(worker)  # type: ignore[operator]
        with lock:
            found.append(made)

    team.run(keep)
    return found


def test_a_module_that_is_given_nothing_is_rounded() -> None:
    found = LinearInputs({"q": nn.Linear(INPUTS, 8)}).of_all(alone(CPU), {"q": INPUTS})
    assert found.first == {} and found.found == {}
