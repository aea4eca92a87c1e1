"""What an error at each token weighs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from fourfold.datatypes import Rows
from fourfold.distributed.team import Team, alone
from fourfold.distributed.workers import Worker
from fourfold.quantize.observe import MOST_IMPORTANT, token_importance

ROWS, LENGTH, HIDDEN = 5, 13, 37
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def hidden_RTD() -> Tensor:
    """States whose lengths lie three orders of magnitude apart; one is of length zero."""
    generator = torch.Generator().manual_seed(1)
    length_RT1 = 10.0 ** (3 * torch.rand(ROWS, LENGTH, 1, generator=generator) - 1.5)
    hidden_RTD = (torch.randn(ROWS, LENGTH, HIDDEN, generator=generator) * length_RT1).bfloat16()
    hidden_RTD[3, 7] = 0
    return hidden_RTD


def importance(worker: Worker, hidden_RTD: Tensor, power: float) -> Tensor:
    """Of all workers' tokens, each of which has its rows."""
    own_RTD = hidden_RTD[worker.own_samples(ROWS)]
    return token_importance(worker, Rows(torch.zeros(own_RTD.shape[:2], dtype=torch.int64), own_RTD), power)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_importance_is_the_median_length_over_each_tokens(hidden_RTD: Tensor, power: float) -> None:
    """To a power, at most four; a state of length zero has the most."""
    kept_RTD, found_T = hidden_RTD.clone(), importance(alone(CPU), hidden_RTD, power)
    assert found_T.shape == (ROWS * LENGTH,) and found_T.dtype == torch.float32
    zero = 3 * LENGTH + 7
    hidden_TD = hidden_RTD.double().flatten(0, 1)
    wanted = reference.token_importance((hidden_TD + 1e-30).numpy(), power)
    torch.testing.assert_close(found_T.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=0)
    length_T = hidden_TD.norm(dim=1)
    assert found_T[length_T.argsort()[(ROWS * LENGTH - 1) // 2]] == 1
    assert found_T[zero] == found_T.max() == MOST_IMPORTANT == 4 and found_T.min() < 0.5
    assert torch.equal(hidden_RTD, kept_RTD)


def test_a_power_of_zero_weighs_all_tokens_alike(hidden_RTD: Tensor) -> None:
    assert (importance(alone(CPU), hidden_RTD, 0.0) == 1).all()


def test_importance_is_the_same_however_loud_all_states_are(hidden_RTD: Tensor) -> None:
    usual_T, louder_T = (importance(alone(CPU), factor * hidden_RTD, 0.5) for factor in (1, 1024))
    assert torch.equal(usual_T, louder_T)


def test_states_of_length_zero_alone_weigh_alike() -> None:
    found_T = importance(alone(CPU), torch.zeros(ROWS, LENGTH, HIDDEN).bfloat16(), 0.5)
    assert found_T.isfinite().all() and (found_T == found_T[0]).all() and found_T[0] > 0


@pytest.mark.parametrize("workers", [2, 3])
def test_several_workers_find_what_one_finds(hidden_RTD: Tensor, workers: int) -> None:
    """Rows are not shared out evenly, and the median is that of all."""
    wanted_T = importance(alone(CPU), hidden_RTD, 0.5)
    found = Team([CPU] * workers).run(lambda worker: worker.all_gather_object(importance(worker, hidden_RTD, 0.5)))
    assert len(found) == workers and all(torch.equal(found_T, wanted_T) for found_T in found)
