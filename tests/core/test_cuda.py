"""The Triton kernels against the torch functions of the same name and the float64 reference.

Without a GPU they run in Triton's interpreter (tests/conftest.py asks for it), on few numbers, as it is slow. The same
tests marked `gpu` run compiled, on more. Whether they compile is tested without a GPU too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import problems
import reference
from fourfold.core import gptq, grid, moments, pack
from fourfold.core.grid import ScaleSearch
from fourfold.core.kernels import cuda
from fourfold.datatypes import Moments
from grids import int4, int8
from problems import Problem

pytest.importorskip("triton")
SEARCH = ScaleSearch(low=0.45, high=1.15, steps=36, signed=True)


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


# ---- second moments


def accumulate(problem: Problem, device: str) -> Moments:
    """The kernel's moments, on the host."""
    found = cuda.accumulate(
        problem.input_TK.to(device), problem.token_S.to(device), problem.weight_S.to(device), problem.offsets
    )
    tensors = (getattr(found, field.name) for field in dataclasses.fields(Moments))
    return Moments(*(None if tensor is None else tensor.cpu() for tensor in tensors))


def of_tokens(input_TK: Tensor, weight_T: Tensor, device: str) -> Moments:
    """One expert that all tokens go to."""
    token_S = torch.arange(len(input_TK), device=device)
    return cuda.accumulate(input_TK.to(device), token_S, weight_T.to(device), [0, len(input_TK)])


def tolerance(device: str) -> float:
    """Of sums, as a share of the largest: a tensor core's are not rounded to nearest."""
    return 1e-6 if device == "cpu" else 1e-5


def worst(found: Tensor, wanted: np.ndarray) -> float:
    return float(np.abs(problems.array(found) - wanted).max() / np.abs(wanted).max())


@pytest.fixture(scope="module")
def problem(device: str) -> Problem:
    """Three experts, the second without tokens; neither tokens nor inputs fill the last tile."""
    few = device == "cpu"
    made = problems.make(experts=2, inputs=144 if few else 512, tokens=70 if few else 40_000)
    return dataclasses.replace(made, offsets=[0, made.offsets[1], *made.offsets[1:]])


@pytest.fixture(scope="module")
def found(problem: Problem, device: str) -> Moments:
    return accumulate(problem, device)


def test_moments_are_those_of_torch(problem: Problem, found: Moments, device: str) -> None:
    wanted = moments.accumulate(problem.input_TK, problem.token_S, problem.weight_S, problem.offsets)
    assert worst(found.hessian_EKK, problems.array(wanted.hessian_EKK)) < tolerance(device)
    assert torch.equal(found.hessian_EKK, found.hessian_EKK.mT)
    assert torch.equal(found.count_E, wanted.count_E) and found.count_E.dtype == wanted.count_E.dtype
    assert torch.allclose(found.weight_E, wanted.weight_E, rtol=1e-6)
    assert torch.allclose(found.energy2_E, wanted.energy2_E, rtol=1e-5)
    for field in dataclasses.fields(Moments):
        value = getattr(found, field.name)
        assert value is None or not value[1].any(), field.name


def test_moments_are_those_of_float64(device: str) -> None:
    problem = problems.make(experts=1, inputs=24, tokens=90)
    found = accumulate(problem, device)
    sums = reference.moments(*(values.numpy() for values in problem.tokens_of(0)))
    assert worst(found.hessian_EKK[0], sums.hessian_KK) < tolerance(device)
    assert found.weight_E[0].item() == pytest.approx(sums.weight, rel=1e-6)
    assert found.energy2_E[0].item() == pytest.approx(sums.energy2, rel=1e-6)


def test_an_expert_alone_has_the_same_bits(problem: Problem, found: Moments, device: str) -> None:
    pairs = slice(problem.offsets[2], problem.offsets[3])
    alone = dataclasses.replace(
        problem,
        token_S=problem.token_S[pairs],
        weight_S=problem.weight_S[pairs],
        offsets=[0, pairs.stop - pairs.start],
    )
    lone = accumulate(alone, device)
    assert torch.equal(lone.hessian_EKK[0], found.hessian_EKK[2])
    assert lone.energy2_E[0] == found.energy2_E[2] and lone.weight_E[0] == found.weight_E[2]


def test_one_token_is_its_rounded_outer_product_to_the_bit(device: str) -> None:
    """Halves of BF16's last place among them, which go to even: 1 + 2^-8 down, 1 + 3 * 2^-8 up, and a carry."""
    x_K = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2 - 2**-8, -1 - 2**-8, 1000.0, 3e-5, 0.0, 1 + 2**-8 + 2**-20])
    for weight in (1.0, 0.7):
        scaled_K = (x_K * torch.tensor(weight).sqrt()).bfloat16().float()
        found = of_tokens(x_K[None], torch.tensor([weight]), device)
        assert torch.equal(found.hessian_EKK[0].cpu(), scaled_K[:, None] * scaled_K)
    assert not torch.equal(scaled_K, x_K * torch.tensor(0.7).sqrt())


# ---- column loop


@pytest.mark.parametrize(("rows", "columns"), [(3, 128), (66, 32), (5, 40), (1, 1)])
def test_column_loop_is_column_by_column_in_exact_arithmetic(rows: int, columns: int, device: str) -> None:
    """Halves, quarters and few bits: no operation rounds, ties are real ties, so every bit must be equal."""
    scale = 2.0 ** integers(-1, 1, 2, rows, columns, seed=0) * (1 - 2 * integers(0, 2, 2, rows, columns, seed=1))
    target, weight = integers(-24, 25, 2, 2, rows, columns, seed=2) / 4
    feedback = integers(-1, 2, 2, columns, columns, seed=3) / 2 * (integers(0, 4, 2, columns, columns, seed=4) == 0)
    unread = torch.where(torch.ones(columns, columns).triu(1) > 0, feedback, torch.nan)
    # not contiguous: what the solve hands over are slices
    given = [values.to(device).mT.contiguous().mT for values in (target, weight, unread, scale)]
    before = [values.clone() for values in given]
    codes, error = (values.cpu() for values in cuda.inblock(*given, int4()))
    assert codes.dtype == torch.int8 and error.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in ((given[0], before[0]), (given[1], before[1]), (given[3], before[3])))
    for expert in range(2):
        arrays = (problems.array(values[expert]) for values in (target, weight, feedback, scale))
        wanted_codes, wanted_error = reference.in_block(*arrays)
        assert (codes[expert].numpy() == wanted_codes).all() and (error[expert].numpy() == wanted_error).all()


def test_levels_are_the_grids(device: str) -> None:
    target = integers(-2000, 2000, 1, 3, 40, seed=0) / 8
    ones = torch.ones_like(target)
    codes, _ = cuda.inblock(*(t.to(device) for t in (target, target, torch.zeros(1, 40, 40), ones)), int8())
    assert torch.equal(codes.cpu(), target.round().clamp(-128, 127).to(torch.int8)) and codes.min() == -128
    one = ScaleSearch(low=1.0, high=1.0, steps=1, signed=False)
    found = cuda.search_scales(target[..., :32].to(device), torch.ones(1, 32, device=device), int8(32), one).cpu()
    assert torch.equal(found, grid.stored(target[..., :32].abs().amax(dim=2, keepdim=True) / 128, "bf16"))


@pytest.mark.parametrize("columns", [32, 64, 128])
def test_codes_are_those_of_torch_but_at_ties(columns: int, device: str) -> None:
    experts, rows = (1, 9) if device == "cpu" else (8, 1000)
    generator = torch.Generator().manual_seed(columns)
    target = torch.randn(experts, rows, columns, generator=generator)
    weight = target + 0.1 * torch.randn(experts, rows, columns, generator=generator)
    feedback = 0.1 * torch.randn(experts, columns, columns, generator=generator)
    scale = grid.stored(0.1 + 0.3 * torch.rand(experts, rows, 1, generator=generator), "bf16").expand_as(target)
    codes, error = (
        values.cpu() for values in cuda.inblock(*(t.to(device) for t in (target, weight, feedback, scale)), int4())
    )
    wanted, _ = gptq.inblock_torch(target, weight, feedback, scale, int4())
    assert torch.equal(error, weight - codes * scale)
    for expert, row in (codes != wanted).any(dim=2).nonzero().tolist():
        first = int((codes != wanted)[expert, row].nonzero()[0])  # what comes after it follows from it
        earlier = error[expert, row, :first].double() @ feedback[expert, :first, first].double()
        ratio = (target[expert, row, first].double() + earlier) / scale[expert, row, first].double()
        assert abs(abs(ratio - ratio.round()) - 0.5) < 1e-5
    assert (codes != wanted).float().mean() < 1e-3


def test_codes_round_half_to_even_and_clamp(device: str) -> None:
    values = [-8.6, -8.5, -7.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0, 1e30, -1e30]
    target = torch.tensor(values, device=device)[None, None]
    feedback = torch.zeros(1, len(values), len(values), device=device)
    codes, _ = cuda.inblock(target, target, feedback, torch.ones_like(target), int4())
    assert codes.flatten().tolist() == [-8, -8, -8, -2, 0, 0, 2, 2, 6, 7, 7, 7, -8]
    codes, _ = cuda.inblock(target, target, feedback, -torch.ones_like(target), int4())
    assert codes.flatten().tolist() == [7, 7, 7, 2, 0, 0, -2, -2, -6, -8, -8, -8, 7]


def test_halves_of_any_scale_go_to_even(device: str) -> None:
    """All BF16 scales of a binade: T / S is a tie exactly, which a reciprocal or a quick division would miss."""
    halves_N = torch.arange(-7.5, 7.0, 1.0)
    scale_M = torch.arange(128) / 128 + 1
    target = (scale_M[:, None] * halves_N)[None].to(device)
    feedback = torch.zeros(1, len(halves_N), len(halves_N), device=device)
    codes, _ = cuda.inblock(target, target, feedback, scale_M[None, :, None].to(device).expand_as(target), int4())
    assert torch.equal(codes.cpu().float(), halves_N.round().expand(1, 128, -1))


# ---- scales


def cost(weight_ENK: Tensor, scale_ENG: Tensor, importance_EK: Tensor) -> Tensor:
    """What the search minimises, float64 [E, N, G]."""
    size = weight_ENK.shape[-1] // scale_ENG.shape[-1]
    codes_ENK = grid.round_to_nearest(weight_ENK, scale_ENG, int4())
    error_ENK = weight_ENK.double() - codes_ENK * grid.spread(scale_ENG.double(), size)
    return (error_ENK.square() * importance_EK[:, None].double()).unflatten(-1, (-1, size)).sum(dim=-1)


@pytest.mark.parametrize(
    ("size", "rows", "groups", "search", "dtype"),
    [
        (128, 5, 1, SEARCH, "bf16"),
        (32, 33, 2, ScaleSearch(low=0.5, high=1.0, steps=5, signed=True), "fp16"),
        (24, 33, 3, ScaleSearch(low=0.9, high=2.0, steps=2, signed=False), "bf16"),
    ],
)
def test_scales_are_those_of_torch(
    size: int, rows: int, groups: int, search: ScaleSearch, dtype: str, device: str
) -> None:
    experts, rows = (2, rows) if device == "cpu" else (8, 30 * rows)
    generator = torch.Generator().manual_seed(size)
    weight_ENK = 0.02 * torch.randn(experts, rows, groups * size, generator=generator)
    weight_ENK[0, 0, :size] = 0
    importance_EK = torch.rand(experts, groups * size, generator=generator).mul(7).exp()
    onto = int4(size, dtype)
    found = cuda.search_scales(weight_ENK.to(device), importance_EK.to(device), onto, search).cpu()
    pairs = zip(weight_ENK, importance_EK, strict=True)
    wanted = torch.stack([grid.choose_scales_torch(w, i, grid.candidates(w, onto, search), onto) for w, i in pairs])
    assert found.dtype == torch.float32 and found.shape == wanted.shape and found[0, 0, 0] == 2.0**-17
    assert (found == wanted).float().mean() >= 0.99
    costs = cost(weight_ENK, found, importance_EK), cost(weight_ENK, wanted, importance_EK)
    assert torch.allclose(*costs, rtol=1e-5)  # where another order of the sum settles a tie otherwise


def test_scales_are_those_of_brute_force(device: str) -> None:
    weight_ENK = problems.make(experts=1, outputs=4, inputs=32).weight_ENK
    importance_EK = torch.rand(1, 32, generator=torch.Generator().manual_seed(0)).mul(7).exp()
    found = cuda.search_scales(weight_ENK.to(device), importance_EK.to(device), int4(32), SEARCH).cpu()
    naive = reference.Search(0.45, 1.15, 36, True, "bf16")
    weight_NK, importance_K = problems.array(weight_ENK[0]), problems.array(importance_EK[0])
    wanted = torch.from_numpy(reference.search_scales(weight_NK, importance_K, 32, naive)).float()[None]
    costs = cost(weight_ENK, found, importance_EK), cost(weight_ENK, wanted, importance_EK)
    assert torch.allclose(*costs, rtol=1e-5) and (found == wanted).float().mean() >= 0.75


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_candidates_are_stored(dtype: str, device: str) -> None:
    """One candidate, which any cost takes. Halves of the last place, both ends of the range, many in between."""
    bits = torch.randint(0x30000000, 0x50000000, (900,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    halves = (bits & ~0xFFFF) | 0x8000
    ends = torch.tensor([0.0, 1e-30, 2.0**-17, 2.0**-18, 65280.0, 65300.0, 65535.0, 1e18, 3e-8])
    value_N = torch.cat([bits.view(torch.float32), halves.view(torch.float32), ends])
    one = ScaleSearch(low=1.0, high=1.0, steps=1, signed=False)
    weight_ENK = torch.zeros(1, len(value_N), 8)
    weight_ENK[0, :, 3] = -8 * value_N
    found_N = (
        cuda.search_scales(weight_ENK.to(device), torch.zeros(1, 8, device=device), int4(8, dtype), one).cpu().flatten()
    )
    assert torch.equal(found_N, grid.stored(value_N, dtype))
    assert found_N.tolist() == [reference.stored(value, dtype) for value in value_N.tolist()]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_ties_go_to_the_first_and_no_cost_is_taken_for_none(device: str) -> None:
    weight_ENK = torch.zeros(1, 3, 32)
    weight_ENK[0, 0, :3] = torch.tensor([8.0, -7.0, 3.0])
    weight_ENK[0, 1] = 3e38  # every candidate costs inf
    ones_EK = torch.ones(1, 32)
    wide = ScaleSearch(low=1.25, high=1.25, steps=1, signed=True)  # nothing is clamped: signs are equal
    found = cuda.search_scales(weight_ENK.to(device), ones_EK.to(device), int4(32), wide).cpu()
    assert found.flatten().tolist() == [1.25, 2.0**-17, 2.0**-17]
    exact = dataclasses.replace(wide, low=1.0, high=1.0)  # one side holds 8 and -7, the other does not
    weight_ENK = torch.zeros(1, 2, 32)
    weight_ENK[0, :, :2] = torch.tensor([[8.0, -7.0], [-8.0, 7.0]])
    assert cuda.search_scales(weight_ENK.to(device), ones_EK.to(device), int4(32), exact).flatten().tolist() == [
        -1.0,
        1.0,
    ]


# ---- packing


@pytest.mark.parametrize("shape", [(2, 3, 1400), (1, 1, 8), (0, 4, 16), (2, 0, 16)])
def test_words_are_those_of_torch(shape: tuple[int, int, int], device: str) -> None:
    codes_ENK = integers(-8, 8, *shape, seed=0).to(torch.int8)
    given_ENK = codes_ENK.to(device).mT.contiguous().mT
    words_ENW = cuda.pack_codes(given_ENK).cpu()
    assert words_ENW.dtype == torch.int32 and torch.equal(words_ENW, pack.pack_codes(codes_ENK))
    assert [reference.unpack_compressed_tensors(rows) for rows in words_ENW.tolist()] == codes_ENK.tolist()
    assert torch.equal(given_ENK.cpu(), codes_ENK)


def test_inputs_that_fill_no_word_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"12 input features.*multiple of 8"):
        cuda.pack_codes(torch.zeros(1, 2, 12, dtype=torch.int8, device=device))


# ---- without triton, without a GPU


def test_the_module_is_imported_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("cuda_without_triton", cuda.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.triton is None and module.INTERPRETED is False and callable(module.accumulate)


@pytest.mark.slow
def test_core_is_imported_without_triton() -> None:
    """In a process of its own, as an installation without a GPU has it: every room of kernels, and who calls them."""
    code = "import sys; sys.modules['triton'] = None; from fourfold.core import gptq, grid, moments, pack"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path) -> None:
    """To machine code, without a GPU: next to no register is spilled, and shared memory fits an SM 8.6 (99 KB)."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parents[1] / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, str(folder / "compile_kernels.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert len(kernels) == 7
    for kernel in kernels:
        assert kernel["spilled_bytes"] <= 64 and kernel["shared_bytes"] <= 99 * 1024, kernel
        assert "div.full" not in kernel["divisions"], kernel  # off by two units in the last place
    assert all("mma" in kernel["products"] for kernel in kernels if kernel["name"] == "_second_moments")
